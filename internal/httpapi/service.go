package httpapi

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"net/http"
	"net/url"
	"strings"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/minter"
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
	if _, err := a.Keys.Learn(r.Context(), token); err != nil {
		return err
	}
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
