package client

import (
	"encoding/json"
	"time"
)

// Request asks for one decision.
type Request struct {
	// SubjectToken is the user's token, where neither the agent's own token nor the
	// session names the user.
	SubjectToken string         `json:"subject_token,omitempty"`
	Session      string         `json:"session,omitempty"`
	Intent       Intent         `json:"intent"`
	Resource     Resource       `json:"resource"`
	Context      map[string]any `json:"context,omitempty"`
	// Approval is of an earlier require_ciba answer to the same request.
	Approval string `json:"approval,omitempty"`

	// Wait lets Writ hold its answer until the human has decided.
	Wait time.Duration `json:"-"`
	// IdempotencyKey makes a repetition get the same decision. "": a fresh one.
	IdempotencyKey string `json:"-"`
}

// Intent is what the agent wants to do. Amounts that are no exact IEEE double go
// as strings.
type Intent struct {
	Action     string         `json:"action"`
	Parameters map[string]any `json:"parameters,omitempty"`
	Purpose    string         `json:"purpose,omitempty"` // for people and the log
}

// Resource is what it would do it to.
type Resource struct {
	Type       string         `json:"type"`
	ID         string         `json:"id"`
	Properties map[string]any `json:"properties,omitempty"`
}

// Effect is the outcome of a decision.
type Effect string

// The effects. Whatever is not Allow is no permission to act.
const (
	Allow       Effect = "allow"
	Deny        Effect = "deny"
	RequireCIBA Effect = "require_ciba"
)

// Decision is Writ's answer.
type Decision struct {
	ID          string            `json:"decision_id"`
	Effect      Effect            `json:"decision"`
	Session     string            `json:"session"`
	Reasons     []Reason          `json:"reasons"`
	Credential  *Credential       `json:"credential"` // with Allow, where policy mints one
	Approval    *Approval         `json:"approval"`   // with RequireCIBA
	Obligations []json.RawMessage `json:"obligations"`
	Advice      json.RawMessage   `json:"advice"`
	Policy      PolicyVersion     `json:"policy"`
}

// Reason says why.
type Reason struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

// Credential is good for what was decided, until it expires or is released.
type Credential struct {
	Lease        string            `json:"lease"`
	Kind         string            `json:"kind"`
	ExpiresAt    time.Time         `json:"expires_at"`
	Revocability string            `json:"revocability"` // instant, introspect, status or expiry
	Precision    string            `json:"precision"`    // exact or coarse
	Scope        json.RawMessage   `json:"scope"`
	Secret       map[string]string `json:"secret"` // by kind; jwt, oauth: token, token_type
}

// Approval is a human answer that is awaited or given.
type Approval struct {
	ID        string    `json:"id"`
	Status    string    `json:"status"` // pending, approved, consumed, denied, expired, failed or cancelled
	Code      string    `json:"code"`   // show it to the user: their phone shows the same
	ExpiresAt time.Time `json:"expires_at"`
	Interval  int       `json:"interval"` // seconds between two looks
	Reason    string    `json:"reason"`
}

// PolicyVersion names the policies that decided.
type PolicyVersion struct {
	Revision string `json:"revision"`
	Digest   string `json:"digest"`
}

// SessionRequest opens a session.
type SessionRequest struct {
	SubjectToken string    `json:"subject_token,omitempty"`
	Task         string    `json:"task,omitempty"`
	Envelope     *Envelope `json:"envelope,omitempty"`
	ExpiresIn    int       `json:"expires_in,omitempty"` // seconds
	// RedirectURI is where a sign-in ends, if one is needed: one that is registered for
	// the agent. State comes back with it. Both are refused where none is needed.
	RedirectURI string `json:"redirect_uri,omitempty"`
	State       string `json:"state,omitempty"`
}

// Envelope is the most that the session will need; policy holds it to that.
type Envelope struct {
	Actions   []string          `json:"actions"`
	Resources []ResourcePattern `json:"resources"`
	Limits    map[string]int64  `json:"limits,omitempty"` // the most that counters of the session may reach
	Source    string            `json:"source,omitempty"` // of an answer: whose word it is
}

// EnvelopeRequest gives a session another envelope.
type EnvelopeRequest struct {
	SubjectToken string   `json:"subject_token,omitempty"`
	Envelope     Envelope `json:"envelope"` // the whole of it
	Approval     string   `json:"approval,omitempty"`
	// Wait holds the answer until a person has decided, or that long.
	Wait time.Duration `json:"-"`
}

// EnvelopeAnswer is what became of it.
type EnvelopeAnswer struct {
	// Decision is nil where the envelope narrowed, which nobody has to decide.
	Decision *Decision `json:"decision"`
	Session  Session   `json:"session"` // as it is now
}

// ResourcePattern matches resources of a type by a glob over their ids.
type ResourcePattern struct {
	Type string `json:"type"`
	ID   string `json:"id"`
}

// Session is one agent working on one task for one user.
type Session struct {
	ID        string    `json:"session"`
	Status    string    `json:"status"` // active or ended
	User      Ref       `json:"user"`
	Agent     Ref       `json:"agent"`
	Task      *Task     `json:"task"`
	Envelope  *Envelope `json:"envelope"`
	StartedAt time.Time `json:"started_at"`
	EndsAt    time.Time `json:"ends_at"`
	IdleAt    time.Time `json:"idle_at"` // ends then unless something is decided before; zero never
	EndReason string    `json:"end_reason"`

	Labels   []string         `json:"labels"`
	Counters map[string]int64 `json:"counters"`
}

// Task is what the user wants done, and whose word that is: "agent" or "user".
type Task struct {
	Text   string `json:"text"`
	Source string `json:"source"`
}

// Ref names a principal.
type Ref struct {
	Issuer  string `json:"iss"`
	Subject string `json:"sub"`
}

// Lease is the life of a credential.
type Lease struct {
	ID        string    `json:"lease"`
	State     string    `json:"state"` // intent, active, revoking or revoked
	Session   string    `json:"session"`
	Decision  string    `json:"decision_id"`
	Kind      string    `json:"kind"`
	ExpiresAt time.Time `json:"expires_at"`
	EndedAt   time.Time `json:"ended_at"` // zero until it ends
	EndReason string    `json:"end_reason"`
	GoneAt    time.Time `json:"gone_at"` // when its end was seen; zero until then
	// StuckSince is since when its end should have been seen; zero while that is no alarm.
	StuckSince time.Time `json:"stuck_since"`
}
