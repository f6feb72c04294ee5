package server_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"

	"github.com/writsec/writ/internal/config"
	"github.com/writsec/writ/internal/httpapi"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/intent"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/minter"
	"github.com/writsec/writ/internal/server"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/telemetry"
)

// targetsBase is what the examples of docs/targets.md stand in.
const targetsBase = `external_url: https://writ.example.com
store: sqlite:writ.db
root_key_file: root.key
policy:
  path: policies
issuers:
  - issuer: https://idp.example.com
    speaks_for: [user, agent]
    audience: https://writ.example.com
    algorithms: [ES256]
services:
  - id: crm-api
    secret_file: secrets/crm-api
    audience: https://own.example.com
`

// targetsDoc is docs/targets.md as it is configured: every example loaded by itself,
// through the reader that serve uses.
func targetsDoc(t *testing.T) map[string]config.Minter {
	t.Helper()
	doc, err := os.ReadFile("../../docs/targets.md")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]config.Minter{}
	for _, m := range regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllStringSubmatch(string(doc), -1) {
		dir := t.TempDir()
		text := targetsBase + m[1]
		files := regexp.MustCompile(`(?m)_file: ([^ \n]+)`).FindAllStringSubmatch(text, -1)
		for _, f := range files {
			content := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{7}, 32)) + "\n"
			if strings.HasSuffix(f[1], ".pem") {
				content = rsaPEM(t)
			}
			path := filepath.Join(dir, f[1])
			if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(content), 0o600)); err != nil {
				t.Fatal(err)
			}
		}
		path := filepath.Join(dir, "writ.yaml")
		if err := errors.Join(os.Mkdir(filepath.Join(dir, "policies"), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
		cfg, err := config.Load(path)
		if err != nil {
			t.Fatalf("%s\n%v", m[1], err)
		}
		for name, one := range cfg.Minters {
			if _, twice := out[name]; twice {
				t.Errorf("the minter %s stands twice", name)
			}
			out[name] = one
		}
	}
	return out
}

func rsaPEM(t *testing.T) string {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}))
}

// call is one request to a target.
type call struct {
	url, kind     string
	beta          string // anthropic-beta
	user, secret  string // Basic
	authorization bool
	form          map[string]string
}

// world carries calls to whoever they are for: Writ's own pages, the identity provider's
// metadata, or the target. Nothing leaves the process.
type world struct {
	t      *testing.T
	writ   http.Handler
	keys   *minter.Keys
	target func(call) (status int, answer any)
	calls  []call
}

func newWorld(t *testing.T) *world {
	t.Helper()
	store, err := sqlstore.Open(t.Context(), sqlstore.Config{
		URL: "sqlite:" + filepath.Join(t.TempDir(), "writ.db"), Now: time.Now, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = store.Close() })
	keys, err := minter.LoadKeys(t.Context(), store, minter.Rotation{Algorithm: "ES256"})
	if err != nil {
		t.Fatal(err)
	}
	return &world{t: t, keys: keys, writ: httpapi.New(httpapi.Config{
		Keys: keys, ExternalURL: "https://writ.example.com", Metrics: telemetry.NewMetrics(), Logger: slog.New(slog.DiscardHandler),
	})}
}

func (w *world) RoundTrip(r *http.Request) (*http.Response, error) {
	rec := httptest.NewRecorder()
	r.Header.Del("Traceparent")
	switch {
	case r.URL.Host == "writ.example.com":
		w.writ.ServeHTTP(rec, r)
	case r.URL.String() == "https://idp.example.com/.well-known/openid-configuration":
		rec.Header().Set("Content-Type", "application/json")
		_, _ = rec.WriteString(`{"issuer":"https://idp.example.com","token_endpoint":"https://idp.example.com/token","revocation_endpoint":"https://idp.example.com/revoke"}`)
	default:
		c := w.read(r)
		w.calls = append(w.calls, c)
		status, answer := w.target(c)
		rec.Header().Set("Content-Type", "application/json; charset=utf-8")
		rec.WriteHeader(status)
		if answer != nil {
			_ = json.NewEncoder(rec).Encode(answer)
		}
	}
	return rec.Result(), nil
}

