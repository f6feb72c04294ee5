package session

import (
	"cmp"
	"context"
	"encoding/json"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gobwas/glob"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/fault"
)

// Envelope is what the session declared it will need. Patterns are globs, in
// actions with "." as the separator, in ids with "/".
type Envelope struct {
	Actions   []string          `json:"actions"`
	Resources []ResourcePattern `json:"resources"`
	// Limits are the most that some of the session's counters may reach.
	Limits map[string]int64 `json:"limits,omitempty"`
	Source Source           `json:"source"`
}

// ResourcePattern matches resources of one type whose id matches a glob.
type ResourcePattern struct {
	Type string `json:"type"`
	ID   string `json:"id"`
}

// The limits of what can be declared.
const (
	maxPatterns = 64
	maxPattern  = 512 // bytes
	maxLimits   = 32
	maxLimit    = 1<<53 - 1 // what every reader of JSON reads exactly
)

var counterName = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_]{0,63}$`)

// Check holds the envelope to its limits.
func (e *Envelope) Check() error {
	if len(e.Actions) == 0 || len(e.Actions) > maxPatterns {
		return fault.Invalid("/envelope/actions", "expected 1 to %d patterns", maxPatterns)
	}
	if len(e.Resources) == 0 || len(e.Resources) > maxPatterns {
		return fault.Invalid("/envelope/resources", "expected 1 to %d patterns", maxPatterns)
	}
	bad := func(p string) bool { return p == "" || len(p) > maxPattern }
	for _, a := range e.Actions {
		if bad(a) {
			return fault.Invalid("/envelope/actions", "a pattern has 1 to %d bytes", maxPattern)
		}
	}
	for _, r := range e.Resources {
		if bad(r.Type) || bad(r.ID) {
			return fault.Invalid("/envelope/resources", "type and id have 1 to %d bytes", maxPattern)
		}
	}
	if len(e.Limits) > maxLimits {
		return fault.Invalid("/envelope/limits", "expected at most %d counters", maxLimits)
	}
	for name, most := range e.Limits {
		if !counterName.MatchString(name) {
			return fault.Invalid("/envelope/limits", "a counter's name has 1 to 64 letters, digits and _, a letter first")
		}
		if most < 0 || most > maxLimit {
			return fault.Invalid("/envelope/limits", "a limit is 0 to %d", int64(maxLimit))
		}
	}
	return nil
}

// Sorted returns the envelope in the one order in which it is compared, hashed and
// shown, each pattern once.
func (e Envelope) Sorted() Envelope {
	e.Actions = slices.Compact(slices.Sorted(slices.Values(e.Actions)))
	e.Resources = slices.Compact(slices.SortedFunc(slices.Values(e.Resources), func(a, b ResourcePattern) int {
		return cmp.Or(strings.Compare(a.Type, b.Type), strings.Compare(a.ID, b.ID))
	}))
	return e
}

// Document is the envelope as policy sees it, without its source.
func (e Envelope) Document() map[string]any {
	actions, resources := make([]any, len(e.Actions)), make([]any, len(e.Resources))
	for i, a := range e.Actions {
		actions[i] = a
	}
	for i, r := range e.Resources {
		resources[i] = map[string]any{"type": r.Type, "id": r.ID}
	}
	doc := map[string]any{"actions": actions, "resources": resources}
	if len(e.Limits) > 0 {
		limits := make(map[string]any, len(e.Limits))
		for name, most := range e.Limits {
			limits[name] = json.Number(strconv.FormatInt(most, 10))
		}
		doc["limits"] = limits
	}
	return doc
}

// Narrows reports whether nothing is inside next that is not inside e, as far as that
// is plain to see: a pattern of next is one of e's, letter for letter, or names one
// thing that is inside a pattern of e's. nil is no constraint, so that everything
// narrows it.
func (e *Envelope) Narrows(next Envelope) bool {
	if e == nil {
		return true
	}
	for _, a := range next.Actions {
		if !slices.ContainsFunc(e.Actions, func(old string) bool { return inside(old, a, '.') }) {
			return false
		}
	}
	for _, r := range next.Resources {
		if !slices.ContainsFunc(e.Resources, func(old ResourcePattern) bool { return old.Type == r.Type && inside(old.ID, r.ID, '/') }) {
			return false
		}
	}
	for name, most := range e.Limits {
		if now, ok := next.Limits[name]; !ok || now > most {
			return false
		}
	}
	return true
}

// special are the characters of glob syntax other than the two wildcards. Policy
// takes a pattern that has any for no pattern (policies/writ/bounds.rego).
const special = `[]{}?!\`

func inside(old, pattern string, separator rune) bool {
	if old == pattern {
		return true
	}
	if strings.ContainsAny(pattern, "*"+special) || strings.ContainsAny(old, special) {
		return false
	}
	g, err := glob.Compile(old, separator)
	return err == nil && g.Match(pattern)
}

// Narrow sets a session's envelope to one that narrows it. Whose word it is stays as
// it was: the agent's, if it is the first.
func Narrow(ctx context.Context, tx Tx, s Session, next Envelope, idle time.Duration) error {
	if !s.Alive(tx.Now()) {
		return ErrChanged
	}
	next.Source = SourceAgent
	if s.Envelope != nil {
		next.Source = s.Envelope.Source
		if same(*s.Envelope, next) {
			return nil
		}
	}
	s, _ = s.used(tx.Now(), idle, 0)
	s.Envelope = &next
	if err := tx.UpdateSession(ctx, s, true); err != nil {
		return err
	}
	return recordEnvelope(ctx, tx, s, "narrowed", "")
}

func same(a, b Envelope) bool {
	a, b = a.Sorted(), b.Sorted()
	return slices.Equal(a.Actions, b.Actions) && slices.Equal(a.Resources, b.Resources) && maps.Equal(a.Limits, b.Limits) && a.Source == b.Source
}

func recordEnvelope(ctx context.Context, tx Tx, s Session, change, decision string) error {
	return audit.Append(ctx, tx, audit.Entry{
		Kind: audit.SessionEnvelope, Session: s.ID, Decision: decision, User: s.User.Ref, Agent: s.Agent,
		Detail: map[string]any{"change": change, "envelope": s.Envelope},
	})
}
