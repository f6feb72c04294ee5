package idp

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"time"
)

// Prompt is what a person sees on the phone, and what came of it.
type Prompt struct {
	ID                   string          `json:"id"`
	AuthReqID            string          `json:"auth_req_id"`
	Account              string          `json:"account"`
	Client               string          `json:"client"`
	Scope                string          `json:"scope"`
	BindingMessage       string          `json:"binding_message"`
	ACRValues            []string        `json:"acr_values"`
	AuthorizationDetails json.RawMessage `json:"authorization_details"`
	RequestedExpiry      int             `json:"requested_expiry"` // seconds; 0: none asked
	ExpiresIn            int             `json:"expires_in"`       // seconds
	CreatedAt            time.Time       `json:"created_at"`
	ExpiresAt            time.Time       `json:"expires_at"`
	Status               Status          `json:"status"`
	AnsweredAt           time.Time       `json:"answered_at"`
	RedeemedAt           time.Time       `json:"redeemed_at"` // when the tokens were collected
	PingError            string          `json:"ping_error"`
}

// Status of a prompt.
type Status string

// The states of a prompt.
const (
	Pending  Status = "pending"
	Approved Status = "approved"
	Denied   Status = "denied"
	Expired  Status = "expired"
)

// Verdict is a person's answer. The zero value approves as asked.
type Verdict struct {
	Deny bool
	// ACR of the ID token; empty is the first of the acr_values asked for.
	ACR string
	AMR []string // nil is ["mfa"]
	// AuthTime of the ID token; zero is now.
	AuthTime time.Time
	// As makes another person answer: the tokens are then that one's.
	As string
	// Error ends a denied prompt with another error than access_denied.
	Error string
	// AuthorizationDetails replace those that were asked for.
	AuthorizationDetails any
}

// Prompts lists all prompts since the start, oldest first.
func (p *IdP) Prompts(ctx context.Context) ([]Prompt, error) {
	var list []Prompt
	return list, p.call(ctx, "/prompts", nil, &list)
}

// WaitPrompt returns the first prompt that matches, as soon as there is one.
func (p *IdP) WaitPrompt(ctx context.Context, match func(Prompt) bool) (Prompt, error) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		list, err := p.Prompts(ctx)
		if err != nil {
			return Prompt{}, err
		}
		for _, prompt := range list {
			if match(prompt) {
				return prompt, nil
			}
		}
		select {
		case <-ctx.Done():
			return Prompt{}, fmt.Errorf("wait for a prompt (%d others): %w", len(list), ctx.Err())
		case <-tick.C:
		}
	}
}

// Approve answers a prompt, named by its ID or its auth_req_id, with yes.
func (p *IdP) Approve(ctx context.Context, id string) error {
	return p.Answer(ctx, id, Verdict{})
}

// Deny answers a prompt with no.
func (p *IdP) Deny(ctx context.Context, id string) error {
	return p.Answer(ctx, id, Verdict{Deny: true})
}

// Answer answers a prompt. Only a pending one can be answered.
func (p *IdP) Answer(ctx context.Context, id string, v Verdict) error {
	body := map[string]any{"verdict": "approve"}
	if v.Deny {
		body["verdict"] = "deny"
	}
	if v.ACR != "" {
		body["acr"] = v.ACR
	}
	if v.AMR != nil {
		body["amr"] = v.AMR
	}
	if !v.AuthTime.IsZero() {
		body["auth_time"] = v.AuthTime.Unix()
	}
	if v.As != "" {
		body["as"] = v.As
	}
	if v.Error != "" {
		body["error"] = v.Error
	}
	if v.AuthorizationDetails != nil {
		body["authorization_details"] = v.AuthorizationDetails
	}
	return p.call(ctx, "/prompts/"+url.PathEscape(id), body, nil)
}

// Poll is one token request with the CIBA grant.
type Poll struct {
	AuthReqID string    `json:"auth_req_id"`
	Prompt    string    `json:"prompt"` // ID; empty: no such prompt
	Client    string    `json:"client"`
	Start     time.Time `json:"start"`
	End       time.Time `json:"end"` // zero while it runs
	// GapMS is the time since the start of the one before, of the same prompt.
	GapMS int `json:"gap_ms"`
	// Overlap: another one of the same prompt was still running.
	Overlap bool `json:"overlap"`
	Status  int  `json:"status"`
	// Outcome is "tokens", an OAuth error, or "fault:" and a kind.
	Outcome string    `json:"outcome"`
	Fault   FaultKind `json:"fault"`
}

// Polls lists all polls since the start, in the order of their arrival.
func (p *IdP) Polls(ctx context.Context) ([]Poll, error) {
	var list []Poll
	return list, p.call(ctx, "/polls", nil, &list)
}

// Request is one backchannel authentication request, accepted or not.
type Request struct {
	Client     string            `json:"client"`
	Parameters map[string]string `json:"parameters"` // less the client's secret
	Start      time.Time         `json:"start"`
	End        time.Time         `json:"end"`
	Status     int               `json:"status"`
	Outcome    string            `json:"outcome"` // "accepted", an OAuth error, or "fault:" and a kind
	Fault      FaultKind         `json:"fault"`
	AuthReqID  string            `json:"auth_req_id"`
}

// Requests lists all backchannel authentication requests since the start.
func (p *IdP) Requests(ctx context.Context) ([]Request, error) {
	var list []Request
	return list, p.call(ctx, "/requests", nil, &list)
}

// Reset forgets prompts, logs, faults and tokens, but keeps the keys.
func (p *IdP) Reset(ctx context.Context) error {
	return p.call(ctx, "/reset", struct{}{}, nil)
}
