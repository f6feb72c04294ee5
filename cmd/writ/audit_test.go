package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/alecthomas/kong"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/config"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/sqlstore"
)

// bench is a folder with a configuration and the log of a store beside it.
type bench struct {
	t     *testing.T
	dir   string
	store *sqlstore.Store
	now   time.Time
}

const benchConfig = `external_url: https://writ.example
store: sqlite:writ.db
root_key_file: root.key
policy: {path: policies}
audit:
  copies: {file: copies}
issuers:
  - issuer: https://idp.example
    speaks_for: [user, agent]
    audience: https://writ.example
    algorithms: [ES256]
minters:
  crm: {jwt: {audience: https://crm.example}}
`

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{t: t, dir: t.TempDir(), now: time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)}
	b.write("writ.yaml", benchConfig)
	b.write("policies/writ.rego", "package writ\n")
	b.write("root.key", base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{1}, 32)))
	root, err := config.RootKey(b.path("root.key"))
	if err != nil {
		t.Fatal(err)
	}
	b.store, err = sqlstore.Open(t.Context(), sqlstore.Config{
		URL: "sqlite:" + b.path("writ.db"), Root: root, Now: func() time.Time { return b.now }, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.store.Close() })
	if err := audit.OpenLog(t.Context(), sqlstore.For[audit.LogTx](b.store), "writ.example"); err != nil {
		t.Fatal(err)
	}
	b.grow(9)
	return b
}

func (b *bench) path(name string) string { return filepath.Join(b.dir, name) }

func (b *bench) write(name, text string) string {
	b.t.Helper()
	if err := os.MkdirAll(filepath.Dir(b.path(name)), 0o700); err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(b.path(name), []byte(text), 0o600); err != nil {
		b.t.Fatal(err)
	}
	return b.path(name)
}

// grow adds entries, a minute apart, and copies the checkpoint.
func (b *bench) grow(n int) {
	b.t.Helper()
	for i := range n {
		b.now = b.now.Add(time.Minute)
		err := b.store.Update(b.t.Context(), func(tx *sqlstore.Tx) error {
			return audit.Append(b.t.Context(), tx, audit.Entry{
				Kind: audit.DecisionDeny, Session: fmt.Sprint("ses_", i%2), User: identity.Ref{Issuer: "https://idp.example", ID: "alice"},
				Agent: identity.Ref{Issuer: "https://idp.example", ID: "crm-agent"}, Decision: fmt.Sprint("dec_", i), Detail: map[string]any{"action": "a<b"},
			})
		})
		if err != nil {
			b.t.Fatal(err)
		}
	}
	b.sequence()
	if err := (audit.FilePlace{Path: b.path("copies")}).Copy(b.t.Context(), b.run(0, "audit", "checkpoint")); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) sequence() {
	b.t.Helper()
	s := &audit.Sequencer{Store: sqlstore.For[audit.LogTx](b.store), Logger: slog.New(slog.DiscardHandler)}
	if _, err := s.Step(b.t.Context()); err != nil {
		b.t.Fatal(err)
	}
}

// run runs a command and returns what it printed; --config is added where none is
// named and no file is verified.
func (b *bench) run(exit int, args ...string) string {
	b.t.Helper()
	if len(args) > 1 && args[1] != "verify" {
		args = append(args, "--config", b.path("writ.yaml"))
	}
	var c cli
	var out bytes.Buffer
	parser, err := kong.New(&c, kong.Name("writ"), kong.Writers(&out, &out), kong.BindTo(b.t.Context(), (*context.Context)(nil)))
	if err != nil {
		b.t.Fatal(err)
	}
	got := 0
	if k, err := parser.Parse(args); err != nil {
		got = exitUsage
		fmt.Fprintln(&out, err)
	} else if err := k.Run(); err != nil {
		got = 1
		fmt.Fprintln(&out, "writ:", err)
	}
	if got != exit {
		b.t.Errorf("%q: exit %d, want %d:\n%s", args, got, exit, out.String())
	}
	return out.String()
}

func (b *bench) key() string { return strings.Fields(b.run(0, "audit", "key"))[0] }

func want(t *testing.T, got string, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if !strings.Contains(got, p) {
			t.Errorf("%q is not in:\n%s", p, got)
		}
	}
}

