package sqlstore

import (
	"bytes"
	"cmp"
	"context"
	"database/sql"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/writsec/writ/internal/approval"
	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/decision"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/intent"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/minter"
	"github.com/writsec/writ/internal/policy"
	"github.com/writsec/writ/internal/session"
	"github.com/writsec/writ/internal/storetest"
	"github.com/writsec/writ/internal/telemetry"
)

var (
	root  = RootKey{1, 2, 3}
	noon  = time.Date(2026, 11, 23, 12, 0, 0, 123456000, time.UTC)
	alice = identity.Ref{Issuer: "https://idp.example", ID: "alice"}
	bot   = identity.Ref{Issuer: "https://idp.example", ID: "crm-agent"}
	quiet = slog.New(slog.DiscardHandler)
)

// clock stands still until it is moved.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) Add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// fixture is a store of its own, on one of the engines.
type fixture struct {
	*Store
	t     *testing.T
	ctx   context.Context
	url   string
	path  string // of SQLite
	clock *clock
}

// each runs a test on every engine.
func each(t *testing.T, test func(t *testing.T, f *fixture)) {
	t.Helper()
	t.Parallel()
	t.Run("sqlite", func(t *testing.T) { test(t, newSQLite(t)) })
	t.Run("postgres", func(t *testing.T) { test(t, newPostgres(t)) })
}

func newSQLite(t *testing.T) *fixture {
	t.Helper()
	t.Parallel()
	f := &fixture{t: t, ctx: t.Context(), path: filepath.Join(t.TempDir(), "data", "writ.db"), clock: &clock{now: noon}}
	f.url = "sqlite:" + f.path
	f.reopen()
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func newPostgres(t *testing.T) *fixture {
	t.Helper()
	t.Parallel()
	f := &fixture{t: t, ctx: t.Context(), clock: &clock{now: noon}}
	f.url = storetest.Database(t, "writ", func(ctx context.Context, url string) error {
		s, err := Open(ctx, Config{URL: url, Root: root, Now: func() time.Time { return noon }, Logger: quiet})
		if err != nil {
			return err
		}
		return s.Close()
	})
	f.reopen()
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func (f *fixture) reopen() {
	f.t.Helper()
	s, err := Open(f.ctx, f.config())
	if err != nil {
		f.t.Fatal(err)
	}
	f.Store = s
}

func (f *fixture) config() Config {
	return Config{URL: f.url, Root: root, Now: f.clock.Now, Connections: 8, Logger: quiet}
}

// raw is a connection past the store: what SQLite's one writer has, so that pragmas
// hold for it.
func (f *fixture) raw() interface {
	Exec(query string) error
	QueryRow(query string) (string, error)
} {
	return rawDB{f}
}

type rawDB struct{ f *fixture }

func (r rawDB) conn(use func(c *sql.Conn) error) error {
	e, ok := r.f.engine.(*sqlite)
	if !ok {
		db, done := r.f.admin()
		defer done()
		c, err := db.Conn(r.f.ctx)
		if err != nil {
			return err
		}
		defer c.Close()
		return use(c)
	}
	if err := e.connect(); err != nil {
		return err
	}
	return use(e.conn)
}

func (r rawDB) Exec(query string) error {
	return r.conn(func(c *sql.Conn) error {
		_, err := c.ExecContext(r.f.ctx, query)
		return err
	})
}

func (r rawDB) QueryRow(query string) (out string, err error) {
	return out, r.conn(func(c *sql.Conn) error { return c.QueryRowContext(r.f.ctx, query).Scan(&out) })
}

func (f *fixture) in(do func(tx *Tx) error) {
	f.t.Helper()
	if err := f.Update(f.ctx, do); err != nil {
		f.t.Fatal(err)
	}
}

// read is one value of a View.
func read[T any](f *fixture, get func(tx *Tx) (T, error)) (v T, err error) {
	err = f.View(f.ctx, func(tx *Tx) (err error) {
		v, err = get(tx)
		return err
	})
	return v, err
}

func must[T any](f *fixture, get func(tx *Tx) (T, error)) T {
	f.t.Helper()
	v, err := read(f, get)
	if err != nil {
		f.t.Fatal(err)
	}
	return v
}

func (f *fixture) session() session.Session {
	f.t.Helper()
	s := session.Session{
		ID: id.New(id.Session), Version: 1, User: identity.Principal{Ref: alice, Claims: map[string]any{"n": json.Number("12.50"), "groups": []any{"sales"}}},
		Agent: bot, Task: &session.Task{Text: "tidy", Source: session.SourceAgent},
		Envelope: &session.Envelope{Actions: []string{"crm.*"}, Resources: []session.ResourcePattern{{Type: "postgres", ID: "*"}}, Source: session.SourceAgent},
		Labels:   []string{"a"}, Counters: map[string]int64{"paid": 1 << 60}, StartedAt: noon, EndsAt: noon.Add(time.Hour),
		IdleAt: noon.Add(time.Minute), Scope: session.ScopeOf(alice, bot),
	}
	f.in(func(tx *Tx) error { return tx.InsertSession(f.ctx, s) })
	return s
}

func (f *fixture) approval(s session.Session, hash string) approval.Approval {
	f.t.Helper()
	a := approval.Approval{
		ID: id.New(id.Approval), Version: 1, State: approval.Created, Session: s.ID, User: alice, Agent: bot, IntentHash: hash,
		Approver: "user", ApproverRef: alice, Hint: "alice", Message: "m", Code: "CODE", ACRValues: []string{"phr"},
		CreatedAt: noon, ExpiresAt: noon.Add(time.Minute), DueAt: noon,
	}
	f.in(func(tx *Tx) error { return tx.InsertApproval(f.ctx, a) })
	return a
}

func (f *fixture) lease(s session.Session, expires time.Time) lease.Lease {
	f.t.Helper()
	l := lease.Lease{
		ID: id.New(id.Lease), State: lease.Active, Session: s.ID, Decision: id.New(id.Decision), User: s.User.Ref, Agent: s.Agent, IntentHash: "h",
		Grant:     lease.Grant{Minter: "crm", Kind: "jwt", Scope: map[string]any{"scopes": []any{"read"}}, Revocability: "introspect", Precision: "exact"},
		CreatedAt: noon, ExpiresAt: expires,
	}
	f.in(func(tx *Tx) error { return tx.InsertLease(f.ctx, l) })
	return l
}

func same(t *testing.T, want, got any) {
	t.Helper()
	if d := gocmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestSessionIsKeptWhole(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		s := f.session()
		get := func(tx *Tx) (session.Session, error) { return tx.Session(f.ctx, s.ID) }
		same(t, s, must(f, get))

		plain := session.Session{ID: id.New(id.Session), Version: 1, User: identity.Principal{Ref: alice}, Agent: bot, StartedAt: noon, EndsAt: noon}
		plain.Scope = session.ScopeOf(alice, bot)
		f.in(func(tx *Tx) error { return tx.InsertSession(f.ctx, plain) })
		same(t, plain, must(f, func(tx *Tx) (session.Session, error) { return tx.Session(f.ctx, plain.ID) }))

		if _, err := read(f, func(tx *Tx) (session.Session, error) { return tx.Session(f.ctx, id.New(id.Session)) }); !fault.Is(err, fault.NotFound) {
			t.Errorf("an unknown session: %v", err)
		}
		if err := f.Update(f.ctx, func(tx *Tx) error { return tx.InsertSession(f.ctx, s) }); err == nil {
			t.Error("the same id twice")
		}
	})
}

func TestSessionChangesOnlyFromTheVersionRead(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		s := f.session()
		update := func(s session.Session, touch bool) error {
			return f.Update(f.ctx, func(tx *Tx) error { return tx.UpdateSession(f.ctx, s, touch) })
		}
		get := func() session.Session {
			return must(f, func(tx *Tx) (session.Session, error) { return tx.Session(f.ctx, s.ID) })
		}
		check := func(s session.Session) error {
			return f.Update(f.ctx, func(tx *Tx) error { return tx.CheckSession(f.ctx, s) })
		}
		if err := check(s); err != nil || get().Version != 1 {
			t.Errorf("a check alone: %v, version %d", err, get().Version)
		}
		idle := s
		idle.IdleAt = noon.Add(2 * time.Minute)
		if err := update(idle, false); err != nil || get().Version != 1 || !get().IdleAt.Equal(idle.IdleAt) {
			t.Errorf("the idle end alone: %v, %+v", err, get())
		}
		next := s
		next.Labels, next.Counters = []string{"a", "b"}, map[string]int64{"paid": 7}
		if err := update(next, true); err != nil {
			t.Fatal(err)
		}
		next.Version = 2
		same(t, next, get())
		for _, touch := range []bool{false, true} {
			if err := update(s, touch); !errors.Is(err, session.ErrChanged) {
				t.Errorf("from an old version, touch %v: %v", touch, err)
			}
		}
		if err := check(s); !errors.Is(err, session.ErrChanged) {
			t.Errorf("an old version is checked: %v", err)
		}
		next.EndedAt, next.EndReason = noon, "over"
		if err := update(next, true); err != nil {
			t.Fatal(err)
		}
		next.Version = 3
		same(t, next, get())
		if err := update(next, false); !errors.Is(err, session.ErrChanged) {
			t.Errorf("an ended session: %v", err)
		}
		if err := check(next); !errors.Is(err, session.ErrChanged) {
			t.Errorf("an ended session is checked: %v", err)
		}
	})
}

