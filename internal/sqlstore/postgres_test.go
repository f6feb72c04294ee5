package sqlstore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/writsec/writ/internal/approval"
	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/intent"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/revocation"
	"github.com/writsec/writ/internal/session"
	"github.com/writsec/writ/internal/storetest"
	"github.com/writsec/writ/internal/telemetry"
)

// Two replicas on an empty database: both come up, one migrates.
func TestReplicasStartTogether(t *testing.T) {
	t.Parallel()
	url := storetest.Database(t, "empty", func(context.Context, string) error { return nil })
	var g sync.WaitGroup
	for range 4 {
		g.Go(func() {
			s, err := Open(t.Context(), Config{URL: url, Root: root, Logger: quiet})
			if err != nil {
				t.Error(err)
				return
			}
			defer s.Close()
			if err := audit.OpenLog(t.Context(), For[audit.LogTx](s), "h"); err != nil {
				t.Error(err)
			}
			if _, err := s.DigestKey(t.Context()); err != nil {
				t.Error(err)
			}
			keys, err := s.ListKeys(t.Context())
			if err != nil || len(keys) != 3 {
				t.Errorf("%d keys, %v", len(keys), err)
			}
		})
	}
	g.Wait()
}

func TestReplicasWakeEachOther(t *testing.T) {
	f := newPostgres(t)
	other, err := f.second(nil)
	if err != nil {
		t.Fatal(err)
	}
	wake, stop := other.Watch("topic")
	defer stop()
	woken := func(within time.Duration) time.Duration {
		t.Helper()
		start := time.Now()
		select {
		case <-wake:
			return time.Since(start)
		case <-time.After(within):
			t.Fatalf("not woken within %v", within)
			return 0
		}
	}
	notify := func() {
		f.in(func(tx *Tx) error { tx.Notify("topic"); return nil })
	}
	notify()
	woken(5 * time.Second)
	_ = f.Update(f.ctx, func(tx *Tx) error { tx.Notify("topic"); return errors.New("undone") })
	select {
	case <-wake:
		t.Error("woken by what did not happen")
	case <-time.After(100 * time.Millisecond):
	}

	// Without its listener it looks for itself, and listens again.
	if err := f.raw().Exec(`SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND query = 'LISTEN writ'`); err != nil {
		t.Fatal(err)
	}
	woken(5 * time.Second)
	for end := time.Now().Add(10 * time.Second); ; {
		notify()
		select {
		case <-wake:
			return
		case <-time.After(50 * time.Millisecond):
		}
		if time.Now().After(end) {
			t.Fatal("it does not listen again")
		}
	}
}

// The server's clock rules, whatever the replica's own says.
func TestOneClock(t *testing.T) {
	f := newPostgres(t)
	s, err := f.second(func(c *Config) { c.Now = nil })
	if err != nil {
		t.Fatal(err)
	}
	text, err := f.raw().QueryRow(`SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint::text`)
	if err != nil {
		t.Fatal(err)
	}
	var us int64
	_, _ = fmt.Sscan(text, &us)
	server := time.UnixMicro(us)
	near := func(name string, got time.Time) {
		t.Helper()
		if d := got.Sub(server); d < -time.Millisecond || d > 5*time.Second {
			t.Errorf("%s is %v from the server's clock", name, d)
		}
	}
	near("Now", s.Now())
	err = s.Update(f.ctx, func(tx *Tx) error { near("a transaction", tx.Now()); return nil })
	if err != nil {
		t.Fatal(err)
	}
	// A process whose wall clock is wrong still reads the server's: only the monotonic
	// clock is its own.
	e := s.engine.(*postgres)
	e.clock.Store(&reading{server: server.Add(-time.Hour), local: time.Now()})
	if d := s.Now().Sub(server.Add(-time.Hour)); d < 0 || d > 5*time.Second {
		t.Errorf("Now follows this machine's clock: %v", d)
	}
	if err := s.Ping(f.ctx); err != nil {
		t.Fatal(err)
	}
	near("after the next transaction, Now", s.Now())
}

