package audit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/writsec/writ/internal/fault"
)

// EvidenceTx is what proofs need of a transaction.
type EvidenceTx interface {
	// Head returns the head; ok is false where there is none yet.
	Head(ctx context.Context) (h Head, ok bool, err error)
	// Tile implements TileReader.
	Tile(ctx context.Context, level int, n int64) ([]byte, error)
	// LogEntries lists entries of the log that match, by index; only Index and Record
	// are set.
	LogEntries(ctx context.Context, q Query) ([]Sequenced, error)
}

// HeadOf returns the head of the log; fault.NotReady where there is none.
func HeadOf(ctx context.Context, tx EvidenceTx) (Head, error) {
	h, ok, err := tx.Head(ctx)
	if err == nil && !ok {
		err = fault.New(fault.NotReady, "there is no log yet")
	}
	return h, err
}

// Proof shows that a log has one entry. It needs nothing else to be verified but a
// verifier key.
type Proof struct {
	Checkpoint string           `json:"checkpoint"`
	Index      int64            `json:"index"`
	Entry      json.RawMessage  `json:"entry"` // exactly as it was hashed
	Hashes     tlog.RecordProof `json:"hashes"`
}

// Prove proves one entry under the log's present checkpoint.
func Prove(ctx context.Context, tx EvidenceTx, index int64) (Proof, error) {
	head, err := HeadOf(ctx, tx)
	if err != nil {
		return Proof{}, err
	}
	if index >= head.Size {
		return Proof{}, fault.New(fault.NotFound, "the log has %d entries; the last index is %d", head.Size, head.Size-1)
	}
	list, err := tx.LogEntries(ctx, Query{From: index, To: index + 1, Limit: 1})
	if err != nil {
		return Proof{}, err
	}
	if len(list) == 0 {
		return Proof{}, fault.New(fault.NotFound, "the entry is not in the store any more; look in the archives")
	}
	p := Proof{Checkpoint: head.Checkpoint, Index: index, Entry: list[0].Record}
	p.Hashes, err = ProveEntry(ctx, head.Size, index, tx.Tile)
	return p, err
}

// Verify checks the proof by verifier keys and returns the checkpoint it holds
// under.
func (p Proof) Verify(vkeys ...string) (Checkpoint, error) {
	c, err := OpenCheckpoint(p.Checkpoint, vkeys...)
	if err != nil {
		return c, err
	}
	if err := tlog.CheckRecord(p.Hashes, c.Size, c.Root, p.Index, tlog.RecordHash(p.Entry)); err != nil {
		return c, fmt.Errorf("entry %d is not in the log of this checkpoint", p.Index)
	}
	return c, nil
}

// Consistency shows that a log only grew since an earlier size.
type Consistency struct {
	Checkpoint string         `json:"checkpoint"`
	From       int64          `json:"from"`
	Hashes     tlog.TreeProof `json:"hashes"`
}

// ProveSince proves that the log begins with what it was at an earlier size.
func ProveSince(ctx context.Context, tx EvidenceTx, from int64) (Consistency, error) {
	head, err := HeadOf(ctx, tx)
	if err != nil {
		return Consistency{}, err
	}
	if from < 1 || from > head.Size {
		return Consistency{}, fault.Invalid("from", "expected a size from 1 to %d", head.Size)
	}
	c := Consistency{Checkpoint: head.Checkpoint, From: from}
	c.Hashes, err = ProveConsistency(ctx, from, head.Size, tx.Tile)
	return c, err
}

// Verify checks that old, a checkpoint that was seen earlier, is a beginning of the
// log. Both must be signed by one of the verifier keys.
func (c Consistency) Verify(old string, vkeys ...string) error {
	before, err := OpenCheckpoint(old, vkeys...)
	if err != nil {
		return fmt.Errorf("the older one: %w", err)
	}
	now, err := OpenCheckpoint(c.Checkpoint, vkeys...)
	if err != nil {
		return fmt.Errorf("the newer one: %w", err)
	}
	switch {
	case before.Origin != now.Origin:
		return fmt.Errorf("checkpoints of two logs, %s and %s", before.Origin, now.Origin)
	case before.Size != c.From:
		return fmt.Errorf("the proof is from size %d, the older checkpoint of %d", c.From, before.Size)
	}
	if err := tlog.CheckTree(c.Hashes, now.Size, now.Root, before.Size, before.Root); err != nil {
		return errors.New("the log was rewritten: it does not begin with the older checkpoint")
	}
	return nil
}
