// Package session is one agent working on one task for one user. Every decision,
// approval and lease belongs to a session and ends with it.
package session

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"time"
	"unicode/utf8"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/reservation"
)

// Source says whose word something is.
type Source string

// The sources.
const (
	SourceAgent Source = "agent" // only the agent said so
	SourceUser  Source = "user"  // the user consented to it
)

// Task is what the user wants done.
type Task struct {
	Text   string `json:"text"`
	Source Source `json:"source"`
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
	// AgentSignedOut is the same of the agent's account.
	AgentSignedOut time.Time
	// IdleAt is when it ends because nothing was decided in it for so long; zero never.
	IdleAt time.Time
	// Scope is what its user and agent share over all their sessions, and ScopeVersion
	// grows with every mark that is left there.
	Scope        string
	ScopeVersion int64
}

// Alive reports whether s can still carry decisions at now.
func (s Session) Alive(now time.Time) bool {
	idle := !s.IdleAt.IsZero() && !now.Before(s.IdleAt)
	return s.EndedAt.IsZero() && now.Before(s.EndsAt) && !idle && !s.IsSignedOut()
}

// IsSignedOut reports whether the user was signed out since the session's token, or
// the agent since its start.
func (s Session) IsSignedOut() bool {
	began := s.StartedAt.Truncate(time.Second) // as issuers count
	agentOut := !s.AgentSignedOut.IsZero() && !began.After(s.AgentSignedOut)
	return agentOut || !s.User.Believed(s.SignedOut)
}

// ScopeOf names what a user and an agent share. It is a digest because whoever
// chooses the names must not be able to make two pairs look like one.
func ScopeOf(user, agent identity.Ref) string {
	b, err := json.Marshal([]string{user.Issuer, user.ID, agent.Issuer, agent.ID})
	if err != nil {
		panic(err) // strings always have a JSON form
	}
	sum := sha256.Sum256(b)
	return "pair:" + hex.EncodeToString(sum[:])
}

// BelongsTo reports whether the caller may know that s exists: it is the agent's
// own, and of the user that the caller brings, if it brings one.
func (s Session) BelongsTo(c identity.Caller) bool {
	return s.Agent == c.Agent.Ref && (c.User == nil || s.User.Ref == c.User.Ref)
}

// Settings bounds sessions.
type Settings struct {
	DefaultAge time.Duration
	MaxAge     time.Duration
	// Idle is how long a session lives without a decision; zero as long as its age.
	Idle time.Duration
	// Window is how long marks stay on a pair of user and agent.
	Window time.Duration
}

// Spec is what an opener asks for.
type Spec struct {
	Task     string
	Envelope *Envelope
	Age      time.Duration // zero: the default
	// Source says whose word task and envelope are; "" is the agent's.
	Source Source
}

const maxTask = 2048 // characters

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
	return s.Envelope.Check()
}

// New makes the session that spec asks for. It lives once Open has stored it.
func New(user identity.Principal, agent identity.Ref, spec Spec, limits Settings, now time.Time) Session {
	age := spec.Age
	if age == 0 {
		age = limits.DefaultAge
	}
	s := Session{
		ID: id.New(id.Session), Version: 1, User: user, Agent: agent,
		StartedAt: now, EndsAt: now.Add(age), Counters: map[string]int64{}, Scope: ScopeOf(user.Ref, agent),
	}
	if limits.Idle > 0 {
		s.IdleAt = now.Add(limits.Idle)
	}
	source := cmp.Or(spec.Source, SourceAgent)
	if spec.Task != "" {
		s.Task = &Task{Text: spec.Task, Source: source}
	}
	if spec.Envelope != nil {
		e := *spec.Envelope
		e.Source = source
		s.Envelope = &e
	}
	return s
}

// ErrChanged says that a session is not at the version that was read.
var ErrChanged = errors.New("session changed since it was read")

// Tx is what sessions need of a transaction.
type Tx interface {
	audit.Tx
	reservation.Tx
	InsertSession(ctx context.Context, s Session) error
	// Session returns fault.NotFound for an unknown id.
	Session(ctx context.Context, id string) (Session, error)
	// UpdateSession stores labels, counters, envelope, idle end and end of a session that
	// has not ended, if it is still at s.Version; otherwise ErrChanged. touch increments
	// the version.
	UpdateSession(ctx context.Context, s Session, touch bool) error
	// SignedOut is when the user, or the login sid of theirs, was last signed out; zero
	// for never.
	SignedOut(ctx context.Context, user identity.Ref, sid string) (time.Time, error)
	// CheckSession fails with ErrChanged unless the session has not ended, is still at
	// s.Version, and its scope at s.ScopeVersion. Until the commit it stays so, but for
	// the scope, of which it is true at the moment of the check.
	CheckSession(ctx context.Context, s Session) error
}

// Believe refuses a caller whose tokens are from before a sign-out.
func Believe(ctx context.Context, tx Tx, c identity.Caller) error {
	who := []identity.Principal{prover(c)}
	if c.User != nil {
		who = append(who, *c.User)
	}
	for _, p := range who {
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

// prover is the agent with the claims of the token that names it, which is its user's
// where it has none of its own.
func prover(c identity.Caller) identity.Principal {
	agent := c.Agent
	if len(agent.Claims) == 0 && c.User != nil {
		agent.Claims = c.User.Claims
	}
	return agent
}

// Open stores a session made by New, for an agent and user that are still believed.
func Open(ctx context.Context, tx Tx, s Session, agent identity.Principal) error {
	if err := Believe(ctx, tx, identity.Caller{Agent: agent, User: &s.User}); err != nil {
		return err
	}
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
	case err != nil:
		return s, err
	case !prover(c).Believed(s.AgentSignedOut):
		return Session{}, identity.ErrSignedOut
	case c.User == nil:
		return s, nil
	case c.User.Login() != s.User.Login():
		return s, Believe(ctx, tx, c)
	case !c.User.Believed(s.SignedOut):
		return Session{}, identity.ErrSignedOut
	}
	return s, nil
}

func notFound() error { return fault.New(fault.NotFound, "no such session of this agent and user") }

// Cause is why a session ends.
type Cause struct {
	Reason string
	// Operator ends it by a Revocation; zero and "" for others.
	Operator   identity.Ref
	Revocation string
}

// End ends a live session. Its leases and approvals are the caller's to end in the same
// transaction. Ending twice changes nothing.
func End(ctx context.Context, tx Tx, s Session, c Cause) error {
	if !s.EndedAt.IsZero() {
		return nil
	}
	s.EndedAt, s.EndReason = tx.Now(), c.Reason
	if err := tx.UpdateSession(ctx, s, true); err != nil {
		return err
	}
	detail := map[string]any{"reason": c.Reason}
	if c.Revocation != "" {
		detail["revocation"] = c.Revocation
	}
	return audit.Append(ctx, tx, audit.Entry{
		Kind: audit.SessionEnded, Session: s.ID, User: s.User.Ref, Agent: s.Agent, Operator: c.Operator, Detail: detail,
	})
}
