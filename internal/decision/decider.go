package decision

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"time"

	"github.com/writsec/writ/internal/approval"
	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/dpop"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/intent"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/policy"
	"github.com/writsec/writ/internal/session"
	"github.com/writsec/writ/internal/telemetry"
)

// Config makes a Decider.
type Config struct {
	Identity  *identity.Verifier
	Policy    *policy.Engine
	Store     Store
	Approvals *approval.Engine
	Providers map[string]approval.Provider // by issuer
	Minters   map[string]lease.Minter      // by name
	Breakers  map[string]*lease.Breaker    // of those that have a target
	Limits    lease.Limits

	Sessions     session.Settings
	OpenOnDecide bool          // a decision without a session opens one
	PromptLife   time.Duration // of a prompt where policy says nothing
	MaxPending   int           // open prompts to one person
	Keeper       *audit.Keeper // of what decisions are made on
	// Halted reports that what is recorded does not reach the log; nothing is decided
	// then. nil: never.
	Halted func() bool

	Metrics *telemetry.Metrics
	Logger  *slog.Logger
}

// Decider answers decisions.
type Decider struct {
	cfg   Config
	turns *turns
}

// New makes a Decider.
func New(cfg Config) *Decider { return &Decider{cfg: cfg, turns: newTurns()} }

// maxAttempts bounds how often one request is evaluated, in its turn, because parallel
// ones of other replicas kept changing its session.
const maxAttempts = 8

// Decide answers one request. An error means that no decision was reached.
func (d *Decider) Decide(ctx context.Context, req Request) (Answer, error) {
	if strings.HasPrefix(req.Intent.Action, intent.Reserved) {
		return Answer{}, fault.Invalid("/intent/action", "begins with %s, which is for Writ's own questions, such as POST /sessions/{id}/envelope", intent.Reserved)
	}
	caller, err := d.cfg.Identity.Caller(ctx, req.Presented)
	if err != nil {
		return Answer{}, err
	}
	return d.wait(ctx, req, caller)
}

// wait decides and, where a person is asked and the request says so, waits for them
// and decides again.
func (d *Decider) wait(ctx context.Context, req Request, caller identity.Caller) (Answer, error) {
	answer, err := d.decide(ctx, req, caller)
	if err != nil || req.Wait <= 0 || answer.Decision != policy.RequireCIBA {
		return answer, err
	}
	a, err := d.cfg.Approvals.Wait(ctx, answer.Approval.ID, caller, req.Wait)
	if err != nil {
		return Answer{}, err
	}
	if a.Open() {
		answer.Approval = ViewOf(a)
		return answer, nil
	}
	// From the top: the tokens, the session and the policy may have changed while a
	// person thought about it.
	req.Approval, req.supersedes = a.ID, answer.DecisionID
	if caller, err = d.cfg.Identity.Again(ctx, caller); err != nil {
		return Answer{}, err
	}
	return d.decide(ctx, req, caller)
}

// decide goes down the line once, and again when a parallel request changed what
// it stood on.
func (d *Decider) decide(ctx context.Context, req Request, caller identity.Caller) (Answer, error) {
	if d.cfg.Halted != nil && d.cfg.Halted() {
		return Answer{}, logStuck()
	}
	var made done
	req.tried = new(bool)
	err := d.inTurn(ctx, func() (scope string, err error) {
		scope, made, err = d.attempt(ctx, req, caller)
		return scope, err
	})
	if err != nil || made.granted == nil {
		return made.answer, err
	}
	return d.mint(ctx, made.answer, made.order(caller))
}

func logStuck() error {
	return fault.New(fault.NotReady, "the audit log is stuck; nothing is decided that is not recorded")
}

