// Package policy evaluates the one document that is a decision. It embeds OPA:
// policies are compiled into an immutable snapshot behind an atomic pointer, and
// whatever goes wrong in an evaluation is a deny.
package policy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/bundle"
	"github.com/open-policy-agent/opa/v1/metrics"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/topdown"
	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/telemetry"
)

// Config makes an Engine.
type Config struct {
	// Path is a directory or a bundle file.
	Path string
	// Query is the document that is a decision.
	Query string
	// AdminQuery is the document that says what an operator may do; "" is data.writ.admin.
	AdminQuery string
	// Deadline bounds one evaluation.
	Deadline time.Duration
	// Reload is how often Path is checked for a change; zero never.
	Reload time.Duration
	// Verification, when set, refuses a bundle that it does not verify.
	Verification *bundle.VerificationConfig
	// Record enters a load into the audit log: refused says why it was refused, nil
	// that it is about to be in force. Policies that can't be recorded are not put
	// in force.
	Record  func(ctx context.Context, v Version, refused error) error
	Metrics *telemetry.Metrics
	Logger  *slog.Logger
}

// maxQueue is how long a decision waits for its turn. The deadline of its evaluation
// begins after that.
const maxQueue = 2 * time.Second

// mendEvery is how often policies that were refused at start are looked at again.
const mendEvery = 2 * time.Second

// Engine answers decisions from the current snapshot.
type Engine struct {
	cfg             Config
	decision, admin *jsonschema.Schema // of the answers
	current         atomic.Pointer[snapshot]
	refusal         atomic.Pointer[Refusal] // of the last Load; nil: it was none
	slots           chan struct{}           // more evaluations at a time would only slow each other down, past the deadline
	seen            string                  // fingerprint of Path at the last Load; for Load and Run, which don't overlap
}

// New makes an engine without policies; Load brings them.
func New(cfg Config) (*Engine, error) {
	cfg.AdminQuery = cmp.Or(cfg.AdminQuery, "data.writ.admin")
	e := &Engine{cfg: cfg, slots: make(chan struct{}, runtime.GOMAXPROCS(0))}
	var err error
	if e.decision, err = compileSchema("decision.json"); err != nil {
		return nil, err
	}
	e.admin, err = compileSchema("admin.json")
	return e, err
}

// Load puts the policies at Path in force if they pass every gate; otherwise the
// ones in force stay. It must not run beside itself or Run.
func (e *Engine) Load(ctx context.Context) error {
	e.seen = fingerprint(e.cfg.Path) // before reading, so that no change goes unseen
	s, err := e.load(ctx)
	if ctx.Err() != nil { // stopping: that says nothing about the policies
		return context.Cause(ctx)
	}
	if err == nil && s.Digest == e.Version().Digest {
		if e.refusal.Swap(nil) != nil {
			e.cfg.Logger.InfoContext(ctx, "policies are again those in force", "revision", s.Revision)
		}
		return nil
	}
	version := e.Version()
	if err == nil {
		version = s.Version
	}
	if recordErr := e.cfg.Record(ctx, version, err); recordErr != nil {
		err = errors.Join(err, recordErr)
		e.seen = "" // Run tries again
	}
	if err != nil {
		e.refusal.Store(&Refusal{At: time.Now().UTC(), Error: err.Error()})
		e.cfg.Metrics.PolicyLoads.WithLabelValues("refused").Inc()
		e.cfg.Logger.ErrorContext(ctx, "policies refused", "path", e.cfg.Path, "error", err, "in_force", e.Version().Revision)
		return err
	}
	s.at = time.Now().UTC()
	e.current.Store(s)
	e.refusal.Store(nil)
	e.cfg.Metrics.PolicyLoads.WithLabelValues("activated").Inc()
	e.cfg.Logger.InfoContext(ctx, "policies activated", "path", e.cfg.Path, "revision", s.Revision, "digest", s.Digest)
	if !s.admin.defined {
		e.cfg.Logger.WarnContext(ctx, "policies say nothing of operators, who can do nothing but revoke",
			"query", e.cfg.AdminQuery, "revision", s.Revision)
	}
	return nil
}

