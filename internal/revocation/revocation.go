// Package revocation ends things: a lease that the agent gives back, a session
// with all that belongs to it, and, for operators, whatever a kill switch must
// reach. It never asks policy, so that a broken policy can't disarm it.
package revocation

import (
	"context"
	"errors"
	"time"

	"github.com/writsec/writ/internal/approval"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/session"
	"github.com/writsec/writ/internal/telemetry"
)

// Tx is what revoking needs of a transaction.
type Tx interface {
	session.Tx
	approval.Tx
	lease.Tx
	// LiveSessions lists up to limit sessions of a user, of an agent, or all, that can
	// still carry decisions and began by a time. Exactly one of the three is asked for.
	LiveSessions(ctx context.Context, user, agent identity.Ref, all bool, until time.Time, limit int) ([]session.Session, error)
	// HoldAll waits for the decisions and sign-ins under way, keeps new ones out until the
	// commit, and returns the time from when on it does.
	HoldAll(ctx context.Context) (time.Time, error)
	InsertRevocation(ctx context.Context, v Revocation) error
	// Revocation returns fault.NotFound for an unknown id.
	Revocation(ctx context.Context, id string) (Revocation, error)
	// UpdateRevocation stores how far it has come and whether it still holds.
	UpdateRevocation(ctx context.Context, v Revocation) error
	// DueRevocations lists those of which not all was seen to be gone.
	DueRevocations(ctx context.Context, limit int) ([]string, error)
	// RevokedLeases counts the leases that a revocation ended, and those of them that were
	// seen to be gone, the last at a time.
	RevokedLeases(ctx context.Context, id string) (total, gone int, last time.Time, err error)
	// HastenLeases has what had ended before, and is not gone, unmade first, and makes it
	// part of a revocation if it is of none.
	HastenLeases(ctx context.Context, s lease.Selection, revocation string) error
	// RevokingLeases counts the leases of a selection that have ended and are not gone.
	RevokingLeases(ctx context.Context, s lease.Selection) (int, error)
	// LoginSessions lists the sessions of one login at an issuer that have not ended, and
	// those of the user, if one is named, that don't say of which login they are.
	LoginSessions(ctx context.Context, user identity.Ref, sid string) ([]session.Session, error)
	// EndSignIns ends the sign-ins under way of a user, for an agent, or all.
	EndSignIns(ctx context.Context, user, agent identity.Ref, all bool) (int64, error)
	// PutSignOut keeps a sign-out for as long as tokens from before could be brought.
	PutSignOut(ctx context.Context, o identity.SignOut) error
	// ForgetSignOuts drops those for which that time is over.
	ForgetSignOuts(ctx context.Context, limit int) (int64, error)
	// Spend uses up what is good once only, until a time: fresh says that nobody has used
	// it up before.
	Spend(ctx context.Context, use string, expires time.Time) (fresh bool, err error)
	// ForgetSpent drops what was used up and would not be good any more anyway.
	ForgetSpent(ctx context.Context, limit int) (int64, error)
	// HoldSession waits for the decisions under way in a session, and keeps new ones out
	// until the commit: a flood of them must not hold off its end.
	HoldSession(ctx context.Context, id string) error
	// DueSessions lists sessions whose time, or idle time, is over and that are not marked
	// ended.
	DueSessions(ctx context.Context, limit int) ([]session.Session, error)
	// ForgetReplays drops idempotency keys that were first used before a time, and says
	// how many.
	ForgetReplays(ctx context.Context, before time.Time, limit int) (int64, error)
	// ForgetSessions drops sessions that ended before a time, with their decisions,
	// approvals and leases, unless one of these has not ended. It does a bounded part of
	// the work, and says how many sessions it was at.
	ForgetSessions(ctx context.Context, before time.Time, limit int) (int64, error)
	// ForgetReservations drops what is over of what was left on pairs, and versions that
	// last changed before a time of pairs that nothing is left on.
	ForgetReservations(ctx context.Context, before time.Time, limit int) (int64, error)
	// ForgetInputs drops what decisions before a time were made on.
	ForgetInputs(ctx context.Context, before time.Time, limit int) (int64, error)
	// ForgetSignIns drops sign-ins whose time was over before a time.
	ForgetSignIns(ctx context.Context, before time.Time, limit int) (int64, error)
}

// Store runs transactions.
type Store interface {
	Update(ctx context.Context, f func(Tx) error) error
}

// Revoker revokes.
type Revoker struct {
	Store   Store
	Metrics *telemetry.Metrics
}

