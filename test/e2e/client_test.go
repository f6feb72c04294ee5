package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/writsec/writ/test/idp"
)

// client calls Writ with one bearer token.
type client struct {
	w     *writ
	token string
}

// as is the agent's client with a token that names the user too.
func (w *writ) as(user, agent string) client {
	w.t.Helper()
	token, _, err := w.idp.UserToken(w.t.Context(), user, agent)
	if err != nil {
		w.t.Fatal(err)
	}
	return client{w, token}
}

func agentToken(t testing.TB, p *idp.IdP, agent string) string {
	t.Helper()
	token, err := p.AgentToken(t.Context(), agent)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

type response struct {
	status int
	header http.Header
	body   []byte
}

// try calls with the header given as pairs; it may run on any goroutine.
func (c client) try(method, target string, body any, header ...string) (response, error) {
	var content io.Reader = http.NoBody
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return response{}, err
		}
		content = bytes.NewReader(data)
	}
	if strings.HasPrefix(target, "/") {
		target = c.w.url + target
	}
	req, err := http.NewRequestWithContext(c.w.t.Context(), method, target, content)
	if err != nil {
		return response{}, err
	}
	req.Header.Set("Content-Type", "application/json")
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := c.w.http.Do(req)
	if err != nil {
		return response{}, err
	}
	defer res.Body.Close()
	data, err := io.ReadAll(res.Body)
	return response{res.StatusCode, res.Header, data}, err
}

func (c client) call(method, target string, body any, header ...string) response {
	c.w.t.Helper()
	r, err := c.try(method, target, body, header...)
	if err != nil {
		c.w.t.Fatal(err)
	}
	return r
}

// read decodes a body of the status wanted.
func read[T any](t testing.TB, r response, status int) (v T) {
	t.Helper()
	if r.status != status {
		t.Fatalf("answered %d, want %d: %s", r.status, status, r.body)
	}
	if err := json.Unmarshal(r.body, &v); err != nil {
		t.Fatalf("decode %s: %v", r.body, err)
	}
	return v
}

// question is the body of /decide.
type question struct {
	SubjectToken string         `json:"subject_token,omitempty"`
	Session      string         `json:"session,omitempty"`
	Intent       intent         `json:"intent"`
	Resource     resource       `json:"resource"`
	Context      map[string]any `json:"context,omitempty"`
	Approval     string         `json:"approval,omitempty"`
}

type intent struct {
	Action     string         `json:"action"`
	Parameters map[string]any `json:"parameters,omitempty"`
	Purpose    string         `json:"purpose,omitempty"`
}

type resource struct {
	Type string `json:"type"`
	ID   string `json:"id"`
}

// q is a question without parameters.
func q(session, action, kind, id string) question {
	return question{Session: session, Intent: intent{Action: action}, Resource: resource{kind, id}}
}

func readOpportunity(session string) question {
	return q(session, "crm.opportunity.read", "crm.opportunity", "opp-42")
}

func offboard(session, employee string) question {
	return q(session, "hr.employee.offboard", "hr.employee", employee)
}

func (q question) approvedBy(a *approval) question {
	q.Approval = a.ID
	return q
}

type answer struct {
	DecisionID string         `json:"decision_id"`
	Decision   string         `json:"decision"`
	Session    string         `json:"session"`
	Reasons    []reason       `json:"reasons"`
	Credential *credential    `json:"credential"`
	Approval   *approval      `json:"approval"`
	Advice     map[string]any `json:"advice"`
	Policy     struct{ Revision, Digest string }
}

type reason struct{ Code, Message string }

type credential struct {
	Lease        string
	Kind         string
	ExpiresAt    time.Time `json:"expires_at"`
	Revocability string
	Precision    string
	Scope        map[string]any
	Secret       struct{ Token string }
}

type approval struct {
	ID        string
	Status    string
	Code      string
	Reason    string
	ExpiresAt time.Time `json:"expires_at"`
}

// problem is RFC 9457.
type problem struct {
	Type      string
	Status    int
	Code      string
	Detail    string
	RequestID string `json:"request_id"`
}

func (c client) decide(q question, header ...string) answer {
	c.w.t.Helper()
	return read[answer](c.w.t, c.call(http.MethodPost, "/decide", q, header...), http.StatusOK)
}

// must decides and fails unless effect and first reason are these. An allow has a
// credential, a require_ciba an approval, and nothing else has either.
func (c client) must(effect, code string, q question, header ...string) answer {
	c.w.t.Helper()
	a := c.decide(q, header...)
	if a.Decision != effect || len(a.Reasons) == 0 || a.Reasons[0].Code != code {
		c.w.t.Fatalf("got %s %v, want %s %s", a.Decision, a.Reasons, effect, code)
	}
	if (a.Credential != nil) != (effect == allow) || (a.Approval != nil) != (effect == requireCIBA) {
		c.w.t.Fatalf("%s with credential %v and approval %v", effect, a.Credential != nil, a.Approval != nil)
	}
	return a
}

