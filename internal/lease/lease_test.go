package lease_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/intent"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/session"
	"github.com/writsec/writ/internal/sqlstore"
)

var (
	user  = identity.Principal{Ref: identity.Ref{Issuer: "https://idp.example", ID: "alice"}}
	agent = identity.Principal{Ref: identity.Ref{Issuer: "https://idp.example", ID: "crm-agent"}}
	quiet = slog.New(slog.DiscardHandler)
)

func TestMeetsLeast(t *testing.T) {
	t.Parallel()
	for _, kind := range [][]string{{"", "expiry", "introspect", "instant"}, {"", "coarse", "exact"}} {
		for i, offers := range kind {
			for j, least := range kind {
				if got := lease.MeetsLeast(offers, least); got != (i >= j) {
					t.Errorf("%q for at least %q: %v", offers, least, got)
				}
			}
		}
	}
}

func TestLeaseEndsWithItsTimeOrItsSession(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 23, 12, 0, 0, 900e6, time.UTC)
	for _, c := range []struct {
		name            string
		ttl, sessionEnd time.Duration
		want            time.Duration // after the whole second
		alive           bool
	}{
		{"its time", time.Minute, time.Hour, time.Minute, true},
		{"its session", time.Hour, time.Minute, time.Minute, true},
		{"the shortest", time.Second, time.Hour, time.Second, true},
		{"part of a second", 1500 * time.Millisecond, time.Hour, 2 * time.Second, true}, // .9 + 1.5 = 2.4
		{"a session that ends within the second", time.Minute, 50 * time.Millisecond, 0, false},
	} {
		l := lease.New(lease.Grant{TTL: c.ttl}, "ses", now.Add(c.sessionEnd), "dec", "rev", intent.Act{}, "h", now)
		if want := now.Truncate(time.Second).Add(c.want); !l.ExpiresAt.Equal(want) || l.Alive(now) != c.alive {
			t.Errorf("%s: ends %v, want %v; alive %v", c.name, l.ExpiresAt, want, l.Alive(now))
		}
		if l.ExpiresAt.After(now.Add(min(c.ttl, c.sessionEnd))) {
			t.Errorf("%s: outlives its limit", c.name)
		}
		if l.Alive(l.ExpiresAt) {
			t.Errorf("%s: alive at its end", c.name)
		}
	}
	if (lease.Lease{State: lease.Revoked, ExpiresAt: now.Add(time.Hour)}).Alive(now) {
		t.Error("alive though revoked")
	}
}

func TestSecretIsNeverShown(t *testing.T) {
	t.Parallel()
	s := lease.Secret{"token": "hunter2"}
	nested := struct {
		Lease  string
		Secret lease.Secret
	}{"lea", s}
	var shown bytes.Buffer
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%t", "%p"} {
		fmt.Fprintf(&shown, verb+"\n", s)
	}
	fmt.Fprintf(&shown, "%v %+v %#v %s %v %v\n", nested, nested, nested, nested, &nested, []any{s})
	fmt.Fprintln(&shown, s, errors.New(fmt.Sprint("wrapped ", s)))
	for _, h := range []slog.Handler{slog.NewJSONHandler(&shown, nil), slog.NewTextHandler(&shown, nil)} {
		slog.New(h).Info("minted", "secret", s, "group", slog.GroupValue(slog.Any("inner", s)))
		slog.New(h).With("secret", s).Info("minted")
	}
	for _, form := range []string{"hunter2", fmt.Sprintf("%x", "hunter2"), fmt.Sprintf("%X", "hunter2")} {
		if strings.Contains(shown.String(), form) {
			t.Errorf("shown:\n%s", shown.String())
		}
	}
	// The agent does get it.
	answer, err := json.Marshal(nested)
	if err != nil || string(answer) != `{"Lease":"lea","Secret":{"token":"hunter2"}}` {
		t.Errorf("answer %s, %v", answer, err)
	}
}

// world is a store in a bubble of its own.
type world struct {
	t     *testing.T
	ctx   context.Context
	url   string // of the store
	store *sqlstore.Store
	s     session.Session
}

func inWorld(t *testing.T, f func(w *world)) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "writ.db")
	synctest.Test(t, func(t *testing.T) {
		store, err := sqlstore.Open(t.Context(), sqlstore.Config{URL: "sqlite:" + path, Now: time.Now, Logger: quiet})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = store.Close() }()
		w := &world{t: t, ctx: t.Context(), url: "sqlite:" + path, store: store}
		w.in(func(tx *sqlstore.Tx) error {
			w.s = session.New(user, agent.Ref, session.Spec{}, session.Settings{DefaultAge: 12 * time.Hour}, tx.Now())
			return session.Open(w.ctx, tx, w.s, identity.Principal{})
		})
		f(w)
	})
}

