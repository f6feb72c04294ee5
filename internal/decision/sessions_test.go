package decision_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/decision"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/policy"
	"github.com/writsec/writ/internal/session"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/storetest"
)

// marks has budgets and labels, once of the session and once of the pair.
const marks = `package writ

reason(code) := [{"code": code, "message": code}]

default decision := {"effect": "deny", "reasons": [{"code": "no", "message": "no"}]}

decision := {"effect": "allow", "reasons": reason("plain")} if input.intent.action == "plain"

decision := {"effect": "allow", "reasons": reason("spent"), "counters": {"spent": 1}} if {
	input.intent.action == "spend.session"
	object.get(input.session.counters, "spent", 0) < 10
}

decision := {"effect": "allow", "reasons": reason("spent"), "counters": {"spent": 1}} if {
	input.intent.action == "spend.recent"
	object.get(input.recent.counters, "spent", 0) < 10
}

decision := {"effect": "allow", "reasons": reason("read"), "labels": ["read_untrusted"]} if {
	input.intent.action == "read.session"
	not "sent_out" in input.session.labels
}

decision := {"effect": "allow", "reasons": reason("sent"), "labels": ["sent_out"]} if {
	input.intent.action == "send.session"
	not "read_untrusted" in input.session.labels
}

decision := {"effect": "allow", "reasons": reason("read"), "labels": ["read_untrusted"]} if {
	input.intent.action == "read.recent"
	not "sent_out" in input.recent.labels
}

decision := {"effect": "allow", "reasons": reason("sent"), "labels": ["sent_out"]} if {
	input.intent.action == "send.recent"
	not "read_untrusted" in input.recent.labels
}

# Spends so much that a counter can't hold it twice.
decision := {"effect": "allow", "reasons": reason("much"), "counters": {"much": 9007199254740991}} if input.intent.action == "much"

asks := {"approver": "user", "code": "ask", "message": "ask"}

decision := {"effect": "require_ciba", "reasons": reason("ask"), "approval": [asks]} if {
	input.intent.action == "ask"
	not input.approvals
}

# Tells what it was asked with.
decision := {"effect": "allow", "reasons": [{"code": "told", "message": json.marshal(input.recent)}]} if input.intent.action == "tell"
`

func windowed(c *decision.Config) { c.Sessions.Window = time.Hour }

// atOnce lets n requests go in the same moment, request i as ask says, and returns
// how many were allowed. None may be without a decision.
func (f *fixture) atOnce(n int, ask func(i int) decision.Request) (allowed int) {
	f.t.Helper()
	requests := []decision.Request{}
	for i := range n {
		requests = append(requests, ask(i))
	}
	var count atomic.Int64
	start := make(chan struct{})
	var g sync.WaitGroup
	for _, r := range requests {
		g.Go(func() {
			<-start
			a, err := f.Decide(context.Background(), r)
			if err != nil {
				f.t.Error(err)
			}
			if a.Decision == policy.Allow {
				count.Add(1)
			}
		})
	}
	close(start)
	g.Wait()
	return int(count.Load())
}

// 64 parallel decisions against a budget of 10 let exactly 10 through, and each gets a
// decision.
func TestBudgetOf10(t *testing.T) {
	for _, tt := range []struct {
		name, action string
		sessions     int
	}{
		{"of one session", "spend.session", 1},
		{"of a pair, in one session", "spend.recent", 1},
		{"of a pair, in 8 sessions", "spend.recent", 8},
		{"of a pair, in 64 sessions", "spend.recent", 64},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture(t, marks, windowed)
			var sessions []string
			for range tt.sessions {
				sessions = append(sessions, f.open())
			}
			got := f.atOnce(64, func(i int) decision.Request {
				r := f.request(tt.action)
				r.Session = sessions[i%len(sessions)]
				return r
			})
			var spent int64
			for _, id := range sessions {
				spent += f.session(id).Counters["spent"]
			}
			if recent := f.recent(sessions[0]); got != 10 || spent != 10 || recent.Counters["spent"] != 10 {
				t.Errorf("%d allowed, %d spent in sessions, %d by the pair; want 10 each", got, spent, recent.Counters["spent"])
			}
			if n := f.entries(); n[audit.DecisionAllow] != 10 || n[audit.DecisionDeny] != 54 {
				t.Errorf("audit %v", n)
			}
		})
	}
	t.Run("sessions that open by themselves", func(t *testing.T) {
		f := newFixture(t, marks, windowed)
		if got := f.atOnce(64, func(int) decision.Request { return f.request("spend.recent") }); got != 10 {
			t.Errorf("%d allowed, want 10", got)
		}
	})
	t.Run("by two replicas", func(t *testing.T) {
		if !storetest.OnPostgres() {
			t.Skip("SQLite has one process")
		}
		f := newFixture(t, marks, windowed)
		other := f.replica()
		id, second := f.open(), f.open()
		var allowed atomic.Int64
		var g sync.WaitGroup
		for i := range 64 {
			r := f.request("spend.recent")
			r.Session = []string{id, second}[i/2%2]
			d := []*decision.Decider{f.Decider, other}[i%2]
			g.Go(func() {
				for {
					a, err := d.Decide(context.Background(), r)
					if fault.Is(err, fault.Overloaded) { // the other replica does not take turns with this one
						continue
					}
					if err != nil {
						t.Error(err)
					}
					if a.Decision == policy.Allow {
						allowed.Add(1)
					}
					return
				}
			})
		}
		g.Wait()
		if allowed.Load() != 10 || f.recent(id).Counters["spent"] != 10 {
			t.Errorf("%d allowed, %v left", allowed.Load(), f.recent(id).Counters)
		}
	})
}