// inTurn attempts something that parallel requests of the same scope can be in the way
// of. Whoever was in another's way once waits for a turn, so that each comes through.
func (d *Decider) inTurn(ctx context.Context, attempt func() (scope string, err error)) error {
	changed := func(err error) bool { return errors.Is(err, session.ErrChanged) || errors.Is(err, approval.ErrStale) }
	scope, err := attempt()
	if !changed(err) {
		return err
	}
	end, err := d.turns.take(ctx, scope)
	if err != nil {
		return err
	}
	defer end()
	for range maxAttempts {
		if _, err = attempt(); !changed(err) {
			return err
		}
	}
	return &fault.Error{
		Code: fault.Overloaded, Detail: "parallel requests keep changing this session", RetryAfter: time.Second,
	}
}

// done is a decision that is durable, and the lease whose secret is to be minted yet.
type done struct {
	answer  Answer
	granted *lease.Lease
	act     intent.Act
}

func (d done) order(c identity.Caller) lease.Order {
	return lease.Order{Lease: *d.granted, Act: d.act, SubjectToken: c.UserToken()}
}

// situation is what a decision is made on, read in one transaction.
type situation struct {
	now        time.Time
	session    session.Session
	newSession bool
	recent     session.Recent
	user       identity.Principal
	agent      identity.Principal
	approval   *approval.Approval
	act        intent.Act
	hash       string
	replay     *Record      // set: this request was answered before
	renews     *lease.Lease // set: this request is to renew it
}

func (d *Decider) attempt(ctx context.Context, req Request, caller identity.Caller) (scope string, made done, err error) {
	s, err := d.read(ctx, req, caller)
	if err != nil {
		return "", done{}, err
	}
	scope = s.session.Scope
	if s.replay != nil {
		made, err = d.replay(ctx, s, caller)
		return scope, made, err
	}
	r, err := d.rule(ctx, req, caller, s)
	if err != nil {
		return scope, done{}, err
	}
	made, err = d.conclude(ctx, req, s, r)
	return scope, made, err
}

// conclude makes a ruling durable, and where an operator has stopped what it would
// grant, the denial.
func (d *Decider) conclude(ctx context.Context, req Request, s situation, r ruling) (done, error) {
	if r.grant != nil && !*req.tried {
		if *req.tried = d.cfg.Breakers[r.grant.Minter].Allow(); !*req.tried {
			return done{}, brokenTarget()
		}
	}
	record, granted, err := d.commit(ctx, req, s, r)
	if errors.Is(err, lease.ErrHalted) {
		r = r.deny("halted", "An operator has stopped what this is about")
		record, granted, err = d.commit(ctx, req, s, r)
	}
	if err != nil {
		return done{}, err
	}
	d.cfg.Metrics.Decisions.WithLabelValues(string(r.Effect)).Inc()
	if r.Effect == policy.Allow && r.rests != nil {
		d.cfg.Metrics.Approvals.WithLabelValues(string(approval.Consumed)).Inc()
	}
	d.cfg.Logger.InfoContext(ctx, "decision", "decision", record.ID, "effect", r.Effect, "reason", r.Reasons[0].Code,
		"action", req.Intent.Action, "session", s.session.ID, "approval", record.Approval, "lease", record.Lease)
	return done{record.Answer, granted, s.act}, nil
}

func (d *Decider) read(ctx context.Context, req Request, caller identity.Caller) (s situation, err error) {
	err = d.cfg.Store.View(ctx, func(tx Tx) (err error) {
		s = situation{now: tx.Now(), agent: caller.Agent}
		if req.Approval != "" {
			a, err := approval.Find(ctx, tx, req.Approval, caller)
			if err != nil {
				return err
			}
			s.approval = &a
		}
		if err := d.findSession(ctx, tx, req, caller, &s); err != nil {
			return err
		}
		if req.IdempotencyKey != "" {
			if err := d.findReplay(ctx, tx, req, caller, &s); err != nil || s.replay != nil {
				return err
			}
		}
		s.recent, err = session.ReadRecent(ctx, tx, s.session)
		return err
	})
	if err != nil {
		return s, err
	}
	err = s.about(req, caller)
	return s, err
}

