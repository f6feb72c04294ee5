// Package audit is the record of what Writ did and for whom. An entry is written
// in the transaction of the step that it records, so that neither exists without
// the other; moments later it is sequenced into a Merkle tree whose signed heads
// leave the machine, so that it can't be altered unseen. No secret ever enters.
package audit

import (
	"context"
	"time"

	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/telemetry"
)

// Kind names what happened.
type Kind string

// The kinds of entry.
const (
	SessionOpened Kind = "session.opened"
	SessionEnded  Kind = "session.ended"
	SignedOut     Kind = "session.signed_out" // an issuer's word; what it ended has entries of its own

	SignInOpened    Kind = "signin.opened"    // an agent asked for a user
	SignInSignedIn  Kind = "signin.signed_in" // the identity provider said who it is
	SignInConsented Kind = "signin.consented"
	SignInDeclined  Kind = "signin.declined"
	SignInCompleted Kind = "signin.completed" // the agent brought the code, and the session is open

	SessionEnvelope Kind = "session.envelope" // it was narrowed or widened

	DecisionAllow       Kind = "decision.allow"
	DecisionDeny        Kind = "decision.deny"
	DecisionRequireCIBA Kind = "decision.require_ciba"
	DecisionReissued    Kind = "decision.reissued" // a retry got a new secret for the same decision
	DecisionOutcome     Kind = "decision.outcome"  // what became of the act

	ApprovalOpened   Kind = "approval.opened"   // recorded, the person not asked yet
	ApprovalAsking   Kind = "approval.asking"   // about to ask the provider
	ApprovalPrompted Kind = "approval.prompted" // the provider took the prompt
	ApprovalAnswered Kind = "approval.answered" // tokens came, not verified yet
	ApprovalApproved Kind = "approval.approved"
	ApprovalConsumed Kind = "approval.consumed"
	ApprovalClosed   Kind = "approval.closed" // any other end; detail says which

	LeaseIntent   Kind = "lease.intent" // it is about to be made at its target
	LeaseActive   Kind = "lease.active" // its secret may leave
	LeaseRenewed  Kind = "lease.renewed"
	LeaseUsed     Kind = "lease.used"     // a resource server introspected its token, or a target saw a login
	LeaseRevoking Kind = "lease.revoking" // it has ended; that it is gone remains to be seen
	LeaseRevoked  Kind = "lease.revoked"  // and is gone

	OrphanFound    Kind = "orphan.found" // a credential at a target that no lease knows
	OrphanDisarmed Kind = "orphan.disarmed"
	OrphanGone     Kind = "orphan.gone"

	ServiceRevoked Kind = "service.revoked" // a resource server revoked a token

	PolicyActivated Kind = "policy.activated"
	PolicyRefused   Kind = "policy.refused"

	OperatorRevoked  Kind = "operator.revoked"  // the kill switch; what it ends has entries of its own
	RevocationGone   Kind = "revocation.gone"   // all that it ended was seen to be gone
	RevocationLifted Kind = "revocation.lifted" // its freeze is over

	OperatorRead    Kind = "operator.read"    // was shown something
	OperatorRefused Kind = "operator.refused" // asked for something, and was not shown it

	KeyAdded      Kind = "key.added"
	KeysRewrapped Kind = "keys.rewrapped"

	LogOpened   Kind = "log.opened"   // the first entry of an origin
	LogRestored Kind = "log.restored" // the same, after a restore from backup
	LogPruned   Kind = "log.pruned"   // older entries are in an archive
)

// Entry is one line of the record. At is the store's.
type Entry struct {
	// Seq is the entry's place among those that are not sequenced yet.
	Seq  int64
	At   time.Time
	Kind Kind
	// RequestID and TraceID are of the request that caused the entry, "" for Writ's own
	// work.
	RequestID, TraceID string
	// User, Agent and Operator are who it concerns or who did it; zero where nobody.
	User, Agent, Operator identity.Ref
	// Session, Decision, Approval and Lease are ids; "" where none.
	Session, Decision, Approval, Lease string
	// Detail is the rest, by kind; docs/audit.md lists it.
	Detail map[string]any
}

// Tx is what recording needs of a transaction.
type Tx interface {
	// AppendAudit writes the entry, with the transaction's time.
	AppendAudit(ctx context.Context, e Entry) error
}

// Append writes an entry and takes the request and trace ids from ctx.
func Append(ctx context.Context, tx Tx, e Entry) error {
	e.RequestID, e.TraceID = telemetry.RequestID(ctx), telemetry.TraceID(ctx)
	// What can't be hashed is refused here, with the step that it records: in the queue
	// it would hold up all that comes after it.
	if _, err := e.Record(); err != nil {
		return err
	}
	return tx.AppendAudit(ctx, e)
}