func TestAuditVerifyCommand(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	key := b.key()
	want(t, b.run(0, "audit", "key"), key, "since 2026-11-23T12:00:00Z")

	live := b.run(0, "audit", "verify", "--config", b.path("writ.yaml"), "--key", key)
	want(t, live, "verified: 10 entries, 0 to 9, of the log writ.example/audit/", "2026-11-23T12:00:00Z to 2026-11-23T12:09:00Z", "1 agree, up to all 10 entries")

	export := b.path("export.jsonl")
	want(t, b.run(0, "audit", "export", "--out", export), "wrote 10 entries, 0 to 9")
	want(t, b.run(0, "audit", "verify", export, "--key", key), "verified: 10 entries", "none were given: whoever has the signing key")
	want(t, b.run(0, "audit", "verify", export, "--key", key, "--copies", b.path("copies")), "1 agree, up to all 10")
	b.grow(5)
	want(t, b.run(0, "audit", "verify", export, "--key", key, "--copies", b.path("copies")), "1 agree", "the log went on after this was written")
	want(t, b.run(0, "audit", "export", "--out", b.path("rest.jsonl"), "--from", "10"), "wrote 5 entries, 10 to 14")
	want(t, b.run(0, "audit", "verify", export, b.path("rest.jsonl"), "--key", key, "--copies", b.path("copies")), "verified: 15 entries, 0 to 14", "2 agree")
	want(t, b.run(1, "audit", "verify", b.path("rest.jsonl"), export, "--key", key), "FAILED entries 0 to 14: in the file before as well", "writ: not verified")

	text, err := os.ReadFile(export)
	if err != nil {
		t.Fatal(err)
	}
	changed := b.write("changed.jsonl", strings.Replace(string(text), "dec_3", "dec_4", 1))
	want(t, b.run(1, "audit", "verify", changed, "--key", key), "FAILED entry 4: was changed", "writ: not verified: 1 problem")

	want(t, b.run(exitUsage, "audit", "verify", export), "--key")
	for name, args := range map[string][]string{
		"no key":              {export},
		"a damaged key":       {export, "--key", key + "x"},
		"nothing":             {"--key", key},
		"two things":          {export, "--key", key, "--config", b.path("writ.yaml")},
		"no such file":        {b.path("none"), "--key", key},
		"no older checkpoint": {"--consistency", export, "--key", key},
		"copies for a proof":  {"--proof", export, "--key", key, "--copies", export},
	} {
		if out := b.run(exitUsage, append([]string{"audit", "verify"}, args...)...); out == "" {
			t.Errorf("%s: nothing was said", name)
		}
	}
}

func TestAuditProofCommands(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	key := b.key()
	older := b.write("older", b.run(0, "audit", "checkpoint"))
	b.grow(3)
	proof := b.write("proof.json", b.run(0, "audit", "proof", "4"))
	want(t, b.run(0, "audit", "verify", "--proof", proof, "--key", key), "verified: entry 4 is in the log writ.example", `denied "a<b"`)
	since := b.write("since.json", b.run(0, "audit", "proof", "--since", "10"))
	want(t, b.run(0, "audit", "verify", "--consistency", since, "--older", older, "--key", key), "grew from 10 to 13 entries")
	bad := b.write("bad.json", strings.Replace(b.run(0, "audit", "proof", "4"), "dec_3", "dec_4", 1))
	want(t, b.run(1, "audit", "verify", "--proof", bad, "--key", key), "FAILED entry 4 is not in the log")
	want(t, b.run(1, "audit", "verify", "--consistency", since, "--older", b.write("newer", b.run(0, "audit", "checkpoint")), "--key", key), "FAILED the proof is from size 10")
	want(t, b.run(1, "audit", "proof", "99"), "the last index is 12")
	b.run(exitUsage, "audit", "proof")
	b.run(exitUsage, "audit", "proof", "4", "--since", "3")
}

