package minter

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/writsec/writ/internal/dpop"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/lease"
)

// JWTKind is the kind of credential that JWT mints.
const JWTKind = "jwt"

// JWT mints RFC 9068 access tokens for one audience. Writ signs them by itself, so
// there is nothing outside to make or unmake: the lease is the truth, and
// introspection tells it.
type JWT struct {
	Name     string // of this minter in the configuration
	Issuer   string // Writ
	Audience string
	Scopes   []string // the most that a token can carry
	MaxTTL   time.Duration
	// EnforcesDetails: the audience checks authorization_details, so a token is good
	// for its act only.
	EnforcesDetails bool
	// Checks is how the audience learns that a token ended before its time.
	Checks Checks
	Keys   *Keys
	Status *StatusLists // for CheckStatusList
}

// Checks is what an audience does with a token beyond verifying it.
type Checks string

// What audiences do.
const (
	CheckNone          Checks = "none"
	CheckIntrospection Checks = "introspection" // of every token
	CheckStatusList    Checks = "status_list"   // read anew as often as the list says
)

// revocability is when a token that is revoked stops working, if the audience does so.
func (c Checks) revocability() string {
	switch c {
	case CheckIntrospection:
		return lease.RevocableIntrospect
	case CheckStatusList:
		return lease.RevocableStatus
	case CheckNone:
	}
	return lease.RevocableExpiry
}

// Plan implements lease.Minter. The scope that policy wants has one member, scopes.
func (m *JWT) Plan(w lease.Want) (lease.Grant, *lease.Refusal) {
	g := lease.Grant{
		Minter: m.Name, Kind: JWTKind, TTL: min(w.TTL, m.MaxTTL),
		Revocability: m.Checks.revocability(), Precision: lease.PrecisionCoarse, Renewable: true, Binds: true,
	}
	if m.EnforcesDetails {
		g.Precision = lease.PrecisionExact
	}
	scopes, ok := scopesOf(w.Scope)
	if !ok {
		return g, &lease.Refusal{Code: "credential_scope", Message: `Policy must give a jwt credential the scope {"scopes": ["…"]} and nothing else`}
	}
	for _, s := range scopes {
		if !slices.Contains(m.Scopes, s) {
			return g, &lease.Refusal{Code: "credential_scope", Message: fmt.Sprintf("Policy wants the scope %q, which minter %s does not grant", s, m.Name)}
		}
	}
	g.Scope = map[string]any{"scopes": scopes}
	switch {
	case g.TTL < time.Second:
		return g, &lease.Refusal{Code: "credential_ttl", Message: "Policy wants a credential that lives less than a second"}
	case !lease.MeetsLeast(g.Revocability, w.Revocability):
		return g, &lease.Refusal{Code: "credential_revocability", Message: fmt.Sprintf(
			"Policy demands revocability %q; minter %s offers %q", w.Revocability, m.Name, g.Revocability)}
	case !lease.MeetsLeast(g.Precision, w.Precision):
		return g, &lease.Refusal{Code: "credential_precision", Message: fmt.Sprintf(
			"Policy demands precision %q; minter %s offers %q", w.Precision, m.Name, g.Precision)}
	}
	return g, nil
}

func scopesOf(scope map[string]any) ([]string, bool) {
	list, ok := scope["scopes"].([]any)
	if !ok || len(scope) != 1 || len(list) == 0 {
		return nil, false
	}
	var out []string
	for _, v := range list {
		s, ok := v.(string)
		if !ok || s == "" || strings.ContainsAny(s, " \"\\") { // RFC 6749 §3.3
			return nil, false
		}
		out = append(out, s)
	}
	return out, true
}

// claims are those of RFC 9068 §2.2, with sub qualified by issuer, because Writ
// speaks of the users of several.
type claims struct {
	Issuer   string       `json:"iss"`
	Audience string       `json:"aud"`
	Subject  string       `json:"sub"`
	SubID    subID        `json:"sub_id"` // RFC 9493 §3.2.2
	Act      identity.Ref `json:"act"`    // RFC 8693 §4.1
	ClientID string       `json:"client_id"`
	IssuedAt int64        `json:"iat"`
	Expires  int64        `json:"exp"`
	ID       string       `json:"jti"` // the lease
	Session  string       `json:"sid"`
	Scope    string       `json:"scope"`
	Details  []details    `json:"authorization_details"` // RFC 9396

	Cnf    *dpop.Confirmation `json:"cnf,omitempty"` // the agent's key (RFC 7800)
	Status *statusClaim       `json:"status,omitempty"`
}

