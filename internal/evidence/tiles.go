package evidence

import (
	"context"
	"fmt"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/writsec/writ/internal/audit"
)

// tiles reads the stored hashes of a log, and keeps those tiles that it read: proofs
// of neighbours share them.
type tiles struct{ kept map[[2]int64][]byte }

// maxKept bounds them: 8 KiB each.
const maxKept = 512

// in reads what is not kept in a transaction.
func (t *tiles) in(ctx context.Context, tx Tx) tlog.HashReader {
	return tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(indexes))
		for i, index := range indexes {
			at := tlog.TileForIndex(audit.TileHeight, index)
			data, err := t.tile(ctx, tx, at)
			if err != nil {
				return nil, err
			}
			if out[i], err = tlog.HashFromTile(at, data, index); err != nil {
				return nil, fmt.Errorf("read log hashes: %w", err)
			}
		}
		return out, nil
	})
}

func (t *tiles) tile(ctx context.Context, tx Tx, at tlog.Tile) ([]byte, error) {
	id, width := [2]int64{int64(at.L), at.N}, at.W*tlog.HashSize
	data := t.kept[id]
	if len(data) < width { // not there, or narrower than it is by now
		var err error
		if data, err = tx.Tile(ctx, at.L, at.N); err != nil {
			return nil, err
		}
		if len(data) < width {
			return nil, fmt.Errorf("read log hashes: tile %d/%d has %d bytes, expected %d or more", at.L, at.N, len(data), width)
		}
		if t.kept == nil || len(t.kept) >= maxKept {
			t.kept = map[[2]int64][]byte{}
		}
		t.kept[id] = data
	}
	return data[:width], nil
}

// leaf returns the hash that the tree has of an entry.
func (t *tiles) leaf(ctx context.Context, tx Tx, index int64) (tlog.Hash, error) {
	hashes, err := t.in(ctx, tx).ReadHashes([]int64{tlog.StoredHashIndex(0, index)})
	if err != nil {
		return tlog.Hash{}, err
	}
	return hashes[0], nil
}
