package revocation_test

import (
	"context"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/intent"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/reservation"
	"github.com/writsec/writ/internal/revocation"
	"github.com/writsec/writ/internal/session"
	"github.com/writsec/writ/internal/sqlstore"
)

// ends lists how leases and sessions ended, by the record.
func (w *world) ends() map[string]int {
	w.t.Helper()
	out := map[string]int{}
	err := w.View(w.t.Context(), func(tx *sqlstore.Tx) error {
		entries, err := tx.Unsequenced(w.t.Context(), 10_000)
		for _, e := range entries {
			if e.Kind == audit.LeaseRevoked || e.Kind == audit.SessionEnded || e.Kind == audit.ApprovalClosed {
				reason, _ := e.Detail["reason"].(string)
				out[string(e.Kind)+" "+reason]++
			}
		}
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return out
}

func TestExpirer(t *testing.T) {
	w := newWorld(t)
	e := &revocation.Expirer{Revoker: w.revoker, Logger: slog.New(slog.DiscardHandler)}
	step := func() {
		t.Helper()
		for more := true; more; {
			var err error
			if more, err = e.Step(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	// More than one batch of leases in one session.
	err := w.Update(t.Context(), func(tx *sqlstore.Tx) error {
		for range lease.BatchSize + 50 {
			l := lease.New(lease.Grant{Kind: "jwt", TTL: 10 * time.Second}, w.aliceX.ID, w.aliceX.EndsAt, "dec", "rev", actOf(w.aliceX), "h", tx.Now())
			if err := lease.Begin(t.Context(), tx, l, w.aliceX.StartedAt, lease.Limits{}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	start := w.now
	step()
	if got := w.ends(); len(got) != 0 {
		t.Fatalf("ended before their time: %v", got)
	}
	w.now = start.Add(11 * time.Second)
	step()
	if diff := cmp.Diff(map[string]int{"lease.revoked expired": lease.BatchSize + 50}, w.ends()); diff != "" {
		t.Error(diff)
	}
	w.now = start.Add(time.Hour)
	step()
	step() // ending twice changes nothing
	want := map[string]int{
		"lease.revoked expired": lease.BatchSize + 53, "session.ended expired": 3, "approval.closed the session ended": 3,
	}
	if diff := cmp.Diff(want, w.ends()); diff != "" {
		t.Error(diff)
	}
	if got := w.alive(); len(got) != 0 {
		t.Errorf("still alive: %v", got)
	}
	if got := w.metric(`writ_leases_total{event="expired",kind="jwt"}`); got != fmt.Sprint(lease.BatchSize+53) {
		t.Errorf("counted %s expired leases", got)
	}
}

func TestExpirerStops(t *testing.T) {
	w := newWorld(t)
	e := &revocation.Expirer{Revoker: w.revoker, Logger: slog.New(slog.DiscardHandler)}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := e.Run(ctx); err != nil {
		t.Error(err)
	}
}

func actOf(s session.Session) intent.Act { return intent.Act{User: s.User.Ref, Agent: s.Agent} }

// A session in which nothing was decided for the idle time ends, with its credentials
// and approvals; one that was used meanwhile does not, however long the old look at it.
func TestExpirerEndsIdleSessions(t *testing.T) {
	w := newWorld(t)
	e := &revocation.Expirer{Revoker: w.revoker, Logger: slog.New(slog.DiscardHandler)}
	limits := session.Settings{Idle: 10 * time.Minute, Window: time.Hour}
	use := func(name string, busy time.Duration) {
		t.Helper()
		err := w.Update(t.Context(), func(tx *sqlstore.Tx) error {
			s, err := tx.Session(t.Context(), w.sessions[name])
			if err != nil {
				return err
			}
			return session.Settle(t.Context(), tx, s, limits, session.Settlement{Busy: busy})
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	step := func() {
		t.Helper()
		if _, err := e.Step(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	start := w.now
	use("alice-x", 0)
	use("alice-y", 0)
	use("bob-x", 25*time.Minute) // a person is asked for so long
	w.now = start.Add(9 * time.Minute)
	use("alice-y", 0)
	step()
	if got := w.ends(); got["session.ended idle"] != 0 {
		t.Errorf("ended before their time: %v", got)
	}
	w.now = start.Add(10 * time.Minute)
	step()
	if got := w.ends(); got["session.ended idle"] != 1 || got["session.ended expired"] != 0 {
		t.Errorf("after 10 minutes: %v", got)
	}
	w.now = start.Add(34 * time.Minute)
	step()
	if got := w.ends(); got["session.ended idle"] != 2 {
		t.Errorf("after 34 minutes: %v", got)
	}
	w.now = start.Add(35 * time.Minute)
	step()
	if got := w.ends(); got["session.ended idle"] != 3 || got["approval.closed the session ended"] != 3 {
		t.Errorf("after 35 minutes: %v", got)
	}
}

// What is over of the marks on pairs is dropped in bounded steps, and the rest stays.
func TestExpirerForgetsMarks(t *testing.T) {
	w := newWorld(t)
	e := &revocation.Expirer{Revoker: w.revoker, Logger: slog.New(slog.DiscardHandler)}
	reserve := func(until time.Time, n int) {
		t.Helper()
		err := w.Update(t.Context(), func(tx *sqlstore.Tx) error {
			for i := range n {
				r := reservation.Reservation{Name: "n", Amount: 1, Until: until.Add(time.Duration(i) * time.Millisecond)}
				if err := tx.InsertReservation(t.Context(), "pair", r); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	reserve(w.now.Add(time.Second), 250)
	reserve(w.now.Add(time.Hour), 1)
	w.now = w.now.Add(time.Minute)
	steps := 0
	for more := true; more; steps++ {
		var err error
		if more, err = e.Step(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if steps != 3 {
		t.Errorf("%d steps for 250 rows", steps)
	}
	err := w.View(t.Context(), func(tx *sqlstore.Tx) error {
		u, err := tx.Usage(t.Context(), "pair")
		if u["n"].Amount != 1 {
			t.Errorf("left: %v", u)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
