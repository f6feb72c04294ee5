package approval

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/telemetry"
)

const (
	// maxInFlight bounds the calls at a time. A provider may hold each poll for half a
	// minute, so that fewer would make prompts wait for one another.
	maxInFlight = 256
	idle        = time.Second // due work is looked for at least this often
	minInterval = time.Second
	maxBackoff  = time.Minute
	// claimMargin, beyond the timeout of a call, keeps others off a prompt whose call
	// is in flight.
	claimMargin = 20 * time.Second
	// sendMargin keeps two polls apart by the interval although the time of sending
	// is recorded a little before the bytes leave.
	sendMargin = 100 * time.Millisecond
	// grace is how long a call in flight may go on after a shutdown began: an answer
	// must not be lost for that.
	grace = 5 * time.Second
	// recordTimeout bounds the commit of what a call brought, which no shutdown cuts.
	recordTimeout = 10 * time.Second
)

// Config makes an Engine.
type Config struct {
	Store     Store
	Providers map[string]Provider // by issuer
	// UseWithin is how long an approval can be used once given.
	UseWithin time.Duration
	// Stopping, once closed, lets go of those who wait.
	Stopping <-chan struct{}
	Metrics  *telemetry.Metrics
	Logger   *slog.Logger
}

// Engine carries prompts from created to their end.
type Engine struct {
	cfg Config
	// crash, in tests, ends a step at the point named as a killed process would.
	crash func(point string) bool
}

// NewEngine makes an engine; Run works.
func NewEngine(cfg Config) *Engine {
	return &Engine{cfg: cfg, crash: func(string) bool { return false }}
}

// Run works on due prompts until ctx ends, and then waits for the calls in flight.
func (e *Engine) Run(ctx context.Context) error {
	wake, stop := e.cfg.Store.Watch(workTopic)
	defer stop()
	var calls sync.WaitGroup
	defer calls.Wait()
	slots := make(chan struct{}, maxInFlight)
	failed := func(err error) {
		if err != nil && ctx.Err() == nil {
			e.cfg.Logger.ErrorContext(ctx, "approval step", "error", err)
		}
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case slots <- struct{}{}: // before the claim, whose time runs
		}
		a, more, err := e.claim(ctx)
		if more {
			calls.Go(func() {
				defer func() { <-slots }()
				failed(e.carry(ctx, a))
			})
			continue
		}
		<-slots
		failed(err)
		select {
		case <-ctx.Done():
		case <-wake:
		case <-time.After(idle/2 + rand.N(idle/2)): //nolint:gosec // jitter
		}
	}
}

// claim takes the prompt that has been due longest: it commits what is about to
// happen before it happens, and keeps others off until a call can't be in flight
// any more. more says that there was one.
func (e *Engine) claim(ctx context.Context) (a Approval, more bool, err error) {
	var was State
	err = e.cfg.Store.Update(ctx, func(tx Tx) (err error) {
		if a, more, err = tx.DueApproval(ctx); err != nil || !more {
			return err
		}
		was = a.State
		return e.begin(ctx, tx, &a)
	})
	if err != nil {
		return a, false, err
	}
	e.count(was, a)
	return a, more, nil
}