// Deadlocks and the like are the server's word to begin again.
func TestDeadlockIsRepeated(t *testing.T) {
	f := newPostgres(t)
	a, b := f.session(), f.session()
	runs := make(chan int, 2)
	var meet sync.WaitGroup
	meet.Add(2)
	cross := func(first, second string) error {
		n := 0
		err := f.Update(f.ctx, func(tx *Tx) error {
			n++
			if _, err := tx.Session(f.ctx, first); err != nil {
				return err
			}
			if n == 1 {
				meet.Done()
				meet.Wait()
			}
			_, err := tx.Session(f.ctx, second)
			return err
		})
		runs <- n
		return err
	}
	var g sync.WaitGroup
	for _, p := range [][2]string{{a.ID, b.ID}, {b.ID, a.ID}} {
		g.Go(func() {
			if err := cross(p[0], p[1]); err != nil {
				t.Error(err)
			}
		})
	}
	g.Wait()
	if n := <-runs + <-runs; n < 3 {
		t.Errorf("ran %d times in all: there was no deadlock", n)
	}
}

// What one Update has read by id stays until its end; claims pass each other by.
func TestLocks(t *testing.T) {
	f := newPostgres(t)
	s := f.session()
	var order []string
	read, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		<-read
		f.in(func(tx *Tx) error {
			l, err := tx.Session(f.ctx, s.ID)
			order = append(order, fmt.Sprint("second reads ", l.Version))
			return err
		})
	}()
	f.in(func(tx *Tx) error {
		got, err := tx.Session(f.ctx, s.ID)
		if err != nil {
			return err
		}
		close(read)
		time.Sleep(50 * time.Millisecond) // time for the second to come to the row
		order = append(order, "first writes")
		return tx.UpdateSession(f.ctx, got, true)
	})
	<-done
	same(t, []string{"first writes", "second reads 2"}, order)

	for i := range 4 {
		f.approval(s, fmt.Sprint(i))
		f.lease(s, noon.Add(-time.Second))
	}
	claimed := map[string]bool{}
	f.in(func(tx *Tx) error {
		one, _, err := tx.DueApproval(f.ctx)
		if err != nil {
			return err
		}
		claimed[one.ID] = true
		due, err := tx.EndLeases(f.ctx, lease.Selection{Due: true}, lease.End{Reason: lease.EndExpired}, 2)
		if err != nil || len(due) != 2 {
			t.Errorf("%d due, %v", len(due), err)
		}
		f.in(func(other *Tx) error {
			two, found, err := other.DueApproval(f.ctx)
			if err != nil || !found || claimed[two.ID] {
				t.Errorf("claimed twice: %v, %v", two.ID, err)
			}
			rest, err := other.EndLeases(f.ctx, lease.Selection{Due: true}, lease.End{Reason: lease.EndExpired}, 10)
			if len(rest) != 2 {
				t.Errorf("%d due for another, want 2", len(rest))
			}
			return err
		})
		return nil
	})
}

// Two requests open prompts to one person at once: never more than the limit, and
// never two for one act.
func TestOpenInParallel(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		s := f.session()
		var g sync.WaitGroup
		var mu sync.Mutex
		ids, refused := map[string]string{}, 0
		for i := range 16 {
			g.Go(func() {
				hash := fmt.Sprint("act ", i%8)
				var a approval.Approval
				err := f.Update(f.ctx, func(tx *Tx) (err error) {
					a, err = approval.Open(f.ctx, tx, approval.Opening{
						Plan:    approval.Plan{Approver: "user", ApproverRef: alice, Code: "C", ExpiresIn: time.Minute},
						Session: s.ID, User: alice, Agent: bot, IntentHash: hash, MaxPending: 5,
					})
					return err
				})
				mu.Lock()
				defer mu.Unlock()
				switch {
				case fault.Is(err, fault.Overloaded):
					refused++
				case err != nil:
					t.Error(err)
				case ids[hash] != "" && ids[hash] != a.ID:
					t.Errorf("two prompts for %s", hash)
				default:
					ids[hash] = a.ID
				}
			})
		}
		g.Wait()
		if n := must(f, func(tx *Tx) (int, error) { return tx.CountOpenApprovals(f.ctx, alice) }); n != 5 || len(ids) != 5 || refused == 0 {
			t.Errorf("%d open, %d told, %d refused", n, len(ids), refused)
		}
	})
}

func TestPostgresThatIsNotThere(t *testing.T) {
	t.Parallel()
	var log strings.Builder
	_, err := Open(t.Context(), Config{
		URL: "postgres://writ@127.0.0.1:1/writ", Password: "hunter2", Root: root, Logger: slog.New(slog.NewTextHandler(&log, nil)),
	})
	if err == nil || strings.Contains(err.Error()+log.String(), "hunter2") || !strings.Contains(err.Error(), "127.0.0.1:1") {
		t.Errorf("%v", err)
	}
	if _, err := Open(t.Context(), Config{URL: "postgres://writ:hunter2@[::1/writ", Root: root, Logger: quiet}); err == nil || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("%v", err)
	}
}

