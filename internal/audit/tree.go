package audit

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"golang.org/x/mod/sumdb/tlog"
)

// TileHeight makes tiles of 256 hashes, as C2SP tlog-tiles has them.
const TileHeight = 8

const tileWidth = 1 << TileHeight

// TileReader reads one tile, as wide as it is by now; nil where there is none.
type TileReader func(ctx context.Context, level int, n int64) ([]byte, error)

type tileID struct {
	level int
	n     int64
}

// tree reads and extends the stored hashes of a log. It holds the tiles that it
// touched, so that a batch reads and writes each once.
type tree struct {
	ctx   context.Context // of one use; tlog's interface has no room for it
	load  TileReader
	tiles map[tileID][]byte
	dirty map[tileID]bool
}

func newTree(ctx context.Context, load TileReader) *tree {
	return &tree{ctx: ctx, load: load, tiles: map[tileID][]byte{}, dirty: map[tileID]bool{}}
}

func (t *tree) tile(id tileID) ([]byte, error) {
	if data, ok := t.tiles[id]; ok {
		return data, nil
	}
	data, err := t.load(t.ctx, id.level, id.n)
	if err == nil {
		t.tiles[id] = data
	}
	return data, err
}

// ReadHashes implements tlog.HashReader.
func (t *tree) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for i, index := range indexes {
		at := tlog.TileForIndex(TileHeight, index)
		data, err := t.tile(tileID{at.L, at.N})
		if err != nil {
			return nil, err
		}
		if len(data) < at.W*tlog.HashSize {
			return nil, fmt.Errorf("tile %d/%d of the log has %d bytes, expected %d or more", at.L, at.N, len(data), at.W*tlog.HashSize)
		}
		if out[i], err = tlog.HashFromTile(at, data[:at.W*tlog.HashSize], index); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// add appends the record with index n.
func (t *tree) add(n int64, record []byte) error {
	hashes, err := tlog.StoredHashes(n, record, t)
	if err != nil {
		return fmt.Errorf("hash entry %d: %w", n, err)
	}
	for i, h := range hashes {
		level, n := tlog.SplitStoredHashIndex(tlog.StoredHashIndex(0, n) + int64(i))
		if level%TileHeight != 0 {
			continue // within a tile, from which it is computed
		}
		id := tileID{level / TileHeight, n / tileWidth}
		data, err := t.tile(id)
		if err != nil {
			return err
		}
		at := int(n%tileWidth) * tlog.HashSize
		if len(data) < at {
			return fmt.Errorf("tile %d/%d of the log has %d bytes, expected %d", id.level, id.n, len(data), at)
		}
		t.tiles[id] = append(slices.Clip(data[:at]), h[:]...)
		t.dirty[id] = true
	}
	return nil
}

// changed lists the tiles to store.
func (t *tree) changed() []tileID {
	return slices.SortedFunc(maps.Keys(t.dirty), func(a, b tileID) int {
		if a.level != b.level {
			return a.level - b.level
		}
		return int(a.n - b.n)
	})
}

// RootAt computes the root of the first size entries.
func RootAt(ctx context.Context, size int64, load TileReader) (tlog.Hash, error) {
	return tlog.TreeHash(size, newTree(ctx, load))
}

// ProveEntry proves that the tree of a size has the entry with an index.
func ProveEntry(ctx context.Context, size, index int64, load TileReader) (tlog.RecordProof, error) {
	return tlog.ProveRecord(size, index, newTree(ctx, load))
}

// ProveConsistency proves that the tree of size to begins with the tree of size
// from.
func ProveConsistency(ctx context.Context, from, to int64, load TileReader) (tlog.TreeProof, error) {
	return tlog.ProveTree(to, from, newTree(ctx, load))
}
