package revocation_test

import (
	"context"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/writsec/writ/internal/approval"
	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/intent"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/revocation"
	"github.com/writsec/writ/internal/session"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/storetest"
	"github.com/writsec/writ/internal/telemetry"
)

func person(id string) identity.Principal {
	return identity.Principal{Ref: identity.Ref{Issuer: "https://idp.example", ID: id}}
}

var (
	alice, bob, carol, x, y = person("alice"), person("bob"), person("carol"), person("agent-x"), person("agent-y")
	operator                = person("root")
)

// world has a session of alice with x, one of alice with y and one of bob with x,
// each with a lease and an open prompt.
type world struct {
	*sqlstore.Store
	t                    *testing.T
	now                  time.Time
	metrics              *telemetry.Metrics
	revoker              *revocation.Revoker
	aliceX, aliceY, bobX session.Session
	sessions             map[string]string // names by id
	leaseOf, approvalOf  map[string]string // by name of the session
}

func newWorld(t *testing.T) *world {
	t.Helper()
	t.Parallel()
	w := &world{
		t: t, now: time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC), metrics: telemetry.NewMetrics(),
		sessions: map[string]string{}, leaseOf: map[string]string{}, approvalOf: map[string]string{},
	}
	var err error
	w.Store, err = sqlstore.Open(t.Context(), sqlstore.Config{
		URL: storetest.URL(t, migrate), Now: func() time.Time { return w.now }, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.Close() })
	w.revoker = &revocation.Revoker{Store: sqlstore.For[revocation.Tx](w.Store), Metrics: w.metrics}
	w.aliceX, w.aliceY, w.bobX = w.open("alice-x", alice, x), w.open("alice-y", alice, y), w.open("bob-x", bob, x)
	return w
}