func TestLiveSessions(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		bob, other := identity.Ref{Issuer: alice.Issuer, ID: "bob"}, identity.Ref{Issuer: "https://other.example", ID: "alice"}
		open := func(user, agent identity.Ref, ends time.Time) string {
			s := session.Session{ID: id.New(id.Session), Version: 1, User: identity.Principal{Ref: user}, Agent: agent, StartedAt: noon, EndsAt: ends}
			f.in(func(tx *Tx) error { return tx.InsertSession(f.ctx, s) })
			return s.ID
		}
		later := noon.Add(time.Hour)
		a, b, c := open(alice, bot, later), open(bob, bot, later), open(other, bob, later)
		open(alice, bot, noon) // its time is over: nothing can be decided in it
		ended := open(alice, bot, later)
		f.in(func(tx *Tx) error {
			return tx.UpdateSession(f.ctx, session.Session{ID: ended, Version: 1, EndedAt: noon, EndReason: "x"}, true)
		})
		for _, x := range []struct {
			user, agent identity.Ref
			all         bool
			want        []string
		}{
			{alice, identity.Ref{}, false, []string{a}},
			{other, identity.Ref{}, false, []string{c}},
			{identity.Ref{}, bot, false, []string{a, b}},
			{identity.Ref{}, identity.Ref{}, true, []string{a, b, c}},
			{identity.Ref{}, identity.Ref{}, false, nil},
			{identity.Ref{Issuer: alice.Issuer, ID: "nobody"}, identity.Ref{}, false, nil},
		} {
			var got []string
			for _, s := range must(f, func(tx *Tx) ([]session.Session, error) {
				return tx.LiveSessions(f.ctx, x.user, x.agent, x.all, tx.Now(), 100)
			}) {
				got = append(got, s.ID)
			}
			same(t, x.want, got)
		}
	})
}

