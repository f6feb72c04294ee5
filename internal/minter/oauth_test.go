package minter_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"

	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/minter"
)

const (
	clientSecret = "the-secret-of-the-client"
	accessSecret = "the-access-token"
	typeAccess   = "urn:ietf:params:oauth:token-type:access_token"
)

// site is a target: an authorization server as the test wants it.
type site struct {
	*httptest.Server

	mu     sync.Mutex
	calls  []string // paths
	forms  []url.Values
	answer map[string]http.HandlerFunc // by path
	clock  time.Time
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{answer: map[string]http.HandlerFunc{}, clock: time.Now().Truncate(time.Second)}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = r.ParseForm()
		s.mu.Lock()
		s.calls, s.forms = append(s.calls, r.URL.Path), append(s.forms, r.PostForm)
		h := s.answer[r.URL.Path]
		s.mu.Unlock()
		if h == nil {
			h = http.NotFound
		}
		h(w, r)
	}))
	t.Cleanup(s.Close)
	s.answer["/.well-known/openid-configuration"] = says(200, fmt.Sprintf(`{"issuer":%q,"token_endpoint":"%s/token","revocation_endpoint":"%s/revoke"}`, s.URL, s.URL, s.URL))
	s.answer["/token"] = says(200, good(300))
	s.answer["/revoke"] = func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) }
	return s
}

// paths are the calls but for discovery.
func (s *site) paths() (out []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.calls {
		if !strings.HasPrefix(p, "/.well-known") {
			out = append(out, p)
		}
	}
	return out
}

func (s *site) now() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.clock
}

func (s *site) pass(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clock = s.clock.Add(d)
}

func says(status int, body string, header ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(status)
		_, _ = w.Write([]byte(body))
	}
}

func good(expires int) string {
	return fmt.Sprintf(`{"access_token":%q,"issued_token_type":%q,"token_type":"Bearer","expires_in":%d,"scope":"crm.read"}`, accessSecret, typeAccess, expires)
}

// exchanger exchanges users' tokens at the site, which revokes at once.
func (s *site) exchanger(change ...func(*minter.OAuth)) *minter.OAuth {
	m := &minter.OAuth{
		Name: "x", MaxTTL: 10 * time.Minute, Grant: minter.TokenExchange, Issuer: s.URL, SubjectType: typeAccess,
		Client: minter.OAuthClient{ID: "writ", Auth: "client_secret_basic", Secret: func() (string, error) { return clientSecret, nil }},
		Scopes: []string{"crm.read", "crm.write"}, TokenTTL: 5 * time.Minute, Revocation: &minter.OAuthRevocation{TakesEffect: lease.RevocableInstant},
		HTTP: identity.NewHTTPClient(2 * time.Second), Now: s.now,
	}
	for _, f := range change {
		f(m)
	}
	return m
}

func userToken(t *testing.T, issuer string) string {
	t.Helper()
	return signedToken(t, fmt.Sprintf(`{"iss":%q,"sub":"alice"}`, issuer))
}

func signedToken(t *testing.T, claims string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	js, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, (&jose.SignerOptions{}).WithType("at+jwt"))
	if err != nil {
		t.Fatal(err)
	}
	signed, err := js.Sign([]byte(claims))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// order is what m would make of 5 minutes and the time that it needs.
func (s *site) order(t *testing.T, m *minter.OAuth) lease.Order {
	t.Helper()
	w := lease.Want{TTL: 5*time.Minute + 12*time.Second, SubjectToken: true}
	if len(m.Scopes) > 0 {
		w.Scope = scopes("crm.read")
	}
	g, refusal := m.Plan(w)
	if refusal != nil {
		t.Fatalf("plan: %+v", refusal)
	}
	_, act := granted(s.now())
	act.User.Issuer = s.URL
	l := lease.New(g, "ses_1", s.now().Add(time.Hour), "dec_1", "rev_1", act, "sha256:ab", s.now())
	l.MintDeadline = s.now().Add(10 * time.Second)
	return lease.Order{Lease: l, Act: act, SubjectToken: userToken(t, s.URL)}
}