// about fills in the act that the request is about.
func (s *situation) about(req Request, caller identity.Caller) (err error) {
	s.act = intent.Act{
		User: s.user.Ref, Agent: caller.Agent.Ref, Session: s.session.ID,
		Intent: req.Intent, Resource: req.Resource, Context: req.Context,
	}
	s.hash, err = s.act.Hash()
	return err
}

func (d *Decider) findSession(ctx context.Context, tx Tx, req Request, caller identity.Caller, s *situation) (err error) {
	sessionID := req.Session
	if s.approval != nil {
		if sessionID == "" { // a continuation of a decision that opened its own session
			sessionID = s.approval.Session
		} else if sessionID != s.approval.Session {
			return fault.New(fault.NotFound, "no such approval in this session")
		}
	}
	switch {
	case sessionID != "":
		if s.session, err = session.Find(ctx, tx, sessionID, caller); err != nil {
			return err
		}
		if !s.session.Alive(s.now) {
			return sessionOver()
		}
		s.user = s.session.User
		if caller.User != nil {
			s.user = *caller.User
		}
	case !d.cfg.OpenOnDecide:
		return fault.Invalid("/session", "is missing; open one with POST /sessions")
	case caller.User == nil:
		return fault.New(fault.InvalidToken, "the tokens name no user: bring the user's token as subject_token, or a session")
	default:
		if err := session.Believe(ctx, tx, caller); err != nil {
			return err
		}
		s.user, s.newSession = *caller.User, true
		s.session = session.New(s.user, caller.Agent.Ref, session.Spec{}, d.cfg.Sessions, s.now)
		s.session.ScopeVersion, err = tx.ScopeVersion(ctx, s.session.Scope)
		return err
	}
	return nil
}

func (d *Decider) findReplay(ctx context.Context, tx Tx, req Request, caller identity.Caller, s *situation) error {
	replay, ok, err := tx.Replay(ctx, caller.Agent.Ref, req.IdempotencyKey)
	if err != nil || !ok || replay.Decision == req.supersedes {
		return err
	}
	digest, err := req.digest(s.user.Ref)
	if err != nil {
		return err
	}
	if digest != replay.Digest {
		return fault.New(fault.IdempotencyConflict, "this Idempotency-Key was used for another request")
	}
	record, err := tx.Decision(ctx, replay.Decision)
	if err != nil {
		return err
	}
	if s.newSession { // the first request opened the session; this one opens none
		s.newSession = false
		if s.session, err = tx.Session(ctx, record.Session); err != nil {
			return err
		}
	}
	if record.Answer.Approval != nil {
		a, err := tx.Approval(ctx, record.Approval)
		if err != nil {
			return err
		}
		record.Answer.Approval = ViewOf(a)
	}
	s.replay = &record
	return nil
}

// ruling is policy's result after the other steps had their say: a deny, or a
// grant or a plan that can be carried out.
type ruling struct {
	policy.Result
	input map[string]any // what it was made on
	grant *lease.Grant
	plan  *approval.Plan
	// rests is the approval that an allow uses up.
	rests *approval.Approval
}

// unmet is the approval that did not satisfy policy.
func (r ruling) unmet() string {
	if r.rests == nil {
		return ""
	}
	return r.rests.ID
}

func (r ruling) deny(code, message string) ruling {
	r.Result = policy.Result{
		Effect: policy.Deny, Reasons: []policy.Reason{{Code: code, Message: message}}, Labels: r.Labels, Policy: r.Policy,
	}
	return r
}