func TestApprovalIsKeptWhole(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		a := f.approval(f.session(), "h")
		get := func() approval.Approval {
			return must(f, func(tx *Tx) (approval.Approval, error) { return tx.Approval(f.ctx, a.ID) })
		}
		same(t, a, get())
		a.State, a.Reason, a.SentAt, a.ExpiresAt, a.Interval = approval.Redeemed, "r", noon.Add(1), noon.Add(2*time.Minute), 7*time.Second
		a.SentAt = noon.Add(time.Microsecond)
		a.PolledAt, a.Polling, a.Failures, a.DueAt = noon.Add(time.Second), true, 3, noon.Add(2*time.Second)
		a.AuthReqID, a.Answer, a.ACR, a.AMR, a.AuthTime = "req", []byte{0, 1, 255}, "phr", []string{"pin"}, noon
		before := a
		f.in(func(tx *Tx) error { return tx.UpdateApproval(f.ctx, &a) })
		if a.Version != 2 {
			t.Errorf("version %d", a.Version)
		}
		same(t, a, get())
		if err := f.Update(f.ctx, func(tx *Tx) error { return tx.UpdateApproval(f.ctx, &before) }); !errors.Is(err, approval.ErrStale) || before.Version != 1 {
			t.Errorf("from an old version: %v, now %d", err, before.Version)
		}
		a.AuthReqID, a.Answer = "", nil
		f.in(func(tx *Tx) error { return tx.UpdateApproval(f.ctx, &a) })
		same(t, a, get())
		if _, err := read(f, func(tx *Tx) (approval.Approval, error) { return tx.Approval(f.ctx, "apr_x") }); !fault.Is(err, fault.NotFound) {
			t.Errorf("an unknown approval: %v", err)
		}
	})
}

func TestOneOpenPromptPerPersonAndAct(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		s := f.session()
		a := f.approval(s, "h")
		second := a
		second.ID = id.New(id.Approval)
		insert := func() error {
			return f.Update(f.ctx, func(tx *Tx) error { return tx.InsertApproval(f.ctx, second) })
		}
		states := []approval.State{approval.Created, approval.Requesting, approval.Pending, approval.Redeemed}
		for _, st := range states {
			a.State = st
			f.in(func(tx *Tx) error { return tx.UpdateApproval(f.ctx, &a) })
			if err := insert(); err == nil {
				t.Fatalf("a second prompt beside one that is %s", st)
			}
			got, found, err := openApproval(f, "h", alice)
			if err != nil || !found || got.ID != a.ID {
				t.Errorf("%s: the open prompt is not found: %v", st, err)
			}
		}
		for _, c := range []struct {
			hash string
			who  identity.Ref
		}{{"other", alice}, {"h", bot}, {"h", identity.Ref{Issuer: "https://other.example", ID: "alice"}}} {
			if _, found, err := openApproval(f, c.hash, c.who); found || err != nil {
				t.Errorf("%v: found %v, %v", c, found, err)
			}
		}
		a.State = approval.Approved
		f.in(func(tx *Tx) error { return tx.UpdateApproval(f.ctx, &a) })
		if got, found, _ := openApproval(f, "h", alice); !found || got.ID != a.ID {
			t.Error("an unused yes can't be joined")
		}
		f.in(func(tx *Tx) error {
			if _, found, err := tx.JoinableApproval(f.ctx, "h", alice, a.ID); found || err != nil {
				t.Errorf("the one that did not do is joined again: %v", err)
			}
			return nil
		})
		if err := insert(); err != nil {
			t.Errorf("after the first was answered: %v", err)
		}
		n := must(f, func(tx *Tx) (int, error) { return tx.CountOpenApprovals(f.ctx, alice) })
		all := must(f, func(tx *Tx) ([]approval.Approval, error) { return tx.SessionApprovals(f.ctx, s.ID) })
		if n != 1 || len(all) != 2 {
			t.Errorf("%d open, %d open or approved; want 1 and 2", n, len(all))
		}
		a.State = approval.Consumed
		f.in(func(tx *Tx) error { return tx.UpdateApproval(f.ctx, &a) })
		if all := must(f, func(tx *Tx) ([]approval.Approval, error) { return tx.SessionApprovals(f.ctx, s.ID) }); len(all) != 1 {
			t.Errorf("%d after one was consumed", len(all))
		}
	})
}

func openApproval(f *fixture, hash string, who identity.Ref) (a approval.Approval, found bool, err error) {
	err = f.View(f.ctx, func(tx *Tx) (err error) {
		a, found, err = tx.JoinableApproval(f.ctx, hash, who, "")
		return err
	})
	return a, found, err
}

// The hash of an act includes its session, so the same act in another session is
// another prompt, and is never joined.
func TestPromptsOfTwoSessionsNeverJoin(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		open := func(s session.Session) approval.Approval {
			act := intent.Act{
				User: alice, Agent: bot, Session: s.ID, Intent: intent.Intent{Action: "hr.offboard"}, Resource: intent.Resource{Type: "employee", ID: "E17"},
			}
			hash, err := act.Hash()
			if err != nil {
				t.Fatal(err)
			}
			var a approval.Approval
			f.in(func(tx *Tx) (err error) {
				a, err = approval.Open(f.ctx, tx, approval.Opening{
					Plan:    approval.Plan{Approver: "user", ApproverRef: alice, Code: "CODE", ExpiresIn: time.Minute},
					Session: s.ID, User: alice, Agent: bot, IntentHash: hash, MaxPending: 5,
				})
				return err
			})
			return a
		}
		one, two := f.session(), f.session()
		a, b := open(one), open(two)
		if a.ID == b.ID || a.Session != one.ID || b.Session != two.ID {
			t.Errorf("%s of %s and %s of %s", a.ID, a.Session, b.ID, b.Session)
		}
		if again := open(one); again.ID != a.ID {
			t.Error("the same act in the same session is not joined")
		}
	})
}

