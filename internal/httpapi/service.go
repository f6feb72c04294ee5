package httpapi

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"net/http"
	"net/url"
	"strings"
	"unicode/utf8"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/minter"
	"github.com/writsec/writ/internal/revocation"
)

// Service is a resource server that may introspect and revoke tokens of its own audience.
type Service struct {
	ID string
	// Secret, or else Subject, the principal of its own token, is what it is known by.
	Secret   string
	Subject  identity.Ref
	Audience string
}

// LeaseStore reads leases.
type LeaseStore interface {
	View(ctx context.Context, f func(lease.Tx) error) error
}

// introspect is RFC 7662. Whatever keeps a token from being good for this caller
// is the same answer, inactive: nobody learns more than that.
func (a *API) introspect(w http.ResponseWriter, r *http.Request) error {
	service, token, err := a.tokenRequest(w, r)
	if err != nil {
		return err
	}
	inactive := map[string]any{"active": false}
	claims, leaseID, ok := a.Keys.Claims(token, service.Audience)
	if !ok {
		return writeJSON(w, http.StatusOK, inactive)
	}
	var l lease.Lease
	var known, alive bool
	err = a.Leases.View(r.Context(), func(tx lease.Tx) (err error) {
		l, err = tx.Lease(r.Context(), leaseID)
		if fault.Is(err, fault.NotFound) {
			return nil
		}
		known, alive = err == nil, err == nil && l.Alive(tx.Now())
		return err
	})
	if err == nil && known {
		err = a.Uses.Seen(r.Context(), l, service.ID, alive)
	}
	switch {
	case err != nil:
		return err
	case !alive:
		return writeJSON(w, http.StatusOK, inactive)
	}
	claims["active"], claims["token_type"] = true, minter.TokenType(l.Cnf)
	return writeJSON(w, http.StatusOK, claims)
}

// service authenticates a resource server, by its own token or by its secret.
func (a *API) service(r *http.Request, form url.Values) (Service, error) {
	scheme, _, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") && !strings.EqualFold(scheme, "DPoP") {
		return a.serviceBySecret(r, form)
	}
	if form.Has("client_id") || form.Has("client_secret") {
		return Service{}, refusedClient()
	}
	p, err := a.bearer(r)
	if err != nil {
		return Service{}, refusedClient()
	}
	subject, err := a.Identity.Service(r.Context(), p)
	switch {
	case fault.Is(err, fault.InvalidToken):
		a.Metrics.TokensRefused.WithLabelValues("service").Inc()
		return Service{}, fault.New(fault.InvalidClient, "%s", fault.Detail(err))
	case err != nil:
		return Service{}, err
	}
	for _, s := range a.Services {
		if s.Subject == subject.Ref {
			return s, nil
		}
	}
	return Service{}, refusedClient()
}

// serviceBySecret authenticates by client secret, in the header or in the form (RFC 6749
// §2.3.1), never by both, in the same time whoever calls.
func (a *API) serviceBySecret(r *http.Request, form url.Values) (Service, error) {
	id, secret := form.Get("client_id"), form.Get("client_secret")
	if given := r.Header.Values("Authorization"); len(given) > 0 {
		var e1, e2 error
		user, password, ok := r.BasicAuth()
		user, e1 = url.QueryUnescape(user)
		password, e2 = url.QueryUnescape(password)
		if !ok || len(given) > 1 || e1 != nil || e2 != nil || form.Has("client_secret") || (id != "" && id != user) {
			return Service{}, refusedClient()
		}
		id, secret = user, password
	} else if len(form["client_id"]) > 1 || len(form["client_secret"]) > 1 {
		return Service{}, refusedClient()
	}
	given := sha256.Sum256([]byte(secret))
	var found Service
	ok := 0
	for _, s := range a.Services {
		if s.Secret == "" { // known by its token alone
			continue
		}
		want := sha256.Sum256([]byte(s.Secret))
		match := subtle.ConstantTimeCompare(given[:], want[:]) & subtle.ConstantTimeCompare([]byte(id), []byte(s.ID))
		if match == 1 {
			found, ok = s, 1
		}
	}
	if ok != 1 {
		return Service{}, refusedClient()
	}
	return found, nil
}

func refusedClient() error {
	return fault.New(fault.InvalidClient, "authenticate as a configured service, with its id and secret or with a token of its own")
}

// revocationBody is the request of POST /revocations.
type revocationBody struct {
	Lease   *string  `json:"lease"`
	Session *string  `json:"session"`
	User    *refBody `json:"user"`
	Agent   *refBody `json:"agent"`
	All     *bool    `json:"all"`
	Reason  string   `json:"reason"`
}

type refBody struct {
	Issuer  string `json:"iss"`
	Subject string `json:"sub"`
}

const maxReason = 500

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
	scope, err := b.scope()
	if err != nil {
		return err
	}
	if !scope.Agent.IsZero() { // whichever of its identities was named
		scope.Agent = a.Identity.AgentOf(scope.Agent)
	}
	result, err := a.Revoker.Revoke(r.Context(), operator, scope, b.Reason)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, result)
}

func (b revocationBody) scope() (revocation.Scope, error) {
	var s revocation.Scope
	parts := 0
	for _, set := range []bool{b.Lease != nil, b.Session != nil, b.User != nil, b.Agent != nil, b.All != nil} {
		if set {
			parts++
		}
	}
	if parts != 1 {
		return s, fault.Invalid("", "expected exactly one of lease, session, user, agent and all")
	}
	if utf8.RuneCountInString(b.Reason) > maxReason {
		return s, fault.Invalid("/reason", "is longer than %d characters", maxReason)
	}
	if b.All != nil && !*b.All {
		return s, fault.Invalid("/all", "expected true")
	}
	s.All = b.All != nil
	var err error
	if s.Lease, err = optional("/lease", b.Lease); err != nil {
		return s, err
	}
	if s.Session, err = optional("/session", b.Session); err != nil {
		return s, err
	}
	if s.User, err = b.User.ref("/user"); err != nil {
		return s, err
	}
	s.Agent, err = b.Agent.ref("/agent")
	return s, err
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