const (
	allow       = "allow"
	deny        = "deny"
	requireCIBA = "require_ciba"
)

// refused fails unless the answer is a problem of the status and code.
func (c client) refused(r response, status int, code string) problem {
	c.w.t.Helper()
	p := read[problem](c.w.t, r, status)
	if p.Code != code || p.Status != status || !strings.HasSuffix(p.Type, "#"+code) || p.Detail == "" {
		c.w.t.Fatalf("got the problem %+v, want %s", p, code)
	}
	if got := r.header.Get("Content-Type"); got != "application/problem+json" {
		c.w.t.Errorf("a problem of type %s", got)
	}
	return p
}

// open opens a session and returns its id.
func (c client) open() string {
	c.w.t.Helper()
	s := read[struct{ Session string }](c.w.t, c.call(http.MethodPost, "/sessions", map[string]any{"task": "Test"}), http.StatusCreated)
	return s.Session
}

// status looks at an approval, and waits for its end if wait is not zero.
func (c client) status(a *approval, wait time.Duration) approval {
	c.w.t.Helper()
	return read[approval](c.w.t, c.call(http.MethodGet, "/approvals/"+a.ID+"?wait="+wait.String(), nil), http.StatusOK)
}

// held is a call that runs until it is answered.
type held struct {
	response
	err error
}

// hold asks with Prefer: wait.
func (c client) hold(q question, seconds int) <-chan held {
	out := make(chan held, 1)
	go func() {
		r, err := c.try(http.MethodPost, "/decide", q, "Prefer", fmt.Sprintf("wait=%d", seconds))
		out <- held{r, err}
	}()
	return out
}

// introspect asks as the resource server of one minter (RFC 7662).
func (w *writ) introspect(minter, token string) map[string]any {
	w.t.Helper()
	r := w.introspectAs(minter+"-api", secretOf(minter), token)
	return read[map[string]any](w.t, r, http.StatusOK)
}

func (w *writ) introspectAs(id, secret, token string) response {
	w.t.Helper()
	form := url.Values{"token": {token}}
	req, err := http.NewRequestWithContext(w.t.Context(), http.MethodPost, w.url+"/introspect", strings.NewReader(form.Encode()))
	if err != nil {
		w.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.SetBasicAuth(id, secret)
	res, err := w.http.Do(req)
	if err != nil {
		w.t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return response{res.StatusCode, res.Header, body}
}

func (w *writ) active(minter, token string) bool {
	w.t.Helper()
	return w.introspect(minter, token)["active"] == true
}

// about reports whether a prompt is about a resource, and from this installation: the
// provider may remember more than one run of a test.
func (w *writ) about(p idp.Prompt, id string) bool {
	return strings.Contains(p.BindingMessage, `"`+id+`"`) && !p.CreatedAt.Before(w.since)
}

// prompt waits for the prompt about a resource.
func (w *writ) prompt(id string) idp.Prompt {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 20*time.Second)
	defer cancel()
	p, err := w.idp.WaitPrompt(ctx, func(p idp.Prompt) bool { return w.about(p, id) })
	if err != nil {
		w.t.Fatal(err)
	}
	return p
}

// prompts counts the prompts about a resource.
func (w *writ) prompts(id string) int {
	w.t.Helper()
	all, err := w.idp.Prompts(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	n := 0
	for _, p := range all {
		if w.about(p, id) {
			n++
		}
	}
	return n
}

func (w *writ) answer(p idp.Prompt, v idp.Verdict) {
	w.t.Helper()
	if err := w.idp.Answer(w.t.Context(), p.ID, v); err != nil {
		w.t.Fatal(err)
	}
}

// polls lists the polls for a prompt and fails if two of them overlapped or were
// closer than the provider's interval of one second.
func (w *writ) polls(p idp.Prompt) []idp.Poll {
	w.t.Helper()
	all, err := w.idp.Polls(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	var polls []idp.Poll
	for _, poll := range all {
		if poll.Prompt != p.ID {
			continue
		}
		if poll.Overlap {
			w.t.Errorf("poll %d overlaps the one before", len(polls))
		}
		if len(polls) > 0 && poll.GapMS < 1000 {
			w.t.Errorf("poll %d came %d ms after the one before; the interval is 1 s", len(polls), poll.GapMS)
		}
		polls = append(polls, poll)
	}
	return polls
}

// polled waits for the first n polls.
func (w *writ) polled(p idp.Prompt, n int) []idp.Poll {
	w.t.Helper()
	var polls []idp.Poll
	within(w.t, 20*time.Second, func() error {
		if polls = w.polls(p); len(polls) < n {
			return fmt.Errorf("%d polls, want %d", len(polls), n)
		}
		return nil
	})
	return polls
}
