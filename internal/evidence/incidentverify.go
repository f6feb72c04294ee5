package evidence

import (
	"errors"
	"fmt"
	"io"
	"slices"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/writsec/writ/internal/audit"
)

// IncidentReport is what the verification of an incident found.
type IncidentReport struct {
	IncidentHeader
	Entries, Inputs int
	Notes           []string
	Problems        []Problem
}

// VerifyIncident proves every entry of an incident, and that its timeline says what
// they say. That nothing is left out only the whole log proves.
func VerifyIncident(r io.Reader, vkeys []string) (IncidentReport, error) {
	if err := checkVerifiers(vkeys); err != nil {
		return IncidentReport{}, err
	}
	var i Incident
	if err := decode(r, &i); err != nil || i.Format != IncidentFormat {
		return IncidentReport{}, errors.Join(errors.New("not an incident of the format "+IncidentFormat), err)
	}
	out := IncidentReport{IncidentHeader: i.IncidentHeader, Entries: len(i.Entries), Inputs: len(i.Inputs)}
	problem := func(from int64, format string, args ...any) {
		out.Problems = append(out.Problems, Problem{from, from + 1, fmt.Sprintf(format, args...)})
	}
	c, err := openCheckpoint(i.Checkpoint, vkeys)
	if err == nil && (c.Origin != i.Origin || c.Size != i.To) {
		err = fmt.Errorf("its checkpoint is of %d entries of %s", c.Size, c.Origin)
	}
	if err != nil {
		problem(-1, "the incident of %s: %v", i.Origin, err)
		return out, nil
	}
	if _, err := i.About.query(); err != nil {
		problem(-1, "%v", err)
		return out, nil
	}
	entries := map[int64]audit.Entry{}
	var timeline []string
	before := int64(-1)
	for _, e := range i.Entries {
		record := canonical(e.Entry)
		if e.Index <= before {
			problem(e.Index, "stands out of order")
			continue
		}
		before = e.Index
		if tlog.CheckRecord(e.Hashes, c.Size, c.Root, e.Index, tlog.RecordHash(record)) != nil {
			problem(e.Index, "not in the log of the checkpoint")
			continue
		}
		if entry, err := audit.ParseRecord(record); err != nil {
			problem(e.Index, "%v", err)
		} else {
			entries[e.Index] = entry
			timeline = append(timeline, Line(e.Index, entry))
		}
	}
	for _, index := range unrelated(i.About, entries) {
		problem(index, "has nothing to do with what the incident is about")
	}
	decisions := map[string]bool{}
	for _, e := range entries {
		decisions[e.Decision] = e.Decision != ""
	}
	for _, in := range i.Inputs {
		if !decisions[in.Decision] {
			problem(-1, "an input is of the decision %q, of which there is no entry", in.Decision)
		}
		if in.Digest == "altered" {
			problem(-1, "the input of decision %s was changed: it is not what its entry has the digest of", in.Decision)
		}
	}
	switch same := slices.Equal(timeline, i.Timeline); {
	case i.Wording != wording:
		out.Notes = append(out.Notes, "the timeline was worded by another version of Writ and not compared with the entries")
	case !same && len(out.Problems) == 0:
		problem(-1, "the timeline does not say what the entries say")
	}
	if len(i.Inputs) > 0 {
		out.Notes = append(out.Notes, "the inputs are not proven by the log, which has only keyed digests of them")
	}
	if i.From > 0 {
		out.Notes = append(out.Notes, fmt.Sprintf("the entries below %d were in archives and not searched", i.From))
	}
	return out, nil
}

// unrelated lists the entries that neither name the subject, nor are of a session of
// one that does, nor are the operator's act that ended one.
func unrelated(about Subject, entries map[int64]audit.Entry) (out []int64) {
	sessions := map[string]bool{}
	for _, e := range entries {
		if e.Session != "" && about.matches(e) {
			sessions[e.Session] = true
		}
	}
	related := func(e audit.Entry) bool { return about.matches(e) || sessions[e.Session] }
	causes := map[string]bool{}
	for _, e := range entries {
		if related(e) {
			causes[cause(e)] = true
		}
	}
	for index, e := range entries {
		if !related(e) && (!isAct(e) || cause(e) == "" || !causes[cause(e)]) {
			out = append(out, index)
		}
	}
	slices.Sort(out)
	return out
}

// VerifyProof proves one entry by the JSON of an audit.Proof, which may have been
// reformatted.
func VerifyProof(r io.Reader, vkeys []string) (audit.Proof, audit.Checkpoint, error) {
	var p audit.Proof
	if err := checkVerifiers(vkeys); err != nil {
		return p, audit.Checkpoint{}, err
	}
	if err := decode(r, &p); err != nil {
		return p, audit.Checkpoint{}, fmt.Errorf("read proof: %w", err)
	}
	p.Entry = canonical(p.Entry)
	c, err := p.Verify(vkeys...)
	return p, c, err
}

// VerifyConsistency proves by the JSON of an audit.Consistency that a log only grew
// since an older checkpoint. It returns both.
func VerifyConsistency(r io.Reader, older string, vkeys []string) (from, to audit.Checkpoint, err error) {
	if err := checkVerifiers(vkeys); err != nil {
		return from, to, err
	}
	var c audit.Consistency
	if err := decode(r, &c); err != nil {
		return from, to, fmt.Errorf("read proof: %w", err)
	}
	if err := c.Verify(older, vkeys...); err != nil {
		return from, to, err
	}
	if from, err = openCheckpoint(older, vkeys); err == nil {
		to, err = openCheckpoint(c.Checkpoint, vkeys)
	}
	return from, to, err
}
