package sqlstore

import (
	"context"
	"time"

	"github.com/writsec/writ/internal/decision"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/session"
)

// InsertDecision implements decision.Tx.
func (t *Tx) InsertDecision(ctx context.Context, r decision.Record) error {
	r.Answer.Credential = nil // whatever the caller thinks: a secret is never stored
	return t.insert(ctx, "insert decision", `
		INSERT INTO decisions (id, at, session, user_issuer, user_subject, agent_issuer, agent_subject, intent_hash, answer, approval, lease, effect)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)`,
		r.ID, micros(r.At), r.Session, r.User.Issuer, r.User.ID, r.Agent.Issuer, r.Agent.ID, r.IntentHash,
		asJSON(r.Answer), r.Approval, r.Lease, r.Answer.Decision)
}

// Decision implements decision.Tx.
func (t *Tx) Decision(ctx context.Context, id string) (decision.Record, error) {
	return one(ctx, t, "read decision", scanDecision, `SELECT `+decisionColumns+` FROM decisions WHERE id = $1`+t.kept(), id)
}

const decisionColumns = `id, at, session, user_issuer, user_subject, agent_issuer, agent_subject, intent_hash, answer, approval, lease,
	outcome, outcome_by`

func scanDecision(row scanner) (r decision.Record, err error) {
	err = row.Scan(&r.ID, timeOf(&r.At), &r.Session, &r.User.Issuer, &r.User.ID, &r.Agent.Issuer, &r.Agent.ID, &r.IntentHash,
		jsonOf(&r.Answer), &r.Approval, &r.Lease, &r.Outcome, &r.OutcomeBy)
	return r, err
}

// SetDecisionLease implements decision.Tx.
func (t *Tx) SetDecisionLease(ctx context.Context, decision, lease string) error {
	_, err := t.exec(ctx, "set decision lease", `UPDATE decisions SET lease = $1 WHERE id = $2`, lease, decision)
	return err
}

// SetOutcome implements decision.Tx.
func (t *Tx) SetOutcome(ctx context.Context, id string, o decision.Outcome) error {
	return t.change(ctx, session.ErrChanged, "set outcome",
		`UPDATE decisions SET outcome = $1, outcome_by = 'agent' WHERE id = $2 AND outcome_by <> 'agent'`, o, id)
}

// Replay implements decision.Tx.
func (t *Tx) Replay(ctx context.Context, agent identity.Ref, key string) (decision.Replay, bool, error) {
	return found(one(ctx, t, "read idempotency key", func(row scanner) (r decision.Replay, err error) {
		return r, row.Scan(&r.Digest, &r.Decision)
	}, `SELECT digest, decision FROM replays WHERE agent_issuer = $1 AND agent_subject = $2 AND key = $3`,
		agent.Issuer, agent.ID, key))
}

// PutReplay implements decision.Tx.
func (t *Tx) PutReplay(ctx context.Context, agent identity.Ref, key string, r decision.Replay, superseded string) error {
	return t.change(ctx, session.ErrChanged, "put idempotency key", `
		INSERT INTO replays (agent_issuer, agent_subject, key, digest, decision, at) VALUES ($1, $2, $3, $4, $5, $6)
		ON CONFLICT (agent_issuer, agent_subject, key) DO UPDATE SET decision = excluded.decision
		WHERE replays.decision = $7`,
		agent.Issuer, agent.ID, key, r.Digest, r.Decision, micros(t.now), superseded)
}

// ForgetReplays implements revocation.Tx.
func (t *Tx) ForgetReplays(ctx context.Context, before time.Time, limit int) (int64, error) {
	return t.exec(ctx, "forget idempotency keys", `DELETE FROM replays WHERE (agent_issuer, agent_subject, key) IN
		(SELECT agent_issuer, agent_subject, key FROM replays WHERE at < $1 ORDER BY at LIMIT $2)`, micros(before), limit)
}