func (d *Decider) rule(ctx context.Context, req Request, caller identity.Caller, s situation) (ruling, error) {
	in := policy.Input{
		User: s.user, Agent: caller.Agent, Session: facts(s.session),
		Recent: policy.RecentFacts{Window: d.cfg.Sessions.Window, Labels: s.recent.Labels, Counters: s.recent.Counters},
		Intent: req.Intent, Resource: req.Resource, Context: req.Context, Time: s.now, IP: req.IP,
	}
	r := ruling{input: in.Document()}
	if a := s.approval; a != nil {
		code, message, ok := a.Usable(s.now, s.hash)
		if code != "" {
			r.Policy = d.cfg.Policy.Version()
			return r.deny(code, message), nil
		}
		if ok {
			in.Approvals = []policy.Approval{{Approver: a.Approver, ACR: a.ACR, AMR: a.AMR, AuthTime: a.AuthTime}}
			r.input, r.rests = in.Document(), a
		}
	}
	result, err := d.cfg.Policy.Decide(ctx, in)
	if err != nil {
		return ruling{}, err
	}
	r.Result = result
	switch {
	case r.Effect == policy.RequireCIBA:
		plan, refusal := approval.Resolve(r.Approval, s.act, s.user, d.cfg.Providers, d.cfg.PromptLife)
		if refusal != nil {
			return r.deny(refusal.Code, refusal.Message), nil
		}
		r.plan = &plan
	case r.Effect == policy.Allow && r.Credential != nil && req.widen == nil:
		c := r.Credential
		minter, ok := d.cfg.Minters[c.Minter]
		if !ok {
			return r.deny("credential_minter", "Policy names a minter that is not configured: "+c.Minter), nil
		}
		grant, refusal := minter.Plan(lease.Want{
			User: s.user.Ref, Scope: c.Scope, TTL: min(time.Duration(c.TTL), s.session.EndsAt.Sub(s.now)), Revocability: c.Revocability, Precision: c.Precision,
			SubjectToken: caller.UserToken() != "",
		})
		if refusal != nil {
			return r.deny(refusal.Code, refusal.Message), nil
		}
		if grant.Binds {
			grant.Cnf = confirmation(caller)
		}
		r.grant = &grant
	}
	if req.widen != nil {
		r = r.widening(s)
	}
	return r, nil
}

// commit makes the ruling durable, all of it or nothing.
func (d *Decider) commit(ctx context.Context, req Request, s situation, r ruling) (Record, *lease.Lease, error) {
	var record Record
	var granted *lease.Lease
	// Outside of the transaction, for which others may wait.
	made, err := d.keep(req, r)
	if err != nil {
		return record, nil, err
	}
	err = d.cfg.Store.Update(ctx, func(tx Tx) error {
		granted = nil
		record = Record{
			ID: id.New(id.Decision), At: tx.Now(), Session: s.session.ID, User: s.act.User, Agent: s.act.Agent, IntentHash: s.hash,
			Answer: Answer{
				Decision: r.Effect, Session: s.session.ID, Reasons: r.Reasons, Policy: r.Policy,
				Obligations: r.Obligations, Advice: r.Advice,
			},
		}
		record.Answer.DecisionID = record.ID
		if record.Answer.Obligations == nil {
			record.Answer.Obligations = []map[string]any{}
		}
		if err := d.settle(ctx, tx, req, s, r, record.ID); err != nil {
			return err
		}
		if r.Effect != policy.Deny && r.grant == nil {
			who := lease.Lease{Session: s.session.ID, Decision: record.ID, User: s.act.User, Agent: s.act.Agent, Policy: r.Policy.Revision}
			if err := lease.Allowed(ctx, tx, who, s.session.StartedAt); err != nil {
				return err
			}
		}
		kind := audit.DecisionDeny
		switch r.Effect {
		case policy.RequireCIBA:
			kind = audit.DecisionRequireCIBA
			plan := *r.plan // a yes after the session's end would be good for nothing
			plan.ExpiresIn = min(plan.ExpiresIn, s.session.EndsAt.Sub(tx.Now()))
			a, err := approval.Open(ctx, tx, approval.Opening{
				Plan: plan, Session: s.session.ID, Decision: record.ID, User: s.act.User, Agent: s.act.Agent,
				IntentHash: s.hash, MaxPending: d.cfg.MaxPending, Unmet: r.unmet(),
				Record: d.cfg.Keeper.Text(req.Intent.Action, plan.Message),
			})
			if err != nil {
				return err
			}
			record.Approval, record.Answer.Approval = a.ID, ViewOf(a)
		case policy.Allow:
			kind = audit.DecisionAllow
			if r.rests != nil {
				if err := approval.Consume(ctx, tx, *r.rests, record.ID); err != nil {
					return err
				}
				record.Approval = r.rests.ID
			}
			if r.grant != nil {
				l, err := d.grant(ctx, tx, s, r, record.ID)
				if err != nil {
					return err
				}
				record.Lease, granted = l.ID, &l
			}
		}
		if err := d.remember(ctx, tx, req, s, record.ID); err != nil {
			return err
		}
		if err := tx.InsertDecision(ctx, record); err != nil {
			return err
		}
		return d.record(ctx, tx, kind, req, s, r, made, record)
	})
	return record, granted, err
}

