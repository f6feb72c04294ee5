package policy

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/intent"
)

// Input is what policy is asked about; docs/policies.md is its contract.
type Input struct {
	User     identity.Principal
	Agent    identity.Principal
	Session  SessionFacts
	Recent   RecentFacts
	Intent   intent.Intent
	Resource intent.Resource
	Context  map[string]any
	Time     time.Time // the store's clock, also what time.now_ns says
	IP       string    // of the caller, as Writ sees it
	// Approvals are the yeses to this very act. nil: not a continuation.
	Approvals []Approval
}

// SessionFacts is what policy may know of a session.
type SessionFacts struct {
	ID        string
	Task      map[string]any // nil when none was declared
	Envelope  map[string]any // nil when none was declared
	Labels    []string
	Counters  map[string]int64
	StartedAt time.Time
}

// RecentFacts is what was left on the pair of user and agent, in all its sessions,
// within a window of time.
type RecentFacts struct {
	Window   time.Duration
	Labels   []string
	Counters map[string]int64
}

// Approval is one human yes.
type Approval struct {
	Approver string    // as the ask named them
	ACR      string    // how they were authenticated, by the provider's word
	AMR      []string  // with which factors
	AuthTime time.Time // when; zero where the provider did not say
}

// Document is what policy sees as input, and what can be kept to decide again.
func (in Input) Document() map[string]any {
	session := map[string]any{
		"id": in.Session.ID, "labels": list(in.Session.Labels), "counters": counters(in.Session.Counters),
		"started_at": in.Session.StartedAt.UTC().Format(time.RFC3339Nano),
	}
	if in.Session.Task != nil {
		session["task"] = in.Session.Task
	}
	if in.Session.Envelope != nil {
		session["envelope"] = in.Session.Envelope
	}
	doc := map[string]any{
		"user":    principal(in.User),
		"agent":   principal(in.Agent),
		"session": session,
		"recent": map[string]any{
			"window": span(in.Recent.Window), "labels": list(in.Recent.Labels), "counters": counters(in.Recent.Counters),
		},
		"intent": map[string]any{
			"action": in.Intent.Action, "parameters": object(in.Intent.Parameters), "purpose": in.Intent.Purpose,
		},
		"resource": map[string]any{
			"type": in.Resource.Type, "id": in.Resource.ID, "properties": object(in.Resource.Properties),
		},
		"context": object(in.Context),
		"env":     map[string]any{"time": in.Time.UTC().Format(time.RFC3339Nano), "ip": in.IP},
	}
	if in.Approvals != nil {
		var out []any
		for _, a := range in.Approvals {
			m := map[string]any{"approver": a.Approver, "acr": a.ACR, "amr": list(a.AMR)}
			if !a.AuthTime.IsZero() {
				m["auth_time"] = a.AuthTime.UTC().Format(time.RFC3339)
			}
			out = append(out, m)
		}
		doc["approvals"] = out
	}
	return doc
}

// ParseClaims is claims as policy evaluates them, for identity.Config.
func ParseClaims(claims map[string]any) any {
	v, err := ast.InterfaceToValue(object(claims))
	if err != nil {
		return nil // evaluating them will fail, and say why
	}
	return v
}

// evaluable is Document with claims that were parsed before.
func (in Input) evaluable() map[string]any {
	doc := in.Document()
	for who, p := range map[string]identity.Principal{"user": in.User, "agent": in.Agent} {
		if v, ok := p.Parsed.(ast.Value); ok {
			doc[who].(map[string]any)["claims"] = v
		}
	}
	return doc
}

func principal(p identity.Principal) map[string]any {
	return map[string]any{"id": p.ID, "issuer": p.Issuer, "claims": object(p.Claims)}
}

func object(m map[string]any) map[string]any {
	if m == nil {
		return map[string]any{}
	}
	return m
}

func list(s []string) []any {
	out := make([]any, len(s))
	for i, v := range s {
		out[i] = v
	}
	return out
}

func counters(m map[string]int64) map[string]any {
	out := make(map[string]any, len(m))
	for k, v := range m {
		out[k] = json.Number(fmt.Sprint(v))
	}
	return out
}

// span writes a duration without the parts that are zero, such as 24h.
func span(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}
