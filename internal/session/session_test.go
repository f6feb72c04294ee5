package session_test

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/session"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/storetest"
)

var (
	alice  = identity.Principal{Ref: identity.Ref{Issuer: "https://idp.example", ID: "alice"}}
	bob    = identity.Principal{Ref: identity.Ref{Issuer: "https://idp.example", ID: "bob"}}
	agent  = identity.Principal{Ref: identity.Ref{Issuer: "https://idp.example", ID: "crm-agent"}}
	noon   = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	limits = session.Settings{DefaultAge: time.Hour, MaxAge: 8 * time.Hour, Window: 24 * time.Hour}
)

type world struct {
	*sqlstore.Store
	t       *testing.T
	now     time.Time
	manager *session.Manager
}

func newWorld(t *testing.T) *world {
	t.Helper()
	t.Parallel()
	w := &world{t: t, now: noon}
	var err error
	w.Store, err = sqlstore.Open(t.Context(), sqlstore.Config{
		URL: storetest.URL(t, migrate), Now: func() time.Time { return w.now }, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.Close() })
	w.manager = &session.Manager{Store: sqlstore.For[session.Tx](w.Store), Settings: limits}
	return w
}

func (w *world) open(spec session.Spec) session.Session {
	w.t.Helper()
	s, err := w.manager.Open(w.t.Context(), identity.Caller{Agent: agent, User: &alice}, spec)
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

func (w *world) get(id string) session.Session {
	w.t.Helper()
	s, _, err := w.manager.Get(w.t.Context(), identity.Caller{Agent: agent}, id)
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

func (w *world) settle(s session.Session, labels []string, counters map[string]int64) error {
	return w.Update(w.t.Context(), func(tx *sqlstore.Tx) error {
		recent, err := session.ReadRecent(w.t.Context(), tx, s)
		if err != nil {
			return err
		}
		return session.Settle(w.t.Context(), tx, s, limits, session.Settlement{
			Recent: recent, Marks: session.Marks{Labels: labels, Counters: counters},
		})
	})
}

func TestOpenAndGet(t *testing.T) {
	w := newWorld(t)
	envelope := &session.Envelope{Actions: []string{"crm.*"}, Resources: []session.ResourcePattern{{Type: "postgres", ID: "*"}}, Source: "user"}
	s := w.open(session.Spec{Task: "tidy", Envelope: envelope, Age: time.Minute})
	if s.Task.Source != session.SourceAgent || s.Envelope.Source != session.SourceAgent {
		t.Errorf("the agent's word passes for the user's: %+v %+v", s.Task, s.Envelope)
	}
	if envelope.Source != "user" {
		t.Error("the opener's envelope was changed")
	}
	if !s.EndsAt.Equal(noon.Add(time.Minute)) || !w.open(session.Spec{}).EndsAt.Equal(noon.Add(time.Hour)) {
		t.Errorf("ends %v", s.EndsAt)
	}
	if d := cmp.Diff(s, w.get(s.ID)); d != "" {
		t.Errorf("(-opened +got):\n%s", d)
	}
	if _, err := w.manager.Open(t.Context(), identity.Caller{Agent: agent}, session.Spec{}); !fault.Is(err, fault.InvalidToken) {
		t.Errorf("a session for nobody: %v", err)
	}
	for name, c := range map[string]identity.Caller{
		"another agent": {Agent: bob}, "for another user": {Agent: agent, User: &bob},
		"an agent of another issuer": {Agent: identity.Principal{Ref: identity.Ref{Issuer: "x", ID: agent.ID}}},
	} {
		if _, _, err := w.manager.Get(t.Context(), c, s.ID); !fault.Is(err, fault.NotFound) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, id := range []string{"", "ses_x", s.ID + "0", strings.ToUpper(s.ID)} {
		if _, _, err := w.manager.Get(t.Context(), identity.Caller{Agent: agent}, id); !fault.Is(err, fault.NotFound) {
			t.Errorf("%q: %v", id, err)
		}
	}
	w.now = s.EndsAt
	if _, alive, err := w.manager.Get(t.Context(), identity.Caller{Agent: agent}, s.ID); alive || err != nil {
		t.Errorf("alive at its end: %v, %v", alive, err)
	}
}

func TestSpecLimits(t *testing.T) {
	t.Parallel()
	good := func() session.Spec {
		return session.Spec{Task: strings.Repeat("ü", 2048), Age: 8 * time.Hour, Envelope: &session.Envelope{
			Actions: []string{strings.Repeat("a", 512)}, Resources: []session.ResourcePattern{{Type: "t", ID: "i"}},
		}}
	}
	if err := good().Check(limits); err != nil {
		t.Error(err)
	}
	if err := (session.Spec{}).Check(limits); err != nil {
		t.Error(err)
	}
	for pointer, changes := range map[string][]func(*session.Spec){
		"/task":       {func(s *session.Spec) { s.Task += "x" }},
		"/expires_in": {func(s *session.Spec) { s.Age++ }, func(s *session.Spec) { s.Age = -1 }},
		"/envelope/actions": {
			func(s *session.Spec) { s.Envelope.Actions = nil },
			func(s *session.Spec) { s.Envelope.Actions = make([]string, 65) },
			func(s *session.Spec) { s.Envelope.Actions = []string{""} },
			func(s *session.Spec) { s.Envelope.Actions[0] += "a" },
		},
		"/envelope/resources": {
			func(s *session.Spec) { s.Envelope.Resources = nil },
			func(s *session.Spec) { s.Envelope.Resources = make([]session.ResourcePattern, 65) },
			func(s *session.Spec) { s.Envelope.Resources[0].Type = "" },
			func(s *session.Spec) { s.Envelope.Resources[0].ID = "" },
			func(s *session.Spec) { s.Envelope.Resources[0].ID = strings.Repeat("a", 513) },
		},
	} {
		for i, change := range changes {
			s := good()
			change(&s)
			f, ok := errors.AsType[*fault.Error](s.Check(limits))
			if !ok || f.Code != fault.InvalidRequest || f.Fields[0].Pointer != pointer {
				t.Errorf("%s %d: %v", pointer, i, f)
			}
		}
	}
}

func TestSettle(t *testing.T) {
	w := newWorld(t)
	s := w.open(session.Spec{})
	steps := []struct {
		labels   []string
		counters map[string]int64
		want     session.Session // Version, Labels, Counters
	}{
		{nil, nil, session.Session{Version: 1, Counters: map[string]int64{}}},
		{nil, map[string]int64{"paid": 0}, session.Session{Version: 1, Counters: map[string]int64{}}},
		{[]string{"b", "a", "b"}, nil, session.Session{Version: 2, Labels: []string{"a", "b"}, Counters: map[string]int64{}}},
		{[]string{"a"}, nil, session.Session{Version: 2, Labels: []string{"a", "b"}, Counters: map[string]int64{}}},
		{[]string{"c"}, map[string]int64{"paid": 300}, session.Session{Version: 3, Labels: []string{"a", "b", "c"}, Counters: map[string]int64{"paid": 300}}},
		{nil, map[string]int64{"paid": 5, "n": 1}, session.Session{Version: 4, Labels: []string{"a", "b", "c"}, Counters: map[string]int64{"paid": 305, "n": 1}}},
		{nil, map[string]int64{"paid": math.MaxInt64 - 305}, session.Session{Version: 5, Labels: []string{"a", "b", "c"}, Counters: map[string]int64{"paid": math.MaxInt64, "n": 1}}},
	}
	for i, c := range steps {
		if err := w.settle(s, c.labels, c.counters); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		old := s
		s = w.get(s.ID)
		got := session.Session{Version: s.Version, Labels: s.Labels, Counters: s.Counters}
		if d := cmp.Diff(c.want, got); d != "" {
			t.Errorf("step %d (-want +got):\n%s", i, d)
		}
		if old.Version != s.Version { // whoever decided on the old one decides again
			if err := w.settle(old, nil, nil); !errors.Is(err, session.ErrChanged) {
				t.Errorf("step %d, from the version before: %v", i, err)
			}
		}
	}
	if err := w.settle(s, nil, map[string]int64{"paid": 1}); !fault.Is(err, fault.Internal) {
		t.Errorf("over int64: %v", err)
	}
	if got := w.get(s.ID); got.Counters["paid"] != math.MaxInt64 {
		t.Errorf("wrapped round to %d", got.Counters["paid"])
	}
	// A decision on a session that is over by now is made again, and then refused.
	w.now = s.EndsAt
	if err := w.settle(s, nil, nil); !errors.Is(err, session.ErrChanged) {
		t.Errorf("after its time: %v", err)
	}
}

func TestEnd(t *testing.T) {
	w := newWorld(t)
	s := w.open(session.Spec{})
	end := func(s session.Session, reason string) error {
		return w.Update(t.Context(), func(tx *sqlstore.Tx) error {
			return session.End(t.Context(), tx, s, session.Cause{Reason: reason})
		})
	}
	w.now = noon.Add(time.Minute)
	if err := end(s, "first"); err != nil {
		t.Fatal(err)
	}
	if err := end(s, "second"); !errors.Is(err, session.ErrChanged) {
		t.Errorf("from the old version: %v", err)
	}
	s = w.get(s.ID)
	if err := end(s, "third"); err != nil {
		t.Errorf("twice: %v", err)
	}
	if s.EndReason != "first" || !s.EndedAt.Equal(w.now) || s.Alive(noon) {
		t.Errorf("%+v", s)
	}
	if err := w.settle(s, []string{"x"}, nil); !errors.Is(err, session.ErrChanged) {
		t.Errorf("settled after the end: %v", err)
	}
	var kinds []audit.Kind
	err := w.View(t.Context(), func(tx *sqlstore.Tx) error {
		es, err := tx.Unsequenced(t.Context(), 10)
		for _, e := range es {
			kinds = append(kinds, e.Kind)
		}
		return err
	})
	if d := cmp.Diff([]audit.Kind{audit.SessionOpened, audit.SessionEnded}, kinds); d != "" || err != nil {
		t.Errorf("%v (-want +got):\n%s", err, d)
	}
}

func TestMain(m *testing.M) { os.Exit(storetest.Both(m)) }

// migrate fills the template that each test's database is cloned from.
func migrate(ctx context.Context, url string) error {
	s, err := sqlstore.Open(ctx, sqlstore.Config{URL: url, Now: func() time.Time { return noon }, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	return s.Close()
}
