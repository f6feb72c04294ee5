package decision

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/policy"
	"github.com/writsec/writ/internal/session"
)

// Renew asks policy again about the act of a lease, which the request repeats, and on
// an allow makes its credential good for longer. What a person approved is good once,
// for as long as it was: that is fault.NotRenewable.
func (d *Decider) Renew(ctx context.Context, req Request, leaseID string) (Answer, error) {
	caller, err := d.cfg.Identity.Caller(ctx, req.Presented)
	if err != nil {
		return Answer{}, err
	}
	if d.cfg.Halted != nil && d.cfg.Halted() {
		return Answer{}, logStuck()
	}
	var made done
	req.tried = new(bool)
	err = d.inTurn(ctx, func() (scope string, err error) {
		scope, made, err = d.attemptRenewal(ctx, req, caller, leaseID)
		return scope, err
	})
	if err != nil || made.granted == nil {
		return made.answer, err
	}
	return d.mintAgain(ctx, made.answer, made.order(caller))
}

func (d *Decider) attemptRenewal(ctx context.Context, req Request, caller identity.Caller, leaseID string) (scope string, made done, err error) {
	s, err := d.readRenewal(ctx, req, caller, leaseID)
	if err != nil {
		return "", done{}, err
	}
	scope = s.session.Scope
	r, err := d.rule(ctx, req, caller, s)
	if err != nil {
		return scope, done{}, err
	}
	switch {
	case r.Effect == policy.RequireCIBA:
		r.plan = nil
		r = r.deny("renewal_asks", "Policy wants a person to be asked by now: ask for a decision")
	case r.Effect == policy.Allow && !sameGrant(r.grant, s.renews.Grant):
		r.grant = nil
		r = r.deny("renewal_changed", "Policy grants something else by now: ask for a decision")
	}
	made, err = d.conclude(ctx, req, s, r)
	if errors.Is(err, lease.ErrStale) {
		err = leaseOver()
	}
	return scope, made, err
}

// readRenewal reads what a renewal is decided on.
func (d *Decider) readRenewal(ctx context.Context, req Request, caller identity.Caller, leaseID string) (s situation, err error) {
	err = d.cfg.Store.View(ctx, func(tx Tx) error {
		s = situation{now: tx.Now(), agent: caller.Agent}
		l, err := lease.Find(ctx, tx, leaseID, caller)
		if err != nil {
			return err
		}
		if !l.Alive(s.now) {
			return leaseOver()
		}
		s.renews = &l
		first, err := tx.Decision(ctx, l.Decision)
		if err != nil {
			return err
		}
		switch {
		case first.Approval != "":
			return fault.New(fault.NotRenewable, "a person approved this act once; ask for a decision, and they are asked again")
		case !l.Renewable:
			return fault.New(fault.NotRenewable, "credentials of kind %s can't be renewed; ask for a decision", l.Kind)
		}
		req.Session = l.Session
		if err := d.findSession(ctx, tx, req, caller, &s); err != nil {
			return err
		}
		s.recent, err = session.ReadRecent(ctx, tx, s.session)
		return err
	})
	if err != nil {
		return s, err
	}
	if err := s.about(req, caller); err != nil {
		return s, err
	}
	if s.hash != s.renews.IntentHash {
		return s, fault.New(fault.NotRenewable, "intent, resource and context are not those of this lease")
	}
	return s, nil
}

// sameGrant reports whether policy grants what the lease has.
func sameGrant(g *lease.Grant, has lease.Grant) bool {
	if g == nil || g.Minter != has.Minter || g.Kind != has.Kind {
		return false
	}
	a, errA := json.Marshal(g.Scope)
	b, errB := json.Marshal(has.Scope)
	return errA == nil && errB == nil && string(a) == string(b)
}

// mintAgain makes the credential of an active lease good for longer. Where that fails it
// stays good for as long as it was.
func (d *Decider) mintAgain(ctx context.Context, answer Answer, o lease.Order) (Answer, error) {
	l := o.Lease
	made, err := d.make(ctx, o)
	if err != nil {
		d.cfg.Metrics.Leases.WithLabelValues(l.Kind, "mint_failed").Inc()
		return Answer{}, &fault.Error{
			Code: fault.MintFailed, Detail: "allowed, but the credential could not be made good for longer; it is as good as it was, and the lease lives longer",
			RetryAfter: time.Second, Err: err,
		}
	}
	// It may have ended meanwhile; then the target has refused, or unmakes this too.
	err = d.cfg.Store.View(ctx, func(tx Tx) error {
		now, err := tx.Lease(ctx, l.ID)
		if err == nil && !now.Alive(tx.Now()) {
			err = leaseOver()
		}
		return err
	})
	if err != nil {
		return Answer{}, err
	}
	d.cfg.Metrics.Leases.WithLabelValues(l.Kind, "renewed").Inc()
	answer.Credential = credential(l, made.Secret)
	return answer, nil
}

func leaseOver() error {
	return fault.New(fault.LeaseEnded, "this lease has ended; ask for a decision")
}
