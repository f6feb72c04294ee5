package session_test

import (
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/session"
	"github.com/writsec/writ/internal/sqlstore"
)

// The idle end moves with use, by an eighth at the least, without a new version.
func TestIdleEnd(t *testing.T) {
	w := newWorld(t)
	idle := limits
	idle.Idle = 8 * time.Minute
	w.manager.Settings = idle
	s := w.open(session.Spec{})
	if !s.IdleAt.Equal(noon.Add(8 * time.Minute)) {
		t.Errorf("idle at %v", s.IdleAt)
	}
	use := func(settings session.Settings, busy time.Duration) error {
		return w.Update(t.Context(), func(tx *sqlstore.Tx) error {
			return session.Settle(t.Context(), tx, s, settings, session.Settlement{Busy: busy})
		})
	}
	for _, step := range []struct {
		at, busy, want time.Duration // since noon
		idle           time.Duration
	}{
		{at: 59 * time.Second, idle: 8 * time.Minute, want: 8 * time.Minute},
		{at: 60 * time.Second, idle: 8 * time.Minute, want: 8 * time.Minute},
		{at: 61 * time.Second, idle: 8 * time.Minute, want: 9*time.Minute + time.Second},
		{at: 2 * time.Minute, busy: 10 * time.Minute, idle: 8 * time.Minute, want: 20 * time.Minute},
		{at: 3 * time.Minute, idle: 8 * time.Minute, want: 20 * time.Minute}, // never back
		{at: 19 * time.Minute, idle: 0, want: -1},                            // configured away
		{at: 50 * time.Minute, idle: 8 * time.Minute, want: 58 * time.Minute},
	} {
		w.now = noon.Add(step.at)
		idle.Idle = step.idle
		if err := use(idle, step.busy); err != nil {
			t.Fatalf("at %v: %v", step.at, err)
		}
		s = w.get(s.ID)
		want := noon.Add(step.want)
		if step.want < 0 {
			want = time.Time{}
		}
		if !s.IdleAt.Equal(want) || s.Version != 1 {
			t.Errorf("at %v: idle at %v, version %d; want %v", step.at, s.IdleAt, s.Version, want)
		}
	}
	w.now = s.IdleAt
	if _, alive, err := w.manager.Get(t.Context(), identity.Caller{Agent: agent}, s.ID); alive || err != nil {
		t.Errorf("alive at its idle end: %v", err)
	}
	if err := use(idle, 0); !errors.Is(err, session.ErrChanged) {
		t.Errorf("used after its idle end: %v", err)
	}
}

// Marks are on the pair, for the window, and a decision made before they were left is
// made again, in whichever session of the pair.
func TestMarksOfThePair(t *testing.T) {
	w := newWorld(t)
	one, two := w.open(session.Spec{}), w.open(session.Spec{})
	recent := func() session.Recent {
		var r session.Recent
		err := w.View(t.Context(), func(tx *sqlstore.Tx) error {
			s, err := tx.Session(t.Context(), two.ID)
			if err != nil {
				return err
			}
			r, err = session.ReadRecent(t.Context(), tx, s)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	want := func(labels []string, counters map[string]int64) {
		t.Helper()
		if d := cmp.Diff(session.Marks{Labels: labels, Counters: counters}, recent().Marks); d != "" {
			t.Errorf("(-want +got):\n%s", d)
		}
	}
	want(nil, map[string]int64{})
	if err := w.settle(one, []string{"x"}, map[string]int64{"paid": 5, "none": 0}); err != nil {
		t.Fatal(err)
	}
	want([]string{"x"}, map[string]int64{"paid": 5})
	for name, marks := range map[string][]string{"leaves a mark": {"y"}, "leaves none": nil} {
		if err := w.settle(two, marks, nil); !errors.Is(err, session.ErrChanged) {
			t.Errorf("what %s on what it saw before: %v", name, err)
		}
	}
	two = w.get(two.ID)
	if len(two.Labels) != 0 || two.Version != 1 {
		t.Errorf("half of it stayed: %+v", two)
	}
	if err := w.settle(two, nil, nil); err != nil {
		t.Errorf("on what is true now: %v", err)
	}
	version := two.ScopeVersion
	if err := w.settle(two, []string{"x"}, nil); err != nil { // new to the session, not to the pair
		t.Fatal(err)
	}
	if got := w.get(one.ID).ScopeVersion; got <= version {
		t.Errorf("version %d after %d", got, version)
	}
	w.now = noon.Add(12 * time.Hour)
	three := w.open(session.Spec{})
	three = w.get(three.ID)
	if err := w.settle(three, []string{"x"}, map[string]int64{"paid": 7}); err != nil {
		t.Fatal(err)
	}
	want([]string{"x"}, map[string]int64{"paid": 12})
	w.now = noon.Add(24*time.Hour - time.Microsecond)
	want([]string{"x"}, map[string]int64{"paid": 12})
	w.now = noon.Add(24*time.Hour + 24*time.Hour/64)
	want([]string{"x"}, map[string]int64{"paid": 7}) // the label was left again since
	w.now = noon.Add(36*time.Hour + 24*time.Hour/64)
	want(nil, map[string]int64{})
}

func TestScopeOf(t *testing.T) {
	t.Parallel()
	ref := func(issuer, id string) identity.Ref { return identity.Ref{Issuer: issuer, ID: id} }
	seen := map[string]int{}
	for i, pair := range [][2]identity.Ref{
		{ref("i", "a"), ref("i", "b")}, {ref("i", "b"), ref("i", "a")}, {ref("ia", ""), ref("i", "b")}, {ref("", "ia"), ref("i", "b")},
		{ref("i", `a","i`), ref("", "b")}, {ref("i", "a"), ref("j", "b")}, {ref("i", "ab"), ref("i", "")}, {ref("i", "A"), ref("i", "b")},
	} {
		scope := session.ScopeOf(pair[0], pair[1])
		if other, ok := seen[scope]; ok {
			t.Errorf("pairs %d and %d share a scope", other, i)
		}
		seen[scope] = i
	}
}
