// Package client is the Go client of Writ's HTTP API, for agents. An agent asks
// Decide before it acts, uses the credential that comes back, and releases it:
//
//	w := client.New("https://writ.example", client.StaticToken(accessToken))
//	s, err := w.OpenSession(ctx, client.SessionRequest{Task: "Summarise the pipeline"})
//	...
//	d, err := w.Decide(ctx, client.Request{
//		Session:  s.ID,
//		Intent:   client.Intent{Action: "crm.opportunity.read"},
//		Resource: client.Resource{Type: "crm.opportunity", ID: "opp-42"},
//		Wait:     time.Minute, // for a human, where policy asks for one
//	})
//	...
//	if d.Effect != client.Allow || d.Credential == nil {
//		return fmt.Errorf("not allowed: %v", d.Reasons)
//	}
//	defer w.Release(ctx, d.Credential.Lease)
package client

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// TokenSource returns the agent's access token for Writ, fresh enough to use.
type TokenSource func(ctx context.Context) (string, error)

// StaticToken is a TokenSource that always returns t.
func StaticToken(t string) TokenSource {
	return func(context.Context) (string, error) { return t, nil }
}

// Client calls one Writ. Its methods may be called in parallel.
type Client struct {
	base  string
	token TokenSource
	// HTTP makes the calls; New sets one without a timeout, because held requests
	// end by their own wait and by the context.
	HTTP *http.Client
}

// New makes a client of the Writ at base, such as https://writ.example.
func New(base string, token TokenSource) *Client {
	return &Client{base: strings.TrimSuffix(base, "/"), token: token, HTTP: &http.Client{}}
}

// maxAnswer bounds what is read of an answer.
const maxAnswer = 1 << 20

// Error is a problem that Writ answered with (RFC 9457): no decision was reached.
type Error struct {
	Status     int           `json:"status"`
	Code       string        `json:"code"` // stable; docs/errors.md explains each
	Title      string        `json:"title"`
	Detail     string        `json:"detail"`
	Errors     []FieldError  `json:"errors"`
	RequestID  string        `json:"request_id"`
	RetryAfter time.Duration `json:"-"` // zero: not said
}

// FieldError is one part of a request that is wrong.
type FieldError struct {
	Pointer string `json:"pointer"`
	Detail  string `json:"detail"`
}

func (e *Error) Error() string {
	s := fmt.Sprintf("writ: %s: %s", e.Code, e.Detail)
	for _, f := range e.Errors {
		s += fmt.Sprintf("; %s %s", f.Pointer, f.Detail)
	}
	return s
}

// call makes one request. body and out may be nil.
func (c *Client) call(ctx context.Context, method, path string, header http.Header, body, out any) error {
	token, err := c.token(ctx)
	if err != nil {
		return fmt.Errorf("get token: %w", err)
	}
	var payload io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return fmt.Errorf("encode request: %w", err)
		}
		payload = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, payload)
	if err != nil {
		return err
	}
	for k, v := range header {
		req.Header[k] = v
	}
	if _, keyed := req.Header["Idempotency-Key"]; !keyed && (method == http.MethodDelete || strings.HasSuffix(path, "/outcome")) {
		req.Header["X-Idempotency-Key"] = nil // not sent: it tells net/http that once more does no harm
	}
	req.Header.Set("Authorization", "Bearer "+token)
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := c.HTTP.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	data, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("read answer: %w", err)
	}
	if res.StatusCode >= 300 {
		return problem(res, data)
	}
	if err := json.Unmarshal(data, out); err != nil {
		return fmt.Errorf("read answer: %w", err)
	}
	return nil
}

func problem(res *http.Response, data []byte) error {
	e := &Error{}
	if json.Unmarshal(data, e) != nil || e.Code == "" {
		return fmt.Errorf("writ answered %s", res.Status)
	}
	e.Status = res.StatusCode
	if d, err := time.ParseDuration(res.Header.Get("Retry-After") + "s"); err == nil {
		e.RetryAfter = d
	}
	return e
}

// Decide asks whether the agent may do what it intends. A retry after a failed
// connection is safe: each call has its own Idempotency-Key unless the request
// brings one. An error means that no decision was reached: do not act.
func (c *Client) Decide(ctx context.Context, r Request) (*Decision, error) {
	key := r.IdempotencyKey
	if key == "" {
		key = rand.Text()
	}
	h := http.Header{"Idempotency-Key": {key}}
	if r.Wait > 0 {
		h.Set("Prefer", fmt.Sprintf("wait=%d", wholeSeconds(r.Wait)))
	}
	const tries = 3 // a connection may break before the answer, or in it
	for n := 1; ; n++ {
		d := new(Decision)
		err := c.call(ctx, http.MethodPost, "/decide", h, r, d)
		if err == nil {
			return d, nil
		}
		_, connection := errors.AsType[*url.Error](err)
		if broken := connection || errors.Is(err, io.ErrUnexpectedEOF); !broken || ctx.Err() != nil || n == tries {
			return nil, err
		}
	}
}

