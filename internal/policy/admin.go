package policy

import (
	"context"
	"time"

	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/telemetry"
)

// AdminInput is what policy is asked about one request of an operator;
// docs/policies.md is its contract.
type AdminInput struct {
	Operator identity.Principal
	Action   string         // such as audit.entries.read
	Resource map[string]any // what is asked for: filters, limits, places
	Time     time.Time      // the store's clock
	IP       string         // of the caller, as Writ sees it
}

// Document is what policy sees as input.
func (in AdminInput) Document() map[string]any {
	return map[string]any{
		"operator": principal(in.Operator),
		"action":   in.Action,
		"resource": object(in.Resource),
		"env":      map[string]any{"time": in.Time.UTC().Format(time.RFC3339Nano), "ip": in.IP},
	}
}

// AdminResult is what policy said, held to bundles/schemas/admin.json.
type AdminResult struct {
	Allow   bool     `json:"allow"`
	Reasons []Reason `json:"reasons"`

	// Policy is the snapshot that said it.
	Policy Version `json:"-"`
}

// The reasons of a refusal that policy did not give.
const (
	AdminUndefined     = "admin_undefined"      // the query has no result
	AdminError         = "admin_error"          // evaluation failed
	AdminTimeout       = "admin_timeout"        // evaluation took longer than the deadline
	AdminInvalidOutput = "admin_invalid_output" // the result breaks the schema
	AdminNotLoaded     = "admin_not_loaded"     // there are no policies to ask
)

// Admin answers whether an operator may do what it asks for. Every failure of policy,
// and policies that are not loaded, is a Result that does not allow; the error is only
// for a question that could not be put: fault.Overloaded when too many evaluations run.
func (e *Engine) Admin(ctx context.Context, in AdminInput) (_ AdminResult, err error) {
	ctx, span := telemetry.Start(ctx, "policy evaluate")
	defer func() { telemetry.End(span, err) }()
	s := e.current.Load()
	if s == nil {
		return AdminResult{Reasons: []Reason{{AdminNotLoaded, "no policies are loaded; only revoking needs none"}}}, nil
	}
	done, err := e.turn(ctx)
	if err != nil {
		return AdminResult{}, err
	}
	defer done()
	r, failed := ask[AdminResult](ctx, e, s, s.admin, in.Document(), in.Time)
	if failed != nil {
		r = AdminResult{Reasons: []Reason{*failed}}
	}
	r.Policy = s.Version
	return r, nil
}

// Status is where the policies of this process stand.
type Status struct {
	Version
	// ActivatedAt is when they were put in force; zero: there are none.
	ActivatedAt time.Time
	// Refused is why what lies at Path is not in force; nil: it is.
	Refused *Refusal
}

// Refusal says when and why policies were refused.
type Refusal struct {
	At    time.Time
	Error string
}

// Status tells where the policies stand.
func (e *Engine) Status() Status {
	st := Status{Refused: e.refusal.Load()}
	if s := e.current.Load(); s != nil {
		st.Version, st.ActivatedAt = s.Version, s.at
	}
	return st
}