func TestDueApproval(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		s := f.session()
		set := func(hash string, st approval.State, due time.Time) string {
			a := f.approval(s, hash)
			a.State, a.DueAt = st, due
			f.in(func(tx *Tx) error { return tx.UpdateApproval(f.ctx, &a) })
			return a.ID
		}
		due := func() (string, bool) {
			var got approval.Approval
			var found bool
			f.in(func(tx *Tx) (err error) {
				got, found, err = tx.DueApproval(f.ctx)
				if found {
					got.State = approval.Consumed
					return tx.UpdateApproval(f.ctx, &got)
				}
				return err
			})
			return got.ID, found
		}
		if _, found := due(); found {
			t.Error("due in an empty store")
		}
		var want []string
		for i, st := range []approval.State{approval.Approved, approval.Redeemed, approval.Pending, approval.Requesting, approval.Created} {
			want = append(want, set(fmt.Sprint(i), st, noon.Add(time.Duration(i-10)*time.Second)))
		}
		want = append(want, set("now", approval.Pending, noon))
		set("later", approval.Pending, noon.Add(time.Microsecond))
		for i, st := range []approval.State{
			approval.Consumed, approval.Denied, approval.Expired, approval.Failed, approval.Cancelled, approval.StartUnknown, approval.OutcomeLost,
		} {
			set(fmt.Sprint("end", i), st, noon.Add(-time.Hour))
		}
		var got []string
		for {
			id, found := due()
			if !found {
				break
			}
			got = append(got, id)
		}
		same(t, want, got)
	})
}

func TestLeases(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		s, other := f.session(), f.session()
		a := f.lease(s, noon.Add(2*time.Minute))
		b := f.lease(s, noon)
		c := f.lease(other, noon.Add(time.Minute))
		same(t, a, must(f, func(tx *Tx) (lease.Lease, error) { return tx.Lease(f.ctx, a.ID) }))
		for _, x := range []struct {
			sel  lease.Selection
			want []string
		}{
			{lease.Selection{}, nil},
			{lease.Selection{Decision: a.Decision}, []string{a.ID}},
			{lease.Selection{Decision: "dec_other"}, nil},
			{lease.Selection{Session: s.ID}, []string{b.ID, a.ID}},
			{lease.Selection{User: alice}, []string{b.ID, c.ID, a.ID}},
			{lease.Selection{Agent: bot}, []string{b.ID, c.ID, a.ID}},
			{lease.Selection{User: identity.Ref{Issuer: "https://other.example", ID: "alice"}}, nil},
			{lease.Selection{Due: true}, []string{b.ID}},
			{lease.Selection{All: true}, []string{b.ID, c.ID, a.ID}},
		} {
			var got []string
			for _, l := range f.wouldEnd(x.sel, 10) {
				got = append(got, l.ID)
			}
			same(t, x.want, got)
		}
		if ls := f.wouldEnd(lease.Selection{All: true}, 2); len(ls) != 2 {
			t.Errorf("%d leases, limit 2", len(ls))
		}
		f.clock.Add(time.Second)
		end := func(id, reason string) (n int) {
			f.in(func(tx *Tx) error {
				ls, err := tx.EndLeases(f.ctx, lease.Selection{ID: id}, lease.End{Reason: reason}, 1)
				n = len(ls)
				return err
			})
			return n
		}
		if n := end(a.ID, "released"); n != 1 {
			t.Errorf("%d ended", n)
		}
		a.State, a.EndedAt, a.GoneAt, a.DueAt, a.EndReason = lease.Revoked, noon.Add(time.Second), noon.Add(time.Second), noon.Add(time.Second), "released"
		same(t, a, must(f, func(tx *Tx) (lease.Lease, error) { return tx.Lease(f.ctx, a.ID) }))
		for _, x := range []string{a.ID, "lea_x"} {
			if n := end(x, "again"); n != 0 {
				t.Errorf("ending %s: %d", x, n)
			}
		}
		if _, err := read(f, func(tx *Tx) (lease.Lease, error) { return tx.Lease(f.ctx, "lea_x") }); !fault.Is(err, fault.NotFound) {
			t.Error(err)
		}
	})
}

// wouldEnd lists what EndLeases would end, oldest end first, and ends nothing.
func (f *fixture) wouldEnd(s lease.Selection, limit int) (out []lease.Lease) {
	f.t.Helper()
	undone := errors.New("undone")
	err := f.Update(f.ctx, func(tx *Tx) (err error) {
		if out, err = tx.EndLeases(f.ctx, s, lease.End{Reason: "test"}, limit); err != nil {
			return err
		}
		return undone
	})
	if !errors.Is(err, undone) {
		f.t.Fatal(err)
	}
	slices.SortFunc(out, func(a, b lease.Lease) int {
		return cmp.Or(a.ExpiresAt.Compare(b.ExpiresAt), strings.Compare(a.ID, b.ID))
	})
	return out
}

