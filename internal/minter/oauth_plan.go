package minter

import (
	"fmt"
	"slices"
	"time"

	"github.com/writsec/writ/internal/lease"
)

// lasting says that a token goes on working until it ends by itself, at least for some.
func (m *OAuth) lasting() bool {
	return m.Revocation == nil || m.Revocation.TakesEffect != lease.RevocableInstant
}

// Plan implements lease.Minter. The scope that policy wants has one member, scopes, or
// none where the minter asks for no scopes.
func (m *OAuth) Plan(w lease.Want) (lease.Grant, *lease.Refusal) {
	g := lease.Grant{
		Minter: m.Name, Kind: OAuthKind, TTL: min(w.TTL, m.MaxTTL), Scope: map[string]any{}, Outside: true,
		Revocability: lease.RevocableExpiry, Precision: lease.PrecisionCoarse,
	}
	if m.Revocation != nil {
		g.Revocability = m.Revocation.TakesEffect
	}
	if m.EnforcesDetails {
		g.Precision = lease.PrecisionExact
	}
	if m.Issuer != "" && !w.User.IsZero() && w.User.Issuer != m.Issuer {
		return g, &lease.Refusal{Code: "credential_user", Message: fmt.Sprintf(
			"Minter %s is for the users of %s, and the user is of another issuer", m.Name, m.Issuer)}
	}
	if m.Assertion == nil && !w.SubjectToken {
		return g, &lease.Refusal{Code: "credential_subject_token", Message: fmt.Sprintf(
			"Minter %s exchanges the user's token, and the request brings none; send it as subject_token", m.Name)}
	}
	if refusal := m.planScope(&g, w); refusal != nil {
		return g, refusal
	}
	if refusal := m.planTTL(&g); refusal != nil {
		return g, refusal
	}
	switch {
	case !lease.MeetsLeast(g.Revocability, w.Revocability):
		return g, &lease.Refusal{Code: "credential_revocability", Message: fmt.Sprintf(
			"Policy demands revocability %q; minter %s offers %q", w.Revocability, m.Name, g.Revocability)}
	case !lease.MeetsLeast(g.Precision, w.Precision):
		return g, &lease.Refusal{Code: "credential_precision", Message: fmt.Sprintf(
			"Policy demands precision %q; minter %s offers %q", w.Precision, m.Name, g.Precision)}
	}
	return g, nil
}

func (m *OAuth) planScope(g *lease.Grant, w lease.Want) *lease.Refusal {
	if len(m.Scopes) == 0 {
		if len(w.Scope) > 0 {
			return &lease.Refusal{Code: "credential_scope", Message: fmt.Sprintf(
				"Minter %s asks for no scopes, so policy must give its credential the scope {}", m.Name)}
		}
		return nil
	}
	scopes, ok := scopesOf(w.Scope)
	if !ok {
		return &lease.Refusal{Code: "credential_scope", Message: fmt.Sprintf(
			`Policy must give a credential of minter %s the scope {"scopes": ["…"]} and nothing else`, m.Name)}
	}
	for _, s := range scopes {
		if !slices.Contains(m.Scopes, s) {
			return &lease.Refusal{Code: "credential_scope", Message: fmt.Sprintf("Policy wants the scope %q, which minter %s does not grant", s, m.Name)}
		}
	}
	g.Scope["scopes"] = scopes
	return nil
}

// planTTL makes a lease as long as its token, and refuses one that would be over before
// a token is that can't be ended.
func (m *OAuth) planTTL(g *lease.Grant) *lease.Refusal {
	least := time.Second
	switch whole := m.TokenTTL + mintSlack; {
	case m.EndsWithAssertion:
		least = leastAssertion
	case m.TokenTTL == 0:
	case m.lasting():
		least = whole
		fallthrough
	default:
		if g.TTL > whole {
			g.TTL = whole
		}
	}
	if g.TTL < least {
		return &lease.Refusal{Code: "credential_ttl", Message: fmt.Sprintf(
			"Policy wants a credential that lives %v; the tokens of minter %s can't end so soon: it needs %v", g.TTL, m.Name, least)}
	}
	return nil
}
