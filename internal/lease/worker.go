package lease

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/telemetry"
)

// WorkTx is what unmaking needs of a transaction.
type WorkTx interface {
	audit.Tx
	Now() time.Time
	// ClaimLeases takes up to limit leases of a minter that are due to be unmade, the most
	// urgent first, under a claim that others respect for a while. They have their Recall.
	// Those that failed before come after the others, and fewer at a time, so that what
	// one of them does to the target is its own in the end. freshFirst puts that before
	// urgency.
	ClaimLeases(ctx context.Context, minter, claim string, lapse time.Duration, freshFirst bool, limit int) ([]Lease, error)
	// GoneLeases marks those of the claim revoked that were seen to be gone, forgets what
	// unmaking them needed, and returns their ids.
	GoneLeases(ctx context.Context, claim string, ids []string) ([]string, error)
	// PostponeLease gives one back, that failed, until a time.
	PostponeLease(ctx context.Context, claim, id string, until time.Time, failure string) error
	// LeaveToTime gives one back for good: its target was told, and the rest is time's.
	LeaveToTime(ctx context.Context, claim, id string) error
	// DropClaim gives all back at once. theirs says that the failure may be of one of them.
	DropClaim(ctx context.Context, claim, failure string, theirs bool) error
	// PassLeases marks up to limit leases revoked that had ended and whose time is over
	// now, and returns them.
	PassLeases(ctx context.Context, limit int) ([]Lease, error)
}

// WorkStore runs transactions.
type WorkStore interface {
	Update(ctx context.Context, f func(WorkTx) error) error
	Watch(topic string) (wake <-chan struct{}, stop func())
}

// Worker unmakes at the targets what has ended, for as long as it takes. Each target has
// loops of its own, so that none waits for another.
type Worker struct {
	Store    WorkStore
	Targets  map[string]Target
	Breakers map[string]*Breaker // of the same
	Metrics  *telemetry.Metrics
	Logger   *slog.Logger
}

const (
	hands      = 2 // loops for a target
	unmakeSize = 100
	unmakeTime = 15 * time.Second // one batch
	// claimLapse is when another may take over what was claimed. Unmaking twice does no
	// harm.
	claimLapse = unmakeTime + 5*time.Second
	lookEvery  = time.Second
	minBackoff = time.Second
	maxBackoff = 5 * time.Minute  // for one lease
	maxOutage  = 15 * time.Second // between two looks whether a target is back
)

// Run works until ctx ends.
func (w *Worker) Run(ctx context.Context) error {
	var g sync.WaitGroup
	for name, target := range w.Targets {
		for hand := range hands {
			g.Go(func() { w.serve(ctx, name, target, hand > 0) })
		}
	}
	g.Go(func() { w.pass(ctx) })
	g.Wait()
	return nil
}

// serve unmakes at one target. One hand sees to it that what fails again and again,
// however urgent, does not keep it from the rest.
func (w *Worker) serve(ctx context.Context, name string, target Target, freshFirst bool) {
	wake, stop := w.Store.Watch(UnmakeTopic)
	defer stop()
	failures := 0
	for ctx.Err() == nil {
		more, err := w.step(ctx, name, target, freshFirst)
		switch {
		case ctx.Err() != nil:
		case err != nil:
			failures++
			w.Logger.ErrorContext(ctx, "unmake credentials", "minter", name, "error", err)
			pause(ctx, backoff(failures, maxOutage), nil)
		default:
			failures = 0
			if !more {
				pause(ctx, lookEvery/2+mathrand.N(lookEvery/2), wake) //nolint:gosec // jitter
			}
		}
	}
}

// step unmakes one batch; more says that there may be others. An error says that the
// target, or the store, could not be used.
func (w *Worker) step(ctx context.Context, name string, target Target, freshFirst bool) (more bool, err error) {
	claim := rand.Text()
	var leases []Lease
	err = w.Store.Update(ctx, func(tx WorkTx) (err error) {
		leases, err = tx.ClaimLeases(ctx, name, claim, claimLapse, freshFirst, unmakeSize)
		return err
	})
	if err != nil || len(leases) == 0 {
		return false, err
	}
	bound, cancel := context.WithTimeout(ctx, unmakeTime)
	defer cancel()
	results, err := target.Unmake(bound, leases)
	if err == nil && len(results) != len(leases) {
		err = fmt.Errorf("asked about %d leases, told of %d", len(leases), len(results))
	}
	// What is known must be kept, whoever wants this to stop.
	settling, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if err == nil {
		return true, w.settle(settling, claim, leases, results)
	}
	if ctx.Err() == nil {
		w.Breakers[name].Fail()
	}
	timedOut := ctx.Err() == nil && bound.Err() != nil
	if timedOut && len(leases) == 1 { // it is its own fault
		return true, w.settle(settling, claim, leases, []Unmade{{Err: err}})
	}
	if ctx.Err() == nil {
		for _, l := range leases {
			w.Metrics.Leases.WithLabelValues(l.Kind, "unmake_failed").Inc()
		}
	}
	failure := clipped(err) // on a timeout one of them may be more than the target can take
	return false, errors.Join(err, w.Store.Update(settling, func(tx WorkTx) error { return tx.DropClaim(settling, claim, failure, timedOut) }))
}