func TestDecisions(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		s := f.session()
		r := decision.Record{
			ID: id.New(id.Decision), At: noon, Session: s.ID, User: alice, Agent: bot, IntentHash: "h",
			Answer: decision.Answer{
				DecisionID: "d", Decision: policy.Allow, Session: s.ID, Reasons: []policy.Reason{{Code: "c", Message: "m"}},
				Obligations: []map[string]any{}, Policy: policy.Version{Revision: "r"},
				Credential: &decision.Credential{Lease: "l", Kind: "jwt", Secret: lease.Secret{"token": "tok-secret-7391"}},
			},
			Approval: "apr", Lease: "lea",
		}
		f.in(func(tx *Tx) error { return tx.InsertDecision(f.ctx, r) })
		if r.Answer.Credential == nil {
			t.Error("storing took the credential from its owner")
		}
		f.in(func(tx *Tx) error { return tx.SetDecisionLease(f.ctx, r.ID, "lea2") })
		r.Answer.Credential, r.Lease = nil, "lea2"
		same(t, r, must(f, func(tx *Tx) (decision.Record, error) { return tx.Decision(f.ctx, r.ID) }))
		f.wantAbsent("tok-secret-7391")
	})
}

func TestReplays(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		put := func(key, digest, decision, superseded string) error {
			return f.Update(f.ctx, func(tx *Tx) error { return tx.PutReplay(f.ctx, bot, key, dr(digest, decision), superseded) })
		}
		want := func(key string, agent identity.Ref, want decision.Replay, wantFound bool) {
			t.Helper()
			var got decision.Replay
			var found bool
			err := f.View(f.ctx, func(tx *Tx) (err error) {
				got, found, err = tx.Replay(f.ctx, agent, key)
				return err
			})
			if err != nil || found != wantFound || got != want {
				t.Errorf("%s: %v %v %v", key, got, found, err)
			}
		}
		want("k", bot, decision.Replay{}, false)
		if err := put("k", "d", "dec1", ""); err != nil {
			t.Fatal(err)
		}
		want("k", bot, dr("d", "dec1"), true)
		want("k", alice, decision.Replay{}, false) // another agent's keys are its own
		for _, superseded := range []string{"", "dec0"} {
			if err := put("k", "d", "dec2", superseded); !errors.Is(err, session.ErrChanged) {
				t.Errorf("taken over from %q: %v", superseded, err)
			}
		}
		if err := put("k", "other", "dec2", "dec1"); err != nil {
			t.Fatal(err)
		}
		want("k", bot, dr("d", "dec2"), true)
	})
}

func dr(digest, id string) decision.Replay { return decision.Replay{Digest: digest, Decision: id} }

func TestAuditEntriesAreKeptWholeAndInOrder(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		ctx := telemetry.WithRequestID(f.ctx, "req_1")
		var want []audit.Entry
		for i := range 5 {
			e := audit.Entry{
				Kind: audit.SessionOpened, RequestID: "req_1", User: alice, Agent: bot, Operator: identity.Ref{Issuer: "o", ID: "p"},
				Session: "s", Decision: "d", Approval: "a", Lease: "l", Detail: map[string]any{"n": json.Number(fmt.Sprint(i)), "nested": map[string]any{"x": true}},
			}
			f.in(func(tx *Tx) error { return audit.Append(ctx, tx, e) })
			e.Seq, e.At = int64(i+1), f.clock.Now()
			want = append(want, e)
			f.clock.Add(time.Second)
		}
		list := func(limit int) []audit.Entry {
			return must(f, func(tx *Tx) ([]audit.Entry, error) { return tx.Unsequenced(f.ctx, limit) })
		}
		same(t, want, list(100))
		same(t, want[:2], list(2))
	})
}

// Nothing of a failed step stays, neither its row nor its entry, and no sequence
// number is used up unseen.
func TestRollbackLeavesNothing(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		wake, stop := f.Watch("topic")
		defer stop()
		boom := errors.New("boom")
		var sid string
		step := func(end func() error) error {
			return f.Update(f.ctx, func(tx *Tx) error {
				s := session.New(identity.Principal{Ref: alice}, bot, session.Spec{}, session.Settings{DefaultAge: time.Hour}, tx.Now())
				sid = s.ID
				tx.Notify("topic")
				if err := session.Open(f.ctx, tx, s, identity.Principal{}); err != nil {
					return err
				}
				return end()
			})
		}
		if err := step(func() error { return boom }); !errors.Is(err, boom) {
			t.Fatal(err)
		}
		func() {
			defer func() {
				if recover() == nil {
					t.Error("the panic was swallowed")
				}
			}()
			_ = step(func() error { panic("bug") })
		}()
		if _, err := read(f, func(tx *Tx) (session.Session, error) { return tx.Session(f.ctx, sid) }); !fault.Is(err, fault.NotFound) {
			t.Errorf("the session stayed: %v", err)
		}
		if es := must(f, func(tx *Tx) ([]audit.Entry, error) { return tx.Unsequenced(f.ctx, 10) }); len(es) != 0 {
			t.Errorf("entries stayed: %v", es)
		}
		select {
		case <-wake:
			t.Error("woken by what did not happen")
		default:
		}
		// A panic once kept the only writer for ever.
		ctx, cancel := context.WithTimeout(f.ctx, 5*time.Second)
		defer cancel()
		if err := f.Update(ctx, func(*Tx) error { return nil }); err != nil {
			t.Fatalf("after a panic: %v", err)
		}
		if err := step(func() error { return nil }); err != nil {
			t.Fatal(err)
		}
		select {
		case <-wake:
		default:
			t.Error("not woken by a commit")
		}
		es := must(f, func(tx *Tx) ([]audit.Entry, error) { return tx.Unsequenced(f.ctx, 10) })
		if len(es) != 1 || es[0].Session != sid {
			t.Errorf("entries %v", es)
		}
	})
}

func TestViewCannotWrite(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		s := f.session()
		err := f.View(f.ctx, func(tx *Tx) error { return tx.UpdateSession(f.ctx, s, true) })
		if err == nil {
			t.Error("written")
		}
		err = f.View(f.ctx, func(tx *Tx) error { return audit.Append(f.ctx, tx, audit.Entry{Kind: "x"}) })
		if err == nil {
			t.Error("written")
		}
	})
}

