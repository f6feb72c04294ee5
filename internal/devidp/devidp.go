package devidp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"time"
)

// Provider is a running provider. It is an http.Handler, so tests can call it
// without a socket.
type Provider struct {
	log      *slog.Logger
	issuer   string
	interval time.Duration
	users    []User
	clients  []client
	tokens   *tokens
	state    state
	csrf     csrf
	listener net.Listener
	handler  http.Handler
}

// New binds the listener, so that Issuer is known before Run. Who does not come
// to call Run must call Close.
func New(cfg Config) (*Provider, error) {
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("dev identity provider: %w", err)
	}
	listener, host, err := listenLoopback(cfg.Listen)
	if err != nil {
		return nil, fmt.Errorf("dev identity provider: %w", err)
	}
	_, port, _ := net.SplitHostPort(listener.Addr().String()) // a TCP address always splits
	issuer := "http://" + net.JoinHostPort(host, port)

	tokens, err := newTokens(issuer, cfg.Key)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("dev identity provider: %w", err), listener.Close())
	}
	p := &Provider{
		log:      cfg.Logger,
		issuer:   issuer,
		interval: cfg.PollInterval,
		users:    slices.Clone(cfg.Users),
		clients:  cfg.clients(),
		tokens:   tokens,
		csrf:     newCSRF(),
		listener: listener,
	}
	p.handler = guard(p.routes())
	return p, nil
}

// listenLoopback also returns the host as it was written, for the issuer.
func listenLoopback(address string) (net.Listener, string, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, "", fmt.Errorf("listen address: %w", err)
	}
	refused := fmt.Errorf("refusing to listen on %q: here anybody may sign in as any user, "+
		"so only loopback will do (127.0.0.1, ::1 or localhost)", address)
	if !isLoopback(host) {
		return nil, "", refused
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return nil, "", fmt.Errorf("listen: %w", err)
	}
	// A hosts file can send "localhost" anywhere.
	if addr, ok := listener.Addr().(*net.TCPAddr); !ok || !addr.IP.IsLoopback() {
		return nil, "", errors.Join(refused, listener.Close())
	}
	return listener, host, nil
}

func (p *Provider) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /.well-known/openid-configuration", p.api(p.discovery))
	mux.HandleFunc("GET /jwks", p.api(p.jwks))

	mux.HandleFunc("GET /authorize", p.showSignIn)
	mux.HandleFunc("POST /authorize", p.signIn)
	mux.HandleFunc("POST /token", p.api(p.token))
	mux.HandleFunc("POST /revoke", p.api(p.revoke))
	mux.HandleFunc("POST /bc-authorize", p.api(p.backchannel))

	mux.Handle("GET /{$}", http.RedirectHandler("/phone", http.StatusFound))
	mux.HandleFunc("GET /phone", p.showPhone)
	mux.HandleFunc("POST /phone/{prompt}", p.answerOnPhone)
	mux.HandleFunc("GET /style.css", showStyle)

	mux.HandleFunc("GET /dev/token", p.devToken)
	return mux
}

// ServeHTTP serves every endpoint.
func (p *Provider) ServeHTTP(w http.ResponseWriter, r *http.Request) { p.handler.ServeHTTP(w, r) }

// Issuer is the provider's URL and the `iss` of its tokens.
func (p *Provider) Issuer() string { return p.issuer }

// PhoneURL is the page that plays the users' phones.
func (p *Provider) PhoneURL() string { return p.issuer + "/phone" }

// Addr is the address the provider listens on.
func (p *Provider) Addr() net.Addr { return p.listener.Addr() }

// Client returns a registration, an agent's or Writ's own, with its secret.
func (p *Provider) Client(id string) (Client, bool) {
	c, ok := p.client(id)
	return c.Client, ok
}

// Close releases the listener of a provider that will not run.
func (p *Provider) Close() error { return p.listener.Close() }

// shutdownGrace is for requests under way; none is meant to take longer.
const shutdownGrace = 5 * time.Second

// Run serves until ctx ends, then lets the requests under way finish.
func (p *Provider) Run(ctx context.Context) error {
	server := &http.Server{
		Handler:           p,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      10 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    32 << 10,
		ErrorLog:          slog.NewLogLogger(p.log.Handler(), slog.LevelWarn),
	}
	stopped := make(chan error, 1)
	cancel := context.AfterFunc(ctx, func() {
		grace, done := context.WithTimeout(context.WithoutCancel(ctx), shutdownGrace)
		defer done()
		err := server.Shutdown(grace)
		if err != nil {
			err = errors.Join(err, server.Close())
		}
		stopped <- err
	})

	err := server.Serve(p.listener)
	if cancel() { // ctx has not ended: serving itself broke
		return fmt.Errorf("serve dev identity provider: %w", err)
	}
	if err := <-stopped; err != nil {
		return fmt.Errorf("stop dev identity provider: %w", err)
	}
	return nil
}
