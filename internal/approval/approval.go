// Package approval gets one human answer to one act, out of band, by OpenID
// Connect CIBA in poll mode. Each state is durable before the outside call that
// it precedes, so that a crash at any line leaves something that can be carried
// on or ended safely, and never a second prompt.
package approval

import (
	"cmp"
	"context"
	"errors"
	"time"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/identity"
)

// State is where a prompt stands.
type State string

// The states. The way is created → requesting → pending → redeemed → approved →
// consumed; the others are ends.
const (
	Created    State = "created"    // recorded; the provider knows nothing yet
	Requesting State = "requesting" // about to ask the provider
	Pending    State = "pending"    // the provider took the prompt
	Redeemed   State = "redeemed"   // tokens arrived and are stored; not verified yet
	Approved   State = "approved"   // verified yes, not used yet
	Consumed   State = "consumed"   // used, once

	Denied       State = "denied"        // the person said no
	Expired      State = "expired"       // nobody answered, or the yes was not used in time
	Failed       State = "failed"        // refused by the provider or by verification
	Cancelled    State = "cancelled"     // withdrawn, or its session ended
	StartUnknown State = "start_unknown" // a crash hid whether the person was asked
	OutcomeLost  State = "outcome_lost"  // a crash lost the provider's answer
)

// Approval is one prompt to one person about one act.
type Approval struct {
	ID      string
	Version int64 // grows with each change; the fence against late writers
	State   State
	Reason  string // why it ended where State alone does not say

	Session    string
	User       identity.Ref // who the agent acts for
	Agent      identity.Ref
	IntentHash string

	Approver    string       // as policy named them
	ApproverRef identity.Ref // who that is; only this person's yes counts
	Hint        string       // what tells the provider whom to ask
	Message     string       // what the provider shows
	Code        string       // shown on both sides
	ACRValues   []string     // how the person must be authenticated; empty: any way

	CreatedAt time.Time
	SentAt    time.Time     // when the provider was asked to prompt
	ExpiresAt time.Time     // until then it can be answered; once approved, used
	Interval  time.Duration // least time between two polls
	PolledAt  time.Time     // when the last poll was sent
	Polling   bool          // a poll is in flight, or was when its process ended
	Failures  int           // calls to the provider in a row that brought no answer
	DueAt     time.Time     // when it next needs work; pushed ahead by who takes the work

	// AuthReqID and Answer are the provider's. The store keeps them encrypted, and
	// they are erased at the end.
	AuthReqID string
	Answer    []byte
	// Damaged says that they don't open any more. Such a prompt can only be closed.
	Damaged bool

	// What the verified answer says about the yes.
	ACR      string
	AMR      []string
	AuthTime time.Time
}

// Open reports whether the human answer is still awaited.
func (a Approval) Open() bool {
	switch a.State {
	case Created, Requesting, Pending, Redeemed:
		return true
	}
	return false
}

// Status is the state as agents see it.
func (a Approval) Status() string {
	switch {
	case a.Open():
		return "pending"
	case a.State == StartUnknown || a.State == OutcomeLost:
		return string(Failed)
	}
	return string(a.State)
}

// Usable says whether a continuation at now can rest on a for the act with this
// hash, and if not, the reason code and message of the deny.
func (a Approval) Usable(now time.Time, hash string) (code, message string, ok bool) {
	switch {
	case a.IntentHash != hash:
		return "approval_mismatch", "The approval was given for another act: action, parameters, resource or context differ", false
	case a.Open():
		return "", "", false
	case a.State == Approved && now.Before(a.ExpiresAt):
		return "", "", true
	case a.State == Approved || a.State == Expired:
		return "approval_expired", "The approval was not given or not used in time", false
	case a.State == Consumed:
		return "approval_consumed", "The approval was used already", false
	case a.State == Denied:
		return "approval_denied", "The person who was asked said no", false
	case a.State == Cancelled:
		return "approval_cancelled", "The approval was withdrawn", false
	}
	return "approval_failed", "The approval could not be obtained: " + a.Reason, false
}

// ErrStale says that an approval is not at the version that was read.
var ErrStale = errors.New("approval changed since it was read")

// Tx is what approvals need of a transaction.
type Tx interface {
	audit.Tx
	Now() time.Time
	InsertApproval(ctx context.Context, a Approval) error
	// Approval returns fault.NotFound for an unknown id.
	Approval(ctx context.Context, id string) (Approval, error)
	// UpdateApproval stores a if the row is still at a.Version, and increments it;
	// otherwise ErrStale.
	UpdateApproval(ctx context.Context, a *Approval) error
	// JoinableApproval finds the prompt to this person about this act that is open, or
	// approved and still good, unless it is the one named.
	JoinableApproval(ctx context.Context, hash string, approver identity.Ref, except string) (Approval, bool, error)
	// CountOpenApprovals counts the open prompts to this person.
	CountOpenApprovals(ctx context.Context, approver identity.Ref) (int, error)
	// SessionApprovals lists the session's approvals that are open or approved.
	SessionApprovals(ctx context.Context, session string) ([]Approval, error)
	// DueApproval returns the approval that has been due longest, and keeps other
	// transactions off it until the end of this one.
	DueApproval(ctx context.Context) (Approval, bool, error)
	// Notify wakes those who watch the topic, after the commit.
	Notify(topic string)
}

