package lease

import (
	"context"
	"time"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/identity"
)

// Urgency orders what is to be unmade at one target.
type Urgency int

// From the first to the last.
const (
	ByKill Urgency = iota
	ByRelease
	ByTime
)

// End is how leases end.
type End struct {
	Reason string
	// Revocation is the operator's revocation that does it, by Operator.
	Revocation string
	Operator   identity.Ref
}

// Urgency is how soon whatever ends so should be gone.
func (e End) Urgency() Urgency {
	switch {
	case e.Revocation != "" || e.Reason == EndOperator:
		return ByKill
	case e.Reason == EndExpired:
		return ByTime
	}
	return ByRelease
}

// Selection picks leases; the zero value picks none. Exactly one part is set, besides
// Until.
type Selection struct {
	ID       string
	Decision string
	Session  string
	User     identity.Ref
	Agent    identity.Ref
	Minter   string
	Policy   string // revision
	Due      bool   // expired
	Overdue  bool   // not made by their mint deadline
	All      bool
	// Until keeps out those that were created later; zero keeps none out.
	Until time.Time
}

// UnmakeTopic is notified when there may be something to unmake.
const UnmakeTopic = "unmake"

// EndOne ends one lease. Ending one that has ended changes nothing.
func EndOne(ctx context.Context, tx Tx, l Lease, e End) (Ended, error) {
	return endBatch(ctx, tx, Selection{ID: l.ID}, e, 1)
}

// BatchSize bounds the leases that one statement ends.
const BatchSize = 512

// EndAll ends all leases of a selection.
func EndAll(ctx context.Context, tx Tx, s Selection, e End) (Ended, error) {
	ended := Ended{}
	for {
		some, err := EndSome(ctx, tx, s, e)
		if err != nil {
			return nil, err
		}
		ended.Add(some)
		if some.Total() < BatchSize {
			return ended, nil
		}
	}
}

// EndSome ends up to BatchSize leases of a selection.
func EndSome(ctx context.Context, tx Tx, s Selection, e End) (Ended, error) {
	return endBatch(ctx, tx, s, e, BatchSize)
}

// endBatch ends some leases. Acts whose outcome nobody reported by then are recorded as
// unknown.
func endBatch(ctx context.Context, tx Tx, s Selection, e End, limit int) (Ended, error) {
	leases, err := tx.EndLeases(ctx, s, e, limit)
	if err != nil || len(leases) == 0 {
		return nil, err
	}
	ended, decisions, of := Ended{}, []string{}, map[string]Lease{}
	for _, l := range leases {
		ended[l.Kind]++
		detail := map[string]any{"reason": e.Reason}
		if e.Revocation != "" {
			detail["revocation"] = e.Revocation
		}
		kind := audit.LeaseRevoking
		if l.State == Revoked {
			kind = audit.LeaseRevoked
		} else {
			tx.Notify(UnmakeTopic)
		}
		err := audit.Append(ctx, tx, audit.Entry{
			Kind: kind, Session: l.Session, Decision: l.Decision, Lease: l.ID, User: l.User, Agent: l.Agent, Operator: e.Operator, Detail: detail,
		})
		if err != nil {
			return nil, err
		}
		if e.Reason != EndReissued && e.Reason != EndMintFailed {
			decisions = append(decisions, l.Decision)
			of[l.Decision] = l
		}
	}
	lost, err := tx.LoseOutcomes(ctx, decisions)
	if err != nil {
		return nil, err
	}
	for _, decision := range lost {
		err := record(ctx, tx, audit.DecisionOutcome, of[decision], map[string]any{"outcome": "unknown", "by": "writ"})
		if err != nil {
			return nil, err
		}
	}
	return ended, nil
}

// Ended counts the leases that were ended, by kind.
type Ended map[string]int

// Add adds others.
func (e Ended) Add(others Ended) {
	for kind, n := range others {
		e[kind] += n
	}
}

// Total is their number.
func (e Ended) Total() int {
	n := 0
	for _, k := range e {
		n += k
	}
	return n
}

// Abandon calls a lease gone whose end was not seen, on an operator's word.
func Abandon(ctx context.Context, tx Tx, l Lease, operator identity.Ref, reason string) error {
	if err := tx.AbandonLease(ctx, l.ID); err != nil {
		return err
	}
	return audit.Append(ctx, tx, audit.Entry{
		Kind: audit.LeaseRevoked, Session: l.Session, Decision: l.Decision, Lease: l.ID, User: l.User, Agent: l.Agent, Operator: operator,
		Detail: map[string]any{"reason": l.EndReason, "ended_at": l.EndedAt, "abandoned": reason, "last_error": l.LastError},
	})
}

// Fail ends a lease whose credential could not be made or whose secret must not leave.
func Fail(ctx context.Context, tx Tx, l Lease) error {
	_, err := EndOne(ctx, tx, l, End{Reason: EndMintFailed})
	return err
}
