package audit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/writsec/writ/internal/telemetry"
)

// Head is where the log of a store stands.
type Head struct {
	Origin     string
	Size       int64
	Checkpoint string    // of Size, signed
	At         time.Time // of the last entry
	Pruned     int64     // entries below it are in archives
}

// Sequenced is an entry with its place in the tree.
type Sequenced struct {
	Index int64
	Entry
	Record []byte
}

// LogTx is what the log needs of a transaction.
type LogTx interface {
	Tx
	Now() time.Time
	// LockHead returns the head and keeps other transactions from it until the commit;
	// ok is false where another has it, or there is none.
	LockHead(ctx context.Context) (h Head, ok bool, err error)
	// Head returns the head; ok is false where there is none yet.
	Head(ctx context.Context) (h Head, ok bool, err error)
	// PutHead stores the head.
	PutHead(ctx context.Context, h Head) error
	// Unsequenced lists entries that are not in the log yet, oldest first.
	Unsequenced(ctx context.Context, limit int) ([]Entry, error)
	// Sequence moves entries into the log.
	Sequence(ctx context.Context, es []Sequenced) error
	// Tile implements TileReader.
	Tile(ctx context.Context, level int, n int64) ([]byte, error)
	// PutTile stores a tile in place of a narrower one.
	PutTile(ctx context.Context, level int, n int64, data []byte) error
	// CheckpointKeys lists the signer keys of checkpoints.
	CheckpointKeys(ctx context.Context) ([]string, error)
	// AddCheckpointKey stores one more.
	AddCheckpointKey(ctx context.Context, signer, verifier string) error
}

// LogStore runs transactions.
type LogStore interface {
	Update(ctx context.Context, f func(LogTx) error) error
	View(ctx context.Context, f func(LogTx) error) error
}

// Sequencer moves entries into the tree. On several replicas, whichever is free
// does.
type Sequencer struct {
	Store LogStore
	// WentBack is called with the head that was seen when the store no longer has it: it
	// was put back under a Writ that runs, by a restore or a failover that lost commits.
	WentBack func(ctx context.Context, seen Head, why string) error
	Metrics  *telemetry.Metrics
	Logger   *slog.Logger

	seen   Head
	locked int // steps in a row that found the head taken
}

const (
	lockedAlarm   = 100 // steps, some twenty seconds
	sequenceEvery = 250 * time.Millisecond
	sequenceBatch = 256
)

// Run works until ctx ends, and then once more, so that what was recorded until
// then is in the log.
func (s *Sequencer) Run(ctx context.Context) error {
	for {
		more, err := s.Step(ctx)
		if err != nil && ctx.Err() == nil {
			s.Logger.ErrorContext(ctx, "sequence audit entries", "error", err)
		}
		if more && err == nil {
			continue
		}
		select {
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			err = nil // of a step that the stop cut short
			for more := true; more && err == nil; {
				more, err = s.Step(last)
			}
			return nil // what is left is sequenced at the next start
		case <-time.After(sequenceEvery/2 + rand.N(sequenceEvery/2)): //nolint:gosec // jitter
		}
	}
}

// Step sequences one batch; more says that there may be another.
func (s *Sequencer) Step(ctx context.Context) (more bool, err error) {
	var oldest time.Time
	var sequenced int
	var now time.Time
	var head Head
	var ok bool
	back := ""
	err = s.Store.Update(ctx, func(tx LogTx) error {
		more, sequenced, now, back = false, 0, tx.Now(), ""
		var err error
		if head, ok, err = tx.LockHead(ctx); err != nil || !ok {
			return err
		}
		if back, err = s.wentBack(ctx, tx, head); err != nil || back != "" {
			return err
		}
		entries, err := tx.Unsequenced(ctx, sequenceBatch)
		if err != nil || len(entries) == 0 {
			return err
		}
		oldest, sequenced, more = entries[0].At, len(entries), len(entries) == sequenceBatch
		head, err = extend(ctx, tx, head, entries)
		return err
	})
	switch {
	case err != nil:
		return false, err
	case back != "":
		if s.WentBack == nil {
			return false, errors.New(back)
		}
		s.Logger.ErrorContext(ctx, "the store went back while Writ ran", "why", back)
		if err := s.WentBack(ctx, s.seen, back); err != nil {
			return false, err
		}
		s.seen = Head{}
		return true, nil
	case !ok:
		if s.locked++; s.locked%lockedAlarm == 0 {
			s.Logger.WarnContext(ctx, "the head of the log is locked by another", "steps", s.locked)
		}
		return false, nil
	}
	s.seen, s.locked = head, 0
	if s.Metrics != nil {
		if sequenced > 0 {
			s.Metrics.Sequenced.Add(float64(sequenced))
			s.Metrics.SequenceLag.Observe(now.Sub(oldest).Seconds())
		}
		s.Metrics.LogSize.Set(float64(head.Size))
	}
	return more, nil
}

