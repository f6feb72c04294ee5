package audit

import (
	"context"
	"fmt"
)

// Behind compares the log with a checkpoint that left the machine earlier. It
// returns why the log is not a continuation of it, or "": then nothing was restored
// and nothing rewritten.
func Behind(ctx context.Context, store LogStore, outside string) (why string, err error) {
	err = store.View(ctx, func(tx LogTx) error {
		head, ok, err := tx.Head(ctx)
		if err != nil || !ok {
			return err
		}
		why, err = continues(ctx, head, outside, tx.Tile)
		return err
	})
	return why, err
}

// continues says why a head is no continuation of an earlier checkpoint, or "".
func continues(ctx context.Context, head Head, earlier string, tiles TileReader) (why string, err error) {
	c, err := ReadCheckpoint(earlier)
	if err != nil {
		return "", err
	}
	switch {
	case head.Origin != c.Origin:
		return "", nil // of another log, or of this one before an earlier restore
	case c.Size > head.Size:
		return fmt.Sprintf("a checkpoint seen earlier has %d entries, the store's log only %d", c.Size, head.Size), nil
	}
	root, err := RootAt(ctx, c.Size, tiles)
	if err == nil && root != c.Root {
		why = fmt.Sprintf("the log's first %d entries are not those of a checkpoint seen earlier", c.Size)
	}
	return why, err
}

// RestoreTx is what a restore needs of a transaction.
type RestoreTx interface {
	LogTx
	// RetireSigningKeys retires every key that signs credentials: among those that a
	// backup brings back may be one that was found compromised since.
	RetireSigningKeys(ctx context.Context) error
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
		if err := tx.RetireSigningKeys(ctx); err != nil {
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
