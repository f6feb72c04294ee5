package minter_test

import (
	"encoding/json"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/minter"
	"github.com/writsec/writ/test/idp"
)

// provider is a real OpenID provider, and what it says of a token.
type provider struct {
	*idp.IdP
	keys *minter.Keys
}

func startProvider(t *testing.T) *provider {
	t.Helper()
	keys := newKeys(t)
	return &provider{idp.Start(t, idp.Config{Exchange: &idp.Exchange{
		Audience: "https://crm.example", Scope: "crm.read crm.write", TTL: 60, JWKS: keys.JWKS(),
	}}), keys}
}

func (p *provider) minter(change ...func(*minter.OAuth)) *minter.OAuth {
	m := &minter.OAuth{
		Name: "crm", MaxTTL: 10 * time.Minute, Grant: minter.TokenExchange, Issuer: p.Issuer, SubjectType: typeAccess, RequestedType: typeAccess,
		Client: minter.OAuthClient{ID: idp.Writ, Auth: "client_secret_basic", Secret: func() (string, error) { return p.Clients[idp.Writ], nil }},
		Scopes: []string{"crm.read", "crm.admin"}, Audience: "https://crm.example", TokenTTL: time.Minute,
		Revocation: &minter.OAuthRevocation{TakesEffect: lease.RevocableInstant}, Introspection: p.Issuer + "/token/introspection",
		Keys: p.keys, HTTP: identity.NewHTTPClient(5 * time.Second), Now: time.Now,
	}
	for _, f := range change {
		f(m)
	}
	return m
}

func (p *provider) order(t *testing.T, m *minter.OAuth, scope ...any) lease.Order {
	t.Helper()
	g, refusal := m.Plan(lease.Want{Scope: scopes(scope...), TTL: 2 * time.Minute, SubjectToken: true})
	if refusal != nil {
		t.Fatalf("plan: %+v", refusal)
	}
	token, _, err := p.UserToken(t.Context(), "alice", idp.SalesAgent)
	if err != nil {
		t.Fatal(err)
	}
	_, act := granted(time.Now())
	act.User, act.Agent = identity.Ref{Issuer: p.Issuer, ID: "alice"}, identity.Ref{Issuer: p.Issuer, ID: idp.SalesAgent}
	l := lease.New(g, "ses_1", time.Now().Add(time.Hour), "dec_1", "rev_1", act, "sha256:ab", time.Now())
	l.MintDeadline = time.Now().Add(10 * time.Second)
	return lease.Order{Lease: l, Act: act, SubjectToken: token}
}

// introspect asks as the resource server would.
func (p *provider) introspect(t *testing.T, token string) map[string]any {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, p.Issuer+"/token/introspection", strings.NewReader(url.Values{"token": {token}}.Encode()))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.SetBasicAuth(idp.HRAgent, p.Clients[idp.HRAgent])
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	var out map[string]any
	if err := json.NewDecoder(res.Body).Decode(&out); err != nil {
		t.Fatal(err)
	}
	return out
}

