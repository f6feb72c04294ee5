package lease

import (
	"context"
	"errors"
	"time"

	"github.com/writsec/writ/internal/fault"
)

// Limits bounds how many leases may exist at once; zero is no bound.
type Limits struct {
	PerSession, PerUser, PerAgent int
	// PerMinter counts those that were not seen gone, too: the target holds them.
	PerMinter map[string]int
}

// Admission is what stands in the way of a lease.
type Admission struct {
	// Halt is the operator's revocation that has it in its scope, "" for none.
	Halt string
	// Full names a quota that is used up, "" for none.
	Full string
}

// ErrHalted says that an operator has stopped what is asked for.
var ErrHalted = errors.New("stopped by an operator")

func admit(ctx context.Context, tx Tx, l Lease, since time.Time, limits Limits) error {
	a, err := tx.Admit(ctx, l, since, limits)
	switch {
	case err != nil:
		return err
	case a.Halt != "":
		return ErrHalted
	case a.Full != "":
		return &fault.Error{
			Code: fault.LeaseQuota, Detail: "too many leases of this " + a.Full + " are active; release some, or wait until they end",
			RetryAfter: 5 * time.Second,
		}
	}
	return nil
}

// Allowed fails with ErrHalted where an operator has stopped whoever would hold a
// lease, though none is asked for: the decision has no credential, or asks a person.
func Allowed(ctx context.Context, tx Tx, l Lease, since time.Time) error {
	return admit(ctx, tx, l, since, Limits{})
}
