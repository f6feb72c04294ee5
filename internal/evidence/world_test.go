package evidence

import (
	"bytes"
	"context"
	"database/sql"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/storetest"
)

var (
	alice = identity.Ref{Issuer: "https://idp.example", ID: "alice"}
	bob   = identity.Ref{Issuer: "https://idp.example", ID: "bob"}
	olga  = identity.Ref{Issuer: "https://idp.example", ID: "olga"}
	bot   = identity.Ref{Issuer: "https://idp.example", ID: "crm-agent"}
	other = identity.Ref{Issuer: "https://idp.example", ID: "hr-agent"}
	noon  = time.Date(2026, 11, 23, 12, 0, 0, 123456000, time.UTC)
	quiet = slog.New(slog.DiscardHandler)
)

// world is a log on a real store.
type world struct {
	*sqlstore.Store
	t    testing.TB
	ctx  context.Context
	path string // of SQLite
	now  time.Time
}

func TestMain(m *testing.M) { os.Exit(storetest.Main(m)) }

func newWorld(t testing.TB) *world {
	t.Helper()
	path := filepath.Join(t.TempDir(), "writ.db")
	w := open(t, "sqlite:"+path)
	w.path = path
	return w
}

func newPostgres(t testing.TB) *world {
	t.Helper()
	return open(t, storetest.Database(t, "evidence", func(ctx context.Context, url string) error {
		s, err := sqlstore.Open(ctx, sqlstore.Config{URL: url, Root: sqlstore.RootKey{1}, Logger: quiet})
		if err != nil {
			return err
		}
		return s.Close()
	}))
}

func open(t testing.TB, url string) *world {
	t.Helper()
	w := &world{t: t, ctx: t.Context(), now: noon}
	var err error
	w.Store, err = sqlstore.Open(w.ctx, sqlstore.Config{
		URL: url, Root: sqlstore.RootKey{1}, Relaxed: true, Now: func() time.Time { return w.now }, Logger: quiet,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.Close() })
	if err := audit.OpenLog(w.ctx, w.logs(), "writ.example"); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) logs() audit.LogStore { return sqlstore.For[audit.LogTx](w.Store) }

// store is what the package works on.
func (w *world) store() sqlstore.Narrow[Tx] {
	return sqlstore.For[Tx](w.Store)
}

// add records entries, one second apart, and sequences them.
func (w *world) add(entries ...audit.Entry) {
	w.t.Helper()
	for _, e := range entries {
		w.now = w.now.Add(time.Second)
		if err := w.Update(w.ctx, func(tx *sqlstore.Tx) error { return audit.Append(w.ctx, tx, e) }); err != nil {
			w.t.Fatal(err)
		}
	}
	w.sequence()
}

func (w *world) sequence() {
	w.t.Helper()
	s := &audit.Sequencer{Store: w.logs(), Logger: quiet}
	for more := true; more; {
		var err error
		if more, err = s.Step(w.ctx); err != nil {
			w.t.Fatal(err)
		}
	}
}