// wentBack says why the log is not a continuation of what was seen of it, or "".
func (s *Sequencer) wentBack(ctx context.Context, tx LogTx, head Head) (why string, err error) {
	if s.seen.Origin != head.Origin || s.seen.Checkpoint == head.Checkpoint {
		return "", nil
	}
	return continues(ctx, head, s.seen.Checkpoint, tx.Tile)
}

// extend appends entries to the tree and signs its new head.
func extend(ctx context.Context, tx LogTx, head Head, entries []Entry) (Head, error) {
	t := newTree(ctx, tx.Tile)
	batch := make([]Sequenced, len(entries))
	for i, e := range entries {
		record, err := e.Record()
		if err != nil {
			return head, err
		}
		batch[i] = Sequenced{Index: head.Size + int64(i), Entry: e, Record: record}
		if err := t.add(batch[i].Index, record); err != nil {
			return head, err
		}
	}
	if err := tx.Sequence(ctx, batch); err != nil {
		return head, err
	}
	for _, id := range t.changed() {
		if err := tx.PutTile(ctx, id.level, id.n, t.tiles[id]); err != nil {
			return head, err
		}
	}
	head.Size += int64(len(batch))
	head.At = entries[len(entries)-1].At
	return head, sign(ctx, tx, &head, t)
}

// sign makes the checkpoint of a head and stores it.
func sign(ctx context.Context, tx LogTx, head *Head, t *tree) error {
	root, err := RootAt(ctx, head.Size, t.tileOf)
	if err != nil {
		return fmt.Errorf("hash log: %w", err)
	}
	keys, err := tx.CheckpointKeys(ctx)
	if err != nil {
		return err
	}
	if head.Checkpoint, err = (Checkpoint{head.Origin, head.Size, root}).sign(keys); err != nil {
		return err
	}
	return tx.PutHead(ctx, *head)
}

// tileOf reads through what t has changed already.
func (t *tree) tileOf(_ context.Context, level int, n int64) ([]byte, error) {
	return t.tile(tileID{level, n})
}

// OpenLog begins the log of a store that has none; host is whose it is.
func OpenLog(ctx context.Context, store LogStore, host string) error {
	return store.Update(ctx, func(tx LogTx) error {
		if _, ok, err := tx.Head(ctx); ok || err != nil {
			return err
		}
		return begin(ctx, tx, Head{Origin: NewOrigin(host), At: tx.Now()}, Entry{Kind: LogOpened})
	})
}

// begin gives a head its origin's key and checkpoint, and the log the entry that
// says so.
func begin(ctx context.Context, tx LogTx, h Head, e Entry) error {
	signer, verifier, err := NewCheckpointKey(h.Origin)
	if err != nil {
		return err
	}
	if err := tx.AddCheckpointKey(ctx, signer, verifier); err != nil {
		return err
	}
	if e.Detail == nil {
		e.Detail = map[string]any{}
	}
	e.Detail["origin"], e.Detail["verifier"] = h.Origin, verifier
	if err := Append(ctx, tx, e); err != nil {
		return err
	}
	return sign(ctx, tx, &h, newTree(ctx, tx.Tile))
}
