// Package httpapi is Writ's HTTP API. It reads requests strictly, hands them to
// the domain and writes what it says; it decides nothing. openapi.yaml describes
// every route.
package httpapi

import (
	_ "embed"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/writsec/writ/internal/approval"
	"github.com/writsec/writ/internal/decision"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/minter"
	"github.com/writsec/writ/internal/policy"
	"github.com/writsec/writ/internal/revocation"
	"github.com/writsec/writ/internal/session"
	"github.com/writsec/writ/internal/signin"
	"github.com/writsec/writ/internal/telemetry"
)

// OpenAPI is the description of every route, OpenAPI 3.1.
//
//go:embed openapi.yaml
var OpenAPI []byte

// Config makes an API.
type Config struct {
	Identity  *identity.Verifier
	Decider   *decision.Decider
	Sessions  *session.Manager
	SignIns   *signin.Flow // nil: users can't sign in here
	Approvals *approval.Engine
	Revoker   *revocation.Revoker
	Keys      *minter.Keys
	Status    *minter.StatusLists
	Leases    LeaseStore
	Uses      *lease.Uses
	Evidence  EvidenceStore
	Search    SearchStore
	Policy    *policy.Engine // what operators may do
	Services  []Service
	Now       func() time.Time // the store's clock

	// ExternalURL is where callers reach this API.
	ExternalURL string
	// BehindProxy: the caller's address is the last one in X-Forwarded-For.
	BehindProxy bool
	// ProxyClientCert: the proxy passes the TLS client's certificate in Client-Cert.
	ProxyClientCert bool
	// MaxWait bounds how long a request is held.
	MaxWait time.Duration

	Metrics *telemetry.Metrics
	Logger  *slog.Logger
}

// API serves the routes.
type API struct {
	Config
}

const (
	maxBody     = 64 << 10
	bodyTimeout = 5 * time.Second // for a body to arrive
)

// New makes the handler, which can also list its routes.
func New(cfg Config) chi.Router {
	a := &API{Config: cfg}
	r := chi.NewRouter()
	r.Use(a.requestID, a.observe, a.headers, a.recoverPanic)
	r.NotFound(a.handle(func(http.ResponseWriter, *http.Request) error {
		return fault.New(fault.NotFound, "there is no such route; see /openapi.yaml")
	}))
	r.MethodNotAllowed(a.handle(func(w http.ResponseWriter, req *http.Request) error {
		w.Header().Set("Allow", strings.Join(allowed(r, req.URL.Path), ", "))
		return fault.New(fault.MethodNotAllowed, "this route has other methods; see Allow")
	}))

	// Each kind of caller has slots of its own, so that none keeps the others out.
	r.With(a.bound(64)).Post("/revocations", a.handle(a.revoke))
	r.With(a.bound(1024)).Post("/introspect", a.handle(a.introspect))
	r.With(a.bound(256)).Post("/revoke", a.handle(a.revokeToken))
	r.With(a.bound(1024)).Get("/status/{list}", a.handle(a.statusList))
	r.With(a.bound(1024)).Post("/signals", a.handle(a.signal))
	r.With(a.bound(1024)).Post("/backchannel-logout", a.handle(a.logout))
	r.Group(func(r chi.Router) {
		r.Use(a.bound(4)) // fewer than the store has readers
		r.Get("/audit/checkpoint", a.handle(a.checkpoint))
		r.Get("/audit/entries", a.handle(a.entries))
		r.Get("/audit/proof", a.handle(a.proof))
		r.Get("/sessions", a.handle(a.searchSessions))
		r.Get("/decisions", a.handle(a.searchDecisions))
		r.Get("/policy", a.handle(a.policyStatus))
		r.Get("/leases", a.handle(a.searchLeases))
		r.Get("/orphans", a.handle(a.listOrphans))
		r.Get("/revocations", a.handle(a.searchRevocations))
		r.Get("/revocations/{id}", a.handle(a.getRevocation))
		r.Post("/revocations/{id}/lift", a.handle(a.liftRevocation))
	})
	r.Group(func(r chi.Router) { // requests that may be held
		r.Use(a.bound(4096))
		r.Post("/decide", a.handle(a.decide))
		r.Post("/v1/decide", a.handle(a.decide))
		r.Post("/sessions", a.handle(a.openSession))
		r.Post("/sessions/{id}/envelope", a.handle(a.changeEnvelope))
		r.Post("/decisions/{id}/outcome", a.handle(a.reportOutcome))
		r.Get("/approvals/{id}", a.handle(a.getApproval))
		r.Post("/leases/{id}/renew", a.handle(a.renewLease))
	})
	r.Group(func(r chi.Router) { // short, and without a body
		r.Use(a.bound(1024))
		r.Delete("/approvals/{id}", a.handle(a.withdrawApproval))
		r.Get("/sessions/{id}", a.handle(a.getSession))
		r.Delete("/sessions/{id}", a.handle(a.endSession))
		r.Get("/leases/{id}", a.handle(a.getLease))
		r.Delete("/leases/{id}", a.handle(a.releaseLease))
		r.Get("/.well-known/jwks.json", a.handle(a.jwks))
		r.Get("/.well-known/oauth-authorization-server", a.handle(a.metadata))
		r.Get("/.well-known/openid-configuration", a.handle(a.openIDMetadata))
		r.Get("/openapi.yaml", a.handle(a.openapi))
	})
	r.Group(func(r chi.Router) { // pages for people
		r.Use(a.boundBy(256, a.errorPage))
		r.Get("/signin/style.css", a.page(a.stylesheet))
		r.Get("/signin/{token}", a.page(a.showSignIn))
		r.Post("/signin/{token}", a.page(a.startSignIn))
		r.Get("/callback", a.page(a.callback))
		r.Get("/consent/{id}", a.page(a.showConsent))
		r.Post("/consent/{id}", a.page(a.answerConsent))
	})
	return r
}

// allowed lists the methods that a path has.
func allowed(routes chi.Routes, path string) []string {
	var out []string
	for _, m := range []string{http.MethodGet, http.MethodPost, http.MethodDelete} {
		if routes.Match(chi.NewRouteContext(), m, path) {
			out = append(out, m)
		}
	}
	return out
}

// handler is an http.HandlerFunc that can fail.
type handler func(http.ResponseWriter, *http.Request) error

func (a *API) handle(h handler) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if err := h(w, r); err != nil {
			writeProblem(w, r, a.Logger, err)
		}
	}
}