// Release ends a lease that its agent gives back. Releasing twice changes nothing.
func (r *Revoker) Release(ctx context.Context, c identity.Caller, leaseID string) (lease.Lease, error) {
	var l lease.Lease
	var ended lease.Ended
	err := r.update(ctx, func(ctx context.Context, tx Tx) (err error) {
		if l, err = lease.Find(ctx, tx, leaseID, c); err != nil {
			return err
		}
		if ended, err = lease.EndOne(ctx, tx, l, lease.End{Reason: lease.EndReleased}); err != nil {
			return err
		}
		l, err = tx.Lease(ctx, leaseID)
		return err
	})
	if err == nil && ended.Total() > 0 {
		r.Metrics.Leases.WithLabelValues(l.Kind, lease.EndReleased).Inc()
	}
	return l, err
}

// EndSession ends a session of the caller's and everything in it.
func (r *Revoker) EndSession(ctx context.Context, c identity.Caller, sessionID string) (s session.Session, err error) {
	var t toll
	err = r.update(ctx, func(ctx context.Context, tx Tx) (err error) {
		t = newToll()
		if err := tx.HoldSession(ctx, sessionID); err != nil {
			return err
		}
		if s, err = session.Find(ctx, tx, sessionID, c); err != nil {
			return err
		}
		if err := t.end(ctx, tx, s, "ended by the agent", lease.End{Reason: lease.EndSession}); err != nil {
			return err
		}
		s, err = tx.Session(ctx, sessionID)
		return err
	})
	if err == nil {
		r.count(t)
	}
	return s, err
}

// Abandon gives up on seeing a lease's end, where a person knows better than Writ can:
// its target is no more, or its end can't be told. The record says so.
func (r *Revoker) Abandon(ctx context.Context, operator identity.Ref, leaseID, reason string) error {
	return r.update(ctx, func(ctx context.Context, tx Tx) error {
		l, err := tx.Lease(ctx, leaseID)
		if err != nil {
			return err
		}
		if l.State != lease.Revoking {
			return fault.New(fault.LeaseEnded, "only a lease that is revoking can be abandoned; this one is %s", l.State)
		}
		return lease.Abandon(ctx, tx, l, operator, reason)
	})
}

// toll is what one revocation ended.
type toll struct {
	sessions, approvals int
	withSession         lease.Ended // leases that ended with their session
	direct              lease.Ended // leases that an operator ended otherwise
}

func newToll() toll { return toll{withSession: lease.Ended{}, direct: lease.Ended{}} }

// end ends a session, its approvals and its leases.
func (t *toll) end(ctx context.Context, tx Tx, s session.Session, reason string, e lease.End) error {
	if err := session.End(ctx, tx, s, session.Cause{Reason: reason, Operator: e.Operator, Revocation: e.Revocation}); err != nil {
		return err
	}
	n, err := approval.CancelAll(ctx, tx, s.ID, "the session ended", e.Operator)
	if err != nil {
		return err
	}
	ended, err := lease.EndAll(ctx, tx, lease.Selection{Session: s.ID}, e)
	t.sessions, t.approvals = t.sessions+1, t.approvals+n
	t.withSession.Add(ended)
	return err
}

func (t *toll) leases() int { return t.withSession.Total() + t.direct.Total() }

// count puts what was committed into the metrics.
func (r *Revoker) count(t toll) {
	r.Metrics.Approvals.WithLabelValues(string(approval.Cancelled)).Add(float64(t.approvals))
	for kind, n := range t.withSession {
		r.Metrics.Leases.WithLabelValues(kind, lease.EndSession).Add(float64(n))
	}
	for kind, n := range t.direct {
		r.Metrics.Leases.WithLabelValues(kind, lease.EndOperator).Add(float64(n))
	}
}

// patience is how long a revocation may take: it goes on when its caller hangs up,
// because a kill switch that a proxy's timeout undoes is none.
const patience = 2 * time.Minute

// insist tries again for a while when the store can't be used: a stuck replica may hold
// what this waits for, until the server ends its transaction.
func (r *Revoker) insist(ctx context.Context, f func(context.Context, Tx) error) error {
	for deadline := time.Now().Add(insistence); ; {
		err := r.update(ctx, f)
		if !fault.Is(err, fault.Unavailable) || time.Now().After(deadline) {
			return err
		}
		time.Sleep(200 * time.Millisecond)
	}
}

const insistence = 25 * time.Second

// update tries again when a parallel transaction was faster, which a store with
// one writer never lets happen; it cannot be so for ever, because what has ended
// stays ended.
func (r *Revoker) update(ctx context.Context, f func(context.Context, Tx) error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	for {
		err := r.Store.Update(ctx, func(tx Tx) error { return f(ctx, tx) })
		if !errors.Is(err, session.ErrChanged) && !errors.Is(err, approval.ErrStale) {
			return err
		}
	}
}