func (w *world) open(name string, user, agent identity.Principal) (s session.Session) {
	w.t.Helper()
	ctx := w.t.Context()
	err := w.Update(ctx, func(tx *sqlstore.Tx) error {
		s = session.New(user, agent.Ref, session.Spec{}, session.Settings{DefaultAge: time.Hour}, tx.Now())
		if err := session.Open(ctx, tx, s, identity.Principal{}); err != nil {
			return err
		}
		l := lease.New(lease.Grant{Kind: "jwt", TTL: time.Minute}, s.ID, s.EndsAt, "dec_"+name, "rev", intent.Act{User: user.Ref, Agent: agent.Ref}, "h", tx.Now())
		if err := lease.Begin(ctx, tx, l, s.StartedAt, lease.Limits{}); err != nil {
			return err
		}
		a, err := approval.Open(ctx, tx, approval.Opening{
			Plan: approval.Plan{ApproverRef: user.Ref, ExpiresIn: time.Minute}, Session: s.ID, User: user.Ref, Agent: agent.Ref,
			IntentHash: name, MaxPending: 10,
		})
		w.leaseOf[name], w.approvalOf[name] = l.ID, a.ID
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.sessions[name] = s.ID
	return s
}

// alive names everything that still lives.
func (w *world) alive() (out []string) {
	w.t.Helper()
	ctx := w.t.Context()
	err := w.View(ctx, func(tx *sqlstore.Tx) error {
		for name, id := range w.sessions {
			s, err := tx.Session(ctx, id)
			if err != nil {
				return err
			}
			l, err := tx.Lease(ctx, w.leaseOf[name])
			if err != nil {
				return err
			}
			a, err := tx.Approval(ctx, w.approvalOf[name])
			if err != nil {
				return err
			}
			for part, lives := range map[string]bool{"session": s.Alive(tx.Now()), "lease": l.Alive(tx.Now()), "approval": a.Open()} {
				if lives {
					out = append(out, name+" "+part)
				}
			}
		}
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
	slices.Sort(out)
	return out
}

func all(names ...string) (out []string) {
	for _, n := range names {
		out = append(out, n+" approval", n+" lease", n+" session")
	}
	return out
}

func (w *world) metric(name string) string {
	r := httptest.NewRecorder()
	w.metrics.Handler().ServeHTTP(r, httptest.NewRequest("GET", "/metrics", nil))
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(name) + ` (\S+)$`).FindStringSubmatch(r.Body.String())
	if m == nil {
		return "none"
	}
	return m[1]
}

func ofUser(r identity.Ref) revocation.Scope {
	return revocation.Scope{Kind: revocation.OfUser, Value: r.ID, Issuer: r.Issuer}
}

type ended struct{ Leases, Sessions int }

func (w *world) revoke(ctx context.Context, s revocation.Scope, reason string) (ended, error) {
	p, err := w.revoker.Revoke(ctx, revocation.Order{Operator: operator.Ref, Scope: s, Reason: reason})
	return ended{p.Leases, p.Sessions}, err
}

func TestKillSwitch(t *testing.T) {
	for name, c := range map[string]struct {
		scope  func(w *world) revocation.Scope
		result ended
		left   []string
	}{
		"lease": {func(w *world) revocation.Scope {
			return revocation.Scope{Kind: revocation.OfLease, Value: w.leaseOf["alice-x"]}
		},
			ended{Leases: 1}, append([]string{"alice-x approval", "alice-x session"}, all("alice-y", "bob-x")...)},
		"session": {func(w *world) revocation.Scope {
			return revocation.Scope{Kind: revocation.OfSession, Value: w.aliceX.ID}
		},
			ended{Leases: 1, Sessions: 1}, all("alice-y", "bob-x")},
		"user": {func(*world) revocation.Scope { return ofUser(alice.Ref) },
			ended{Leases: 2, Sessions: 2}, all("bob-x")},
		"agent": {func(*world) revocation.Scope {
			return revocation.Scope{Kind: revocation.OfAgent, Value: x.ID, Issuer: x.Issuer}
		},
			ended{Leases: 2, Sessions: 2}, all("alice-y")},
		"all": {func(*world) revocation.Scope { return revocation.Scope{Kind: revocation.OfAll} },
			ended{Leases: 3, Sessions: 3}, nil},
		"a user without anything": {func(*world) revocation.Scope { return ofUser(carol.Ref) },
			ended{}, all("alice-x", "alice-y", "bob-x")},
		"a user of another issuer": {func(*world) revocation.Scope {
			return ofUser(identity.Ref{Issuer: "https://other.example", ID: "alice"})
		},
			ended{}, all("alice-x", "alice-y", "bob-x")},
		"nothing": {func(*world) revocation.Scope { return revocation.Scope{} },
			ended{}, all("alice-x", "alice-y", "bob-x")},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			got, err := w.revoke(t.Context(), c.scope(w), "drill")
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(c.result, got); d != "" {
				t.Errorf("result (-want +got):\n%s", d)
			}
			if d := cmp.Diff(c.left, w.alive()); d != "" {
				t.Errorf("left (-want +got):\n%s", d)
			}
			again, err := w.revoke(t.Context(), c.scope(w), "drill")
			if err != nil || again != (ended{}) {
				t.Errorf("again: %+v, %v", again, err)
			}
		})
	}
}

func TestKillSwitchTypos(t *testing.T) {
	w := newWorld(t)
	for _, s := range []revocation.Scope{{Kind: revocation.OfLease, Value: "lea_x"}, {Kind: revocation.OfSession, Value: "ses_x"}} {
		if _, err := w.revoke(t.Context(), s, ""); !fault.Is(err, fault.NotFound) {
			t.Errorf("%+v: %v", s, err)
		}
	}
	if d := cmp.Diff(all("alice-x", "alice-y", "bob-x"), w.alive()); d != "" {
		t.Error(d)
	}
}

func TestKillSwitchIsRecordedAndCounted(t *testing.T) {
	w := newWorld(t)
	if _, err := w.revoke(t.Context(), ofUser(alice.Ref), "phished"); err != nil {
		t.Fatal(err)
	}
	var entry *audit.Entry
	n := 0
	err := w.View(t.Context(), func(tx *sqlstore.Tx) error {
		es, err := tx.Unsequenced(t.Context(), 100)
		for _, e := range es {
			switch e.Kind {
			case audit.OperatorRevoked:
				entry = &e
			case audit.LeaseRevoked, audit.SessionEnded:
				n++
				if e.Operator != operator.Ref {
					t.Errorf("%s does not name the operator", e.Kind)
				}
			}
		}
		return err
	})
	if err != nil || entry == nil || n != 4 {
		t.Fatal(err, entry, n)
	}
	want := "map[frozen:false reason:phished revocation:" + fmt.Sprint(entry.Detail["revocation"]) + " scope:user sign_ins:0]"
	if got := fmt.Sprint(entry.Detail); got != want || entry.Operator != operator.Ref || entry.User != alice.Ref {
		t.Errorf("entry %+v", entry)
	}
	for name, want := range map[string]string{
		`writ_approvals_total{status="cancelled"}`:            "2",
		`writ_leases_total{event="session_ended",kind="jwt"}`: "0",
		`writ_leases_total{event="operator",kind="jwt"}`:      "2",
	} {
		if got := w.metric(name); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
}

func TestRelease(t *testing.T) {
	w := newWorld(t)
	caller := identity.Caller{Agent: x, User: &alice}
	for range 2 {
		l, err := w.revoker.Release(t.Context(), caller, w.leaseOf["alice-x"])
		if err != nil || l.State != lease.Revoked || l.EndReason != "released" || !l.EndedAt.Equal(w.now) {
			t.Errorf("%+v, %v", l, err)
		}
	}
	if got := w.metric(`writ_leases_total{event="released",kind="jwt"}`); got != "1" {
		t.Errorf("counted %s times", got)
	}
	for name, c := range map[string]identity.Caller{"another agent": {Agent: y}, "another user": {Agent: x, User: &bob}} {
		if _, err := w.revoker.Release(t.Context(), c, w.leaseOf["alice-x"]); !fault.Is(err, fault.NotFound) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := w.revoke(t.Context(), revocation.Scope{Kind: revocation.OfLease, Value: w.leaseOf["bob-x"]}, ""); err != nil {
		t.Fatal(err)
	}
	if l, err := w.revoker.Release(t.Context(), identity.Caller{Agent: x}, w.leaseOf["bob-x"]); err != nil || l.EndReason != "operator" {
		t.Errorf("releasing what an operator revoked: %s, %v", l.EndReason, err)
	}
}

func TestEndSession(t *testing.T) {
	w := newWorld(t)
	caller := identity.Caller{Agent: x, User: &alice}
	s, err := w.revoker.EndSession(t.Context(), caller, w.aliceX.ID)
	if err != nil || s.EndedAt.IsZero() || s.EndReason != "ended by the agent" {
		t.Errorf("%+v, %v", s, err)
	}
	if d := cmp.Diff(all("alice-y", "bob-x"), w.alive()); d != "" {
		t.Errorf("left (-want +got):\n%s", d)
	}
	if again, err := w.revoker.EndSession(t.Context(), caller, w.aliceX.ID); err != nil || !cmp.Equal(again, s) {
		t.Errorf("again: %v", err)
	}
	for name, c := range map[string]identity.Caller{"another agent": {Agent: y}, "another user": {Agent: x, User: &bob}} {
		if _, err := w.revoker.EndSession(t.Context(), c, w.aliceX.ID); !fault.Is(err, fault.NotFound) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if got := w.metric(`writ_approvals_total{status="cancelled"}`); got != "1" {
		t.Errorf("cancelled approvals: %s", got)
	}
}

// Whatever the order, nothing is minted in a session after its end.
func TestEndRacesWithDecisions(t *testing.T) {
	w := newWorld(t)
	ctx := t.Context()
	var g sync.WaitGroup
	for range 8 {
		g.Go(func() {
			for range 20 {
				var s session.Session
				err := w.View(ctx, func(tx *sqlstore.Tx) (err error) { // as the Decider does
					s, err = tx.Session(ctx, w.aliceX.ID)
					return err
				})
				if err != nil {
					t.Error(err)
				}
				_ = w.Update(ctx, func(tx *sqlstore.Tx) error {
					if err := session.Settle(ctx, tx, s, session.Settings{Window: time.Hour}, session.Settlement{Marks: session.Marks{Counters: map[string]int64{"n": 1}}}); err != nil {
						return err
					}
					l := lease.New(lease.Grant{Kind: "jwt", TTL: time.Minute}, s.ID, s.EndsAt, "dec", "rev", intent.Act{User: alice.Ref, Agent: x.Ref}, "h", tx.Now())
					return lease.Begin(ctx, tx, l, s.StartedAt, lease.Limits{})
				})
			}
		})
	}
	g.Go(func() {
		if _, err := w.revoke(ctx, revocation.Scope{Kind: revocation.OfAll}, ""); err != nil {
			t.Error(err)
		}
	})
	g.Wait()
	if left := w.alive(); len(left) > 0 {
		t.Errorf("left: %s", strings.Join(left, ", "))
	}
	err := w.View(ctx, func(tx *sqlstore.Tx) error {
		ls, err := tx.Leases(ctx, lease.Query{State: lease.Active, Limit: 10})
		if len(ls) > 0 {
			t.Errorf("%d leases live on", len(ls))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A proxy's timeout must not undo a kill switch.
func TestKillSwitchOutlivesItsCaller(t *testing.T) {
	w := newWorld(t)
	ctx, hangUp := context.WithCancel(t.Context())
	hangUp()
	got, err := w.revoke(ctx, revocation.Scope{Kind: revocation.OfAll}, "")
	if err != nil || got != (ended{Leases: 3, Sessions: 3}) {
		t.Errorf("%+v, %v", got, err)
	}
	if left := w.alive(); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

// An operator reads a lease in the log; a retry may have replaced it since.
func TestKillSwitchFollowsAReissuedLease(t *testing.T) {
	w := newWorld(t)
	old := w.leaseOf["alice-x"]
	err := w.Update(t.Context(), func(tx *sqlstore.Tx) error {
		l, err := tx.Lease(t.Context(), old)
		if err != nil {
			return err
		}
		if _, err := lease.EndOne(t.Context(), tx, l, lease.End{Reason: lease.EndReissued}); err != nil {
			return err
		}
		l.ID = id.New(id.Lease)
		w.leaseOf["alice-x"] = l.ID
		return lease.Begin(t.Context(), tx, l, w.aliceX.StartedAt, lease.Limits{})
	})
	if err != nil {
		t.Fatal(err)
	}
	got, err := w.revoke(t.Context(), revocation.Scope{Kind: revocation.OfLease, Value: old}, "")
	if err != nil || got.Leases != 1 {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestMain(m *testing.M) { os.Exit(storetest.Both(m)) }

// migrate fills the template that each test's database is cloned from.
func migrate(ctx context.Context, url string) error {
	s, err := sqlstore.Open(ctx, sqlstore.Config{URL: url, Now: func() time.Time { return time.Unix(0, 0) }, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	return s.Close()
}
