package lease

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/telemetry"
)

// Store runs transactions.
type Store interface {
	Update(ctx context.Context, f func(Tx) error) error
}

// Expirer records the end of leases whose time is over. Nothing depends on its
// speed: an expired lease is refused by its time alone.
type Expirer struct {
	Store   Store
	Metrics *telemetry.Metrics
	Logger  *slog.Logger
}

const (
	expireEvery = time.Second
	expireBatch = 100
)

// Run works until ctx ends.
func (e *Expirer) Run(ctx context.Context) error {
	for {
		more, err := e.step(ctx)
		if err != nil && ctx.Err() == nil {
			e.Logger.ErrorContext(ctx, "expire leases", "error", err)
		}
		if more && err == nil {
			continue
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(expireEvery/2 + rand.N(expireEvery/2)):
		}
	}
}

// step ends one batch; more says that it was a full one.
func (e *Expirer) step(ctx context.Context) (more bool, err error) {
	var due []Lease
	err = e.Store.Update(ctx, func(tx Tx) (err error) {
		if due, err = tx.ActiveLeases(ctx, Selection{Due: true}, expireBatch); err != nil {
			return err
		}
		for _, l := range due {
			if err := End(ctx, tx, l, "expired", identity.Ref{}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return false, err
	}
	for _, l := range due {
		e.Metrics.Leases.WithLabelValues(l.Kind, "expired").Inc()
	}
	return len(due) == expireBatch, nil
}
