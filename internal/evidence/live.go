package evidence

import (
	"context"
	"io"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/writsec/writ/internal/audit"
)

// VerifyStore proves the log as the store has it now: an export that is verified
// while it is made, and then the hashes that proofs are made of.
func VerifyStore(ctx context.Context, store Store, o Options) (Report, error) {
	o.Current = true
	v, err := NewVerifier(o)
	if err != nil {
		return Report{}, err
	}
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		_, err := Export(ctx, store, w, -1, 0, nil)
		_ = w.CloseWithError(err) // never fails
		done <- err
	}()
	err = v.Read(r)
	_ = r.CloseWithError(io.ErrClosedPipe) // ends a writer that nobody reads
	if exported := <-done; err == nil {
		err = exported
	}
	if err != nil {
		return Report{}, err
	}
	report := v.Report()
	wrong, err := checkTiles(ctx, store, report.To)
	report.Problems = append(report.Problems, wrong...)
	return report, err
}

// tileWidth is how many hashes a whole tile has.
const tileWidth = 1 << audit.TileHeight

// checkTiles holds the tiles of each level to those below, as far as a log of a size
// fills them.
func checkTiles(ctx context.Context, store Store, size int64) (out []Problem, err error) {
	covers := int64(tileWidth) // entries below one hash of the level
	for level := 1; size >= covers; level++ {
		for n := range size / covers {
			var below, above []byte
			err := store.View(ctx, func(tx Tx) (err error) {
				if below, err = tx.Tile(ctx, level-1, n); err == nil {
					above, err = tx.Tile(ctx, level, n/tileWidth)
				}
				return err
			})
			if err != nil {
				return out, err
			}
			if want, ok := tileRoot(below); !ok || !hasHash(above, int(n%tileWidth), want) {
				if len(out) < maxProblems {
					out = append(out, Problem{n * covers, (n + 1) * covers, "the stored hashes contradict each other, so that these can't be proven one by one"})
				}
			}
		}
		covers *= tileWidth
	}
	return out, nil
}

// tileRoot is the hash of a whole tile.
func tileRoot(data []byte) (tlog.Hash, bool) {
	if len(data) != tileWidth*tlog.HashSize {
		return tlog.Hash{}, false
	}
	var f frontier
	for ; len(data) > 0; data = data[tlog.HashSize:] {
		f.add(tlog.Hash(data[:tlog.HashSize]))
	}
	return f.root(), true
}

func hasHash(tile []byte, i int, want tlog.Hash) bool {
	at := i * tlog.HashSize
	return len(tile) >= at+tlog.HashSize && tlog.Hash(tile[at:at+tlog.HashSize]) == want
}
