package evidence

import (
	"bytes"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/sqlstore"
)

// What is changed in the database is found by its index, as long as the tree is what
// it was.
func TestChangedRows(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		statement string
		from, to  int64
	}{
		"an entry":               {`UPDATE log_entries SET entry = replace(entry, 'crm.opportunity.read', 'crm.opportunity.list') WHERE seq = 300`, 300, 301},
		"one space":              {`UPDATE log_entries SET entry = entry || ' ' WHERE seq = 7`, 7, 8},
		"a new line":             {`UPDATE log_entries SET entry = entry || char(10) WHERE seq = 7`, 7, 8},
		"an entry in a new line": {`UPDATE log_entries SET entry = '{}}' || char(10) || '{"index":8,"hash":"' WHERE seq = 7`, 7, 8},
		"nothing left":           {`UPDATE log_entries SET entry = '' WHERE seq = 7`, 7, 8},
		"removed":                {`DELETE FROM log_entries WHERE seq = 12`, 12, 13},
		"several removed":        {`DELETE FROM log_entries WHERE seq BETWEEN 12 AND 20`, 12, 21},
		"the last removed":       {`DELETE FROM log_entries WHERE seq >= 390`, 390, 401},
		"the first removed":      {`DELETE FROM log_entries WHERE seq = 0`, 0, 1},
		"exchanged": {`UPDATE log_entries SET entry = (SELECT b.entry FROM log_entries b WHERE b.seq = 41 - log_entries.seq)
			WHERE seq IN (20, 21)`, 20, 22},
		"moved": {`UPDATE log_entries SET seq = 5000 WHERE seq = 33`, 33, 34},
		"a hash of the tree": {`UPDATE log_tiles SET data = CAST(substr(data, 1, 320) || zeroblob(32) || substr(data, 353) AS BLOB)
			WHERE level = 0 AND n = 1`, 266, 267},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.grow(400)
			w.sql(c.statement)
			r := w.verify(w.export(0, 0))
			wantProblem(t, name, r, c.from, c.to)
			if c.to-c.from <= 2 && len(r.Problems) > 2 {
				t.Errorf("%d problems: %s", len(r.Problems), texts(r))
			}
		})
	}
	w := newWorld(t)
	w.grow(3)
	w.sql(`INSERT INTO log_entries SELECT 4, at, kind, user_issuer, user_subject, agent_issuer, agent_subject, session, decision, entry FROM log_entries WHERE seq = 1`)
	wantOK(t, "a row beyond the log", w.verify(w.export(0, 0))) // in no tree: it is in no export
	w.sql(`UPDATE log_head SET size = 5`)
	if r, err := Export(t.Context(), w.store(), &bytes.Buffer{}, 0, 0, nil); err == nil {
		t.Errorf("exported entries that the tree does not have: %+v", r)
	}
}

// An administrator who has the signing key and rewrites the log consistently passes
// for honest, but for the checkpoints that left the machine.
func TestCopiesCatchTheAdministrator(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var place audit.FilePlace
	place.Path = t.TempDir() + "/copies"
	copied := ""
	for _, n := range []int{9, 10, 10, 10} { // copies of 10, 20, 30 and 40 entries
		w.grow(n)
		if err := place.Copy(t.Context(), w.head().Checkpoint); err != nil {
			t.Fatal(err)
		}
		copied += w.head().Checkpoint + "\n"
	}
	w.grow(5)
	honest := w.export(0, 0)
	r := w.verify(honest, copied)
	wantOK(t, "honest", r)
	if r.Copies != 4 || r.Covered != 40 {
		t.Errorf("copies confirm %d, up to %d", r.Copies, r.Covered)
	}
	forged := func(s string) []byte {
		return []byte(strings.Replace(s, "crm.opportunity.read", "crm.opportunity.list", 1))
	}
	for name, c := range map[string]struct {
		change   func(e [][]byte) [][]byte
		from, to int64
	}{
		"changed":          {func(e [][]byte) [][]byte { e[24] = forged(string(e[24])); return e }, 20, 30},
		"changed early":    {func(e [][]byte) [][]byte { e[3] = forged(string(e[3])); return e }, 0, 10},
		"removed":          {func(e [][]byte) [][]byte { return slices.Delete(e, 35, 36) }, 30, 40},
		"inserted":         {func(e [][]byte) [][]byte { return slices.Insert(e, 12, e[3]) }, 10, 20},
		"exchanged":        {func(e [][]byte) [][]byte { e[24], e[25] = e[25], e[24]; return e }, 20, 30},
		"all but the size": {func(e [][]byte) [][]byte { return append(e[:0:0], slices.Repeat(e[1:2], len(e))...) }, 0, 10},
	} {
		rewritten := w.rewrite(honest, c.change)
		wantOK(t, name+", without copies", w.verify(rewritten))
		r := w.verify(rewritten, copied)
		wantProblem(t, name, r, c.from, c.to)
		if len(r.Problems) != 1 {
			t.Errorf("%s: %s", name, texts(r))
		}
	}

	// A shorter log is an older export, unless it is of now.
	short := w.rewrite(honest, func(e [][]byte) [][]byte { return e[:25] })
	r = w.verify(short, copied)
	wantOK(t, "shorter", r)
	if len(r.Notes) != 1 || !strings.Contains(r.Notes[0], "2 copied checkpoints are of more entries, up to 40") {
		t.Errorf("notes: %q", r.Notes)
	}
	r, err := Verify(bytes.NewReader(short), Options{Verifiers: w.keys(), Copies: files(copied), Current: true})
	if err != nil {
		t.Fatal(err)
	}
	wantProblem(t, "cut off", r, 25, 40)

	// Two versions of the same size, both signed.
	var c frontier
	for range 30 {
		c.add([32]byte{1})
	}
	wantProblem(t, "forked", w.verify(honest, copied, w.sign(w.head().Origin, 30, c.root())), 20, 30)

	// Part of the log, with copies of before, at and after it.
	r = w.verify(w.export(20, 33), copied)
	wantOK(t, "part", r)
	if r.Copies != 2 || len(r.Notes) != 2 {
		t.Errorf("part: %d copies, %q", r.Copies, r.Notes)
	}
}

