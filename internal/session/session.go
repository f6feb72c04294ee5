// Package session is one agent working on one task for one user. Every decision,
// approval and lease belongs to a session and ends with it.
package session

import (
	"context"
	"errors"
	"maps"
	"slices"
	"time"
	"unicode/utf8"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/identity"
)

// Source says whose word something is.
type Source string

// SourceAgent marks what only the agent said.
const SourceAgent Source = "agent"

// Task is what the user wants done.
type Task struct {
	Text   string `json:"text"`
	Source Source `json:"source"`
}

// Envelope is what the session declared it will need. Patterns are globs, in
// actions with "." as the separator.
type Envelope struct {
	Actions   []string          `json:"actions"`
	Resources []ResourcePattern `json:"resources"`
	Source    Source            `json:"source"`
}

// ResourcePattern matches resources of one type whose id matches a glob.
type ResourcePattern struct {
	Type string `json:"type"`
	ID   string `json:"id"`
}

// Session is one session. Version grows with every change of what a decision
// depends on, so that a decision made on an older version is made again.
type Session struct {
	ID        string
	Version   int64
	User      identity.Principal
	Agent     identity.Ref
	Task      *Task
	Envelope  *Envelope
	Labels    []string
	Counters  map[string]int64
	StartedAt time.Time
	EndsAt    time.Time
	EndedAt   time.Time // zero while it lives
	EndReason string
	// SignedOut is when the user, or the login that the session is of, was last signed
	// out; zero for never.
	SignedOut time.Time
}

// Alive reports whether s can still carry decisions at now.
func (s Session) Alive(now time.Time) bool {
	return s.EndedAt.IsZero() && now.Before(s.EndsAt) && !s.IsSignedOut()
}

// IsSignedOut reports whether the user signed out since the session's token.
func (s Session) IsSignedOut() bool { return !s.User.Believed(s.SignedOut) }

// BelongsTo reports whether the caller may know that s exists: it is the agent's
// own, and of the user that the caller brings, if it brings one.
func (s Session) BelongsTo(c identity.Caller) bool {
	return s.Agent == c.Agent.Ref && (c.User == nil || s.User.Ref == c.User.Ref)
}

// Settings bounds sessions.
type Settings struct {
	DefaultAge time.Duration
	MaxAge     time.Duration
}

// Spec is what an opener asks for.
type Spec struct {
	Task     string
	Envelope *Envelope
	Age      time.Duration // zero: the default
}

// The limits of what an opener can declare.
const (
	maxTask     = 2048
	maxPatterns = 64
	maxPattern  = 512
)

// Check holds the spec to its limits.
func (s Spec) Check(limits Settings) error {
	if utf8.RuneCountInString(s.Task) > maxTask {
		return fault.Invalid("/task", "is longer than %d characters", maxTask)
	}
	if s.Age < 0 || s.Age > limits.MaxAge {
		return fault.Invalid("/expires_in", "expected 1 to %d seconds", int(limits.MaxAge.Seconds()))
	}
	if s.Envelope == nil {
		return nil
	}
	e := s.Envelope
	if len(e.Actions) == 0 || len(e.Actions) > maxPatterns {
		return fault.Invalid("/envelope/actions", "expected 1 to %d patterns", maxPatterns)
	}
	if len(e.Resources) == 0 || len(e.Resources) > maxPatterns {
		return fault.Invalid("/envelope/resources", "expected 1 to %d patterns", maxPatterns)
	}
	bad := func(p string) bool { return p == "" || len(p) > maxPattern }
	for _, a := range e.Actions {
		if bad(a) {
			return fault.Invalid("/envelope/actions", "a pattern has 1 to %d bytes", maxPattern)
		}
	}
	for _, r := range e.Resources {
		if bad(r.Type) || bad(r.ID) {
			return fault.Invalid("/envelope/resources", "type and id have 1 to %d bytes", maxPattern)
		}
	}
	return nil
}

// New makes the session that spec asks for. It lives once Open has stored it.
func New(user identity.Principal, agent identity.Ref, spec Spec, limits Settings, now time.Time) Session {
	age := spec.Age
	if age == 0 {
		age = limits.DefaultAge
	}
	s := Session{
		ID: id.New(id.Session), Version: 1, User: user, Agent: agent,
		StartedAt: now, EndsAt: now.Add(age), Counters: map[string]int64{},
	}
	if spec.Task != "" {
		s.Task = &Task{Text: spec.Task, Source: SourceAgent}
	}
	if spec.Envelope != nil {
		e := *spec.Envelope
		e.Source = SourceAgent
		s.Envelope = &e
	}
	return s
}

