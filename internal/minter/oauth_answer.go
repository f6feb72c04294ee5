package minter

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/jws"
	"github.com/writsec/writ/internal/lease"
)

// accept holds an answer to what was asked for: a token that is wider, or of another
// kind, is not what was decided.
func (m *OAuth) accept(a answer, o lease.Order, form map[string]string) error {
	bearer := strings.EqualFold(a.tokenType, "Bearer")
	// RFC 8693 §2.2.1: what is no access token has no way of being used as one.
	other := m.Grant == TokenExchange && m.RequestedType != "" && m.RequestedType != accessToken && strings.EqualFold(a.tokenType, "N_A")
	if !bearer && !other {
		return errors.New("the target's token_type is not Bearer")
	}
	if m.Grant == TokenExchange {
		switch {
		case m.RequestedType != "" && a.issuedType != m.RequestedType,
			m.RequestedType == "" && a.issuedType != accessToken && a.issuedType != jwtType:
			return errors.New("the target's issued_token_type is not what was asked for")
		}
	}
	if asked, ok := form["scope"]; ok && a.scope != nil {
		for s := range strings.FieldsSeq(*a.scope) {
			if !slices.Contains(strings.Fields(asked), s) && !slices.Contains(m.ImpliedScopes, s) {
				return errors.New("the target granted a scope that was not asked for")
			}
		}
	}
	if a.refresh != "" && m.Revocation == nil {
		return errors.New("the target sent a refresh token, which was not asked for and can't be revoked; turn that off at the target")
	}
	if m.EnforcesDetails && !confirmed(a.details, detailsOf(o)) {
		return errors.New("the target did not confirm the authorization_details (RFC 9396 §7)")
	}
	return nil
}

// confirmed says that the details which the target granted are those of the act alone.
func confirmed(granted []any, want details) bool {
	if len(granted) != 1 {
		return false
	}
	d, _ := granted[0].(map[string]any)
	actions, _ := d["actions"].([]any)
	return d["type"] == want.Type && d["intent_hash"] == want.IntentHash && d["identifier"] == want.Identifier &&
		len(actions) == 1 && actions[0] == want.Actions[0]
}

// ownLife is how long a token lives, by the answer or by what the token says of itself,
// which resource servers go by, if that is longer. Clocks may differ by skew.
func ownLife(a answer, received time.Time) time.Duration {
	t, err := jws.Parse(a.token)
	if err != nil {
		return a.life // no JWT
	}
	claims, err := t.Claims()
	if err != nil {
		return a.life
	}
	exp, ok := identity.TimeClaim(claims, "exp")
	if own := min(exp.Sub(received), maxLife); ok && own > a.life+skew {
		return own
	}
	return a.life
}

// endsInTime refuses a token that would go on working after its lease.
func (m *OAuth) endsInTime(a answer, l lease.Lease, received time.Time) error {
	switch {
	case !m.lasting():
		return nil
	case a.life == 0:
		return errors.New("the target does not say how long the token lives (expires_in), and it can't be ended")
	case received.Add(a.life).After(l.ExpiresAt):
		return fmt.Errorf("the target's token lives %v, beyond its lease, and can't be ended", a.life)
	}
	return nil
}

// secret is what the agent gets. The token's own end is there where the target told it,
// since it can be earlier than the lease's.
func (m *OAuth) secret(a answer, received time.Time) (lease.Secret, error) {
	s := lease.Secret{"token": a.token, "token_type": "Bearer"}
	if !strings.EqualFold(a.tokenType, "Bearer") {
		s["token_type"] = "N_A"
	}
	if a.life > 0 {
		s["expires_at"] = received.Add(a.life).UTC().Truncate(time.Second).Format(time.RFC3339)
	}
	if a.scope != nil && visible(strings.ReplaceAll(*a.scope, " ", ""), maxMember) {
		s["scope"] = *a.scope
	}
	for _, name := range m.Returns {
		v, ok := a.all[name].(string)
		if !ok || !visible(v, maxMember) {
			return nil, fmt.Errorf("the target's answer has no usable %s", name)
		}
		s[name] = v
	}
	return s, nil
}