// settle records what became of a batch.
func (w *Worker) settle(ctx context.Context, claim string, leases []Lease, results []Unmade) error {
	byID := map[string]int{}
	var now time.Time
	var gone []string
	err := w.Store.Update(ctx, func(tx WorkTx) (err error) {
		now = tx.Now()
		var seen []string
		for i, l := range leases {
			byID[l.ID] = i
			switch r := results[i]; {
			case r.Err != nil:
				err = tx.PostponeLease(ctx, claim, l.ID, now.Add(backoff(l.Attempts+1, maxBackoff)), clipped(r.Err))
			case l.Revocability == RevocableExpiry && now.Before(l.ExpiresAt):
				err = tx.LeaveToTime(ctx, claim, l.ID)
			default:
				seen = append(seen, l.ID)
			}
			if err != nil {
				return err
			}
		}
		if gone, err = tx.GoneLeases(ctx, claim, seen); err != nil {
			return err
		}
		for _, id := range gone {
			if err := recordGone(ctx, tx, leases[byID[id]], results[byID[id]].Seen); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, id := range gone {
		l := leases[byID[id]]
		w.Metrics.UnmakeSeconds.WithLabelValues(l.Kind).Observe(now.Sub(l.EndedAt).Seconds())
		w.Metrics.Leases.WithLabelValues(l.Kind, "gone").Inc()
	}
	for i, r := range results {
		if r.Err != nil {
			w.Metrics.Leases.WithLabelValues(leases[i].Kind, "unmake_failed").Inc()
			w.Logger.WarnContext(ctx, "a credential could not be unmade yet", "lease", leases[i].ID, "minter", leases[i].Minter,
				"attempts", leases[i].Attempts+1, "error", r.Err)
		}
	}
	return nil
}

// recordGone enters that the end of a credential was seen.
func recordGone(ctx context.Context, tx audit.Tx, l Lease, seen map[string]any) error {
	detail := map[string]any{"reason": l.EndReason, "ended_at": l.EndedAt}
	if l.Revocation != "" {
		detail["revocation"] = l.Revocation
	}
	if len(seen) > 0 {
		detail["seen"] = seen
	}
	return record(ctx, tx, audit.LeaseRevoked, l, detail)
}

// pass marks what is gone because its time is over.
func (w *Worker) pass(ctx context.Context) {
	for {
		var leases []Lease
		err := w.Store.Update(ctx, func(tx WorkTx) (err error) {
			if leases, err = tx.PassLeases(ctx, BatchSize); err != nil {
				return err
			}
			for _, l := range leases {
				if err := recordGone(ctx, tx, l, nil); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil && ctx.Err() == nil {
			w.Logger.ErrorContext(ctx, "mark credentials whose time is over", "error", err)
		}
		if err == nil {
			for _, l := range leases {
				w.Metrics.Leases.WithLabelValues(l.Kind, "gone").Inc()
			}
			if len(leases) == BatchSize {
				continue
			}
		}
		if !pause(ctx, lookEvery, nil) {
			return
		}
	}
}

// pause waits, at most until woken, and reports whether to go on.
func pause(ctx context.Context, d time.Duration, wake <-chan struct{}) bool {
	select {
	case <-ctx.Done():
		return false
	case <-wake:
	case <-time.After(d):
	}
	return true
}

// backoff doubles from a second with each failure, give or take a half.
func backoff(failures int, most time.Duration) time.Duration {
	d := most
	if failures < 10 {
		d = min(most, minBackoff<<(failures-1))
	}
	return d/2 + mathrand.N(d) //nolint:gosec // jitter
}

const maxFailure = 300 // bytes of an error that are kept

// clipped is an error as it can be kept and shown: targets choose the words, and text
// that a store refuses must not keep what became of a lease from being recorded.
func clipped(err error) string {
	s := err.Error()
	s = strings.ToValidUTF8(s[:min(len(s), maxFailure)], "")
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
}
