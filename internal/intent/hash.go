package intent

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/writsec/writ/internal/identity"
)

// Act is everything that makes one act this act and no other.
type Act struct {
	User     identity.Ref
	Agent    identity.Ref
	Session  string
	Intent   Intent
	Resource Resource
	Context  map[string]any
}

// Hash is "sha256:" and the hexadecimal SHA-256 of the RFC 8785 form of the act.
// Members that are absent count as empty objects, so that leaving one out and
// sending {} is the same act. Purpose is left out: rewording it changes nothing.
func (a Act) Hash() (string, error) {
	members := map[string]any{
		"v":          json.Number("1"),
		"user":       ref(a.User),
		"agent":      ref(a.Agent),
		"session":    a.Session,
		"action":     a.Intent.Action,
		"parameters": orEmpty(a.Intent.Parameters),
		"resource": map[string]any{
			"type": a.Resource.Type, "id": a.Resource.ID, "properties": orEmpty(a.Resource.Properties),
		},
		"context": orEmpty(a.Context),
	}
	if err := exact(members); err != nil {
		return "", fmt.Errorf("hash intent: %w", err)
	}
	data, err := json.Marshal(members)
	if err != nil {
		return "", fmt.Errorf("hash intent: %w", err)
	}
	canonical := jsontext.Value(data)
	if err := canonical.Canonicalize(); err != nil {
		return "", fmt.Errorf("hash intent: %w", err)
	}
	sum := sha256.Sum256(canonical)
	return "sha256:" + hex.EncodeToString(sum[:]), nil
}

func orEmpty(m map[string]any) map[string]any {
	if m == nil {
		return map[string]any{}
	}
	return m
}

func ref(r identity.Ref) map[string]any { return map[string]any{"iss": r.Issuer, "sub": r.ID} }

// exact refuses what the encoders below would change without a word, so that two
// acts never share a hash: text that is not UTF-8 and numbers that are not in
// canonical form already. Requests have been held to that by strictjson.
func exact(v any) error {
	switch v := v.(type) {
	case nil, bool:
		return nil
	case string:
		if !utf8.ValidString(v) {
			return errors.New("a string is not UTF-8")
		}
		return nil
	case json.Number:
		n := jsontext.Value(v)
		if err := n.Canonicalize(); err != nil || string(n) != string(v) {
			return errors.New("a number is not in canonical form")
		}
		return nil
	case []any:
		for _, e := range v {
			if err := exact(e); err != nil {
				return err
			}
		}
		return nil
	case map[string]any:
		for name, e := range v {
			if err := exact(name); err != nil {
				return err
			}
			if err := exact(e); err != nil {
				return err
			}
		}
		return nil
	}
	return fmt.Errorf("a value is a %T, which JSON does not have", v)
}
