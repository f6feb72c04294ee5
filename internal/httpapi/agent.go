package httpapi

import (
	"fmt"
	"maps"
	"net/http"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/writsec/writ/internal/decision"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/intent"
	"github.com/writsec/writ/internal/session"
)

// decideBody is the request of /decide.
type decideBody struct {
	SubjectToken *string         `json:"subject_token"`
	Session      *string         `json:"session"`
	Intent       intent.Intent   `json:"intent"`
	Resource     intent.Resource `json:"resource"`
	Context      map[string]any  `json:"context"`
	Approval     *string         `json:"approval"`
}

func (b decideBody) request() (q decision.Request, err error) {
	q = decision.Request{Intent: b.Intent, Resource: b.Resource, Context: b.Context}
	if q.Presented.Subject, err = optional("/subject_token", b.SubjectToken); err != nil {
		return q, err
	}
	if q.Session, err = optional("/session", b.Session); err != nil {
		return q, err
	}
	if q.Approval, err = optional("/approval", b.Approval); err != nil {
		return q, err
	}
	if err := b.Intent.Check(); err != nil {
		return q, err
	}
	return q, b.Resource.Check()
}

func (a *API) decide(w http.ResponseWriter, r *http.Request) error {
	token, err := a.bearer(r)
	if err != nil {
		return err
	}
	var b decideBody
	if err := readJSON(w, r, &b); err != nil {
		return err
	}
	q, err := b.request()
	if err != nil {
		return err
	}
	token.Subject = q.Presented.Subject
	q.Presented, q.IP = token, a.callerIP(r)
	if q.IdempotencyKey, err = idempotencyKey(r); err != nil {
		return err
	}
	if q.Wait, err = preferWait(r, a.MaxWait); err != nil {
		return err
	}
	answer, err := a.Decider.Decide(r.Context(), q)
	if err != nil {
		if fault.Is(err, fault.InvalidToken) {
			a.Metrics.TokensRefused.WithLabelValues("agent").Inc()
		}
		return err
	}
	if q.Wait > 0 {
		w.Header().Set("Preference-Applied", fmt.Sprintf("wait=%d", int(q.Wait.Seconds())))
	}
	return writeJSON(w, http.StatusOK, answer)
}

func (a *API) getApproval(w http.ResponseWriter, r *http.Request) error {
	c, err := a.caller(r)
	if err != nil {
		return err
	}
	wait, err := queryWait(r, a.MaxWait)
	if err != nil {
		return err
	}
	got, err := a.Approvals.Wait(r.Context(), chi.URLParam(r, "id"), c, wait)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, decision.ViewOf(got))
}

func (a *API) withdrawApproval(w http.ResponseWriter, r *http.Request) error {
	c, err := a.caller(r)
	if err != nil {
		return err
	}
	got, err := a.Approvals.Withdraw(r.Context(), chi.URLParam(r, "id"), c)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, decision.ViewOf(got))
}

// sessionBody is the request of POST /sessions.
type sessionBody struct {
	SubjectToken *string       `json:"subject_token"`
	Task         string        `json:"task"`
	Envelope     *envelopeBody `json:"envelope"`
	ExpiresIn    *int          `json:"expires_in"` // seconds
	RedirectURI  *string       `json:"redirect_uri"`
	State        *string       `json:"state"`
	SignIn       *signInBody   `json:"sign_in"`
}

type envelopeBody struct {
	Actions   []string                  `json:"actions"`
	Resources []session.ResourcePattern `json:"resources"`
	Limits    map[string]int64          `json:"limits"`
}

func (b envelopeBody) envelope() session.Envelope {
	return session.Envelope{Actions: b.Actions, Resources: b.Resources, Limits: b.Limits}
}

func (a *API) openSession(w http.ResponseWriter, r *http.Request) error {
	if _, err := a.bearer(r); err != nil {
		return err
	}
	var b sessionBody
	if err := readJSON(w, r, &b); err != nil {
		return err
	}
	q, err := a.sessionRequest(b)
	if err != nil {
		return err
	}
	c, err := a.callerWith(r, q.subject)
	if err != nil {
		return err
	}
	var s session.Session
	switch {
	case b.SignIn != nil:
		s, err = a.completeSignIn(r, c, *b.SignIn)
	case c.User == nil && a.SignIns != nil:
		return a.openSignIn(w, r, c, q)
	case q.redirectURI != "" || q.state != "":
		return errNoSignIn
	default:
		s, err = a.Sessions.Open(r.Context(), c, q.spec)
	}
	if err != nil {
		return err
	}
	w.Header().Set("Location", "/sessions/"+s.ID)
	return writeJSON(w, http.StatusCreated, viewSession(s, true))
}

func (a *API) getSession(w http.ResponseWriter, r *http.Request) error {
	c, err := a.caller(r)
	if err != nil {
		return err
	}
	s, alive, err := a.Sessions.Get(r.Context(), c, chi.URLParam(r, "id"))
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, viewSession(s, alive))
}

func (a *API) endSession(w http.ResponseWriter, r *http.Request) error {
	c, err := a.caller(r)
	if err != nil {
		return err
	}
	s, err := a.Revoker.EndSession(r.Context(), c, chi.URLParam(r, "id"))
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, viewSession(s, false))
}

// sessionView is a session as its agent sees it.
type sessionView struct {
	Session   string            `json:"session"`
	Status    string            `json:"status"`
	User      identity.Ref      `json:"user"`
	Agent     identity.Ref      `json:"agent"`
	Task      *session.Task     `json:"task,omitempty"`
	Envelope  *session.Envelope `json:"envelope,omitempty"`
	StartedAt time.Time         `json:"started_at"`
	EndsAt    time.Time         `json:"ends_at"`
	IdleAt    *time.Time        `json:"idle_at,omitempty"`
	Labels    []string          `json:"labels"`
	Counters  map[string]int64  `json:"counters"`
	EndReason string            `json:"end_reason,omitempty"`
}

func viewSession(s session.Session, alive bool) sessionView {
	v := sessionView{
		Session: s.ID, Status: "active", User: s.User.Ref, Agent: s.Agent, Task: s.Task, Envelope: s.Envelope,
		StartedAt: s.StartedAt, EndsAt: s.EndsAt, EndReason: s.EndReason, Labels: []string{}, Counters: map[string]int64{},
	}
	if !s.IdleAt.IsZero() {
		v.IdleAt = &s.IdleAt
	}
	v.Labels = append(v.Labels, s.Labels...)
	maps.Copy(v.Counters, s.Counters)
	if !alive {
		v.Status = "ended"
	}
	return v
}

// outcomeBody is the request of POST /decisions/{id}/outcome.
type outcomeBody struct {
	Outcome string  `json:"outcome"`
	Code    *string `json:"code"`
}

func (a *API) reportOutcome(w http.ResponseWriter, r *http.Request) error {
	c, err := a.caller(r)
	if err != nil {
		return err
	}
	var b outcomeBody
	if err := readJSON(w, r, &b); err != nil {
		return err
	}
	report := decision.Report{Outcome: decision.Outcome(b.Outcome)}
	if report.Code, err = optional("/code", b.Code); err != nil {
		return err
	}
	got, err := a.Decider.Report(r.Context(), c, chi.URLParam(r, "id"), report)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, struct {
		DecisionID string `json:"decision_id"`
		Outcome    string `json:"outcome"`
	}{got.ID, got.Outcome})
}