// A server that goes away for a while: unavailable at once, and back by itself.
func TestConnectionsThatBreak(t *testing.T) {
	f := newPostgres(t)
	s := f.session()
	for range 3 {
		f.in(func(tx *Tx) error { _, err := tx.Session(f.ctx, s.ID); return err })
		killer, err := f.second(nil)
		if err != nil {
			t.Fatal(err)
		}
		err = f.Update(f.ctx, func(tx *Tx) error {
			if _, err := tx.Session(f.ctx, s.ID); err != nil {
				return err
			}
			err := killer.Update(f.ctx, func(k *Tx) error {
				_, err := k.exec(f.ctx, "kill", `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
					WHERE datname = current_database() AND pid <> pg_backend_pid()`)
				return err
			})
			if err != nil {
				t.Error(err)
			}
			return tx.UpdateSession(f.ctx, s, true)
		})
		if !fault.Is(err, fault.Unavailable) {
			t.Errorf("a connection that broke: %v", err)
		}
		if err := f.Ping(f.ctx); err != nil {
			if err := f.Ping(f.ctx); err != nil { // a broken idle one may have been tried first
				t.Errorf("afterwards: %v", err)
			}
		}
	}
	if got := must(f, func(tx *Tx) (int64, error) { s, err := tx.Session(f.ctx, s.ID); return s.Version, err }); got != 1 {
		t.Errorf("version %d", got)
	}
}

// PostgreSQL has no place for a NUL in a text; what a stranger may send must not be
// able to make the store fail.
func TestStrangeTexts(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		f.in(func(tx *Tx) error {
			return audit.Append(f.ctx, tx, audit.Entry{
				Kind: audit.DecisionDeny, User: identity.Ref{Issuer: "https://idp.example", ID: "a'b\"c\\d $1 ü 漢 🙂"},
				Detail: map[string]any{"purpose": "nul \x00 quote ' back \\ percent % line\u2028", "empty": ""},
			})
		})
		es := must(f, func(tx *Tx) ([]audit.Entry, error) { return tx.Unsequenced(f.ctx, 10) })
		if got := es[0].Detail["purpose"]; got != "nul \x00 quote ' back \\ percent % line\u2028" {
			t.Errorf("%q", got)
		}
		if err := audit.OpenLog(f.ctx, f.log(), "h"); err != nil {
			t.Fatal(err)
		}
		f.sequence()
		f.wantWhole()
	})
}

// Several quotas are nearly full at once, and requests of two sessions come in parallel.
func TestQuotasAreExactTogether(t *testing.T) {
	f := newPostgres(t)
	a, b := f.session(), f.session()
	limits := lease.Limits{PerSession: 20, PerUser: 5, PerAgent: 50, PerMinter: map[string]int{"db": 60}}
	begin := func(s session.Session) error {
		return f.Update(f.ctx, func(tx *Tx) error {
			g := lease.Grant{Minter: "db", Kind: "postgres", TTL: time.Minute, Revocability: lease.RevocableInstant, Outside: true}
			l := lease.New(g, s.ID, s.EndsAt, "dec", "rev", intent.Act{User: s.User.Ref, Agent: s.Agent}, "h", tx.Now())
			return lease.Begin(f.ctx, tx, l, s.StartedAt, limits)
		})
	}
	var g sync.WaitGroup
	var begun atomic.Int64
	for i := range 16 {
		s := a
		if i%2 == 1 {
			s = b
		}
		g.Go(func() {
			switch err := begin(s); {
			case err == nil:
				begun.Add(1)
			case !fault.Is(err, fault.LeaseQuota):
				t.Error(err)
			}
		})
	}
	g.Wait()
	if n := begun.Load(); n != 5 {
		t.Errorf("%d leases of a user who may have 5", n)
	}
}

