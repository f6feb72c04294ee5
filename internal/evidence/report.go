package evidence

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/writsec/writ/internal/audit"
)

// Report is what a verification found.
type Report struct {
	Origin   string
	From, To int64 // the entries that were read
	// Root is of the first To entries; zero where it can't be computed.
	Root tlog.Hash
	// Checkpoint is the signed one that the last file was held to.
	Checkpoint audit.Checkpoint
	// First and Last are the times of the first and the last entry.
	First, Last time.Time
	// Copies is how many copied checkpoints agree; Covered is the size of the greatest.
	Copies  int
	Covered int64
	// Notes are what should be known, and no problem.
	Notes []string
	// Problems are what is wrong, in the order of the log. None: all is proven.
	Problems []Problem
}

// maxProblems bounds a report.
const maxProblems = 100

// Report says what was found in the files that were read.
func (v *Verifier) Report() Report {
	r := v.report
	if !v.broken {
		r.Root = v.tree.root()
	}
	if len(v.last) > 0 {
		if e, err := audit.ParseRecord(v.last); err == nil {
			r.Last = e.At
		}
	}
	said := v.copies.judge(r.Origin, v.formers, r.To)
	if r.Copies = len(said.holding); r.Copies > 0 {
		r.Covered = said.holding[r.Copies-1].Size
	}
	r.Problems = slices.Clone(r.Problems)
	if p, ok := v.rewritten(said); ok {
		r.Problems = append(r.Problems, p)
	}
	if n := len(said.unsigned); n > 0 {
		r.Problems = append(r.Problems, Problem{From: -1, Text: fmt.Sprintf(
			"%d copied checkpoints, such as that of size %d, are signed by none of the keys that were given: a key is missing, or they are forged", n, said.unsigned[0].Size)})
	}
	if v.Current && said.beyond > 0 {
		r.Problems = append(r.Problems, Problem{From: r.To, To: said.greatest, Text: "are in the log by a copied checkpoint, but not in the store: the log was cut off"})
		said.beyond = 0
	}
	slices.SortStableFunc(r.Problems, func(a, b Problem) int { return cmp.Compare(a.From, b.From) })
	r.Notes = said.notes(v.copies.torn)
	if v.more > 0 {
		r.Notes = append(r.Notes, fmt.Sprintf("%d more problems are not listed", v.more))
	}
	return r
}

// anchor is a signed checkpoint that the tree was held to.
type anchor struct {
	size  int64
	holds bool
	what  string
}

// rewritten finds the entries between the last checkpoint that holds and the first
// that doesn't, unless a problem of one of them says it already.
func (v *Verifier) rewritten(said verdict) (Problem, bool) {
	anchors := slices.Clone(v.anchors)
	for _, c := range said.holding {
		anchors = append(anchors, anchor{c.Size, true, ""})
	}
	for _, c := range said.failing {
		anchors = append(anchors, anchor{c.Size, false, fmt.Sprintf("the copied checkpoint of size %d of %s", c.Size, c.Origin)})
	}
	slices.SortStableFunc(anchors, func(a, b anchor) int { return cmp.Compare(a.size, b.size) })
	var below int64 // of the greatest size that holds
	for i, a := range anchors {
		if a.holds {
			continue
		}
		for _, b := range anchors[:i] {
			if b.holds && b.size < a.size {
				below = b.size
			}
		}
		for _, p := range v.report.Problems {
			if p.From < a.size && p.To > below {
				return Problem{}, false
			}
		}
		return Problem{below, a.size, "are not those that " + a.what + " was signed for: they, or the hashes in the header, were rewritten"}, true
	}
	return Problem{}, false
}