// Reading what nobody vouches for and sending out, started together, never both pass:
// whichever comes second finds the label of the first.
func TestReadUntrustedAndSendOut(t *testing.T) {
	for _, tt := range []struct{ name, kind string }{
		{"in one session", "session"}, {"by one pair in one session", "recent"}, {"by one pair in two sessions", "recent2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture(t, marks, func(c *decision.Config) {
				windowed(c)
				c.OpenOnDecide = false
			})
			for round := range 20 {
				user := fmt.Sprint("user", round) // a pair of its own each time
				one := f.openFor(user)
				two := one
				kind := tt.kind
				if kind == "recent2" {
					kind, two = "recent", f.openFor(user)
				}
				got := f.atOnce(8, func(i int) decision.Request {
					r := f.request([]string{"read.", "send."}[i%2] + kind)
					r.Presented.Token, r.Session = f.token(user, "agent"), []string{one, two}[i%2]
					return r
				})
				labels := f.recent(one).Labels
				if got != 4 || len(labels) != 1 { // the four of the kind that was first
					t.Fatalf("round %d: %d of 4 and 4 passed, and left %v", round, got, labels)
				}
			}
		})
	}
}

// What was left stays for the window, whichever session asks, and no longer than a
// 64th more. Other pairs see nothing of it.
func TestRecent(t *testing.T) {
	f := newFixture(t, marks, func(c *decision.Config) { c.Sessions.Window = 2 * time.Second })
	f.decide(f.request("spend.recent"))
	f.decide(f.request("read.recent"))
	start := time.Now()
	tell := func(user, agent string) string {
		r := f.request("tell")
		r.Presented.Token = f.token(user, agent)
		return f.decide(r).Reasons[0].Message
	}
	const all = `{"counters":{"spent":1},"labels":["read_untrusted"],"window":"2s"}`
	const none = `{"counters":{},"labels":[],"window":"2s"}`
	if got := tell("alice", "agent"); got != all {
		t.Errorf("at once: %s", got)
	}
	if got := tell("alice", "other"); got != none {
		t.Errorf("by another agent: %s", got)
	}
	if got := tell("bob", "agent"); got != none {
		t.Errorf("for another user: %s", got)
	}
	for end := start.Add(10 * time.Second); tell("alice", "agent") != none; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it never ends")
		}
	}
	if took := time.Since(start); took < 1500*time.Millisecond {
		t.Errorf("gone after %v", took)
	}
}

// A sum that no counter can hold is refused, never wrapped round.
func TestOverflowFailsClosed(t *testing.T) {
	f := newFixture(t, marks, windowed)
	r := f.request("much")
	r.Session = f.open()
	f.decide(r)
	f.sql(`UPDATE reservations SET amount = 9223372036854775807 - 9007199254740990`)
	other := r
	other.Session = f.open()
	if _, err := f.Decide(context.Background(), other); !fault.Is(err, fault.Internal) {
		t.Errorf("got %v, want a refusal", err)
	}
	if got := f.session(other.Session); len(got.Counters) != 0 || got.Version != 1 {
		t.Errorf("half of it stayed: %+v", got)
	}
}

// A failure in the middle leaves neither half.
func TestBrokenStoreLeavesNoMarks(t *testing.T) {
	for _, table := range []string{"scopes", "reservations"} {
		t.Run(table, func(t *testing.T) {
			f := newFixture(t, marks, windowed)
			r := f.request("spend.recent")
			r.Session = f.open()
			mend := storetest.Break(t, f.url, table)
			if _, err := f.Decide(context.Background(), r); !fault.Is(err, fault.Unavailable) {
				t.Errorf("got %v, want unavailable", err)
			}
			mend()
			if s, recent := f.session(r.Session), f.recent(r.Session); len(s.Counters) != 0 || len(recent.Counters) != 0 || s.ScopeVersion != 0 {
				t.Errorf("left %v and %v", s, recent)
			}
			if a := f.decide(r); a.Decision != policy.Allow {
				t.Errorf("after the repair: %+v", a)
			}
			if s, recent := f.session(r.Session), f.recent(r.Session); s.Counters["spent"] != 1 || recent.Counters["spent"] != 1 {
				t.Errorf("left %v and %v", s.Counters, recent.Counters)
			}
		})
	}
}

