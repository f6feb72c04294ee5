package intent

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"

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
	data, err := json.Marshal(map[string]any{
		"v":          1,
		"user":       a.User,
		"agent":      a.Agent,
		"session":    a.Session,
		"action":     a.Intent.Action,
		"parameters": orEmpty(a.Intent.Parameters),
		"resource": map[string]any{
			"type": a.Resource.Type, "id": a.Resource.ID, "properties": orEmpty(a.Resource.Properties),
		},
		"context": orEmpty(a.Context),
	})
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
