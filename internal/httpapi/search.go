package httpapi

import (
	"context"
	"net/http"
	"time"

	"github.com/writsec/writ/internal/decision"
	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/policy"
	"github.com/writsec/writ/internal/revocation"
	"github.com/writsec/writ/internal/session"
)

// SearchStore finds records for operators.
type SearchStore interface {
	View(ctx context.Context, f func(SearchTx) error) error
}

// SearchTx is what searching needs of a transaction. Lists of searches are newest first.
type SearchTx interface {
	Now() time.Time
	Sessions(ctx context.Context, q session.Query) ([]session.Session, error)
	Decisions(ctx context.Context, q decision.Query) ([]decision.Record, error)
	Leases(ctx context.Context, q lease.Query) ([]lease.Lease, error)
	// Orphans lists those of a minter, or of all where it is "".
	Orphans(ctx context.Context, minter string) ([]lease.Orphan, error)
	Revocations(ctx context.Context, q revocation.Query) ([]revocation.Revocation, error)
	// Revocation returns fault.NotFound for an unknown id.
	Revocation(ctx context.Context, id string) (revocation.Revocation, error)
	RevokedLeases(ctx context.Context, id string) (total, gone int, last time.Time, err error)
}

// A session can be of some 64 KiB, so a page is small.
const (
	defaultFound = 50
	maxFound     = 100
)

// found answers with a page of records, newest first, each as view shows it.
func found[R, V any](
	a *API, w http.ResponseWriter, r *http.Request, name string, limit int,
	search func(SearchTx) ([]R, error), idOf func(R) string, view func(R, time.Time) V,
) error {
	records := []V{}
	out := map[string]any{}
	err := a.Search.View(r.Context(), func(tx SearchTx) error {
		list, err := search(tx)
		for _, one := range list {
			records = append(records, view(one, tx.Now()))
		}
		if len(list) == limit { // the cursor of the next page; absent at the end
			out["next"] = idOf(list[len(list)-1])
		}
		return err
	})
	if err != nil {
		return err
	}
	out[name] = records
	return writeJSON(w, http.StatusOK, out)
}

// foundSession is a session as operators see it: without the user's claims.
type foundSession struct {
	sessionView
	EndedAt time.Time `json:"ended_at,omitzero"`
}

func (a *API) searchSessions(w http.ResponseWriter, r *http.Request) error {
	var q session.Query
	err := a.operator(r, "sessions.read", func(p *params) {
		q.User, q.Agent = p.ref("user"), p.ref("agent")
		q.State = session.State(p.oneOf("state", string(session.Active), string(session.Ended)))
		q.Before, q.Limit = p.id("cursor", id.Session), p.limit(defaultFound, maxFound)
	})
	if err != nil {
		return err
	}
	return found(a, w, r, "sessions", q.Limit,
		func(tx SearchTx) ([]session.Session, error) { return tx.Sessions(r.Context(), q) },
		func(s session.Session) string { return s.ID },
		func(s session.Session, now time.Time) foundSession {
			return foundSession{viewSession(s, s.Alive(now)), s.EndedAt}
		})
}

// foundDecision is a decision as operators see it. Of its reasons it has the codes
// alone: messages can repeat parameters, and the log has them as far as audit.inputs
// lets it.
type foundDecision struct {
	DecisionID  string         `json:"decision_id"`
	At          time.Time      `json:"at"`
	Session     string         `json:"session"`
	User        identity.Ref   `json:"user"`
	Agent       identity.Ref   `json:"agent"`
	Decision    policy.Effect  `json:"decision"`
	ReasonCodes []string       `json:"reason_codes"`
	IntentHash  string         `json:"intent_hash"`
	Policy      policy.Version `json:"policy"`
	Approval    string         `json:"approval,omitempty"`
	Lease       string         `json:"lease,omitempty"`
	Outcome     string         `json:"outcome,omitempty"`
	OutcomeBy   string         `json:"outcome_by,omitempty"`
}

func (a *API) searchDecisions(w http.ResponseWriter, r *http.Request) error {
	var q decision.Query
	err := a.operator(r, "decisions.read", func(p *params) {
		q.Session, q.User, q.Agent = p.id("session", id.Session), p.ref("user"), p.ref("agent")
		q.Effect = policy.Effect(p.oneOf("effect", string(policy.Allow), string(policy.Deny), string(policy.RequireCIBA)))
		q.Before, q.Limit = p.id("cursor", id.Decision), p.limit(defaultFound, maxFound)
	})
	if err != nil {
		return err
	}
	return found(a, w, r, "decisions", q.Limit,
		func(tx SearchTx) ([]decision.Record, error) { return tx.Decisions(r.Context(), q) },
		func(d decision.Record) string { return d.ID }, viewDecision)
}

func viewDecision(d decision.Record, _ time.Time) foundDecision {
	f := foundDecision{
		DecisionID: d.ID, At: d.At, Session: d.Session, User: d.User, Agent: d.Agent, Decision: d.Answer.Decision,
		ReasonCodes: make([]string, len(d.Answer.Reasons)), IntentHash: d.IntentHash, Policy: d.Answer.Policy,
		Approval: d.Approval, Lease: d.Lease, Outcome: d.Outcome, OutcomeBy: d.OutcomeBy,
	}
	for i, reason := range d.Answer.Reasons {
		f.ReasonCodes[i] = reason.Code
	}
	return f
}

// policyView is where the policies stand at the replica that answers.
type policyView struct {
	policy.Version
	ActivatedAt time.Time    `json:"activated_at"`
	Refused     *refusalView `json:"refused,omitempty"`
}

type refusalView struct {
	At    time.Time `json:"at"`
	Error string    `json:"error"`
}

func (a *API) policyStatus(w http.ResponseWriter, r *http.Request) error {
	if err := a.operator(r, "policy.read", func(*params) {}); err != nil {
		return err
	}
	st := a.Policy.Status()
	v := policyView{Version: st.Version, ActivatedAt: st.ActivatedAt}
	if st.Refused != nil {
		v.Refused = &refusalView{st.Refused.At, st.Refused.Error}
	}
	return writeJSON(w, http.StatusOK, v)
}
