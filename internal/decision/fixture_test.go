package decision_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"go.uber.org/goleak"

	"github.com/writsec/writ/internal/approval"
	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/decision"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/intent"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/policy"
	"github.com/writsec/writ/internal/session"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/storetest"
	"github.com/writsec/writ/internal/telemetry"
)

func TestMain(m *testing.M) {
	code := storetest.Both(m)
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Println(err)
		code = 1
	}
	os.Exit(code)
}

const (
	issuer   = "https://idp.example"
	audience = "urn:writ:test"
)

// fixture is a Decider over the real store, policy engine and token verifier. Only
// the minter and the phone are fakes, because they must fail on demand.
type fixture struct {
	*decision.Decider
	t      *testing.T
	url    string // of the store
	cfg    decision.Config
	dir    string
	store  *sqlstore.Store
	signer jose.Signer
	minter *fakeMinter
	phone  *fakePhone
}

func newFixture(t *testing.T, rego string, change func(*decision.Config)) *fixture {
	t.Helper()
	f := &fixture{t: t, dir: t.TempDir(), minter: &fakeMinter{}, phone: &fakePhone{}}
	ctx := context.Background()
	log := slog.New(slog.DiscardHandler)
	metrics := telemetry.NewMetrics()

	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	f.must(err)
	f.signer, err = jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "k"}},
		(&jose.SignerOptions{}).WithType("at+jwt"))
	f.must(err)
	jwks, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k", Algorithm: "ES256", Use: "sig"}}})
	f.must(err)
	f.write("jwks.json", string(jwks))
	verifier, err := identity.New(identity.Config{
		Issuers: []identity.Issuer{{
			URL: issuer, User: true, Agent: true, Audience: audience, Algorithms: []string{"ES256"}, JWKSFile: filepath.Join(f.dir, "jwks.json"),
		}},
		Now: time.Now, Logger: log,
	})
	f.must(err)

	f.url = storetest.URL(t, migrate)
	f.store, err = sqlstore.Open(ctx, sqlstore.Config{URL: f.url, Root: sqlstore.RootKey{1}, Logger: log})
	f.must(err)
	t.Cleanup(func() { f.must(f.store.Close()) })

	f.must(os.Mkdir(filepath.Join(f.dir, "policies"), 0o700))
	f.write("policies/writ.rego", rego)
	engine, err := policy.New(policy.Config{
		Path: filepath.Join(f.dir, "policies"), Query: "data.writ.decision", Deadline: 2 * time.Second,
		Record: func(context.Context, policy.Version, error) error { return nil }, Metrics: metrics, Logger: log,
	})
	f.must(err)
	f.must(engine.Load(ctx))

	providers := map[string]approval.Provider{issuer: f.phone}
	approvals := approval.NewEngine(approval.Config{
		Store: sqlstore.For[approval.Tx](f.store), Providers: providers, UseWithin: time.Minute, Metrics: metrics, Logger: log,
	})
	keeper, err := audit.NewKeeper([]byte("digest key"), nil)
	f.must(err)
	cfg := decision.Config{
		Identity: verifier, Policy: engine, Store: sqlstore.For[decision.Tx](f.store), Approvals: approvals, Providers: providers,
		Minters:  map[string]lease.Minter{"m": f.minter},
		Sessions: session.Settings{DefaultAge: time.Hour, MaxAge: time.Hour}, OpenOnDecide: true,
		PromptLife: time.Minute, MaxPending: 3, Keeper: keeper, Metrics: metrics, Logger: log,
	}
	if change != nil {
		change(&cfg)
	}
	f.cfg = cfg
	f.Decider = decision.New(cfg)

	running, stop := context.WithCancel(ctx)
	done := make(chan error)
	go func() { done <- approvals.Run(running) }()
	t.Cleanup(func() { stop(); f.must(<-done) })
	return f
}

// replica is another Decider over the same state, as another process has it.
func (f *fixture) replica() *decision.Decider {
	f.t.Helper()
	store, err := sqlstore.Open(context.Background(), sqlstore.Config{URL: f.url, Root: sqlstore.RootKey{1}, Logger: slog.New(slog.DiscardHandler)})
	f.must(err)
	f.t.Cleanup(func() { f.must(store.Close()) })
	cfg := f.cfg
	cfg.Store = sqlstore.For[decision.Tx](store)
	return decision.New(cfg)
}

func (f *fixture) must(err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) write(name, text string) {
	f.t.Helper()
	f.must(os.WriteFile(filepath.Join(f.dir, name), []byte(text), 0o600))
}

