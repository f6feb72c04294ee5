package server_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/writsec/writ/internal/approval"
	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/config"
	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/server"
	"github.com/writsec/writ/internal/session"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/storetest"
)

var (
	alice = identity.Ref{Issuer: "https://idp.example", ID: "alice"}
	agent = identity.Ref{Issuer: "https://idp.example", ID: "agent"}
)

// things are what yesterday's database could revive.
type things struct{ session, lease, approval string }

func put(t *testing.T, s *server.Server) (out things) {
	t.Helper()
	err := s.Store().Update(t.Context(), func(tx *sqlstore.Tx) error {
		now := tx.Now()
		one := session.New(identity.Principal{Ref: alice}, agent, session.Spec{}, session.Settings{DefaultAge: time.Hour}, now)
		if err := session.Open(t.Context(), tx, one, identity.Principal{}); err != nil {
			return err
		}
		l := lease.Lease{
			ID: id.New(id.Lease), State: lease.Active, Session: one.ID, Decision: id.New(id.Decision), User: alice, Agent: agent,
			CreatedAt: now, ExpiresAt: now.Add(time.Hour),
		}
		if err := lease.Begin(t.Context(), tx, l, now, lease.Limits{}); err != nil {
			return err
		}
		a := approval.Approval{
			ID: id.New(id.Approval), Version: 1, State: approval.Approved, Session: one.ID, User: alice, Agent: agent, IntentHash: "h",
			ApproverRef: alice, CreatedAt: now, ExpiresAt: now.Add(time.Hour), DueAt: now.Add(time.Hour),
		}
		out = things{one.ID, l.ID, a.ID}
		return tx.InsertApproval(t.Context(), a)
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (x things) alive(t *testing.T, s *server.Server) (out string) {
	t.Helper()
	err := s.Store().View(t.Context(), func(tx *sqlstore.Tx) error {
		one, err := tx.Session(t.Context(), x.session)
		if err != nil {
			return err
		}
		l, err := tx.Lease(t.Context(), x.lease)
		if err != nil {
			return err
		}
		a, err := tx.Approval(t.Context(), x.approval)
		out = fmt.Sprint(one.Alive(tx.Now()), " ", l.Alive(tx.Now()), " ", a.State)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// entries waits until all that was recorded is in the log, and lists the kind.
func entries(t *testing.T, s *server.Server, kind audit.Kind) (out []audit.Entry) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		var load sqlstore.Load
		var list []audit.Sequenced
		err := s.Store().View(t.Context(), func(tx *sqlstore.Tx) (err error) {
			if load, err = tx.Load(t.Context()); err != nil {
				return err
			}
			list, err = tx.LogEntries(t.Context(), audit.Query{Kind: kind, Limit: 100})
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		if load.Unsequenced > 0 {
			continue
		}
		for _, e := range list {
			parsed, err := audit.ParseRecord(e.Record)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, parsed)
		}
		return out
	}
	t.Fatal("entries stay unsequenced")
	return nil
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func withCopies(t *testing.T) (c config.Config, db string) {
	c = newConfig(t)
	db = strings.TrimPrefix(c.Store, "sqlite:")
	c.Audit.Copies.File, c.Audit.Copies.Every = filepath.Join(filepath.Dir(db), "outside", "checkpoints"), 20*time.Millisecond
	return c, db
}

// A store that is older than what is known of it outside revives nothing, by itself
// and once.
func TestRestoreIsSeen(t *testing.T) {
	c, db := withCopies(t)
	s, stop := start(t, c)
	old := put(t, s)
	if got := old.alive(t, s); got != "true true approved" {
		t.Fatal(got)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	copyFile(t, db, db+".yesterday")

	s, stop = start(t, c) // a day goes on
	if got := old.alive(t, s); got != "true true approved" {
		t.Fatalf("after a plain restart: %s", got)
	}
	put(t, s)
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{db + "-wal", db + "-shm"} {
		_ = os.Remove(f)
	}
	copyFile(t, db+".yesterday", db)

	for range 2 { // the second time it is no news
		s, stop = start(t, c)
		if got := old.alive(t, s); got != "false false cancelled" {
			t.Errorf("yesterday's things live: %s", got)
		}
		es := entries(t, s, audit.LogRestored)
		if len(es) != 1 || es[0].Detail["outside_checkpoint"] == nil || !strings.Contains(fmt.Sprint(es[0].Detail["why"]), "only") {
			t.Errorf("entries %v", es)
		}
		if got := put(t, s).alive(t, s); got != "true true approved" { // and Writ works
			t.Error(got)
		}
		if err := stop(); err != nil {
			t.Fatal(err)
		}
	}
}

// Rewriting history looks the same to those who hold a checkpoint.
func TestRewrittenLogIsSeen(t *testing.T) {
	c, db := withCopies(t)
	s, stop := start(t, c)
	put(t, s)
	entries(t, s, "")
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	outside, err := os.ReadFile(c.Audit.Copies.File)
	if err != nil || !strings.Contains(string(outside), "\n\n— ") {
		t.Fatalf("no copies: %q %v", outside, err)
	}
	storetest.Exec(t, "sqlite:"+db, `UPDATE log_tiles SET data = zeroblob(length(data))`) // another history
	s, stop = start(t, c)
	if es := entries(t, s, audit.LogRestored); len(es) != 1 || !strings.Contains(fmt.Sprint(es[0].Detail["why"]), "not those") {
		t.Errorf("entries %v", es)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
}

// Where nothing is copied outside, the operator says so.
func TestRestoreIsTold(t *testing.T) {
	c := newConfig(t)
	s, stop := start(t, c)
	old := put(t, s)
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	s, err := server.New(t.Context(), c, true, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if got := old.alive(t, s); got != "false false cancelled" {
		t.Error(got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- s.Run(ctx) }()
	if es := entries(t, s, audit.LogRestored); len(es) != 1 {
		t.Errorf("entries %v", es)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
