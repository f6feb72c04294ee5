package devidp

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

const (
	testAudience = "https://writ.example"
	writSecret   = "writ secret+/%" // does not survive a missing form-decoding
	salesSecret  = "sales secret"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func testConfig() Config {
	agents := DefaultAgents()
	agents[0].Secret = salesSecret
	return Config{
		Audience:   testAudience,
		Agents:     agents,
		CIBAClient: Client{Secret: writSecret},
	}
}

// newProvider is called through its handler; see serve for one with a socket.
func newProvider(t *testing.T) *Provider {
	t.Helper()
	p, err := New(testConfig())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p
}

// serve runs a provider until the test ends and returns a browser for it, which
// keeps cookies and stops at redirects.
func serve(t *testing.T) (*Provider, *http.Client) {
	t.Helper()
	p, err := New(testConfig())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	jar, _ := cookiejar.New(nil) // never fails
	browser := &http.Client{
		Transport:     &http.Transport{},
		Jar:           jar,
		Timeout:       10 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	t.Cleanup(func() {
		browser.CloseIdleConnections()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return p, browser
}

func get(t *testing.T, p *Provider, path string) *httptest.ResponseRecorder {
	t.Helper()
	w := httptest.NewRecorder()
	p.ServeHTTP(w, httptest.NewRequest(http.MethodGet, p.Issuer()+path, nil))
	return w
}

// post sends a client's form with its credentials in the Authorization header.
func post(t *testing.T, p *Provider, path, id, secret string, form url.Values) *httptest.ResponseRecorder {
	t.Helper()
	r := httptest.NewRequest(http.MethodPost, p.Issuer()+path, strings.NewReader(form.Encode()))
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	if id != "" {
		r.SetBasicAuth(url.QueryEscape(id), url.QueryEscape(secret))
	}
	w := httptest.NewRecorder()
	p.ServeHTTP(w, r)
	return w
}

func decode[T any](t *testing.T, w *httptest.ResponseRecorder) T {
	t.Helper()
	var v T
	if err := json.Unmarshal(w.Body.Bytes(), &v); err != nil {
		t.Fatalf("answer %d %q: %v", w.Code, w.Body, err)
	}
	return v
}

// wantError checks an OAuth error answer.
func wantError(t *testing.T, w *httptest.ResponseRecorder, status int, code string) {
	t.Helper()
	if got := decode[oauthError](t, w); w.Code != status || got.Code != code {
		t.Errorf("answer %d %s (%s), want %d %s", w.Code, got.Code, got.Description, status, code)
	}
	if got := w.Header().Get("Cache-Control"); got != "no-store" {
		t.Errorf("Cache-Control %q, want no-store", got)
	}
}

func TestListensOnLoopbackOnly(t *testing.T) {
	for _, address := range []string{
		"0.0.0.0:0", "[::]:0", ":0", "192.168.1.5:0", "localhost.example.com:0", "[::ffff:10.0.0.1]:0",
	} {
		cfg := testConfig()
		cfg.Listen = address
		p, err := New(cfg)
		if err == nil {
			_ = p.Close()
			t.Errorf("listens on %s", address)
		} else if !strings.Contains(err.Error(), "only loopback will do") {
			t.Errorf("%s: error %q does not say why", address, err)
		}
	}
	for _, host := range []string{"127.0.0.1", "localhost"} {
		cfg := testConfig()
		cfg.Listen = host + ":0"
		p, err := New(cfg)
		if err != nil {
			t.Errorf("%s: %v", host, err)
			continue
		}
		_, port, _ := net.SplitHostPort(p.Addr().String())
		if want := "http://" + host + ":" + port; p.Issuer() != want {
			t.Errorf("issuer %s, want %s", p.Issuer(), want)
		}
		_ = p.Close()
	}
}

func TestConfigErrors(t *testing.T) {
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]func(*Config){
		"not on P-256":         func(c *Config) { c.Key = p384 },
		"audience is empty":    func(c *Config) { c.Audience = "" },
		"whole seconds":        func(c *Config) { c.PollInterval = 1500 * time.Millisecond },
		`"sales-agent" is emp`: func(c *Config) { c.Users = []User{{ID: "sales-agent"}} },
		`"" is empty`:          func(c *Config) { c.Users = []User{{Name: "nobody"}} },
		`client id "writ"`:     func(c *Config) { c.Agents = []Agent{{ID: "writ"}} },
		"is not an absolute":   func(c *Config) { c.CIBAClient.RedirectURIs = []string{"/callback"} },
		"missing port":         func(c *Config) { c.Listen = "127.0.0.1" },
	}
	for want, change := range tests {
		cfg := testConfig()
		change(&cfg)
		p, err := New(cfg)
		if err == nil {
			_ = p.Close()
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want one with %q", err, want)
		}
	}
}

func TestKeyMayBeGiven(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	jwks := func(key *ecdsa.PrivateKey) string {
		cfg := testConfig()
		cfg.Key = key
		p, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = p.Close() }()
		return get(t, p, "/jwks").Body.String()
	}
	if a, b := jwks(key), jwks(key); a != b {
		t.Errorf("one key, two sets: %s and %s", a, b)
	}
	if a, b := jwks(nil), jwks(nil); a == b {
		t.Errorf("the made-up key is always %s", a)
	}
}

func TestEmptySecretsAreMadeUp(t *testing.T) {
	p := newProvider(t)
	hr, _ := p.Client("hr-agent")
	finance, _ := p.Client("finance-agent")
	if len(hr.Secret) < 43 || hr.Secret == finance.Secret {
		t.Errorf("secrets %q and %q", hr.Secret, finance.Secret)
	}
	if _, ok := p.Client("alice"); ok {
		t.Error("a user is a client")
	}
}

func TestHostHeaderMustBeLoopback(t *testing.T) {
	p := newProvider(t)
	for host, want := range map[string]int{
		"127.0.0.1:8080":        http.StatusOK,
		"localhost":             http.StatusOK,
		"[::1]:8080":            http.StatusOK,
		"rebound.example":       http.StatusMisdirectedRequest,
		"127.0.0.1.example.com": http.StatusMisdirectedRequest,
		"localhost.":            http.StatusMisdirectedRequest,
		"10.0.0.1:8080":         http.StatusMisdirectedRequest,
		"":                      http.StatusMisdirectedRequest,
	} {
		r := httptest.NewRequest(http.MethodGet, "/jwks", nil)
		r.Host = host
		w := httptest.NewRecorder()
		p.ServeHTTP(w, r)
		if w.Code != want {
			t.Errorf("Host %q: %d, want %d", host, w.Code, want)
		}
	}
}

func TestRunStopsWithItsContext(t *testing.T) {
	p, err := New(testConfig())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.Run(ctx); err != nil {
		t.Errorf("Run: %v", err)
	}
	if conn, err := net.Dial("tcp", p.Addr().String()); err == nil {
		_ = conn.Close()
		t.Error("still listening after Run")
	}
	if err := p.Run(t.Context()); err == nil {
		t.Error("Run on a closed listener reports no error")
	}
}

func TestBodiesAreBounded(t *testing.T) {
	p := newProvider(t)
	w := post(t, p, "/token", "writ", writSecret, url.Values{"grant_type": {strings.Repeat("x", maxBody)}})
	wantError(t, w, http.StatusBadRequest, "invalid_request")
}
