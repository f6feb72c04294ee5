package evidence

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/writsec/writ/internal/audit"
)

// Options are what an export is held to.
type Options struct {
	// Verifiers are the keys that checkpoints must be signed by, at least one. They must
	// come from elsewhere than the file.
	Verifiers []string
	// Copies are files of checkpoints that left the machine, as audit.FilePlace writes
	// them.
	Copies []io.Reader
	// Current states that the export is of this moment: a copy with more entries shows
	// that the log lost some.
	Current bool
}

// Verify proves one export. What is wrong is reported, not returned: an error means
// that nothing was verified.
func Verify(r io.Reader, o Options) (Report, error) {
	v, err := NewVerifier(o)
	if err != nil {
		return Report{}, err
	}
	if err := v.Read(r); err != nil {
		return Report{}, err
	}
	return v.Report(), nil
}

// Verifier proves a log that is in one or more files, each of which goes on where
// the one before ended, such as archives and then an export.
type Verifier struct {
	Options
	copies copies

	files   int
	report  Report
	more    int // problems that are not listed
	tree    frontier
	broken  bool // the tree can't be computed any further
	anchors []anchor
	formers []former
	last    []byte // the last entry
}

// NewVerifier makes a Verifier.
func NewVerifier(o Options) (*Verifier, error) {
	if err := checkVerifiers(o.Verifiers); err != nil {
		return nil, err
	}
	v := &Verifier{Options: o}
	var err error
	v.copies, err = readCopies(o.Copies, o.Verifiers)
	return v, err
}

// checkVerifiers demands keys.
func checkVerifiers(keys []string) error {
	if len(keys) == 0 {
		return errors.New("a verifier key is needed, and must not come from what is to be verified")
	}
	for _, key := range keys {
		if err := checkVerifier(key); err != nil {
			return fmt.Errorf("verifier key %q: %w", key, err)
		}
	}
	return nil
}

// Read verifies the next file. An error means that it could not be read.
func (v *Verifier) Read(r io.Reader) error {
	l := newLines(r)
	if err := l.next(); err != nil && !errors.Is(err, errLong) {
		return err
	}
	h, err := parseHeader(l.line)
	if err != nil {
		v.problem(-1, -1, "%v", err)
		v.broken = true
		return nil
	}
	signed := v.begin(h)
	next := h.From
	for {
		switch err := l.next(); {
		case errors.Is(err, errLong):
			v.broken = true
			v.problem(next, next+1, "its line is too long to be Writ's; what follows was not read")
			return nil
		case err != nil:
			return err
		}
		if len(l.line) == 0 {
			break
		}
		next = v.entry(h, l, next)
	}
	if next < h.To {
		v.broken = true
		v.problem(next, h.To, "missing: the file is cut off")
	}
	if signed && !v.broken {
		c := v.report.Checkpoint
		v.anchors = append(v.anchors, anchor{h.To, growsTo(v.tree, h.Tail, c), fmt.Sprintf("the checkpoint of size %d of %s", c.Size, c.Origin)})
	}
	return nil
}

// begin takes up a file, and reports whether its checkpoint is signed.
func (v *Verifier) begin(h Header) bool {
	r := &v.report
	switch {
	case v.files == 0:
		r.From = h.From
	case h.From > r.To:
		v.problem(r.To, h.From, "in none of the files")
	case h.From < r.To:
		v.problem(h.From, r.To, "in the file before as well: give the files in their order")
	case !v.broken && !slices.Equal(h.Range, v.tree.hashes):
		v.problem(0, h.From, "not those that the next file goes on from")
	}
	v.files++
	v.tree, v.broken = frontier{h.From, slices.Clone(h.Range)}, false
	v.copies.hold(&v.tree)
	r.Origin, r.To = h.Origin, h.To
	var err error
	r.Checkpoint, err = openCheckpoint(h.Checkpoint, v.Verifiers)
	switch {
	case err == nil && r.Checkpoint.Origin != h.Origin:
		err = fmt.Errorf("its checkpoint is of %s", r.Checkpoint.Origin)
	case err == nil && r.Checkpoint.Size < h.To:
		err = fmt.Errorf("its checkpoint is of size %d only", r.Checkpoint.Size)
	}
	if err != nil {
		v.problem(-1, -1, "the export to %d of %s: %v", h.To, h.Origin, err)
	}
	return err == nil
}

// growsTo checks that a checkpoint is of a tree that begins with this one.
func growsTo(tree frontier, tail tlog.TreeProof, c audit.Checkpoint) bool {
	if c.Size == tree.size {
		return len(tail) == 0 && tree.root() == c.Root
	}
	return tree.size > 0 && tlog.CheckTree(tail, c.Size, c.Root, tree.size, tree.root()) == nil
}

// entry verifies one line, where the entry with the index next should stand, and
// returns what should stand after it. The line after tells which of the two is out
// of place.
func (v *Verifier) entry(h Header, l *lines, next int64) int64 {
	index, hash, entry, ok := parseLine(l.line)
	after, _, _, parsed := parseLine(l.after)
	if !parsed {
		after = -1
	}
	extra := after == next || next >= h.To
	last := len(l.after) == 0 && next == h.To-1
	switch {
	case ok && index == next && next < h.To:
	case ok && extra:
		v.problem(index, index+1, "stands where entry %d or the end should: it was inserted, repeated or moved", next)
		return next
	case extra:
		v.problem(next, next+1, "a line that is not Writ's stands before it")
		return next
	case !ok:
		v.broken = true
		v.problem(next, next+1, "its line is not as Writ writes it")
		return next + 1
	case after == next+1 || last:
		v.problem(next, next+1, "its line has the index %d", index)
	case index > next && index < h.To:
		v.broken = true
		v.problem(next, index, "missing")
		next = index
	default:
		v.problem(index, index+1, "stands where entry %d should: it was inserted, repeated or moved", next)
		return next
	}
	if tlog.RecordHash(entry) != hash {
		v.problem(next, next+1, "was changed: it is not what the tree has at its place")
	} else {
		v.remember(entry)
	}
	if !v.broken {
		v.tree.add(hash)
		v.copies.hold(&v.tree)
	}
	return next + 1
}

// remember notes what the report needs of an entry that is as it was written.
func (v *Verifier) remember(entry []byte) {
	v.last = append(v.last[:0], entry...)
	restored := bytes.Contains(entry, []byte(`"kind":"`+audit.LogRestored+`"`))
	if !restored && !v.report.First.IsZero() {
		return
	}
	e, err := audit.ParseRecord(entry)
	if err != nil {
		return
	}
	if v.report.First.IsZero() {
		v.report.First = e.At
	}
	origin, _ := e.Detail["previous_origin"].(string)
	size, _ := e.Detail["previous_size"].(json.Number)
	if n, err := size.Int64(); err == nil && e.Kind == audit.LogRestored {
		v.formers = append(v.formers, former{origin, n})
	}
}

// problem reports what is wrong with entries.
func (v *Verifier) problem(from, to int64, format string, args ...any) {
	if len(v.report.Problems) >= maxProblems {
		v.more++
		return
	}
	v.report.Problems = append(v.report.Problems, Problem{from, to, fmt.Sprintf(format, args...)})
}
