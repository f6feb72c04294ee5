package revocation

import (
	"context"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/lease"
)

// RevokeToken ends the lease of a token that a resource server revokes (RFC 7009). One
// that is unknown or has ended is as good as revoked.
func (r *Revoker) RevokeToken(ctx context.Context, service, leaseID string) error {
	var l lease.Lease
	var ended lease.Ended
	err := r.update(ctx, func(ctx context.Context, tx Tx) (err error) {
		ended = nil
		l, err = tx.Lease(ctx, leaseID)
		if fault.Is(err, fault.NotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		ended, err = lease.EndOne(ctx, tx, l, lease.End{Reason: lease.EndService})
		if err != nil || ended.Total() == 0 {
			return err
		}
		return audit.Append(ctx, tx, audit.Entry{
			Kind: audit.ServiceRevoked, Session: l.Session, Decision: l.Decision, Lease: l.ID, User: l.User, Agent: l.Agent,
			Detail: map[string]any{"service": service},
		})
	})
	if err == nil && ended.Total() > 0 {
		r.Metrics.Leases.WithLabelValues(l.Kind, lease.EndService).Inc()
	}
	return err
}