type subID struct {
	Format  string `json:"format"`
	Issuer  string `json:"iss"`
	Subject string `json:"sub"`
}

// details carries the exact act, for an audience that checks it.
type details struct {
	Type       string         `json:"type"`
	Actions    []string       `json:"actions"`
	Identifier string         `json:"identifier"`
	Resource   resource       `json:"resource"`
	Parameters map[string]any `json:"parameters"`
	IntentHash string         `json:"intent_hash"`
}

type resource struct {
	Type       string         `json:"type"`
	ID         string         `json:"id"`
	Properties map[string]any `json:"properties,omitempty"`
}

// Mint implements lease.Minter.
func (m *JWT) Mint(ctx context.Context, o lease.Order) (lease.Made, error) {
	l, act := o.Lease, o.Act
	scopes, err := grantedScopes(l.Scope)
	if err != nil {
		return lease.Made{}, err
	}
	parameters := act.Intent.Parameters
	if parameters == nil {
		parameters = map[string]any{}
	}
	var status *statusClaim
	if m.Checks == CheckStatusList {
		if status, err = m.Status.enter(ctx, l.ID, l.ExpiresAt); err != nil {
			return lease.Made{}, fmt.Errorf("mint jwt: %w", err)
		}
	}
	payload, err := json.Marshal(claims{
		Issuer: m.Issuer, Audience: m.Audience,
		Subject: l.User.String(), SubID: subID{"iss_sub", l.User.Issuer, l.User.ID}, Act: l.Agent, ClientID: l.Agent.ID,
		IssuedAt: m.Keys.store.Now().Unix(), Expires: l.ExpiresAt.Unix(), ID: l.ID, Session: l.Session,
		Scope: strings.Join(scopes, " "), Cnf: l.Cnf, Status: status,
		Details: []details{{
			Type: "writ_intent", Actions: []string{act.Intent.Action}, Identifier: act.Resource.ID,
			Resource:   resource{act.Resource.Type, act.Resource.ID, act.Resource.Properties},
			Parameters: parameters, IntentHash: l.IntentHash,
		}},
	})
	if err != nil {
		return lease.Made{}, fmt.Errorf("mint jwt: %w", err)
	}
	token, err := m.Keys.sign(typeToken, payload)
	if err != nil {
		return lease.Made{}, fmt.Errorf("mint jwt: %w", err)
	}
	return lease.Made{Secret: lease.Secret{"token": token, "token_type": TokenType(l.Cnf)}}, nil
}

// TokenType is how a token is to be shown (RFC 6749 §7.1, RFC 9449 §5).
func TokenType(cnf *dpop.Confirmation) string {
	if cnf != nil && cnf.JKT != "" {
		return "DPoP"
	}
	return "Bearer"
}

// grantedScopes reads a grant's scopes, fresh from Plan or back from the store.
func grantedScopes(scope map[string]any) ([]string, error) {
	if s, ok := scope["scopes"].([]string); ok {
		return s, nil
	}
	s, ok := scopesOf(scope)
	if !ok {
		return nil, fmt.Errorf("mint jwt: the lease has no scopes")
	}
	return s, nil
}

// Lease verifies that a token is one that Writ signed, and says for whom, and which
// lease it is of.
func (k *Keys) Lease(token string) (audience, leaseID string, ok bool) {
	payload, err := k.verify(token)
	var c claims
	if err != nil || json.Unmarshal(payload, &c) != nil {
		return "", "", false
	}
	return c.Audience, c.ID, true
}

// Claims verifies that a token is one that Writ signed for the audience and
// returns its claims and its lease. Whether it is still good, the lease says.
func (k *Keys) Claims(token, audience string) (all map[string]any, leaseID string, ok bool) {
	payload, err := k.verify(token)
	if err != nil {
		return nil, "", false
	}
	var c claims
	if json.Unmarshal(payload, &c) != nil || json.Unmarshal(payload, &all) != nil || c.Audience != audience {
		return nil, "", false
	}
	return all, c.ID, true
}
