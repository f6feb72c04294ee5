package lease

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/writsec/writ/internal/audit"
)

// Uses records what resource servers show of the use of credentials, by
// introspecting them. The first sight of a lease by a service is recorded before
// the service is answered; later ones are counted and recorded together, so that
// the log does not grow with every call.
type Uses struct {
	Store  UseStore
	Logger *slog.Logger

	mu    sync.Mutex
	seen  map[use]*sightings
	final bool // flush takes no more
}

// UseStore runs transactions.
type UseStore interface {
	Update(ctx context.Context, f func(audit.Tx) error) error
}

// use is one lease as one service sees it.
type use struct {
	lease, service string
	alive          bool
}

type sightings struct {
	of    Lease
	count int
	idle  bool // nothing since the last flush
}

const (
	useEvery = 10 * time.Second
	maxUses  = 100_000 // beyond, each sight is recorded by itself
)

// Seen records that a service asked about a lease, alive or not.
func (u *Uses) Seen(ctx context.Context, l Lease, service string, alive bool) error {
	key := use{l.ID, service, alive}
	u.mu.Lock()
	s, known := u.seen[key]
	if known && !u.final {
		s.count, s.idle = s.count+1, false
		u.mu.Unlock()
		return nil
	}
	room := len(u.seen) < maxUses
	u.mu.Unlock()
	if err := u.record(ctx, l, key, 1); err != nil || !room {
		return err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.seen == nil {
		u.seen = map[use]*sightings{}
	}
	if u.seen[key] == nil {
		u.seen[key] = &sightings{of: l}
	}
	return nil
}

func (u *Uses) record(ctx context.Context, l Lease, key use, count int) error {
	return u.Store.Update(ctx, func(tx audit.Tx) error {
		return audit.Append(ctx, tx, audit.Entry{
			Kind: audit.LeaseUsed, Session: l.Session, Decision: l.Decision, Lease: l.ID, User: l.User, Agent: l.Agent,
			Detail: map[string]any{"service": key.service, "active": key.alive, "count": count},
		})
	})
}

// Run records the counts from time to time, and for the last time when ctx ends.
func (u *Uses) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			u.mu.Lock()
			u.final = true
			u.mu.Unlock()
			u.step(last)
			return nil
		case <-time.After(useEvery):
			u.step(ctx)
		}
	}
}

// step records what was counted since the last step. What can't be recorded stays
// counted.
func (u *Uses) step(ctx context.Context) {
	u.mu.Lock()
	due := map[use]sightings{}
	for key, s := range u.seen {
		switch {
		case s.count > 0:
			due[key] = *s
		case s.idle:
			delete(u.seen, key)
		default:
			s.idle = true
		}
	}
	u.mu.Unlock()
	for key, s := range due {
		if err := u.record(ctx, s.of, key, s.count); err != nil {
			u.Logger.ErrorContext(ctx, "record uses of credentials", "error", err)
			return
		}
		u.mu.Lock()
		u.seen[key].count -= s.count
		u.mu.Unlock()
	}
}