// grant begins the lease of an allow, or extends the one that it renews.
func (d *Decider) grant(ctx context.Context, tx Tx, s situation, r ruling, decision string) (lease.Lease, error) {
	l := lease.New(*r.grant, s.session.ID, s.session.EndsAt, decision, r.Policy.Revision, s.act, s.hash, tx.Now())
	if !tx.Now().Before(l.ExpiresAt) {
		return l, fault.New(fault.SessionEnded, "the session ends before a credential could be used")
	}
	if s.renews == nil {
		return l, lease.Begin(ctx, tx, l, s.session.StartedAt, d.cfg.Limits)
	}
	return lease.Renew(ctx, tx, *s.renews, l, s.session.StartedAt)
}

// made is what a decision was made on, as far as it is kept.
type made struct {
	input  audit.Input
	digest string
	kept   bool
}

func (d *Decider) keep(req Request, r ruling) (m made, err error) {
	m.input, m.digest, m.kept, err = d.cfg.Keeper.Keep(req.Intent.Action, r.input)
	return m, err
}

// record writes the decision's entry, and beside it what it was made on.
func (d *Decider) record(ctx context.Context, tx Tx, kind audit.Kind, req Request, s situation, r ruling, m made, record Record) error {
	if m.kept {
		m.input.Decision = record.ID
		if err := tx.PutInput(ctx, m.input); err != nil {
			return err
		}
	}
	detail := map[string]any{
		"action": req.Intent.Action, "resource": map[string]any{"type": req.Resource.Type, "id": req.Resource.ID},
		"intent_hash": s.hash, "reasons": d.shown(req.Intent.Action, r.Reasons), "policy": r.Policy,
		"input": map[string]any{"kept": m.input.Kept, "digest": m.digest},
	}
	if req.Intent.Purpose != "" {
		detail["purpose"] = d.cfg.Keeper.Text(req.Intent.Action, req.Intent.Purpose)
	}
	if len(r.Labels) > 0 {
		detail["labels"] = r.Labels
	}
	if len(r.Counters) > 0 {
		detail["counters"] = r.Counters
	}
	return audit.Append(ctx, tx, audit.Entry{
		Kind: kind, Session: s.session.ID, Decision: record.ID, Approval: record.Approval, Lease: record.Lease,
		User: s.act.User, Agent: s.act.Agent, Detail: detail,
	})
}

// shown is reasons as the record may have them: policy's words can repeat parameters.
func (d *Decider) shown(action string, reasons []policy.Reason) []policy.Reason {
	out := make([]policy.Reason, len(reasons))
	for i, r := range reasons {
		out[i] = policy.Reason{Code: r.Code, Message: d.cfg.Keeper.Text(action, r.Message)}
	}
	return out
}

// settle leaves the decision's marks on its session and on the pair. Only an allow has
// counters: the schema of policy's answer sees to it.
func (d *Decider) settle(ctx context.Context, tx Tx, req Request, s situation, r ruling, decision string) error {
	if s.newSession {
		if err := session.Open(ctx, tx, s.session, s.agent); err != nil {
			return err
		}
	}
	m := session.Settlement{Recent: s.recent, Marks: session.Marks{Labels: r.Labels, Counters: r.Counters}, Decision: decision}
	switch r.Effect {
	case policy.RequireCIBA: // while a person is asked, the session is not idle
		m.Busy = r.plan.ExpiresIn
	case policy.Allow:
		m.Widened = req.widen
	}
	return session.Settle(ctx, tx, s.session, d.cfg.Sessions, m)
}

