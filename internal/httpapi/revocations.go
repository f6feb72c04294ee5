package httpapi

import (
	"net/http"
	"time"
	"unicode/utf8"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/revocation"
)

// revocationBody is the request of POST /revocations.
type revocationBody struct {
	Lease   *string  `json:"lease"`
	Session *string  `json:"session"`
	User    *refBody `json:"user"`
	Agent   *refBody `json:"agent"`
	Minter  *string  `json:"minter"`
	Policy  *string  `json:"policy"` // revision
	All     *bool    `json:"all"`
	Freeze  *bool    `json:"freeze"`
	Reason  string   `json:"reason"`
}

type refBody struct {
	Issuer  string `json:"iss"`
	Subject string `json:"sub"`
}

const (
	maxReason = 500
	maxNamed  = 256 // bytes of a minter's or revision's name
)

// revoke is the kill switch. It needs an operator's token and nothing else.
func (a *API) revoke(w http.ResponseWriter, r *http.Request) error {
	token, err := a.bearer(r)
	if err != nil {
		return err
	}
	operator, err := a.Identity.Operator(r.Context(), token)
	if err != nil {
		a.Metrics.TokensRefused.WithLabelValues("operator").Inc()
		return err
	}
	var b revocationBody
	if err := readJSON(w, r, &b); err != nil {
		return err
	}
	o, err := b.order()
	if err != nil {
		return err
	}
	if o.Scope.Kind == revocation.OfAgent { // whichever of its identities was named
		agent := a.Identity.AgentOf(identity.Ref{Issuer: o.Scope.Issuer, ID: o.Scope.Value})
		o.Scope.Issuer, o.Scope.Value = agent.Issuer, agent.ID
	}
	o.Operator = operator.Ref
	p, err := a.Revoker.Revoke(r.Context(), o)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, viewRevocation(p))
}

// order reads what is to be revoked. Where no session ends, whoever asks again would
// get it again: minters and policies are frozen, unless the request says otherwise.
func (b revocationBody) order() (o revocation.Order, err error) {
	parts := 0
	for _, set := range []bool{b.Lease != nil, b.Session != nil, b.User != nil, b.Agent != nil, b.Minter != nil, b.Policy != nil, b.All != nil} {
		if set {
			parts++
		}
	}
	switch {
	case parts != 1:
		return o, fault.Invalid("", "expected exactly one of lease, session, user, agent, minter, policy and all")
	case utf8.RuneCountInString(b.Reason) > maxReason:
		return o, fault.Invalid("/reason", "is longer than %d characters", maxReason)
	}
	o.Reason = b.Reason
	if o.Scope, err = b.scope(); err != nil {
		return o, err
	}
	o.Freeze = o.Scope.Kind == revocation.OfMinter || o.Scope.Kind == revocation.OfPolicy
	if b.Freeze != nil {
		o.Freeze = *b.Freeze
	}
	if o.Freeze && !o.Scope.CanFreeze() {
		return o, fault.Invalid("/freeze", "what is over for good, as a lease or a session, can't be held back as well")
	}
	return o, nil
}

func (b revocationBody) scope() (s revocation.Scope, err error) {
	of := func(k revocation.Kind, value string, err error) (revocation.Scope, error) {
		return revocation.Scope{Kind: k, Value: value}, err
	}
	who := func(k revocation.Kind, pointer string, b *refBody) (revocation.Scope, error) {
		ref, err := b.ref(pointer)
		return revocation.Scope{Kind: k, Value: ref.ID, Issuer: ref.Issuer}, err
	}
	switch {
	case b.Lease != nil:
		v, err := optional("/lease", b.Lease)
		return of(revocation.OfLease, v, err)
	case b.Session != nil:
		v, err := optional("/session", b.Session)
		return of(revocation.OfSession, v, err)
	case b.User != nil:
		return who(revocation.OfUser, "/user", b.User)
	case b.Agent != nil:
		return who(revocation.OfAgent, "/agent", b.Agent)
	case b.Minter != nil:
		v, err := named("/minter", *b.Minter)
		return of(revocation.OfMinter, v, err)
	case b.Policy != nil:
		v, err := named("/policy", *b.Policy)
		return of(revocation.OfPolicy, v, err)
	case !*b.All:
		return s, fault.Invalid("/all", "expected true")
	}
	return of(revocation.OfAll, "", nil)
}

func named(pointer, v string) (string, error) {
	if v == "" || len(v) > maxNamed || !plain(v) {
		return "", fault.Invalid(pointer, "expected 1 to %d printable bytes", maxNamed)
	}
	return v, nil
}

func (b *refBody) ref(pointer string) (identity.Ref, error) {
	switch {
	case b == nil:
		return identity.Ref{}, nil
	case b.Issuer == "":
		return identity.Ref{}, fault.Invalid(pointer+"/iss", "is missing")
	case b.Subject == "":
		return identity.Ref{}, fault.Invalid(pointer+"/sub", "is missing")
	case !identity.Usable(b.Issuer):
		return identity.Ref{}, fault.Invalid(pointer+"/iss", "expected at most %d printable bytes", identity.MaxName)
	case !identity.Usable(b.Subject):
		return identity.Ref{}, fault.Invalid(pointer+"/sub", "expected at most %d printable bytes", identity.MaxName)
	}
	return identity.Ref{Issuer: b.Issuer, ID: b.Subject}, nil
}

