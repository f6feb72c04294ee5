package evidence

import (
	"cmp"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/writsec/writ/internal/audit"
)

// copied is a checkpoint that left the machine.
type copied struct {
	audit.Checkpoint
	state copyState
}

type copyState uint8

const (
	unseen copyState = iota // the tree of that size was not computed
	holds
	fails
)

// copies are all of them, by size. Each is held to the tree of its size, whatever
// its origin: only at the end is known which origins the log went by.
type copies struct {
	list  []copied
	next  int // the first that is not held to a tree yet
	torn  int // that can't be read
	alien []audit.Checkpoint
}

// readCopies reads files of checkpoints and verifies each.
func readCopies(files []io.Reader, vkeys []string) (copies, error) {
	var out copies
	for _, f := range files {
		err := audit.EachCheckpoint(f, func(signed string) error {
			c, err := openCheckpoint(signed, vkeys)
			switch {
			case err == nil:
				out.list = append(out.list, copied{Checkpoint: c})
			case isUnknown(err) && c.Origin != "":
				out.alien = append(out.alien, c)
			default:
				out.torn++
			}
			return nil
		})
		if err != nil {
			return out, err
		}
	}
	slices.SortFunc(out.list, func(a, b copied) int {
		return cmp.Or(cmp.Compare(a.Size, b.Size), cmp.Compare(a.Origin, b.Origin), slices.Compare(a.Root[:], b.Root[:]))
	})
	out.list = slices.Compact(out.list)
	return out, nil
}

// isUnknown tells a checkpoint that is well formed, but signed by none of the keys,
// from one that was torn while it was written.
func isUnknown(err error) bool {
	_, unknown := errors.AsType[*note.UnverifiedNoteError](err)
	_, forged := errors.AsType[*note.InvalidSignatureError](err)
	return unknown || forged
}

// openCheckpoint is audit.OpenCheckpoint, and takes no signature that is spelt in
// another way. It names the checkpoint also where no known key signed it.
func openCheckpoint(signed string, vkeys []string) (audit.Checkpoint, error) {
	c, err := audit.OpenCheckpoint(signed, vkeys...)
	if err != nil {
		claimed, _ := audit.ReadCheckpoint(signed)
		return claimed, err
	}
	for line := range strings.Lines(signed[strings.LastIndex(signed, "\n\n")+2:]) {
		text := strings.TrimSuffix(line[strings.LastIndexByte(line, ' ')+1:], "\n")
		if _, err := base64.StdEncoding.Strict().DecodeString(text); err != nil {
			return c, errors.New("the checkpoint's signature is malformed")
		}
	}
	return c, nil
}

// hold compares the copies of the tree's size with it, and passes over those of
// smaller sizes.
func (c *copies) hold(tree *frontier) {
	var root tlog.Hash
	known := false
	for ; c.next < len(c.list) && c.list[c.next].Size <= tree.size; c.next++ {
		if c.list[c.next].Size < tree.size {
			continue
		}
		if !known {
			root, known = tree.root(), true
		}
		c.list[c.next].state = fails
		if c.list[c.next].Root == root {
			c.list[c.next].state = holds
		}
	}
}

// former is an origin by which a log went until it was restored from a backup.
type former struct {
	origin string
	size   int64
}

// verdict is what the copies say of a log.
type verdict struct {
	holding  []audit.Checkpoint // by size
	failing  []audit.Checkpoint // by size
	unsigned []audit.Checkpoint // signed by none of the keys
	beyond   int                // of more entries than were read
	greatest int64              // size of these
	unheld   int                // not compared, since the tree was not computed there
	lost     int                // of entries that a restore from backup lost
	others   []string           // origins of other logs
}

// judge says what the copies mean for a log of an origin, of which the entries below
// end were read.
func (c *copies) judge(origin string, formers []former, end int64) (v verdict) {
	limits := map[string]int64{origin: -1}
	for _, f := range formers {
		limits[f.origin] = f.size
	}
	for _, one := range c.list {
		limit, known := limits[one.Origin]
		switch {
		case !known:
			v.others = append(v.others, one.Origin)
		case limit >= 0 && one.Size > limit:
			v.lost++
		case one.Size > end:
			v.beyond, v.greatest = v.beyond+1, one.Size
		case one.state == unseen:
			v.unheld++
		case one.state == fails:
			v.failing = append(v.failing, one.Checkpoint)
		default:
			v.holding = append(v.holding, one.Checkpoint)
		}
	}
	for _, one := range c.alien {
		if one.Origin == origin {
			v.unsigned = append(v.unsigned, one)
		} else {
			v.others = append(v.others, one.Origin)
		}
	}
	slices.Sort(v.others)
	v.others = slices.Compact(v.others)
	return v
}

// notes says what of the copies is no problem, but should be known.
func (v verdict) notes(torn int) (out []string) {
	add := func(n int, format string, args ...any) {
		if n > 0 {
			out = append(out, fmt.Sprintf("%d %s", n, fmt.Sprintf(format, args...)))
		}
	}
	add(v.beyond, "copied checkpoints are of more entries, up to %d: the log went on after this was written", v.greatest)
	add(v.unheld, "copied checkpoints were not compared: they are of sizes that can't be computed from what was read")
	add(v.lost, "copied checkpoints are of entries that a restore from backup lost")
	add(torn, "copied checkpoints are torn")
	for _, o := range v.others {
		out = append(out, "copied checkpoints of another log, or of before a restore and without its key, were ignored: "+o)
	}
	return out
}
