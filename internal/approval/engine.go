package approval

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/telemetry"
)

const (
	workers     = 8
	idle        = time.Second // a worker looks for due work at least this often
	minInterval = time.Second
	maxInterval = 5 * time.Minute
	maxBackoff  = time.Minute
	// claimMargin, beyond the timeout of a call, keeps other workers off a prompt
	// whose call is in flight.
	claimMargin = 20 * time.Second
	// sendMargin keeps two polls apart by the interval although the time of sending
	// is recorded a little before the bytes leave.
	sendMargin = 100 * time.Millisecond
	// grace is how long a call in flight may go on after a shutdown began: an answer
	// must not be lost for that.
	grace = 5 * time.Second
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

// Run works on due prompts until ctx ends.
func (e *Engine) Run(ctx context.Context) error {
	var g errgroup.Group
	for range workers {
		g.Go(func() error {
			wake, stop := e.cfg.Store.Watch(workTopic)
			defer stop()
			for ctx.Err() == nil {
				more, err := e.step(ctx)
				if err != nil && ctx.Err() == nil {
					e.cfg.Logger.ErrorContext(ctx, "approval step", "error", err)
				}
				if more && err == nil {
					continue
				}
				select {
				case <-ctx.Done():
				case <-wake:
				case <-time.After(idle/2 + rand.N(idle/2)):
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// step does the next thing that one due prompt needs. more says that there was one.
func (e *Engine) step(ctx context.Context) (more bool, err error) {
	var a Approval
	var lostPoll bool
	err = e.cfg.Store.Update(ctx, func(tx Tx) (err error) {
		if a, more, err = tx.DueApproval(ctx); err != nil || !more {
			return err
		}
		lostPoll = a.Polling
		return e.begin(ctx, tx, &a)
	})
	if err != nil || !more {
		return false, err
	}
	if e.crash("begun") {
		return false, errCrash
	}
	ctx, cancel := outlive(ctx, grace)
	defer cancel()
	p := e.cfg.Providers[a.ApproverRef.Issuer]
	switch a.State {
	case Requesting:
		err = e.start(ctx, a, p)
	case Pending:
		err = e.poll(ctx, a, p, lostPoll)
	case Redeemed:
		err = e.verify(ctx, a, p)
	}
	if errors.Is(err, ErrStale) { // cancelled or taken over meanwhile; the newer writer is right
		return true, nil
	}
	return true, err
}

// begin takes the work: it commits what is about to happen before it happens.
func (e *Engine) begin(ctx context.Context, tx Tx, a *Approval) error {
	now := tx.Now()
	end := func(s State, reason string) error {
		err := e.close(ctx, tx, *a, s, reason)
		a.State = s
		return err
	}
	if _, ok := e.cfg.Providers[a.ApproverRef.Issuer]; !ok {
		return end(Failed, "the provider is not configured any more")
	}
	if overdue := !now.Before(a.ExpiresAt); overdue && a.State != Requesting && a.State != Redeemed {
		if a.Failures > 0 {
			return end(Failed, "the provider could not be reached")
		}
		return end(Expired, "")
	}
	switch a.State {
	case Requesting: // due again, so the process that sent it is gone
		return end(StartUnknown, "interrupted while the provider was asked")
	case Created:
		a.State, a.SentAt = Requesting, now
	case Pending:
		a.Polling, a.PolledAt = true, now
	}
	a.DueAt = now.Add(e.claim())
	return tx.UpdateApproval(ctx, a)
}

func (e *Engine) start(ctx context.Context, a Approval, p Provider) error {
	r := p.Start(ctx, StartRequest{
		Hint: a.Hint, Message: a.Message, ACRValues: a.ACRValues, ExpiresIn: a.ExpiresAt.Sub(a.SentAt),
	})
	if e.crash("started") {
		return errCrash
	}
	e.cfg.Metrics.ProviderCalls.WithLabelValues("start", startNames[r.Outcome]).Inc()
	return e.cfg.Store.Update(ctx, func(tx Tx) error {
		a := a
		switch r.Outcome {
		case StartRefused:
			return e.close(ctx, tx, a, Failed, r.Reason)
		case StartUnclear:
			return e.close(ctx, tx, a, StartUnknown, r.Reason)
		case StartLater:
			a.State, a.Failures = Created, a.Failures+1
			a.DueAt = earlier(tx.Now().Add(max(r.RetryAfter, backoff(a.Failures))), a.ExpiresAt)
			return tx.UpdateApproval(ctx, &a)
		}
		a.State, a.AuthReqID, a.Failures = Pending, r.AuthReqID, 0
		a.Interval = min(max(r.Interval, minInterval), maxInterval)
		// The provider's own limit can only shorten ours.
		a.ExpiresAt = earlier(a.ExpiresAt, a.SentAt.Add(r.ExpiresIn))
		a.DueAt = earlier(tx.Now().Add(a.Interval), a.ExpiresAt)
		if err := tx.UpdateApproval(ctx, &a); err != nil {
			return err
		}
		tx.Notify(a.ID)
		return record(ctx, tx, a, audit.ApprovalPrompted, map[string]any{"provider": a.ApproverRef.Issuer})
	})
}

func (e *Engine) poll(ctx context.Context, a Approval, p Provider, lostPoll bool) error {
	r := p.Poll(ctx, a.AuthReqID)
	if e.crash("polled") {
		return errCrash
	}
	e.cfg.Metrics.ProviderCalls.WithLabelValues("poll", pollNames[r.Outcome]).Inc()
	next := a
	err := e.cfg.Store.Update(ctx, func(tx Tx) error {
		next = a
		wait := max(next.Interval, r.RetryAfter)
		switch r.Outcome {
		case PollAnswered:
			next.State, next.Answer, next.Polling, next.Failures = Redeemed, r.Answer, false, 0
			next.DueAt = tx.Now().Add(e.claim())
			return tx.UpdateApproval(ctx, &next)
		case PollDenied:
			return e.close(ctx, tx, next, Denied, "")
		case PollExpired:
			return e.close(ctx, tx, next, Expired, "")
		case PollUnknown:
			if !tx.Now().Before(next.ExpiresAt) { // some providers forget instead of saying expired_token
				return e.close(ctx, tx, next, Expired, "")
			}
			if lostPoll {
				return e.close(ctx, tx, next, OutcomeLost, "interrupted while the provider answered")
			}
			return e.close(ctx, tx, next, Failed, "invalid_grant")
		case PollFailed:
			return e.close(ctx, tx, next, Failed, r.Reason)
		case PollUnreachable:
			// The answer may be lost, or it may never have been given: Polling stays,
			// so that an invalid_grant later is known for what it is.
			next.Failures++
			wait = max(wait, backoff(next.Failures))
		case PollSlowDown: // CIBA Core §11: at least 5 s more, for this and all later polls
			next.Interval = min(max(next.Interval+5*time.Second, r.Interval), maxInterval)
			next.Polling, next.Failures = false, 0
			wait = max(next.Interval, r.RetryAfter)
		case PollPending:
			next.Polling, next.Failures = false, 0
		}
		next.DueAt = earlier(next.PolledAt.Add(wait+sendMargin), next.ExpiresAt)
		return tx.UpdateApproval(ctx, &next)
	})
	if err != nil && r.Outcome == PollAnswered {
		p.Discard(ctx, r.Answer) // nobody will use these tokens
	}
	if err != nil || r.Outcome != PollAnswered {
		return err
	}
	if e.crash("redeemed") {
		return errCrash
	}
	return e.verify(ctx, next, p)
}

// verify can be repeated: the answer is stored.
func (e *Engine) verify(ctx context.Context, a Approval, p Provider) error {
	var now time.Time
	if err := e.cfg.Store.View(ctx, func(tx Tx) error { now = tx.Now(); return nil }); err != nil {
		return err
	}
	evidence, refused := p.Verify(ctx, a.Answer, Expectation{
		Subject: a.ApproverRef.ID, ACRValues: a.ACRValues, AuthReqID: a.AuthReqID, NotBefore: a.SentAt, Now: now,
	})
	if e.crash("verified") {
		return errCrash
	}
	err := e.cfg.Store.Update(ctx, func(tx Tx) error {
		a := a
		switch now := tx.Now(); {
		case errors.Is(refused, ErrUnavailable) && now.Before(a.ExpiresAt):
			a.Failures++
			a.DueAt = earlier(now.Add(backoff(a.Failures)), a.ExpiresAt)
			return tx.UpdateApproval(ctx, &a)
		case refused != nil:
			return e.close(ctx, tx, a, Failed, "answer_invalid")
		case !now.Before(a.ExpiresAt):
			return e.close(ctx, tx, a, Expired, "")
		default:
			a.ExpiresAt = now.Add(e.cfg.UseWithin)
		}
		a.State, a.AuthReqID, a.Answer = Approved, "", nil
		a.ACR, a.AMR, a.AuthTime = evidence.ACR, evidence.AMR, evidence.AuthTime
		a.DueAt = a.ExpiresAt
		if err := tx.UpdateApproval(ctx, &a); err != nil {
			return err
		}
		tx.Notify(a.ID)
		e.cfg.Metrics.Approvals.WithLabelValues(string(Approved)).Inc()
		return record(ctx, tx, a, audit.ApprovalApproved, map[string]any{
			"approver": a.ApproverRef, "acr": a.ACR, "amr": a.AMR, "use_until": a.ExpiresAt,
		})
	})
	if refused != nil {
		e.cfg.Logger.WarnContext(ctx, "approval answer refused", "approval", a.ID, "error", refused)
	}
	if !errors.Is(refused, ErrUnavailable) && (err == nil || errors.Is(err, ErrStale)) {
		p.Discard(ctx, a.Answer)
	}
	return err
}

func (e *Engine) close(ctx context.Context, tx Tx, a Approval, end State, reason string) error {
	e.cfg.Metrics.Approvals.WithLabelValues(string(end)).Inc()
	return Close(ctx, tx, a, end, reason)
}

// claim is how long a prompt is kept from other workers while a call is in flight.
func (e *Engine) claim() time.Duration {
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
	var a Approval
	for {
		err := e.cfg.Store.Update(ctx, func(tx Tx) (err error) {
			if a, err = Find(ctx, tx, approvalID, c); err != nil || !(a.Open() || a.State == Approved) {
				return err
			}
			if err := e.close(ctx, tx, a, Cancelled, "withdrawn by the agent"); err != nil {
				return err
			}
			a.State, a.Reason = Cancelled, "withdrawn by the agent"
			return nil
		})
		if !errors.Is(err, ErrStale) {
			return a, err
		}
	}
}

// backoff grows with the failures in a row, jittered so that prompts don't come
// back all at once.
func backoff(failures int) time.Duration {
	d := min(time.Second<<min(failures-1, 10), maxBackoff)
	return d/2 + rand.N(d/2)
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

var errCrash = errors.New("crashed, as the test wanted")

var startNames = map[StartOutcome]string{Started: "started", StartRefused: "refused", StartLater: "later", StartUnclear: "unclear"}

var pollNames = map[PollOutcome]string{
	PollPending: "pending", PollSlowDown: "slow_down", PollAnswered: "answered", PollDenied: "denied",
	PollExpired: "expired", PollUnknown: "unknown", PollFailed: "failed", PollUnreachable: "unreachable",
}