// foundRevocation is a use of the kill switch.
type foundRevocation struct {
	ID       string       `json:"id"`
	At       time.Time    `json:"at"`
	Scope    scopeView    `json:"scope"`
	Operator identity.Ref `json:"operator"`
	Reason   string       `json:"reason"`
	Frozen   bool         `json:"frozen"`
	Sessions int          `json:"sessions"` // that it ended
	// EndedAt is when all had ended, GoneAt when all was seen to be gone.
	EndedAt  time.Time     `json:"ended_at,omitzero"`
	GoneAt   time.Time     `json:"gone_at,omitzero"`
	LiftedAt time.Time     `json:"lifted_at,omitzero"`
	LiftedBy *identity.Ref `json:"lifted_by,omitempty"`
}

// revocationView is one, and how far it has come: how many leases it ended, and how
// many of these were seen to be gone.
type revocationView struct {
	foundRevocation
	Leases     int       `json:"leases"`
	Gone       int       `json:"gone"`
	LastGoneAt time.Time `json:"last_gone_at,omitzero"`
}

type scopeView struct {
	Kind revocation.Kind `json:"kind"`
	ID   string          `json:"id,omitempty"`
	Who  *identity.Ref   `json:"who,omitempty"`
	Name string          `json:"name,omitempty"`
}

func viewRevocation(p revocation.Progress) revocationView {
	return revocationView{foundRevocation: findRevocation(p.Revocation), Leases: p.Leases, Gone: p.Gone, LastGoneAt: p.LastGoneAt}
}

func findRevocation(r revocation.Revocation) foundRevocation {
	v := foundRevocation{
		ID: r.ID, At: r.At, Scope: scopeView{Kind: r.Scope.Kind}, Operator: r.Operator, Reason: r.Reason, Frozen: r.Frozen,
		Sessions: r.Sessions, EndedAt: r.EndedAt, GoneAt: r.GoneAt, LiftedAt: r.LiftedAt,
	}
	switch r.Scope.Kind {
	case revocation.OfUser, revocation.OfAgent:
		v.Scope.Who = &identity.Ref{Issuer: r.Scope.Issuer, ID: r.Scope.Value}
	case revocation.OfDecision, revocation.OfSession:
		v.Scope.ID = r.Scope.Value
	default:
		v.Scope.Name = r.Scope.Value
	}
	if !r.LiftedAt.IsZero() {
		v.LiftedBy = &r.LiftedBy
	}
	return v
}

func (a *API) searchRevocations(w http.ResponseWriter, r *http.Request) error {
	var q revocation.Query
	err := a.operator(r, "revocations.read", func(p *params) {
		q.Frozen = p.oneOf("frozen", "true") != ""
		q.Before, q.Limit = p.id("cursor", id.Revocation), p.limit(defaultFound, maxFound)
	})
	if err != nil {
		return err
	}
	return found(a, w, r, "revocations", q.Limit,
		func(tx SearchTx) ([]revocation.Revocation, error) { return tx.Revocations(r.Context(), q) },
		func(v revocation.Revocation) string { return v.ID },
		func(v revocation.Revocation, _ time.Time) foundRevocation { return findRevocation(v) })
}

// endedLease is what a revocation did to one lease.
type endedLease struct {
	Lease      string      `json:"lease"`
	Minter     string      `json:"minter"`
	State      lease.State `json:"state"`
	EndedAt    time.Time   `json:"ended_at"`
	GoneAt     time.Time   `json:"gone_at,omitzero"`
	StuckSince time.Time   `json:"stuck_since,omitzero"`
}

func (a *API) getRevocation(w http.ResponseWriter, r *http.Request) error {
	var q lease.Query
	err := a.operator(r, "revocations.read", func(p *params) {
		q.Revocation = p.path(r, "revocation", id.Revocation)
		q.Before, q.Limit = p.id("cursor", id.Lease), p.limit(defaultFound, maxFound)
	})
	if err != nil {
		return err
	}
	out := struct {
		revocationView
		Ended []endedLease `json:"ended_leases"`
		// Next is the cursor of the next page; absent at the end.
		Next string `json:"next,omitempty"`
	}{Ended: []endedLease{}}
	err = a.Search.View(r.Context(), func(tx SearchTx) (err error) {
		var p revocation.Progress
		if p.Revocation, err = tx.Revocation(r.Context(), q.Revocation); err != nil {
			return err
		}
		if p.Leases, p.Gone, p.LastGoneAt, err = tx.RevokedLeases(r.Context(), q.Revocation); err != nil {
			return err
		}
		out.revocationView = viewRevocation(p)
		list, err := tx.Leases(r.Context(), q)
		for _, l := range list {
			out.Ended = append(out.Ended, endedLease{l.ID, l.Minter, l.State, l.EndedAt, l.GoneAt, l.StuckSince(tx.Now())})
		}
		if len(list) == q.Limit {
			out.Next = list[len(list)-1].ID
		}
		return err
	})
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, out)
}

// liftRevocation lets go of what a revocation holds back. That needs policy: it opens a
// door, where revoking shuts one.
func (a *API) liftRevocation(w http.ResponseWriter, r *http.Request) error {
	var revoked string
	operator, err := a.operatorAs(r, "revocations.lift", func(p *params) { revoked = p.path(r, "revocation", id.Revocation) })
	if err != nil {
		return err
	}
	if err := a.Revoker.Lift(r.Context(), operator.Ref, revoked); err != nil {
		return err
	}
	p, err := a.Revoker.Progress(r.Context(), revoked)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, viewRevocation(p))
}
