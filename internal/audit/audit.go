// Package audit is the record of what Writ did and for whom. An entry is written
// in the transaction of the step that it records, so that neither exists without
// the other. No secret ever enters.
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

	DecisionAllow       Kind = "decision.allow"
	DecisionDeny        Kind = "decision.deny"
	DecisionRequireCIBA Kind = "decision.require_ciba"
	DecisionReissued    Kind = "decision.reissued" // a retry got a new secret for the same decision

	ApprovalOpened   Kind = "approval.opened"   // recorded, the person not asked yet
	ApprovalAsking   Kind = "approval.asking"   // about to ask the provider
	ApprovalPrompted Kind = "approval.prompted" // the provider took the prompt
	ApprovalAnswered Kind = "approval.answered" // tokens came, not verified yet
	ApprovalApproved Kind = "approval.approved"
	ApprovalConsumed Kind = "approval.consumed"
	ApprovalClosed   Kind = "approval.closed" // any other end; detail says which

	LeaseActive  Kind = "lease.active"
	LeaseRevoked Kind = "lease.revoked"

	PolicyActivated Kind = "policy.activated"
	PolicyRefused   Kind = "policy.refused"

	OperatorRevoked Kind = "operator.revoked"
)

// Entry is one line of the record. Seq and At are the store's.
type Entry struct {
	Seq  int64
	At   time.Time
	Kind Kind

	// RequestID is of the request that caused the entry, "" for Writ's own work.
	RequestID string
	// User, Agent and Operator are who it concerns or who did it; zero where nobody.
	User, Agent, Operator identity.Ref
	// Session, Decision, Approval and Lease are ids; "" where none.
	Session, Decision, Approval, Lease string
	// Detail is the rest, by kind; docs/architecture.md lists it.
	Detail map[string]any
}

// Tx is what recording needs of a transaction.
type Tx interface {
	// AppendAudit writes the entry, with the transaction's time.
	AppendAudit(ctx context.Context, e Entry) error
}

// Append writes an entry and takes the request id from ctx.
func Append(ctx context.Context, tx Tx, e Entry) error {
	e.RequestID = telemetry.RequestID(ctx)
	return tx.AppendAudit(ctx, e)
}