func (w *world) in(f func(*sqlstore.Tx) error) {
	w.t.Helper()
	if err := w.store.Update(w.ctx, f); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) begin(ttl time.Duration) (l lease.Lease) {
	w.t.Helper()
	w.in(func(tx *sqlstore.Tx) error {
		g := lease.Grant{Minter: "crm", Kind: "jwt", Scope: map[string]any{}, TTL: ttl}
		l = lease.New(g, w.s.ID, w.s.EndsAt, "dec", "rev", intent.Act{User: user.Ref, Agent: agent.Ref}, "h", tx.Now())
		return lease.Begin(w.ctx, tx, l, w.s.StartedAt, lease.Limits{})
	})
	return l
}

func (w *world) get(id string) (l lease.Lease) {
	w.t.Helper()
	w.in(func(tx *sqlstore.Tx) (err error) {
		l, err = tx.Lease(w.ctx, id)
		return err
	})
	return l
}

func (w *world) entries(id string) (out []string) {
	w.t.Helper()
	w.in(func(tx *sqlstore.Tx) error {
		es, err := tx.Unsequenced(w.ctx, 10000)
		for _, e := range es {
			if e.Lease == id {
				out = append(out, fmt.Sprint(e.Kind, " ", e.Detail["reason"]))
			}
		}
		return err
	})
	return out
}

func TestEndingTwiceChangesNothing(t *testing.T) {
	inWorld(t, func(w *world) {
		l := w.begin(time.Minute)
		end := func(reason string) {
			w.in(func(tx *sqlstore.Tx) error {
				_, err := lease.EndOne(w.ctx, tx, l, lease.End{Reason: reason})
				return err
			})
		}
		time.Sleep(time.Second)
		end("released")
		first := w.get(l.ID)
		time.Sleep(time.Second)
		end("operator")
		if d := cmp.Diff(first, w.get(l.ID)); d != "" {
			t.Errorf("(-first +second):\n%s", d)
		}
		if d := cmp.Diff([]string{string(audit.LeaseActive) + " <nil>", string(audit.LeaseRevoked) + " released"}, w.entries(l.ID)); d != "" {
			t.Errorf("(-want +got):\n%s", d)
		}
	})
}

func TestEndAll(t *testing.T) {
	inWorld(t, func(w *world) {
		for range 1001 { // more than one batch
			w.begin(time.Minute)
		}
		endAll := func() (n int) {
			w.in(func(tx *sqlstore.Tx) error {
				ended, err := lease.EndAll(w.ctx, tx, lease.Selection{Session: w.s.ID}, lease.End{Reason: lease.EndSession})
				n = ended.Total()
				if ended["jwt"] != n {
					t.Errorf("%v", ended)
				}
				return err
			})
			return n
		}
		if a, b := endAll(), endAll(); a != 1001 || b != 0 {
			t.Errorf("ended %d, then %d", a, b)
		}
	})
}

func TestFind(t *testing.T) {
	inWorld(t, func(w *world) {
		l := w.begin(time.Minute)
		other := identity.Principal{Ref: identity.Ref{Issuer: "https://idp.example", ID: "other"}}
		for _, c := range []struct {
			name   string
			id     string
			caller identity.Caller
			found  bool
		}{
			{"the agent", l.ID, identity.Caller{Agent: agent}, true},
			{"the agent for its user", l.ID, identity.Caller{Agent: agent, User: &user}, true},
			{"the agent for another", l.ID, identity.Caller{Agent: agent, User: &other}, false},
			{"another agent", l.ID, identity.Caller{Agent: other, User: &user}, false},
			{"an agent of another issuer", l.ID, identity.Caller{Agent: identity.Principal{Ref: identity.Ref{Issuer: "x", ID: agent.ID}}}, false},
			{"no such lease", id.New(id.Lease), identity.Caller{Agent: agent}, false},
			{"no id", "lea_'--", identity.Caller{Agent: agent}, false},
		} {
			w.in(func(tx *sqlstore.Tx) error {
				if _, err := lease.Find(w.ctx, tx, c.id, c.caller); (err == nil) != c.found || err != nil && !fault.Is(err, fault.NotFound) {
					t.Errorf("%s: %v", c.name, err)
				}
				return nil
			})
		}
	})
}
