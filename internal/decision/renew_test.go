package decision_test

import (
	"context"
	"testing"
	"time"

	"github.com/writsec/writ/internal/approval"
	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/decision"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/policy"
	"github.com/writsec/writ/internal/revocation"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/telemetry"
)

// renewable is a minter whose credentials can be made good for longer.
type renewable struct {
	*fakeMinter
	outside bool
	during  func() // a renewal
}

func (m *renewable) Plan(w lease.Want) (lease.Grant, *lease.Refusal) {
	g, refusal := m.fakeMinter.Plan(w)
	g.Renewable, g.Outside = true, m.outside
	return g, refusal
}

func (m *renewable) Mint(ctx context.Context, o lease.Order) (lease.Made, error) {
	if m.during != nil {
		m.during()
	}
	return m.fakeMinter.Mint(ctx, o)
}

func (f *fixture) lease(id string) (l lease.Lease) {
	f.t.Helper()
	f.must(f.store.View(context.Background(), func(tx *sqlstore.Tx) (err error) {
		l, err = tx.Lease(context.Background(), id)
		return err
	}))
	return l
}

func (f *fixture) revoker() *revocation.Revoker {
	return &revocation.Revoker{Store: sqlstore.For[revocation.Tx](f.store), Metrics: telemetry.NewMetrics()}
}

func (f *fixture) reload(rego string) {
	f.t.Helper()
	f.write("policies/writ.rego", rego)
	f.must(f.cfg.Policy.Load(context.Background()))
}

func TestRenewalIsDecidedAnew(t *testing.T) {
	for _, outside := range []bool{false, true} {
		minter := &renewable{fakeMinter: &fakeMinter{}, outside: outside}
		f := newFixture(t, rules, func(c *decision.Config) { c.Minters = map[string]lease.Minter{"m": minter} })
		ctx := context.Background()
		q := f.request("mint")
		first := f.decide(q)
		id := first.Credential.Lease
		renew := func() (decision.Answer, error) {
			t.Helper()
			return f.Renew(ctx, q, id)
		}
		time.Sleep(1100 * time.Millisecond)
		again, err := renew()
		if err != nil || again.Decision != policy.Allow || again.Credential.Lease != id || again.Credential.Secret["password"] != "secret-2" ||
			!again.Credential.ExpiresAt.After(first.Credential.ExpiresAt) || again.DecisionID == first.DecisionID {
			t.Fatalf("renewed %+v, %v", again, err)
		}
		l := f.lease(id)
		if l.State != lease.Active || !l.ExpiresAt.Equal(again.Credential.ExpiresAt) || l.Decision != first.DecisionID {
			t.Errorf("the lease %+v", l)
		}
		if n := f.entries(); n[audit.LeaseRenewed] != 1 || n[audit.LeaseActive] != 1 || n[audit.DecisionAllow] != 2 {
			t.Errorf("audit: %v", n)
		}

		// Where the target fails the credential stays as it was.
		minter.fail.Store(true)
		if _, err := renew(); !fault.Is(err, fault.MintFailed) {
			t.Errorf("a target that is down: %v", err)
		}
		minter.fail.Store(false)
		if l := f.lease(id); l.State != lease.Active || !l.Alive(time.Now()) {
			t.Errorf("after a failed renewal: %+v", l)
		}

		// Policy says otherwise by now.
		changed := `package writ
decision := {"effect": "allow", "reasons": [{"code": "mint", "message": "mint"}], "credential": {"minter": "m", "ttl": "1m", "scope": {"x": "z"}}}`
		f.reload(changed)
		if a, err := renew(); err != nil || a.Decision != policy.Deny || a.Reasons[0].Code != "renewal_changed" || a.Credential != nil {
			t.Errorf("another grant: %+v, %v", a, err)
		}
		f.reload("package writ\ndecision := {\"effect\": \"deny\", \"reasons\": [{\"code\": \"no\", \"message\": \"no\"}]}")
		if a, err := renew(); err != nil || a.Decision != policy.Deny || a.Reasons[0].Code != "no" {
			t.Errorf("a deny: %+v, %v", a, err)
		}
		f.reload("package writ\ndecision := {\"effect\": \"allow\", \"reasons\": [{\"code\": \"ok\", \"message\": \"ok\"}]}")
		if a, err := renew(); err != nil || a.Decision != policy.Deny || a.Reasons[0].Code != "renewal_changed" {
			t.Errorf("an allow without a credential: %+v, %v", a, err)
		}
		if l := f.lease(id); !l.Alive(time.Now()) {
			t.Errorf("refused renewals ended the lease: %+v", l)
		}
		f.reload(rules)

		// Revoked while its target makes it good for longer: the secret does not leave.
		minter.during = func() {
			_, err := f.revoker().Revoke(ctx, revocation.Order{Scope: revocation.Scope{Kind: revocation.OfLease, Value: id}})
			f.must(err)
		}
		if a, err := renew(); !fault.Is(err, fault.LeaseEnded) || a.Credential != nil {
			t.Errorf("revoked meanwhile: %+v, %v", a, err)
		}
		minter.during = nil
		if _, err := renew(); !fault.Is(err, fault.LeaseEnded) {
			t.Errorf("after its end: %v", err)
		}
	}
}

func TestWhatIsNotRenewed(t *testing.T) {
	minter := &renewable{fakeMinter: &fakeMinter{}}
	f := newFixture(t, rules, func(c *decision.Config) {
		c.Minters = map[string]lease.Minter{"m": minter}
	})
	ctx := context.Background()
	// What a person approved.
	q := f.request("ask")
	q.Session = f.open()
	f.phone.answer.Store(int64(approval.PollAnswered))
	q.Wait = 10 * time.Second
	a := f.decide(q)
	if a.Decision != policy.Allow {
		t.Fatalf("approved: %+v", a)
	}
	if _, err := f.Renew(ctx, q, a.Credential.Lease); !fault.Is(err, fault.NotRenewable) {
		t.Errorf("approved: %v", err)
	}

	// A freeze.
	q = f.request("mint")
	a = f.decide(q)
	v, err := f.revoker().Revoke(ctx, revocation.Order{Scope: revocation.Scope{Kind: revocation.OfMinter, Value: "elsewhere"}, Freeze: true})
	f.must(err)
	if _, err := f.Renew(ctx, q, a.Credential.Lease); err != nil {
		t.Errorf("a freeze of another minter: %v", err)
	}
	f.must(f.revoker().Lift(ctx, identity.Ref{}, v.ID))

	// What is another's.
	for _, thief := range [][2]string{{"bob", "agent"}, {"alice", "other"}} {
		stolen := q
		stolen.Presented.Token = f.token(thief[0], thief[1])
		if _, err := f.Renew(ctx, stolen, a.Credential.Lease); !fault.Is(err, fault.NotFound) {
			t.Errorf("%v: %v", thief, err)
		}
	}
	for _, id := range []string{"", "lea_", "lea_00000000000000000000000000", a.DecisionID} {
		if _, err := f.Renew(ctx, q, id); !fault.Is(err, fault.NotFound) {
			t.Errorf("%q: %v", id, err)
		}
	}
	// What its kind can't.
	fixed := newFixture(t, rules, nil)
	q = fixed.request("mint")
	a = fixed.decide(q)
	if _, err := fixed.Renew(ctx, q, a.Credential.Lease); !fault.Is(err, fault.NotRenewable) {
		t.Errorf("a kind that can't: %v", err)
	}
}