func TestOAuthPlan(t *testing.T) {
	t.Parallel()
	read := scopes("crm.read")
	lasting := func(m *minter.OAuth) { m.Revocation = nil }
	asserts := func(m *minter.OAuth) {
		m.Revocation, m.TokenTTL, m.EndsWithAssertion, m.Assertion = nil, 0, true, &minter.OAuthAssertion{}
	}
	for _, c := range []struct {
		name   string
		change func(*minter.OAuth)
		want   lease.Want
		ttl    time.Duration
		revoc  string
		code   string
	}{
		{"plain", nil, lease.Want{Scope: read, TTL: time.Minute, SubjectToken: true}, time.Minute, "instant", ""},
		{"as long as its token", nil, lease.Want{Scope: read, TTL: time.Hour, SubjectToken: true}, 5*time.Minute + 12*time.Second, "instant", ""},
		{"no longer than the minter grants", func(m *minter.OAuth) { m.TokenTTL = time.Hour }, lease.Want{Scope: read, TTL: time.Hour, SubjectToken: true}, 10 * time.Minute, "instant", ""},
		{"without subject token", nil, lease.Want{Scope: read, TTL: time.Minute}, 0, "", "credential_subject_token"},
		{"a user of the issuer", nil, lease.Want{Scope: read, TTL: time.Minute, SubjectToken: true, User: identity.Ref{Issuer: "https://idp.example", ID: "a"}}, time.Minute, "instant", ""},
		{"a user of another issuer", nil, lease.Want{Scope: read, TTL: time.Minute, SubjectToken: true, User: identity.Ref{Issuer: "https://idp.example/", ID: "a"}}, 0, "", "credential_user"},
		{"an assertion needs none", asserts, lease.Want{Scope: read, TTL: time.Minute}, time.Minute, "expiry", ""},
		{"ended by the assertion, too short", asserts, lease.Want{Scope: read, TTL: 14 * time.Second}, 0, "", "credential_ttl"},
		{"lasting, long enough", lasting, lease.Want{Scope: read, TTL: 5*time.Minute + 12*time.Second, SubjectToken: true}, 5*time.Minute + 12*time.Second, "expiry", ""},
		{"lasting, shorter than its token", lasting, lease.Want{Scope: read, TTL: 5 * time.Minute, SubjectToken: true}, 0, "", "credential_ttl"},
		{"revoked, but believed on", func(m *minter.OAuth) { m.Revocation.TakesEffect = "introspect" }, lease.Want{Scope: read, TTL: 5 * time.Minute, SubjectToken: true}, 0, "", "credential_ttl"},
		{"less than a second", nil, lease.Want{Scope: read, TTL: time.Second - 1, SubjectToken: true}, 0, "", "credential_ttl"},
		{"revocability that is there", nil, lease.Want{Scope: read, TTL: time.Minute, SubjectToken: true, Revocability: "instant"}, time.Minute, "instant", ""},
		{"revocability that is not", lasting, lease.Want{Scope: read, TTL: time.Hour, SubjectToken: true, Revocability: "introspect"}, 0, "", "credential_revocability"},
		{"precision that is there", func(m *minter.OAuth) { m.EnforcesDetails = true }, lease.Want{Scope: read, TTL: time.Minute, SubjectToken: true, Precision: "exact"}, time.Minute, "instant", ""},
		{"precision that is not", nil, lease.Want{Scope: read, TTL: time.Minute, SubjectToken: true, Precision: "exact"}, 0, "", "credential_precision"},
		{"a scope beyond", nil, lease.Want{Scope: scopes("crm.admin"), TTL: time.Minute, SubjectToken: true}, 0, "", "credential_scope"},
		{"a scope in two", nil, lease.Want{Scope: scopes("crm.read crm.admin"), TTL: time.Minute, SubjectToken: true}, 0, "", "credential_scope"},
		{"no scope where there are some", nil, lease.Want{TTL: time.Minute, SubjectToken: true}, 0, "", "credential_scope"},
		{"a scope where there are none", func(m *minter.OAuth) { m.Scopes = nil }, lease.Want{Scope: read, TTL: time.Minute, SubjectToken: true}, 0, "", "credential_scope"},
		{"none where there are none", func(m *minter.OAuth) { m.Scopes = nil }, lease.Want{Scope: map[string]any{}, TTL: time.Minute, SubjectToken: true}, time.Minute, "instant", ""},
	} {
		m := (&site{Server: &httptest.Server{URL: "https://idp.example"}}).exchanger()
		if c.change != nil {
			c.change(m)
		}
		g, refusal := m.Plan(c.want)
		if c.code != "" {
			if refusal == nil || refusal.Code != c.code || refusal.Message == "" {
				t.Errorf("%s: refused %+v, want %s", c.name, refusal, c.code)
			}
			continue
		}
		if refusal != nil || g.TTL != c.ttl || g.Revocability != c.revoc || !g.Outside || g.Kind != "oauth" || g.Scope == nil {
			t.Errorf("%s: %+v, %+v", c.name, g, refusal)
		}
	}
}

// clean says that an error has nothing of what must not leave Writ.
func clean(t *testing.T, name string, err error, o lease.Order) {
	t.Helper()
	for _, secret := range []string{o.SubjectToken, clientSecret, accessSecret, "leaked"} {
		if secret != "" && strings.Contains(err.Error(), secret) {
			t.Errorf("%s: the error has a secret in it: %v", name, err)
		}
	}
}

