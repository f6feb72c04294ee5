package evidence

import (
	"context"
	"fmt"
	"io"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/writsec/writ/internal/audit"
)

// Export writes the entries from an index to another (exclusive), as Verify reads
// them. A negative from is the first that the store still has, a zero to the end.
// What the store lacks or has otherwise than the tree is written as it is, for
// Verify to find.
func Export(ctx context.Context, store Store, w io.Writer, from, to int64, verifiers []string) (Header, error) {
	var stored tiles
	h := Header{Format: Format, Verifiers: verifiers}
	err := store.View(ctx, func(tx Tx) error {
		head, err := audit.HeadOf(ctx, tx)
		if err != nil {
			return err
		}
		if h.From, h.To, err = span(head, from, to); err != nil {
			return err
		}
		h.Origin, h.Checkpoint = head.Origin, head.Checkpoint
		before, err := readFrontier(h.From, stored.in(ctx, tx))
		if err != nil {
			return err
		}
		h.Range = before.hashes
		if h.To < head.Size {
			h.Tail, err = tlog.ProveTree(head.Size, h.To, stored.in(ctx, tx))
		}
		return err
	})
	if err != nil {
		return h, fmt.Errorf("export log: %w", err)
	}
	line, err := h.line()
	if err != nil {
		return h, fmt.Errorf("export log: %w", err)
	}
	if _, err := w.Write(line); err != nil {
		return h, fmt.Errorf("export log: %w", err)
	}
	if h.To == 0 {
		return h, nil
	}
	err = each(ctx, store, audit.Query{From: h.From, To: h.To}, func(tx Tx, entries []audit.Sequenced) error {
		for _, e := range entries {
			hash, err := stored.leaf(ctx, tx, e.Index)
			if err != nil {
				return err
			}
			line = appendLine(line[:0], e.Index, hash, e.Record)
			if _, err := w.Write(line); err != nil {
				return err
			}
		}
		return stillThere(ctx, tx, h.From)
	})
	if err != nil {
		return h, fmt.Errorf("export log: %w", err)
	}
	return h, nil
}

// stillThere tells entries that are missing from those that were archived
// meanwhile.
func stillThere(ctx context.Context, tx Tx, from int64) error {
	head, err := audit.HeadOf(ctx, tx)
	if err == nil && head.Pruned > from {
		err = fmt.Errorf("the entries below %d were archived meanwhile; start again", head.Pruned)
	}
	return err
}
