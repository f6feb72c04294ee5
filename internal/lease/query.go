package lease

import "github.com/writsec/writ/internal/identity"

// Query picks leases, newest first.
type Query struct {
	Session, Decision, Minter, Revocation string
	User, Agent                           identity.Ref
	State                                 State
	Stuck                                 bool // whose end should have been seen by now
	Before                                string
	Limit                                 int
}
