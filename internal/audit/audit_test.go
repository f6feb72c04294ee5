package audit_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/telemetry"
)

var (
	noon  = time.Date(2026, 11, 25, 12, 0, 0, 120_000_000, time.UTC)
	quiet = slog.New(slog.DiscardHandler)
)

func newStore(t *testing.T) *sqlstore.Store {
	t.Helper()
	s, err := sqlstore.Open(t.Context(), sqlstore.Config{
		URL: "sqlite:" + filepath.Join(t.TempDir(), "writ.db"), Now: func() time.Time { return noon }, Logger: quiet,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	if err := audit.OpenLog(t.Context(), logs(s), "writ.example"); err != nil {
		t.Fatal(err)
	}
	return s
}

func logs(s *sqlstore.Store) audit.LogStore { return sqlstore.For[audit.LogTx](s) }

func grow(t *testing.T, s *sqlstore.Store, n int) audit.Head {
	t.Helper()
	err := s.Update(t.Context(), func(tx *sqlstore.Tx) error {
		for i := range n {
			if err := audit.Append(t.Context(), tx, audit.Entry{Kind: audit.SessionOpened, Detail: map[string]any{"i": i}}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	q := &audit.Sequencer{Store: logs(s), Logger: quiet}
	for more := true; more; {
		if more, err = q.Step(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	var head audit.Head
	err = s.View(t.Context(), func(tx *sqlstore.Tx) (err error) {
		head, err = audit.HeadOf(t.Context(), tx)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return head
}

// The form of a record is a contract: what was hashed once must be hashed the same
// for ever.
func TestRecordForm(t *testing.T) {
	e := audit.Entry{
		At: noon, Kind: audit.DecisionAllow, RequestID: "req_1", TraceID: "t", User: identity.Ref{Issuer: "i", ID: "ü<&>"}, Session: "ses_1",
		Detail: map[string]any{"b": 1.0, "a": []any{"x", nil, true}, "n": json.Number("19.90")},
	}
	got, err := e.Record()
	want := `{"at":"2026-11-25T12:00:00.120000Z","detail":{"a":["x",null,true],"b":1,"n":19.9},"kind":"decision.allow",` +
		`"request":"req_1","session":"ses_1","trace":"t","user":{"iss":"i","sub":"ü<&>"},"v":1}`
	if err != nil || string(got) != want {
		t.Errorf("%v\n got %s\nwant %s", err, got, want)
	}
	back, err := audit.ParseRecord(got)
	if err != nil {
		t.Fatal(err)
	}
	again, err := back.Record()
	if err != nil || string(again) != want {
		t.Errorf("read and written again: %s (%v)", again, err)
	}
	for _, bad := range []string{"", "{}", `{"v":2,"at":"2026-11-25T12:00:00.120000Z","kind":"x"}`, `{"v":1,"at":"noon","kind":"x"}`, `{"v":1,"at":"2026-11-25T12:00:00.120000Z"}`} {
		if _, err := audit.ParseRecord([]byte(bad)); err == nil {
			t.Errorf("%s is read", bad)
		}
	}
}

// An entry that can't be hashed is refused with its step; in the queue it would hold
// up all others for ever.
func TestEntriesThatCanNotBeHashed(t *testing.T) {
	s := newStore(t)
	for name, v := range map[string]any{"a channel": make(chan int), "no number": json.Number("x")} {
		err := s.Update(t.Context(), func(tx *sqlstore.Tx) error {
			return audit.Append(t.Context(), tx, audit.Entry{Kind: "x", Detail: map[string]any{"v": v}})
		})
		if err == nil {
			t.Errorf("%s is taken", name)
		}
	}
	if head := grow(t, s, 1); head.Size != 2 {
		t.Errorf("%d entries", head.Size)
	}
	// What is not UTF-8 is written as what it is read as.
	err := s.Update(t.Context(), func(tx *sqlstore.Tx) error {
		return audit.Append(t.Context(), tx, audit.Entry{Kind: "x", Detail: map[string]any{"\xff": "a\xffb"}})
	})
	if err != nil {
		t.Fatal(err)
	}
	if head := grow(t, s, 0); head.Size != 3 {
		t.Errorf("%d entries", head.Size)
	}
}

func TestCheckpoints(t *testing.T) {
	s := newStore(t)
	head := grow(t, s, 10)
	_, stranger, err := audit.NewCheckpointKey(head.Origin)
	if err != nil {
		t.Fatal(err)
	}
	_, other, err := audit.NewCheckpointKey("other.example/audit/1")
	if err != nil {
		t.Fatal(err)
	}
	vkey := verifier(t, s)
	for _, keys := range [][]string{nil, {stranger}, {other}, {"x"}, {stranger, other}} {
		if _, err := audit.OpenCheckpoint(head.Checkpoint, keys...); err == nil {
			t.Errorf("opened by %q", keys)
		}
	}
	c, err := audit.OpenCheckpoint(head.Checkpoint, stranger, vkey)
	if err != nil || c.Size != 11 || c.Origin != head.Origin {
		t.Errorf("%+v %v", c, err)
	}
	for i := range head.Checkpoint { // no bit of it can be turned
		for _, bit := range []byte{1, 0x20} {
			b := []byte(head.Checkpoint)
			b[i] ^= bit
			if got, err := audit.OpenCheckpoint(string(b), vkey); err == nil && got != c {
				t.Fatalf("byte %d: %+v", i, got)
			}
		}
	}
	for _, bad := range []string{"", "a\n1\n", "a\n01\n" + c.Root.String() + "\n\n— x", "a\n-1\n" + c.Root.String() + "\n\n— x", "a\n1\nroot\n\n— x", "a\n1\n\n— x"} {
		if _, err := audit.ReadCheckpoint(bad); err == nil {
			t.Errorf("%q is read", bad)
		}
	}
}

func verifier(t *testing.T, s *sqlstore.Store) string {
	t.Helper()
	keys, err := s.ListKeys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(keys, func(k sqlstore.Key) bool { return k.Purpose == sqlstore.CheckpointKey })
	return keys[i].ID
}

// Every entry of logs of many sizes is proved, and no other in its place; every
// earlier size is proved a beginning, and no other root of that size.
func TestProofs(t *testing.T) {
	s := newStore(t)
	vkey := verifier(t, s)
	var heads []audit.Head
	for _, n := range []int{0, 1, 2, 5, 120, 130, 300} {
		heads = append(heads, grow(t, s, n))
	}
	last := heads[len(heads)-1]
	err := s.View(t.Context(), func(tx *sqlstore.Tx) error {
		for i := int64(0); i < last.Size; i += 1 + rand.Int64N(7) {
			p, err := audit.Prove(t.Context(), tx, i)
			if err != nil {
				return err
			}
			if _, err := p.Verify(vkey); err != nil {
				t.Errorf("entry %d: %v", i, err)
			}
			bad := p
			bad.Index = (i + 1) % last.Size
			if _, err := bad.Verify(vkey); err == nil {
				t.Errorf("entry %d passes for the next", i)
			}
			bad = p
			bad.Entry = append(slices.Clone(p.Entry), ' ')
			if _, err := bad.Verify(vkey); err == nil {
				t.Errorf("entry %d passes with another byte", i)
			}
		}
		for _, h := range heads {
			p, err := audit.ProveSince(t.Context(), tx, h.Size)
			if err != nil {
				return err
			}
			if err := p.Verify(h.Checkpoint, vkey); err != nil {
				t.Errorf("since %d: %v", h.Size, err)
			}
			for _, other := range heads {
				if other.Size != h.Size {
					if err := p.Verify(other.Checkpoint, vkey); err == nil {
						t.Errorf("a proof since %d is one since %d", h.Size, other.Size)
					}
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// An administrator who has the key rewrites an entry and signs anew: a checkpoint
// that left before gives them away.
func TestRewrittenLogIsNoContinuation(t *testing.T) {
	s := newStore(t)
	old := grow(t, s, 20)
	grow(t, s, 20)
	forged := newStore(t) // as if rewritten from the start, with another entry 5
	grow(t, forged, 45)
	err := forged.View(t.Context(), func(tx *sqlstore.Tx) error {
		p, err := audit.ProveSince(t.Context(), tx, old.Size)
		if err != nil {
			return err
		}
		if err := p.Verify(old.Checkpoint, verifier(t, s), verifier(t, forged)); err == nil {
			t.Error("passes")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestKeeper(t *testing.T) {
	k, err := audit.NewKeeper([]byte("key"), []audit.KeepRule{
		{Actions: []string{"hr.**", "pay"}, Keep: audit.KeepRedacted}, {Actions: []string{"hr.secret"}, Keep: audit.KeepWhole}, {Actions: []string{"none.*"}, Keep: audit.KeepNone},
	})
	if err != nil {
		t.Fatal(err)
	}
	for action, want := range map[string]audit.Keep{
		"crm.read": audit.KeepWhole, "hr.offboard": audit.KeepRedacted, "hr.a.b": audit.KeepRedacted, "hr.secret": audit.KeepRedacted,
		"pay": audit.KeepRedacted, "pay.x": audit.KeepWhole, "none.a": audit.KeepNone, "none.a.b": audit.KeepWhole, "": audit.KeepWhole,
	} {
		if got := k.Of(action); got != want {
			t.Errorf("%q is kept %s, want %s", action, got, want)
		}
	}
	input := func() map[string]any {
		return map[string]any{
			"user":     map[string]any{"id": "alice", "claims": map[string]any{"email": "alice@secret.example", "n": json.Number("7")}},
			"agent":    map[string]any{"id": "bot", "claims": map[string]any{"x": []any{"secret-list"}}},
			"session":  map[string]any{"id": "ses_1", "task": map[string]any{"text": "secret-task", "source": "agent"}},
			"intent":   map[string]any{"action": "hr.offboard", "parameters": map[string]any{"salary": json.Number("1234567")}, "purpose": "secret-purpose"},
			"resource": map[string]any{"type": "t", "id": "r", "properties": map[string]any{"p": "secret-property"}}, "context": map[string]any{"c": "secret-context"},
			"env": map[string]any{"time": "now"},
		}
	}
	in := input()
	kept, digest, ok, err := k.Keep("hr.offboard", in)
	if err != nil || !ok || kept.Kept != audit.KeepRedacted || !strings.HasPrefix(digest, "hmac-sha256:") {
		t.Fatal(kept, digest, ok, err)
	}
	if d := cmp.Diff(input(), in); d != "" {
		t.Errorf("the caller's input was changed:\n%s", d)
	}
	for _, secret := range []string{"secret", "1234567"} {
		if strings.Contains(string(kept.JSON), secret) {
			t.Errorf("%q is shown: %s", secret, kept.JSON)
		}
	}
	for _, shown := range []string{`"alice"`, `"salary"`, `"hr.offboard"`, `"ses_1"`, `"source":"agent"`, `"now"`} {
		if !strings.Contains(string(kept.JSON), shown) {
			t.Errorf("%s is hidden: %s", shown, kept.JSON)
		}
	}
	other, err := audit.NewKeeper([]byte("another key"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, d, _, _ := other.Keep("x", in); d == digest {
		t.Error("the digest does not depend on the key")
	}
	if _, d, ok, _ := k.Keep("none.a", in); ok || d != digest {
		t.Error("of none, the digest of the whole is kept, and no more")
	}
	if got := k.Text("hr.x", "purpose"); got == "purpose" || k.Text("hr.x", "") != "" || k.Text("crm.x", "purpose") != "purpose" {
		t.Errorf("text %q", got)
	}
	if _, err := audit.NewKeeper(nil, []audit.KeepRule{{Actions: []string{"[a"}}}); err == nil {
		t.Error("a pattern that is none")
	}
}

// flaky is a second place that fails at times.
type flaky struct {
	fail  bool
	taken []string
}

func (*flaky) Name() string { return "url" }

func (f *flaky) Copy(_ context.Context, c string) error {
	if f.fail {
		return errors.New("out of order")
	}
	f.taken = append(f.taken, c)
	return nil
}

func TestCopier(t *testing.T) {
	s := newStore(t)
	place := &flaky{}
	c := &audit.Copier{Store: logs(s), Places: []audit.Place{place}, Metrics: telemetry.NewMetrics(), Logger: quiet}
	step := func(want int) {
		t.Helper()
		c.Step(t.Context())
		if len(place.taken) != want {
			t.Errorf("%d copies, want %d", len(place.taken), want)
		}
	}
	step(1)
	step(1) // nothing new
	grow(t, s, 1)
	place.fail = true
	step(1)
	place.fail = false
	step(2) // what failed is tried again
	grow(t, s, 3)
	grow(t, s, 3)
	step(3) // only the newest matters
}

func TestFilePlace(t *testing.T) {
	s := newStore(t)
	file := audit.FilePlace{Path: filepath.Join(t.TempDir(), "new", "checkpoints")}
	vkeys := []string{verifier(t, s)}
	if last, err := file.Largest("x", vkeys); last != "" || err != nil {
		t.Errorf("no file: %q %v", last, err)
	}
	var want []string
	var head audit.Head
	for i := range 4 {
		head = grow(t, s, i)
		want = append(want, head.Checkpoint)
		if err := file.Copy(t.Context(), head.Checkpoint); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.OpenFile(file.Path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("torn.example/audit/1\n7\n"); err != nil { // a process died here
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		origin string
		vkeys  []string
		want   string
	}{
		"the last": {head.Origin, vkeys, head.Checkpoint}, "another log": {"other.example", vkeys, ""}, "signed by others": {head.Origin, []string{verifier(t, newStore(t))}, ""},
	} {
		if got, err := file.Largest(c.origin, c.vkeys); got != c.want || err != nil {
			t.Errorf("%s: %q %v", name, got, err)
		}
	}
	var got []string
	text, err := os.ReadFile(file.Path)
	if err != nil {
		t.Fatal(err)
	}
	if err := audit.EachCheckpoint(strings.NewReader(string(text)), func(c string) error { got = append(got, c); return nil }); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	// A smaller one that comes later, as after a restore, does not hide it; nor does a
	// larger one that nobody signed.
	for _, c := range []string{want[1], strings.Replace(want[3], "\n7\n", "\n9\n", 1)} {
		if err := file.Copy(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := file.Largest(head.Origin, vkeys); got != head.Checkpoint || err != nil {
		t.Errorf("hidden by %q (%v)", got, err)
	}
	info, err := os.Stat(file.Path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

func TestURLPlace(t *testing.T) {
	var got string
	status := http.StatusNoContent
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b := make([]byte, 10_000)
		n, _ := r.Body.Read(b)
		got = fmt.Sprint(r.Method, " ", r.Header.Get("Content-Type"), " ", r.Header.Get("Authorization"), " ", string(b[:n]))
		w.WriteHeader(status)
	}))
	defer server.Close()
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("tok\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	p := audit.URLPlace{URL: server.URL, TokenFile: token, Client: server.Client()}
	if err := p.Copy(t.Context(), "note\n"); err != nil || got != "POST text/plain; charset=utf-8 Bearer tok note\n" {
		t.Errorf("%q %v", got, err)
	}
	status = http.StatusForbidden
	if err := p.Copy(t.Context(), "note\n"); err == nil || strings.Contains(err.Error(), "tok") {
		t.Errorf("refused: %v", err)
	}
}

// A tree of any size grows in any steps, and a tile is never narrower than it was.
func TestRootsAreThoseOfTheWholeTree(t *testing.T) {
	s := newStore(t)
	var records [][]byte
	for _, n := range []int{1, 3, 255, 256, 257, 600} {
		head := grow(t, s, n)
		err := s.View(t.Context(), func(tx *sqlstore.Tx) error {
			es, err := tx.LogEntries(t.Context(), audit.Query{From: int64(len(records)), Limit: 10_000})
			for _, e := range es {
				records = append(records, e.Record)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		var stored []tlog.Hash
		read := tlog.HashReaderFunc(func(is []int64) (out []tlog.Hash, err error) {
			for _, i := range is {
				out = append(out, stored[i])
			}
			return out, nil
		})
		for i, r := range records {
			hs, err := tlog.StoredHashes(int64(i), r, read)
			if err != nil {
				t.Fatal(err)
			}
			stored = append(stored, hs...)
		}
		root, err := tlog.TreeHash(int64(len(records)), read)
		if err != nil {
			t.Fatal(err)
		}
		c, err := audit.ReadCheckpoint(head.Checkpoint)
		if err != nil || c.Root != root || c.Size != int64(len(records)) {
			t.Errorf("%d entries: %+v, want root %v (%v)", len(records), c, root, err)
		}
	}
}
