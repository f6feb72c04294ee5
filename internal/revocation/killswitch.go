package revocation

import (
	"context"
	"errors"
	"time"

	"github.com/writsec/writ/internal/approval"
	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/session"
)

// Kind is what a revocation is about.
type Kind string

// The kinds. A lease is revoked by its decision, whichever of its retries made the
// lease that it has now.
const (
	OfLease    Kind = "lease" // of an order only
	OfDecision Kind = "decision"
	OfSession  Kind = "session"
	OfUser     Kind = "user"
	OfAgent    Kind = "agent"
	OfMinter   Kind = "minter"
	OfPolicy   Kind = "policy" // a revision
	OfAll      Kind = "all"
)

// Scope is what an operator revokes.
type Scope struct {
	Kind   Kind
	Value  string // id, subject, name or revision; "" for all
	Issuer string // of user and agent
}

// ref is the user or agent of a scope of that kind.
func (s Scope) ref(k Kind) identity.Ref {
	if s.Kind != k {
		return identity.Ref{}
	}
	return identity.Ref{Issuer: s.Issuer, ID: s.Value}
}

func (s Scope) value(k Kind) string {
	if s.Kind != k {
		return ""
	}
	return s.Value
}

// leases selects what a revocation at a time ends.
func (s Scope) leases(at time.Time) lease.Selection {
	return lease.Selection{
		Decision: s.value(OfDecision), Session: s.value(OfSession), User: s.ref(OfUser), Agent: s.ref(OfAgent),
		Minter: s.value(OfMinter), Policy: s.value(OfPolicy), All: s.Kind == OfAll, Until: at,
	}
}

// CanFreeze reports whether a scope can be held: others are over for good.
func (s Scope) CanFreeze() bool {
	return s.Kind != OfLease && s.Kind != OfDecision && s.Kind != OfSession
}

// Revocation is one use of the kill switch. From its commit on nothing that it is about
// is good any more; ending it all, one by one, is work that any replica carries on.
type Revocation struct {
	ID       string
	At       time.Time
	Scope    Scope
	Reason   string
	Operator identity.Ref
	// Frozen says that nothing new is granted in its scope, until it is lifted.
	Frozen   bool
	Sessions int       // that it ended
	Leases   int       // that it ended; once all are gone
	EndedAt  time.Time // when all in it had ended; zero while there may be more
	GoneAt   time.Time // when all of that was seen to be gone
	LiftedAt time.Time
	LiftedBy identity.Ref
}

// Progress is how far a revocation has come.
type Progress struct {
	Revocation
	// Gone are those of its leases that were seen to be gone, the last at LastGoneAt.
	Gone       int
	LastGoneAt time.Time
}

// Order is what an operator asks of the kill switch.
type Order struct {
	Operator identity.Ref
	Scope    Scope
	Freeze   bool
	Reason   string
}

// Revoke is the kill switch. Whoever is in its scope loses every credential with its
// first commit, and nothing under way can get around it; then all of it is ended, which
// Revoke does itself for as long as it may take.
func (r *Revoker) Revoke(ctx context.Context, o Order) (Progress, error) {
	v := Revocation{ID: id.New(id.Revocation), Reason: o.Reason, Operator: o.Operator, Frozen: o.Freeze && o.Scope.CanFreeze()}
	// In a transaction of its own: what it reads stays locked, and decisions take that lock
	// after the one of all.
	err := r.update(ctx, func(ctx context.Context, tx Tx) (err error) {
		v.Scope, err = resolve(ctx, tx, o.Scope)
		return err
	})
	if err != nil {
		return Progress{}, err
	}
	err = r.insist(ctx, func(ctx context.Context, tx Tx) error {
		if _, err := tx.Revocation(ctx, v.ID); !fault.Is(err, fault.NotFound) {
			return err // nil: the commit of before got through, though nobody said so
		}
		signIns, err := tx.EndSignIns(ctx, o.Scope.ref(OfUser), o.Scope.ref(OfAgent), o.Scope.Kind == OfAll)
		if err != nil {
			return err
		}
		if v.At, err = tx.HoldAll(ctx); err != nil {
			return err
		}
		if err := tx.InsertRevocation(ctx, v); err != nil {
			return err
		}
		return v.record(ctx, tx, audit.OperatorRevoked, v.Operator, map[string]any{"reason": v.Reason, "frozen": v.Frozen, "sign_ins": signIns})
	})
	if err != nil {
		return Progress{}, err
	}
	// It is in force. What can't be carried on here, replicas do.
	working, cancel := context.WithTimeout(context.WithoutCancel(ctx), workTime)
	defer cancel()
	for more := true; more; {
		if more, err = r.carryOn(working, v.ID); err != nil {
			break
		}
	}
	p, err := r.Progress(context.WithoutCancel(ctx), v.ID)
	if err != nil {
		p = Progress{Revocation: v}
	}
	return p, nil
}

// workTime is how long whoever pulls the kill switch waits for the work that follows.
const workTime = 20 * time.Second

// resolve makes sure that what is named exists: a typo of an operator's must not look
// like a success.
func resolve(ctx context.Context, tx Tx, s Scope) (Scope, error) {
	switch s.Kind {
	case OfLease:
		l, err := tx.Lease(ctx, s.Value)
		if err != nil {
			return s, err
		}
		return Scope{Kind: OfDecision, Value: l.Decision}, nil
	case OfSession:
		_, err := tx.Session(ctx, s.Value)
		return s, err
	}
	return s, nil
}