// An answer that is not what was asked for is no credential, and no error repeats it.
func TestOAuthHostileAnswers(t *testing.T) {
	t.Parallel()
	with := func(old, replacement string) http.HandlerFunc {
		body := strings.Replace(good(300), old, replacement, 1)
		if body == good(300) {
			panic(old)
		}
		return says(200, body)
	}
	for name, c := range map[string]struct {
		answer  http.HandlerFunc
		want    string
		revoked bool // what came is ended
	}{
		"another token_type":       {with("Bearer", "mac"), "token_type is not Bearer", true},
		"no token_type":            {with(`"token_type":"Bearer",`, ""), "token_type is not Bearer", true},
		"N_A for an access token":  {with("Bearer", "N_A"), "token_type is not Bearer", true},
		"another issued type":      {with(":access_token\"", ":refresh_token\""), "issued_token_type", true},
		"no issued type":           {with(`"issued_token_type":"`+typeAccess+`",`, ""), "issued_token_type", true},
		"more scope":               {with("crm.read", "crm.read crm.write"), "scope that was not asked for", true},
		"a scope of control":       {with("crm.read", "crm.read\\u0007"), "scope is malformed", true},
		"negative expires_in":      {with("300", "-300"), "expires_in", true},
		"no time":                  {with("300", "0"), "expires_in", true},
		"expires_in as text":       {with("300", `"300"`), "expires_in", true},
		"expires_in beyond reason": {with("300", "99999999999"), "expires_in", true},
		"half an expires_in":       {with("300", "300.5"), "expires_in", true},
		"no token":                 {with(accessSecret, ""), "no access_token", false},
		"null for a token":         {with(`"`+accessSecret+`"`, "null"), "no access_token", false},
		"a number for a token":     {with(`"`+accessSecret+`"`, "7"), "access_token is malformed", false},
		"control characters":       {with(accessSecret, `a\r\nSet-Cookie: leaked`), "access_token is malformed", false},
		"a token in two words":     {with(accessSecret, "a b"), "access_token is malformed", false},
		"an endless token":         {with(accessSecret, strings.Repeat("a", 17<<10)), "access_token is malformed", false},
		"a member twice":           {with(`"token_type"`, `"access_token":"leaked","token_type"`), "not one JSON object", false},
		"huge":                     {says(200, `{"padding":"`+strings.Repeat("leaked", 20<<10)+`"}`), "larger than", false},
		"HTML":                     {says(200, "<h1>"+accessSecret+" leaked</h1>", "Content-Type", "text/html; charset=utf-8"), "page for people", false},
		"HTML said to be JSON":     {says(200, "<h1>leaked</h1>"), "not one JSON object", false},
		"text":                     {says(200, good(300), "Content-Type", "text/plain"), "not JSON", false},
		"nothing":                  {says(200, ""), "not one JSON object", false},
		"a list":                   {says(200, "["+good(300)+"]"), "not one JSON object", false},
		"two objects":              {says(200, good(300)+good(300)), "not one JSON object", false},
		"a redirect":               {says(307, "", "Location", "/trap"), "status 307", false},
		"an error":                 {says(400, `{"error":"invalid_grant","error_description":"leaked `+accessSecret+`"}`), "status 400, error invalid_grant", false},
		"a token for an error":     {says(400, `{"error":"`+accessSecret+`"}`), "status 400", false},
		"an error as an object":    {says(400, `{"type":"error","error":{"type":"invalid_request_error","message":"leaked"}}`), "error invalid_request_error", false},
		"500":                      {says(500, "leaked"), "status 500", false},
		"not HTTP":                 {hijack("leaked " + accessSecret + "\r\n\r\n"), "connection to the target failed", false},
		"cut off":                  {hijack("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{\"access_token\":\"leaked"), "failed", false},
		"a header that is none":    {hijack("HTTP/1.1 200 OK\r\nleaked " + accessSecret + "\r\n\r\n"), "failed", false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			s.answer["/token"] = c.answer
			m := s.exchanger()
			o := s.order(t, m)
			made, err := m.Mint(t.Context(), o)
			if err == nil || made.Secret != nil {
				t.Fatalf("minted %v, %v", made.Secret != nil, err)
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			clean(t, name, err, o)
			want := []string{"/token"}
			if c.revoked {
				want = append(want, "/revoke")
				if made.Recall == "" {
					t.Error("nothing is kept to go on with")
				}
			}
			if d := cmp.Diff(want, s.paths()); d != "" {
				t.Errorf("calls (-want +got):\n%s", d)
			}
		})
	}
}

func hijack(raw string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			panic(err)
		}
		_, _ = conn.Write([]byte(raw))
		_ = conn.Close()
	}
}

// A token that can't be ended must end in time by its own.
func TestOAuthLastingTokens(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		body        string
		ok, endless bool
	}{
		"within":          {good(300), true, false},
		"shorter":         {good(60), true, false},
		"beyond":          {good(313), false, false},
		"beyond reason":   {good(401 * 24 * 3600), false, true},
		"beyond integers": {strings.Replace(good(300), "300", "1"+strings.Repeat("0", 400), 1), false, true},
		"not told":        {strings.Replace(good(300), `"expires_in":300,`, "", 1), false, false},
		"null":            {strings.Replace(good(300), "300", "null", 1), false, false},
		"with refresh":    {strings.Replace(good(300), `"scope"`, `"refresh_token":"leaked","scope"`, 1), false, true},
		"empty refresh":   {strings.Replace(good(300), `"scope"`, `"refresh_token":"","scope"`, 1), true, false},
	} {
		s := newSite(t)
		s.answer["/token"] = says(200, c.body)
		m := s.exchanger(func(m *minter.OAuth) { m.Revocation = nil })
		o := s.order(t, m)
		made, err := m.Mint(t.Context(), o)
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
		if strings.Contains(made.Recall, accessSecret) || strings.Contains(made.Recall, "leaked") {
			t.Errorf("%s: a token is kept that nothing revokes", name)
		}
		if c.endless {
			if made.Recall == "" {
				t.Errorf("%s: nothing is kept to go on with", name)
			}
			o.Lease.Recall = made.Recall
			s.pass(2 * 365 * 24 * time.Hour)
			s.unmade(t, m, o.Lease, false, "nobody knows how long it is good")
		}
		if !c.ok {
			clean(t, name, err, o)
			continue
		}
		end, err := time.Parse(time.RFC3339, made.Secret["expires_at"])
		if err != nil || end.After(o.Lease.ExpiresAt) || made.Secret["refresh_token"] != "" {
			t.Errorf("%s: ends %v, lease %v", name, end, o.Lease.ExpiresAt)
		}
	}
}