// Approval returns the state of an approval, as soon as it is decided or after wait.
func (c *Client) Approval(ctx context.Context, id string, wait time.Duration) (*Approval, error) {
	a := new(Approval)
	return a, c.call(ctx, http.MethodGet, fmt.Sprintf("/approvals/%s?wait=%ds", url.PathEscape(id), wholeSeconds(wait)), nil, nil, a)
}

// wholeSeconds rounds up: a short wait is still one.
func wholeSeconds(d time.Duration) int { return int((d + time.Second - 1) / time.Second) }

// Withdraw takes an approval back that is not used yet.
func (c *Client) Withdraw(ctx context.Context, id string) (*Approval, error) {
	a := new(Approval)
	return a, c.call(ctx, http.MethodDelete, "/approvals/"+url.PathEscape(id), nil, nil, a)
}

// OpenSession opens a session for the user that the tokens name. Where they name none,
// and users can sign in at Writ, the error is a *SignInRequired.
func (c *Client) OpenSession(ctx context.Context, r SessionRequest) (*Session, error) {
	var answer struct {
		Session
		SignIn *SignInRequired `json:"sign_in"`
	}
	if err := c.call(ctx, http.MethodPost, "/sessions", nil, r, &answer); err != nil {
		return nil, err
	}
	if answer.SignIn != nil {
		return nil, answer.SignIn
	}
	return &answer.Session, nil
}

// Session returns a session.
func (c *Client) Session(ctx context.Context, id string) (*Session, error) {
	s := new(Session)
	return s, c.call(ctx, http.MethodGet, "/sessions/"+url.PathEscape(id), nil, nil, s)
}

// ChangeEnvelope gives a session another envelope: at once if it narrows, and otherwise
// once its user has approved it.
func (c *Client) ChangeEnvelope(ctx context.Context, id string, r EnvelopeRequest) (*EnvelopeAnswer, error) {
	r.Envelope.Source = ""
	h := http.Header{}
	if r.Wait > 0 {
		h.Set("Prefer", fmt.Sprintf("wait=%d", wholeSeconds(r.Wait)))
	}
	a := new(EnvelopeAnswer)
	return a, c.call(ctx, http.MethodPost, "/sessions/"+url.PathEscape(id)+"/envelope", h, r, a)
}

// EndSession ends a session and revokes every credential in it.
func (c *Client) EndSession(ctx context.Context, id string) (*Session, error) {
	s := new(Session)
	return s, c.call(ctx, http.MethodDelete, "/sessions/"+url.PathEscape(id), nil, nil, s)
}

// Lease returns a lease of the agent's own, without its secret.
func (c *Client) Lease(ctx context.Context, id string) (*Lease, error) {
	l := new(Lease)
	return l, c.call(ctx, http.MethodGet, "/leases/"+url.PathEscape(id), nil, nil, l)
}

// Renew asks again about the act of a lease and, on an allow, makes its credential good
// for longer; the answer has it. The request repeats the act; the session is that of the
// lease, and what a person approved can't be renewed. It is not repeated where a
// connection fails: the credential is good for as long as it was, at least.
func (c *Client) Renew(ctx context.Context, lease string, r Request) (*Decision, error) {
	r.Session, r.Approval = "", ""
	d := new(Decision)
	if err := c.call(ctx, http.MethodPost, "/leases/"+url.PathEscape(lease)+"/renew", nil, r, d); err != nil {
		return nil, err
	}
	return d, nil
}

// Release gives a credential back: it is over at once, and "revoked" once its end was
// seen at its target. Until then it is "revoking".
func (c *Client) Release(ctx context.Context, lease string) (*Lease, error) {
	l := new(Lease)
	return l, c.call(ctx, http.MethodDelete, "/leases/"+url.PathEscape(lease), nil, nil, l)
}

// Report says what became of an allowed act: "succeeded", "failed" or "unknown". code
// is the target's own word for it, such as "http_503", or "".
func (c *Client) Report(ctx context.Context, decision, outcome, code string) error {
	body := struct {
		Outcome string `json:"outcome"`
		Code    string `json:"code,omitempty"`
	}{outcome, code}
	return c.call(ctx, http.MethodPost, "/decisions/"+url.PathEscape(decision)+"/outcome", nil, body, &struct{}{})
}
