package audit

import (
	"context"
	"fmt"
)

// Behind compares the log with a checkpoint that left the machine earlier. It
// returns why the log is not a continuation of it, or "": then nothing was restored
// and nothing rewritten.
func Behind(ctx context.Context, store LogStore, outside string) (why string, err error) {
	c, err := ReadCheckpoint(outside)
	if err != nil {
		return "", err
	}
	err = store.View(ctx, func(tx LogTx) error {
		why = ""
		head, ok, err := tx.Head(ctx)
		switch {
		case err != nil:
			return err
		case !ok || head.Origin != c.Origin:
			return nil // of another log, or of this one before an earlier restore
		case c.Size > head.Size:
			why = fmt.Sprintf("the copied checkpoint has %d entries, the store's log only %d", c.Size, head.Size)
			return nil
		}
		root, err := RootAt(ctx, c.Size, tx.Tile)
		if err == nil && root != c.Root {
			why = fmt.Sprintf("the log's first %d entries are not those of the copied checkpoint", c.Size)
		}
		return err
	})
	return why, err
}

// RestoreTx is what a restore needs of a transaction.
type RestoreTx interface {
	LogTx
	// EndEverything ends every session, approval and lease for the reason given, and
	// forgets idempotency keys; it says how many there were.
	EndEverything(ctx context.Context, reason string) (sessions, approvals, leases int64, err error)
}

// RestoreStore runs transactions.
type RestoreStore interface {
	Update(ctx context.Context, f func(RestoreTx) error) error
}

// Restore makes a store that was restored from a backup safe to go on with: what
// the backup revives is ended, and the log goes on under a new origin, whose first
// entry cites the last checkpoint of before that is known. Several replicas may
// start at once: from names the origin that they found, and only the first ends it.
func Restore(ctx context.Context, store RestoreStore, host, from, outside, why string) error {
	return store.Update(ctx, func(tx RestoreTx) error {
		head, ok, err := tx.Head(ctx)
		if err != nil || !ok || head.Origin != from {
			return err
		}
		sessions, approvals, leases, err := tx.EndEverything(ctx, "restored")
		if err != nil {
			return err
		}
		head.Origin = NewOrigin(host)
		detail := map[string]any{
			"why": why, "previous_origin": from, "previous_size": head.Size, "previous_checkpoint": head.Checkpoint,
			"sessions": sessions, "approvals": approvals, "leases": leases,
		}
		if outside != "" {
			detail["outside_checkpoint"] = outside
		}
		return begin(ctx, tx, head, Entry{Kind: LogRestored, Detail: detail})
	})
}
