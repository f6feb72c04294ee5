// Package ciba is a client of OpenID Connect Client-Initiated Backchannel
// Authentication Core 1.0 in poll mode. It makes single calls and reports what
// became of each; when to call, and what a result means for an approval, is the
// approval package's business.
package ciba

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/writsec/writ/internal/approval"
	"github.com/writsec/writ/internal/identity"
)

// Config makes a Client.
type Config struct {
	Issuer       string
	ClientID     string
	ClientSecret string
	// AuthInBody sends the client's credentials as client_secret_post, not _basic.
	AuthInBody bool
	// LoginHint is a template; {name} stands for a string claim of the user's token.
	LoginHint string
	Limits    approval.Limits
	// PollTimeout bounds a poll, which a provider may hold (CIBA Core §10.1).
	PollTimeout time.Duration
	HTTP        *http.Client // made by identity.NewHTTPClient, with a timeout of at least PollTimeout
	Verifier    *identity.Verifier
}

// startTimeout bounds every call but a poll.
const startTimeout = 15 * time.Second

// Client talks to one provider.
type Client struct {
	cfg Config

	mu        sync.Mutex
	endpoints *endpoints // once discovered
}

type endpoints struct {
	Backchannel string `json:"backchannel_authentication_endpoint"`
	Token       string `json:"token_endpoint"`
	Revocation  string `json:"revocation_endpoint"`
}

// New makes a client. The provider is first contacted when there is something to ask.
func New(cfg Config) *Client { return &Client{cfg: cfg} }

// Limits implements approval.Provider.
func (c *Client) Limits() approval.Limits { return c.cfg.Limits }

// Timeout implements approval.Provider.
func (c *Client) Timeout() time.Duration { return max(c.cfg.PollTimeout, startTimeout) }

// discover finds the endpoints, once. A failure is not remembered.
func (c *Client) discover(ctx context.Context) (endpoints, error) {
	c.mu.Lock()
	known := c.endpoints
	c.mu.Unlock()
	if known != nil {
		return *known, nil
	}
	var e endpoints
	if err := identity.Discover(ctx, c.cfg.HTTP, c.cfg.Issuer, &e); err != nil {
		return e, err
	}
	for name, url := range map[string]string{"backchannel_authentication_endpoint": e.Backchannel, "token_endpoint": e.Token} {
		if !identity.Trustworthy(c.cfg.Issuer, url) { // our client secret goes there
			return e, fmt.Errorf("discover: the metadata names no https %s", name)
		}
	}
	if !identity.Trustworthy(c.cfg.Issuer, e.Revocation) {
		e.Revocation = ""
	}
	c.mu.Lock()
	c.endpoints = &e
	c.mu.Unlock()
	return e, nil
}

// response is an answer of the provider, whatever its status.
type response struct {
	status     int
	retryAfter time.Duration
	body       []byte
}

// unusable says that the response is neither an answer nor an OAuth error.
func (r response) unusable() error {
	return fmt.Errorf("the provider answered with status %d", r.status)
}

// post sends a form as the configured client. sent says whether the provider may
// have got it: there was a connection, with TLS set up, to send it on.
func (c *Client) post(ctx context.Context, endpoint string, form url.Values) (r response, sent bool, err error) {
	if c.cfg.AuthInBody {
		form.Set("client_id", c.cfg.ClientID)
		form.Set("client_secret", c.cfg.ClientSecret)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, endpoint, strings.NewReader(form.Encode()))
	if err != nil {
		return r, false, err
	}
	if !c.cfg.AuthInBody { // RFC 6749 §2.3.1: both parts are form-encoded first
		req.SetBasicAuth(url.QueryEscape(c.cfg.ClientID), url.QueryEscape(c.cfg.ClientSecret))
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Accept", "application/json")
	var connected atomic.Bool
	req = req.WithContext(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) { connected.Store(true) },
	}))
	res, err := c.cfg.HTTP.Do(req)
	if err != nil {
		return r, connected.Load(), fmt.Errorf("call %s: %w", endpoint, scrub(err))
	}
	defer res.Body.Close()
	r.status = res.StatusCode
	r.retryAfter = retryAfter(res.Header.Get("Retry-After"))
	r.body, err = io.ReadAll(res.Body)
	if err != nil {
		return r, true, fmt.Errorf("read answer of %s: %w", endpoint, err)
	}
	return r, true, nil
}

// scrub drops the URL that *url.Error repeats.
func scrub(err error) error {
	if u, ok := errors.AsType[*url.Error](err); ok {
		return u.Err
	}
	return err
}

// retryAfter reads the header (RFC 9110 §10.2.3), bounded.
func retryAfter(h string) time.Duration {
	const most = 24 * time.Hour
	if n, err := strconv.ParseUint(h, 10, 32); err == nil {
		return min(time.Duration(n)*time.Second, most)
	}
	if t, err := http.ParseTime(h); err == nil {
		return min(max(time.Until(t), 0), most)
	}
	return 0
}

// oauthError is RFC 6749 §5.2. Descriptions are the provider's text and not kept.
type oauthError struct {
	Code     string  `json:"error"`
	Interval seconds `json:"interval"` // some providers say it with slow_down
}

// seconds is a number of seconds that some providers write as a string; null is as
// good as absent.
type seconds int64

func (s *seconds) UnmarshalJSON(b []byte) error {
	if string(b) == "null" {
		return nil
	}
	f, err := strconv.ParseFloat(strings.Trim(string(b), `"`), 64)
	if err != nil || f != f || f > 1<<31 || f < -(1<<31) {
		return errors.New("is not a number of seconds")
	}
	*s = seconds(f)
	return nil
}

func (s seconds) duration() time.Duration { return time.Duration(s) * time.Second }

// errorCode reads an OAuth error out of a response; "" if there is none. The code
// is cut to what is safe to store and log.
func errorCode(r response) (code string, interval time.Duration) {
	var e oauthError
	if json.Unmarshal(r.body, &e) != nil {
		return "", 0
	}
	if len(e.Code) > 64 || strings.ContainsFunc(e.Code, func(c rune) bool { return c < '!' || c > '~' }) {
		return "", 0
	}
	return e.Code, e.Interval.duration()
}
