package crash

import (
	"context"
	"database/sql"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/writsec/writ/client"
	"github.com/writsec/writ/internal/storetest"
)

// empty is the URL of a PostgreSQL database with nothing in it.
func empty(t *testing.T) string {
	t.Helper()
	return storetest.Database(t, "empty", func(context.Context, string) error { return nil })
}

// client is an agent that uses one replica.
func (r *replica) client(s *site) *client.Client {
	return client.New(r.url, client.StaticToken(s.is.token("user", "agent")))
}

// wakeUp asks for an approval on one replica, waits for it there, withdraws it on the
// other right after meanwhile, and returns how long after that the wait was over.
func wakeUp(t *testing.T, session string, here, there *client.Client, meanwhile func()) time.Duration {
	t.Helper()
	ctx := t.Context()
	d, err := here.Decide(ctx, client.Request{
		Session: session, Intent: client.Intent{Action: "ask"}, Resource: client.Resource{Type: "thing", ID: fmt.Sprint(rand.Uint64())},
	})
	if err != nil || d.Approval == nil {
		t.Fatalf("%+v, %v", d, err)
	}
	woken := make(chan time.Time)
	go func() {
		a, err := here.Approval(ctx, d.Approval.ID, 20*time.Second)
		if err != nil || a.Status != "cancelled" {
			t.Errorf("%+v, %v", a, err)
		}
		woken <- time.Now()
	}()
	time.Sleep(100 * time.Millisecond) // for the call to be held
	meanwhile()
	began := time.Now()
	if _, err := there.Withdraw(ctx, d.Approval.ID); err != nil {
		t.Error(err)
	}
	return (<-woken).Sub(began)
}

func nothing() {}