func (w *world) read(r *http.Request) call {
	c := call{url: r.URL.String(), kind: r.Header.Get("Content-Type"), beta: r.Header.Get("Anthropic-Beta"), form: map[string]string{}, authorization: r.Header.Get("Authorization") != ""}
	if r.Method != http.MethodPost {
		w.t.Errorf("%s %s", r.Method, r.URL)
	}
	c.user, c.secret, _ = r.BasicAuth()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	if c.kind == "application/json" {
		if err := json.Unmarshal(body, &c.form); err != nil {
			w.t.Errorf("body %s: %v", body, err)
		}
		return c
	}
	form, err := url.ParseQuery(string(body))
	if err != nil {
		w.t.Errorf("body %s: %v", body, err)
	}
	for name, v := range form {
		if len(v) != 1 {
			w.t.Errorf("%s is there %d times", name, len(v))
		}
		c.form[name] = v[0]
	}
	return c
}

// assertion verifies what Writ signed as a target would, that knows of Writ its URL
// alone, and returns the claims.
func (w *world) assertion(raw, audience string) map[string]any {
	w.t.Helper()
	ctx := oidc.ClientContext(w.t.Context(), &http.Client{Transport: w})
	provider, err := oidc.NewProvider(ctx, "https://writ.example.com")
	if err != nil {
		w.t.Fatal(err)
	}
	token, err := provider.Verifier(&oidc.Config{ClientID: audience}).Verify(ctx, raw)
	if err != nil {
		w.t.Fatalf("the assertion: %v", err)
	}
	var claims map[string]any
	if err := token.Claims(&claims); err != nil {
		w.t.Fatal(err)
	}
	parsed, err := jose.ParseSignedCompact(raw, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		w.t.Fatal(err)
	}
	if h := parsed.Signatures[0].Header; h.KeyID == "" || h.ExtraHeaders["typ"] != "JWT" {
		w.t.Errorf("header %+v", h)
	}
	return claims
}

// userToken is one of alice's, of an issuer.
func userToken(t *testing.T, issuer string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return signed(t, jose.JSONWebKey{Key: key}, map[string]any{"iss": issuer, "sub": "alice"})
}

const theToken = "the-token-of-the-target"

var act = intent.Act{
	User: identity.Ref{Issuer: "https://idp.example.com", ID: "alice"}, Agent: identity.Ref{Issuer: "https://idp.example.com", ID: "crm-agent"},
	Session: "ses_1", Intent: intent.Intent{Action: "crm.read", Parameters: map[string]any{"quarter": "Q3"}},
	Resource: intent.Resource{Type: "crm", ID: "pipeline"},
}

func order(t *testing.T, m *minter.OAuth, w lease.Want) lease.Order {
	t.Helper()
	g, refusal := m.Plan(w)
	if refusal != nil {
		t.Fatalf("plan: %+v", refusal)
	}
	if !g.Outside || g.Kind != "oauth" || g.Minter != m.Name {
		t.Errorf("grant %+v", g)
	}
	now := time.Now()
	l := lease.New(g, "ses_1", now.Add(time.Hour), "dec_1", "rev_1", act, "sha256:ab", now)
	l.MintDeadline = now.Add(10 * time.Second)
	return lease.Order{Lease: l, Act: act, SubjectToken: userToken(t, "https://idp.example.com")}
}

// contract is what a target documents.
type contract struct {
	url     string
	kind    string
	basic   bool
	form    map[string]string // but for what is signed
	signed  string            // the parameter that is
	claims  map[string]any    // but for times
	life    time.Duration     // of the assertion, at most
	answer  map[string]any
	scope   map[string]any
	secret  lease.Secret // but for token, token_type and expires_at
	noEnd   bool         // the answer has no expires_in
	reaches string       // revocability
	exact   bool
}

