package decision

import (
	"context"
	"strings"
	"time"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/intent"
	"github.com/writsec/writ/internal/policy"
	"github.com/writsec/writ/internal/session"
)

// Widening an envelope, as policy sees it: the parameters are the new envelope.
const (
	widenAction = intent.Reserved + "envelope.widen"
	sessionType = intent.Reserved + "session"
)

// EnvelopeRequest is one POST /sessions/{id}/envelope, read but not believed.
type EnvelopeRequest struct {
	Presented identity.Presented
	Session   string
	Envelope  session.Envelope
	Approval  string // of an earlier answer
	Wait      time.Duration
	IP        string
}

// EnvelopeAnswer is what became of it.
type EnvelopeAnswer struct {
	// Decision is nil where nothing had to be decided: the envelope narrowed.
	Decision *Answer
	// Session is as it is now.
	Session session.Session
	Alive   bool
}

// Envelope gives a session another envelope: at once if it narrows, and otherwise only
// if policy allows and the session's user has approved that very envelope.
func (d *Decider) Envelope(ctx context.Context, req EnvelopeRequest) (EnvelopeAnswer, error) {
	if err := req.Envelope.Check(); err != nil {
		return EnvelopeAnswer{}, err
	}
	next := req.Envelope.Sorted()
	caller, err := d.cfg.Identity.Caller(ctx, req.Presented)
	if err != nil {
		return EnvelopeAnswer{}, err
	}
	var narrows bool
	err = d.inTurn(ctx, func() (scope string, err error) {
		scope, narrows, err = d.narrow(ctx, req.Session, caller, next)
		return scope, err
	})
	if err != nil {
		return EnvelopeAnswer{}, err
	}
	var answer EnvelopeAnswer
	if !narrows {
		decided, err := d.wait(ctx, Request{
			Session: req.Session, Approval: req.Approval, Wait: req.Wait, IP: req.IP,
			Intent:   intent.Intent{Action: widenAction, Parameters: next.Document()},
			Resource: intent.Resource{Type: sessionType, ID: req.Session}, widen: &next,
		}, caller)
		if err != nil {
			return EnvelopeAnswer{}, err
		}
		answer.Decision = &decided
	}
	err = d.cfg.Store.View(ctx, func(tx Tx) (err error) {
		answer.Session, err = session.Find(ctx, tx, req.Session, caller)
		answer.Alive = answer.Session.Alive(tx.Now())
		return err
	})
	return answer, err
}

// narrow sets an envelope that narrows, and says whether it does.
func (d *Decider) narrow(ctx context.Context, sessionID string, caller identity.Caller, next session.Envelope) (scope string, narrows bool, err error) {
	var s session.Session
	err = d.cfg.Store.View(ctx, func(tx Tx) (err error) {
		if s, err = session.Find(ctx, tx, sessionID, caller); err == nil && !s.Alive(tx.Now()) {
			err = sessionOver()
		}
		return err
	})
	if err != nil || !s.Envelope.Narrows(next) {
		return s.Scope, false, err
	}
	err = d.cfg.Store.Update(ctx, func(tx Tx) error { return session.Narrow(ctx, tx, s, next, d.cfg.Sessions.Idle) })
	return s.Scope, true, err
}

func sessionOver() error { return fault.New(fault.SessionEnded, "the session is over; open a new one") }

// widening holds policy's answer to what widening an envelope needs whatever policy
// says: the yes of the session's user, who was shown what policy says of it. Nothing
// is minted for it.
func (r ruling) widening(s situation) ruling {
	switch {
	case r.Effect == policy.Allow && (r.rests == nil || r.rests.ApproverRef != s.user.Ref):
		return r.deny("envelope_needs_human", "An envelope widens only if the session's user approves it")
	case r.Effect == policy.RequireCIBA:
		for _, ask := range r.Approval {
			// The fallbacks of a message that is too long name the session alone.
			if !strings.Contains(r.plan.Message, ask.Message) {
				return r.deny("approval_display", "The identity provider cannot show the user what would be widened; ask for less at a time")
			}
		}
	}
	r.Credential = nil
	return r
}
