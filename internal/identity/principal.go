// Package identity turns tokens into principals: who the user is, which agent
// acts for them, and that the two belong together. It trusts only issuers that
// are configured and says nothing about what a principal may do.
package identity

import (
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/writsec/writ/internal/dpop"
	"github.com/writsec/writ/internal/fault"
)

// Ref names a principal: a subject is unique only within its issuer.
type Ref struct {
	Issuer string `json:"iss"`
	ID     string `json:"sub"`
}

// IsZero reports whether r names nobody.
func (r Ref) IsZero() bool { return r == Ref{} }

// String joins issuer and subject unambiguously: an issuer has no fragment.
func (r Ref) String() string { return r.Issuer + "#" + r.ID }

// Principal is a verified identity.
type Principal struct {
	Ref
	// Claims are those of the token that proved it; numbers are json.Number.
	Claims map[string]any
	// Parsed is what Config.Parse made of them, nil where they are not of a token.
	Parsed any
}

// Login is the sid of the login at the issuer that the token is of (OpenID Connect
// Front-Channel Logout §3), "" where the issuer does not say.
func (p Principal) Login() string {
	sid := stringClaim(p.Claims, "sid")
	if !Usable(sid) {
		return ""
	}
	return sid
}

// IssuedAt is when the token was issued, zero where it does not say.
func (p Principal) IssuedAt() time.Time {
	at, _ := TimeClaim(p.Claims, "iat")
	return at
}

// Believed reports whether the token is younger than a sign-out of its subject, which
// is zero for never. What was issued in the same second is not: issuers count in
// seconds.
func (p Principal) Believed(signedOut time.Time) bool {
	return signedOut.IsZero() || p.IssuedAt().After(signedOut)
}

// ErrSignedOut refuses a token that is from before a sign-out.
var ErrSignedOut error = fault.New(fault.InvalidToken, "a token is from before its subject was signed out; bring one of a new sign-in")

// Caller is who makes a request: an agent, and the user it acts for where its
// tokens name one. Otherwise the user comes from the session.
type Caller struct {
	Agent Principal
	User  *Principal

	// Held is the key that the caller proved to hold, which its token is bound to; zero
	// for none.
	Held dpop.Confirmation

	bearer, subject string // to be verified again
}

// Operators says which subjects of an issuer are operators: those whose token has
// the claim with the value, or a list that holds it, and is of one of the clients,
// if there are any.
type Operators struct {
	Claim, Value string
	Clients      []string
}

func (o Operators) include(claims map[string]any, client string) bool {
	if len(o.Clients) > 0 && !slices.Contains(o.Clients, client) {
		return false
	}
	switch v := claims[o.Claim].(type) {
	case string:
		return v == o.Value
	case []any:
		return slices.Contains(v, any(o.Value))
	}
	return false
}

func stringClaim(claims map[string]any, name string) string {
	s, _ := claimAt(claims, name).(string)
	return s
}

// audiences reads aud, a string or a list of strings (RFC 7519 §4.1.3).
func audiences(claims map[string]any) (list []string, ok bool) {
	switch v := claims["aud"].(type) {
	case string:
		return []string{v}, true
	case []any:
		for _, a := range v {
			s, ok := a.(string)
			if !ok {
				return nil, false
			}
			list = append(list, s)
		}
		return list, len(list) > 0
	}
	return nil, false
}

// Usable says that a name is short and visible enough to stand in a policy, a
// log line or a prompt.
func Usable(name string) bool {
	return name != "" && len(name) <= MaxName &&
		!strings.ContainsFunc(name, func(r rune) bool { return !unicode.IsPrint(r) })
}
