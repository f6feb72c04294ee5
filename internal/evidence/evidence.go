// Package evidence takes the log out of the store and proves it elsewhere: exports,
// archives and incidents are files that anyone who has a verifier key can check
// without Writ's store, its operators or its word. It trusts no key that comes with
// what it verifies, and it corrects nothing: what is not exactly as it was written
// is reported.
package evidence

import (
	"context"
	"fmt"

	"github.com/writsec/writ/internal/audit"
)

// Store runs transactions that read.
type Store interface {
	View(ctx context.Context, f func(Tx) error) error
}

// Tx is what evidence needs of a transaction.
type Tx interface {
	audit.EvidenceTx
	// Input returns what a decision was made on; fault.NotFound where it was not kept.
	Input(ctx context.Context, decision string) (audit.Input, error)
}

// page bounds what is in memory at once, in entries.
const page = 500

// each calls f with the entries that match q, in pages, each in a transaction of its
// own: a log only grows, so they fit together.
func each(ctx context.Context, store Store, q audit.Query, f func(tx Tx, entries []audit.Sequenced) error) error {
	q.Limit = page
	for more := true; more; {
		err := store.View(ctx, func(tx Tx) error {
			list, err := tx.LogEntries(ctx, q)
			if err != nil || len(list) == 0 {
				more = false
				return err
			}
			more, q.From = len(list) == page, list[len(list)-1].Index+1
			return f(tx, list)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// span is what a range of the log is in the store now.
func span(head audit.Head, from, to int64) (int64, int64, error) {
	if from < 0 {
		from = head.Pruned
	}
	if to == 0 {
		to = head.Size
	}
	switch {
	case from < head.Pruned:
		return 0, 0, fmt.Errorf("the entries below %d are in archives", head.Pruned)
	case to > head.Size:
		return 0, 0, fmt.Errorf("the log has %d entries only", head.Size)
	case from >= to && head.Size > 0:
		return 0, 0, fmt.Errorf("there are no entries from %d to %d", from, to)
	}
	return from, to, nil
}

// Problem is one thing that is wrong with a log, and where.
type Problem struct {
	// From and To (exclusive) are the entries that it is about; From is -1 where it is
	// none of them but the file itself.
	From, To int64
	Text     string
}

// String is one line.
func (p Problem) String() string {
	switch {
	case p.From < 0:
		return p.Text
	case p.To == p.From+1:
		return fmt.Sprintf("entry %d: %s", p.From, p.Text)
	default:
		return fmt.Sprintf("entries %d to %d: %s", p.From, p.To-1, p.Text)
	}
}
