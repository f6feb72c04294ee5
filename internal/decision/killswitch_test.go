package decision_test

import (
	"context"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/decision"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/policy"
	"github.com/writsec/writ/internal/revocation"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/telemetry"
)

// Locks are taken in one order: on PostgreSQL a deadlock would take a second.
func TestTheKillSwitchDoesNotDeadlockWithDecisions(t *testing.T) {
	for _, kind := range []revocation.Kind{revocation.OfSession, revocation.OfLease} {
		m := &renewable{fakeMinter: &fakeMinter{}}
		f := newFixture(t, rules, func(c *decision.Config) { c.Minters = map[string]lease.Minter{"m": m} })
		ctx, stop := context.WithCancel(context.Background())
		q := f.request("mint")
		q.Session = f.open()
		first := f.decide(q)
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for ctx.Err() == nil {
					if kind == revocation.OfLease {
						_, _ = f.Renew(ctx, q, first.Credential.Lease)
					} else {
						_, _ = f.Decide(ctx, q)
					}
				}
			})
		}
		time.Sleep(500 * time.Millisecond)
		s := revocation.Scope{Kind: kind, Value: q.Session}
		if kind == revocation.OfLease {
			s.Value = first.Credential.Lease
		}
		begun := time.Now()
		_, err := f.revoker().Revoke(context.Background(), revocation.Order{Scope: s})
		if took := time.Since(begun); err != nil || took > 900*time.Millisecond {
			t.Errorf("%s: %v %v", kind, took, err)
		}
		stop()
		wg.Wait()
	}
}

func TestRevokingTheRevisionThatRenewed(t *testing.T) {
	m := &renewable{fakeMinter: &fakeMinter{}}
	f := newFixture(t, rules, func(c *decision.Config) { c.Minters = map[string]lease.Minter{"m": m} })
	ctx := context.Background()
	q := f.request("mint")
	q.Session = f.open()
	first := f.decide(q)
	f.reload(rules + "\n# other\n")
	again, err := f.Renew(ctx, q, first.Credential.Lease)
	f.must(err)
	v, err := f.revoker().Revoke(ctx, revocation.Order{Scope: revocation.Scope{Kind: revocation.OfPolicy, Value: again.Policy.Revision}, Freeze: true})
	f.must(err)
	if v.Leases != 1 {
		t.Errorf("revoking the revision that renewed it ended %d leases", v.Leases)
	}
	if x, err := f.Renew(ctx, q, first.Credential.Lease); err == nil && x.Decision == policy.Allow {
		t.Error("renewed under a frozen revision")
	}
}

// A retry of a mint that failed is not given what an operator has revoked since.
func TestNoRetryOfWhatWasRevoked(t *testing.T) {
	for _, kind := range []revocation.Kind{revocation.OfLease, revocation.OfPolicy} {
		m := &renewable{fakeMinter: &fakeMinter{}, outside: true}
		f := newFixture(t, rules, func(c *decision.Config) { c.Minters = map[string]lease.Minter{"m": m} })
		ctx := context.Background()
		q := f.request("mint")
		q.Session, q.IdempotencyKey = f.open(), "k"
		m.fail.Store(true)
		_, _ = f.Decide(ctx, q)
		m.fail.Store(false)
		var l lease.Lease
		f.must(f.store.View(ctx, func(tx *sqlstore.Tx) error {
			ls, err := tx.Leases(ctx, lease.Query{Session: q.Session, Limit: 10})
			l = ls[0]
			return err
		}))
		s := revocation.Scope{Kind: kind, Value: l.ID}
		if kind == revocation.OfPolicy {
			s.Value = l.Policy
		}
		_, err := f.revoker().Revoke(ctx, revocation.Order{Scope: s})
		f.must(err)
		if a, err := f.Decide(ctx, q); err == nil && a.Credential != nil {
			t.Errorf("%s: a retry was given what was revoked, without asking policy", kind)
		}
	}
}

// All is gone only if what had ended before is gone too.
func TestWhatEndedBeforeIsNotGoneEither(t *testing.T) {
	m := &renewable{fakeMinter: &fakeMinter{}, outside: true}
	f := newFixture(t, rules, func(c *decision.Config) { c.Minters = map[string]lease.Minter{"m": m} })
	ctx := context.Background()
	q := f.request("mint")
	q.Session = f.open()
	a := f.decide(q)
	_, err := f.revoker().Release(ctx, identity.Caller{Agent: identity.Principal{Ref: identity.Ref{Issuer: issuer, ID: "agent"}}}, a.Credential.Lease)
	f.must(err)
	v, err := f.revoker().Revoke(ctx, revocation.Order{Scope: revocation.Scope{Kind: revocation.OfAll}})
	f.must(err)
	if l := f.lease(a.Credential.Lease); l.State == lease.Revoking && !v.GoneAt.IsZero() {
		t.Errorf("all is said to be gone (%d leases), but a credential in scope is %s", v.Leases, l.State)
	}
}

type oddTarget struct{ *renewable }

func (oddTarget) Unmake(_ context.Context, ls []lease.Lease) ([]lease.Unmade, error) {
	out := make([]lease.Unmade, len(ls))
	for i := range out {
		out[i].Seen = map[string]any{"role": "caf\xe9"}
	}
	return out, nil
}

// Whatever a target shows, the end of a credential is recorded.
func TestOddSightsAreRecorded(t *testing.T) {
	m := oddTarget{&renewable{fakeMinter: &fakeMinter{}, outside: true}}
	f := newFixture(t, rules, func(c *decision.Config) { c.Minters = map[string]lease.Minter{"m": m} })
	ctx, stop := context.WithCancel(context.Background())
	q := f.request("mint")
	q.Session = f.open()
	a := f.decide(q)
	_, err := f.revoker().Release(ctx, identity.Caller{Agent: identity.Principal{Ref: identity.Ref{Issuer: issuer, ID: "agent"}}}, a.Credential.Lease)
	f.must(err)
	w := &lease.Worker{Store: sqlstore.For[lease.WorkTx](f.store), Targets: map[string]lease.Target{"m": m}, Metrics: telemetry.NewMetrics(), Logger: slog.New(slog.DiscardHandler)}
	done := make(chan struct{})
	go func() { defer close(done); _ = w.Run(ctx) }()
	time.Sleep(2 * time.Second)
	stop()
	<-done
	if l := f.lease(a.Credential.Lease); l.State != lease.Revoked || f.entries()[audit.LeaseRevoked] != 1 {
		t.Errorf("its end was seen, but it is %s", l.State)
	}
}