// Store runs transactions and wakes watchers.
type Store interface {
	Update(ctx context.Context, f func(Tx) error) error
	// View runs f in a transaction that only reads.
	View(ctx context.Context, f func(Tx) error) error
	// Watch returns a channel that receives after each commit that notified the
	// topic, until stop is called. It may receive without cause.
	Watch(topic string) (wake <-chan struct{}, stop func())
}

// workTopic wakes the workers.
const workTopic = "approvals"

// Plan is a prompt that could be opened: everything but the state.
type Plan struct {
	Approver    string
	ApproverRef identity.Ref
	Hint        string
	Message     string
	Code        string
	ACRValues   []string
	ExpiresIn   time.Duration
}

// Opening says for which act a plan is opened.
type Opening struct {
	Plan       Plan
	Session    string
	Decision   string
	User       identity.Ref
	Agent      identity.Ref
	IntentHash string
	MaxPending int
	// Record is the message as the record may have it; "" as it is.
	Record string
	// Unmet is the approval that the request rests on, if policy asks for another.
	Unmet string
}

// Open records a prompt, which a worker then sends. If this person is being asked
// about this very act already, or has said yes and nobody used it yet, that prompt
// is joined instead.
func Open(ctx context.Context, tx Tx, o Opening) (Approval, error) {
	if a, found, err := tx.JoinableApproval(ctx, o.IntentHash, o.Plan.ApproverRef, o.Unmet); found || err != nil {
		return a, err
	}
	n, err := tx.CountOpenApprovals(ctx, o.Plan.ApproverRef)
	if err != nil {
		return Approval{}, err
	}
	if n >= o.MaxPending {
		return Approval{}, &fault.Error{
			Code:   fault.Overloaded,
			Detail: "this person has too many open prompts; wait until some are answered", RetryAfter: 30 * time.Second,
		}
	}
	now := tx.Now()
	a := Approval{
		ID: id.New(id.Approval), Version: 1, State: Created,
		Session: o.Session, User: o.User, Agent: o.Agent, IntentHash: o.IntentHash,
		Approver: o.Plan.Approver, ApproverRef: o.Plan.ApproverRef, Hint: o.Plan.Hint,
		Message: o.Plan.Message, Code: o.Plan.Code, ACRValues: o.Plan.ACRValues,
		CreatedAt: now, DueAt: now, ExpiresAt: now.Add(o.Plan.ExpiresIn),
	}
	if err := tx.InsertApproval(ctx, a); err != nil {
		return Approval{}, err
	}
	tx.Notify(workTopic)
	return a, record(ctx, tx, a, audit.ApprovalOpened, map[string]any{
		"approver": a.ApproverRef, "message": cmp.Or(o.Record, a.Message), "code": a.Code, "intent_hash": a.IntentHash,
		"expires_at": a.ExpiresAt, "decision": o.Decision,
	})
}

// Consume uses an approved approval up. It fails with ErrStale if anyone else, or
// its deadline, was faster.
func Consume(ctx context.Context, tx Tx, a Approval, decision string) error {
	if a.State != Approved || !tx.Now().Before(a.ExpiresAt) {
		return ErrStale
	}
	a.State = Consumed
	if err := tx.UpdateApproval(ctx, &a); err != nil {
		return err
	}
	tx.Notify(a.ID)
	return record(ctx, tx, a, audit.ApprovalConsumed, map[string]any{"decision": decision})
}

// Close ends an approval in the state given; what the provider sent is erased.
func Close(ctx context.Context, tx Tx, a *Approval, end State, reason string) error {
	return closeBy(ctx, tx, a, end, reason, identity.Ref{})
}

func closeBy(ctx context.Context, tx Tx, a *Approval, end State, reason string, operator identity.Ref) error {
	a.State, a.Reason = end, reason
	a.AuthReqID, a.Answer, a.Polling = "", nil, false
	if err := tx.UpdateApproval(ctx, a); err != nil {
		return err
	}
	tx.Notify(a.ID)
	detail := map[string]any{"state": end}
	if reason != "" {
		detail["reason"] = reason
	}
	return audit.Append(ctx, tx, audit.Entry{
		Kind: audit.ApprovalClosed, Session: a.Session, Approval: a.ID, User: a.User, Agent: a.Agent, Operator: operator, Detail: detail,
	})
}

// CancelAll ends what a session still has open or unused, and says how many that
// were.
func CancelAll(ctx context.Context, tx Tx, session, reason string, operator identity.Ref) (int, error) {
	as, err := tx.SessionApprovals(ctx, session)
	if err != nil {
		return 0, err
	}
	for i := range as {
		if err := closeBy(ctx, tx, &as[i], Cancelled, reason, operator); err != nil {
			return 0, err
		}
	}
	return len(as), nil
}

// Find returns an approval of the caller's session; one that isn't theirs is as
// good as none: fault.NotFound.
func Find(ctx context.Context, tx Tx, approvalID string, c identity.Caller) (Approval, error) {
	if !id.Valid(id.Approval, approvalID) {
		return Approval{}, notFound()
	}
	a, err := tx.Approval(ctx, approvalID)
	if fault.Is(err, fault.NotFound) || err == nil && (a.Agent != c.Agent.Ref || (c.User != nil && a.User != c.User.Ref)) {
		return Approval{}, notFound()
	}
	return a, err
}

func notFound() error { return fault.New(fault.NotFound, "no such approval of this agent and user") }

func record(ctx context.Context, tx Tx, a Approval, kind audit.Kind, detail map[string]any) error {
	return audit.Append(ctx, tx, audit.Entry{
		Kind: kind, Session: a.Session, Approval: a.ID, User: a.User, Agent: a.Agent, Detail: detail,
	})
}