// grow adds n entries of many kinds.
func (w *world) grow(n int) {
	w.t.Helper()
	err := w.Update(w.ctx, func(tx *sqlstore.Tx) error {
		for i := range n {
			e := audit.Entry{
				Kind: audit.DecisionAllow, User: alice, Agent: bot, Session: fmt.Sprint("ses_", i%5), Decision: fmt.Sprint("dec_", i),
				Detail: map[string]any{"action": "crm.opportunity.read", "purpose": "Überblick — \"Q3\" <now>\n", "n": i},
			}
			if i%3 == 0 {
				e = audit.Entry{Kind: audit.SessionOpened, User: bob, Agent: other, Session: fmt.Sprint("ses_b", i%2)}
			}
			if err := audit.Append(w.ctx, tx, e); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.sequence()
}

func (w *world) head() audit.Head {
	w.t.Helper()
	var head audit.Head
	err := w.View(w.ctx, func(tx *sqlstore.Tx) (err error) {
		head, err = audit.HeadOf(w.ctx, tx)
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return head
}

func (w *world) keys() (out []string) {
	w.t.Helper()
	keys, err := w.ListKeys(w.ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, k := range keys {
		if k.Purpose == sqlstore.CheckpointKey {
			out = append(out, k.ID)
		}
	}
	return out
}

// sql does what only an administrator of the database can.
func (w *world) sql(statement string, args ...any) {
	w.t.Helper()
	db, err := sql.Open("sqlite", "file:"+w.path+"?_pragma=busy_timeout(5000)")
	if err != nil {
		w.t.Fatal(err)
	}
	defer db.Close()
	res, err := db.ExecContext(w.ctx, statement, args...)
	if err != nil {
		w.t.Fatal(err)
	}
	if n, err := res.RowsAffected(); n == 0 || err != nil {
		w.t.Fatalf("%s changed %d rows (%v)", statement, n, err)
	}
}

func (w *world) export(from, to int64) []byte {
	w.t.Helper()
	var b bytes.Buffer
	if _, err := Export(w.ctx, w.store(), &b, from, to, w.keys()); err != nil {
		w.t.Fatal(err)
	}
	return b.Bytes()
}

func (w *world) verify(export []byte, copies ...string) Report {
	w.t.Helper()
	return verify(w.t, export, w.keys(), copies...)
}

func verify(t testing.TB, export []byte, keys []string, copies ...string) Report {
	t.Helper()
	r, err := Verify(bytes.NewReader(export), Options{Verifiers: keys, Copies: files(copies...)})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// split cuts an export into its lines, the header first.
func split(export []byte) [][]byte {
	return bytes.SplitAfter(bytes.TrimSuffix(export, nil), []byte("\n"))
}

// rewrite is what an administrator who has the signing key can do: an export with
// other entries, consistent and signed.
func (w *world) rewrite(export []byte, change func(entries [][]byte) [][]byte) []byte {
	w.t.Helper()
	all := split(export)
	h, err := parseHeader(all[0])
	if err != nil {
		w.t.Fatal(err)
	}
	var entries [][]byte
	for _, line := range all[1 : len(all)-1] {
		_, _, entry, ok := parseLine(line)
		if !ok {
			w.t.Fatalf("line %q", line)
		}
		entries = append(entries, entry)
	}
	entries = change(entries)
	var tree frontier
	var out []byte
	for i, e := range entries {
		hash := tlog.RecordHash(e)
		tree.add(hash)
		out = appendLine(out, int64(i), hash, e)
	}
	h.To, h.Tail, h.Checkpoint = tree.size, nil, w.sign(h.Origin, tree.size, tree.root())
	line, err := h.line()
	if err != nil {
		w.t.Fatal(err)
	}
	return slices.Concat(line, out)
}

// sign makes a checkpoint by the store's key.
func (w *world) sign(origin string, size int64, root tlog.Hash) string {
	w.t.Helper()
	var signers []note.Signer
	err := w.View(w.ctx, func(tx *sqlstore.Tx) error {
		keys, err := tx.CheckpointKeys(w.ctx)
		for _, k := range keys {
			s, err := note.NewSigner(k)
			if err != nil {
				return err
			}
			if s.Name() == origin {
				signers = append(signers, s)
			}
		}
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	signed, err := note.Sign(&note.Note{Text: fmt.Sprintf("%s\n%d\n%s\n", origin, size, root)}, signers...)
	if err != nil {
		w.t.Fatal(err)
	}
	return string(signed)
}

// wantProblem demands a failure that names an entry between two.
func wantProblem(t testing.TB, what string, r Report, from, to int64) {
	t.Helper()
	if len(r.Problems) == 0 {
		t.Errorf("%s: verified", what)
		return
	}
	for _, p := range r.Problems {
		if p.From >= from && p.To <= to {
			return
		}
	}
	t.Errorf("%s: none of %q is about entries %d to %d", what, r.Problems, from, to)
}

func wantOK(t testing.TB, what string, r Report) {
	t.Helper()
	if len(r.Problems) > 0 {
		t.Errorf("%s: %q", what, r.Problems)
	}
}

func texts(r Report) string {
	var b strings.Builder
	for _, p := range r.Problems {
		b.WriteString(p.String() + "\n")
	}
	return b.String()
}
