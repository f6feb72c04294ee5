package session

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/reservation"
)

// Marks are what decisions left behind.
type Marks struct {
	Labels   []string
	Counters map[string]int64
}

// The names of reservations that labels and counters are kept as.
const (
	labelPrefix   = "label:"
	counterPrefix = "counter:"
)

// Recent is what was left on a pair of user and agent, in whichever session, within
// a window of time.
type Recent struct {
	Marks
	usage reservation.Usage
}

// ReadRecent reads what is left on the pair of a session, in the transaction that
// the session was read in. Pairs that nothing was left on cost no statement.
func ReadRecent(ctx context.Context, tx Tx, s Session) (Recent, error) {
	r := Recent{Marks: Marks{Counters: map[string]int64{}}}
	if s.ScopeVersion == 0 {
		return r, nil
	}
	var err error
	r.usage, err = tx.Usage(ctx, s.Scope)
	for name, use := range r.usage {
		if label, ok := strings.CutPrefix(name, labelPrefix); ok {
			r.Labels = append(r.Labels, label)
		} else if counter, ok := strings.CutPrefix(name, counterPrefix); ok {
			r.Counters[counter] = use.Amount
		}
	}
	slices.Sort(r.Labels)
	return r, err
}

// left is what marks leave on the pair at now that is not there yet.
func (r Recent) left(m Marks, now time.Time, window time.Duration) (out []reservation.Reservation) {
	until := reservation.Until(now, window)
	for _, label := range union(nil, m.Labels) {
		if r.usage[labelPrefix+label].Until.Before(until) {
			out = append(out, reservation.Reservation{Name: labelPrefix + label, Amount: 1, Until: until})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(m.Counters)) {
		if amount := m.Counters[name]; amount != 0 {
			out = append(out, reservation.Reservation{Name: counterPrefix + name, Amount: amount, Until: until})
		}
	}
	return out
}

// with is s with marks left on it, and whether that makes a difference.
func (s Session) with(m Marks) (next Session, changed bool, err error) {
	next = s
	next.Labels = union(s.Labels, m.Labels)
	next.Counters = maps.Clone(s.Counters)
	if next.Counters == nil {
		next.Counters = map[string]int64{}
	}
	changed = len(next.Labels) != len(s.Labels)
	for name, amount := range m.Counters {
		if amount == 0 {
			continue
		}
		sum := next.Counters[name] + amount
		if sum < 0 { // over int64: never wrap round to "nothing spent"
			return s, false, overflow()
		}
		next.Counters[name] = sum
		changed = true
	}
	return next, changed, nil
}

func union(a, b []string) []string {
	out := slices.Concat(a, b)
	slices.Sort(out)
	return slices.Compact(out)
}

func overflow() error { return fault.New(fault.Internal, "counter overflow") }

// idle is how coarsely the idle end moves, as a part of the idle time: a session that
// is busy is not written to for each decision.
const idlePart = 8

// used is s after a decision that keeps it busy for so long yet, such as a person who
// is being asked, and whether that makes a difference.
func (s Session) used(now time.Time, idle, busy time.Duration) (next Session, changed bool) {
	if idle == 0 {
		changed, s.IdleAt = !s.IdleAt.IsZero(), time.Time{}
		return s, changed
	}
	end := now.Add(busy + idle)
	if !s.IdleAt.IsZero() && !s.IdleAt.Before(end.Add(-idle/idlePart)) {
		return s, false
	}
	s.IdleAt = end
	return s, true
}

// Settlement is what a decision leaves behind in its session.
type Settlement struct {
	// Recent is what was left on the pair when the decision was made.
	Recent Recent
	// Marks are what it leaves on the session and on the pair.
	Marks
	// Busy is how long the session is kept busy yet.
	Busy time.Duration
	// Widened is the envelope that the user has approved, by Decision; nil as it is.
	Widened  *Envelope
	Decision string
}

// Settle leaves a decision's marks on the session and on its pair, and in any case
// fails with ErrChanged if one of them is no longer what the decision was made on, or
// the session is over.
//
// What changes anything advances the version of both. So all such decisions of a pair
// are in one order, that of the scope's versions, whichever sessions they are in; and
// one that changes nothing needs only to have seen a state that was true at one moment,
// which is that of CheckSession.
func Settle(ctx context.Context, tx Tx, s Session, limits Settings, m Settlement) error {
	now := tx.Now()
	if !s.Alive(now) {
		return ErrChanged
	}
	next, moved := s.used(now, limits.Idle, m.Busy)
	next, marked, err := next.with(m.Marks)
	if err != nil {
		return err
	}
	left := m.Recent.left(m.Marks, now, limits.Window)
	if marked || len(left) > 0 || m.Widened != nil {
		return leave(ctx, tx, next, left, m)
	}
	if moved {
		if err := tx.UpdateSession(ctx, next, false); err != nil {
			return err
		}
	}
	return tx.CheckSession(ctx, next)
}

// leave stores a session that a decision has changed, and what it leaves on the pair.
func leave(ctx context.Context, tx Tx, s Session, left []reservation.Reservation, m Settlement) error {
	if m.Widened != nil {
		e := *m.Widened
		e.Source = SourceUser
		s.Envelope = &e
	}
	if err := tx.UpdateSession(ctx, s, true); err != nil {
		return err
	}
	err := reservation.Reserve(ctx, tx, s.Scope, s.ScopeVersion, m.Recent.usage, left)
	switch {
	case errors.Is(err, reservation.ErrChanged):
		return ErrChanged
	case errors.Is(err, reservation.ErrOverflow):
		return overflow()
	case err != nil || m.Widened == nil:
		return err
	}
	return recordEnvelope(ctx, tx, s, "widened", m.Decision)
}
