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
	"github.com/writsec/writ/internal/minter"
	"github.com/writsec/writ/internal/revocation"
	"github.com/writsec/writ/internal/session"
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
	Approvals *approval.Engine
	Revoker   *revocation.Revoker
	Keys      *minter.Keys
	Leases    LeaseStore
	Services  []Service

	// ExternalURL is where callers reach this API.
	ExternalURL string
	// BehindProxy: the caller's address is the last one in X-Forwarded-For.
	BehindProxy bool
	// MaxWait bounds how long a request is held.
	MaxWait time.Duration

	Metrics *telemetry.Metrics
	Logger  *slog.Logger
}

// API serves the routes.
type API struct {
	Config
	busy     chan struct{}
	reserved chan struct{}
}

const (
	maxBody     = 64 << 10
	maxInFlight = 4096 // requests, held ones included
	maxReserved = 64   // revocations, which held requests must not keep out
)

// New makes the handler, which can also list its routes.
func New(cfg Config) chi.Router {
	a := &API{Config: cfg, busy: make(chan struct{}, maxInFlight), reserved: make(chan struct{}, maxReserved)}
	r := chi.NewRouter()
	r.Use(a.requestID, a.observe, a.headers, a.recoverPanic, a.bound)
	r.NotFound(a.handle(func(http.ResponseWriter, *http.Request) error {
		return fault.New(fault.NotFound, "there is no such route; see /openapi.yaml")
	}))
	r.MethodNotAllowed(a.handle(func(w http.ResponseWriter, req *http.Request) error {
		w.Header().Set("Allow", strings.Join(allowed(r, req.URL.Path), ", "))
		return fault.New(fault.MethodNotAllowed, "this route has other methods; see Allow")
	}))

	r.Post("/decide", a.handle(a.decide))
	r.Post("/v1/decide", a.handle(a.decide))
	r.Get("/approvals/{id}", a.handle(a.getApproval))
	r.Delete("/approvals/{id}", a.handle(a.withdrawApproval))
	r.Post("/sessions", a.handle(a.openSession))
	r.Get("/sessions/{id}", a.handle(a.getSession))
	r.Delete("/sessions/{id}", a.handle(a.endSession))
	r.Delete("/leases/{id}", a.handle(a.releaseLease))
	r.Post("/revocations", a.handle(a.revoke))
	r.Post("/introspect", a.handle(a.introspect))
	r.Get("/.well-known/jwks.json", a.handle(a.jwks))
	r.Get("/.well-known/oauth-authorization-server", a.handle(a.metadata))
	r.Get("/openapi.yaml", a.handle(a.openapi))
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
