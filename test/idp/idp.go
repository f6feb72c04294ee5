// Package idp runs a real third-party OpenID provider, the npm package
// oidc-provider, for tests: sign-in by code and PKCE, agents' own tokens by
// client credentials, and CIBA with a person who answers when the test says so.
//
// It needs node and npm, and fails when they are missing: a test that skips
// itself proves nothing. It is no provider for anything but tests: it signs
// anybody in, and its secrets are fixed.
package idp

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"
)

// The clients that every provider has; [Config.Clients] adds more.
const (
	SalesAgent   = "sales-agent"
	HRAgent      = "hr-agent"
	FinanceAgent = "finance-agent"
	Writ         = "writ"     // Writ as a relying party: code flow and CIBA
	WritKey      = "writ-key" // Writ by private_key_jwt, with [Exchange.JWKS]
)

// DefaultResource is the audience of access tokens unless [Config.Resource]
// names another.
const DefaultResource = "urn:writ:test"

// Config says how the provider behaves. The zero value is a well-behaved one
// that knows alice (group sales), bob (hr) and carol (finance).
type Config struct {
	// Port of the issuer; 0 takes a free one.
	Port int
	// Resource is the audience of the access tokens.
	Resource string

	// Interval is sent to CIBA clients and enforced by slow_down; 0 is one
	// second. Whole seconds.
	Interval time.Duration
	// NoInterval sends none, and enforces the five seconds that a client then
	// has to assume (CIBA Core §7.3).
	NoInterval bool
	// Tolerance is how early a poll may arrive; 0 is 100 ms.
	Tolerance time.Duration

	// ExpiresIn is the life of a prompt without requested_expiry; 0 is two
	// minutes. MaxExpiresIn bounds any; 0 is ten minutes. Whole seconds.
	ExpiresIn, MaxExpiresIn time.Duration
	// TokenTTL is the life of access and ID tokens; 0 is five minutes.
	TokenTTL time.Duration
	// SigningAlg is RS256 (default) or ES256, for access and ID tokens alike.
	SigningAlg string

	// BindingMessageMax is in characters; 0 is 128. BindingMessagePattern is a
	// JavaScript regular expression that messages have to match, for
	// providers that take less than what is printable.
	BindingMessageMax     int
	BindingMessagePattern string

	// Users are added to alice, bob and carol, or replace them.
	Users map[string]User
	// Clients are further agents, id to secret.
	Clients map[string]string
	// RedirectURIs are allowed besides /callback on any loopback port.
	RedirectURIs []string
	// DefaultUser signs in when an authorization request has no login_hint;
	// without one it is refused with access_denied.
	DefaultUser string
	// AuthorizationDetailsTypes turns RFC 9396 on for these types. A CIBA
	// request that has details gets a JWT access token, which can't be revoked.
	AuthorizationDetailsTypes []string
	// Ping makes the client Writ a ping client.
	Ping *Ping
	// Exchange lets the client Writ exchange users' tokens.
	Exchange *Exchange
}

// Exchange is what the access tokens of users can be exchanged for (RFC 8693): opaque
// ones, which the provider revokes and introspects.
type Exchange struct {
	Audience string `json:"audience"`
	Scope    string `json:"scope"` // at most
	TTL      int    `json:"ttl"`   // seconds
	// JWKS are Writ's public keys, any JSON. With them there is the client
	// [WritKey], and an actor_token can be shown.
	JWKS any `json:"jwks,omitempty"`
}

// User is a person at the provider, known as login_hint by the name or as
// name@example.test.
type User struct {
	Groups []string `json:"groups,omitempty"`
	// Claims go into access and ID tokens beside groups.
	Claims map[string]any `json:"claims,omitempty"`
	// UserCode, if set, has to come with each CIBA request for this user.
	UserCode string `json:"user_code,omitempty"`
}

// Ping is where the provider tells Writ that a prompt was answered. The
// endpoint has to be https; CA holds the PEM certificates to trust there.
type Ping struct {
	Endpoint string `json:"endpoint"`
	CA       string `json:"ca"`
}

// IdP is a running provider. Its methods may be called concurrently.
type IdP struct {
	Issuer   string
	Control  string            // address of the control API
	Resource string            // audience of access tokens
	Clients  map[string]string // client id to secret

	cfg    Config
	client *http.Client

	mu   sync.Mutex // guards proc
	proc *process
}

// Start runs a provider until the test ends.
func Start(tb testing.TB, cfg Config) *IdP {
	tb.Helper()
	p, err := New(tb.Context(), cfg)
	if err != nil {
		tb.Fatalf("start the OpenID provider: %v", err)
	}
	tb.Cleanup(func() {
		log := p.Log()
		p.Close()
		if tb.Failed() && log != "" {
			tb.Logf("OpenID provider said:\n%s", log)
		}
	})
	return p
}

// New runs a provider until Close; ctx bounds only the start. The first one
// on a machine takes longer, since it installs oidc-provider.
func New(ctx context.Context, cfg Config) (*IdP, error) {
	p := &IdP{cfg: cfg, client: &http.Client{
		Transport: &http.Transport{MaxIdleConnsPerHost: 16},
		Timeout:   30 * time.Second,
	}}
	if err := p.start(ctx); err != nil {
		return nil, err
	}
	return p, nil
}

// Close ends the provider.
func (p *IdP) Close() {
	p.Stop()
	p.client.CloseIdleConnections()
}

// Stop takes the provider down, so that it refuses connections, until Restart.
func (p *IdP) Stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.proc != nil {
		p.proc.stop()
	}
}

