package crash

import (
	"bytes"
	"database/sql"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib" // the driver "pgx"
	"golang.org/x/mod/sumdb/tlog"
	_ "modernc.org/sqlite" // the driver "sqlite"

	"github.com/writsec/writ/client"
	"github.com/writsec/writ/internal/audit"
)

// findings are what a look into the database found wrong.
type findings struct {
	lost       []string // answered, but not there
	duplicated []string // done twice
	unverified []string // of the log
	entries    int
}

// database opens the store beside Writ, without any of its code.
func (s *site) database() *sql.DB {
	s.t.Helper()
	driver, name := "pgx", s.store
	if path, ok := strings.CutPrefix(s.store, "sqlite:"); ok {
		driver, name = "sqlite", "file:"+path+"?_pragma=busy_timeout(5000)" // test folders have no name to escape
	}
	db, err := sql.Open(driver, name)
	if err != nil {
		s.t.Fatal(err)
	}
	return db
}

// settle starts one replica, waits until the log has caught up, and stops it.
func (s *site) settle() {
	s.t.Helper()
	r := s.replicas[0]
	r.tolerates = false
	r.out = &buffer{}
	r.start()
	s.sequenced(2 * time.Minute)
	r.stop()
}

// sequenced waits until the log has caught up.
func (s *site) sequenced(d time.Duration) {
	s.t.Helper()
	db := s.database()
	defer db.Close()
	within(s.t, d, func() error {
		var n int
		if err := db.QueryRow(`SELECT count(*) FROM audit`).Scan(&n); err != nil || n == 0 {
			return err
		}
		return fmt.Errorf("%d entries are not sequenced", n)
	})
}

// rows reads a whole query.
func rows(s *site, db *sql.DB, query string, each func(scan func(...any))) {
	s.t.Helper()
	rs, err := db.Query(query) //nolint:sqlclosecheck // the defer below does
	if err != nil {
		s.t.Fatal(err)
	}
	defer rs.Close()
	scan := func(to ...any) {
		if err := rs.Scan(to...); err != nil {
			s.t.Fatal(err)
		}
	}
	for rs.Next() {
		each(scan)
	}
	if err := rs.Err(); err != nil {
		s.t.Fatal(err)
	}
}

// hashes are a tree's, in memory.
type hashes []tlog.Hash

// ReadHashes implements tlog.HashReader.
func (h hashes) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for i, at := range indexes {
		if at >= int64(len(h)) {
			return nil, fmt.Errorf("the log has no hash %d", at)
		}
		out[i] = h[at]
	}
	return out, nil
}

// verify looks into the database of a Writ that is stopped.
func (s *site) verify(l *load) (f findings) {
	s.t.Helper()
	db := s.database()
	defer db.Close()
	entries := s.verifyLog(db, &f)
	x := newIndex(entries)
	s.verifyRecords(db, x, &f)
	s.verifyAnswers(db, l, x, &f)
	f.entries = len(entries)
	return f
}

// verifyLog recomputes the tree from its entries, and holds it to the signed head
// and to the copies that left the store.
func (s *site) verifyLog(db *sql.DB, f *findings) (entries []audit.Entry) {
	bad := func(format string, args ...any) { f.unverified = append(f.unverified, fmt.Sprintf(format, args...)) }
	var tree hashes
	rows(s, db, `SELECT seq, kind, session, decision, entry FROM log_entries ORDER BY seq`, func(scan func(...any)) {
		var seq int64
		var kind, session, decision, text string
		scan(&seq, &kind, &session, &decision, &text)
		if want := int64(len(entries)); seq != want {
			bad("entry %d stands in the place of %d", seq, want)
		}
		more, err := tlog.StoredHashesForRecordHash(int64(len(entries)), tlog.RecordHash([]byte(text)), tree)
		if err != nil {
			s.t.Fatal(err)
		}
		tree = append(tree, more...)
		e, err := audit.ParseRecord([]byte(text))
		if err != nil {
			bad("entry %d: %v", seq, err)
		}
		if string(e.Kind) != kind || e.Session != session || e.Decision != decision {
			bad("entry %d is not what its columns say", seq)
		}
		entries = append(entries, e)
	})
	var left int
	rows(s, db, `SELECT count(*) FROM audit`, func(scan func(...any)) { scan(&left) })
	if left > 0 {
		bad("%d entries are not sequenced", left)
	}

	var keys []string
	rows(s, db, `SELECT id FROM keys WHERE purpose = 'checkpoint'`, func(scan func(...any)) {
		var id string
		scan(&id)
		keys = append(keys, id)
	})
	heads := 0
	rows(s, db, `SELECT origin, size, checkpoint FROM log_head`, func(scan func(...any)) {
		var origin, signed string
		var size int64
		scan(&origin, &size, &signed)
		heads++
		c, err := audit.OpenCheckpoint(signed, keys...)
		switch {
		case err != nil:
			bad("head: %v", err)
		case c.Size != int64(len(entries)) || size != c.Size || c.Origin != origin:
			bad("the head is of %s and size %d, its columns say %s and %d, there are %d entries", c.Origin, c.Size, origin, size, len(entries))
		default:
			if root, err := tlog.TreeHash(c.Size, tree); err != nil || root != c.Root {
				bad("the head's root is not that of the entries: %v", err)
			}
		}
	})
	if heads != 1 {
		bad("%d heads", heads)
	}
	for _, r := range s.replicas {
		data, err := os.ReadFile(r.copies)
		if err != nil {
			bad("copied checkpoints: %v", err)
			continue
		}
		copied := 0
		err = audit.EachCheckpoint(bytes.NewReader(data), func(signed string) error {
			copied++
			c, err := audit.OpenCheckpoint(signed, keys...)
			if err != nil {
				return fmt.Errorf("%w: %q", err, signed)
			}
			if root, err := tlog.TreeHash(c.Size, tree); err != nil || root != c.Root {
				return fmt.Errorf("the copy of size %d is no beginning of the log: %w", c.Size, err)
			}
			return nil
		})
		if err != nil || copied == 0 {
			bad("%s: of %d copied checkpoints the last: %v", r.name, copied, err)
		}
	}
	return entries
}

