package httpapi

import (
	"net/http"
	"time"
	"unicode/utf8"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
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

// revocationView is a revocation, and how far it has come.
type revocationView struct {
	ID       string       `json:"id"`
	At       time.Time    `json:"at"`
	Scope    scopeView    `json:"scope"`
	Operator identity.Ref `json:"operator"`
	Reason   string       `json:"reason"`
	Frozen   bool         `json:"frozen"`
	// Sessions and leases that it ended, and how many of the leases were seen to be gone.
	Sessions   int       `json:"sessions"`
	Leases     int       `json:"leases"`
	Gone       int       `json:"gone"`
	LastGoneAt time.Time `json:"last_gone_at,omitzero"`
	// EndedAt is when all had ended, GoneAt when all was seen to be gone.
	EndedAt  time.Time     `json:"ended_at,omitzero"`
	GoneAt   time.Time     `json:"gone_at,omitzero"`
	LiftedAt time.Time     `json:"lifted_at,omitzero"`
	LiftedBy *identity.Ref `json:"lifted_by,omitempty"`
}

type scopeView struct {
	Kind  revocation.Kind `json:"kind"`
	ID    string          `json:"id,omitempty"`
	Who   *identity.Ref   `json:"who,omitempty"`
	Value string          `json:"name,omitempty"`
}

func viewRevocation(p revocation.Progress) revocationView {
	v := revocationView{
		ID: p.ID, At: p.At, Scope: scopeView{Kind: p.Scope.Kind}, Operator: p.Operator, Reason: p.Reason, Frozen: p.Frozen,
		Sessions: p.Sessions, Leases: p.Leases, Gone: p.Gone, LastGoneAt: p.LastGoneAt, EndedAt: p.EndedAt, GoneAt: p.GoneAt, LiftedAt: p.LiftedAt,
	}
	switch p.Scope.Kind {
	case revocation.OfUser, revocation.OfAgent:
		v.Scope.Who = &identity.Ref{Issuer: p.Scope.Issuer, ID: p.Scope.Value}
	case revocation.OfDecision, revocation.OfSession:
		v.Scope.ID = p.Scope.Value
	default:
		v.Scope.Value = p.Scope.Value
	}
	if !p.LiftedAt.IsZero() {
		v.LiftedBy = &p.LiftedBy
	}
	return v
}