func TestViewSeesOneState(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		s := f.session()
		err := f.View(f.ctx, func(tx *Tx) error {
			before, err := tx.Session(f.ctx, s.ID)
			if err != nil {
				return err
			}
			f.in(func(w *Tx) error { return w.UpdateSession(f.ctx, s, true) })
			after, err := tx.Session(f.ctx, s.ID)
			if after.Version != before.Version {
				t.Errorf("version went from %d to %d under a reader", before.Version, after.Version)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	})
}

func TestCancelledContext(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		s := f.session()
		ctx, cancel := context.WithCancel(f.ctx)
		cancel()
		nop := func(*Tx) error { return nil }
		for name, err := range map[string]error{"update": f.Update(ctx, nop), "view": f.View(ctx, nop)} {
			if !errors.Is(err, context.Canceled) || fault.Is(err, fault.Unavailable) {
				t.Errorf("%s: %v", name, err)
			}
		}
		ctx, cancel = context.WithCancel(f.ctx)
		err := f.Update(ctx, func(tx *Tx) error {
			if err := tx.UpdateSession(ctx, s, true); err != nil {
				return err
			}
			cancel()
			return nil
		})
		if err == nil {
			t.Error("committed although the caller is gone")
		}
		if got := must(f, func(tx *Tx) (session.Session, error) { return tx.Session(f.ctx, s.ID) }); got.Version != 1 {
			t.Error("half a step stayed")
		}
		if f.path == "" {
			return // it has more than one writer
		}
		// A caller that waits for the writer gives up when it is told to.
		ctx, cancel = context.WithTimeout(f.ctx, 20*time.Millisecond)
		defer cancel()
		f.in(func(*Tx) error {
			if err := f.Update(ctx, nop); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("waiting for the writer: %v", err)
			}
			return nil
		})
	})
}

func TestBrokenDatabaseIsUnavailable(t *testing.T) {
	for name, broken := range map[string]func(f *fixture){
		"closed": func(f *fixture) { _ = f.Close() },
		"read-only": func(f *fixture) {
			if err := f.raw().Exec("PRAGMA query_only = 1"); err != nil {
				f.t.Fatal(err)
			}
		},
		"no room": func(f *fixture) {
			if err := f.raw().Exec("PRAGMA max_page_count = 1"); err != nil {
				f.t.Fatal(err)
			}
		},
		"a table is gone": func(f *fixture) {
			if err := f.raw().Exec("DROP TABLE audit"); err != nil {
				f.t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newSQLite(t)
			broken(f)
			err := f.Update(f.ctx, func(tx *Tx) error {
				for range 1000 { // enough to need another page
					e := audit.Entry{Kind: "x", Detail: map[string]any{"pad": strings.Repeat("x", 1000)}}
					if err := audit.Append(f.ctx, tx, e); err != nil {
						return err
					}
				}
				return nil
			})
			if !fault.Is(err, fault.Unavailable) {
				t.Errorf("update: %v", err)
			}
			if name == "closed" && !fault.Is(f.Ping(f.ctx), fault.Unavailable) {
				t.Error("ping says nothing")
			}
		})
	}
}

// wantAbsent searches everything that is stored for bytes that must not be there.
func (f *fixture) wantAbsent(secrets ...string) {
	f.t.Helper()
	seen := 0
	for name, content := range f.dump() {
		seen += len(content)
		for _, s := range secrets {
			for _, form := range []string{s, base64.StdEncoding.EncodeToString([]byte(s)), fmt.Sprintf("%x", s)} {
				if bytes.Contains(content, []byte(form)) {
					f.t.Errorf("%s holds %q", name, form)
				}
			}
		}
	}
	if seen < 256 {
		f.t.Errorf("only %d bytes searched", seen)
	}
}

// dump is what lies on disk: the files of SQLite, the tables of PostgreSQL.
func (f *fixture) dump() map[string][]byte {
	f.t.Helper()
	out := map[string][]byte{}
	if f.path != "" {
		for _, file := range []string{f.path, f.path + "-wal", f.path + "-shm"} {
			if b, err := os.ReadFile(file); err == nil {
				out[filepath.Base(file)] = b
			}
		}
		return out
	}
	tables, err := f.raw().QueryRow(`SELECT string_agg(table_name, ' ') FROM information_schema.tables WHERE table_schema = 'public'`)
	if err != nil {
		f.t.Fatal(err)
	}
	for _, table := range strings.Fields(tables) {
		text, err := f.raw().QueryRow(`SELECT coalesce(string_agg(t::text, ' '), '') FROM ` + table + ` t`)
		if err != nil {
			f.t.Fatal(err)
		}
		out[table] = []byte(text)
	}
	return out
}

func TestSealedColumns(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		a := f.approval(f.session(), "h")
		a.AuthReqID, a.Answer = "auth-req-id-7391", []byte("answer-7391")
		f.in(func(tx *Tx) error { return tx.UpdateApproval(f.ctx, &a) })
		keys, err := minter.LoadKeys(f.ctx, f.Store, minter.Rotation{Algorithm: "ES256"})
		if err != nil {
			t.Fatal(err)
		}
		stored, err := f.SigningKeys(f.ctx)
		if err != nil || len(stored) != 1 || stored[0].ID != keys.JWKS().Keys[0].KeyID {
			t.Fatal(stored, err)
		}
		f.wantAbsent("auth-req-id-7391", "answer-7391", string(stored[0].PKCS8))
		// The search itself works: this is not sealed.
		if !bytes.Contains(slices.Concat(slices.Collect(maps.Values(f.dump()))...), []byte(a.ID)) {
			t.Error("the search finds nothing at all")
		}
	})
}

