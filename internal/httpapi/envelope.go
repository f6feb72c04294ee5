package httpapi

import (
	"fmt"
	"net/http"

	"github.com/go-chi/chi/v5"

	"github.com/writsec/writ/internal/decision"
	"github.com/writsec/writ/internal/fault"
)

// changeBody is the request of POST /sessions/{id}/envelope.
type changeBody struct {
	SubjectToken *string       `json:"subject_token"`
	Envelope     *envelopeBody `json:"envelope"`
	Approval     *string       `json:"approval"`
}

func (b changeBody) request() (q decision.EnvelopeRequest, err error) {
	if b.Envelope == nil {
		return q, fault.Invalid("/envelope", "is missing")
	}
	q.Envelope = b.Envelope.envelope()
	if q.Presented.Subject, err = optional("/subject_token", b.SubjectToken); err != nil {
		return q, err
	}
	q.Approval, err = optional("/approval", b.Approval)
	return q, err
}

// changeEnvelope narrows a session's envelope at once, or asks to widen it.
func (a *API) changeEnvelope(w http.ResponseWriter, r *http.Request) error {
	p, err := a.bearer(r)
	if err != nil {
		return err
	}
	var b changeBody
	if err := readJSON(w, r, &b); err != nil {
		return err
	}
	q, err := b.request()
	if err != nil {
		return err
	}
	p.Subject = q.Presented.Subject
	q.Presented, q.Session, q.IP = p, chi.URLParam(r, "id"), a.callerIP(r)
	if q.Wait, err = preferWait(r, a.MaxWait); err != nil {
		return err
	}
	got, err := a.Decider.Envelope(r.Context(), q)
	if err != nil {
		if fault.Is(err, fault.InvalidToken) {
			a.Metrics.TokensRefused.WithLabelValues("agent").Inc()
		}
		return err
	}
	if q.Wait > 0 {
		w.Header().Set("Preference-Applied", fmt.Sprintf("wait=%d", int(q.Wait.Seconds())))
	}
	return writeJSON(w, http.StatusOK, struct {
		Decision *decision.Answer `json:"decision,omitempty"`
		Session  sessionView      `json:"session"`
	}{got.Decision, viewSession(got.Session, got.Alive)})
}