func (e *Engine) begin(ctx context.Context, tx Tx, a *Approval) error {
	now := tx.Now()
	_, configured := e.cfg.Providers[a.ApproverRef.Issuer]
	overdue := !now.Before(a.ExpiresAt)
	switch {
	case a.Damaged:
		return Close(ctx, tx, a, Failed, "what was stored of it does not open")
	case a.State == Requesting: // due again, so whoever sent it is gone
		return Close(ctx, tx, a, StartUnknown, "interrupted while the provider was asked")
	case a.State == Approved: // due at its deadline only
		return Close(ctx, tx, a, Expired, "")
	case !configured:
		return Close(ctx, tx, a, Failed, "the provider is not configured any more")
	case a.State == Redeemed: // answered in time or not, verify says
	case overdue && a.Failures > 0:
		return Close(ctx, tx, a, Failed, unreachable)
	case overdue:
		return Close(ctx, tx, a, Expired, "")
	case a.State == Created:
		a.State, a.SentAt = Requesting, now
	case a.State == Pending:
		if a.Polling { // whoever sent the last poll is gone, and perhaps its answer
			a.Failures++
		}
		a.Polling, a.PolledAt = true, now
	}
	a.DueAt = now.Add(e.claimTime())
	if err := tx.UpdateApproval(ctx, a); err != nil || a.State != Requesting {
		return err
	}
	return record(ctx, tx, *a, audit.ApprovalAsking, map[string]any{"provider": a.ApproverRef.Issuer})
}

// carry makes the call that a claimed prompt is up to.
func (e *Engine) carry(ctx context.Context, a Approval) error {
	if e.crash("begun") {
		return errCrash
	}
	ctx, cancel := outlive(ctx, grace)
	defer cancel()
	ctx, span := telemetry.StartTrace(ctx, "approval "+string(a.State))
	var err error
	defer func() { telemetry.End(span, err) }()
	p := e.cfg.Providers[a.ApproverRef.Issuer]
	switch a.State {
	case Requesting:
		err = e.start(ctx, a, p)
	case Pending:
		err = e.poll(ctx, a, p)
	case Redeemed:
		err = e.verify(ctx, a, p)
	}
	if errors.Is(err, ErrStale) { // cancelled or taken over meanwhile; the newer writer is right
		return nil
	}
	return err
}

func (e *Engine) start(ctx context.Context, a Approval, p Provider) error {
	r := p.Start(ctx, StartRequest{
		Hint: a.Hint, Message: a.Message, ACRValues: a.ACRValues, ExpiresIn: a.ExpiresAt.Sub(a.SentAt),
	})
	if e.crash("started") {
		return errCrash
	}
	e.called(ctx, a, "start", startNames[r.Outcome], r.Err)
	_, err := e.change(ctx, a, func(ctx context.Context, tx Tx, a *Approval) error {
		switch r.Outcome {
		case StartRefused:
			return Close(ctx, tx, a, Failed, r.Reason)
		case StartUnclear:
			return Close(ctx, tx, a, StartUnknown, r.Reason)
		case StartLater:
			a.State, a.Failures = Created, a.Failures+1
			a.DueAt = earlier(tx.Now().Add(max(r.RetryAfter, backoff(a.Failures))), a.ExpiresAt)
			return tx.UpdateApproval(ctx, a)
		}
		a.State, a.AuthReqID, a.Failures = Pending, r.AuthReqID, 0
		a.Interval = max(r.Interval, minInterval)
		// The provider's own limit can only shorten ours.
		a.ExpiresAt = earlier(a.ExpiresAt, a.SentAt.Add(r.ExpiresIn))
		a.DueAt = earlier(tx.Now().Add(a.Interval), a.ExpiresAt)
		if err := tx.UpdateApproval(ctx, a); err != nil {
			return err
		}
		return record(ctx, tx, *a, audit.ApprovalPrompted, map[string]any{"provider": a.ApproverRef.Issuer})
	})
	return err
}