// A token that is a JWT lives as long as it says, whatever its answer says.
func TestOAuthTokenThatSaysMore(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		life   time.Duration // of the token by itself
		told   int
		ok     bool
		lasted bool
	}{
		"the same":              {300 * time.Second, 300, true, true},
		"a clock that is ahead": {304 * time.Second, 300, true, true},
		"longer":                {time.Hour, 300, false, true},
		"longer, but it ends":   {time.Hour, 300, true, false},
		"for ever, but it ends": {30000 * 24 * time.Hour, 300, true, false},
		"not told":              {300 * time.Second, 0, true, true},
		"shorter":               {time.Minute, 300, true, true},
	} {
		s := newSite(t)
		m := s.exchanger(func(m *minter.OAuth) {
			if c.lasted {
				m.Revocation = nil
			}
		})
		token := signedToken(t, fmt.Sprintf(`{"exp":%d}`, s.now().Add(c.life).Unix()))
		body := strings.Replace(good(c.told), accessSecret, token, 1)
		s.answer["/token"] = says(200, strings.Replace(body, `"expires_in":0,`, "", 1))
		o := s.order(t, m)
		made, err := m.Mint(t.Context(), o)
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
		if !c.lasted { // it is revoked as long as it lives
			o.Lease.Recall = made.Recall
			s.pass(30 * time.Minute)
			s.unmade(t, m, o.Lease, true, "")
			if calls := s.paths(); calls[len(calls)-1] != "/revoke" {
				t.Errorf("%s: %v", name, calls)
			}
		}
	}
}

// What must not be sent is not sent.
func TestOAuthSendsNothing(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*testing.T, *site, *minter.OAuth, *lease.Order){
		"a user of another issuer": func(_ *testing.T, _ *site, _ *minter.OAuth, o *lease.Order) {
			o.Lease.User.Issuer = "https://other.example"
		},
		"a token of another issuer": func(t *testing.T, _ *site, _ *minter.OAuth, o *lease.Order) {
			o.SubjectToken = userToken(t, "https://other.example")
		},
		"a token of a longer name": func(t *testing.T, s *site, _ *minter.OAuth, o *lease.Order) {
			o.SubjectToken = userToken(t, s.URL+"/")
		},
		"no token": func(_ *testing.T, _ *site, _ *minter.OAuth, o *lease.Order) { o.SubjectToken = "" },
		"no JWT":   func(_ *testing.T, _ *site, _ *minter.OAuth, o *lease.Order) { o.SubjectToken = "opaque" },
		"a lease that is too short": func(_ *testing.T, s *site, m *minter.OAuth, o *lease.Order) {
			m.Revocation, o.Lease.ExpiresAt = nil, s.now().Add(time.Minute)
		},
		"no secret": func(_ *testing.T, _ *site, m *minter.OAuth, _ *lease.Order) {
			m.Client.Secret = func() (string, error) { return "", errors.New("no such file") }
		},
		"no scopes": func(_ *testing.T, _ *site, _ *minter.OAuth, o *lease.Order) { o.Lease.Scope = map[string]any{} },
		"metadata of another": func(_ *testing.T, s *site, _ *minter.OAuth, _ *lease.Order) {
			s.answer["/.well-known/openid-configuration"] = says(200, `{"issuer":"https://other.example","token_endpoint":"`+s.URL+`/token"}`)
		},
		"metadata without endpoint": func(_ *testing.T, s *site, _ *minter.OAuth, _ *lease.Order) {
			s.answer["/.well-known/openid-configuration"] = says(200, `{"issuer":"`+s.URL+`"}`)
		},
		"an actor without token": func(_ *testing.T, _ *site, m *minter.OAuth, _ *lease.Order) {
			m.Actor = &minter.OAuthActor{TokenFile: "nowhere"}
		},
	} {
		s := newSite(t)
		m := s.exchanger()
		o := s.order(t, m)
		change(t, s, m, &o)
		if made, err := m.Mint(t.Context(), o); err == nil || made.Secret != nil || made.Recall != "" {
			t.Errorf("%s: minted", name)
		}
		if calls := s.paths(); len(calls) > 0 {
			t.Errorf("%s: %v", name, calls)
		}
	}
}

// What Mint sends, once, and with the secret that is in force.
func TestOAuthRequest(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	var users []string
	s.answer["/token"] = func(w http.ResponseWriter, r *http.Request) {
		user, secret, _ := r.BasicAuth()
		users = append(users, user+" "+secret)
		says(200, good(300))(w, r)
	}
	secret := "a:b/ü"
	m := s.exchanger(func(m *minter.OAuth) {
		m.Client.Secret = func() (string, error) { return secret, nil }
		m.Parameters = map[string]string{"extra": "1"}
	})
	o := s.order(t, m)
	for range 2 {
		if _, err := m.Mint(t.Context(), o); err != nil {
			t.Fatal(err)
		}
		secret = "another"
	}
	// RFC 6749 §2.3.1.
	if d := cmp.Diff([]string{"writ a%3Ab%2F%C3%BC", "writ another"}, users); d != "" {
		t.Error(d)
	}
	want := url.Values{
		"grant_type": {"urn:ietf:params:oauth:grant-type:token-exchange"}, "subject_token": {o.SubjectToken}, "subject_token_type": {typeAccess},
		"scope": {"crm.read"}, "extra": {"1"},
	}
	if d := cmp.Diff(want, s.forms[1]); d != "" {
		t.Errorf("form (-want +got):\n%s", d)
	}
	if m.Parameters["scope"] != "" {
		t.Error("the configuration changed")
	}
}

