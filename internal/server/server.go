// Package server wires Writ together and runs it.
package server

import (
	"cmp"
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync/atomic"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/open-policy-agent/opa/v1/bundle"
	opakeys "github.com/open-policy-agent/opa/v1/keys"
	"golang.org/x/sync/errgroup"

	"github.com/writsec/writ/internal/approval"
	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/ciba"
	"github.com/writsec/writ/internal/config"
	"github.com/writsec/writ/internal/decision"
	"github.com/writsec/writ/internal/httpapi"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/minter"
	"github.com/writsec/writ/internal/policy"
	"github.com/writsec/writ/internal/revocation"
	"github.com/writsec/writ/internal/session"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/telemetry"
)

const (
	issuerTimeout = 5 * time.Second  // one call to an identity provider, but for polls
	drainTimeout  = 20 * time.Second // for requests in flight when Writ stops
	readyTimeout  = 3 * time.Second  // for the store to take a write
)

// Server is one Writ, ready to run.
type Server struct {
	log      *slog.Logger
	store    *sqlstore.Store
	policy   *policy.Engine
	identity *identity.Verifier
	loops    []func(context.Context) error
	last     []func(context.Context) error // end one after the other, once all else is still
	api, ops listener
	stopping chan struct{} // closed when a stop begins
	stuck    atomic.Bool   // entries wait too long for the log
	minters  []string      // their names
	targets  []func()      // close the connections to their targets
}