// ErrChanged says that a session is not at the version that was read.
var ErrChanged = errors.New("session changed since it was read")

// Tx is what sessions need of a transaction.
type Tx interface {
	audit.Tx
	Now() time.Time
	InsertSession(ctx context.Context, s Session) error
	// Session returns fault.NotFound for an unknown id.
	Session(ctx context.Context, id string) (Session, error)
	// UpdateSession stores labels, counters and end, and increments the version, if
	// it is still s.Version; otherwise ErrChanged. touch false only checks.
	UpdateSession(ctx context.Context, s Session, touch bool) error
	// SignedOut is when the user, or the login sid of theirs, was last signed out; zero
	// for never.
	SignedOut(ctx context.Context, user identity.Ref, sid string) (time.Time, error)
}

// Believe refuses a caller whose tokens are from before a sign-out.
func Believe(ctx context.Context, tx Tx, c identity.Caller) error {
	who := []identity.Principal{c.Agent}
	if c.User != nil {
		who = append(who, *c.User)
	}
	for _, p := range who {
		if len(p.Claims) == 0 { // named by the other's token
			continue
		}
		at, err := tx.SignedOut(ctx, p.Ref, p.Login())
		if err != nil {
			return err
		}
		if !p.Believed(at) {
			return identity.ErrSignedOut
		}
	}
	return nil
}

// Open stores a session made by New.
func Open(ctx context.Context, tx Tx, s Session) error {
	if err := tx.InsertSession(ctx, s); err != nil {
		return err
	}
	detail := map[string]any{"ends_at": s.EndsAt}
	if s.Task != nil {
		detail["task"] = s.Task
	}
	if s.Envelope != nil {
		detail["envelope"] = s.Envelope
	}
	return audit.Append(ctx, tx, audit.Entry{
		Kind: audit.SessionOpened, Session: s.ID, User: s.User.Ref, Agent: s.Agent, Detail: detail,
	})
}

// Find returns a session of the caller's, dead or alive. One that isn't theirs is
// as good as none: fault.NotFound.
func Find(ctx context.Context, tx Tx, sessionID string, c identity.Caller) (Session, error) {
	if !id.Valid(id.Session, sessionID) {
		return Session{}, notFound()
	}
	s, err := tx.Session(ctx, sessionID)
	switch {
	case fault.Is(err, fault.NotFound) || err == nil && !s.BelongsTo(c):
		return Session{}, notFound()
	case err != nil || c.User == nil:
		return s, err
	case c.User.Login() != s.User.Login():
		return s, Believe(ctx, tx, c)
	case !c.User.Believed(s.SignedOut):
		return Session{}, identity.ErrSignedOut
	}
	return s, nil
}

func notFound() error { return fault.New(fault.NotFound, "no such session of this agent and user") }

// Settle leaves a decision's marks on the session, and in any case fails with
// ErrChanged if the session is no longer what the decision was made on, or is over.
func Settle(ctx context.Context, tx Tx, s Session, labels []string, counters map[string]int64) error {
	if !s.Alive(tx.Now()) {
		return ErrChanged
	}
	next := s
	next.Labels = union(s.Labels, labels)
	next.Counters = maps.Clone(s.Counters)
	if next.Counters == nil {
		next.Counters = map[string]int64{}
	}
	changed := len(next.Labels) != len(s.Labels)
	for name, amount := range counters {
		if amount == 0 {
			continue
		}
		sum := next.Counters[name] + amount
		if sum < 0 { // over int64: never wrap round to "nothing spent"
			return fault.New(fault.Internal, "counter overflow")
		}
		next.Counters[name] = sum
		changed = true
	}
	return tx.UpdateSession(ctx, next, changed)
}

func union(a, b []string) []string {
	out := slices.Concat(a, b)
	slices.Sort(out)
	return slices.Compact(out)
}

// End ends a live session for the reason given. Its leases and approvals are the
// caller's to end in the same transaction. Ending twice changes nothing.
func End(ctx context.Context, tx Tx, s Session, reason string, operator identity.Ref) error {
	if !s.EndedAt.IsZero() {
		return nil
	}
	s.EndedAt, s.EndReason = tx.Now(), reason
	if err := tx.UpdateSession(ctx, s, true); err != nil {
		return err
	}
	return audit.Append(ctx, tx, audit.Entry{
		Kind: audit.SessionEnded, Session: s.ID, User: s.User.Ref, Agent: s.Agent, Operator: operator,
		Detail: map[string]any{"reason": reason},
	})
}
