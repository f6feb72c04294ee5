package session

import "github.com/writsec/writ/internal/identity"

// State is whether a session lives.
type State string

// The states.
const (
	Active State = "active"
	Ended  State = "ended" // also where only its time is over
)

// Query selects sessions, newest first; the parts that are set must all match.
type Query struct {
	User, Agent identity.Ref
	State       State
	// Before is the id of a session; only older ones match.
	Before string
	Limit  int
}
