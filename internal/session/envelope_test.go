package session_test

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/glob"
	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/session"
	"github.com/writsec/writ/internal/sqlstore"
)

func envelope(actions, ids []string) session.Envelope {
	e := session.Envelope{Actions: actions}
	for _, id := range ids {
		e.Resources = append(e.Resources, session.ResourcePattern{Type: "doc", ID: id})
	}
	return e
}

func TestNarrows(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name     string
		old, new string // an action and an id
		want     bool
	}{
		{"the same", "crm.*|team/*", "crm.*|team/*", true},
		{"one thing inside", "crm.*|team/*", "crm.read|team/1", true},
		{"one thing inside two stars", "crm.**|**", "crm.a.b|team/1/2", true},
		{"a star stops at a dot", "crm.*|**", "crm.a.b|x", false},
		{"a star stops at a slash", "crm.*|team/*", "crm.a|team/1/2", false},
		{"another thing", "crm.read|team/1", "crm.write|team/1", false},
		{"another id", "crm.read|team/1", "crm.read|team/2", false},
		{"a narrower pattern is not plain to see", "crm.**|**", "crm.*|**", false},
		{"a pattern that says the same otherwise", "crm.**|**", "crm.***|**", false},
		{"a wider pattern", "crm.*|**", "crm.**|**", false},
		{"everything", "crm.read|1", "**|**", false},
		{"a star in the new one is no letter", "crm.*|*", "crm.*a|*", false},
		{"a question mark", "crm.*|*", "crm.rea?|*", false},
		{"alternatives", "crm.*|*", "{crm.read,hr.x}|*", false},
		{"a class", "crm.*|*", "crm.[a-z]|*", false},
		{"an escape", "crm.*|*", `crm.\*|*`, false},
		{"a negation", "crm.*|*", "crm.!x|*", false},
		{"the old one has alternatives, which are none to policy", "{crm,hr}.read|*", "hr.read|*", false},
		{"the same, of which policy takes no notice", "{crm,hr}.read|*", "{crm,hr}.read|*", true},
		{"a look-alike", "crm.read|*", "сrm.read|*", false},
		{"an accent written otherwise", "caf\u00e9|*", "cafe\u0301|*", false},
		{"another case", "crm.read|*", "CRM.read|*", false},
		{"a space after it", "crm.read|*", "crm.read |*", false},
		{"nothing visible in it", "crm.*|*", "crm.re\u200bad|*", true}, // one thing, inside the old pattern
		{"an empty part", "crm.*|*", "crm.|*", true},
		{"a prefix", "crm.read|*", "crm.rea|*", false},
	} {
		old, id, _ := strings.Cut(tt.old, "|")
		action, newID, _ := strings.Cut(tt.new, "|")
		e := envelope([]string{old}, []string{id})
		if got := e.Narrows(envelope([]string{action}, []string{newID})); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
	e := envelope([]string{"a", "b.*"}, []string{"1", "2/*"})
	for name, tt := range map[string]struct {
		next session.Envelope
		want bool
	}{
		"another order":         {envelope([]string{"b.*", "a"}, []string{"2/*", "1"}), true},
		"fewer":                 {envelope([]string{"a"}, []string{"2/x"}), true},
		"twice the same":        {envelope([]string{"a", "a"}, []string{"1"}), true},
		"one of two outside":    {envelope([]string{"a", "c"}, []string{"1"}), false},
		"an id as an action":    {envelope([]string{"1"}, []string{"1"}), false},
		"another type":          {session.Envelope{Actions: []string{"a"}, Resources: []session.ResourcePattern{{Type: "Doc", ID: "1"}}}, false},
		"a type that is a glob": {session.Envelope{Actions: []string{"a"}, Resources: []session.ResourcePattern{{Type: "*", ID: "1"}}}, false},
	} {
		if got := e.Narrows(tt.next); got != tt.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	e.Limits = map[string]int64{"n": 5}
	for name, tt := range map[string]struct {
		limits map[string]int64
		want   bool
	}{
		"the same": {map[string]int64{"n": 5}, true}, "lower": {map[string]int64{"n": 0}, true}, "one more": {map[string]int64{"n": 5, "m": 1}, true},
		"higher": {map[string]int64{"n": 6}, false}, "gone": {nil, false}, "another in its place": {map[string]int64{"N": 5}, false},
	} {
		next := envelope([]string{"a"}, []string{"1"})
		next.Limits = tt.limits
		if got := e.Narrows(next); got != tt.want {
			t.Errorf("limits, %s: %v", name, got)
		}
	}
	if !(*session.Envelope)(nil).Narrows(e) {
		t.Error("the first envelope does not narrow")
	}
}

// Whatever is said to narrow lets nothing pass that did not pass before.
func TestNarrowsNeverWidens(t *testing.T) {
	t.Parallel()
	part := rapid.SampledFrom([]string{"a", "b", "*", "**", ".", "?", "{a,b}", "[ab]", `\`, "!"})
	pattern := rapid.Custom(func(t *rapid.T) string {
		return strings.Join(rapid.SliceOfN(part, 1, 4).Draw(t, "parts"), "")
	})
	passes := func(e session.Envelope, action string) bool {
		return slices.ContainsFunc(e.Actions, func(p string) bool {
			if strings.ContainsAny(p, `[]{}?!\`) { // as policies/writ/bounds.rego has it
				return false
			}
			g, err := glob.Compile(p, '.')
			return err == nil && g.Match(action)
		})
	}
	rapid.Check(t, func(t *rapid.T) {
		old := envelope(rapid.SliceOfN(pattern, 1, 3).Draw(t, "old"), []string{"*"})
		next := envelope(rapid.SliceOfN(pattern, 1, 3).Draw(t, "next"), []string{"*"})
		action := strings.Join(rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b", "."}), 0, 5).Draw(t, "action"), "")
		if old.Narrows(next) && passes(next, action) && !passes(old, action) {
			t.Fatalf("%q passes %q, not %q", action, next.Actions, old.Actions)
		}
	})
}

func TestSorted(t *testing.T) {
	t.Parallel()
	one := envelope([]string{"b", "a", "b"}, []string{"2", "1", "2"})
	two := envelope([]string{"a", "b"}, []string{"1", "2"})
	if d := cmp.Diff(two.Document(), one.Sorted().Document()); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff([]string{"b", "a", "b"}, one.Actions); d != "" {
		t.Errorf("the original was changed: %s", d)
	}
	two.Limits = map[string]int64{"n": 1<<53 - 1}
	if got := two.Document()["limits"]; !cmp.Equal(got, map[string]any{"n": json.Number("9007199254740991")}) {
		t.Errorf("limits %v", got)
	}
}

func TestEnvelopeLimits(t *testing.T) {
	t.Parallel()
	good := envelope([]string{"a"}, []string{"1"})
	good.Limits = map[string]int64{"paid_EUR": 1<<53 - 1, "n": 0}
	if err := good.Check(); err != nil {
		t.Error(err)
	}
	many := map[string]int64{}
	for i := range 33 {
		many["n"+strings.Repeat("x", i)] = 1
	}
	for name, limits := range map[string]map[string]int64{
		"negative": {"n": -1}, "not exact": {"n": 1 << 53}, "no name": {"": 1}, "a space": {"a b": 1}, "a digit first": {"1a": 1},
		"a letter that is none": {"paid_\u200b": 1}, "too long": {strings.Repeat("n", 65): 1}, "too many": many,
	} {
		bad := good
		bad.Limits = limits
		f, ok := errors.AsType[*fault.Error](bad.Check())
		if !ok || f.Fields[0].Pointer != "/envelope/limits" {
			t.Errorf("%s: %v", name, f)
		}
	}
}

func TestNarrow(t *testing.T) {
	w := newWorld(t)
	s := w.open(session.Spec{})
	narrow := func(next session.Envelope) error {
		return w.Update(t.Context(), func(tx *sqlstore.Tx) error { return session.Narrow(t.Context(), tx, s, next, time.Hour) })
	}
	first := envelope([]string{"a.*"}, []string{"*"})
	first.Source = "user" // says the agent
	if err := narrow(first); err != nil {
		t.Fatal(err)
	}
	if err := narrow(first); !errors.Is(err, session.ErrChanged) {
		t.Errorf("from the version before: %v", err)
	}
	s = w.get(s.ID)
	if s.Version != 2 || s.Envelope.Source != session.SourceAgent {
		t.Errorf("%+v", s.Envelope)
	}
	if err := narrow(*s.Envelope); err != nil || w.get(s.ID).Version != 2 {
		t.Errorf("the same again: %v, version %d", err, w.get(s.ID).Version)
	}
	// Whose word it is stays.
	s.Envelope.Source = session.SourceUser
	second := envelope([]string{"a.b"}, []string{"*"})
	if err := narrow(second); err != nil {
		t.Fatal(err)
	}
	s = w.get(s.ID)
	if s.Envelope.Source != session.SourceUser || s.Envelope.Actions[0] != "a.b" {
		t.Errorf("%+v", s.Envelope)
	}
	w.now = s.EndsAt
	if err := narrow(envelope([]string{"a.b"}, []string{"1"})); !errors.Is(err, session.ErrChanged) {
		t.Errorf("after its end: %v", err)
	}
	var changes []any
	err := w.View(t.Context(), func(tx *sqlstore.Tx) error {
		es, err := tx.Unsequenced(t.Context(), 10)
		for _, e := range es {
			if e.Kind == audit.SessionEnvelope {
				changes = append(changes, e.Detail["change"])
			}
		}
		return err
	})
	if d := cmp.Diff([]any{"narrowed", "narrowed"}, changes); d != "" || err != nil {
		t.Errorf("%v %s", err, d)
	}
}
