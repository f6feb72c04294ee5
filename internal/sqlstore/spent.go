package sqlstore

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"time"
)

// Spend uses up what is good once only, until a time. fresh says that nobody, on any
// replica, has used it up before. The text begins with the kind of use, so that kinds
// don't meet; only a digest is kept. A use whose time is over by the store's clock is
// not fresh, since it may be forgotten already. An error says nothing: refuse.
func (t *Tx) Spend(ctx context.Context, use string, expires time.Time) (fresh bool, err error) {
	if !expires.After(t.now) {
		return false, nil
	}
	sum := sha256.Sum256([]byte(use))
	n, err := t.exec(ctx, "spend", `INSERT INTO spent (use, expires_at) VALUES ($1, $2) ON CONFLICT (use) DO NOTHING`,
		hex.EncodeToString(sum[:]), micros(expires))
	return n == 1, err
}

// Spend is the same in a transaction of its own.
func (s *Store) Spend(ctx context.Context, use string, expires time.Time) (fresh bool, err error) {
	err = s.Update(ctx, func(tx *Tx) (err error) {
		fresh, err = tx.Spend(ctx, use, expires)
		return err
	})
	return fresh && err == nil, err
}

// ForgetSpent implements revocation.Tx.
func (t *Tx) ForgetSpent(ctx context.Context, limit int) (int64, error) {
	return t.exec(ctx, "forget spent", `DELETE FROM spent WHERE use IN
		(SELECT use FROM spent WHERE expires_at <= $1 ORDER BY expires_at LIMIT $2)`, micros(t.now), limit)
}
