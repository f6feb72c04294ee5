// Package lease is the life of one minted credential: from the commit that
// records it, before its secret exists, to the end that was seen at its target.
//
// A lease is recorded, then made, then active, and only then does its secret leave.
// So whatever is killed in the middle leaves a row that says what may exist, and
// ending it is the work of any replica (Worker) until its end was seen.
package lease

import (
	"context"
	"errors"
	"time"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/intent"
)

// State is where a lease stands.
type State string

// The states. What Writ signs by itself has nothing outside to make: it is recorded as
// Active before it is signed.
const (
	Intent   State = "intent"   // it is being made at its target, and nobody has its secret
	Active   State = "active"   // its secret is out
	Revoking State = "revoking" // it has ended, but was not seen to be gone yet
	Revoked  State = "revoked"  // and is gone
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
	Policy     string // the revision that allowed it
	Grant
	CreatedAt time.Time
	// MintDeadline is until when it may be made at a target; the target refuses it later.
	MintDeadline time.Time
	ExpiresAt    time.Time
	EndedAt      time.Time // zero until it ends
	GoneAt       time.Time // zero until its end was seen
	EndReason    string    // one of the ends below; "" until it ends
	// Revocation is the operator's revocation that ended it, "" for none.
	Revocation string
	// DueAt is when it is to be unmade, Attempts counts how often that failed, and
	// LastError says why it last did.
	DueAt     time.Time
	Attempts  int
	LastError string
	// Halted says that an operator's revocation has it in its scope, which ends it: from
	// that revocation's commit on it is good for nothing.
	Halted bool
	// Recall is what unmaking it needs beyond the rest; only those who unmake see it.
	Recall string
}

// Why leases end.
const (
	EndReleased = "released"
	EndExpired  = "expired"
	EndSession  = "session_ended"
	EndOperator = "operator"
	EndService  = "revoked_by_service" // a resource server showed its token (RFC 7009)
	EndRestored = "restored"
	// After these the act was not begun with this credential.
	EndReissued   = "reissued"    // a retry got another
	EndMintFailed = "mint_failed" // it never was, or its secret never left
)

// Alive reports whether the credential is good at now.
func (l Lease) Alive(now time.Time) bool {
	return l.State == Active && !l.Halted && now.Before(l.ExpiresAt)
}

// StuckAfter is how long an end may take until it is an alarm.
const StuckAfter = 30 * time.Second

// StuckSince is since when the end at the target should have been seen; zero while
// there is no reason for alarm.
func (l Lease) StuckSince(now time.Time) time.Time {
	due := l.EndedAt
	if l.Revocability == RevocableExpiry && l.ExpiresAt.After(due) {
		due = l.ExpiresAt
	}
	since := due.Add(StuckAfter)
	if l.State != Revoking || now.Before(since) {
		return time.Time{}
	}
	return since
}

// Ending is how the end of a credential is seen.
type Ending string

// The ways.
const (
	ByWord   Ending = "word"   // Writ's word is enough: whoever uses it asks
	ByExpiry Ending = "expiry" // nobody asks: it is gone when its time is over
	AtTarget Ending = "target" // the target says so
	// AtTargetThenExpiry: the target is told, for what that is worth, and it is gone when
	// its time is over.
	AtTargetThenExpiry Ending = "target_then_expiry"
)

// Ending is how the end of the credential is seen.
func (g Grant) Ending() Ending {
	switch {
	case g.Outside && g.Revocability == RevocableExpiry:
		return AtTargetThenExpiry
	case g.Outside:
		return AtTarget
	case g.Revocability == RevocableExpiry:
		return ByExpiry
	}
	return ByWord
}

// ErrStale says that a lease ended since it was read.
var ErrStale = errors.New("lease changed since it was read")

// Tx is what leases need of a transaction.
type Tx interface {
	audit.Tx
	Now() time.Time
	// Guard keeps operators from revoking anything until the commit. What is read after
	// it is so until then. It comes before anything else that waits.
	Guard(ctx context.Context) error
	// Admit looks whether a lease may be added, after whatever an operator stopped up to
	// now, and until the commit keeps operators from stopping it.
	Admit(ctx context.Context, l Lease, since time.Time, limits Limits) (Admission, error)
	InsertLease(ctx context.Context, l Lease) error
	// Lease returns fault.NotFound for an unknown id. It has no Recall.
	Lease(ctx context.Context, id string) (Lease, error)
	// ActivateLease makes an intent active and keeps what unmaking it needs, unless it
	// has ended meanwhile, its time is over or an operator has stopped it: ErrStale.
	ActivateLease(ctx context.Context, id, recall string) error
	// RecallLease keeps what unmaking a lease needs that was made after it had ended, and
	// has it unmade (again).
	RecallLease(ctx context.Context, id, recall string) error
	// ExtendLease stores the end, mint deadline, policy and grant of an active lease;
	// otherwise ErrStale.
	ExtendLease(ctx context.Context, l Lease) error
	// RevokedSince reports whether an operator has revoked what the lease is about since
	// it was created, whether that still holds or not.
	RevokedSince(ctx context.Context, l Lease) (bool, error)
	// EndLeases ends up to limit leases of the selection that have not ended, and returns
	// them as they are then.
	EndLeases(ctx context.Context, s Selection, e End, limit int) ([]Lease, error)
	// AbandonLease marks a revoking lease revoked though its end was not seen; otherwise
	// ErrStale.
	AbandonLease(ctx context.Context, id string) error
	// LoseOutcomes marks the outcome of those decisions unknown of which nobody reported
	// one, and returns these.
	LoseOutcomes(ctx context.Context, decisions []string) ([]string, error)
	// Notify wakes those who wait for a topic, after the commit.
	Notify(topic string)
}