const (
	exchangeGrant = "urn:ietf:params:oauth:grant-type:token-exchange"
	bearerGrant   = "urn:ietf:params:oauth:grant-type:jwt-bearer"
	typeAccess    = "urn:ietf:params:oauth:token-type:access_token"
	typeJWT       = "urn:ietf:params:oauth:token-type:jwt"
	formKind      = "application/x-www-form-urlencoded"
)

func scopesOf(s ...any) map[string]any { return map[string]any{"scopes": s} }

// TestTargets holds each example to what its target documents: docs/targets.md says
// where that was read.
func TestTargets(t *testing.T) {
	doc := targetsDoc(t)
	agent := map[string]any{"iss": "https://idp.example.com", "sub": "crm-agent"}
	said := func(sub, aud string, more map[string]any) map[string]any {
		c := map[string]any{"iss": "https://writ.example.com", "sub": sub, "aud": aud, "sid": "ses_1", "act": agent}
		maps.Copy(c, more)
		return c
	}
	issued := func(seconds int, scope string) map[string]any {
		a := map[string]any{"access_token": theToken, "issued_token_type": typeAccess, "token_type": "Bearer", "expires_in": seconds}
		if scope != "" {
			a["scope"] = scope
		}
		return a
	}
	exchange := func(form map[string]string) map[string]string {
		form["grant_type"], form["subject_token_type"] = exchangeGrant, typeAccess
		return form
	}
	contracts := map[string]contract{
		"openai": {
			url: "https://auth.openai.com/oauth/token", kind: "application/json", signed: "subject_token",
			form: map[string]string{
				"grant_type": exchangeGrant, "subject_token_type": typeJWT, "identity_provider_id": "idp_EXAMPLE", "service_account_id": "svc_acct_EXAMPLE",
			},
			claims: said("agent:crm-agent", "https://api.openai.com/v1", nil), life: 5 * time.Minute,
			answer: issued(290, "api.model.request"), secret: lease.Secret{"scope": "api.model.request"}, reaches: "expiry",
		},
		"anthropic": {
			url: "https://api.anthropic.com/v1/oauth/token", kind: "application/json", signed: "assertion",
			form: map[string]string{
				"grant_type": bearerGrant, "federation_rule_id": "fdrl_EXAMPLE", "organization_id": "00000000-0000-0000-0000-000000000000",
				"service_account_id": "svac_EXAMPLE", "workspace_id": "wrkspc_EXAMPLE",
			},
			claims: said("agent:crm-agent", "https://api.anthropic.com", map[string]any{"team": "sales"}), life: time.Minute,
			answer:  map[string]any{"access_token": theToken, "token_type": "Bearer", "expires_in": 300, "scope": "workspace:inference"},
			secret:  lease.Secret{"scope": "workspace:inference"},
			reaches: "expiry",
		},
		"openrouter": {
			url: "https://openrouter.ai/api/v1/oauth/token", kind: formKind, signed: "subject_token",
			form: map[string]string{
				"grant_type": exchangeGrant, "subject_token_type": typeJWT, "requested_token_type": typeAccess, "scope": "inference",
				"federation_policy_id": "00000000-0000-4000-8000-000000000000",
			},
			claims: said("agent:crm-agent", "https://openrouter.ai", nil), life: 5 * time.Minute, scope: scopesOf("inference"),
			answer: issued(290, "inference"), secret: lease.Secret{"scope": "inference"}, reaches: "expiry",
		},
		"salesforce": {
			url: "https://acme.my.salesforce.com/services/oauth2/token", kind: formKind, signed: "assertion",
			form: map[string]string{"grant_type": bearerGrant},
			answer: map[string]any{
				"access_token": theToken, "scope": "api", "instance_url": "https://acme.my.salesforce.com",
				"id": "https://login.salesforce.com/id/00D/005", "token_type": "Bearer",
			},
			secret: lease.Secret{"scope": "api", "instance_url": "https://acme.my.salesforce.com"}, noEnd: true, reaches: "instant",
		},
		"crm-idp": {
			url: "https://idp.example.com/token", kind: formKind, basic: true, scope: scopesOf("crm:read"),
			form:   exchange(map[string]string{"requested_token_type": typeAccess, "audience": "https://crm.example.com", "scope": "crm:read"}),
			answer: issued(300, "crm:read"), secret: lease.Secret{"scope": "crm:read"}, reaches: "instant",
		},
		"crm-key": {
			url: "https://idp.example.com/token", kind: formKind, scope: scopesOf("crm:read"),
			form:   exchange(map[string]string{"audience": "https://crm.example.com", "scope": "crm:read", "actor_token_type": typeJWT, "client_id": "writ-exchange"}),
			answer: issued(300, ""), reaches: "expiry",
		},
		"crm-keycloak": {
			url: "https://idp.example.com/token", kind: formKind, basic: true, scope: scopesOf("crm-read"),
			form:   exchange(map[string]string{"requested_token_type": typeAccess, "audience": "crm", "scope": "crm-read"}),
			answer: issued(300, "profile email crm-read"), secret: lease.Secret{"scope": "profile email crm-read"}, reaches: "expiry",
		},
		"crm-okta": {
			url: "https://idp.example.com/token", kind: formKind, basic: true, scope: scopesOf("api:access:read"),
			form:   exchange(map[string]string{"audience": "com.example.crm", "scope": "api:access:read"}),
			answer: issued(300, "api:access:read"), secret: lease.Secret{"scope": "api:access:read"}, reaches: "expiry",
		},
		"crm-auth0": {
			url: "https://idp.example.com/token", kind: formKind, scope: scopesOf("read:crm"),
			form: exchange(map[string]string{
				"audience": "https://crm.example.com", "scope": "read:crm", "requested_token_type": typeAccess, "client_id": "EXAMPLE",
				"client_secret": base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{7}, 32)),
			}),
			answer: issued(600, ""), reaches: "expiry",
		},
		"partner": {
			url: "https://as.partner.example/token", kind: formKind, signed: "assertion", scope: scopesOf("orders.read"), exact: true,
			form: map[string]string{
				"grant_type": bearerGrant, "resource": "https://api.partner.example", "scope": "orders.read", "client_id": "writ",
				"client_secret":         base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{7}, 32)),
				"authorization_details": `[{"type":"writ_intent","actions":["crm.read"],"identifier":"pipeline","resource":{"type":"crm","id":"pipeline"},"parameters":{"quarter":"Q3"},"intent_hash":"sha256:ab"}]`,
			},
			claims: said("https%3A%2F%2Fidp.example.com#alice", "https://as.partner.example", nil), life: time.Minute,
			answer: map[string]any{
				"access_token": theToken, "token_type": "bearer", "expires_in": 300,
				"authorization_details": []any{map[string]any{
					"type": "writ_intent", "actions": []any{"crm.read"}, "identifier": "pipeline", "intent_hash": "sha256:ab", "parameters": map[string]any{"quarter": "Q3"},
				}},
			},
			reaches: "introspect",
		},
	}
	if d := cmp.Diff(slices.Sorted(maps.Keys(contracts)), slices.Sorted(maps.Keys(doc))); d != "" {
		t.Errorf("contracts (-) and examples (+) differ:\n%s", d)
	}
	for name, c := range contracts {
		t.Run(name, func(t *testing.T) { c.hold(t, name, doc[name]) })
	}
}