func TestCopiesThatSayNothing(t *testing.T) {
	t.Parallel()
	w, another := newWorld(t), newWorld(t)
	w.grow(5)
	another.grow(5)
	own := w.head().Checkpoint + "\n"
	for name, c := range map[string]struct {
		copies, note string
		holding      int
	}{
		"of another log": {own + another.head().Checkpoint + "\n", "were ignored: " + another.head().Origin, 1},
		"torn":           {own + own[:len(own)-20] + "\n" + own, "1 copied checkpoints are torn", 1},
		"noise":          {"hello\n\n\n" + own, "torn", 0},
		"none":           {"", "", 0},
	} {
		r := w.verify(w.export(0, 0), c.copies)
		wantOK(t, name, r)
		if got := strings.Join(r.Notes, "\n"); !strings.Contains(got, c.note) || r.Copies != c.holding {
			t.Errorf("%s: %d copies, notes %q", name, r.Copies, got)
		}
	}
	// Of this log, but signed by a key that was not given.
	forged := strings.Replace(another.head().Checkpoint, another.head().Origin+"\n", w.head().Origin+"\n", 1)
	wantProblem(t, "signed by another", w.verify(w.export(0, 0), own, forged), -1, 0)
}

// After a restore from backup the log goes on under a new origin. What the copies of
// the former one say of the part before still counts.
func TestRestoredLog(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.grow(9)
	copied := w.head().Checkpoint + "\n"
	w.grow(10)
	before := w.head()
	copied += before.Checkpoint + "\n"
	w.grow(10)
	lost := w.head().Checkpoint + "\n" // as if the backup were of 20 entries
	w.sql(`DELETE FROM log_entries WHERE seq >= 20`)
	w.sql(`UPDATE log_head SET size = 20, checkpoint = ?`, before.Checkpoint)
	w.now = w.now.Add(time.Hour)
	if err := audit.Restore(w.ctx, sqlstore.For[audit.RestoreTx](w.Store), "writ.example", before.Origin, lost, "test"); err != nil {
		t.Fatal(err)
	}
	w.sequence()
	w.grow(12)
	after := w.head()
	export := w.export(0, 0)
	r := w.verify(export, copied, lost, after.Checkpoint+"\n")
	wantOK(t, "restored", r)
	if r.Origin != after.Origin || r.Origin == before.Origin || r.Copies != 3 || len(r.Notes) != 1 || !strings.Contains(r.Notes[0], "1 copied checkpoints are of entries that a restore from backup lost") {
		t.Errorf("%+v", r)
	}
	rewritten := w.rewrite(export, func(e [][]byte) [][]byte { e[4] = []byte(`{"v":1}`); return e })
	wantOK(t, "rewritten, without copies", w.verify(rewritten))
	wantProblem(t, "rewritten", w.verify(rewritten, copied), 0, 10)

	// One who has the new key only can still read all; the copies of before are another's.
	keys := slices.DeleteFunc(w.keys(), func(k string) bool { return !strings.HasPrefix(k, after.Origin) })
	r = verify(t, export, keys, copied, after.Checkpoint+"\n")
	wantOK(t, "by the new key", r)
	if r.Copies != 1 || len(r.Notes) != 1 || !strings.Contains(r.Notes[0], "ignored: "+before.Origin) {
		t.Errorf("%d copies, %q", r.Copies, r.Notes)
	}
}

