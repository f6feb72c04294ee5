package sqlstore

import (
	"context"

	"github.com/writsec/writ/internal/lease"
)

const leaseColumns = `id, state, session, decision, user_issuer, user_subject, agent_issuer, agent_subject, intent_hash,
	grant_json, created_at, expires_at, ended_at, end_reason`

func scanLease(r scanner) (l lease.Lease, err error) {
	err = r.Scan(&l.ID, &l.State, &l.Session, &l.Decision, &l.User.Issuer, &l.User.ID, &l.Agent.Issuer, &l.Agent.ID, &l.IntentHash,
		jsonOf(&l.Grant), timeOf(&l.CreatedAt), timeOf(&l.ExpiresAt), timeOf(&l.EndedAt), &l.EndReason)
	return l, err
}

// InsertLease implements lease.Tx.
func (t *Tx) InsertLease(ctx context.Context, l lease.Lease) error {
	return t.insert(ctx, "insert lease", `INSERT INTO leases (`+leaseColumns+`)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)`,
		l.ID, l.State, l.Session, l.Decision, l.User.Issuer, l.User.ID, l.Agent.Issuer, l.Agent.ID, l.IntentHash,
		asJSON(l.Grant), micros(l.CreatedAt), micros(l.ExpiresAt), micros(l.EndedAt), l.EndReason)
}

// Lease implements lease.Tx.
func (t *Tx) Lease(ctx context.Context, id string) (lease.Lease, error) {
	return one(ctx, t, "read lease", scanLease, `SELECT `+leaseColumns+` FROM leases WHERE id = $1`+t.kept(), id)
}

// EndLease implements lease.Tx.
func (t *Tx) EndLease(ctx context.Context, id, reason string) error {
	return t.change(ctx, lease.ErrStale, "end lease",
		`UPDATE leases SET state = 'revoked', ended_at = $1, end_reason = $2 WHERE id = $3 AND state = 'active'`,
		micros(t.now), reason, id)
}

// ActiveLeases implements lease.Tx.
func (t *Tx) ActiveLeases(ctx context.Context, s lease.Selection, limit int) ([]lease.Lease, error) {
	where, args, lock := `FALSE`, []any{limit}, t.kept()
	switch {
	case s.Decision != "":
		where, args = `decision = $2`, append(args, s.Decision)
	case s.Session != "":
		where, args = `session = $2`, append(args, s.Session)
	case !s.User.IsZero():
		where, args = `user_subject = $2 AND user_issuer = $3`, append(args, s.User.ID, s.User.Issuer)
	case !s.Agent.IsZero():
		where, args = `agent_subject = $2 AND agent_issuer = $3`, append(args, s.Agent.ID, s.Agent.Issuer)
	case s.Due:
		where, args, lock = `expires_at <= $2`, append(args, micros(t.now)), t.claimed()
	case s.All:
		where = `TRUE`
	}
	return some(ctx, t, "list active leases", scanLease,
		`SELECT `+leaseColumns+` FROM leases WHERE state = 'active' AND `+where+` ORDER BY expires_at, id LIMIT $1`+lock, args...)
}

// CountActiveLeases counts a session's leases that have not ended.
func (t *Tx) CountActiveLeases(ctx context.Context, session string) (int, error) {
	return one(ctx, t, "count active leases", func(r scanner) (n int, err error) { return n, r.Scan(&n) },
		`SELECT count(*) FROM leases WHERE session = $1 AND state = 'active'`, session)
}
