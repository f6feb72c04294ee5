package evidence

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
)

// IncidentFormat names the form of an incident, which docs/audit.md describes.
const IncidentFormat = "writ-audit-incident/1"

// Subject is whom or what an incident is about: one of the three.
type Subject struct {
	Session string        `json:"session,omitempty"`
	User    *identity.Ref `json:"user,omitempty"`
	Agent   *identity.Ref `json:"agent,omitempty"`
}

// ParseRef reads ISSUER#SUBJECT.
func ParseRef(s string) (identity.Ref, error) {
	issuer, id, _ := strings.Cut(s, "#")
	if issuer == "" || id == "" {
		return identity.Ref{}, fmt.Errorf("%q is not of the form ISSUER#SUBJECT", s)
	}
	return identity.Ref{Issuer: issuer, ID: id}, nil
}

func (s Subject) query() (q audit.Query, err error) {
	n := 0
	if s.Session != "" {
		q.Session, n = s.Session, n+1
	}
	if s.User != nil {
		q.User, n = *s.User, n+1
	}
	if s.Agent != nil {
		q.Agent, n = *s.Agent, n+1
	}
	if n != 1 {
		return q, errors.New("an incident is about one session, one user or one agent")
	}
	return q, nil
}

// matches reports whether an entry names the subject itself.
func (s Subject) matches(e audit.Entry) bool {
	return s.Session != "" && e.Session == s.Session || s.User != nil && e.User == *s.User || s.Agent != nil && e.Agent == *s.Agent
}

// String names the subject.
func (s Subject) String() string {
	switch {
	case s.User != nil:
		return "the user " + s.User.String()
	case s.Agent != nil:
		return "the agent " + s.Agent.String()
	default:
		return "the session " + s.Session
	}
}

// IncidentHeader begins an incident.
type IncidentHeader struct {
	Format    string    `json:"format"`
	About     Subject   `json:"about"`
	CreatedAt time.Time `json:"created_at"`
	Origin    string    `json:"origin"`
	// From and To (exclusive) are the entries that were searched; those before From are
	// in archives.
	From       int64    `json:"from"`
	To         int64    `json:"to"`
	Checkpoint string   `json:"checkpoint"` // of size To, signed
	Verifiers  []string `json:"verifiers"`  // informational, as in Header
	Wording    int      `json:"wording"`    // of the timeline
}

// wording is the version of what Line writes: a change of it needs a new one.
const wording = 1

// IncidentEntry is an entry with the proof that the log has it.
type IncidentEntry struct {
	Index  int64            `json:"index"`
	Hashes tlog.RecordProof `json:"hashes"`
	Entry  json.RawMessage  `json:"entry"`
}

// IncidentInput is what a decision of the incident was made on. The log has only
// its keyed digest.
type IncidentInput struct {
	Decision string          `json:"decision"`
	Kept     audit.Keep      `json:"kept"`
	Digest   string          `json:"digest"` // intact, altered, unchecked
	Input    json.RawMessage `json:"input"`
}

// Incident is a whole file.
type Incident struct {
	IncidentHeader
	Entries []IncidentEntry `json:"entries"`
	Inputs  []IncidentInput `json:"inputs"`
	// Timeline says the entries to people, one line each.
	Timeline []string `json:"timeline"`
}

// Ask is what an incident is made of.
type Ask struct {
	About     Subject
	Verifiers []string
	Now       time.Time
	// Digest makes the keyed digests of inputs, to hold what is kept to its entry; nil:
	// they are not checked.
	Digest func(input []byte) string
}

// WriteIncident writes one JSON document: all entries about a subject and all
// others of its sessions, each with its proof, and what the decisions were made on.
func WriteIncident(ctx context.Context, store Store, w io.Writer, a Ask) (IncidentHeader, error) {
	i := incident{ctx: ctx, store: store, out: w, acts: map[int64]audit.Entry{}}
	err := i.find(a)
	if err == nil {
		err = i.write(a)
	}
	if err != nil {
		return i.header, fmt.Errorf("write incident: %w", err)
	}
	return i.header, nil
}

// incident is one being written.
type incident struct {
	ctx     context.Context // of one use
	store   Store
	out     io.Writer
	header  IncidentHeader
	indexes []int64
	stored  tiles
	acts    map[int64]audit.Entry // of operators, about uses of the kill switch
}

// find fixes the checkpoint and lists the entries under it.
func (i *incident) find(a Ask) error {
	q, err := a.About.query()
	if err != nil {
		return err
	}
	err = i.store.View(i.ctx, func(tx Tx) error {
		head, err := audit.HeadOf(i.ctx, tx)
		i.header = IncidentHeader{
			Format: IncidentFormat, About: a.About, CreatedAt: a.Now.UTC(), Origin: head.Origin, From: head.Pruned, To: head.Size,
			Checkpoint: head.Checkpoint, Verifiers: a.Verifiers, Wording: wording,
		}
		return err
	})
	if err != nil || i.header.To == 0 {
		return err
	}
	if err := i.findActs(); err != nil {
		return err
	}
	found, sessions := map[int64]bool{}, map[string]bool{}
	collect := func(_ Tx, list []audit.Sequenced) error {
		for _, s := range list {
			found[s.Index] = true
			e, err := audit.ParseRecord(s.Record)
			if err != nil {
				continue // for the verification to report
			}
			sessions[e.Session] = true
			for index, act := range i.acts {
				if ordered(act, e) {
					found[index] = true
				}
			}
		}
		return nil
	}
	q.From, q.To = i.header.From, i.header.To
	if err := each(i.ctx, i.store, q, collect); err != nil {
		return err
	}
	for _, s := range slices.Sorted(maps.Keys(sessions)) {
		if s == "" || s == a.About.Session {
			continue
		}
		if err := each(i.ctx, i.store, audit.Query{From: q.From, To: q.To, Session: s}, collect); err != nil {
			return err
		}
	}
	i.indexes = slices.Sorted(maps.Keys(found))
	return nil
}