// Archives and an export go on one from the other.
func TestSeveralFiles(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.grow(40)
	a, b := w.export(0, 13), w.export(13, 27)
	copied := w.head().Checkpoint + "\n"
	w.grow(20)
	c := w.export(27, 0)
	another := newWorld(t)
	another.add(audit.Entry{Kind: audit.SessionOpened})
	another.grow(60)
	read := func(parts ...[]byte) Report {
		v, err := NewVerifier(Options{Verifiers: append(w.keys(), another.keys()...), Copies: files(copied), Current: true})
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range parts {
			if err := v.Read(bytes.NewReader(f)); err != nil {
				t.Fatal(err)
			}
		}
		return v.Report()
	}
	r := read(a, b, c)
	wantOK(t, "in order", r)
	if r.From != 0 || r.To != 61 || r.Copies != 1 || r.Root != r.Checkpoint.Root {
		t.Errorf("%+v", r)
	}
	wantProblem(t, "one left out", read(a, c), 13, 27)
	wantProblem(t, "twice", read(a, b, b, c), 13, 27)
	wantProblem(t, "out of order", read(b, a, c), 0, 27)
	wantProblem(t, "of another log", read(a, another.export(13, 27), c), 0, 13)
	wantProblem(t, "damaged", read(a, bytes.Replace(b, []byte("crm.opp"), []byte("crm.opq"), 1), c), 13, 27)
}

func TestVerifyStore(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.grow(700)
	o := func() Options { return Options{Verifiers: w.keys(), Copies: files(w.head().Checkpoint)} }
	live := func() Report {
		t.Helper()
		r, err := VerifyStore(t.Context(), w.store(), o())
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	r := live()
	wantOK(t, "as it is", r)
	if r.To != 701 || r.Copies != 1 {
		t.Errorf("%+v", r)
	}
	w.archive(t.TempDir()+"/a", 300)
	w.sequence()
	wantOK(t, "archived in part", live())
	if _, err := VerifyStore(t.Context(), w.store(), Options{}); err == nil {
		t.Error("verified without a key")
	}
	w.sql(`UPDATE log_tiles SET data = CAST(zeroblob(32) || substr(data, 33) AS BLOB) WHERE level = 0 AND n = 0`) // of archived entries
	wantProblem(t, "a hash of an archived entry", live(), 0, 256)
	w.sql(`UPDATE log_tiles SET data = CAST(substr(data, 1, 32) || zeroblob(32) AS BLOB) WHERE level = 1 AND n = 0`)
	wantProblem(t, "a hash of the level above", live(), 256, 512)
	w.sql(`UPDATE log_entries SET entry = entry || ' ' WHERE seq = 444`)
	wantProblem(t, "a row", live(), 444, 445)
	w.sql(`DELETE FROM log_tiles WHERE level = 0 AND n = 2`)
	if r, err := VerifyStore(t.Context(), w.store(), o()); err == nil {
		t.Errorf("verified without a tile: %+v", r)
	}
	copied := w.head().Checkpoint
	other := newWorld(t)
	other.grow(5)
	other.sql(`UPDATE log_head SET checkpoint = ?`, copied)
	if r, err := VerifyStore(t.Context(), other.store(), Options{Verifiers: append(other.keys(), w.keys()...)}); err != nil || len(r.Problems) == 0 {
		t.Errorf("verified under another's checkpoint: %+v (%v)", r, err)
	}
}

// While a key is handed over, checkpoints carry both signatures, and either key will
// do; what was signed before needs the older one.
func TestRotatedKey(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.grow(5)
	before, first := w.head(), w.keys()
	second, err := w.RotateCheckpointKey(w.ctx, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	w.grow(5)
	during := w.head()
	export := w.export(0, 0)
	w.now = w.now.Add(2 * time.Hour)
	w.grow(5)
	after := w.export(0, 0)
	both := w.keys()
	if len(both) != 2 {
		t.Fatalf("keys %q", both)
	}
	wantOK(t, "by the first", verify(t, export, first, during.Checkpoint))
	wantOK(t, "by the second", verify(t, export, []string{second}, during.Checkpoint))
	wantOK(t, "by both", verify(t, after, both, before.Checkpoint+"\n"+during.Checkpoint))
	wantProblem(t, "retired", verify(t, after, first), -1, 0)
	wantProblem(t, "a copy of before, without its key", verify(t, after, []string{second}, before.Checkpoint), -1, 0)
}