func (d *Decider) remember(ctx context.Context, tx Tx, req Request, s situation, decision string) error {
	if req.IdempotencyKey == "" {
		return nil
	}
	digest, err := req.digest(s.user.Ref)
	if err != nil {
		return err
	}
	return tx.PutReplay(ctx, s.act.Agent, req.IdempotencyKey, Replay{digest, decision}, req.supersedes)
}

// replay gives a retry the decision that it got before. A credential is minted
// anew, to the same end, and the old one revoked: no secret is kept to be given
// out twice.
func (d *Decider) replay(ctx context.Context, s situation, caller identity.Caller) (done, error) {
	r := s.replay
	if r.Lease == "" {
		return done{answer: r.Answer}, nil
	}
	var next lease.Lease
	tried := false
	err := d.cfg.Store.Update(ctx, func(tx Tx) error {
		if err := tx.Guard(ctx); err != nil {
			return err
		}
		now := tx.Now()
		alive, err := tx.Session(ctx, r.Session)
		if err != nil {
			return err
		}
		current, err := tx.Decision(ctx, r.ID) // another retry may have been faster
		if err != nil {
			return err
		}
		old, err := tx.Lease(ctx, current.Lease)
		if err != nil {
			return err
		}
		_, minter := d.cfg.Minters[old.Minter]
		// An intent is of a request that is gone, or goes away with this.
		unmade := old.State == lease.Intent || old.EndReason == lease.EndMintFailed
		again := minter && (old.Alive(now) || unmade && now.Before(old.ExpiresAt))
		revoked, err := tx.RevokedSince(ctx, old)
		if err != nil {
			return err
		}
		if !again || revoked || !alive.Alive(now) {
			return fault.New(fault.LeaseEnded, "the credential of this decision has ended; ask again with a new Idempotency-Key")
		}
		if tried = tried || d.cfg.Breakers[old.Minter].Allow(); !tried {
			return brokenTarget()
		}
		next = old
		if next.Binds { // the key may be another by now, and is the agent's
			next.Cnf = confirmation(caller)
		}
		next.ID = id.New(id.Lease)
		next = next.Fresh(now)
		if _, err := lease.EndOne(ctx, tx, old, lease.End{Reason: lease.EndReissued}); err != nil {
			return err
		}
		switch err := lease.Begin(ctx, tx, next, alive.StartedAt, d.cfg.Limits); {
		case errors.Is(err, lease.ErrHalted):
			return fault.New(fault.LeaseEnded, "an operator has stopped what this credential is about")
		case err != nil:
			return err
		}
		if err := tx.SetDecisionLease(ctx, r.ID, next.ID); err != nil {
			return err
		}
		return audit.Append(ctx, tx, audit.Entry{
			Kind: audit.DecisionReissued, Session: r.Session, Decision: r.ID, Lease: next.ID, User: r.User, Agent: r.Agent,
			Detail: map[string]any{"replaces": old.ID},
		})
	})
	if err != nil {
		return done{}, err
	}
	d.cfg.Metrics.Leases.WithLabelValues(next.Kind, lease.EndReissued).Inc()
	return done{r.Answer, &next, s.act}, nil
}

// confirmation is the key that a credential for the caller is bound to, nil for none.
func confirmation(c identity.Caller) *dpop.Confirmation {
	if !c.Held.Bound() {
		return nil
	}
	return &c.Held
}

func facts(s session.Session) policy.SessionFacts {
	f := policy.SessionFacts{ID: s.ID, Labels: s.Labels, Counters: s.Counters, StartedAt: s.StartedAt}
	if s.Task != nil {
		f.Task = map[string]any{"text": s.Task.Text, "source": string(s.Task.Source)}
	}
	if e := s.Envelope; e != nil {
		f.Envelope = e.Document()
		f.Envelope["source"] = string(e.Source)
	}
	return f
}