// The target made a token, and its answer was lost: nobody has it, and nothing is
// asked for again.
func TestFault14TimeoutAfterSuccess(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	over := make(chan struct{})
	t.Cleanup(func() { close(over) }) // before the server closes
	s.answer["/token"] = func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-r.Context().Done():
		case <-over:
		}
	}
	m := s.exchanger(func(m *minter.OAuth) { m.HTTP = identity.NewHTTPClient(200 * time.Millisecond) })
	o := s.order(t, m)
	made, err := m.Mint(t.Context(), o)
	if err == nil || !strings.Contains(err.Error(), "did not answer in time") || made.Secret != nil {
		t.Fatalf("%v, %v", made, err)
	}
	if calls := s.paths(); len(calls) != 1 {
		t.Errorf("calls %v", calls)
	}
	o.Lease.Recall = made.Recall
	s.unmade(t, m, o.Lease, false, "nothing to revoke")
	s.pass(5*time.Minute + 9*time.Second) // a token could have been made until the deadline
	s.unmade(t, m, o.Lease, false, "nothing to revoke")
	s.pass(4 * time.Second)
	s.unmade(t, m, o.Lease, true, "")
	if calls := s.paths(); len(calls) != 1 {
		t.Errorf("calls %v", calls)
	}
}

// unmake asks about one lease; that the target can't be used is its trouble too.
func unmake(t *testing.T, m *minter.OAuth, l lease.Lease) lease.Unmade {
	t.Helper()
	out, err := m.Unmake(t.Context(), []lease.Lease{l})
	if err != nil {
		return lease.Unmade{Err: err}
	}
	if len(out) != 1 {
		t.Fatalf("%+v", out)
	}
	return out[0]
}

func (s *site) unmade(t *testing.T, m *minter.OAuth, l lease.Lease, ended bool, why string) error {
	t.Helper()
	got := unmake(t, m, l)
	if (got.Err == nil) != ended || got.Err != nil && !strings.Contains(got.Err.Error(), why) {
		t.Errorf("unmade %+v, want ended %v %q", got, ended, why)
	}
	if got.Err == nil && got.Seen["end"] == "" || strings.Contains(fmt.Sprint(got.Seen, got.Err), accessSecret) {
		t.Errorf("seen %v, %v", got.Seen, got.Err)
	}
	return got.Err
}

// minted is a lease whose token is out.
func (s *site) minted(t *testing.T, m *minter.OAuth) lease.Lease {
	t.Helper()
	o := s.order(t, m)
	made, err := m.Mint(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	o.Lease.Recall = made.Recall
	s.mu.Lock()
	s.calls, s.forms = nil, nil
	s.mu.Unlock()
	return o.Lease
}

// The answers to a revocation, and what is believed of them.
func TestFault14Revocation(t *testing.T) {
	t.Parallel()
	active, inactive := says(200, `{"active":true}`), says(200, `{"active":false}`)
	for name, c := range map[string]struct {
		revoke, introspect http.HandlerFunc
		ended              bool
		why                string
	}{
		"yes":                              {says(200, ""), nil, true, ""},
		"yes in JSON":                      {says(200, "{}"), nil, true, ""},
		"yes in words":                     {says(200, "ok", "Content-Type", "text/plain"), nil, true, ""},
		"a page":                           {says(200, "<h1>Back soon</h1>", "Content-Type", "text/html"), nil, false, "page for people"},
		"a redirect":                       {says(302, "", "Location", "/elsewhere"), nil, false, "status 302"},
		"huge":                             {says(200, strings.Repeat(" ", 70<<10)), nil, false, "larger than"},
		"500":                              {says(500, ""), nil, false, "status 500"},
		"503":                              {says(503, "", "Retry-After", "7"), nil, false, "left alone"},
		"429":                              {says(429, "", "Retry-After", "7"), nil, false, "left alone"},
		"401":                              {says(401, `{"error":"invalid_client"}`), nil, false, "error invalid_client"},
		"another type":                     {says(400, `{"error":"unsupported_token_type"}`), nil, false, "unsupported_token_type"},
		"cut off":                          {hijack("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"), nil, false, "failed"},
		"404":                              {says(404, ""), nil, false, "does not know the token"},
		"410":                              {says(410, ""), nil, false, "does not know the token"},
		"invalid_token":                    {says(400, `{"error":"invalid_token"}`), nil, false, "does not know the token"},
		"yes, and seen":                    {says(200, ""), inactive, true, ""},
		"yes, but not seen":                {says(200, ""), active, false, "still calls the token active"},
		"404, and seen":                    {says(404, ""), inactive, true, ""},
		"404, and alive":                   {says(404, ""), active, false, "still calls the token active"},
		"invalid_token, and seen":          {says(400, `{"error":"invalid_token"}`), inactive, true, ""},
		"500, whatever is seen":            {says(500, ""), inactive, false, "status 500"},
		"yes, and introspection fails":     {says(200, ""), says(500, ""), false, "introspect"},
		"yes, and introspection says HTML": {says(200, ""), says(200, "<p>", "Content-Type", "text/html"), false, "introspect"},
		"yes, and introspection is empty":  {says(200, ""), says(200, "{}"), false, "does not say"},
		"yes, and introspection in words":  {says(200, ""), says(200, `{"active":"false"}`), false, "does not say"},
		"yes, and introspection refuses":   {says(200, ""), says(401, `{"error":"invalid_client"}`), false, "introspect"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			m := s.exchanger(func(m *minter.OAuth) {
				if c.introspect != nil {
					m.Introspection = s.URL + "/introspect"
				}
			})
			l := s.minted(t, m)
			s.answer["/revoke"], s.answer["/introspect"] = c.revoke, c.introspect
			s.unmade(t, m, l, c.ended, c.why)
			if form := s.forms[0]; form.Get("token") != accessSecret || form.Get("token_type_hint") != "access_token" {
				t.Errorf("form %v", form)
			}
			for _, p := range s.paths() {
				if p == "/elsewhere" {
					t.Error("a redirect was followed")
				}
			}
			s.pass(5*time.Minute + time.Second) // its own end has come
			before := len(s.paths())
			s.unmade(t, m, l, true, "")
			if after := len(s.paths()); after != before {
				t.Error("asked about a token that is over")
			}
		})
	}
}