// The whole life of a token at a provider that knows nothing of Writ's code: exchange,
// use, end, and the end once more.
func TestOAuthAtARealProvider(t *testing.T) {
	t.Parallel()
	p := startProvider(t)
	actor := func(m *minter.OAuth) {
		m.Actor = &minter.OAuthActor{Type: "urn:ietf:params:oauth:token-type:jwt", Assertion: &minter.OAuthAssertion{
			Issuer: issuer, Subject: "{agent}", Audience: p.Issuer, TTL: time.Minute,
		}}
	}
	for name, change := range map[string]func(*minter.OAuth){
		"basic": func(*minter.OAuth) {},
		"key": func(m *minter.OAuth) {
			m.Client = minter.OAuthClient{ID: idp.WritKey, Auth: "private_key_jwt", Audience: p.Issuer}
		},
		"actor": actor,
	} {
		t.Run(name, func(t *testing.T) {
			m := p.minter(change)
			o := p.order(t, m, "crm.read")
			made, err := m.Mint(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			token := made.Secret["token"]
			seen := p.introspect(t, token)
			if seen["active"] != true || seen["sub"] != "alice" || seen["aud"] != "https://crm.example" || seen["scope"] != "crm.read" {
				t.Errorf("introspected %v", seen)
			}
			act, _ := seen["act"].(map[string]any)
			if (act["sub"] == idp.SalesAgent) != (name == "actor") {
				t.Errorf("act %v", act)
			}
			o.Lease.Recall = made.Recall
			for range 2 {
				out, err := m.Unmake(t.Context(), []lease.Lease{o.Lease})
				if err != nil || out[0].Err != nil || out[0].Seen["end"] != "introspected" {
					t.Fatalf("unmade %+v, %v", out, err)
				}
				if seen := p.introspect(t, token); seen["active"] != false {
					t.Errorf("introspected %v", seen)
				}
			}
		})
	}
}

// What a real provider refuses is an error with its code, and no credential.
func TestOAuthRefusedByARealProvider(t *testing.T) {
	t.Parallel()
	p := startProvider(t)
	for name, c := range map[string]struct {
		change func(*minter.OAuth)
		scope  string
		token  func(*lease.Order)
		want   string
	}{
		"another audience": {change: func(m *minter.OAuth) { m.Audience = "https://other.example" }, want: "invalid_target"},
		"too much":         {scope: "crm.admin", want: "invalid_scope"},
		"a wrong secret":   {change: func(m *minter.OAuth) { m.Client.Secret = func() (string, error) { return "wrong", nil } }, want: "invalid_client"},
		"a client that may not": {change: func(m *minter.OAuth) {
			m.Client.ID, m.Client.Secret = idp.HRAgent, func() (string, error) { return p.Clients[idp.HRAgent], nil }
		}, want: "invalid_request"},
		"a key that is not the client's": {change: func(m *minter.OAuth) {
			m.Keys, m.Client = newKeys(t), minter.OAuthClient{ID: idp.WritKey, Auth: "private_key_jwt", Audience: p.Issuer}
		}, want: "invalid_client"},
		"a forged token": {token: func(o *lease.Order) { o.SubjectToken = userToken(t, p.Issuer) }, want: "invalid_grant"},
	} {
		m := p.minter()
		if c.change != nil {
			c.change(m)
		}
		if c.scope == "" {
			c.scope = "crm.read"
		}
		o := p.order(t, m, c.scope)
		if c.token != nil {
			c.token(&o)
		}
		made, err := m.Mint(t.Context(), o)
		if err == nil || made.Secret != nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %s", name, err, c.want)
		}
	}
}

// Faults of the line: no token twice, none that is given out unseen, and an end that
// is tried until it is seen.
func TestFault14FaultsOfARealProvider(t *testing.T) {
	t.Parallel()
	p := startProvider(t)
	m := p.minter()
	fault := func(f idp.Fault) {
		t.Helper()
		if err := p.Fault(t.Context(), f); err != nil {
			t.Fatal(err)
		}
	}
	hits := func(e idp.Endpoint) int {
		t.Helper()
		h, err := p.Hits(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return h[e]
	}
	o := p.order(t, m, "crm.read")
	for _, kind := range []idp.FaultKind{idp.FaultLostReply, idp.FaultStatus, idp.FaultDrop, idp.FaultHTML, idp.FaultBig, idp.FaultRedirect} {
		before := hits(idp.TokenEndpoint)
		fault(idp.Fault{Endpoint: idp.TokenEndpoint, Kind: kind})
		if made, err := m.Mint(t.Context(), o); err == nil || made.Secret != nil {
			t.Errorf("%s: minted", kind)
		}
		if asked := hits(idp.TokenEndpoint) - before; asked != 1 {
			t.Errorf("%s: asked %d times", kind, asked)
		}
	}
	made, err := m.Mint(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	o.Lease.Recall = made.Recall
	for _, f := range []idp.Fault{
		{Endpoint: idp.RevocationEndpoint, Kind: idp.FaultStatus, Status: 500},
		{Endpoint: idp.RevocationEndpoint, Kind: idp.FaultStatus, Status: 404}, // nothing was revoked, and introspection tells
		{Endpoint: idp.RevocationEndpoint, Kind: idp.FaultDrop},
		{Endpoint: idp.RevocationEndpoint, Kind: idp.FaultHTML},
		{Endpoint: idp.RevocationEndpoint, Kind: idp.FaultRedirect},
		{Endpoint: idp.IntrospectionEndpoint, Kind: idp.FaultStatus},
	} {
		fault(f)
		if got := unmake(t, m, o.Lease); got.Err == nil {
			t.Errorf("%s of %s: %+v", f.Kind, f.Endpoint, got)
		}
	}
	// The last of these did revoke it: what is unknown by now has ended, since it is seen.
	out, err := m.Unmake(t.Context(), []lease.Lease{o.Lease})
	if err != nil || out[0].Err != nil || p.introspect(t, made.Secret["token"])["active"] != false {
		t.Errorf("%+v, %v", out, err)
	}
	if trapped, err := p.Trapped(t.Context()); err != nil || len(trapped) > 0 {
		t.Errorf("a redirect was followed: %d calls, %v", len(trapped), err)
	}
}
