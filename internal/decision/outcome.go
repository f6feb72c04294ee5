package decision

import (
	"context"
	"regexp"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/policy"
)

// Outcome is what became of an allowed act.
type Outcome string

// The outcomes.
const (
	Succeeded Outcome = "succeeded"
	Failed    Outcome = "failed"
	Unknown   Outcome = "unknown"
)

// Report is what an agent says of an act.
type Report struct {
	Outcome Outcome
	// Code is the target's own word, such as http_503; "" none.
	Code string
}

var outcomeCode = regexp.MustCompile(`^[A-Za-z0-9_.:-]{1,64}$`)

// Check holds a report to its form.
func (r Report) Check() error {
	switch r.Outcome {
	case Succeeded, Failed, Unknown:
	case "":
		return fault.Invalid("/outcome", "is missing, expected succeeded, failed or unknown")
	default:
		return fault.Invalid("/outcome", "expected succeeded, failed or unknown")
	}
	if r.Code != "" && !outcomeCode.MatchString(r.Code) {
		return fault.Invalid("/code", "expected 1 to 64 letters, digits and _ . : -")
	}
	return nil
}

// Report records what became of an act. Saying the same twice changes nothing;
// saying otherwise is fault.OutcomeConflict.
func (d *Decider) Report(ctx context.Context, c identity.Caller, decisionID string, r Report) (Record, error) {
	if err := r.Check(); err != nil {
		return Record{}, err
	}
	var record Record
	err := d.cfg.Store.Update(ctx, func(tx Tx) (err error) {
		if record, err = find(ctx, tx, decisionID, c); err != nil {
			return err
		}
		switch {
		case record.Answer.Decision != policy.Allow:
			return fault.New(fault.OutcomeConflict, "only an allow has an outcome; this decision is %s", record.Answer.Decision)
		case record.OutcomeBy == byAgent && record.Outcome == string(r.Outcome):
			return nil
		case record.OutcomeBy == byAgent:
			return fault.New(fault.OutcomeConflict, "the outcome was reported as %s before", record.Outcome)
		}
		if err := tx.SetOutcome(ctx, record.ID, r.Outcome); err != nil {
			return err
		}
		record.Outcome, record.OutcomeBy = string(r.Outcome), byAgent
		detail := map[string]any{"outcome": r.Outcome, "by": byAgent}
		if r.Code != "" {
			detail["code"] = r.Code
		}
		return audit.Append(ctx, tx, audit.Entry{
			Kind: audit.DecisionOutcome, Session: record.Session, Decision: record.ID, Lease: record.Lease,
			User: record.User, Agent: record.Agent, Detail: detail,
		})
	})
	return record, err
}

const byAgent = "agent"

// find returns a decision of the caller's; one that isn't theirs is as good as none:
// fault.NotFound.
func find(ctx context.Context, tx Tx, decisionID string, c identity.Caller) (Record, error) {
	notFound := fault.New(fault.NotFound, "no such decision of this agent and user")
	if !id.Valid(id.Decision, decisionID) {
		return Record{}, notFound
	}
	r, err := tx.Decision(ctx, decisionID)
	if fault.Is(err, fault.NotFound) || err == nil && (r.Agent != c.Agent.Ref || (c.User != nil && r.User != c.User.Ref)) {
		return Record{}, notFound
	}
	return r, err
}
