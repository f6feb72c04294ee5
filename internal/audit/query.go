package audit

import "github.com/writsec/writ/internal/identity"

// Query selects entries of the log; the parts that are set must all match.
type Query struct {
	From, To    int64 // indexes, To exclusive; zero To: to the end
	Limit       int
	Kind        Kind
	Session     string
	Decision    string
	User, Agent identity.Ref
}