// Retry-After is kept to, but can't switch revocation off.
func TestFault14RetryAfter(t *testing.T) {
	t.Parallel()
	for header, want := range map[string]time.Duration{"30": 30 * time.Second, "86400": time.Minute, "0": 0, "-5": 0, "soon": 0, "99999999999": 0} {
		s := newSite(t)
		m := s.exchanger()
		l := s.minted(t, m)
		s.answer["/revoke"] = says(429, "", "Retry-After", header)
		err := s.unmade(t, m, l, false, "429")
		at, waits := errors.AsType[interface {
			error
			RetryAt() time.Time
		}](err)
		if waits != (want > 0) || waits && at.RetryAt().Sub(s.now()) != want {
			t.Errorf("%s: %v", header, err)
		}
		s.answer["/revoke"] = says(200, "")
		if want > 0 {
			s.pass(want - time.Second)
			s.unmade(t, m, l, false, "left alone")
			if calls := s.paths(); len(calls) != 1 {
				t.Errorf("%s: %v", header, calls)
			}
			s.pass(time.Second)
		}
		s.unmade(t, m, l, true, "")
	}
	// The same when minting; and the one does not stop the other.
	s := newSite(t)
	m := s.exchanger()
	l := s.minted(t, m)
	s.answer["/token"] = says(503, "", "Retry-After", "20")
	o := s.order(t, m)
	for range 2 {
		if _, err := m.Mint(t.Context(), o); err == nil || !strings.Contains(err.Error(), "left alone") {
			t.Error(err)
		}
	}
	s.unmade(t, m, l, true, "")
	if d := cmp.Diff([]string{"/token", "/revoke"}, s.paths()); d != "" {
		t.Error(d)
	}
}

