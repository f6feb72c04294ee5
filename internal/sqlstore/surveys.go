package sqlstore

import (
	"context"
	"fmt"
	"time"

	"github.com/writsec/writ/internal/lease"
)

// KnownLeases implements lease.SurveyTx.
func (t *Tx) KnownLeases(ctx context.Context, ids []string, at time.Time) (map[string]lease.Lease, error) {
	out := map[string]lease.Lease{}
	_, err := eachPart(ids, func(in string, args []any) ([]string, error) {
		part, err := some(ctx, t, "read known leases", scanLease, fmt.Sprintf(`SELECT `+leaseColumns+` FROM leases
			WHERE (gone_at = 0 OR gone_at > $%d) AND id IN (%s)`, len(args)+1, in), append(args, micros(at))...)
		for _, l := range part {
			out[l.ID] = l
		}
		return nil, err
	})
	return out, err
}

// Orphans implements lease.SurveyTx; "" is every minter.
func (t *Tx) Orphans(ctx context.Context, minter string) ([]lease.Orphan, error) {
	return some(ctx, t, "list orphans", func(r scanner) (o lease.Orphan, err error) {
		return o, r.Scan(&o.Minter, &o.Name, timeOf(&o.SeenAt), timeOf(&o.DisarmedAt))
	}, `SELECT minter, name, seen_at, disarmed_at FROM orphans WHERE minter = $1 OR $1 = '' ORDER BY minter, name`+t.kept(), minter)
}

// PutOrphan implements lease.SurveyTx.
func (t *Tx) PutOrphan(ctx context.Context, o lease.Orphan) error {
	return t.insert(ctx, "put orphan", `INSERT INTO orphans (minter, name, seen_at, disarmed_at) VALUES ($1, $2, $3, $4)
		ON CONFLICT (minter, name) DO UPDATE SET disarmed_at = excluded.disarmed_at`, o.Minter, o.Name, micros(o.SeenAt), micros(o.DisarmedAt))
}

// DropOrphan implements lease.SurveyTx.
func (t *Tx) DropOrphan(ctx context.Context, minter, name string) error {
	return t.insert(ctx, "drop orphan", `DELETE FROM orphans WHERE minter = $1 AND name = $2`, minter, name)
}
