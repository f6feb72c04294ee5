// Package lease is the life of one minted credential: from the commit that
// records it, before its secret exists, to its end.
package lease

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/intent"
)

// State is where a lease stands. A credential that Writ signs by itself has
// nothing outside to make or unmake: it is recorded as Active before it is signed,
// and Revoked as soon as introspection refuses it, which is the same commit.
type State string

// The states.
const (
	Active  State = "active"
	Revoked State = "revoked"
)

// Lease is one credential.
type Lease struct {
	ID         string
	State      State
	Session    string
	Decision   string
	User       identity.Ref
	Agent      identity.Ref
	IntentHash string
	Grant
	CreatedAt time.Time
	// MintDeadline is until when it may be made at a target; the target refuses it later.
	MintDeadline time.Time
	ExpiresAt    time.Time
	EndedAt      time.Time // zero while active
	// Recall is what unmaking it needs beyond the rest; only those who unmake see it.
	Recall    string
	EndReason string // released, expired, session_ended, operator, restored, or one of the two below
}

// Ends after which the act was not begun with this credential.
const (
	EndReissued   = "reissued"    // a retry got another
	EndMintFailed = "mint_failed" // it never was
)

// Alive reports whether the credential is good at now.
func (l Lease) Alive(now time.Time) bool { return l.State == Active && now.Before(l.ExpiresAt) }

// ErrStale says that a lease ended since it was read.
var ErrStale = errors.New("lease changed since it was read")

// Tx is what leases need of a transaction.
type Tx interface {
	audit.Tx
	Now() time.Time
	InsertLease(ctx context.Context, l Lease) error
	// Lease returns fault.NotFound for an unknown id.
	Lease(ctx context.Context, id string) (Lease, error)
	// EndLease marks an active lease revoked at the transaction's time; otherwise
	// ErrStale.
	EndLease(ctx context.Context, id, reason string) error
	// LoseOutcome marks the outcome of a decision unknown, and says whether nobody had
	// reported one.
	LoseOutcome(ctx context.Context, decision string) (bool, error)
	// ActiveLeases lists active leases of the selection, oldest first.
	ActiveLeases(ctx context.Context, s Selection, limit int) ([]Lease, error)
}

// Selection picks leases; the zero value picks none. Exactly one part is set.
type Selection struct {
	Decision string
	Session  string
	User     identity.Ref
	Agent    identity.Ref
	Due      bool // expired, but still marked active
	All      bool
}

// New makes the lease of a grant, that ends with its time or its session.
func New(g Grant, session string, sessionEnd time.Time, decision string, act intent.Act, hash string, now time.Time) Lease {
	expires := now.Add(g.TTL)
	if sessionEnd.Before(expires) {
		expires = sessionEnd
	}
	// Tokens count in whole seconds; a lease must not claim to end later than they do.
	expires = expires.Truncate(time.Second)
	return Lease{
		ID: id.New(id.Lease), State: Active, Session: session, Decision: decision, User: act.User, Agent: act.Agent,
		IntentHash: hash, Grant: g, CreatedAt: now, ExpiresAt: expires,
	}
}

// Begin records a lease. Only after the commit may its secret be minted.
func Begin(ctx context.Context, tx Tx, l Lease) error {
	if err := tx.InsertLease(ctx, l); err != nil {
		return err
	}
	return audit.Append(ctx, tx, audit.Entry{
		Kind: audit.LeaseActive, Session: l.Session, Decision: l.Decision, Lease: l.ID, User: l.User, Agent: l.Agent,
		Detail: map[string]any{
			"minter": l.Minter, "kind": l.Kind, "scope": l.Scope, "expires_at": l.ExpiresAt,
			"revocability": l.Revocability, "precision": l.Precision, "intent_hash": l.IntentHash,
		},
	})
}

// End revokes one lease. Ending one that has ended changes nothing. An act whose
// outcome nobody reported by then is recorded as unknown.
func End(ctx context.Context, tx Tx, l Lease, reason string, operator identity.Ref) error {
	switch err := tx.EndLease(ctx, l.ID, reason); {
	case errors.Is(err, ErrStale):
		return nil
	case err != nil:
		return err
	}
	e := audit.Entry{
		Kind: audit.LeaseRevoked, Session: l.Session, Decision: l.Decision, Lease: l.ID,
		User: l.User, Agent: l.Agent, Operator: operator, Detail: map[string]any{"reason": reason},
	}
	if err := audit.Append(ctx, tx, e); err != nil || reason == EndReissued || reason == EndMintFailed {
		return err
	}
	lost, err := tx.LoseOutcome(ctx, l.Decision)
	if err != nil || !lost {
		return err
	}
	e.Kind, e.Operator, e.Detail = audit.DecisionOutcome, identity.Ref{}, map[string]any{"outcome": "unknown", "by": "writ"}
	return audit.Append(ctx, tx, e)
}

// Ended counts the leases that were ended, by kind.
type Ended map[string]int

// Total is their number.
func (e Ended) Total() int {
	n := 0
	for _, k := range e {
		n += k
	}
	return n
}

// EndAll revokes all active leases of a selection.
func EndAll(ctx context.Context, tx Tx, s Selection, reason string, operator identity.Ref) (Ended, error) {
	const batch = 1000
	ended := Ended{}
	for {
		ls, err := tx.ActiveLeases(ctx, s, batch)
		if err != nil {
			return nil, err
		}
		for _, l := range ls {
			if err := End(ctx, tx, l, reason, operator); err != nil {
				return nil, fmt.Errorf("end lease %s: %w", l.ID, err)
			}
			ended[l.Kind]++
		}
		if len(ls) < batch {
			return ended, nil
		}
	}
}

// Find returns a lease of the agent's; one that isn't is as good as none:
// fault.NotFound.
func Find(ctx context.Context, tx Tx, leaseID string, c identity.Caller) (Lease, error) {
	if !id.Valid(id.Lease, leaseID) {
		return Lease{}, notFound()
	}
	l, err := tx.Lease(ctx, leaseID)
	if fault.Is(err, fault.NotFound) || err == nil && (l.Agent != c.Agent.Ref || (c.User != nil && l.User != c.User.Ref)) {
		return Lease{}, notFound()
	}
	return l, err
}

func notFound() error { return fault.New(fault.NotFound, "no such lease of this agent and user") }
