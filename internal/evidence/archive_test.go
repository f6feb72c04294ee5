package evidence

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/sqlstore"
)

func (w *world) pruner() sqlstore.Narrow[PruneTx] { return sqlstore.For[PruneTx](w.Store) }

func (w *world) archive(path string, below int64) Archived {
	w.t.Helper()
	a, err := Archive(w.ctx, w.store(), w.pruner(), path, below, Options{Verifiers: w.keys()})
	if err != nil {
		w.t.Fatal(err)
	}
	return a
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// What was archived left the store; all that is left is proven as before, and files
// and store together are the whole log.
func TestArchive(t *testing.T) {
	t.Parallel()
	t.Run("sqlite", func(t *testing.T) { testArchive(t, newWorld(t)) })
	t.Run("postgres", func(t *testing.T) { testArchive(t, newPostgres(t)) })
}

func testArchive(t *testing.T, w *world) {
	w.grow(300)
	early := w.head()
	w.grow(400)
	dir := t.TempDir()
	one, two := filepath.Join(dir, "one.jsonl"), filepath.Join(dir, "two.jsonl")
	a := w.archive(one, 270)
	wantOK(t, "the first archive", a.Report)
	if a.From != 0 || a.To != 270 {
		t.Errorf("archived %d to %d", a.From, a.To)
	}
	w.sequence()
	w.grow(50)
	w.archive(two, 600)
	w.sequence()
	head := w.head()
	if head.Pruned != 600 || head.Size != 701+50+2 {
		t.Errorf("%+v", head)
	}
	for path, below := range map[string]int64{one: 270, two: 600} {
		text := read(t, path)
		sum := sha256.Sum256(text)
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%v, %v", info.Mode(), err)
		}
		found := false
		err = each(w.ctx, w.store(), audit.Query{Kind: audit.LogPruned}, func(_ Tx, entries []audit.Sequenced) error {
			for _, s := range entries {
				e, err := audit.ParseRecord(s.Record)
				if err != nil {
					return err
				}
				found = found || detail(e, "below") == map[int64]string{270: "270", 600: "600"}[below] &&
					detail(e, "file") == filepath.Base(path) && detail(e, "sha256") == hex.EncodeToString(sum[:])
			}
			return nil
		})
		if err != nil || !found {
			t.Errorf("%s is not in the log (%v)", path, err)
		}
	}

	// Every entry that is left has its proof, and the log is consistent with before.
	err := w.View(w.ctx, func(tx *sqlstore.Tx) error {
		for _, index := range []int64{600, 601, 700, head.Size - 1} {
			p, err := audit.Prove(w.ctx, tx, index)
			if err != nil {
				return err
			}
			if _, err := p.Verify(w.keys()...); err != nil {
				t.Errorf("entry %d: %v", index, err)
			}
		}
		for _, index := range []int64{0, 269, 270, 599} {
			if _, err := audit.Prove(w.ctx, tx, index); !fault.Is(err, fault.NotFound) {
				t.Errorf("entry %d is still there: %v", index, err)
			}
		}
		for _, from := range []int64{1, 256, 301, 600, head.Size} {
			c, err := audit.ProveSince(w.ctx, tx, from)
			if err != nil {
				return err
			}
			if from == early.Size {
				if err := c.Verify(early.Checkpoint, w.keys()...); err != nil {
					t.Errorf("since %d: %v", from, err)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}

	v, err := NewVerifier(Options{Verifiers: w.keys(), Copies: files(early.Checkpoint, head.Checkpoint), Current: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range [][]byte{read(t, one), read(t, two), w.export(-1, 0)} {
		if err := v.Read(strings.NewReader(string(part))); err != nil {
			t.Fatal(err)
		}
	}
	r := v.Report()
	wantOK(t, "archives and export", r)
	if r.From != 0 || r.To != head.Size || r.Copies != 2 {
		t.Errorf("%+v", r)
	}
	if _, err := Export(w.ctx, w.store(), &strings.Builder{}, 5, 0, nil); err == nil {
		t.Error("exported what is archived")
	}
}

func TestArchiveRefuses(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.grow(20)
	path := filepath.Join(t.TempDir(), "a.jsonl")
	untouched := func(what string) {
		t.Helper()
		wantOK(t, what, w.verify(w.export(0, 20)))
		if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) > 1 || len(left) == 1 && left[0].Name() != filepath.Base(path) {
			t.Errorf("%s: left %v (%v)", what, left, err)
		}
	}
	for name, below := range map[string]int64{"nothing": 0, "more than all": 22} {
		if _, err := Archive(w.ctx, w.store(), w.pruner(), path, below, Options{Verifiers: w.keys()}); err == nil {
			t.Errorf("%s was archived", name)
		}
		untouched(name)
	}
	if _, err := Archive(w.ctx, w.store(), w.pruner(), path, 10, Options{}); err == nil {
		t.Error("archived without a key")
	}
	untouched("without a key")
	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Archive(w.ctx, w.store(), w.pruner(), path, 10, Options{Verifiers: w.keys()}); !errors.Is(err, os.ErrExist) {
		t.Errorf("over another file: %v", err)
	}
	untouched("over another file")
	if string(read(t, path)) != "mine" {
		t.Error("the other file was changed")
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}

	// A log that does not verify is not pruned: the store is the evidence.
	w.sql(`UPDATE log_entries SET entry = replace(entry, 'session.opened', 'session.closed') WHERE seq = 4`)
	a, err := Archive(w.ctx, w.store(), w.pruner(), path, 10, Options{Verifiers: w.keys()})
	if err != nil {
		t.Fatal(err)
	}
	wantProblem(t, "changed", a.Report, 4, 5)
	if w.head().Pruned != 0 {
		t.Error("pruned")
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the archive is there: %v", err)
	}
}

// busy is a head that another has a few times, and dies at the call named.
type busy struct {
	sqlstore.Narrow[PruneTx]
	times *int
	dies  string
}

type busyTx struct {
	PruneTx
	busy
}

var errDied = errors.New("died")

func (b busy) Update(ctx context.Context, f func(PruneTx) error) error {
	return b.Narrow.Update(ctx, func(tx PruneTx) error { return f(busyTx{tx, b}) })
}

func (b busyTx) LockHead(ctx context.Context) (audit.Head, bool, error) {
	if *b.times > 0 {
		*b.times--
		return audit.Head{}, false, nil
	}
	return b.PruneTx.LockHead(ctx)
}

func (b busyTx) AppendAudit(ctx context.Context, e audit.Entry) error {
	if b.dies == "append" {
		return errDied
	}
	return b.PruneTx.AppendAudit(ctx, e)
}

func TestArchiveWaitsAndIsAtomic(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.grow(20)
	dir := t.TempDir()
	times := 3
	if _, err := Archive(w.ctx, w.store(), busy{w.pruner(), &times, "append"}, dir+"/a", 10, Options{Verifiers: w.keys()}); !errors.Is(err, errDied) {
		t.Fatal(err)
	}
	if w.head().Pruned != 0 {
		t.Error("pruned without an entry")
	}
	wantOK(t, "after a crash", w.verify(w.export(0, 0)))
	times = 3
	if _, err := Archive(w.ctx, w.store(), busy{w.pruner(), &times, ""}, dir+"/b", 10, Options{Verifiers: w.keys()}); err != nil || times != 0 {
		t.Fatal(err)
	}
	// Rows that a crash left behind are swept later.
	w.sql(`INSERT INTO log_entries SELECT seq - 10, at, kind, user_issuer, user_subject, agent_issuer, agent_subject, session, decision, entry FROM log_entries WHERE seq < 20`)
	if err := Sweep(w.ctx, w.store(), w.pruner()); err != nil {
		t.Fatal(err)
	}
	wantOK(t, "after the sweep", w.verify(w.export(-1, 0)))
	err := each(w.ctx, w.store(), audit.Query{To: 10}, func(Tx, []audit.Sequenced) error { return errors.New("rows are left") })
	if err != nil {
		t.Error(err)
	}
}

func TestBefore(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for range 10 { // 1 to 10, a second apart
		w.add(audit.Entry{Kind: audit.SessionOpened})
	}
	w.archive(filepath.Join(t.TempDir(), "a"), 2)
	w.sequence() // one more: log.pruned
	for name, c := range map[string]struct {
		at   time.Time
		want int64
	}{
		"long ago": {noon.Add(-time.Hour), 2}, "at one": {noon.Add(5 * time.Second), 5},
		"between": {noon.Add(5*time.Second + 1), 6}, "later": {noon.Add(time.Hour), 12},
	} {
		if got, err := Before(w.ctx, w.store(), c.at); got != c.want || err != nil {
			t.Errorf("%s: %d (%v), want %d", name, got, err, c.want)
		}
	}
}
