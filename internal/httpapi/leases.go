package httpapi

import (
	"net/http"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/intent"
	"github.com/writsec/writ/internal/lease"
)

// renewBody is the request of POST /leases/{id}/renew: that of /decide, of which the
// lease knows the session, and in which no approval has a place.
type renewBody struct {
	SubjectToken *string         `json:"subject_token"`
	Intent       intent.Intent   `json:"intent"`
	Resource     intent.Resource `json:"resource"`
	Context      map[string]any  `json:"context"`
}

func (a *API) renewLease(w http.ResponseWriter, r *http.Request) error {
	token, err := a.bearer(r)
	if err != nil {
		return err
	}
	var b renewBody
	if err := readJSON(w, r, &b); err != nil {
		return err
	}
	q, err := decideBody{SubjectToken: b.SubjectToken, Intent: b.Intent, Resource: b.Resource, Context: b.Context}.request()
	if err != nil {
		return err
	}
	token.Subject = q.Presented.Subject
	q.Presented, q.IP = token, a.callerIP(r)
	answer, err := a.Decider.Renew(r.Context(), q, chi.URLParam(r, "id"))
	if err != nil {
		if fault.Is(err, fault.InvalidToken) {
			a.Metrics.TokensRefused.WithLabelValues("agent").Inc()
		}
		return err
	}
	return writeJSON(w, http.StatusOK, answer)
}

func (a *API) getLease(w http.ResponseWriter, r *http.Request) error {
	c, err := a.caller(r)
	if err != nil {
		return err
	}
	var v leaseView
	err = a.Leases.View(r.Context(), func(tx lease.Tx) error {
		l, err := lease.Find(r.Context(), tx, chi.URLParam(r, "id"), c)
		if err == nil {
			v = viewLease(l, tx.Now())
		}
		return err
	})
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, v)
}

func (a *API) releaseLease(w http.ResponseWriter, r *http.Request) error {
	c, err := a.caller(r)
	if err != nil {
		return err
	}
	l, err := a.Revoker.Release(r.Context(), c, chi.URLParam(r, "id"))
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, viewLease(l, a.Now()))
}

// leaseView is a lease as its agent sees it.
type leaseView struct {
	Lease     string      `json:"lease"`
	State     lease.State `json:"state"`
	Session   string      `json:"session"`
	Decision  string      `json:"decision_id"`
	Kind      string      `json:"kind"`
	ExpiresAt time.Time   `json:"expires_at"`
	EndedAt   time.Time   `json:"ended_at,omitzero"`
	EndReason string      `json:"end_reason,omitempty"`
	// GoneAt is when its end was seen, StuckSince since when it should have been.
	GoneAt     time.Time `json:"gone_at,omitzero"`
	StuckSince time.Time `json:"stuck_since,omitzero"`
}

func viewLease(l lease.Lease, now time.Time) leaseView {
	v := leaseView{
		Lease: l.ID, State: l.State, Session: l.Session, Decision: l.Decision, Kind: l.Kind, ExpiresAt: l.ExpiresAt,
		EndedAt: l.EndedAt, EndReason: l.EndReason, GoneAt: l.GoneAt, StuckSince: l.StuckSince(now),
	}
	// Its time is over, or an operator has stopped it, and that it ends is recorded any
	// moment: it must not look good meanwhile.
	if l.State == lease.Active && !l.Alive(now) {
		v.State = lease.Revoking
	}
	return v
}

// foundLease is a lease as operators see it. What it is good for is in its entry of the
// log: scopes can repeat parameters.
type foundLease struct {
	leaseView
	User         identity.Ref `json:"user"`
	Agent        identity.Ref `json:"agent"`
	Minter       string       `json:"minter"`
	Revocability string       `json:"revocability"`
	Precision    string       `json:"precision"`
	IntentHash   string       `json:"intent_hash"`
	Policy       string       `json:"policy_revision,omitempty"`
	CreatedAt    time.Time    `json:"created_at"`
	Revocation   string       `json:"revocation,omitempty"`
	// Halted says that an operator's revocation has it in its scope and will end it.
	Halted bool `json:"halted,omitempty"`
	// Attempts counts how often unmaking it failed, LastError says why it last did.
	Attempts  int    `json:"attempts"`
	LastError string `json:"last_error,omitempty"`
}

func (a *API) searchLeases(w http.ResponseWriter, r *http.Request) error {
	var q lease.Query
	err := a.operator(r, "leases.read", func(p *params) {
		q.Session, q.Decision, q.Revocation = p.id("session", id.Session), p.id("decision", id.Decision), p.id("revocation", id.Revocation)
		q.Minter, q.User, q.Agent = p.text("minter"), p.ref("user"), p.ref("agent")
		q.State = lease.State(p.oneOf("state", string(lease.Intent), string(lease.Active), string(lease.Revoking), string(lease.Revoked)))
		q.Stuck = p.oneOf("stuck", "true") != ""
		q.Before, q.Limit = p.id("cursor", id.Lease), p.limit(defaultFound, maxFound)
	})
	if err != nil {
		return err
	}
	return found(a, w, r, "leases", q.Limit,
		func(tx SearchTx) ([]lease.Lease, error) { return tx.Leases(r.Context(), q) },
		func(l lease.Lease) string { return l.ID }, viewFoundLease)
}

func viewFoundLease(l lease.Lease, now time.Time) foundLease {
	v := viewLease(l, now)
	v.State = l.State // as it is searched by
	return foundLease{
		leaseView: v, User: l.User, Agent: l.Agent, Minter: l.Minter, Revocability: l.Revocability, Precision: l.Precision,
		IntentHash: l.IntentHash, Policy: l.Policy, CreatedAt: l.CreatedAt, Revocation: l.Revocation, Halted: l.Halted,
		Attempts: l.Attempts, LastError: l.LastError,
	}
}

// maxOrphans bounds those that are shown: more than a few are one problem.
const maxOrphans = 1000

type foundOrphan struct {
	Minter     string    `json:"minter"`
	Name       string    `json:"name"`
	SeenAt     time.Time `json:"seen_at"`
	DisarmedAt time.Time `json:"disarmed_at,omitzero"`
}

func (a *API) listOrphans(w http.ResponseWriter, r *http.Request) error {
	var minter string
	if err := a.operator(r, "leases.read", func(p *params) { minter = p.text("minter") }); err != nil {
		return err
	}
	out := struct {
		Orphans []foundOrphan `json:"orphans"`
		// More says that there are others, which are not shown.
		More bool `json:"more"`
	}{Orphans: []foundOrphan{}}
	err := a.Search.View(r.Context(), func(tx SearchTx) error {
		list, err := tx.Orphans(r.Context(), minter)
		for _, o := range list[:min(len(list), maxOrphans)] {
			out.Orphans = append(out.Orphans, foundOrphan{o.Minter, o.Name, o.SeenAt, o.DisarmedAt})
		}
		out.More = len(list) > maxOrphans
		return err
	})
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, out)
}
