// Package revocation ends things: a lease that the agent gives back, a session
// with all that belongs to it, and, for operators, whatever a kill switch must
// reach. It never asks policy, so that a broken policy can't disarm it.
package revocation

import (
	"context"
	"errors"
	"time"

	"github.com/writsec/writ/internal/approval"
	"github.com/writsec/writ/internal/audit"
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
	// LiveSessions lists the sessions of a user, of an agent, or all, that can still
	// carry decisions. Exactly one of the three is asked for.
	LiveSessions(ctx context.Context, user, agent identity.Ref, all bool) ([]session.Session, error)
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
	// HoldDecision waits for a retry of a decision that may be replacing its lease, and
	// keeps others out until the commit.
	HoldDecision(ctx context.Context, id string) error
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
	var active bool
	err := r.update(ctx, func(ctx context.Context, tx Tx) (err error) {
		if l, err = lease.Find(ctx, tx, leaseID, c); err != nil {
			return err
		}
		active = l.State == lease.Active
		if err := lease.End(ctx, tx, l, "released", identity.Ref{}); err != nil {
			return err
		}
		l, err = tx.Lease(ctx, leaseID)
		return err
	})
	if err == nil && active {
		r.Metrics.Leases.WithLabelValues(l.Kind, "released").Inc()
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
		if err := t.end(ctx, tx, s, "ended by the agent", identity.Ref{}); err != nil {
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

// Scope is what an operator revokes. Exactly one part is set.
type Scope struct {
	Lease   string
	Session string
	User    identity.Ref
	Agent   identity.Ref
	All     bool
}

// Result says what an operator's revocation ended.
type Result struct {
	Leases   int `json:"leases"`
	Sessions int `json:"sessions"`
}

// Revoke is the kill switch. Whoever is in its scope loses every credential with
// its commit, and every session, so that nothing new can be minted in these.
func (r *Revoker) Revoke(ctx context.Context, operator identity.Principal, s Scope, reason string) (Result, error) {
	var t toll
	err := r.update(ctx, func(ctx context.Context, tx Tx) error {
		t = newToll()
		sessions, err := sessionsOf(ctx, tx, s)
		if err != nil {
			return err
		}
		signIns, err := tx.EndSignIns(ctx, s.User, s.Agent, s.All)
		if err != nil {
			return err
		}
		for _, live := range sessions {
			if err := t.end(ctx, tx, live, "revoked by an operator", operator.Ref); err != nil {
				return err
			}
		}
		// Leases whose session had ended before, and the one lease asked for: the one that
		// its decision has now, which may be another after a retry.
		decision := ""
		if s.Lease != "" {
			l, err := tx.Lease(ctx, s.Lease) // an unknown lease is an operator's typo, not a success
			if err != nil {
				return err
			}
			decision = l.Decision
			if err := tx.HoldDecision(ctx, decision); err != nil {
				return err
			}
		}
		t.direct, err = lease.EndAll(ctx, tx, lease.Selection{
			Decision: decision, Session: s.Session, User: s.User, Agent: s.Agent, All: s.All,
		}, "operator", operator.Ref)
		if err != nil {
			return err
		}
		return audit.Append(ctx, tx, audit.Entry{
			Kind: audit.OperatorRevoked, Operator: operator.Ref, User: s.User, Agent: s.Agent, Session: s.Session, Lease: s.Lease,
			Detail: map[string]any{"all": s.All, "reason": reason, "leases": t.leases(), "sessions": t.sessions, "sign_ins": signIns},
		})
	})
	if err != nil {
		return Result{}, err
	}
	r.count(t)
	return Result{Leases: t.leases(), Sessions: t.sessions}, nil
}

func sessionsOf(ctx context.Context, tx Tx, s Scope) ([]session.Session, error) {
	switch {
	case s.Lease != "":
		return nil, nil
	case s.Session != "":
		if err := tx.HoldSession(ctx, s.Session); err != nil {
			return nil, err
		}
		one, err := tx.Session(ctx, s.Session)
		if err != nil || !one.EndedAt.IsZero() {
			return nil, err
		}
		return []session.Session{one}, nil
	}
	return tx.LiveSessions(ctx, s.User, s.Agent, s.All)
}

// toll is what one revocation ended.
type toll struct {
	sessions, approvals int
	withSession         lease.Ended // leases that ended with their session
	direct              lease.Ended // leases that an operator ended otherwise
}

func newToll() toll { return toll{withSession: lease.Ended{}} }

// end ends a session, its approvals and its leases.
func (t *toll) end(ctx context.Context, tx Tx, s session.Session, reason string, operator identity.Ref) error {
	if err := session.End(ctx, tx, s, reason, operator); err != nil {
		return err
	}
	n, err := approval.CancelAll(ctx, tx, s.ID, "the session ended", operator)
	if err != nil {
		return err
	}
	ended, err := lease.EndAll(ctx, tx, lease.Selection{Session: s.ID}, "session_ended", operator)
	t.sessions, t.approvals = t.sessions+1, t.approvals+n
	for kind, n := range ended {
		t.withSession[kind] += n
	}
	return err
}

func (t *toll) leases() int { return t.withSession.Total() + t.direct.Total() }

// count puts what was committed into the metrics.
func (r *Revoker) count(t toll) {
	r.Metrics.Approvals.WithLabelValues(string(approval.Cancelled)).Add(float64(t.approvals))
	for kind, n := range t.withSession {
		r.Metrics.Leases.WithLabelValues(kind, "session_ended").Add(float64(n))
	}
	for kind, n := range t.direct {
		r.Metrics.Leases.WithLabelValues(kind, "operator").Add(float64(n))
	}
}

// patience is how long a revocation may take: it goes on when its caller hangs up,
// because a kill switch that a proxy's timeout undoes is none.
const patience = 2 * time.Minute

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
