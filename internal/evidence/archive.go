package evidence

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"sort"
	"time"

	"github.com/writsec/writ/internal/audit"
)

// Pruner runs transactions that take archived entries out of the store.
type Pruner interface {
	Update(ctx context.Context, f func(PruneTx) error) error
}

// PruneTx is what pruning needs of a transaction.
type PruneTx interface {
	audit.Tx
	// LockHead returns the head and keeps other transactions from it until the commit;
	// ok is false where another has it.
	LockHead(ctx context.Context) (h audit.Head, ok bool, err error)
	// PutHead stores the head.
	PutHead(ctx context.Context, h audit.Head) error
	// PruneLog drops the entries below an index, and says how many.
	PruneLog(ctx context.Context, below int64) (int64, error)
}

// Archived is what an archive has.
type Archived struct {
	Report
	SHA256 string // of the file, in hexadecimal
}

// Archive moves the entries below an index out of the store into a new file, which
// is an export. They leave the store only once the file was read back from the disk
// and verified. Their hashes stay, so that the proofs of all others go on. Problems
// in the report mean that nothing was done.
func Archive(ctx context.Context, store Store, pruner Pruner, path string, below int64, o Options) (Archived, error) {
	a, err := archive(ctx, store, pruner, path, below, o)
	if err != nil {
		return a, fmt.Errorf("archive log: %w", err)
	}
	return a, nil
}

func archive(ctx context.Context, store Store, pruner Pruner, path string, below int64, o Options) (a Archived, err error) {
	if below < 1 {
		return a, errors.New("no entries were asked for")
	}
	if err := checkVerifiers(o.Verifiers); err != nil {
		return a, err
	}
	d, err := newDraft(path)
	if err != nil {
		return a, err
	}
	defer d.discard()
	var h Header
	err = d.fill(func(w io.Writer) error {
		h, err = Export(ctx, store, w, -1, below, o.Verifiers)
		return err
	})
	if err != nil {
		return a, err
	}
	if _, err := d.file.Seek(0, io.SeekStart); err != nil {
		return a, fmt.Errorf("read archive back: %w", err)
	}
	sum := sha256.New()
	if a.Report, err = Verify(io.TeeReader(d.file, sum), o); err != nil || len(a.Problems) > 0 {
		return a, err
	}
	a.SHA256 = hex.EncodeToString(sum.Sum(nil))
	if err := d.publish(); err != nil {
		return a, err
	}
	entry := audit.Entry{Kind: audit.LogPruned, Detail: map[string]any{
		"from": h.From, "below": h.To, "file": filepath.Base(path), "sha256": a.SHA256,
	}}
	if err := mark(ctx, pruner, h, entry); err != nil {
		return a, fmt.Errorf("the file is whole, but nothing was pruned: %w", err)
	}
	return a, Sweep(ctx, store, pruner)
}

// pruneStep bounds what one transaction drops, so that none takes long.
const pruneStep = 10_000

const (
	lockTries = 100
	lockPause = 50 * time.Millisecond
)

// mark makes the archived entries pruned, for good, and drops the first of them.
func mark(ctx context.Context, pruner Pruner, h Header, e audit.Entry) error {
	for range lockTries {
		done := false
		err := pruner.Update(ctx, func(tx PruneTx) error {
			head, ok, err := tx.LockHead(ctx)
			if done = ok; err != nil || !ok {
				return err
			}
			if head.Pruned != h.From || head.Size < h.To {
				return fmt.Errorf("the log changed meanwhile: it is pruned to %d", head.Pruned)
			}
			head.Pruned = h.To
			if err := tx.PutHead(ctx, head); err != nil {
				return err
			}
			if _, err := tx.PruneLog(ctx, min(h.From+pruneStep, h.To)); err != nil {
				return err
			}
			return audit.Append(ctx, tx, e)
		})
		if err != nil || done {
			return err
		}
		select { // a replica is sequencing
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(lockPause):
		}
	}
	return errors.New("the head of the log is busy; try again")
}

// Sweep drops what is pruned and still in the store, step by step. Archive ends with
// it; after a crash in between it can be run again.
func Sweep(ctx context.Context, store Store, pruner Pruner) error {
	var swept, below int64
	for {
		var oldest []audit.Sequenced
		err := store.View(ctx, func(tx Tx) error {
			head, err := audit.HeadOf(ctx, tx)
			if err != nil || head.Pruned == 0 {
				return err
			}
			below = head.Pruned
			oldest, err = tx.LogEntries(ctx, audit.Query{From: swept, To: below, Limit: 1})
			return err
		})
		if err != nil || len(oldest) == 0 {
			return err
		}
		swept = min(oldest[0].Index+pruneStep, below)
		err = pruner.Update(ctx, func(tx PruneTx) error {
			_, err := tx.PruneLog(ctx, swept)
			return err
		})
		if err != nil {
			return err
		}
	}
}

// Before returns the index of the first entry that was recorded at a time or later.
func Before(ctx context.Context, store Store, at time.Time) (int64, error) {
	var head audit.Head
	err := store.View(ctx, func(tx Tx) (err error) {
		head, err = audit.HeadOf(ctx, tx)
		return err
	})
	n := sort.Search(int(head.Size-head.Pruned), func(i int) bool {
		if err != nil {
			return true
		}
		index := head.Pruned + int64(i)
		var later bool
		err = store.View(ctx, func(tx Tx) error {
			list, err := tx.LogEntries(ctx, audit.Query{From: index, To: index + 1, Limit: 1})
			if err == nil && len(list) == 0 {
				err = fmt.Errorf("entry %d is missing from the store", index)
			}
			if err != nil {
				return err
			}
			e, err := audit.ParseRecord(list[0].Record)
			later = !e.At.Before(at)
			return err
		})
		return later
	})
	if err != nil {
		return 0, fmt.Errorf("find entries: %w", err)
	}
	return head.Pruned + int64(n), nil
}