// Callers that leave at any moment leave the two in step.
func TestCancelledDecisionsKeepTheBooks(t *testing.T) {
	f := newFixture(t, marks, windowed)
	r := f.request("spend.recent")
	r.Session = f.open()
	allowed := int64(0)
	for i := range 60 {
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(i%12)*400*time.Microsecond)
		a, err := f.Decide(ctx, r)
		cancel()
		if err == nil && a.Decision == policy.Allow {
			allowed++
		}
	}
	s, recent := f.session(r.Session), f.recent(r.Session)
	if s.Counters["spent"] != recent.Counters["spent"] || s.Counters["spent"] < allowed || s.Counters["spent"] > 10 {
		t.Errorf("%d answered, %v in the session, %v by the pair", allowed, s.Counters, recent.Counters)
	}
}

// Whoever waits for a turn leaves when the caller does.
func TestTurnsEndWithTheirCaller(t *testing.T) {
	turns := decision.NewTurns()
	end, err := turns.Take(t.Context(), "k")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := turns.Take(ctx, "k"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	end()
	if end, err = turns.Take(t.Context(), "k"); err != nil {
		t.Fatal(err)
	}
	end()
}

func TestReservedActionsAreRefused(t *testing.T) {
	f := newFixture(t, marks, nil)
	for _, action := range []string{"writ.envelope.widen", "writ.x", "writ."} {
		r := f.request(action)
		_, err := f.Decide(context.Background(), r)
		problem, ok := errors.AsType[*fault.Error](err)
		if !ok || problem.Code != fault.InvalidRequest || problem.Fields[0].Pointer != "/intent/action" {
			t.Errorf("%s: %v", action, err)
		}
	}
	if a := f.decide(f.request("writs.x")); a.Decision != policy.Deny {
		t.Errorf("%+v", a)
	}
}

func TestIdle(t *testing.T) {
	const idle = 800 * time.Millisecond
	f := newFixture(t, marks, func(c *decision.Config) { windowed(c); c.Sessions.Idle = idle })
	r := f.request("plain")
	a := f.decide(r) // opens one
	r.Session = a.Session
	first := f.session(r.Session)
	if first.IdleAt.IsZero() || first.IdleAt.After(time.Now().Add(idle)) {
		t.Fatalf("idle at %v", first.IdleAt)
	}
	f.decide(r)
	if got := f.session(r.Session); !got.IdleAt.Equal(first.IdleAt) {
		t.Error("moved at once: each decision writes")
	}
	for range 6 { // longer than the idle time in all
		time.Sleep(idle / 4)
		f.decide(r)
	}
	got := f.session(r.Session)
	if !got.IdleAt.After(first.IdleAt) || got.Version != first.Version {
		t.Errorf("idle at %v after %v, version %d", got.IdleAt, first.IdleAt, got.Version)
	}
	// While a person is asked, it is not idle, however long the prompt lives.
	ask := f.request("ask")
	asking := f.decide(ask)
	ask.Session = asking.Session
	if s := f.session(ask.Session); s.IdleAt.Before(asking.Approval.ExpiresAt) {
		t.Errorf("idle at %v, while the prompt is open until %v", s.IdleAt, asking.Approval.ExpiresAt)
	}
	time.Sleep(idle)
	if _, err := f.Decide(context.Background(), r); !fault.Is(err, fault.SessionEnded) {
		t.Errorf("an idle session: %v", err)
	}
	f.decide(ask)
}

// 16 decisions that all come when the idle end must move are all answered.
func TestIdleInParallel(t *testing.T) {
	f := newFixture(t, marks, func(c *decision.Config) { windowed(c); c.Sessions.Idle = time.Hour })
	id := f.open() // by a manager that knows no idle end
	got := f.atOnce(16, func(int) decision.Request {
		r := f.request("plain")
		r.Session = id
		return r
	})
	if s := f.session(id); got != 16 || s.IdleAt.IsZero() || s.Version != 1 {
		t.Errorf("%d allowed; %+v", got, s)
	}
}

func (f *fixture) recent(id string) (r session.Recent) {
	f.t.Helper()
	f.must(f.store.View(context.Background(), func(tx *sqlstore.Tx) error {
		s, err := tx.Session(context.Background(), id)
		if err != nil {
			return err
		}
		r, err = session.ReadRecent(context.Background(), tx, s)
		return err
	}))
	return r
}

func (f *fixture) openFor(user string) string {
	f.t.Helper()
	m := session.Manager{Store: sqlstore.For[session.Tx](f.store), Settings: session.Settings{DefaultAge: time.Hour, MaxAge: time.Hour}}
	s, err := m.Open(context.Background(), identity.Caller{
		Agent: identity.Principal{Ref: identity.Ref{Issuer: issuer, ID: "agent"}},
		User:  &identity.Principal{Ref: identity.Ref{Issuer: issuer, ID: user}, Claims: map[string]any{"sub": user}},
	}, session.Spec{})
	f.must(err)
	return s.ID
}