// New opens the store, loads keys and policies and binds both listeners. restored
// says that the store comes from a backup, where that can't be seen from copies of
// the log's checkpoints.
func New(ctx context.Context, cfg config.Config, restored bool, log *slog.Logger) (_ *Server, err error) {
	s := &Server{log: log, stopping: make(chan struct{})}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	metrics := telemetry.NewMetrics()

	root, err := config.RootKey(cfg.RootKeyFile)
	if err != nil {
		return nil, err
	}
	if s.store, err = OpenStore(ctx, cfg, root, metrics, log); err != nil {
		return nil, err
	}
	if err := s.openLog(ctx, cfg, restored); err != nil {
		return nil, err
	}
	keeper, err := newKeeper(ctx, cfg.Audit, s.store)
	if err != nil {
		return nil, err
	}
	if s.policy, err = NewPolicy(cfg.Policy, recordPolicy(s.store), metrics, log); err != nil {
		return nil, err
	}
	// Policies that are refused leave Writ unready to decide. What needs none of them
	// goes on: introspection, pending prompts and above all the kill switch.
	if err := s.policy.Load(ctx); err != nil && ctx.Err() != nil {
		return nil, err
	}
	if s.identity, err = newIdentity(ctx, cfg, s.store, log); err != nil {
		return nil, err
	}
	keys, err := minter.LoadKeys(ctx, s.store, RotationOf(cfg))
	if err != nil {
		return nil, err
	}
	status, err := newStatusLists(ctx, cfg, s.store, keys)
	if err != nil {
		return nil, err
	}
	providers, err := newProviders(cfg.Issuers, s.identity)
	if err != nil {
		return nil, err
	}
	services, err := newServices(cfg.Services)
	if err != nil {
		return nil, err
	}
	minters, err := newMinters(cfg, keys, status, s.store.Now)
	if err != nil {
		return nil, err
	}
	for name, m := range minters {
		s.minters = append(s.minters, name)
		if c, ok := m.(interface{ Close() }); ok {
			s.targets = append(s.targets, c.Close)
		}
	}

	approvals := approval.NewEngine(approval.Config{
		Store: sqlstore.For[approval.Tx](s.store), Providers: providers, UseWithin: cfg.Approvals.UseWithin,
		Stopping: s.stopping, Metrics: metrics, Logger: log,
	})
	uses := &lease.Uses{Store: sqlstore.For[audit.Tx](s.store), Logger: log}
	revoker := &revocation.Revoker{Store: sqlstore.For[revocation.Tx](s.store).Urgent(), Metrics: metrics}
	work := newLeaseWork(minters, s.store, metrics, log)
	settings := session.Settings{
		DefaultAge: cfg.Sessions.DefaultAge, MaxAge: cfg.Sessions.MaxAge, Idle: cfg.Sessions.Idle, Window: cfg.Sessions.Window,
	}
	signIns, err := newSignIn(cfg, s.identity, s.store, settings)
	if err != nil {
		return nil, err
	}
	handler := httpapi.New(httpapi.Config{
		Identity: s.identity,
		Decider: decision.New(decision.Config{
			Identity: s.identity, Policy: s.policy, Store: sqlstore.For[decision.Tx](s.store), Approvals: approvals,
			Providers: providers, Minters: minters, Breakers: work.breakers, Limits: leaseLimits(cfg), Sessions: settings, OpenOnDecide: cfg.Sessions.OpenOnDecide,
			PromptLife: cfg.Approvals.ExpiresIn, MaxPending: cfg.Approvals.MaxPending, Keeper: keeper, Halted: s.stuck.Load, Metrics: metrics, Logger: log,
		}),
		SignIns:   signIns,
		Sessions:  &session.Manager{Store: sqlstore.For[session.Tx](s.store), Settings: settings},
		Approvals: approvals,
		Revoker:   revoker,
		Keys:      keys, Status: status, Leases: sqlstore.For[lease.Tx](s.store), Uses: uses, Services: services,
		Evidence: sqlstore.For[httpapi.EvidenceTx](s.store), Search: sqlstore.For[httpapi.SearchTx](s.store),
		Policy: s.policy, Now: s.store.Now,
		ExternalURL: cfg.ExternalURL, BehindProxy: cfg.BehindProxy, ProxyClientCert: cfg.ProxyClientCert, MaxWait: cfg.Approvals.MaxWait,
		Metrics: metrics, Logger: log,
	})
	expirer := &revocation.Expirer{
		Revoker: revoker, Logger: log, KeepRecords: cfg.Retention.Records, KeepInputs: cfg.Retention.Inputs,
	}
	s.loops = []func(context.Context) error{s.policy.Run, s.identity.Run, approvals.Run, expirer.Run, work.worker.Run, work.surveys.Run, s.watch(metrics, keys, root)}
	s.last = []func(context.Context) error{uses.Run, s.newSequencer(hostOf(cfg), metrics).Run, s.newCopier(cfg.Audit.Copies, metrics).Run}

	if s.api, err = listen(cfg.Listen, handler, cfg.Approvals.MaxWait+30*time.Second, log); err != nil {
		return nil, err
	}
	if cfg.TLS != nil {
		if err := s.api.useTLS(*cfg.TLS); err != nil {
			return nil, err
		}
	}
	s.ops, err = listen(cfg.OpsListen, s.opsHandler(metrics), 30*time.Second, log)
	return s, err
}

// Addr is where the API listens.
func (s *Server) Addr() net.Addr { return s.api.Addr() }

// OpsAddr is where /livez, /readyz and /metrics listen.
func (s *Server) OpsAddr() net.Addr { return s.ops.Addr() }

// Store is the open store, for the demo's look at the record.
func (s *Server) Store() *sqlstore.Store { return s.store }

// Run serves until ctx ends, then drains: /readyz fails, requests in flight end,
// the loops finish what they hold, the store closes.
func (s *Server) Run(ctx context.Context) error {
	defer s.close()
	loops, stopLoops := context.WithCancel(context.WithoutCancel(ctx))
	defer stopLoops()
	g, gctx := errgroup.WithContext(ctx)
	for _, run := range s.loops {
		g.Go(func() error { return run(loops) })
	}
	endLast := s.runLast(context.WithoutCancel(ctx))
	defer endLast()
	for _, l := range []listener{s.api, s.ops} {
		g.Go(func() error {
			if err := l.server.Serve(l.Listener); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("serve %s: %w", l.Addr(), err)
			}
			return nil
		})
	}
	s.log.InfoContext(ctx, "writ is serving", "api", s.api.Addr().String(), "ops", s.ops.Addr().String())
	g.Go(func() error {
		<-gctx.Done()
		s.log.InfoContext(ctx, "writ is stopping")
		close(s.stopping) // also lets held requests go
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
		defer cancel()
		err := s.api.server.Shutdown(drain)
		stopLoops()
		return errors.Join(err, s.ops.server.Shutdown(drain))
	})
	err := g.Wait()
	s.log.InfoContext(ctx, "writ has stopped")
	return err
}

