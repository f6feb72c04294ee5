package sqlstore

import (
	"context"
	"time"

	"github.com/writsec/writ/internal/reservation"
)

// Usage implements reservation.Tx.
func (t *Tx) Usage(ctx context.Context, scope string) (reservation.Usage, error) {
	rows, err := some(ctx, t, "read reservations", func(r scanner) (v reservation.Reservation, err error) {
		return v, r.Scan(&v.Name, &v.Amount, timeOf(&v.Until))
	}, `SELECT name, amount, expires_at FROM reservations WHERE scope = $1 AND expires_at > $2`, scope, micros(t.now))
	usage := reservation.Usage{}
	for _, r := range rows {
		usage.Add(r)
	}
	return usage, err
}

// ScopeVersion implements reservation.Tx.
func (t *Tx) ScopeVersion(ctx context.Context, scope string) (version int64, err error) {
	version, _, err = found(one(ctx, t, "read scope", func(r scanner) (v int64, err error) { return v, r.Scan(&v) },
		`SELECT version FROM scopes WHERE scope = $1`, scope))
	return version, err
}

// AdvanceScope implements reservation.Tx. A scope that was never read as changed is
// inserted and one that was is updated: one that was forgotten meanwhile is neither.
func (t *Tx) AdvanceScope(ctx context.Context, scope string, version int64) error {
	next := max(version+1, micros(t.now))
	if version == 0 {
		return t.change(ctx, reservation.ErrChanged, "insert scope",
			`INSERT INTO scopes (scope, version) VALUES ($1, $2) ON CONFLICT (scope) DO NOTHING`, scope, next)
	}
	return t.change(ctx, reservation.ErrChanged, "advance scope",
		`UPDATE scopes SET version = $1 WHERE scope = $2 AND version = $3`, next, scope, version)
}

// InsertReservation implements reservation.Tx.
func (t *Tx) InsertReservation(ctx context.Context, scope string, r reservation.Reservation) error {
	return t.insert(ctx, "insert reservation", `INSERT INTO reservations (scope, name, holder, expires_at, amount) VALUES ($1, $2, '', $3, $4)
		ON CONFLICT (scope, name, holder, expires_at) DO UPDATE SET amount = reservations.amount + excluded.amount`,
		scope, r.Name, micros(r.Until), r.Amount)
}

// ForgetReservations implements revocation.Tx.
func (t *Tx) ForgetReservations(ctx context.Context, before time.Time, limit int) (int64, error) {
	n, err := t.exec(ctx, "forget reservations", `DELETE FROM reservations WHERE (scope, name, holder, expires_at) IN
		(SELECT scope, name, holder, expires_at FROM reservations WHERE expires_at <= $1 ORDER BY expires_at LIMIT $2`+t.claimed()+`)`,
		micros(t.now), limit)
	if err != nil {
		return 0, err
	}
	// The outer condition holds for the row as it is when it is deleted: one that was
	// advanced meanwhile stays.
	m, err := t.exec(ctx, "forget scopes", `DELETE FROM scopes WHERE version < $1 AND scope IN
		(SELECT scope FROM scopes WHERE version < $1
		 AND NOT EXISTS (SELECT 1 FROM reservations WHERE reservations.scope = scopes.scope) ORDER BY version LIMIT $2)`,
		micros(before), limit)
	return max(n, m), err
}