func (e *Engine) poll(ctx context.Context, a Approval, p Provider) error {
	r := p.Poll(ctx, a.AuthReqID)
	if e.crash("polled") {
		return errCrash
	}
	e.called(ctx, a, "poll", pollNames[r.Outcome], r.Err)
	next, err := e.change(ctx, a, func(ctx context.Context, tx Tx, a *Approval) error {
		// Whether an earlier answer may have been lost on its way.
		lost := a.Failures > 0
		a.Polling = false
		wait := max(a.Interval, r.RetryAfter)
		switch r.Outcome {
		case PollAnswered:
			a.State, a.Answer, a.Failures = Redeemed, r.Answer, 0
			a.DueAt = tx.Now().Add(e.claimTime())
			if err := tx.UpdateApproval(ctx, a); err != nil {
				return err
			}
			return record(ctx, tx, *a, audit.ApprovalAnswered, nil)
		case PollDenied:
			return Close(ctx, tx, a, Denied, "")
		case PollExpired:
			return Close(ctx, tx, a, Expired, "")
		case PollUnknown:
			if !tx.Now().Before(a.ExpiresAt) { // some providers forget instead of saying expired_token
				return Close(ctx, tx, a, Expired, "")
			}
			if lost {
				return Close(ctx, tx, a, OutcomeLost, "interrupted while the provider answered")
			}
			return Close(ctx, tx, a, Failed, "invalid_grant")
		case PollFailed:
			return Close(ctx, tx, a, Failed, r.Reason)
		case PollUnreachable:
			a.Failures++
			wait = max(wait, backoff(a.Failures))
		case PollSlowDown: // CIBA Core §11: at least 5 s more, for this and all later polls
			a.Interval, a.Failures = max(a.Interval+5*time.Second, r.Interval), 0
			wait = max(a.Interval, r.RetryAfter)
		case PollPending:
			a.Failures = 0
		}
		a.DueAt = earlier(a.PolledAt.Add(wait+sendMargin), a.ExpiresAt)
		return tx.UpdateApproval(ctx, a)
	})
	switch {
	case r.Outcome != PollAnswered:
		return err
	case err != nil:
		p.Discard(ctx, r.Answer) // nobody will use these tokens
		return err
	case e.crash("redeemed"):
		return errCrash
	}
	return e.verify(ctx, next, p)
}

// verify can be repeated: the answer is stored.
func (e *Engine) verify(ctx context.Context, a Approval, p Provider) error {
	evidence, refused := p.Verify(ctx, a.Answer, Expectation{
		Subject: a.ApproverRef.ID, ACRValues: a.ACRValues, AuthReqID: a.AuthReqID, NotBefore: a.SentAt,
	})
	if e.crash("verified") {
		return errCrash
	}
	if refused != nil {
		e.cfg.Logger.WarnContext(ctx, "approval answer not accepted", "approval", a.ID, "error", refused)
	}
	next, err := e.change(ctx, a, func(ctx context.Context, tx Tx, a *Approval) error {
		now := tx.Now()
		overdue := !now.Before(a.ExpiresAt)
		switch later := errors.Is(refused, ErrUnavailable); {
		case later && overdue:
			return Close(ctx, tx, a, Failed, unreachable)
		case later:
			a.Failures++
			a.DueAt = earlier(now.Add(backoff(a.Failures)), a.ExpiresAt)
			return tx.UpdateApproval(ctx, a)
		case refused != nil:
			return Close(ctx, tx, a, Failed, "answer_invalid")
		case overdue:
			return Close(ctx, tx, a, Expired, "")
		}
		a.State, a.AuthReqID, a.Answer, a.Failures = Approved, "", nil, 0
		a.ACR, a.AMR, a.AuthTime = evidence.ACR, evidence.AMR, evidence.AuthTime
		a.ExpiresAt = now.Add(e.cfg.UseWithin)
		a.DueAt = a.ExpiresAt
		if err := tx.UpdateApproval(ctx, a); err != nil {
			return err
		}
		tx.Notify(a.ID)
		return record(ctx, tx, *a, audit.ApprovalApproved, map[string]any{
			"approver": a.ApproverRef, "acr": a.ACR, "amr": a.AMR, "use_until": a.ExpiresAt,
		})
	})
	if done := err == nil && next.State != Redeemed; done || errors.Is(err, ErrStale) {
		p.Discard(ctx, a.Answer)
	}
	return err
}

