package crash

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// What the other tests don't find would be found, if it were there.
func TestFindings(t *testing.T) {
	s := newSite(t, "", 1)
	s.is.sayYes()
	s.start()
	rng := rand.New(rand.NewPCG(*seed, 2))
	l := newLoad(s)
	l.start(8, func() *rand.Rand { return source(rng) })
	within(t, 20*time.Second, func() error {
		// The one who asks people is the slowest, and twice an approval is used.
		asked := 0
		l.note(func() {
			for _, a := range l.decisions {
				if strings.HasSuffix(a.key, "-used") {
					asked++
				}
			}
		})
		if asked < 2 {
			return errors.New("no approval was used yet")
		}
		return nil
	})
	l.stop()
	s.stop()
	s.settle()
	s.clean(l, s.verify(l))
	whole, err := os.ReadFile(filepath.Join(s.dir, "data", "writ.db"))
	if err != nil {
		t.Fatal(err)
	}
	some := func(id string) string { return `(SELECT max(` + id + `) FROM ` }
	for name, tt := range map[string]struct {
		damage string
		found  func(findings) int
	}{
		"an entry altered":     {`UPDATE log_entries SET entry = replace(entry, '"v":1', '"v":1 ') WHERE seq = 5`, unverified},
		"an entry removed":     {`DELETE FROM log_entries WHERE seq = 5`, unverified},
		"the last one removed": {`DELETE FROM log_entries WHERE seq = ` + some("seq") + `log_entries)`, unverified},
		"another head":         {`UPDATE log_head SET checkpoint = replace(checkpoint, 'writ.test', 'evil.test')`, unverified},
		"an entry left over": {`INSERT INTO audit SELECT NULL, at, kind, '', '', '', '', '', '', '', '', '', '', '', '{}', '' FROM log_entries
			WHERE seq = 0`, unverified},
		"a decision removed":      {`DELETE FROM decisions WHERE id = ` + some("id") + `decisions)`, lost},
		"its answer altered":      {`UPDATE decisions SET answer = replace(answer, '"deny"', '"allow"')`, lost},
		"a lease removed":         {`DELETE FROM leases WHERE id = ` + some("id") + `leases WHERE state = 'active')`, lost},
		"a lease revived":         {`UPDATE leases SET state = 'active' WHERE state IN ('revoked', 'revoking')`, duplicated},
		"a key tied to another":   {`UPDATE replays SET decision = ` + some("id") + `decisions)`, duplicated},
		"a payment not counted":   {`UPDATE sessions SET counters = '{"paid":0}'`, duplicated},
		"an approval used again":  {`UPDATE approvals SET state = 'approved' WHERE state = 'consumed'`, duplicated},
		"a session of no opening": {`UPDATE sessions SET id = id || 'x' WHERE id = ` + some("id") + `sessions)`, lost},
	} {
		t.Run(name, func(t *testing.T) {
			damaged := *s
			damaged.t, damaged.dir = t, t.TempDir()
			file := filepath.Join(damaged.dir, "writ.db")
			damaged.store = "sqlite:" + file
			if err := os.WriteFile(file, whole, 0o600); err != nil {
				t.Fatal(err)
			}
			db := damaged.database()
			defer db.Close()
			if res, err := db.Exec(tt.damage); err != nil {
				t.Fatal(err)
			} else if n, _ := res.RowsAffected(); n == 0 {
				t.Fatal("nothing was damaged")
			}
			if f := damaged.verify(l); tt.found(f) == 0 {
				t.Errorf("not found: %+v", f)
			}
		})
	}
}

func lost(f findings) int       { return len(f.lost) }
func duplicated(f findings) int { return len(f.duplicated) }
func unverified(f findings) int { return len(f.unverified) }