// index is the log, by what it is about.
type index struct {
	n        map[string]int    // entries by kind, and by kind and id
	effect   map[string]string // by decision
	times    map[string]int    // decision entries by decision
	asked    map[string]int    // decisions by action and resource
	paid     map[string]int    // payments by session
	consumed map[string]int    // allows by approval
	outcome  map[string]string // that the agent reported, by decision
}

func newIndex(entries []audit.Entry) index {
	x := index{
		n: map[string]int{}, effect: map[string]string{}, times: map[string]int{}, asked: map[string]int{},
		paid: map[string]int{}, consumed: map[string]int{}, outcome: map[string]string{},
	}
	for _, e := range entries {
		x.n[string(e.Kind)]++
		for _, id := range []string{e.Session, e.Decision, e.Approval, e.Lease} {
			if id != "" {
				x.n[string(e.Kind)+" "+id]++
			}
		}
		switch e.Kind {
		case audit.DecisionAllow, audit.DecisionDeny, audit.DecisionRequireCIBA:
			x.effect[e.Decision] = strings.TrimPrefix(string(e.Kind), "decision.")
			x.times[e.Decision]++
			resource, _ := e.Detail["resource"].(map[string]any)
			x.asked[fmt.Sprintf("%v %v", e.Detail["action"], resource["id"])]++
		case audit.DecisionOutcome:
			if e.Detail["by"] == "agent" {
				x.outcome[e.Decision], _ = e.Detail["outcome"].(string)
			}
		}
		if e.Kind == audit.DecisionAllow && e.Detail["action"] == "pay" {
			x.paid[e.Session]++
		}
		if e.Kind == audit.DecisionAllow && e.Approval != "" {
			x.consumed[e.Approval]++
		}
	}
	return x
}

func (f *findings) lose(format string, args ...any) {
	f.lost = append(f.lost, fmt.Sprintf(format, args...))
}
func (f *findings) twice(format string, args ...any) {
	f.duplicated = append(f.duplicated, fmt.Sprintf(format, args...))
}

// exactly finds what has too few entries, or too many.
func (f *findings) exactly(want int, what string, got int) {
	if got < want {
		f.lose("%s: %d entries, want %d", what, got, want)
	} else if got > want {
		f.twice("%s: %d entries, want %d", what, got, want)
	}
}