// Restart ends the provider if it runs, and starts it at the same addresses
// with new keys and nothing remembered.
func (p *IdP) Restart(ctx context.Context) error {
	p.Stop()
	p.client.CloseIdleConnections()
	return p.start(ctx)
}

// Log is what the provider wrote on its standard error since it started.
func (p *IdP) Log() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.proc.stderr.String()
}

func (p *IdP) start(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	cfg, err := json.Marshal(p.settings())
	if err != nil {
		return fmt.Errorf("encode configuration: %w", err)
	}
	proc, ready, err := launch(ctx, string(cfg))
	if err != nil {
		return err
	}
	// After a restart these are the same values, so readers need no lock.
	if p.proc == nil {
		p.Issuer, p.Control, p.Resource, p.Clients = ready.Issuer, ready.Control, ready.Resource, ready.Clients
	}
	p.proc = proc
	return nil
}

// settings is the configuration as idp.mjs takes it; what is left out has its
// default there.
func (p *IdP) settings() map[string]any {
	c := p.cfg
	s := map[string]any{"port": c.Port}
	if p.proc != nil {
		s["port"], s["control_port"] = portOf(p.Issuer), portOf(p.Control)
	}
	set := func(key string, value any, given bool) {
		if given {
			s[key] = value
		}
	}
	set("resource", c.Resource, c.Resource != "")
	set("interval", c.Interval.Seconds(), c.Interval != 0)
	set("interval", 0, c.NoInterval)
	set("tolerance", c.Tolerance.Seconds(), c.Tolerance != 0)
	set("expires_in", c.ExpiresIn.Seconds(), c.ExpiresIn != 0)
	set("max_expires_in", c.MaxExpiresIn.Seconds(), c.MaxExpiresIn != 0)
	set("token_ttl", c.TokenTTL.Seconds(), c.TokenTTL != 0)
	set("signing_alg", c.SigningAlg, c.SigningAlg != "")
	set("binding_message_max", c.BindingMessageMax, c.BindingMessageMax != 0)
	set("binding_message_pattern", c.BindingMessagePattern, c.BindingMessagePattern != "")
	set("users", c.Users, c.Users != nil)
	set("clients", c.Clients, c.Clients != nil)
	set("redirect_uris", c.RedirectURIs, c.RedirectURIs != nil)
	set("default_user", c.DefaultUser, c.DefaultUser != "")
	set("authorization_details_types", c.AuthorizationDetailsTypes, c.AuthorizationDetailsTypes != nil)
	set("ping", c.Ping, c.Ping != nil)
	set("exchange", c.Exchange, c.Exchange != nil)
	return s
}

func portOf(address string) int {
	u, err := url.Parse(address)
	if err != nil {
		return 0
	}
	port, err := net.LookupPort("tcp", u.Port())
	if err != nil {
		return 0
	}
	return port
}

// call asks the control API. A nil body is a GET.
func (p *IdP) call(ctx context.Context, path string, body, out any) error {
	method, content := http.MethodGet, []byte(nil)
	if body != nil {
		var err error
		if content, err = json.Marshal(body); err != nil {
			return fmt.Errorf("encode control request: %w", err)
		}
		method = http.MethodPost
	}
	req, err := http.NewRequestWithContext(ctx, method, p.Control+path, bytes.NewReader(content))
	if err != nil {
		return fmt.Errorf("control request: %w", err)
	}
	status, answer, err := p.do(p.client, req)
	if err != nil {
		return err
	}
	if status != http.StatusOK {
		var problem struct{ Error string }
		_ = json.Unmarshal(answer, &problem)
		return fmt.Errorf("control %s %s: %d %s", method, path, status, problem.Error)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(answer, out); err != nil {
		return fmt.Errorf("decode control answer of %s: %w", path, err)
	}
	return nil
}

// do returns the status and the whole body.
func (p *IdP) do(client *http.Client, req *http.Request) (status int, body []byte, err error) {
	res, err := client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer res.Body.Close()
	body, err = io.ReadAll(res.Body)
	if err != nil {
		return 0, nil, fmt.Errorf("read %s %s: %w", req.Method, req.URL.Path, err)
	}
	return res.StatusCode, body, nil
}

// post sends a form as a client that authenticates by client_secret_basic, and
// decodes a JSON answer of 200; any other status is an *[OAuthError].
func (p *IdP) post(ctx context.Context, path, client string, form url.Values, out any) error {
	secret, ok := p.Clients[client]
	if !ok {
		return fmt.Errorf("no client %q at the provider", client)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.Issuer+path, strings.NewReader(form.Encode()))
	if err != nil {
		return fmt.Errorf("request to %s: %w", path, err)
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	// RFC 6749 §2.3.1 wants both encoded before they are joined.
	req.SetBasicAuth(url.QueryEscape(client), url.QueryEscape(secret))
	status, body, err := p.do(p.client, req)
	if err != nil {
		return err
	}
	if status != http.StatusOK {
		fail := &OAuthError{Status: status}
		if err := json.Unmarshal(body, fail); err != nil {
			return errors.Join(fail, fmt.Errorf("decode error answer of %s: %w", path, err))
		}
		return fail
	}
	if err := json.Unmarshal(body, out); err != nil {
		return fmt.Errorf("decode answer of %s: %w", path, err)
	}
	return nil
}

// OAuthError is an error answer of the provider.
type OAuthError struct {
	Status      int    `json:"-"`
	Code        string `json:"error"`
	Description string `json:"error_description"`
}

func (e *OAuthError) Error() string {
	return fmt.Sprintf("provider answered %d %s: %s", e.Status, e.Code, e.Description)
}