func openSession(t *testing.T, c *client.Client) string {
	t.Helper()
	s, err := c.OpenSession(t.Context(), client.SessionRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return s.ID
}

func median(all []time.Duration) time.Duration {
	slices.Sort(all)
	return all[len(all)/2]
}

func TestReplicasWakeEachOther(t *testing.T) {
	s := newSite(t, empty(t), 2)
	s.start()
	a, b := s.replicas[0].client(s), s.replicas[1].client(s)
	session := openSession(t, a)
	calm(t, func() (ok bool) {
		var took []time.Duration
		for i := range 30 {
			if i%2 == 0 {
				took = append(took, wakeUp(t, session, a, b, nothing))
			} else {
				took = append(took, wakeUp(t, session, b, a, nothing))
			}
		}
		t.Logf("woken after %v in the median, %v at most, the withdrawal itself included", median(took), slices.Max(took))
		return slices.Max(took) <= 100*time.Millisecond
	})
	s.stop()
}

// calm measures up to five times: what else the machine does must not fail a test,
// nor can it make one pass.
func calm(t *testing.T, measure func() (ok bool)) {
	t.Helper()
	for range 5 {
		if measure() {
			return
		}
	}
	t.Error("not fast enough")
}

// Without the connection that listens, a held call still ends, a little later.
func TestReplicasLoseTheirListeners(t *testing.T) {
	s := newSite(t, empty(t), 2)
	s.start()
	a, b := s.replicas[0].client(s), s.replicas[1].client(s)
	session := openSession(t, a)
	db := s.database()
	defer db.Close()
	calm(t, func() (ok bool) {
		var took []time.Duration
		for range 8 {
			within(t, 20*time.Second, func() error { // until both listen, again
				n, err := listeners(db)
				if err == nil && n != 2 {
					err = fmt.Errorf("%d connections listen", n)
				}
				return err
			})
			took = append(took, wakeUp(t, session, a, b, func() { deafen(t, db) }))
		}
		t.Logf("without listeners woken after %v in the median, %v at most", median(took), slices.Max(took))
		return slices.Max(took) <= 2*time.Second
	})
	calm(t, func() (ok bool) { return wakeUp(t, session, a, b, nothing) <= 100*time.Millisecond })
	s.stop()
}

// ofListeners picks the connections that listen: what they last said is LISTEN, or the
// ping after it.
const ofListeners = ` FROM pg_stat_activity
	WHERE application_name = 'writ' AND datname = current_database() AND (query LIKE 'LISTEN %' OR query = '-- ping')`

func listeners(db *sql.DB) (n int, err error) {
	return n, db.QueryRow(`SELECT count(*)` + ofListeners).Scan(&n)
}

// deafen ends the connections by which two replicas listen.
func deafen(t *testing.T, db *sql.DB) {
	t.Helper()
	var n int
	if err := db.QueryRow(`SELECT count(pg_terminate_backend(pid, 5000))` + ofListeners).Scan(&n); err != nil || n != 2 {
		t.Errorf("%d connections listened, %v", n, err)
	}
}

// All come up, and what there must be once, they made once.
func TestReplicasStartTogether(t *testing.T) {
	for range 3 {
		s := newSite(t, empty(t), 3)
		for _, r := range s.replicas {
			r.launch()
		}
		sets := map[string]bool{}
		for _, r := range s.replicas {
			within(t, 30*time.Second, r.ready)
			sets[r.jwks(t)] = true
		}
		if len(sets) != 1 {
			t.Errorf("%d key sets: %v", len(sets), sets)
		}
		s.stop()
		db := s.database()
		defer db.Close()
		count := func(want int, query string) {
			t.Helper()
			var n int
			if err := db.QueryRow(query).Scan(&n); err != nil || n != want {
				t.Errorf("%s: %d, want %d; %v", query, n, want, err)
			}
		}
		for _, purpose := range []string{"signing", "checkpoint", "digest", "data"} {
			count(1, `SELECT count(*) FROM keys WHERE purpose = '`+purpose+`'`)
		}
		count(1, `SELECT count(*) FROM log_head`)
		count(1, `SELECT count(*) FROM log_entries WHERE kind = 'log.opened'`)
		count(3, `SELECT count(*) FROM log_entries WHERE kind = 'policy.activated'`)
		count(0, `SELECT count(*) - count(DISTINCT version_id) FROM goose_db_version`)
		s.clean(newLoad(s), s.verify(newLoad(s)))
	}
}

// jwks is the key set that a replica publishes.
func (r *replica) jwks(t *testing.T) string {
	t.Helper()
	status, body, err := get(r.url+"/.well-known/jwks.json", 5*time.Second)
	if err != nil || status != 200 {
		t.Fatalf("%d %v", status, err)
	}
	return body
}

// Each replica in turn is stopped in good order and started anew, under load.
func TestReplicasUpgradeInTurn(t *testing.T) {
	s := newSite(t, empty(t), 2)
	s.is.sayYes()
	s.start()
	rng := rand.New(rand.NewPCG(*seed, 1))
	l := newLoad(s)
	l.start(20, func() *rand.Rand { return source(rng) })
	time.Sleep(time.Second)
	for range 2 {
		for _, r := range s.replicas {
			r.stop()
			time.Sleep(300 * time.Millisecond)
			r.start()
			time.Sleep(700 * time.Millisecond)
		}
	}
	l.stop()
	s.stop()
	s.settle()
	s.clean(l, s.verify(l))
	t.Logf("%d decisions; refused %v; broken %v", len(l.decisions), l.refusals, l.breaks)
	for cause := range l.breaks {
		// A connection that is kept alive can end in the moment in which it is used again
		// (RFC 9112 §9.5); then nothing was answered, and nothing half.
		if !slices.ContainsFunc([]string{": connection refused", ": EOF", ": connection reset by peer", ": http: server closed idle connection"},
			func(end string) bool { return strings.HasSuffix(cause, end) }) {
			t.Errorf("a call broke: %s", cause)
		}
	}
	if len(l.refusals) > 0 {
		t.Errorf("calls were refused: %v", l.refusals)
	}
}
