package decision

import (
	"context"
	"errors"
	"time"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/lease"
)

// mint makes the credential of a committed lease. Its secret leaves only after the
// commit that makes the lease active; whatever goes wrong before, the lease is ended,
// and what may have been made is unmade.
func (d *Decider) mint(ctx context.Context, answer Answer, o lease.Order) (Answer, error) {
	l := o.Lease
	made, err := d.make(ctx, o)
	if err != nil {
		d.cfg.Metrics.Leases.WithLabelValues(l.Kind, "mint_failed").Inc()
		return Answer{}, mintFailed(errors.Join(err, d.giveUp(ctx, l, made.Recall)))
	}
	if l.State == lease.Intent {
		err := d.cfg.Store.Update(ctx, func(tx Tx) error { return lease.Activate(ctx, tx, l, made.Recall) })
		if err != nil {
			return Answer{}, d.lost(ctx, l, made.Recall, err)
		}
	}
	d.cfg.Metrics.Leases.WithLabelValues(l.Kind, "minted").Inc()
	answer.Credential = credential(l, made.Secret)
	return answer, nil
}

func credential(l lease.Lease, secret lease.Secret) *Credential {
	return &Credential{
		Lease: l.ID, Kind: l.Kind, ExpiresAt: l.ExpiresAt, Revocability: l.Revocability, Precision: l.Precision,
		Scope: l.Scope, Secret: secret,
	}
}

// make asks the minter, until the deadline that the target holds to as well.
func (d *Decider) make(ctx context.Context, o lease.Order) (lease.Made, error) {
	minter := d.cfg.Minters[o.Lease.Minter]
	if !o.Lease.Outside {
		return minter.Mint(ctx, o)
	}
	ctx, cancel := context.WithTimeout(ctx, lease.MintTime)
	defer cancel()
	begun, breaker := time.Now(), d.cfg.Breakers[o.Lease.Minter]
	made, err := minter.Mint(ctx, o)
	d.cfg.Metrics.MintSeconds.WithLabelValues(o.Lease.Kind).Observe(time.Since(begun).Seconds())
	switch {
	case err == nil, errors.Is(err, lease.ErrDeclined):
		breaker.Succeed()
	case errors.Is(context.Cause(ctx), context.Canceled): // the caller left
	default:
		breaker.Fail()
	}
	return made, err
}

// lost is the end of a credential that was made, but must not leave.
func (d *Decider) lost(ctx context.Context, l lease.Lease, recall string, why error) error {
	err := d.giveUp(ctx, l, recall)
	if errors.Is(why, lease.ErrStale) {
		return fault.Wrap(fault.LeaseEnded, err, "the credential was revoked while it was being made")
	}
	d.cfg.Metrics.Leases.WithLabelValues(l.Kind, "mint_failed").Inc()
	return errors.Join(why, err)
}

// giveUp ends a lease whose secret nobody has. What it can't record, the lease's
// deadline ends.
func (d *Decider) giveUp(ctx context.Context, l lease.Lease, recall string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	return d.cfg.Store.Update(ctx, func(tx Tx) error {
		if err := lease.Fail(ctx, tx, l); err != nil {
			return err
		}
		return lease.Recalled(ctx, tx, l, recall)
	})
}

func brokenTarget() error { return mintFailed(errors.New("the target has failed again and again")) }

func mintFailed(err error) error {
	return &fault.Error{
		Code: fault.MintFailed, Detail: "allowed, but the credential could not be made; repeat with the same Idempotency-Key",
		RetryAfter: time.Second, Err: err,
	}
}
