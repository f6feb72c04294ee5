// Package reservation counts what is taken, until when: amounts over a sliding
// window, and marks that last as long. It knows names and amounts, not what they are
// of.
package reservation

import (
	"context"
	"errors"
	"math"
	"time"
)

// Reservation takes an amount of what its name stands for, until a time. A mark is a
// reservation of 1.
type Reservation struct {
	Name   string
	Amount int64
	Until  time.Time
}

// Use is all that is taken of one name.
type Use struct {
	Amount int64
	Until  time.Time // when the last of it ends
}

// Usage is what is taken in a scope, by name.
type Usage map[string]Use

// Add counts one more.
func (u Usage) Add(r Reservation) {
	use := u[r.Name]
	use.Amount = plus(use.Amount, r.Amount)
	if r.Until.After(use.Until) {
		use.Until = r.Until
	}
	u[r.Name] = use
}

// plus stops at the largest amount: a sum that wrapped round would be a budget given
// back.
func plus(a, b int64) int64 {
	if b > math.MaxInt64-a {
		return math.MaxInt64
	}
	return a + b
}

// ErrChanged says that a scope is not at the version that was read.
var ErrChanged = errors.New("reservations changed since they were read")

// ErrOverflow says that more would be taken of a name than can be counted.
var ErrOverflow = errors.New("more than can be counted")

// Tx is what reservations need of a transaction.
type Tx interface {
	Now() time.Time
	// Usage sums what is taken in a scope at Now.
	Usage(ctx context.Context, scope string) (Usage, error)
	// ScopeVersion is the version of a scope, 0 where nothing was ever taken.
	ScopeVersion(ctx context.Context, scope string) (int64, error)
	// AdvanceScope gives a scope a greater version, if it is still the one given;
	// otherwise ErrChanged. Other transactions that advance it wait for this one's end.
	AdvanceScope(ctx context.Context, scope string, version int64) error
	// InsertReservation stores r. Of the same name and end, amounts add up.
	InsertReservation(ctx context.Context, scope string, r Reservation) error
}

// Reserve takes what is asked for in a scope, all or nothing, if the scope is still
// at the version that usage was read at; otherwise ErrChanged. Whether there is
// enough is the caller's to judge, by usage.
func Reserve(ctx context.Context, tx Tx, scope string, version int64, usage Usage, rs []Reservation) error {
	taken := map[string]int64{}
	for _, r := range rs {
		if r.Amount < 0 || plus(usage[r.Name].Amount, taken[r.Name]) > math.MaxInt64-r.Amount {
			return ErrOverflow
		}
		taken[r.Name] += r.Amount
	}
	if err := tx.AdvanceScope(ctx, scope, version); err != nil {
		return err
	}
	for _, r := range rs {
		if err := tx.InsertReservation(ctx, scope, r); err != nil {
			return err
		}
	}
	return nil
}

// steps is how finely a window slides: what is taken ends in one of so many steps,
// so that a scope never has more than that many rows of a name, however much is
// going on.
const steps = 64

// Until is when what is taken now leaves a window: never before the window's length,
// and at most a 64th of it later.
func Until(now time.Time, window time.Duration) time.Time {
	step := max((window / steps).Truncate(time.Microsecond), time.Microsecond)
	end := now.Add(window)
	if t := end.Truncate(step); t.Before(end) {
		return t.Add(step)
	}
	return end
}