// runLast runs what records the work of the others: each goes on until those before
// it have ended.
func (s *Server) runLast(ctx context.Context) (end func()) {
	var stops []func()
	for _, run := range s.last {
		one, cancel := context.WithCancel(ctx)
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = run(one) // these end without error
		}()
		stops = append(stops, func() { cancel(); <-done })
	}
	return func() {
		for _, stop := range stops {
			stop()
		}
	}
}

func (s *Server) close() {
	for _, l := range []listener{s.api, s.ops} {
		if l.Listener != nil {
			_ = l.Close() // closed already where Run served it
		}
	}
	for _, closeTarget := range s.targets {
		closeTarget()
	}
	if s.store != nil {
		if err := s.store.Close(); err != nil {
			s.log.Error("close store", "error", err)
		}
	}
}

func (s *Server) opsHandler(m *telemetry.Metrics) http.Handler {
	r := chi.NewRouter()
	r.Get("/livez", func(w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprintln(w, "ok") })
	r.Get("/readyz", func(w http.ResponseWriter, r *http.Request) {
		if why := s.unready(r.Context()); why != "" {
			http.Error(w, why, http.StatusServiceUnavailable)
			return
		}
		_, _ = fmt.Fprintln(w, "ok")
	})
	r.Handle("/metrics", m.Handler())
	return r
}

func (s *Server) unready(ctx context.Context) string {
	select {
	case <-s.stopping:
		return "stopping"
	default:
	}
	if !s.policy.Ready() {
		return "no policies"
	}
	if s.stuck.Load() {
		return "audit log is stuck"
	}
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	if err := s.store.Ping(ctx); err != nil {
		return "store unavailable"
	}
	return ""
}

// recordPolicy enters what becomes of policies into the log.
func recordPolicy(store *sqlstore.Store) func(context.Context, policy.Version, error) error {
	return func(ctx context.Context, v policy.Version, refused error) error {
		e := audit.Entry{Kind: audit.PolicyActivated, Detail: map[string]any{"policy": v}}
		if refused != nil {
			e.Kind, e.Detail["error"] = audit.PolicyRefused, refused.Error()
		}
		return store.Update(ctx, func(tx *sqlstore.Tx) error { return audit.Append(ctx, tx, e) })
	}
}

// NewPolicy makes the engine that a configuration describes; it has no policies until
// it loads them.
func NewPolicy(
	cfg config.Policy, record func(context.Context, policy.Version, error) error, m *telemetry.Metrics, log *slog.Logger,
) (*policy.Engine, error) {
	c := policy.Config{
		Path: cfg.Path, Query: cfg.Query, AdminQuery: cfg.AdminQuery, Deadline: cfg.Deadline, Reload: cfg.Reload, Metrics: m, Logger: log, Record: record,
	}
	if sig := cfg.Signature; sig != nil {
		pem, err := os.ReadFile(sig.PublicKeyFile)
		if err != nil {
			return nil, fmt.Errorf("read policy.signature.public_key_file: %w", err)
		}
		key, err := opakeys.NewKeyConfig(string(pem), sig.Algorithm, "")
		if err != nil {
			return nil, fmt.Errorf("read policy.signature.public_key_file: %w", err)
		}
		// Without a key id of its own here, OPA takes the key that the bundle names; it
		// must name this one.
		c.Verification = bundle.NewVerificationConfig(map[string]*bundle.KeyConfig{sig.KeyID: key}, "", "", nil)
	}
	return policy.New(c)
}