// A refresh token that nobody asked for ends with the lease, and goes nowhere.
func TestOAuthRefreshToken(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.answer["/token"] = says(200, strings.Replace(good(300), `"scope"`, `"refresh_token":"the-refresh-token","id_token":"x","scope"`, 1))
	m := s.exchanger()
	o := s.order(t, m)
	made, err := m.Mint(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if s := fmt.Sprint(map[string]string(made.Secret)); strings.Contains(s, "refresh") || strings.Contains(s, "id_token") {
		t.Error("the agent gets more than the access token")
	}
	o.Lease.Recall = made.Recall
	s.pass(time.Hour) // it has no end of its own
	s.unmade(t, m, o.Lease, true, "")
	var ended []string
	for _, f := range s.forms[len(s.forms)-2:] {
		ended = append(ended, f.Get("token")+" "+f.Get("token_type_hint"))
	}
	if d := cmp.Diff([]string{"the-refresh-token refresh_token", accessSecret + " access_token"}, ended); d != "" {
		t.Error(d)
	}
}

// One lease's trouble is not another's, and the answers are in their order.
func TestOAuthUnmakeBatch(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	m := s.exchanger()
	s.answer["/revoke"] = func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.PostForm.Get("token"), "7") {
			w.WriteHeader(http.StatusInternalServerError)
		}
	}
	var leases []lease.Lease
	until := s.now().Add(time.Minute).Unix()
	for i := range 100 {
		l := lease.Lease{ID: fmt.Sprint(i), CreatedAt: s.now(), ExpiresAt: s.now().Add(time.Minute)}
		switch i % 10 {
		case 3: // nothing was recorded
		case 4:
			l.Recall = "{" // nor can it be read
		default:
			l.Recall = fmt.Sprintf(`{"tokens":[{"token":"t%d","hint":"access_token"}],"until":%d}`, i, until)
		}
		leases = append(leases, l)
	}
	out, err := m.Unmake(t.Context(), leases)
	if err != nil || len(out) != len(leases) {
		t.Fatal(err)
	}
	for i, u := range out {
		if bad := i%10 == 3 || i%10 == 4 || i%10 == 7; (u.Err != nil) != bad {
			t.Errorf("%d: %v", i, u.Err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if out, err = m.Unmake(ctx, leases[:1]); err == nil {
		t.Errorf("unmade without time: %+v", out)
	}
	if out, err = m.Unmake(t.Context(), nil); err != nil || len(out) != 0 {
		t.Errorf("of nothing: %+v, %v", out, err)
	}
}

// A target that is away is not asked about each lease of a batch, and the batch fails as
// one, so that it is tried again soon. What time ended is told all the same.
func TestFault14TargetIsAway(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]http.HandlerFunc{
		"busy": says(503, ""), "overloaded": says(429, ""), "behind a gateway": says(502, ""), "cut off": hijack("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"),
	} {
		s := newSite(t)
		m := s.exchanger()
		s.answer["/revoke"] = answer
		var leases []lease.Lease
		for i := range 100 {
			leases = append(leases, lease.Lease{Recall: fmt.Sprintf(`{"tokens":[{"token":"t%d","hint":"access_token"}],"until":%d}`, i, s.now().Add(time.Minute).Unix())})
		}
		if out, err := m.Unmake(t.Context(), leases); err == nil {
			t.Errorf("%s: %+v", name, out)
		}
		if calls := len(s.paths()); calls < 8 || calls > 16 {
			t.Errorf("%s: asked %d times", name, calls)
		}
		leases[50].Recall = fmt.Sprintf(`{"until":%d}`, s.now().Add(-time.Minute).Unix())
		out, err := m.Unmake(t.Context(), leases)
		if err != nil || out[50].Err != nil || out[50].Seen["end"] != "expired" || out[49].Err == nil {
			t.Errorf("%s: %+v, %v", name, out, err)
		}
		s.pass(2 * time.Minute)
		if out, err = m.Unmake(t.Context(), leases[:1]); err != nil || out[0].Err != nil {
			t.Errorf("%s: their time is over: %+v, %v", name, out, err)
		}
	}
}

// Of a token that ends with its lease, and that nothing ends before, there is nothing to
// be told: the lease is over when its time is.
func TestOAuthLeftToExpire(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	m := s.exchanger(func(m *minter.OAuth) { m.Revocation = nil })
	l := s.minted(t, m)
	if got := unmake(t, m, l); got.Err != nil || got.Seen["end"] != "left_to_expire" {
		t.Errorf("%+v", got)
	}
	l.Recall = "" // nor of one that was never recorded, but could not live longer
	if got := unmake(t, m, l); got.Err != nil || got.Seen["end"] != "left_to_expire" {
		t.Errorf("%+v", got)
	}
	l.ExpiresAt = s.now().Add(time.Minute) // if it could, that has to be waited for
	s.unmade(t, m, l, false, "nothing to revoke")
	s.pass(5*time.Minute + 10*time.Second)
	if got := unmake(t, m, l); got.Err != nil || got.Seen["end"] != "expired" {
		t.Errorf("%+v", got)
	}
	if calls := s.paths(); len(calls) > 0 {
		t.Error(calls)
	}
}

// What ends tokens must be found even while discovery is down.
func TestOAuthMetadataAreBelievedOn(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	m := s.exchanger(func(m *minter.OAuth) { m.TokenTTL = time.Hour })
	s.answer["/token"] = says(200, good(3600))
	l := s.minted(t, m)
	s.answer["/.well-known/openid-configuration"] = says(500, "")
	s.pass(11 * time.Minute)
	s.unmade(t, m, l, true, "")
}

// A name can't be chosen so that it passes for two others.
func FuzzOAuthSubject(f *testing.F) {
	f.Add("crm", "a:user:b", "crm:user:a", "b")
	f.Add("x", "y", "x", "y")
	f.Add("%3A", ":", ":", "%3A")
	f.Add("{user}", "u", "v", "{agent}")
	f.Fuzz(func(t *testing.T, agent1, user1, agent2, user2 string) {
		sub := func(agent, user string) string {
			return minter.Expand("agent:{agent}:user:{user}", lease.Lease{Agent: identity.Ref{ID: agent}, User: identity.Ref{ID: user}})
		}
		if (sub(agent1, user1) == sub(agent2, user2)) != (agent1 == agent2 && user1 == user2) {
			t.Errorf("%q %q and %q %q: %s", agent1, user1, agent2, user2, sub(agent1, user1))
		}
		if got := minter.Expand("{user}", lease.Lease{User: identity.Ref{ID: user1}}); got != user1 {
			t.Errorf("alone, %q is %q", user1, got)
		}
	})
}

// Whatever a target answers, what becomes a credential can be carried in a header.
func FuzzOAuthAnswer(f *testing.F) {
	for _, body := range []string{
		good(300), `{"access_token":"a","token_type":"bearer","expires_in":1e2,"scope":null}`, `{"access_token":"a b","token_type":"Bearer"}`,
		`{"access_token":"a","token_type":"Bearer","expires_in":-1}`, `[]`, `{"authorization_details":[{}]}`, `{"refresh_token":{}}`, "\xff", "",
	} {
		f.Add([]byte(body))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		token, refresh, life, err := minter.ReadAnswer(body)
		for _, s := range []string{token, refresh} {
			if strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' }) || len(s) > 16<<10 {
				t.Errorf("%q", s)
			}
		}
		if err == nil && (token == "" || life < 0 || life > 401*24*time.Hour || !json.Valid(body)) {
			t.Errorf("believed %q: %q %v", body, token, life)
		}
	})
}

// A crash between the exchange and the record: the lease may be over sooner than the
// token that nobody has.
func TestFault14TokenThatWasNeverRecorded(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	m := s.exchanger()
	o := s.order(t, m)
	o.Lease.ExpiresAt = s.now().Add(time.Minute)
	s.pass(2 * time.Minute)
	s.unmade(t, m, o.Lease, false, "nothing to revoke")
	s.pass(3*time.Minute + 10*time.Second)
	s.unmade(t, m, o.Lease, true, "")
	o.Lease.MintDeadline = time.Time{} // of a record that has none
	s.unmade(t, m, o.Lease, true, "")
	s.pass(-time.Second)
	s.unmade(t, m, o.Lease, false, "nothing to revoke")
}