func TestSealedValuesDoNotMove(t *testing.T) {
	for name, tamper := range map[string]string{
		"to another row":    `UPDATE approvals SET auth_req_id_sealed = (SELECT auth_req_id_sealed FROM approvals WHERE intent_hash = 'b') WHERE intent_hash = 'a'`,
		"to another column": `UPDATE approvals SET answer_sealed = auth_req_id_sealed WHERE intent_hash = 'a'`,
		"altered":           `UPDATE approvals SET answer_sealed = substr(answer_sealed, 1, length(answer_sealed) - 1) || x'00' WHERE intent_hash = 'a'`,
		"cut":               `UPDATE approvals SET answer_sealed = x'00' WHERE intent_hash = 'a'`,
		"in the clear":      `UPDATE approvals SET answer_sealed = 'answer' WHERE intent_hash = 'a'`,
	} {
		t.Run(name, func(t *testing.T) {
			f := newSQLite(t)
			s := f.session()
			var ids []string
			for _, h := range []string{"a", "b"} {
				a := f.approval(s, h)
				a.AuthReqID, a.Answer = "req "+h, []byte("answer "+h)
				f.in(func(tx *Tx) error { return tx.UpdateApproval(f.ctx, &a) })
				ids = append(ids, a.ID)
			}
			if err := f.raw().Exec(tamper); err != nil {
				t.Fatal(err)
			}
			bad, err := read(f, func(tx *Tx) (approval.Approval, error) { return tx.Approval(f.ctx, ids[0]) })
			if err != nil || !bad.Damaged || bad.AuthReqID != "" || bad.Answer != nil {
				t.Errorf("the damaged row: %+v, %v", bad, err)
			}
			if good, err := read(f, func(tx *Tx) (approval.Approval, error) { return tx.Approval(f.ctx, ids[1]) }); err != nil || good.Damaged {
				t.Errorf("the other row: %+v, %v", good, err)
			}
			// It can be ended, which the kill switch needs.
			f.in(func(tx *Tx) error { return approval.Close(f.ctx, tx, &bad, approval.Cancelled, "x") })
		})
	}
}

func TestOpenTwice(t *testing.T) {
	f := newSQLite(t)
	_, err := Open(f.ctx, Config{URL: "sqlite:" + f.path, Root: root, Now: time.Now, Logger: quiet})
	if err == nil || !strings.Contains(err.Error(), "another Writ uses") {
		t.Errorf("%v", err)
	}
	f.session() // the first is not disturbed
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	f.reopen()
}

func TestOpenWithAnotherRootKey(t *testing.T) {
	f := newSQLite(t)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	_, err := Open(f.ctx, Config{URL: "sqlite:" + f.path, Root: RootKey{9}, Now: time.Now, Logger: quiet})
	if err == nil || !strings.Contains(err.Error(), "root key") || !strings.Contains(err.Error(), f.path) {
		t.Errorf("%v", err)
	}
	f.reopen() // and with the right one it opens again
}

func TestOpenWhatIsNoDatabase(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "text")
	if err := os.WriteFile(file, bytes.Repeat([]byte("no database "), 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, dir, filepath.Join(file, "below")} {
		if s, err := Open(t.Context(), Config{URL: "sqlite:" + path, Root: root, Now: time.Now, Logger: quiet}); err == nil {
			_ = s.Close()
			t.Errorf("%s was opened", path)
		}
	}
}

func TestFilesAreTheOwnersAlone(t *testing.T) {
	f := newSQLite(t)
	f.session()
	entries, err := os.ReadDir(filepath.Dir(f.path))
	if err != nil || len(entries) < 3 {
		t.Fatal(entries, err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		if m := info.Mode().Perm(); m&0o077 != 0 {
			t.Errorf("%s has mode %o", e.Name(), m)
		}
	}
	if info, err := os.Stat(filepath.Dir(f.path)); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("folder has mode %v, %v", info.Mode(), err)
	}
}

func TestPathsThatLookLikeURLs(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, name := range []string{"a b.db", "a?mode=memory.db", "a#b.db", "a%20b.db", "ü.db"} {
		path := filepath.Join(dir, name)
		s, err := Open(t.Context(), Config{URL: "sqlite:" + path, Root: root, Now: time.Now, Logger: quiet})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if info, err := os.Stat(path); err != nil || info.Size() == 0 {
			t.Errorf("%s: the data is elsewhere (%v)", name, err)
		}
	}
}

func TestDurability(t *testing.T) {
	f := newSQLite(t)
	for _, c := range []struct{ pragma, want string }{{"journal_mode", "wal"}, {"synchronous", "2"}, {"foreign_keys", "1"}} {
		if got, err := f.raw().QueryRow("PRAGMA " + c.pragma); err != nil || got != c.want {
			t.Errorf("%s is %q (%v), want %q", c.pragma, got, err, c.want)
		}
	}
	s := f.session()
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	f.reopen() // also: the migrations run again and change nothing
	same(t, s, must(f, func(tx *Tx) (session.Session, error) { return tx.Session(f.ctx, s.ID) }))
}