// Progress says how far a revocation has come.
func (r *Revoker) Progress(ctx context.Context, revocation string) (p Progress, err error) {
	err = r.Store.Update(ctx, func(tx Tx) (err error) {
		if p.Revocation, err = tx.Revocation(ctx, revocation); err != nil {
			return err
		}
		total, gone, last, err := tx.RevokedLeases(ctx, revocation)
		p.Leases, p.Gone, p.LastGoneAt = max(p.Leases, total), gone, last
		if !p.GoneAt.IsZero() { // its leases may have been forgotten since
			p.Gone = p.Leases
		}
		return err
	})
	return p, err
}

// Lift ends a freeze. What was revoked stays so.
func (r *Revoker) Lift(ctx context.Context, operator identity.Ref, revocation string) error {
	return r.update(ctx, func(ctx context.Context, tx Tx) error {
		v, err := tx.Revocation(ctx, revocation)
		switch {
		case err != nil:
			return err
		case !v.LiftedAt.IsZero():
			return nil
		case !v.Frozen:
			return fault.New(fault.NotFound, "this revocation holds nothing back")
		}
		v.Frozen, v.LiftedAt, v.LiftedBy = false, tx.Now(), operator
		if err := tx.UpdateRevocation(ctx, v); err != nil {
			return err
		}
		return v.record(ctx, tx, audit.RevocationLifted, operator, nil)
	})
}

// sessionBatch bounds the sessions that one transaction ends.
const sessionBatch = 50

// carryOn does a part of a revocation; more says that there may be others to do at
// once. Leases come first: a session without any does no harm for a moment.
func (r *Revoker) carryOn(ctx context.Context, revocation string) (more bool, err error) {
	var t toll
	err = r.Store.Update(ctx, func(tx Tx) error {
		t, more = newToll(), false
		v, err := tx.Revocation(ctx, revocation)
		if err != nil || !v.GoneAt.IsZero() {
			return err
		}
		if v.EndedAt.IsZero() {
			if more, err = t.endPart(ctx, tx, &v); err != nil || more {
				return err
			}
		}
		leases, gone, last, err := tx.RevokedLeases(ctx, v.ID)
		if err != nil || leases != gone {
			return err
		}
		others, err := tx.RevokingLeases(ctx, v.Scope.leases(v.At))
		if err != nil || others > 0 { // that had ended before, and are not gone either
			return err
		}
		v.GoneAt, v.Leases = tx.Now(), leases
		if err := tx.UpdateRevocation(ctx, v); err != nil {
			return err
		}
		detail := map[string]any{"leases": leases, "sessions": v.Sessions}
		if !last.IsZero() {
			detail["last_gone_at"] = last
		}
		return v.record(ctx, tx, audit.RevocationGone, v.Operator, detail)
	})
	if errors.Is(err, session.ErrChanged) || errors.Is(err, approval.ErrStale) {
		return true, nil // a parallel transaction was faster; look again
	}
	if err == nil {
		r.count(t)
	}
	return more, err
}

// endPart ends some of what a revocation is about, and notes when that was the last.
func (t *toll) endPart(ctx context.Context, tx Tx, v *Revocation) (more bool, err error) {
	end := lease.End{Reason: lease.EndOperator, Revocation: v.ID, Operator: v.Operator}
	t.direct, err = lease.EndSome(ctx, tx, v.Scope.leases(v.At), end)
	if err != nil || t.direct.Total() > 0 { // in a commit of their own: decisions lock sessions first
		return true, err
	}
	if err := tx.HastenLeases(ctx, v.Scope.leases(v.At), v.ID); err != nil {
		return false, err
	}
	sessions, err := v.sessions(ctx, tx)
	if err != nil {
		return false, err
	}
	for _, s := range sessions {
		if err := t.end(ctx, tx, s, "revoked by an operator", end); err != nil {
			return false, err
		}
	}
	v.Sessions += len(sessions)
	if more = len(sessions) == sessionBatch; !more {
		v.EndedAt = tx.Now()
		// One may have got its user while this waited for its turn.
		if _, err := tx.EndSignIns(ctx, v.Scope.ref(OfUser), v.Scope.ref(OfAgent), v.Scope.Kind == OfAll); err != nil {
			return false, err
		}
	}
	return more, tx.UpdateRevocation(ctx, *v)
}

func (v Revocation) sessions(ctx context.Context, tx Tx) ([]session.Session, error) {
	switch v.Scope.Kind {
	case OfDecision, OfMinter, OfPolicy:
		return nil, nil
	case OfSession:
		if err := tx.HoldSession(ctx, v.Scope.Value); err != nil {
			return nil, err
		}
		s, err := tx.Session(ctx, v.Scope.Value)
		if err != nil || !s.EndedAt.IsZero() {
			return nil, err
		}
		return []session.Session{s}, nil
	}
	return tx.LiveSessions(ctx, v.Scope.ref(OfUser), v.Scope.ref(OfAgent), v.Scope.Kind == OfAll, v.At, sessionBatch)
}

func (v Revocation) record(ctx context.Context, tx Tx, kind audit.Kind, operator identity.Ref, detail map[string]any) error {
	all := map[string]any{"revocation": v.ID, "scope": v.Scope.Kind}
	for name, value := range detail {
		all[name] = value
	}
	if v.Scope.Kind == OfMinter || v.Scope.Kind == OfPolicy {
		all["value"] = v.Scope.Value
	}
	return audit.Append(ctx, tx, audit.Entry{
		Kind: kind, Operator: operator, User: v.Scope.ref(OfUser), Agent: v.Scope.ref(OfAgent),
		Session: v.Scope.value(OfSession), Decision: v.Scope.value(OfDecision), Detail: all,
	})
}

// Query picks revocations, newest first.
type Query struct {
	Frozen bool
	Before string
	Limit  int
}