func TestAuditTailCommand(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	got := strings.Split(strings.TrimSpace(b.run(0, "audit", "tail", "-n", "3")), "\n")
	if len(got) != 3 {
		t.Fatalf("%q", got)
	}
	want(t, got[2], "2026-11-23T12:09:00.000Z  #9  alice via crm-agent (https://idp.example)  denied", "ses_0; dec_8")
	for line := range strings.Lines(b.run(0, "audit", "tail", "--json")) {
		var e struct {
			Index *int64
			Entry map[string]any
		}
		if err := json.Unmarshal([]byte(line), &e); err != nil || e.Index == nil || e.Entry["v"] != 1.0 {
			t.Errorf("%s: %v", line, err)
		}
	}
	if got := b.run(0, "audit", "tail", "-n", "0"); got != "" {
		t.Errorf("%q", got)
	}

	ctx, cancel := context.WithCancel(t.Context())
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	done := make(chan error)
	go func() {
		c := auditTailCmd{logStore: logStore{b.path("writ.yaml")}, N: 1, Follow: true}
		done <- c.Run(ctx, &kong.Context{Kong: &kong.Kong{Stdout: w}})
	}()
	seen := ""
	for part := make([]byte, 4096); strings.Count(seen, "\n") < 1; {
		n, err := r.Read(part)
		if seen += string(part[:n]); err != nil {
			t.Fatal(err)
		}
	}
	b.grow(2)
	for part := make([]byte, 4096); strings.Count(seen, "\n") < 3; {
		n, err := r.Read(part)
		if seen += string(part[:n]); err != nil {
			t.Fatal(err)
		}
	}
	want(t, seen, "#9 ", "#10 ", "#11 ")
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestAuditIncidentAndOCSFCommands(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	key, out := b.key(), b.path("incident.json")
	for about, entries := range map[string]int{"--session=ses_1": 4, "--user=https://idp.example#alice": 9, "--agent=https://idp.example#crm-agent": 9} {
		want(t, b.run(0, "audit", "incident", "--out", out, about), fmt.Sprintf("verified: %d entries about the %s", entries, strings.Replace(about[2:], "=", " ", 1)))
		want(t, b.run(0, "audit", "verify", "--incident", out, "--key", key), fmt.Sprintf("verified: %d entries", entries))
	}
	text, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	bad := b.write("bad.json", strings.Replace(string(text), `dec_3`, `dec_5`, 1))
	want(t, b.run(1, "audit", "verify", "--incident", bad, "--key", key), "FAILED entry 4: not in the log of the checkpoint")
	for _, args := range [][]string{{}, {"--session", "s", "--user", "i#u"}, {"--user", "alice"}, {"--agent", "https://idp.example#"}} {
		b.run(exitUsage, append([]string{"audit", "incident", "--out", out}, args...)...)
	}

	want(t, b.run(0, "audit", "export", "--out", b.path("ocsf"), "--format", "ocsf", "--session", "ses_1"), "wrote 4 events")
	if got := strings.Count(b.run(0, "audit", "export", "--out", "-", "--format", "ocsf"), `"class_uid":6003`); got != 10 {
		t.Errorf("%d events", got)
	}
	b.run(exitUsage, "audit", "export", "--out", b.path("x"), "--session", "ses_1")
	b.run(exitUsage, "audit", "export", "--out", b.path("x"), "--format", "csv")
	b.run(1, "audit", "export", "--out", b.path("x"), "--from", "99")
	if _, err := os.Stat(b.path("x")); !os.IsNotExist(err) {
		t.Errorf("a failed export left a file: %v", err)
	}
}

func TestAuditArchiveCommand(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	key := b.key()
	want(t, b.run(0, "audit", "archive", "--out", b.path("one"), "--before", "2026-11-23T12:04:00Z"),
		"verified: 4 entries, 0 to 3", "archived: they are in "+b.path("one"), "sha256 ")
	b.sequence()
	want(t, b.run(0, "audit", "archive", "--out", b.path("two"), "--below", "7"), "verified: 3 entries, 4 to 6")
	b.sequence()
	want(t, b.run(0, "audit", "export", "--out", b.path("rest")), "wrote 5 entries, 7 to 11")
	want(t, b.run(0, "audit", "verify", b.path("one"), b.path("two"), b.path("rest"), "--key", key, "--copies", b.path("copies")), "verified: 12 entries, 0 to 11", "1 agree, up to 10 entries; the 2 after these")
	want(t, b.run(0, "audit", "verify", "--config", b.path("writ.yaml"), "--key", key), "verified: 5 entries, 7 to 11")
	want(t, b.run(1, "audit", "archive", "--out", b.path("one"), "--below", "9"), "exists")
	want(t, b.run(1, "audit", "archive", "--out", b.path("none"), "--before", "2026-11-01"), "no entries")
	want(t, b.run(0, "audit", "tail"), "older entries archived; below 4; file one; sha256")
	for _, args := range [][]string{{}, {"--below", "3", "--before", "2026-01-01"}, {"--before", "yesterday"}} {
		b.run(exitUsage, append([]string{"audit", "archive", "--out", b.path("x")}, args...)...)
	}
}