// Only a target that says which act a token is for has a token that is exact.
func TestOAuthDetails(t *testing.T) {
	t.Parallel()
	detail := map[string]any{"type": "writ_intent", "actions": []string{"crm.opportunity.update"}, "identifier": "crm", "intent_hash": "sha256:ab"}
	change := func(name string, v any) map[string]any {
		out := map[string]any{}
		for k, old := range detail {
			out[k] = old
		}
		out[name] = v
		return out
	}
	for name, c := range map[string]struct {
		granted any
		ok      bool
	}{
		"the act":        {[]any{detail}, true},
		"enriched":       {[]any{change("account", "7")}, true},
		"none":           {nil, false},
		"an empty list":  {[]any{}, false},
		"no list":        {detail, false},
		"one more":       {[]any{detail, change("type", "other")}, false},
		"another type":   {[]any{change("type", "other")}, false},
		"another act":    {[]any{change("intent_hash", "sha256:cd")}, false},
		"another thing":  {[]any{change("identifier", "hr")}, false},
		"more actions":   {[]any{change("actions", []string{"crm.opportunity.update", "crm.delete"})}, false},
		"another action": {[]any{change("actions", []string{"crm.delete"})}, false},
	} {
		s := newSite(t)
		granted, err := json.Marshal(c.granted)
		if err != nil {
			t.Fatal(err)
		}
		s.answer["/token"] = says(200, strings.Replace(good(300), `"scope"`, `"authorization_details":`+string(granted)+`,"scope"`, 1))
		m := s.exchanger(func(m *minter.OAuth) { m.EnforcesDetails = true })
		if _, err := m.Mint(t.Context(), s.order(t, m)); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
		if sent := s.forms[len(s.forms)-1].Get("authorization_details"); c.ok && !strings.Contains(sent, `"intent_hash":"sha256:ab"`) {
			t.Errorf("sent %s", sent)
		}
	}
}

// What the configuration promises agents must be there, or there is no credential.
func TestOAuthReturns(t *testing.T) {
	t.Parallel()
	for value, ok := range map[string]bool{`"https://acme.example"`: true, `""`: false, `7`: false, `"a\nb"`: false, `null`: false} {
		s := newSite(t)
		s.answer["/token"] = says(200, strings.Replace(good(300), `"scope"`, `"instance_url":`+value+`,"scope"`, 1))
		m := s.exchanger(func(m *minter.OAuth) { m.Returns = []string{"instance_url"} })
		made, err := m.Mint(t.Context(), s.order(t, m))
		if (err == nil) != ok || ok && made.Secret["instance_url"] != "https://acme.example" {
			t.Errorf("%s: %v", value, err)
		}
		if revoked := len(s.paths()) == 2; revoked == ok {
			t.Errorf("%s: calls %v", value, s.paths())
		}
	}
}

// A token that ends with its assertion ends within its lease, even by a clock that is
// behind; and the key of a file is in force from when it is there.
func TestOAuthAssertionLife(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	file := filepath.Join(t.TempDir(), "key.pem")
	newKey := func() *ecdsa.PrivateKey {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return key
	}
	m := s.exchanger(func(m *minter.OAuth) {
		m.Revocation, m.TokenTTL, m.EndsWithAssertion = nil, 0, true
		m.Assertion = &minter.OAuthAssertion{Issuer: issuer, Subject: "{agent}", Audience: s.URL, TTL: time.Minute, KeyFile: file, Claims: map[string]string{"team": "{agent}"}}
	})
	o := s.order(t, m)
	o.SubjectToken = "" // not needed, and not looked at
	behind := 3 * time.Second
	for range 2 {
		key := newKey()
		s.answer["/token"] = func(w http.ResponseWriter, r *http.Request) {
			parsed, err := jose.ParseSignedCompact(r.PostForm.Get("subject_token"), []jose.SignatureAlgorithm{jose.ES256})
			if err != nil {
				t.Error(err)
				return
			}
			payload, err := parsed.Verify(key.Public())
			if err != nil {
				t.Error(err)
				return
			}
			var claims struct {
				Expires int64 `json:"exp"`
				Team    string
			}
			if err := json.Unmarshal(payload, &claims); err != nil || claims.Team != o.Lease.Agent.ID {
				t.Errorf("%s, %v", payload, err)
			}
			life := time.Unix(claims.Expires, 0).Sub(s.now().Add(-behind))
			says(200, good(int(life/time.Second)))(w, r)
		}
		if _, err := m.Mint(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	behind = time.Minute // that token would outlive its lease
	if made, err := m.Mint(t.Context(), o); err == nil || made.Secret != nil {
		t.Error("minted")
	}
	if err := os.WriteFile(file, []byte("no key leaked"), 0o600); err != nil {
		t.Fatal(err)
	}
	before := len(s.paths())
	_, err := m.Mint(t.Context(), o)
	if err == nil || len(s.paths()) != before {
		t.Error("minted without a key")
	}
	clean(t, "no key", err, o)
	s.pass(o.Lease.ExpiresAt.Sub(s.now()) - 3*time.Second)
	if _, err := m.Mint(t.Context(), o); err == nil || !strings.Contains(err.Error(), "nearly over") {
		t.Error(err)
	}
}
