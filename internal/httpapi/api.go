// Package httpapi is Writ's HTTP API. It reads requests strictly, hands them to
// the domain and writes what it says; it decides nothing. openapi.yaml describes
// every route.
package httpapi

import (
	_ "embed"
	"log/slog"
	"net/http"
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
	busy chan struct{}
}

const (
	maxBody     = 64 << 10
	maxInFlight = 4096 // requests, held ones included
)

// New makes the handler.
func New(cfg Config) http.Handler {
	a := &API{Config: cfg, busy: make(chan struct{}, maxInFlight)}
	r := chi.NewRouter()
	r.Use(a.requestID, a.observe, a.recoverPanic, a.bound)
	r.NotFound(a.handle(func(http.ResponseWriter, *http.Request) error {
		return fault.New(fault.NotFound, "there is no such route; see /openapi.yaml")
	}))
	r.MethodNotAllowed(a.handle(func(http.ResponseWriter, *http.Request) error {
		return fault.New(fault.MethodNotAllowed, "this route has other methods; see /openapi.yaml")
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

// handler is an http.HandlerFunc that can fail.
type handler func(http.ResponseWriter, *http.Request) error

func (a *API) handle(h handler) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		// Answers carry secrets or personal data unless a handler says otherwise.
		w.Header().Set("Cache-Control", "no-store")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		if err := h(w, r); err != nil {
			writeProblem(w, r, a.Logger, err)
		}
	}
}