// token names user and agent; user "" makes the agent's own token.
func (f *fixture) token(user, agent string) string {
	f.t.Helper()
	if user == "" {
		user = agent
	}
	now := time.Now().Unix()
	payload, err := json.Marshal(map[string]any{
		"iss": issuer, "aud": audience, "sub": user, "client_id": agent, "jti": fmt.Sprint(now), "iat": now, "exp": now + 600,
	})
	f.must(err)
	jws, err := f.signer.Sign(payload)
	f.must(err)
	text, err := jws.CompactSerialize()
	f.must(err)
	return text
}

// request is alice's agent doing something.
func (f *fixture) request(action string) decision.Request {
	return decision.Request{
		Presented: identity.Presented{Token: f.token("alice", "agent")}, Intent: intent.Intent{Action: action},
		Resource: intent.Resource{Type: "thing", ID: "1"},
	}
}

func (f *fixture) decide(r decision.Request) decision.Answer {
	f.t.Helper()
	a, err := f.Decide(context.Background(), r)
	f.must(err)
	return a
}

// open opens a session of alice's and returns its id.
func (f *fixture) open() string {
	f.t.Helper()
	m := session.Manager{Store: sqlstore.For[session.Tx](f.store), Settings: session.Settings{DefaultAge: time.Hour, MaxAge: time.Hour}}
	s, err := m.Open(context.Background(), identity.Caller{
		Agent: identity.Principal{Ref: identity.Ref{Issuer: issuer, ID: "agent"}},
		User:  &identity.Principal{Ref: identity.Ref{Issuer: issuer, ID: "alice"}, Claims: map[string]any{"sub": "alice"}},
	}, session.Spec{})
	f.must(err)
	return s.ID
}

func (f *fixture) session(id string) (s session.Session) {
	f.t.Helper()
	f.must(f.store.View(context.Background(), func(tx *sqlstore.Tx) (err error) {
		s, err = tx.Session(context.Background(), id)
		return err
	}))
	return s
}

// entries counts audit entries by kind.
func (f *fixture) entries() map[audit.Kind]int {
	f.t.Helper()
	n := map[audit.Kind]int{}
	f.must(f.store.View(context.Background(), func(tx *sqlstore.Tx) error {
		all, err := tx.Unsequenced(context.Background(), 100_000)
		for _, e := range all {
			n[e.Kind]++
		}
		return err
	}))
	return n
}

// sql runs a statement beside Writ, as a broken disk or an administrator would.
func (f *fixture) sql(statement string) {
	f.t.Helper()
	storetest.Exec(f.t, f.url, statement)
}

// fakeMinter mints nothing of value; Mint fails while fail is set.
type fakeMinter struct {
	fail   atomic.Bool
	minted atomic.Int64
	refuse *lease.Refusal
}

func (m *fakeMinter) Plan(w lease.Want) (lease.Grant, *lease.Refusal) {
	return lease.Grant{Minter: "m", Kind: "fake", Scope: w.Scope, TTL: w.TTL, Revocability: "instant", Precision: "exact"}, m.refuse
}

func (m *fakeMinter) Mint(context.Context, lease.Order) (lease.Made, error) {
	if m.fail.Load() {
		return lease.Made{}, errors.New("the target is down")
	}
	return lease.Made{Secret: lease.Secret{"password": fmt.Sprint("secret-", m.minted.Add(1))}}, nil
}

// fakePhone answers every prompt as told, at the first poll.
type fakePhone struct {
	approval.Provider
	asked  atomic.Int64
	answer atomic.Int64 // a PollOutcome; the zero value is PollPending
}

func (p *fakePhone) Limits() approval.Limits                   { return approval.Limits{MaxLength: 200} }
func (p *fakePhone) Hint(u identity.Principal) (string, error) { return u.ID, nil }
func (p *fakePhone) Timeout() time.Duration                    { return time.Second }
func (p *fakePhone) Discard(context.Context, []byte)           {}

func (p *fakePhone) Start(context.Context, approval.StartRequest) approval.StartResult {
	p.asked.Add(1)
	return approval.StartResult{Outcome: approval.Started, AuthReqID: "id", ExpiresIn: time.Minute, Interval: time.Second}
}

func (p *fakePhone) Poll(context.Context, string) approval.PollResult {
	return approval.PollResult{Outcome: approval.PollOutcome(p.answer.Load()), Answer: []byte("yes")}
}

func (p *fakePhone) Verify(context.Context, []byte, approval.Expectation) (approval.Evidence, error) {
	return approval.Evidence{ACR: "phr"}, nil
}

func (f *fixture) status(approvalID string) (status string) {
	f.t.Helper()
	f.must(f.store.View(context.Background(), func(tx *sqlstore.Tx) error {
		a, err := tx.Approval(context.Background(), approvalID)
		status = a.Status()
		return err
	}))
	return status
}

// migrate fills the template that each test's database is cloned from.
func migrate(ctx context.Context, url string) error {
	s, err := sqlstore.Open(ctx, sqlstore.Config{URL: url, Root: sqlstore.RootKey{1}, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	return s.Close()
}
