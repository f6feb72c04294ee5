package lease

import (
	"sync"
	"time"
)

// Breaker keeps mints from a target that fails, so that they fail at once. After some
// failures in a row, of unmaking too, it lets one through from time to time, until that
// succeeds.
type Breaker struct {
	mu       sync.Mutex
	failures int
	until    time.Time
}

const (
	breakAfter = 5
	breakFor   = 2 * time.Second
)

// Allow reports whether the target may be asked.
func (b *Breaker) Allow() bool {
	if b == nil {
		return true
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	if b.failures < breakAfter {
		return true
	}
	if now.Before(b.until) {
		return false
	}
	b.until = now.Add(breakFor) // the others wait for what becomes of this one
	return true
}

// Fail counts a failure.
func (b *Breaker) Fail() {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.failures++; b.failures >= breakAfter {
		b.until = time.Now().Add(breakFor)
	}
}

// Succeed forgets the failures.
func (b *Breaker) Succeed() {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.failures = 0
}