// change commits what f makes of a, even while Writ stops: the call that taught it
// can't be repeated.
func (e *Engine) change(ctx context.Context, a Approval, f func(context.Context, Tx, *Approval) error) (next Approval, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), recordTimeout)
	defer cancel()
	err = e.cfg.Store.Update(ctx, func(tx Tx) error {
		next = a
		return f(ctx, tx, &next)
	})
	if err == nil {
		e.count(a.State, next)
	}
	return next, err
}

// count notes the state that a prompt reached, once it is committed.
func (e *Engine) count(was State, a Approval) {
	if a.State != was && !a.Open() {
		e.cfg.Metrics.Approvals.WithLabelValues(string(a.State)).Inc()
	}
}

func (e *Engine) called(ctx context.Context, a Approval, call, outcome string, err error) {
	e.cfg.Metrics.ProviderCalls.WithLabelValues(call, outcome).Inc()
	if err != nil {
		e.cfg.Logger.WarnContext(ctx, "no answer from the CIBA provider", "approval", a.ID,
			"provider", a.ApproverRef.Issuer, "call", call, "outcome", outcome, "error", err)
	}
}

// claimTime is how long a prompt is kept from others while its call is in flight.
func (e *Engine) claimTime() time.Duration {
	d := claimMargin
	for _, p := range e.cfg.Providers {
		d = max(d, p.Timeout()+claimMargin)
	}
	return d
}

// Wait returns the caller's approval, as soon as it is not open any more or after
// the time given.
func (e *Engine) Wait(ctx context.Context, approvalID string, c identity.Caller, wait time.Duration) (Approval, error) {
	wake, stop := e.cfg.Store.Watch(approvalID)
	defer stop()
	timeout := time.NewTimer(wait)
	defer timeout.Stop()
	for {
		var a Approval
		err := e.cfg.Store.View(ctx, func(tx Tx) (err error) {
			a, err = Find(ctx, tx, approvalID, c)
			return err
		})
		if err != nil || !a.Open() {
			return a, err
		}
		select {
		case <-wake:
		case <-timeout.C:
			return a, nil
		case <-e.cfg.Stopping:
			return a, nil
		case <-ctx.Done():
			return a, context.Cause(ctx)
		}
	}
}

// Withdraw ends an open or unused approval of the caller's; one that has ended
// already stays as it is.
func (e *Engine) Withdraw(ctx context.Context, approvalID string, c identity.Caller) (Approval, error) {
	for {
		var a Approval
		var was State
		err := e.cfg.Store.Update(ctx, func(tx Tx) (err error) {
			a, err = Find(ctx, tx, approvalID, c)
			was = a.State
			if err != nil || !a.Open() && a.State != Approved {
				return err
			}
			return Close(ctx, tx, &a, Cancelled, "withdrawn by the agent")
		})
		if errors.Is(err, ErrStale) {
			continue
		}
		if err == nil {
			e.count(was, a)
		}
		return a, err
	}
}

// backoff grows with the failures in a row, jittered so that prompts don't come
// back all at once.
func backoff(failures int) time.Duration {
	d := min(time.Second<<min(failures-1, 10), maxBackoff)
	return d/2 + rand.N(d/2) //nolint:gosec // jitter
}

// outlive returns a context that ends d after ctx does.
func outlive(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	out, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		timer := time.AfterFunc(d, cancel)
		context.AfterFunc(out, func() { timer.Stop() })
	})
	return out, func() { stop(); cancel() }
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// unreachable is the reason of a prompt that failed because calls brought nothing.
const unreachable = "the provider could not be reached"

var errCrash = errors.New("crashed, as the test wanted")

var startNames = map[StartOutcome]string{Started: "started", StartRefused: "refused", StartLater: "later", StartUnclear: "unclear"}

var pollNames = map[PollOutcome]string{
	PollPending: "pending", PollSlowDown: "slow_down", PollAnswered: "answered", PollDenied: "denied",
	PollExpired: "expired", PollUnknown: "unknown", PollFailed: "failed", PollUnreachable: "unreachable",
}