func newIdentity(ctx context.Context, cfg config.Config, store *sqlstore.Store, log *slog.Logger) (*identity.Verifier, error) {
	key, err := store.DigestKey(ctx)
	if err != nil {
		return nil, fmt.Errorf("load digest key: %w", err)
	}
	nonceKey, err := hkdf.Expand(sha256.New, key, "writ dpop nonce", sha256.Size)
	if err != nil {
		return nil, fmt.Errorf("derive nonce key: %w", err)
	}
	c := identity.Config{HTTP: identity.NewHTTPClient(issuerTimeout), Now: store.Now, Spend: store.Spend, NonceKey: [sha256.Size]byte(nonceKey), SignedOut: store.SignedOut, Parse: policy.ParseClaims, Logger: log}
	for _, is := range cfg.Issuers {
		out := identity.Issuer{
			URL: is.Issuer, Kind: identity.Kind(is.Token), TrustDomain: is.TrustDomain, Audience: is.Audience,
			Algorithms: is.Algorithms, JWKSFile: is.JWKSFile, JWKSURL: is.JWKSURL, IDTokenClients: is.IDTokenClients,
			Leeway: is.ClockLeeway, MaxAge: is.MaxAge, SubjectClaim: is.Claims.Subject, ClientClaim: is.Claims.Client,
			Match: is.Match, UserMatch: is.UserMatch, SenderConstraint: is.SenderConstraint, DPoPNonce: is.DPoPNonce,
		}
		for _, p := range is.SpeaksFor {
			switch p {
			case config.User:
				out.User = true
			case config.Agent:
				out.Agent = true
			case config.Operator:
				out.Operator = true
			case config.ServicePrincipal:
				out.Service = true
			}
		}
		if is.CIBA != nil {
			out.IDTokenAlgorithms = is.CIBA.Algorithms
			out.OwnClients = append(out.OwnClients, is.CIBA.ClientID)
		}
		if is.SignIn != nil {
			out.OwnClients = append(out.OwnClients, is.SignIn.ClientID)
		}
		if is.Operator != nil {
			out.Operators = identity.Operators(*is.Operator)
		}
		if s := is.Signals; s != nil {
			out.Signals = identity.Signals{Audience: s.Audience, Subjects: cmp.Or(s.Subjects, is.Issuer)}
		}
		c.Issuers = append(c.Issuers, out)
	}
	for _, a := range cfg.Agents {
		agent := identity.Agent{Ref: identity.Ref{Issuer: a.Issuer, ID: a.ID}}
		for _, s := range a.Identities {
			agent.Identities = append(agent.Identities, identity.Ref{Issuer: s.Issuer, ID: s.ID})
		}
		c.Agents = append(c.Agents, agent)
	}
	return identity.New(c)
}

func newProviders(issuers []config.Issuer, v *identity.Verifier) (map[string]approval.Provider, error) {
	out := map[string]approval.Provider{}
	for _, is := range issuers {
		c := is.CIBA
		if c == nil {
			continue
		}
		secret, err := config.Secret(c.ClientSecretFile)
		if err != nil {
			return nil, fmt.Errorf("ciba of %s: %w", is.Issuer, err)
		}
		out[is.Issuer] = ciba.New(ciba.Config{
			Issuer: is.Issuer, ClientID: c.ClientID, ClientSecret: secret, AuthInBody: c.ClientAuth == "client_secret_post",
			LoginHint:   c.LoginHint,
			Limits:      approval.Limits{MaxLength: c.BindingMessage.MaxLength, Portable: c.BindingMessage.Charset == "portable"},
			PollTimeout: c.Timeout, HTTP: identity.NewHTTPClient(c.Timeout), Verifier: v,
		})
	}
	return out, nil
}

func newServices(services []config.Service) ([]httpapi.Service, error) {
	var out []httpapi.Service
	for _, s := range services {
		if s.Subject != nil {
			subject := identity.Ref{Issuer: s.Subject.Issuer, ID: s.Subject.ID}
			out = append(out, httpapi.Service{ID: s.ID, Subject: subject, Audience: s.Audience})
			continue
		}
		secret, err := config.Secret(s.SecretFile)
		if err != nil {
			return nil, fmt.Errorf("service %s: %w", s.ID, err)
		}
		out = append(out, httpapi.Service{ID: s.ID, Secret: secret, Audience: s.Audience})
	}
	return out, nil
}
