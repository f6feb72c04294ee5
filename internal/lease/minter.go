package lease

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/writsec/writ/internal/dpop"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/intent"
)

// Grant is what a minter agreed to make.
type Grant struct {
	Minter       string         `json:"minter"`
	Kind         string         `json:"kind"`
	Scope        map[string]any `json:"scope"`
	TTL          time.Duration  `json:"-"`
	Revocability string         `json:"revocability"`
	Precision    string         `json:"precision"`
	// Cnf is the key that the caller proved to hold; the credential is bound to it where
	// its kind can be (RFC 7800). nil for none.
	Cnf *dpop.Confirmation `json:"cnf,omitempty"`
	// Binds says that the credential can be bound to the caller's key.
	Binds bool `json:"binds,omitempty"`
	// Outside says that the credential exists at a target, and ends only when it was seen
	// to have ended there. Otherwise Writ signs it by itself.
	Outside bool `json:"outside,omitempty"`
	// Renewable says that Mint can be asked again for a lease that is active, to make its
	// credential good for longer. Unmaking it needs nothing new then.
	Renewable bool `json:"renewable,omitempty"`
}

// Revocability says when a revoked credential stops working.
const (
	RevocableInstant    = "instant"    // at once, for everyone
	RevocableIntrospect = "introspect" // at once for those who introspect, else at expiry
	RevocableStatus     = "status"     // within seconds for those who read the status list as told, else at expiry
	RevocableExpiry     = "expiry"     // at expiry
)

// Precision says how closely a credential fits the act.
const (
	PrecisionExact  = "exact"  // this act only
	PrecisionCoarse = "coarse" // a group of acts that includes it
)

// Want is what policy asked a minter for.
type Want struct {
	Scope        map[string]any
	TTL          time.Duration
	Revocability string // the least; "" any
	Precision    string // the least; "" any
	// SubjectToken says that the request brings its user's token.
	SubjectToken bool
	// User is whom it is for; zero where the caller does not say.
	User identity.Ref
}

// Refusal is why a minter will not make what policy wants: the reason of a deny.
type Refusal struct{ Code, Message string }

// Minter makes one kind of credential for one target.
type Minter interface {
	// Plan narrows what policy wants to what the configuration grants, or refuses. It
	// touches nothing.
	Plan(w Want) (Grant, *Refusal)
	// Mint makes the credential of a lease that is committed. It may have been made even
	// if an error is returned. ErrDeclined says that the target is well.
	Mint(ctx context.Context, o Order) (Made, error)
}

// ErrDeclined is of a target that is well and makes no such credential, so that others
// may go on asking it.
var ErrDeclined = errors.New("declined")

// Order is what a minter is to make.
type Order struct {
	Lease Lease
	Act   intent.Act
	// SubjectToken is the user's token, "" where the request brings none. It is not to be
	// kept, logged, or sent anywhere but to its issuer.
	SubjectToken string
}

// Made is a credential.
type Made struct {
	Secret Secret
	// Recall is what unmaking it needs beyond the lease, such as a token that is revoked
	// by showing it. The store keeps it encrypted until the end. "" for none.
	Recall string
}

// Target is a Minter whose credentials exist outside of Writ.
type Target interface {
	Minter
	// Unmake ends the credentials of leases, whatever they are used for at the moment, so
	// that a Mint of theirs that is still under way fails; and it looks whether they have
	// ended. The answer has one part for each lease, in their order. It may be asked
	// again for what has ended, or was never made. An error means that the target could
	// not be used, and that nothing is known of any of them.
	Unmake(ctx context.Context, leases []Lease) ([]Unmade, error)
}

// Unmade is what became of one credential at its target.
type Unmade struct {
	// Err is why its end was not seen; nil: it was.
	Err error
	// Seen is what there was to see, for the record: sessions that were terminated, the
	// name at the target. No secrets.
	Seen map[string]any
}

// Surveyor is a Target that can tell what exists there.
type Surveyor interface {
	Target
	// Survey lists what exists at the target under the names that Writ gives.
	Survey(ctx context.Context) ([]Sighting, error)
	// Disarm makes credentials that no lease knows unusable, and leaves the rest to
	// people: what exists under such a name need not be Writ's.
	Disarm(ctx context.Context, names []string) error
}

// Sighting is one credential as its target sees it.
type Sighting struct {
	Name string // at the target
	// Lease is the id of the lease that it is named after, whether there is one or not.
	Lease string
	// Armed says that it can be used to log in.
	Armed bool
	// Uses are the connections that are open with it.
	Uses []Connection
}

// Connection is one open connection at a target.
type Connection struct {
	ID    string // unique at the target for as long as leases live
	Since time.Time
	From  string // address, "" unknown
}

// Secret is what the agent uses. It is never stored or logged.
type Secret map[string]string

// Format keeps a secret out of anything that package fmt writes, whatever the verb.
func (Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[secret]") }

// LogValue keeps a secret out of logs, in whose JSON it would be a plain map.
func (Secret) LogValue() slog.Value { return slog.StringValue("[secret]") }

// MeetsLeast reports whether what a credential offers is at least what policy
// demands.
func MeetsLeast(offers, least string) bool {
	order := map[string]int{
		"": 0, RevocableExpiry: 1, RevocableStatus: 2, RevocableIntrospect: 3, RevocableInstant: 4,
		PrecisionCoarse: 1, PrecisionExact: 2,
	}
	return order[offers] >= order[least]
}