// verifyRecords holds the tables and the log to each other.
func (s *site) verifyRecords(db *sql.DB, x index, f *findings) {
	entries := func(want int, what string) { f.exactly(want, what, x.n[what]) }
	entries(1, string(audit.LogOpened))
	entries(0, string(audit.LogRestored))
	for question, times := range x.asked {
		most := 1
		if strings.HasPrefix(question, "ask ") { // asked, used, and refused a second use
			most = 3
		}
		if times > most {
			f.twice("%s was decided %d times", question, times)
		}
	}

	decisions := map[string]string{} // their leases
	rows(s, db, `SELECT id, answer, lease FROM decisions`, func(scan func(...any)) {
		var id, text, lease string
		scan(&id, &text, &lease)
		var a struct{ Decision string }
		if err := json.Unmarshal([]byte(text), &a); err != nil || a.Decision != x.effect[id] {
			f.lose("decision %s is %q in its table and %q in the log", id, a.Decision, x.effect[id])
		}
		decisions[id] = lease
		f.exactly(1, "decision "+id, x.times[id])
	})
	for id := range x.effect {
		if _, ok := decisions[id]; !ok {
			f.lose("decision %s is in the log alone", id)
		}
	}
	active, leases := map[string]int{}, map[string]bool{}
	rows(s, db, `SELECT id, state, decision FROM leases`, func(scan func(...any)) {
		var id, state, decision string
		scan(&id, &state, &decision)
		leases[id] = true
		entries(1, "lease.active "+id)
		ended := 0
		switch state {
		case "revoked":
			ended = 1
		case "revoking": // it has ended, and is good for services that do not ask until its time is over
			entries(1, "lease.revoking "+id)
		default:
			if active[decision]++; active[decision] > 1 {
				f.twice("decision %s has %d active leases", decision, active[decision])
			}
		}
		entries(ended, "lease.revoked "+id)
		if _, ok := decisions[decision]; !ok {
			f.lose("lease %s has no decision", id)
		}
	})
	f.exactly(len(leases), string(audit.LeaseActive), x.n[string(audit.LeaseActive)])
	for decision, lease := range decisions {
		if lease != "" && !leases[lease] {
			f.lose("decision %s has no lease %s", decision, lease)
		}
	}
	rows(s, db, `SELECT id, ended_at, counters FROM sessions`, func(scan func(...any)) {
		var id, text string
		var ended int64
		scan(&id, &ended, &text)
		entries(1, "session.opened "+id)
		entries(int(min(ended, 1)), "session.ended "+id)
		var counters map[string]int
		if err := json.Unmarshal([]byte(text), &counters); err != nil || counters["paid"] != x.paid[id] {
			f.twice("session %s counts %s, the log %d", id, text, x.paid[id])
		}
		if x.paid[id] > budget {
			f.twice("session %s paid %d times, over its budget", id, x.paid[id])
		}
	})
	rows(s, db, `SELECT id, state FROM approvals`, func(scan func(...any)) {
		var id, state string
		scan(&id, &state)
		used := 0
		if state == "consumed" {
			used = 1
		}
		entries(1, "approval.opened "+id)
		entries(used, "approval.consumed "+id)
		f.exactly(used, "allows on approval "+id, x.consumed[id])
	})
	for _, message := range s.is.askedTwice() {
		f.twice("a person was asked twice: %s", message)
	}
}

// verifyAnswers holds what clients were told to what is there.
func (s *site) verifyAnswers(db *sql.DB, l *load, x index, f *findings) {
	replays, leases := map[string]string{}, map[string]string{} // their decisions
	for query, into := range map[string]map[string]string{
		`SELECT key, decision FROM replays`: replays, `SELECT id, decision FROM leases`: leases,
	} {
		rows(s, db, query, func(scan func(...any)) {
			var id, decision string
			scan(&id, &decision)
			into[id] = decision
		})
	}
	for _, a := range l.decisions {
		if x.effect[a.id] != string(a.effect) {
			f.lose("decision %s was answered %s and is %q in the log", a.id, a.effect, x.effect[a.id])
		}
		if a.effect == client.Allow && leases[a.lease] != a.id {
			f.lose("decision %s was answered with lease %q, which is of %q", a.id, a.lease, leases[a.lease])
		}
		if replays[a.key] != a.id {
			f.twice("%s was answered with %s and is tied to %q", a.key, a.id, replays[a.key])
		}
	}
	for what, ids := range map[string][]string{"session.opened ": l.sessions, "session.ended ": l.ended, "lease.revoking ": l.released} {
		for _, id := range ids {
			f.exactly(1, what+id, x.n[what+id])
		}
	}
	for _, id := range l.reported {
		if x.outcome[id] != "succeeded" {
			f.lose("the outcome of %s is %q in the log", id, x.outcome[id])
		}
	}
}

// clean fails the test for whatever is wrong.
func (s *site) clean(l *load, f findings) {
	s.t.Helper()
	for what, list := range map[string][]string{
		"lost": f.lost, "duplicated": f.duplicated, "unverified": f.unverified, "unexpected": l.unexpected,
	} {
		if len(list) > 0 {
			s.t.Errorf("%d %s: %s", len(list), what, strings.Join(list[:min(len(list), 10)], "\n  "))
		}
	}
}
