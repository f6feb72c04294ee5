package audit

import (
	"bytes"
	"encoding/json"
	"fmt"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/writsec/writ/internal/identity"
)

// record is the form in which an entry is hashed, version 1. docs/audit.md is its
// contract: members are only ever added.
type record struct {
	Version  int            `json:"v"`
	At       string         `json:"at"` // RFC 3339 in UTC, with microseconds
	Kind     Kind           `json:"kind"`
	Request  string         `json:"request,omitempty"`
	Trace    string         `json:"trace,omitempty"`
	User     *identity.Ref  `json:"user,omitempty"`
	Agent    *identity.Ref  `json:"agent,omitempty"`
	Operator *identity.Ref  `json:"operator,omitempty"`
	Session  string         `json:"session,omitempty"`
	Decision string         `json:"decision,omitempty"`
	Approval string         `json:"approval,omitempty"`
	Lease    string         `json:"lease,omitempty"`
	Detail   map[string]any `json:"detail,omitempty"`
}

const recordTime = "2006-01-02T15:04:05.000000Z"

// Record is the canonical JSON (RFC 8785) of an entry: the bytes that the tree
// commits to.
func (e Entry) Record() ([]byte, error) {
	data, err := json.Marshal(record{
		Version: 1, At: e.At.UTC().Format(recordTime), Kind: e.Kind, Request: e.RequestID, Trace: e.TraceID,
		User: refOf(e.User), Agent: refOf(e.Agent), Operator: refOf(e.Operator),
		Session: e.Session, Decision: e.Decision, Approval: e.Approval, Lease: e.Lease, Detail: e.Detail,
	})
	if err != nil {
		return nil, fmt.Errorf("write audit record: %w", err)
	}
	v := jsontext.Value(data)
	if err := v.Canonicalize(); err != nil {
		return nil, fmt.Errorf("write audit record: %w", err)
	}
	return v, nil
}

func refOf(r identity.Ref) *identity.Ref {
	if r.IsZero() {
		return nil
	}
	return &r
}

// ParseRecord reads what Record wrote.
func ParseRecord(data []byte) (Entry, error) {
	var r record
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	if err := d.Decode(&r); err != nil {
		return Entry{}, fmt.Errorf("read audit record: %w", err)
	}
	at, err := time.Parse(recordTime, r.At)
	if err != nil || r.Version != 1 || r.Kind == "" {
		return Entry{}, fmt.Errorf("read audit record: not a record of version 1")
	}
	e := Entry{
		At: at, Kind: r.Kind, RequestID: r.Request, TraceID: r.Trace,
		Session: r.Session, Decision: r.Decision, Approval: r.Approval, Lease: r.Lease, Detail: r.Detail,
	}
	for _, p := range []struct {
		to   *identity.Ref
		from *identity.Ref
	}{{&e.User, r.User}, {&e.Agent, r.Agent}, {&e.Operator, r.Operator}} {
		if p.from != nil {
			*p.to = *p.from
		}
	}
	return e, nil
}
