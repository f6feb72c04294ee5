package sqlstore

import (
	"context"
	"time"
)

// forgetStatus is how many places that are over are dropped when others are reserved:
// more than those, so that they don't pile up.
const forgetStatus = 1000

// ReserveStatus implements minter.StatusStore.
func (s *Store) ReserveStatus(ctx context.Context, n int64) (first int64, err error) {
	err = s.Update(ctx, func(tx *Tx) error {
		if _, err := tx.exec(ctx, "reserve status", `UPDATE status_places SET next = next + $1 WHERE one = 1`, n); err != nil {
			return err
		}
		next, err := tx.nextStatus(ctx)
		if err != nil {
			return err
		}
		first = next - n
		_, err = tx.exec(ctx, "forget status", `DELETE FROM status_entries WHERE place IN
			(SELECT place FROM status_entries WHERE until <= $1 ORDER BY until LIMIT $2)`, micros(tx.now), forgetStatus)
		return err
	})
	return first, err
}

func (t *Tx) nextStatus(ctx context.Context) (int64, error) {
	return one(ctx, t, "read status places", scanInt, `SELECT next FROM status_places WHERE one = 1`)
}

func scanInt(r scanner) (n int64, err error) { return n, r.Scan(&n) }

// PutStatus implements minter.StatusStore.
func (s *Store) PutStatus(ctx context.Context, place int64, lease string, until time.Time) (ok bool, err error) {
	err = s.Update(ctx, func(tx *Tx) error {
		n, err := tx.exec(ctx, "put status", `INSERT INTO status_entries (place, lease, until) VALUES ($1, $2, $3)
			ON CONFLICT (place) DO NOTHING`, place, lease, micros(until))
		ok = n == 1
		return err
	})
	return ok && err == nil, err
}

// BadStatus implements minter.StatusStore. A lease that is not there any more is not
// active, nor is one that an operator's revocation has stopped and not ended yet.
func (s *Store) BadStatus(ctx context.Context, from, to int64) (bad []int64, err error) {
	err = s.View(ctx, func(tx *Tx) (err error) {
		bad, err = some(ctx, tx, "read status list", scanInt, `SELECT place FROM status_entries AS e
			WHERE place >= $1 AND place < $2 AND until > $3
			AND NOT EXISTS (SELECT 1 FROM leases WHERE leases.id = e.lease AND leases.state = 'active' AND NOT `+leaseHalted+`)`, from, to, micros(tx.now))
		return err
	})
	return bad, err
}

// StatusPlaces implements minter.StatusStore.
func (s *Store) StatusPlaces(ctx context.Context) (first, next int64, err error) {
	err = s.View(ctx, func(tx *Tx) error {
		if next, err = tx.nextStatus(ctx); err != nil {
			return err
		}
		first, err = one(ctx, tx, "read status places", scanInt, `SELECT COALESCE(min(place), $1) FROM status_entries`, next)
		return err
	})
	return first, next, err
}