// findActs reads all that operators revoked: that is never much.
func (i *incident) findActs() error {
	for _, kind := range []audit.Kind{audit.OperatorRevoked, audit.RevocationGone, audit.RevocationLifted} {
		q := audit.Query{From: i.header.From, To: i.header.To, Kind: kind}
		err := each(i.ctx, i.store, q, func(_ Tx, list []audit.Sequenced) error {
			for _, s := range list {
				if e, err := audit.ParseRecord(s.Record); err == nil { // else it is for the verification to report
					i.acts[s.Index] = e
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// ordered reports whether an operator's act caused an entry.
func ordered(act, e audit.Entry) bool {
	return isAct(act) && cause(act) != "" && cause(act) == cause(e)
}

// isAct says that an entry is about a use of the kill switch.
func isAct(e audit.Entry) bool {
	return e.Kind == audit.OperatorRevoked || e.Kind == audit.RevocationGone || e.Kind == audit.RevocationLifted
}

// cause is what an entry and the operator's act that caused it have in common, "" for
// none: the revocation; in logs of before they had names, the transaction.
func cause(e audit.Entry) string {
	if named := detail(e, "revocation"); named != "" || e.Operator.IsZero() {
		return named
	}
	return fmt.Sprint(e.At.UnixMicro(), " ", e.Operator)
}

// write streams the document.
func (i *incident) write(a Ask) error {
	if i.header.Verifiers == nil {
		i.header.Verifiers = []string{}
	}
	head, err := JSON(i.header)
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintf(i.out, "%s,\n\"entries\":[", head[:len(head)-1]); err != nil {
		return err
	}
	var timeline []string
	decisions := map[string]string{} // and the digest of its input
	n := 0
	for chunk := range slices.Chunk(i.indexes, page) {
		err := i.store.View(i.ctx, func(tx Tx) error {
			for _, index := range chunk {
				e, err := i.entry(tx, index)
				if err == nil {
					err = i.item(n, e)
				}
				if err != nil {
					return fmt.Errorf("entry %d: %w", index, err)
				}
				n++
				parsed, err := audit.ParseRecord(e.Entry)
				if err != nil {
					continue
				}
				timeline = append(timeline, Line(index, parsed))
				if digest := detail(parsed, "input", "digest"); digest != "" {
					decisions[parsed.Decision] = digest
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	if err := i.inputs(decisions, a.Digest); err != nil {
		return err
	}
	if _, err := io.WriteString(i.out, "],\n\"timeline\":["); err != nil {
		return err
	}
	for n, line := range timeline {
		if err := i.item(n, line); err != nil {
			return err
		}
	}
	_, err = io.WriteString(i.out, "]}\n")
	return err
}

func (i *incident) entry(tx Tx, index int64) (e IncidentEntry, err error) {
	list, err := tx.LogEntries(i.ctx, audit.Query{From: index, To: index + 1, Limit: 1})
	if err == nil && len(list) == 0 {
		err = errors.New("it is gone meanwhile; start again")
	}
	if err != nil {
		return e, err
	}
	e = IncidentEntry{Index: index, Entry: list[0].Record}
	e.Hashes, err = tlog.ProveRecord(i.header.To, index, i.stored.in(i.ctx, tx))
	return e, err
}

func (i *incident) inputs(decisions map[string]string, digest func([]byte) string) error {
	if _, err := io.WriteString(i.out, "],\n\"inputs\":["); err != nil {
		return err
	}
	n := 0
	for _, id := range slices.Sorted(maps.Keys(decisions)) {
		var in audit.Input
		err := i.store.View(i.ctx, func(tx Tx) (err error) {
			in, err = tx.Input(i.ctx, id)
			return err
		})
		if fault.Is(err, fault.NotFound) {
			continue // not kept, or not any more
		}
		if err != nil {
			return err
		}
		state := "unchecked" // the digest is of the whole
		if digest != nil && in.Kept == audit.KeepWhole {
			state = map[bool]string{true: "intact", false: "altered"}[digest(in.JSON) == decisions[id]]
		}
		if err := i.item(n, IncidentInput{Decision: id, Kept: in.Kept, Digest: state, Input: in.JSON}); err != nil {
			return err
		}
		n++
	}
	return nil
}

// item writes the nth of a list.
func (i *incident) item(n int, v any) error {
	b, err := JSON(v)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(i.out, "%s%s", map[bool]string{true: "\n", false: ",\n"}[n == 0], b)
	return err
}
