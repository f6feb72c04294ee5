package decision_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/writsec/writ/internal/decision"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/policy"
	"github.com/writsec/writ/internal/revocation"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/storetest"
	"github.com/writsec/writ/internal/telemetry"
)

// fakeTarget keeps the credentials that it made.
type fakeTarget struct {
	mu     sync.Mutex
	there  map[string]lease.Order // by lease
	tombs  map[string]bool
	during func(lease.Order) error // while it makes one
	minted atomic.Int64
}

func (m *fakeTarget) Plan(w lease.Want) (lease.Grant, *lease.Refusal) {
	return lease.Grant{
		Minter: "m", Kind: "fake", Scope: w.Scope, TTL: w.TTL, Revocability: "instant", Precision: "exact", Outside: true, Renewable: true,
	}, nil
}

func (m *fakeTarget) Mint(ctx context.Context, o lease.Order) (lease.Made, error) {
	m.mu.Lock()
	if m.tombs[o.Lease.ID] {
		m.mu.Unlock()
		return lease.Made{}, errors.New("it was unmade")
	}
	m.there[o.Lease.ID] = o
	m.mu.Unlock()
	if m.during != nil {
		if err := m.during(o); err != nil {
			return lease.Made{}, err
		}
	}
	n := m.minted.Add(1)
	return lease.Made{Secret: lease.Secret{"password": fmt.Sprint("secret-", n)}, Recall: fmt.Sprint("recall-", n)}, ctx.Err()
}

func (m *fakeTarget) Unmake(_ context.Context, leases []lease.Lease) ([]lease.Unmade, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, l := range leases {
		m.tombs[l.ID] = true
		delete(m.there, l.ID)
	}
	return make([]lease.Unmade, len(leases)), nil
}

func (m *fakeTarget) count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.there)
}

// withTarget is a fixture whose minter makes credentials at a target, and a worker.
func withTarget(t *testing.T) (*fixture, *fakeTarget, *revocation.Revoker) {
	t.Helper()
	m := &fakeTarget{there: map[string]lease.Order{}, tombs: map[string]bool{}}
	f := newFixture(t, rules, func(c *decision.Config) {
		c.Minters = map[string]lease.Minter{"m": m}
		c.Breakers = map[string]*lease.Breaker{"m": {}}
		c.Limits = lease.Limits{PerSession: 100}
	})
	log, metrics := slog.New(slog.DiscardHandler), telemetry.NewMetrics()
	w := &lease.Worker{
		Store: sqlstore.For[lease.WorkTx](f.store), Targets: map[string]lease.Target{"m": m}, Breakers: f.cfg.Breakers, Metrics: metrics, Logger: log,
	}
	revoker := &revocation.Revoker{Store: sqlstore.For[revocation.Tx](f.store), Metrics: metrics}
	e := &revocation.Expirer{Revoker: revoker, Logger: log}
	ctx, stop := context.WithCancel(context.Background())
	var g sync.WaitGroup
	g.Go(func() { f.must(w.Run(ctx)) })
	g.Go(func() { f.must(e.Run(ctx)) })
	t.Cleanup(func() { stop(); g.Wait() })
	return f, m, revoker
}

// wantNothing waits until the target has nothing and no lease is open.
func (f *fixture) wantNothing(m *fakeTarget) {
	f.t.Helper()
	var open []string
	for begin := time.Now(); time.Since(begin) < 15*time.Second; time.Sleep(20 * time.Millisecond) {
		f.must(f.store.View(context.Background(), func(tx *sqlstore.Tx) error {
			open = nil
			ls, err := tx.Leases(context.Background(), lease.Query{Limit: 1000})
			for _, l := range ls {
				if l.State != lease.Revoked {
					open = append(open, l.ID+" "+string(l.State))
				}
			}
			return err
		}))
		if len(open) == 0 && m.count() == 0 {
			return
		}
	}
	f.t.Errorf("%d credentials at the target, leases %v", m.count(), open)
}