// While a retry is under way no operator can be done with what it is about.
func TestARetryAndTheKillSwitch(t *testing.T) {
	f := newPostgres(t)
	s := f.session()
	l := f.lease(s, noon.Add(time.Hour))
	r := &revocation.Revoker{Store: For[revocation.Tx](f.Store).Urgent(), Metrics: telemetry.NewMetrics()}
	done := make(chan error, 1)
	f.in(func(tx *Tx) error {
		if err := tx.Guard(f.ctx); err != nil {
			return err
		}
		go func() {
			_, err := r.Revoke(f.ctx, revocation.Order{Scope: revocation.Scope{Kind: revocation.OfLease, Value: l.ID}})
			done <- err
		}()
		select {
		case err := <-done:
			t.Errorf("it did not wait: %v", err)
		case <-time.After(300 * time.Millisecond):
		}
		revoked, err := tx.RevokedSince(f.ctx, l)
		if revoked {
			t.Error("revoked by who waits")
		}
		return err
	})
	if err := <-done; err != nil {
		t.Error(err)
	}
	if revoked := must(f, func(tx *Tx) (bool, error) { return tx.RevokedSince(f.ctx, l) }); !revoked {
		t.Error("the next retry is not told")
	}
}

// A replica of the version before ends a lease whose credential is at a target.
func TestLeasesThatAnOldReplicaEnds(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		s := f.session()
		outside := f.lease(s, noon.Add(time.Hour))
		f.in(func(tx *Tx) error {
			for _, statement := range []string{
				`UPDATE leases SET minter = 'db', ending = 'target' WHERE id = $1`,
				`UPDATE leases SET state = 'revoked', ended_at = 5, end_reason = 'released' WHERE id = $1 AND state = 'active'`, // as it does
			} {
				if _, err := tx.exec(f.ctx, "old", statement, outside.ID); err != nil {
					return err
				}
			}
			return nil
		})
		f.in(func(tx *Tx) error {
			_, err := tx.PassLeases(f.ctx, 10)
			return err
		})
		claimed := 0
		f.in(func(tx *Tx) error {
			ls, err := tx.ClaimLeases(f.ctx, "db", "c", time.Minute, false, 10)
			claimed = len(ls)
			return err
		})
		if claimed != 1 {
			t.Error("nobody unmakes it")
		}
	})
}

// All connections are taken, and more wait for one; the kill switch has its own.
func TestUrgentUpdatesGetThrough(t *testing.T) {
	f := newPostgres(t)
	release := make(chan struct{})
	var g, holding sync.WaitGroup
	for range f.config().Connections {
		holding.Add(1)
		g.Go(func() {
			f.in(func(*Tx) error {
				holding.Done()
				<-release
				return nil
			})
		})
	}
	holding.Wait()
	for range 100 {
		g.Go(func() { _ = f.Update(f.ctx, func(*Tx) error { return nil }) })
	}
	ctx, cancel := context.WithTimeout(f.ctx, 3*time.Second)
	defer cancel()
	r := &revocation.Revoker{Store: For[revocation.Tx](f.Store).Urgent(), Metrics: telemetry.NewMetrics()}
	if _, err := r.Revoke(ctx, revocation.Order{Operator: alice, Scope: revocation.Scope{Kind: revocation.OfAll}}); err != nil {
		t.Error(err)
	}
	if ctx.Err() != nil {
		t.Error("the kill switch waited for decisions")
	}
	close(release)
	g.Wait()
}

// A flood of decisions in a session does not hold off its end.
func TestFloodDoesNotHoldOffTheKillSwitch(t *testing.T) {
	f := newPostgres(t)
	s := f.session()
	ctx, stop := context.WithCancel(f.ctx)
	var g sync.WaitGroup
	for range 3 { // replicas
		other, err := f.second(func(c *Config) { c.Connections = 12 })
		if err != nil {
			t.Fatal(err)
		}
		for range 12 {
			g.Go(func() {
				for ctx.Err() == nil {
					err := other.Update(f.ctx, func(tx *Tx) error {
						if err := tx.CheckSession(f.ctx, s); err != nil {
							return err
						}
						time.Sleep(3 * time.Millisecond) // the rest of a decision
						return nil
					})
					if err != nil {
						return // the session has ended
					}
				}
			})
		}
	}
	time.Sleep(200 * time.Millisecond)
	start := time.Now()
	r := &revocation.Revoker{Store: For[revocation.Tx](f.Store), Metrics: telemetry.NewMetrics()}
	got, err := r.Revoke(f.ctx, revocation.Order{Operator: alice, Scope: revocation.Scope{Kind: revocation.OfUser, Value: alice.ID, Issuer: alice.Issuer}})
	took := time.Since(start)
	stop()
	g.Wait()
	// Without the fair queue it takes until the flood ends, or ten seconds.
	if err != nil || got.Sessions != 1 || took > 5*time.Second {
		t.Errorf("ended %+v after %v: %v", got, took, err)
	}
	t.Log("the kill switch took ", took)
}