func (c contract) hold(t *testing.T, name string, example config.Minter) {
	w := newWorld(t)
	m := server.NewOAuth(name, example, "https://writ.example.com", w.keys, time.Now)
	m.HTTP.Transport = w
	ttl := min(example.MaxTTL, 5*time.Minute)
	if example.OAuth.TokenTTL > 0 {
		ttl = example.MaxTTL
	}
	o := order(t, m, lease.Want{Scope: c.scope, TTL: ttl, SubjectToken: true})
	if o.Lease.Revocability != c.reaches || (o.Lease.Precision == "exact") != c.exact {
		t.Errorf("%s, %s", o.Lease.Revocability, o.Lease.Precision)
	}
	w.target = func(call) (int, any) { return http.StatusOK, c.answer }
	made, err := m.Mint(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if len(w.calls) != 1 {
		t.Fatalf("%d requests", len(w.calls))
	}
	got := w.calls[0]
	if got.url != c.url || got.kind != c.kind || got.authorization != c.basic {
		t.Errorf("%s %s, authorization %v", got.url, got.kind, got.authorization)
	}
	if want := example.OAuth.Headers["anthropic-beta"]; got.beta != want || (want != "") != (name == "anthropic") {
		t.Errorf("anthropic-beta %q, want %q", got.beta, want)
	}
	if c.basic && (got.user == "" || got.secret != url.QueryEscape(base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{7}, 32)))) {
		t.Errorf("basic %s", got.user)
	}
	c.checkTokens(t, w, o, got, example)
	for _, signed := range []string{"subject_token", "assertion", "actor_token", "client_assertion", "client_assertion_type"} {
		delete(got.form, signed)
	}
	if d := cmp.Diff(c.form, got.form); d != "" {
		t.Errorf("form (-want +got):\n%s", d)
	}

	want := lease.Secret{"token": theToken, "token_type": "Bearer"}
	maps.Copy(want, c.secret)
	end, told := made.Secret["expires_at"]
	if told == c.noEnd {
		t.Errorf("expires_at %q", end)
	}
	delete(made.Secret, "expires_at")
	if d := cmp.Diff(map[string]string(want), map[string]string(made.Secret)); d != "" {
		t.Errorf("secret (-want +got):\n%s", d)
	}
	if told {
		if at, err := time.Parse(time.RFC3339, end); err != nil || c.reaches != "instant" && at.After(o.Lease.ExpiresAt) {
			t.Errorf("the token ends at %s, its lease at %v", end, o.Lease.ExpiresAt)
		}
	}
	if strings.Contains(made.Recall, theToken) != (example.OAuth.Revocation != nil) {
		t.Error("a token is kept exactly where it can be revoked")
	}
}