// minted asks in a session for a credential.
func (f *fixture) mint(session string) (decision.Answer, error) {
	r := f.request("mint")
	r.Session = session
	return f.Decide(context.Background(), r)
}

func TestACredentialAtATarget(t *testing.T) {
	f, m, _ := withTarget(t)
	s := f.open()
	a, err := f.mint(s)
	if err != nil || a.Credential == nil || a.Credential.Secret["password"] != "secret-1" {
		t.Fatalf("%+v, %v", a, err)
	}
	if o := m.there[a.Credential.Lease]; o.SubjectToken == "" || o.Lease.State != lease.Intent || o.Lease.Policy == "" && a.Policy.Revision != "" {
		t.Errorf("ordered %+v", o.Lease)
	}
}

// The commit that makes it active fails: no secret leaves, and the credential is gone
// within 15 seconds.
func TestFault02TheRecordOfAMintFails(t *testing.T) {
	f, m, _ := withTarget(t)
	s := f.open()
	m.during = func(lease.Order) error {
		mend := storetest.Break(t, f.url, "audit") // the first commit is over
		time.AfterFunc(300*time.Millisecond, mend)
		return nil
	}
	begun := time.Now()
	a, err := f.mint(s)
	if a.Credential != nil || !fault.Is(err, fault.Unavailable) {
		t.Fatalf("%+v, %v", a.Credential, err)
	}
	if strings.Contains(err.Error(), "secret-") || strings.Contains(err.Error(), "recall-") {
		t.Error("the error has the secret")
	}
	f.wantNothing(m)
	if took := time.Since(begun); took > 15*time.Second {
		t.Errorf("took %v", took)
	}
}

// Whatever happens while a credential is being made, a secret leaves only if the lease
// is good then, and what was made for nothing is unmade.
func TestWhileItIsBeingMade(t *testing.T) {
	for name, c := range map[string]struct {
		during func(t *testing.T, f *fixture, r *revocation.Revoker, l lease.Lease) error
		code   fault.Code
	}{
		"the kill switch": {func(t *testing.T, f *fixture, r *revocation.Revoker, l lease.Lease) error {
			_, err := r.Revoke(t.Context(), revocation.Order{Scope: revocation.Scope{Kind: revocation.OfUser, Value: l.User.ID, Issuer: l.User.Issuer}})
			f.must(err)
			return nil
		}, fault.LeaseEnded},
		"the kill switch for its minter": {func(t *testing.T, f *fixture, r *revocation.Revoker, l lease.Lease) error {
			_, err := r.Revoke(t.Context(), revocation.Order{Scope: revocation.Scope{Kind: revocation.OfMinter, Value: "m"}})
			f.must(err)
			return nil
		}, fault.LeaseEnded},
		"the end of its session": {func(t *testing.T, f *fixture, r *revocation.Revoker, l lease.Lease) error {
			_, err := r.EndSession(t.Context(), identity.Caller{Agent: identity.Principal{Ref: l.Agent}}, l.Session)
			f.must(err)
			return nil
		}, fault.LeaseEnded},
		"its deadline": {func(t *testing.T, f *fixture, r *revocation.Revoker, l lease.Lease) error {
			f.sql(`UPDATE leases SET mint_deadline = 1`)
			time.Sleep(2500 * time.Millisecond)
			return nil
		}, fault.LeaseEnded},
		"a failure of the target": {func(*testing.T, *fixture, *revocation.Revoker, lease.Lease) error {
			return errors.New("timeout after it was made")
		}, fault.MintFailed},
	} {
		t.Run(name, func(t *testing.T) {
			f, m, r := withTarget(t)
			s := f.open()
			m.during = func(o lease.Order) error { return c.during(t, f, r, o.Lease) }
			a, err := f.mint(s)
			if a.Credential != nil || !fault.Is(err, c.code) {
				t.Errorf("%+v, %v; want %s", a.Credential, err, c.code)
			}
			f.wantNothing(m)
		})
	}
	t.Run("the agent hangs up", func(t *testing.T) {
		f, m, _ := withTarget(t)
		r := f.request("mint")
		r.Session = f.open()
		ctx, hangUp := context.WithCancel(t.Context())
		m.during = func(lease.Order) error { hangUp(); return nil }
		if a, err := f.Decide(ctx, r); err == nil || a.Credential != nil {
			t.Errorf("%+v, %v", a, err)
		}
		f.wantNothing(m)
	})
}

