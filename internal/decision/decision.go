// Package decision owns the one straight line from a question to an answer:
// identity → session → policy → commit → mint. Each step is a package of its own;
// this one only orders them, so that nothing is minted before the decision is
// durable and nothing is answered that is not recorded.
package decision

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"time"

	"github.com/writsec/writ/internal/approval"
	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/intent"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/policy"
	"github.com/writsec/writ/internal/session"
)

// Request is one POST /decide, read but not believed.
type Request struct {
	Presented identity.Presented
	Session   string // "" only where sessions open by themselves
	Intent    intent.Intent
	Resource  intent.Resource
	Context   map[string]any
	Approval  string // of an earlier answer: this is a continuation

	IdempotencyKey string
	// Wait holds a require_ciba answer until the approval is decided, or that long.
	Wait time.Duration
	IP   string

	// supersedes is the require_ciba decision of this same request that a wait turned
	// into a continuation; the idempotency key passes on from it.
	supersedes string
	// tried says that the breaker of its target let this request through.
	tried *bool
	// widen is the envelope that the act is about: Writ's own question.
	widen *session.Envelope
}

// digest identifies the question, for idempotency: everything but tokens, and the
// user that they name. An absent object is an empty one, as in the intent hash.
func (r Request) digest(user identity.Ref) (string, error) {
	if r.supersedes != "" {
		r.Approval = "" // a wait put it there; the request itself had none
	}
	if len(r.Context) == 0 {
		r.Context = nil // the others leave empty objects out by themselves
	}
	data, err := json.Marshal([]any{r.Session, r.Intent, r.Resource, r.Context, r.Approval, user})
	if err != nil {
		return "", fmt.Errorf("digest request: %w", err)
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:]), nil
}

// Answer is what /decide says.
type Answer struct {
	DecisionID  string           `json:"decision_id"`
	Decision    policy.Effect    `json:"decision"`
	Session     string           `json:"session"`
	Reasons     []policy.Reason  `json:"reasons"`
	Credential  *Credential      `json:"credential,omitempty"`
	Approval    *Approval        `json:"approval,omitempty"`
	Obligations []map[string]any `json:"obligations"`
	Advice      map[string]any   `json:"advice,omitempty"`
	Policy      policy.Version   `json:"policy"`
}

// LogValue keeps the secret of a credential out of logs.
func (a Answer) LogValue() slog.Value { return slog.StringValue(a.DecisionID) }

// Credential is a minted credential with its secret.
type Credential struct {
	Lease        string         `json:"lease"`
	Kind         string         `json:"kind"`
	ExpiresAt    time.Time      `json:"expires_at"`
	Revocability string         `json:"revocability"`
	Precision    string         `json:"precision"`
	Scope        map[string]any `json:"scope"`
	Secret       lease.Secret   `json:"secret"`
}

// LogValue keeps the secret out of logs.
func (c Credential) LogValue() slog.Value { return slog.StringValue(c.Lease) }

// Approval is the state of a prompt, as agents see it.
type Approval struct {
	ID        string    `json:"id"`
	Status    string    `json:"status"`
	Code      string    `json:"code"`
	ExpiresAt time.Time `json:"expires_at"`
	// Interval is how many seconds to leave between two looks at the status.
	Interval int    `json:"interval"`
	Reason   string `json:"reason,omitempty"`
}

const lookInterval = 5 // seconds

// ViewOf shows an approval as agents see it.
func ViewOf(a approval.Approval) *Approval {
	return &Approval{
		ID: a.ID, Status: a.Status(), Code: a.Code, ExpiresAt: a.ExpiresAt, Interval: lookInterval, Reason: a.Reason,
	}
}

// Record is a decision as it is kept.
type Record struct {
	ID         string
	At         time.Time
	Session    string
	User       identity.Ref
	Agent      identity.Ref
	IntentHash string
	Answer     Answer // without credential: a secret is never stored
	Approval   string // opened or consumed
	Lease      string

	// Outcome is what became of the act, "" while nobody said; OutcomeBy is agent, or
	// writ where the credential ended before the agent said anything.
	Outcome, OutcomeBy string
}

// Replay ties an idempotency key to the decision that answered it.
type Replay struct {
	Digest   string
	Decision string
}

// Tx is what a decision needs of a transaction.
type Tx interface {
	session.Tx
	approval.Tx
	lease.Tx
	InsertDecision(ctx context.Context, r Record) error
	// PutInput stores what the decision was made on.
	PutInput(ctx context.Context, in audit.Input) error
	Decision(ctx context.Context, id string) (Record, error)
	// SetDecisionLease replaces the lease of a decision.
	SetDecisionLease(ctx context.Context, decision, lease string) error
	// SetOutcome stores what the agent says became of a decision, once; otherwise
	// session.ErrChanged.
	SetOutcome(ctx context.Context, decision string, o Outcome) error
	// Replay returns what an agent's idempotency key answered, ok false if nothing.
	Replay(ctx context.Context, agent identity.Ref, key string) (r Replay, ok bool, err error)
	// PutReplay ties the key to r. A key that is tied already passes on only from the
	// decision superseded; otherwise session.ErrChanged.
	PutReplay(ctx context.Context, agent identity.Ref, key string, r Replay, superseded string) error
}

// Store runs transactions.
type Store interface {
	Update(ctx context.Context, f func(Tx) error) error
	View(ctx context.Context, f func(Tx) error) error
}
