package decision

import (
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/policy"
)

// Query selects decisions, newest first; the parts that are set must all match.
type Query struct {
	Session     string
	User, Agent identity.Ref
	Effect      policy.Effect
	// Before is the id of a decision; only older ones match.
	Before string
	Limit  int
}