// A target that fails again and again is left alone: requests fail before anything is
// recorded, so that an approval stays usable.
func TestABrokenTargetIsLeftAlone(t *testing.T) {
	f, m, _ := withTarget(t)
	s := f.open()
	asked := 0
	m.during = func(lease.Order) error { asked++; return errors.New("down") }
	for range 20 {
		if _, err := f.mint(s); !fault.Is(err, fault.MintFailed) {
			t.Fatal(err)
		}
	}
	if asked > 10 {
		t.Errorf("asked %d times", asked)
	}
	time.Sleep(2500 * time.Millisecond)
	m.during = nil
	if a, err := f.mint(s); err != nil || a.Credential == nil {
		t.Errorf("after it is well again: %v", err)
	}
}

// Decisions of many sessions go on while one user is frozen. Once the revocation is
// acknowledged, nothing of hers is good any more, nothing new is granted, and all is
// gone from the target.
func TestAFreezeDuringAFlood(t *testing.T) {
	f, m, revoker := withTarget(t)
	other := f.Decider
	if storetest.OnPostgres() {
		other = f.replica()
	}
	ctx := context.Background()
	var frozen atomic.Bool
	var granted, halted, late atomic.Int64
	stop := make(chan struct{})
	var g sync.WaitGroup
	for i := range 8 {
		d := f.Decider
		if i%2 == 1 {
			d = other
		}
		g.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				after := frozen.Load()
				a, err := d.Decide(ctx, f.request("mint")) // opens a session each time
				switch {
				case err == nil && a.Credential != nil && after:
					late.Add(1)
				case err == nil && a.Credential != nil:
					granted.Add(1)
				case err == nil && a.Decision == policy.Deny && a.Reasons[0].Code == "halted":
					halted.Add(1)
				case err != nil && !fault.Is(err, fault.LeaseEnded) && !fault.Is(err, fault.Overloaded):
					t.Error(err)
					return
				}
			}
		})
	}
	for begin := time.Now(); granted.Load() < 20 && time.Since(begin) < 20*time.Second; {
		time.Sleep(10 * time.Millisecond)
	}
	p, err := revoker.Revoke(ctx, revocation.Order{
		Scope: revocation.Scope{Kind: revocation.OfUser, Value: "alice", Issuer: issuer}, Freeze: true, Reason: "drill",
	})
	f.must(err)
	frozen.Store(true)
	time.Sleep(300 * time.Millisecond)
	close(stop)
	g.Wait()
	if late.Load() > 0 || halted.Load() == 0 || p.Leases < 20 {
		t.Errorf("%d granted after it, %d halted, %+v", late.Load(), halted.Load(), p)
	}
	f.wantNothing(m)
	p, err = revoker.Progress(ctx, p.ID)
	f.must(err)
	for begin := time.Now(); p.GoneAt.IsZero() && time.Since(begin) < 5*time.Second; time.Sleep(50 * time.Millisecond) {
		p, err = revoker.Progress(ctx, p.ID)
		f.must(err)
	}
	if p.GoneAt.IsZero() || p.Gone != p.Leases {
		t.Errorf("%+v", p)
	}
	f.must(revoker.Lift(ctx, identity.Ref{Issuer: issuer, ID: "eve"}, p.ID))
	if a, err := f.Decide(ctx, f.request("mint")); err != nil || a.Credential == nil {
		t.Errorf("after it was lifted: %+v, %v", a, err)
	}
}
