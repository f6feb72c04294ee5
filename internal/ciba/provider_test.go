package ciba

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/writsec/writ/internal/approval"
	"github.com/writsec/writ/internal/identity"
)

const (
	clientID     = "writ:client/ü"
	clientSecret = "p&ss wörd%:+/="
)

// provider is an identity provider whose endpoints answer what the test says, and
// that notes what it was sent.
type provider struct {
	t      *testing.T
	server *httptest.Server
	key    *ecdsa.PrivateKey

	mu          sync.Mutex
	backchannel http.HandlerFunc
	token       http.HandlerFunc
	revoke      http.HandlerFunc
	keysAway    bool
	noCIBA      bool
	requests    []request
}

type request struct {
	path   string
	form   url.Values
	header http.Header
}

func newProvider(t *testing.T) *provider {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p := &provider{t: t, key: key}
	p.server = httptest.NewServer(p)
	t.Cleanup(p.server.Close)
	return p
}

func (p *provider) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	form, _ := url.ParseQuery(string(body))
	p.mu.Lock()
	if r.Method == http.MethodPost {
		p.requests = append(p.requests, request{r.URL.Path, form, r.Header})
	}
	handlers := map[string]http.HandlerFunc{"/bc": p.backchannel, "/token": p.token, "/revoke": p.revoke}
	keysAway, noCIBA := p.keysAway, p.noCIBA
	p.mu.Unlock()
	switch r.URL.Path {
	case "/.well-known/openid-configuration":
		m := map[string]any{
			"issuer": p.server.URL, "token_endpoint": p.server.URL + "/token", "jwks_uri": p.server.URL + "/jwks",
			"revocation_endpoint": p.server.URL + "/revoke", "authorization_endpoint": p.server.URL + "/auth",
		}
		if !noCIBA {
			m["backchannel_authentication_endpoint"] = p.server.URL + "/bc"
		}
		_ = json.NewEncoder(w).Encode(m)
	case "/jwks":
		if keysAway {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		_ = json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: p.key.Public(), KeyID: "k1", Algorithm: "ES256", Use: "sig"}}})
	default:
		if h := handlers[r.URL.Path]; h != nil {
			h(w, r)
			return
		}
		http.NotFound(w, r)
	}
}

func (p *provider) sent(path string) []request {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []request
	for _, r := range p.requests {
		if r.path == path {
			out = append(out, r)
		}
	}
	return out
}

// client makes a client of p as the configuration would.
func (p *provider) client(change ...func(*Config)) *Client {
	p.t.Helper()
	v, err := identity.New(identity.Config{
		Issuers: []identity.Issuer{{URL: p.server.URL, User: true, Audience: "writ", Algorithms: []string{"ES256"}, Leeway: 30 * time.Second}},
		HTTP:    identity.NewHTTPClient(5 * time.Second), Now: time.Now, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		p.t.Fatal(err)
	}
	cfg := Config{
		Issuer: p.server.URL, ClientID: clientID, ClientSecret: clientSecret, LoginHint: "{sub}",
		Limits: approval.Limits{MaxLength: 100}, PollTimeout: 5 * time.Second, HTTP: identity.NewHTTPClient(5 * time.Second), Verifier: v,
	}
	for _, f := range change {
		f(&cfg)
	}
	p.t.Cleanup(cfg.HTTP.CloseIdleConnections)
	return New(cfg)
}

// answer says status and body on every request.
func answer(status int, body string, header ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		for i := 0; i+1 < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

// dropped cuts the connection when the request was read.
func dropped(w http.ResponseWriter, _ *http.Request) {
	c, _, err := w.(http.Hijacker).Hijack()
	if err == nil {
		_ = c.Close()
	}
}

// cutShort promises more than it sends.
func cutShort(status int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "1000")
		w.WriteHeader(status)
		_, _ = io.WriteString(w, `{"auth_req_id":"x",`)
	}
}

// big sends two mebibytes that would be a good answer otherwise.
func big(prefix string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, prefix)
		pad := make([]byte, 1<<20)
		for i := range pad {
			pad[i] = ' '
		}
		_, _ = w.Write(pad)
		_, _ = w.Write(pad)
		_, _ = io.WriteString(w, "}")
	}
}

// idToken signs claims with p's key, or another, under a header of type JWT.
func (p *provider) idToken(key crypto.Signer, claims map[string]any) string {
	p.t.Helper()
	if key == nil {
		key = p.key
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "k1"}}, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		p.t.Fatal(err)
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		p.t.Fatal(err)
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		p.t.Fatal(err)
	}
	s, err := jws.CompactSerialize()
	if err != nil {
		p.t.Fatal(err)
	}
	return s
}

func atHash(token string) string {
	sum := sha256.Sum256([]byte(token))
	return base64.RawURLEncoding.EncodeToString(sum[:16])
}
