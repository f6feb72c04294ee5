package revocation

import (
	"context"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/lease"
)

// byService is why a lease ended whose token a resource server revoked.
const byService = "revoked_by_service"

// RevokeToken ends the lease of a token that a resource server revokes (RFC 7009). One
// that is unknown or has ended is as good as revoked.
func (r *Revoker) RevokeToken(ctx context.Context, service, leaseID string) error {
	var l lease.Lease
	var ended bool
	err := r.update(ctx, func(ctx context.Context, tx Tx) (err error) {
		ended = false
		l, err = tx.Lease(ctx, leaseID)
		switch {
		case fault.Is(err, fault.NotFound):
			return nil
		case err != nil || l.State != lease.Active:
			return err
		}
		ended = true
		if err := lease.End(ctx, tx, l, byService, identity.Ref{}); err != nil {
			return err
		}
		return audit.Append(ctx, tx, audit.Entry{
			Kind: audit.ServiceRevoked, Session: l.Session, Decision: l.Decision, Lease: l.ID, User: l.User, Agent: l.Agent,
			Detail: map[string]any{"service": service},
		})
	})
	if err == nil && ended {
		r.Metrics.Leases.WithLabelValues(l.Kind, byService).Inc()
	}
	return err
}