func (c contract) checkTokens(t *testing.T, w *world, o lease.Order, got call, example config.Minter) {
	t.Helper()
	a := example.OAuth.Assertion
	switch {
	case a == nil:
		if got.form["subject_token"] != o.SubjectToken {
			t.Error("the subject token is not the request's")
		}
	case a.KeyFile != "":
		checkSalesforce(t, got.form["assertion"], a.KeyFile)
	default:
		claims := w.assertion(got.form[c.signed], a.Audience)
		iat, _ := claims["iat"].(float64)
		exp, _ := claims["exp"].(float64)
		if life := time.Duration(exp-iat) * time.Second; life <= 0 || life > c.life || time.Unix(int64(exp), 0).After(o.Lease.ExpiresAt) {
			t.Errorf("the assertion lives %v", life)
		}
		if claims["jti"] != o.Lease.ID {
			t.Errorf("jti %v", claims["jti"])
		}
		for _, name := range []string{"iat", "exp", "jti"} {
			delete(claims, name)
		}
		if d := cmp.Diff(c.claims, claims); d != "" {
			t.Errorf("claims (-want +got):\n%s", d)
		}
	}
	if example.OAuth.Actor != nil {
		if actor := w.assertion(got.form["actor_token"], "https://idp.example.com"); actor["sub"] != "crm-agent" || actor["act"] != nil {
			t.Errorf("actor %v", actor)
		}
	}
	if example.OAuth.Client.Auth == "private_key_jwt" {
		// It is its own issuer (RFC 7523 §3), so it is verified by the keys alone.
		raw := got.form["client_assertion"]
		var proof map[string]any
		payload, err := verifiedBy(w.keys.JWKS(), raw)
		if err != nil || json.Unmarshal(payload, &proof) != nil {
			t.Fatal(err)
		}
		if proof["iss"] != "writ-exchange" || proof["sub"] != "writ-exchange" || proof["aud"] != "https://idp.example.com" || proof["jti"] == "" {
			t.Errorf("client_assertion %v", proof)
		}
		if got.form["client_assertion_type"] != "urn:ietf:params:oauth:client-assertion-type:jwt-bearer" {
			t.Error("client_assertion_type")
		}
	}
}