// MintTime is how long a target may take to make a credential.
const MintTime = 10 * time.Second

// New makes the lease of a grant, that ends with its time or its session.
func New(g Grant, session string, sessionEnd time.Time, decision, policy string, act intent.Act, hash string, now time.Time) Lease {
	expires := now.Add(g.TTL)
	if sessionEnd.Before(expires) {
		expires = sessionEnd
	}
	// Tokens count in whole seconds; a lease must not claim to end later than they do.
	expires = expires.Truncate(time.Second)
	l := Lease{
		ID: id.New(id.Lease), Session: session, Decision: decision, Policy: policy, User: act.User, Agent: act.Agent,
		IntentHash: hash, Grant: g, ExpiresAt: expires,
	}
	return l.Fresh(now)
}

// Fresh is l as it begins at now.
func (l Lease) Fresh(now time.Time) Lease {
	l.State, l.CreatedAt, l.MintDeadline = Active, now, now
	if l.Outside {
		l.State, l.MintDeadline = Intent, now.Add(MintTime)
	}
	l.EndedAt, l.GoneAt, l.EndReason, l.Revocation = time.Time{}, time.Time{}, "", ""
	l.DueAt, l.Attempts, l.LastError = time.Time{}, 0, ""
	return l
}

// Begin records a lease of a session that began at a time. Only after the commit may
// its credential be made. What an operator has stopped is ErrHalted, and a quota that
// is used up a fault.
func Begin(ctx context.Context, tx Tx, l Lease, since time.Time, limits Limits) error {
	if err := admit(ctx, tx, l, since, limits); err != nil {
		return err
	}
	if err := tx.InsertLease(ctx, l); err != nil {
		return err
	}
	kind := audit.LeaseActive
	if l.State == Intent {
		kind = audit.LeaseIntent
	}
	return record(ctx, tx, kind, l, map[string]any{
		"minter": l.Minter, "kind": l.Kind, "scope": l.Scope, "expires_at": l.ExpiresAt,
		"revocability": l.Revocability, "precision": l.Precision, "intent_hash": l.IntentHash,
	})
}

// Renew moves the end of a lease to that of a fresh one for the same act. ErrStale says
// that it has ended.
func Renew(ctx context.Context, tx Tx, l, fresh Lease, since time.Time) (Lease, error) {
	l.Policy, l.MintDeadline, l.Cnf = fresh.Policy, fresh.MintDeadline, fresh.Cnf
	if err := admit(ctx, tx, l, since, Limits{}); err != nil {
		return l, err
	}
	if fresh.ExpiresAt.After(l.ExpiresAt) {
		l.ExpiresAt = fresh.ExpiresAt
	}
	if err := tx.ExtendLease(ctx, l); err != nil {
		return l, err
	}
	l.CreatedAt = fresh.CreatedAt // the credential's life is counted from now
	return l, record(ctx, tx, audit.LeaseRenewed, l, map[string]any{"decision": fresh.Decision, "expires_at": l.ExpiresAt})
}

// Activate records that a credential was made. Only after the commit may its secret
// leave. ErrStale says that the lease has ended meanwhile; the credential is being
// unmade then.
func Activate(ctx context.Context, tx Tx, l Lease, recall string) error {
	err := tx.ActivateLease(ctx, l.ID, recall)
	if err != nil {
		return err
	}
	return record(ctx, tx, audit.LeaseActive, l, map[string]any{"minter": l.Minter, "kind": l.Kind, "expires_at": l.ExpiresAt})
}

// Recalled hands in what is needed to unmake a credential whose lease could not become
// active.
func Recalled(ctx context.Context, tx Tx, l Lease, recall string) error {
	if recall == "" {
		return nil
	}
	tx.Notify(UnmakeTopic)
	return tx.RecallLease(ctx, l.ID, recall)
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

func record(ctx context.Context, tx audit.Tx, kind audit.Kind, l Lease, detail map[string]any) error {
	return audit.Append(ctx, tx, audit.Entry{
		Kind: kind, Session: l.Session, Decision: l.Decision, Lease: l.ID, User: l.User, Agent: l.Agent, Detail: detail,
	})
}