// What a killed process had taken is due as soon as the store opens again.
func TestRecover(t *testing.T) {
	f := newSQLite(t)
	s := f.session()
	far := noon.Add(50 * time.Second)
	set := func(hash string, change func(a *approval.Approval)) string {
		a := f.approval(s, hash)
		a.DueAt, a.PolledAt, a.Interval = far, noon, 5*time.Second
		change(&a)
		f.in(func(tx *Tx) error { return tx.UpdateApproval(f.ctx, &a) })
		return a.ID
	}
	due := map[string]time.Time{
		set("requesting", func(a *approval.Approval) { a.State = approval.Requesting }):            {},
		set("redeemed", func(a *approval.Approval) { a.State = approval.Redeemed }):                {},
		set("polling", func(a *approval.Approval) { a.State, a.Polling = approval.Pending, true }): noon.Add(6 * time.Second),
		set("deadline first", func(a *approval.Approval) {
			a.State, a.Polling, a.ExpiresAt = approval.Pending, true, noon.Add(3*time.Second)
		}): noon.Add(3 * time.Second),
		// Not in flight: these wait as they were told to, by a provider or by backoff.
		set("waiting", func(a *approval.Approval) { a.State, a.Failures = approval.Pending, 2 }): far,
		set("created", func(a *approval.Approval) { a.State = approval.Created }):                far,
		set("approved", func(a *approval.Approval) { a.State = approval.Approved }):              far,
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	f.reopen()
	for id, want := range due {
		a := must(f, func(tx *Tx) (approval.Approval, error) { return tx.Approval(f.ctx, id) })
		if !a.DueAt.Equal(want) {
			t.Errorf("%s is due %v, want %v", a.IntentHash, a.DueAt, want)
		}
	}
}

func TestParallelWork(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		s := f.session()
		var g sync.WaitGroup
		for i := range 64 {
			g.Go(func() {
				for range 5 {
					for {
						err := f.Update(f.ctx, func(tx *Tx) error {
							got, err := tx.Session(f.ctx, s.ID)
							if err != nil {
								return err
							}
							return session.Settle(f.ctx, tx, got, session.Settings{Window: time.Hour}, session.Settlement{
								Marks: session.Marks{Counters: map[string]int64{fmt.Sprint("c", i): 1, "all": 1}},
							})
						})
						if !errors.Is(err, session.ErrChanged) {
							if err != nil {
								t.Error(err)
							}
							break
						}
					}
					err := f.View(f.ctx, func(tx *Tx) error {
						got, err := tx.Session(f.ctx, s.ID)
						var sum int64
						for name, n := range got.Counters {
							if strings.HasPrefix(name, "c") {
								sum += n
							}
						}
						if sum != got.Counters["all"] {
							t.Errorf("a reader sees %d and %d", sum, got.Counters["all"])
						}
						return err
					})
					if err != nil {
						t.Error(err)
					}
				}
			})
		}
		g.Wait()
		got := must(f, func(tx *Tx) (session.Session, error) { return tx.Session(f.ctx, s.ID) })
		if got.Counters["all"] != 320 || got.Version != 321 {
			t.Errorf("counted %d, version %d", got.Counters["all"], got.Version)
		}
	})
}

func TestWatch(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		a, stopA := f.Watch("x")
		b, stopB := f.Watch("x")
		other, stopOther := f.Watch("y")
		defer stopOther()
		notify := func() {
			f.in(func(tx *Tx) error {
				tx.Notify("x")
				tx.Notify("x")
				return nil
			})
		}
		notify()
		notify() // nobody takes the first: no block, no second
		for _, c := range []<-chan struct{}{a, b} {
			select {
			case <-c:
			default:
				t.Error("not woken")
			}
			select {
			case <-c:
				t.Error("woken twice")
			default:
			}
		}
		stopA()
		stopA() // harmless
		notify()
		select {
		case <-a:
			t.Error("woken after stop")
		case <-other:
			t.Error("woken for another topic")
		default:
		}
		stopB()
		stopOther()
		if len(f.hub.watchers) != 0 {
			t.Errorf("%d topics are left", len(f.hub.watchers))
		}
	})
}

func TestTimeIsOnePerTransaction(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		f.clock.Add(999 * time.Nanosecond) // less than a row can hold
		f.in(func(tx *Tx) error {
			first := tx.Now()
			f.clock.Add(time.Hour)
			if !tx.Now().Equal(first) || !first.Equal(noon) || first.Location() != time.UTC {
				t.Errorf("%v, then %v", first, tx.Now())
			}
			return nil
		})
	})
}

func TestRootKeyIsNeverShown(t *testing.T) {
	t.Parallel()
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "key", RootKey{7})
	for _, s := range []string{fmt.Sprintf("%v %+v %#v %s %q %x %d", root, root, root, root, root, root, root), log.String()} {
		if strings.ContainsAny(s, "0123") && !strings.Contains(s, "time") || strings.Contains(s, "7,0") || strings.Contains(s, "Bw") {
			t.Errorf("shown: %s", s)
		}
	}
}

// A session of a binary that knew no scopes has the one of its user and agent.
func TestSessionOfTheBinaryBefore(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		s := f.session()
		f.in(func(tx *Tx) error { return tx.AdvanceScope(f.ctx, s.Scope, 0) })
		f.in(func(tx *Tx) error {
			_, err := tx.exec(f.ctx, "forget scope", `UPDATE sessions SET scope = '', idle_at = 0 WHERE id = $1`, s.ID)
			return err
		})
		got := must(f, func(tx *Tx) (session.Session, error) { return tx.Session(f.ctx, s.ID) })
		if got.Scope != session.ScopeOf(alice, bot) || got.ScopeVersion == 0 || !got.IdleAt.IsZero() {
			t.Errorf("%+v", got)
		}
		f.in(func(tx *Tx) error { return tx.CheckSession(f.ctx, got) })
		got.ScopeVersion--
		if err := f.Update(f.ctx, func(tx *Tx) error { return tx.CheckSession(f.ctx, got) }); !errors.Is(err, session.ErrChanged) {
			t.Errorf("a scope that has changed: %v", err)
		}
	})
}