func verifiedBy(keys jose.JSONWebKeySet, raw string) ([]byte, error) {
	parsed, err := jose.ParseSignedCompact(raw, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return nil, err
	}
	return parsed.Verify(keys)
}

// Salesforce verifies by the certificate that was uploaded, RS256 only.
func checkSalesforce(t *testing.T, raw, keyFile string) {
	t.Helper()
	data, err := os.ReadFile(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(data)
	key, err := x509.ParsePKCS1PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := jose.ParseSignedCompact(raw, []jose.SignatureAlgorithm{jose.RS256})
	if err != nil {
		t.Fatal(err)
	}
	payload, err := parsed.Verify(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	var claims struct {
		Issuer   string `json:"iss"`
		Subject  string `json:"sub"`
		Audience string `json:"aud"`
		Expires  int64  `json:"exp"`
	}
	if err := json.Unmarshal(payload, &claims); err != nil {
		t.Fatal(err)
	}
	if claims.Issuer != "3MVG9EXAMPLE" || claims.Subject != "alice" || claims.Audience != "https://login.salesforce.com" ||
		time.Until(time.Unix(claims.Expires, 0)) > 3*time.Minute {
		t.Errorf("claims %+v", claims)
	}
}

// Salesforce's end of a token, and what it answers when asked again.
func TestSalesforceRevocation(t *testing.T) {
	w := newWorld(t)
	m := server.NewOAuth("salesforce", targetsDoc(t)["salesforce"], "https://writ.example.com", w.keys, time.Now)
	m.HTTP.Transport = w
	o := order(t, m, lease.Want{TTL: 5 * time.Minute})
	alive := true
	w.target = func(c call) (int, any) {
		switch {
		case c.url == "https://acme.my.salesforce.com/services/oauth2/token":
			return http.StatusOK, map[string]any{"access_token": theToken, "token_type": "Bearer", "instance_url": "https://acme.my.salesforce.com"}
		case c.url != "https://acme.my.salesforce.com/services/oauth2/revoke" || c.form["token"] != theToken:
			t.Errorf("%+v", c)
		case alive:
			alive = false
			return http.StatusOK, nil
		}
		return http.StatusBadRequest, map[string]any{"error": "invalid_token"}
	}
	made, err := m.Mint(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	o.Lease.Recall = made.Recall
	for i, want := range []bool{true, false} {
		ends, err := m.Unmake(t.Context(), []lease.Lease{o.Lease})
		if err != nil || len(ends) != 1 || (ends[0].Err == nil) != want {
			t.Errorf("revocation %d: %+v, %v", i, ends, err)
		}
	}
}

// An assertion of Writ's is no token for Writ, and none that Writ minted, whoever
// brings it wherever.
func TestAssertionsAreGoodForNothingAtWrit(t *testing.T) {
	w := newWorld(t)
	jwks, agentToken := issuerOf(t, w.keys)
	mintedBy(t, w.keys)
	cfg := newConfig(t)
	cfg.ExternalURL = "https://writ.example.com"
	cfg.Issuers = []config.Issuer{{
		Issuer: "https://idp.example.com", SpeaksFor: []config.Principal{config.User, config.Agent, config.Operator, config.ServicePrincipal},
		Token: "access_token", Audience: "https://writ.example.com", Algorithms: []string{"ES256"}, JWKSFile: jwks,
		Operator: &config.Operators{Claim: "sub", Value: "alice", Clients: []string{"x"}},
	}}
	store, err := sqlstore.Open(t.Context(), sqlstore.Config{URL: cfg.Store, Now: time.Now, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = store.Close() }()
	v, err := server.NewIdentity(t.Context(), cfg, store, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.Caller(t.Context(), identity.Presented{Token: agentToken}); err != nil {
		t.Fatalf("the agent's own token: %v", err)
	}
	now := time.Now()
	claims := map[string]any{
		"iss": "https://writ.example.com", "sub": "alice", "aud": "https://crm.example.com", "client_id": "crm-agent", "jti": "lea_1",
		"iat": now.Unix(), "exp": now.Add(time.Minute).Unix(), "sid": "ses_1", "scope": "crm.read",
	}
	// With the issuer's own keys, so that nothing but what it is can refuse it.
	for name, change := range map[string]func(map[string]any){
		"as Writ signs it":            func(map[string]any) {},
		"for Writ":                    func(c map[string]any) { c["aud"] = "https://writ.example.com" },
		"for Writ, of the issuer":     func(c map[string]any) { c["aud"], c["iss"] = "https://writ.example.com", "https://idp.example.com" },
		"for a target, of the issuer": func(c map[string]any) { c["aud"], c["iss"] = "https://api.anthropic.com", "https://idp.example.com" },
	} {
		c := maps.Clone(claims)
		change(c)
		raw, err := w.keys.Assert(c)
		if err != nil {
			t.Fatal(err)
		}
		bearer := identity.Presented{Token: raw}
		if got, err := v.Operator(t.Context(), bearer); err == nil {
			t.Errorf("%s: an operator, %+v", name, got)
		}
		if got, err := v.Service(t.Context(), bearer); err == nil {
			t.Errorf("%s: a service, %+v", name, got)
		}
		if got, err := v.Caller(t.Context(), bearer); err == nil {
			t.Errorf("%s: an agent, %+v", name, got)
		}
		if got, err := v.Caller(t.Context(), identity.Presented{Token: agentToken, Subject: raw}); err == nil {
			t.Errorf("%s: a subject, %+v", name, got)
		}
		for _, audience := range []string{"https://crm.example.com", "https://writ.example.com", "https://api.anthropic.com"} {
			if all, id, ok := w.keys.Claims(raw, audience); ok {
				t.Errorf("%s: introspection at %s believes %v of %s", name, audience, all, id)
			}
		}
	}
}

// mintedBy is an access token that Writ signs, which introspection does believe.
func mintedBy(t *testing.T, keys *minter.Keys) string {
	t.Helper()
	now := time.Now()
	m := &minter.JWT{Name: "crm", Issuer: "https://writ.example.com", Audience: "https://crm.example.com", Scopes: []string{"crm.read"}, MaxTTL: time.Minute, Keys: keys}
	made, err := m.Mint(t.Context(), lease.Order{Lease: lease.Lease{
		ID: "lea_1", User: act.User, Agent: act.Agent, Grant: lease.Grant{Scope: scopesOf("crm.read")}, CreatedAt: now, ExpiresAt: now.Add(time.Minute),
	}, Act: act})
	if err != nil {
		t.Fatal(err)
	}
	token := made.Secret["token"]
	if _, _, ok := keys.Claims(token, "https://crm.example.com"); !ok {
		t.Fatal("introspection does not know what Writ minted")
	}
	return token
}

// issuerOf is an issuer that publishes Writ's keys as its own, besides one that it
// signs an agent's token with.
func issuerOf(t *testing.T, keys *minter.Keys) (jwksFile, agentToken string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	set := keys.JWKS()
	set.Keys = append(slices.Clone(set.Keys), jose.JSONWebKey{Key: key.Public(), KeyID: "own", Algorithm: "ES256", Use: "sig"})
	data, err := json.Marshal(set)
	if err != nil {
		t.Fatal(err)
	}
	jwksFile = filepath.Join(t.TempDir(), "jwks.json")
	if err := os.WriteFile(jwksFile, data, 0o600); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	return jwksFile, signed(t, jose.JSONWebKey{Key: key, KeyID: "own"}, map[string]any{
		"iss": "https://idp.example.com", "aud": "https://writ.example.com", "sub": "crm-agent", "client_id": "crm-agent", "jti": "1",
		"iat": now.Unix(), "exp": now.Add(time.Minute).Unix(),
	})
}

// signed is an access token.
func signed(t *testing.T, key jose.JSONWebKey, claims map[string]any) string {
	t.Helper()
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, (&jose.SignerOptions{}).WithType("at+jwt"))
	if err != nil {
		t.Fatal(err)
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	sig, err := s.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := sig.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}
