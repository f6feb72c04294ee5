package audit

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"

	"github.com/gobwas/glob"
)

// Input is what a decision was made on, kept beside its entry.
type Input struct {
	Decision string
	Kept     Keep
	JSON     []byte
}

// Keep says how much of a decision's input is kept.
type Keep string

// What can be kept.
const (
	KeepWhole    Keep = "whole"    // all of it: the decision can be replayed
	KeepRedacted Keep = "redacted" // its shape; a keyed digest in place of each hidden value
	KeepNone     Keep = "none"     // a keyed digest of the whole alone
)

// Keeper decides what is kept of whose input.
type Keeper struct {
	rules []keepRule
	key   []byte
}

type keepRule struct {
	action *glob.Pattern
	keep   Keep
}

// KeepRule names what is kept of the actions that match a pattern.
type KeepRule struct {
	Actions []string
	Keep    Keep
}

// NewKeeper makes a Keeper: the first rule that matches an action is in force, and
// without one all is kept. key makes the digests of hidden values, so that small
// ones can't be guessed.
func NewKeeper(key []byte, rules []KeepRule) (*Keeper, error) {
	k := &Keeper{key: key}
	for _, r := range rules {
		for _, pattern := range r.Actions {
			g, err := glob.Compile(pattern, '.')
			if err != nil {
				return nil, fmt.Errorf("action pattern %q: %w", pattern, err)
			}
			k.rules = append(k.rules, keepRule{g, r.Keep})
		}
	}
	return k, nil
}

// Of says what is kept of an action.
func (k *Keeper) Of(action string) Keep {
	for _, r := range k.rules {
		if r.action.Match(action) {
			return r.keep
		}
	}
	return KeepWhole
}

// Digest is a keyed digest of a value that is not shown.
func (k *Keeper) Digest(value []byte) string {
	m := hmac.New(sha256.New, k.key)
	m.Write(value)
	return "hmac-sha256:" + hex.EncodeToString(m.Sum(nil))
}

// Text shows a free text of an action, or its digest where not all may be kept.
func (k *Keeper) Text(action, text string) string {
	if text == "" || k.Of(action) == KeepWhole {
		return text
	}
	return k.Digest([]byte(text))
}

// Keep prepares a decision's input, before the decision has an id: what is stored
// beside the entry, ok false for nothing, and the digest of the whole for the entry
// itself.
func (k *Keeper) Keep(action string, input map[string]any) (in Input, digest string, ok bool, err error) {
	whole, err := json.Marshal(input)
	if err != nil {
		return in, "", false, fmt.Errorf("keep decision input: %w", err)
	}
	in = Input{Kept: k.Of(action), JSON: whole}
	if in.Kept == KeepRedacted {
		if in.JSON, err = json.Marshal(k.redact(input)); err != nil {
			return in, "", false, fmt.Errorf("keep decision input: %w", err)
		}
	}
	return in, k.Digest(whole), in.Kept != KeepNone, nil
}

// hidden are the parts of an input that say more than who, what and when.
var hidden = [][]string{
	{"user", "claims"}, {"agent", "claims"}, {"session", "task", "text"},
	{"intent", "parameters"}, {"intent", "purpose"}, {"resource", "properties"}, {"context"},
}

func (k *Keeper) redact(input map[string]any) map[string]any {
	out := input
	for _, path := range hidden {
		out = k.replace(out, path)
	}
	return out
}

// replace returns m with digests at the path, and m itself untouched.
func (k *Keeper) replace(m map[string]any, path []string) map[string]any {
	v, ok := m[path[0]]
	if !ok {
		return m
	}
	out := make(map[string]any, len(m))
	for name, v := range m {
		out[name] = v
	}
	if below, isMap := v.(map[string]any); isMap && len(path) > 1 {
		out[path[0]] = k.replace(below, path[1:])
	} else if len(path) == 1 {
		out[path[0]] = k.digests(v)
	}
	return out
}

// digests keeps names and shape, and hides every value.
func (k *Keeper) digests(v any) any {
	switch v := v.(type) {
	case map[string]any:
		out := make(map[string]any, len(v))
		for name, e := range v {
			out[name] = k.digests(e)
		}
		return out
	case []any:
		out := make([]any, len(v))
		for i, e := range v {
			out[i] = k.digests(e)
		}
		return out
	}
	text, err := json.Marshal(v)
	if err != nil {
		return "hidden"
	}
	return k.Digest(text)
}