// Run reloads the policies when they change, until ctx ends. Without a Reload
// interval it does so only until there are policies.
func (e *Engine) Run(ctx context.Context) error {
	for {
		wait := e.cfg.Reload
		switch {
		case wait > 0:
		case e.Ready():
			<-ctx.Done()
			return nil
		default:
			wait = mendEvery
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		if fingerprint(e.cfg.Path) != e.seen {
			_ = e.Load(ctx) // logged and reported by Load; the old policies stay
		}
	}
}

// Version names the snapshot in force; it is zero before the first Load.
func (e *Engine) Version() Version {
	if s := e.current.Load(); s != nil {
		return s.Version
	}
	return Version{}
}

// Ready reports whether policies are in force.
func (e *Engine) Ready() bool { return e.current.Load() != nil }

// Decide evaluates. Every failure of policy is a Result that denies; the error is
// only for a decision that could not be attempted: fault.NotReady without
// policies, fault.Overloaded when too many evaluations run.
func (e *Engine) Decide(ctx context.Context, in Input) (_ Result, err error) {
	ctx, span := telemetry.Start(ctx, "policy evaluate")
	defer func() { telemetry.End(span, err) }()
	s := e.current.Load()
	if s == nil {
		return Result{}, fault.New(fault.NotReady, "no policies are loaded")
	}
	done, err := e.turn(ctx)
	if err != nil {
		return Result{}, err
	}
	defer done()
	start := time.Now()
	r := e.evaluate(ctx, s, in.evaluable(), in.Time)
	e.cfg.Metrics.PolicySeconds.Observe(time.Since(start).Seconds())
	r.Policy = s.Version
	return r, nil
}

// turn waits for a slot, which done gives back.
func (e *Engine) turn(ctx context.Context) (done func(), err error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	select {
	case e.slots <- struct{}{}:
		return func() { <-e.slots }, nil
	case <-time.After(maxQueue):
		return nil, &fault.Error{Code: fault.Overloaded, Detail: "too many decisions at a time", RetryAfter: time.Second}
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (e *Engine) evaluate(ctx context.Context, s *snapshot, input map[string]any, at time.Time) Result {
	r, failed := ask[Result](ctx, e, s, s.decision, input, at)
	if failed != nil {
		return denied(failed.Code, failed.Message)
	}
	return r
}

// ask puts a question to a snapshot. Whatever goes wrong is counted, logged and the
// reason of a denial.
func ask[T any](ctx context.Context, e *Engine, s *snapshot, q question, input map[string]any, at time.Time) (answer T, failed *Reason) {
	fail := func(code, message string, err error) (none T, _ *Reason) {
		e.cfg.Metrics.PolicyFailures.WithLabelValues(code).Inc()
		action := input["action"] // of an operator
		if intent, ok := input["intent"].(map[string]any); ok {
			action = intent["action"]
		}
		e.cfg.Logger.ErrorContext(ctx, "policy failed", "reason", code, "revision", s.Revision, "action", action, "error", err)
		return none, &Reason{code, message}
	}
	value, err := ast.InterfaceToValue(input)
	if err != nil {
		return fail(q.failures.failed, "policy could not be evaluated", err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, e.cfg.Deadline, errDeadline)
	defer cancel()
	rs, err := q.query.Eval(ctx,
		rego.EvalParsedInput(value), rego.EvalTime(at), rego.EvalMetrics(metrics.NoOp()))
	switch {
	case topdown.IsCancel(err) || errors.Is(err, context.DeadlineExceeded):
		return fail(q.failures.timeout, "policy took too long", fmt.Errorf("%w: %w", context.Cause(ctx), err))
	case err != nil:
		return fail(q.failures.failed, "policy could not be evaluated", err)
	case len(rs) != 1 || len(rs[0].Expressions) != 1:
		return fail(q.failures.undefined, "policy gave no answer", errors.New("undefined"))
	}
	answer, err = read[T](q.schema, rs[0].Expressions[0].Value)
	if err != nil {
		return fail(q.failures.invalid, "policy gave an answer that is not valid", err)
	}
	return answer, nil
}

var errDeadline = errors.New("over policy.deadline")
