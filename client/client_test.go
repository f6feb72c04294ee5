package client_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/writsec/writ/client"
	"github.com/writsec/writ/internal/dev"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// newDev runs a whole Writ with the embedded OpenID provider.
func newDev(t *testing.T) *dev.Dev {
	t.Helper()
	const anyPort = "127.0.0.1:0"
	d, err := dev.New(t.Context(), dev.Config{
		Dir: t.TempDir(), Listen: anyPort, OpsListen: anyPort, IDPListen: anyPort, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- d.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
		http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	})
	return d
}

func agent(t *testing.T, d *dev.Dev, user, id string) *client.Client {
	t.Helper()
	return client.New(d.URL+"/", func(context.Context) (string, error) { return d.IDP.AccessToken(user, id, 0) })
}

var (
	read     = client.Intent{Action: "crm.opportunity.read"}
	opp      = client.Resource{Type: "crm.opportunity", ID: "opp-42"}
	offboard = client.Intent{Action: "hr.employee.offboard"}
	employee = client.Resource{Type: "hr.employee", ID: "e-1001"}
)

func TestClient(t *testing.T) {
	d := newDev(t)
	ctx := t.Context()
	alice := agent(t, d, "alice", "sales-agent")

	s, err := alice.OpenSession(ctx, client.SessionRequest{Task: "read", ExpiresIn: 600})
	if err != nil {
		t.Fatal(err)
	}
	if s.Status != "active" || s.User.Subject != "alice" || s.Agent.Subject != "sales-agent" {
		t.Errorf("opened %+v", s)
	}
	got, err := alice.Decide(ctx, client.Request{Session: s.ID, Intent: read, Resource: opp})
	if err != nil {
		t.Fatal(err)
	}
	if got.Effect != client.Allow || got.Credential == nil || got.Credential.Secret["token"] == "" {
		t.Fatalf("decided %+v", got)
	}
	l, err := alice.Lease(ctx, got.Credential.Lease)
	if err != nil || l.State != "active" || l.Session != s.ID || l.Decision != got.ID || l.Kind != "jwt" || !l.EndedAt.IsZero() || !l.ExpiresAt.Equal(got.Credential.ExpiresAt) {
		t.Errorf("lease %+v, %v", l, err)
	}
	again, err := alice.Renew(ctx, l.ID, client.Request{Session: s.ID, Approval: "ignored", Intent: read, Resource: opp})
	if err != nil || again.Effect != client.Allow || again.Credential.Lease != l.ID || again.Credential.Secret["token"] == "" {
		t.Errorf("renewed %+v, %v", again, err)
	}
	if l, err = alice.Release(ctx, l.ID); err != nil || l.State != "revoked" || l.EndReason != "released" || l.EndedAt.IsZero() || !l.GoneAt.Equal(l.EndedAt) {
		t.Errorf("released %+v, %v", l, err)
	}
	_, err = alice.Renew(ctx, l.ID, client.Request{Intent: read, Resource: opp})
	if p, ok := errors.AsType[*client.Error](err); !ok || p.Code != "lease_ended" {
		t.Errorf("renewed what was released: %v", err)
	}
	if s, err = alice.EndSession(ctx, s.ID); err != nil || s.Status != "ended" {
		t.Errorf("ended %+v, %v", s, err)
	}
	if s, err = alice.Session(ctx, s.ID); err != nil || s.Status != "ended" {
		t.Errorf("looked at %+v, %v", s, err)
	}
}

func TestClientApproval(t *testing.T) {
	d := newDev(t)
	ctx := t.Context()
	bob := agent(t, d, "bob", "hr-agent")
	asked, err := bob.Decide(ctx, client.Request{Intent: offboard, Resource: employee})
	if err != nil || asked.Effect != client.RequireCIBA {
		t.Fatalf("decided %+v, %v", asked, err)
	}
	withdrawn, err := bob.Withdraw(ctx, asked.Approval.ID)
	if err != nil || withdrawn.Status != "cancelled" {
		t.Errorf("withdrew %+v, %v", withdrawn, err)
	}
	// Held until the phone has answered.
	ctx, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() { defer close(done); approveAll(ctx, d) }()
	held, err := bob.Decide(ctx, client.Request{Intent: offboard, Resource: employee, Wait: time.Minute})
	if err != nil || held.Effect != client.Allow || held.Credential == nil {
		t.Errorf("held: %+v, %v", held, err)
	}
	stop()
	<-done
}

// approveAll says yes to whatever reaches a phone. The withdrawn prompt may be
// among it; its answer counts for nothing.
func approveAll(ctx context.Context, d *dev.Dev) {
	for ctx.Err() == nil {
		for _, p := range d.IDP.Prompts() {
			_ = d.IDP.Answer(p.ID, true) // answered already
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func TestClientErrors(t *testing.T) {
	d := newDev(t)
	ctx := t.Context()
	alice := agent(t, d, "alice", "sales-agent")
	_, err := alice.Session(ctx, "ses_nothing")
	p, ok := errors.AsType[*client.Error](err)
	if !ok || p.Status != http.StatusNotFound || p.Code != "not_found" || p.RequestID == "" {
		t.Errorf("unknown session: %v", err)
	}
	_, err = alice.Decide(ctx, client.Request{Intent: client.Intent{Action: "NOT AN ACTION"}, Resource: opp})
	p, ok = errors.AsType[*client.Error](err)
	if !ok || p.Code != "invalid_request" || len(p.Errors) != 1 || p.Errors[0].Pointer != "/intent/action" {
		t.Errorf("bad action: %v", err)
	}
	broke := errors.New("no token today")
	noToken := client.New(d.URL, func(context.Context) (string, error) { return "", broke })
	if _, err := noToken.Decide(ctx, client.Request{Intent: read, Resource: opp}); !errors.Is(err, broke) {
		t.Errorf("without a token: %v", err)
	}
}

// A connection that breaks after Writ decided must not make a second decision.
func TestClientRetriesWithOneKey(t *testing.T) {
	var calls atomic.Int64
	keys := make(chan string, 10)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		keys <- r.Header.Get("Idempotency-Key")
		if calls.Add(1) == 1 {
			panic(http.ErrAbortHandler)
		}
		_, _ = io.WriteString(w, `{"decision":"deny","reasons":[{"code":"no"}]}`)
	}))
	defer srv.Close()
	c := client.New(srv.URL, client.StaticToken("t"))
	d, err := c.Decide(t.Context(), client.Request{Intent: read, Resource: opp})
	if err != nil || d.Effect != client.Deny {
		t.Fatalf("decided %+v, %v", d, err)
	}
	if first, second := <-keys, <-keys; first != second || len(first) < 20 {
		t.Errorf("keys %q and %q, want one and the same", first, second)
	}
	c.HTTP.CloseIdleConnections()
}
