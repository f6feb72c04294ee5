package revocation

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/writsec/writ/internal/approval"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/session"
)

// Expirer records the end of leases and sessions whose time is over, and forgets
// old idempotency keys, sign-ins, sign-outs, what was good once only, and what was left
// on pairs long enough ago. Nothing depends on its speed: leases and sessions are refused
// by their time alone.
type Expirer struct {
	*Revoker
	Logger *slog.Logger
	// KeepRecords is how long ended sessions are kept with all that belongs to them;
	// KeepInputs, what decisions were made on. Zero: for ever.
	KeepRecords, KeepInputs time.Duration
}

const (
	expireEvery = time.Second
	expireBatch = 100
	// keyAge outlives every lease and approval that a retry could be about.
	keyAge = 24 * time.Hour
	// signInAge is for those who come late to be told so; the log has the rest.
	signInAge = 24 * time.Hour
	// scopeAge outlives every decision that could have read a scope's version.
	scopeAge = 24 * time.Hour
)

// Run works until ctx ends.
func (e *Expirer) Run(ctx context.Context) error {
	for {
		more, err := e.step(ctx)
		if err != nil && ctx.Err() == nil {
			e.Logger.ErrorContext(ctx, "expire leases and sessions", "error", err)
		}
		if more && err == nil {
			continue
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(expireEvery/2 + rand.N(expireEvery/2)): //nolint:gosec // G404: jitter is no secret
		}
	}
}

// step ends one batch of each; more says that there may be others.
func (e *Expirer) step(ctx context.Context) (more bool, err error) {
	// A transaction each: one that can't be done must not keep the others from it.
	var errs []error
	for _, work := range []func(context.Context) (bool, error){e.expireLeases, e.expireSessions, e.revocations, e.forget} {
		again, err := work(ctx)
		if errors.Is(err, session.ErrChanged) || errors.Is(err, approval.ErrStale) {
			again, err = true, nil // a parallel transaction was faster; look again
		}
		more = more || again
		errs = append(errs, err)
	}
	return more, errors.Join(errs...)
}

func (e *Expirer) expireLeases(ctx context.Context) (more bool, err error) {
	for _, due := range []struct {
		leases lease.Selection
		reason string
	}{
		{lease.Selection{Due: true}, lease.EndExpired},
		{lease.Selection{Overdue: true}, lease.EndMintFailed}, // whoever made them is gone, or late
	} {
		var ended lease.Ended
		err := e.Store.Update(ctx, func(tx Tx) (err error) {
			ended, err = lease.EndSome(ctx, tx, due.leases, lease.End{Reason: due.reason})
			return err
		})
		if err != nil {
			return false, err
		}
		for kind, n := range ended {
			e.Metrics.Leases.WithLabelValues(kind, due.reason).Add(float64(n))
		}
		more = more || ended.Total() == lease.BatchSize
	}
	return more, nil
}

// revocations carries on those that are under way.
func (e *Expirer) revocations(ctx context.Context) (more bool, err error) {
	var due []string
	err = e.Store.Update(ctx, func(tx Tx) (err error) {
		due, err = tx.DueRevocations(ctx, expireBatch)
		return err
	})
	var errs []error
	for _, id := range due {
		again, err := e.carryOn(ctx, id)
		more = more || again
		errs = append(errs, err)
	}
	return more, errors.Join(append(errs, err)...)
}

func (e *Expirer) expireSessions(ctx context.Context) (more bool, err error) {
	var t toll
	err = e.Store.Update(ctx, func(tx Tx) error {
		t = newToll()
		sessions, err := tx.DueSessions(ctx, expireBatch)
		if err != nil {
			return err
		}
		for _, s := range sessions {
			reason := "expired"
			if tx.Now().Before(s.EndsAt) {
				reason = "idle"
			}
			if err := t.end(ctx, tx, s, reason, lease.End{Reason: lease.EndSession}); err != nil {
				return err
			}
		}
		more = len(sessions) == expireBatch
		return nil
	})
	if err != nil {
		return false, err
	}
	e.count(t)
	return more, nil
}

func (e *Expirer) forget(ctx context.Context) (more bool, err error) {
	err = e.Store.Update(ctx, func(tx Tx) error {
		forgotten, err := tx.ForgetReplays(ctx, tx.Now().Add(-keyAge), expireBatch)
		if err != nil {
			return err
		}
		forgetSignIns := func(ctx context.Context, limit int) (int64, error) {
			return tx.ForgetSignIns(ctx, tx.Now().Add(-signInAge), limit)
		}
		forgetReservations := func(ctx context.Context, limit int) (int64, error) {
			return tx.ForgetReservations(ctx, tx.Now().Add(-scopeAge), limit)
		}
		for _, drop := range []func(context.Context, int) (int64, error){tx.ForgetSpent, tx.ForgetSignOuts, forgetSignIns, forgetReservations} {
			n, err := drop(ctx, expireBatch)
			if err != nil {
				return err
			}
			forgotten = max(forgotten, n)
		}
		if e.KeepRecords > 0 {
			n, err := tx.ForgetSessions(ctx, tx.Now().Add(-e.KeepRecords), expireBatch)
			if err != nil {
				return err
			}
			forgotten = max(forgotten, n)
		}
		if e.KeepInputs > 0 {
			n, err := tx.ForgetInputs(ctx, tx.Now().Add(-e.KeepInputs), expireBatch)
			if err != nil {
				return err
			}
			forgotten = max(forgotten, n)
		}
		more = forgotten == expireBatch
		return nil
	})
	return more, err
}
