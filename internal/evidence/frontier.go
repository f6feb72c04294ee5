package evidence

import (
	"math/bits"

	"golang.org/x/mod/sumdb/tlog"
)

// frontier is a tree to which entries are added at its right edge: the roots of its
// maximal complete subtrees, oldest first, which commit to all that is in it.
type frontier struct {
	size   int64
	hashes []tlog.Hash
}

// readFrontier returns the frontier of a tree's first size entries.
func readFrontier(size int64, r tlog.HashReader) (frontier, error) {
	var indexes []int64
	for left := size; left > 0; {
		level := bits.Len64(uint64(left)) - 1
		indexes = append(indexes, tlog.StoredHashIndex(level, (size-left)>>level))
		left -= 1 << level
	}
	hashes, err := r.ReadHashes(indexes)
	return frontier{size, hashes}, err
}

// whole reports whether the frontier has as many hashes as its size needs.
func (f frontier) whole() bool {
	return f.size >= 0 && len(f.hashes) == bits.OnesCount64(uint64(f.size))
}

// add appends an entry's hash.
func (f *frontier) add(h tlog.Hash) {
	for n := f.size; n&1 == 1; n >>= 1 {
		last := len(f.hashes) - 1
		h = tlog.NodeHash(f.hashes[last], h)
		f.hashes = f.hashes[:last]
	}
	f.hashes = append(f.hashes, h)
	f.size++
}

// root is the root of the tree.
func (f frontier) root() tlog.Hash {
	if len(f.hashes) == 0 {
		empty, _ := tlog.TreeHash(0, nil) // reads nothing
		return empty
	}
	last := len(f.hashes) - 1
	h := f.hashes[last]
	for last--; last >= 0; last-- {
		h = tlog.NodeHash(f.hashes[last], h)
	}
	return h
}
