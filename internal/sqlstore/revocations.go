package sqlstore

import (
	"context"
	"time"

	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/revocation"
)

const revocationColumns = `id, at, scope, value, issuer, reason, operator_issuer, operator_subject, frozen, active, sessions, leases,
	ended_at, gone_at, lifted_at, lifted_issuer, lifted_subject`

func scanRevocation(r scanner) (v revocation.Revocation, err error) {
	var frozen, active int64
	err = r.Scan(&v.ID, timeOf(&v.At), &v.Scope.Kind, &v.Scope.Value, &v.Scope.Issuer, &v.Reason, &v.Operator.Issuer, &v.Operator.ID,
		&frozen, &active, &v.Sessions, &v.Leases, timeOf(&v.EndedAt), timeOf(&v.GoneAt), timeOf(&v.LiftedAt), &v.LiftedBy.Issuer, &v.LiftedBy.ID)
	v.Frozen = frozen == 1
	return v, err
}

// InsertRevocation implements revocation.Tx.
func (t *Tx) InsertRevocation(ctx context.Context, v revocation.Revocation) error {
	return t.insert(ctx, "insert revocation", `INSERT INTO revocations (`+revocationColumns+`)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, 1, 0, 0, 0, 0, 0, '', '')`,
		v.ID, micros(v.At), v.Scope.Kind, v.Scope.Value, v.Scope.Issuer, v.Reason, v.Operator.Issuer, v.Operator.ID, flag(v.Frozen))
}

// Revocation implements revocation.Tx.
func (t *Tx) Revocation(ctx context.Context, id string) (revocation.Revocation, error) {
	return one(ctx, t, "read revocation", scanRevocation, `SELECT `+revocationColumns+` FROM revocations WHERE id = $1`+t.kept(), id)
}

// DueRevocations implements revocation.Tx.
func (t *Tx) DueRevocations(ctx context.Context, limit int) ([]string, error) {
	return some(ctx, t, "list due revocations", scanText, `SELECT id FROM revocations WHERE gone_at = 0 ORDER BY ended_at, id LIMIT $1`+t.claimed(), limit)
}

// UpdateRevocation implements revocation.Tx.
func (t *Tx) UpdateRevocation(ctx context.Context, v revocation.Revocation) error {
	active := v.Frozen || v.EndedAt.IsZero()
	_, err := t.exec(ctx, "update revocation", `UPDATE revocations SET frozen = $1, active = $2, sessions = $3, ended_at = $4, gone_at = $5,
		lifted_at = $6, lifted_issuer = $7, lifted_subject = $8, leases = $9 WHERE id = $10`,
		flag(v.Frozen), flag(active), v.Sessions, micros(v.EndedAt), micros(v.GoneAt),
		micros(v.LiftedAt), v.LiftedBy.Issuer, v.LiftedBy.ID, v.Leases, v.ID)
	return err
}

// HastenLeases implements revocation.Tx.
func (t *Tx) HastenLeases(ctx context.Context, s lease.Selection, revocation string) error {
	where, args := selected(s, t.now, []any{lease.ByKill, revocation, micros(t.now)})
	_, err := t.exec(ctx, "hasten leases", `UPDATE leases SET urgency = $1, due_at = CASE WHEN attempts = 0 THEN due_at ELSE $3 END,
		revocation = CASE WHEN revocation = '' THEN $2 ELSE revocation END WHERE state = 'revoking' AND gone_at = 0 AND `+where, args...)
	return err
}

// RevokingLeases implements revocation.Tx.
func (t *Tx) RevokingLeases(ctx context.Context, s lease.Selection) (int, error) {
	where, args := selected(s, t.now, nil)
	return one(ctx, t, "count revoking leases", func(r scanner) (n int, err error) { return n, r.Scan(&n) },
		`SELECT count(*) FROM leases WHERE state = 'revoking' AND gone_at = 0 AND `+where, args...)
}

// RevokedLeases implements revocation.Tx.
func (t *Tx) RevokedLeases(ctx context.Context, id string) (total, gone int, last time.Time, err error) {
	_, err = one(ctx, t, "count revoked leases", func(r scanner) (struct{}, error) {
		return struct{}{}, r.Scan(&total, &gone, timeOf(&last))
	}, `SELECT count(*), count(CASE WHEN state = 'revoked' THEN 1 END), COALESCE(MAX(gone_at), 0) FROM leases WHERE revocation = $1 AND revocation <> ''`, id)
	return total, gone, last, err
}

// Revocations lists the revocations that match.
func (t *Tx) Revocations(ctx context.Context, q revocation.Query) ([]revocation.Revocation, error) {
	var s search
	if q.Frozen {
		s.add(`frozen = $%d`, 1)
	}
	return some(ctx, t, "search revocations", scanRevocation, `SELECT `+revocationColumns+` FROM revocations`+s.page(q.Before, q.Limit), s.args...)
}
