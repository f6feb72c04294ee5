package identity

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/gobwas/glob"
)

// Kind is a kind of token; RFC 8725 §3.11 wants kinds told apart.
type Kind string

// The kinds of token that can stand for whoever brings them.
const (
	AccessToken     Kind = "access_token"    // RFC 9068, typ at+jwt
	PlainJWT        Kind = "jwt"             // RFC 7519, by the issuer's own rules
	JWTSVID         Kind = "jwt_svid"        // SPIFFE JWT-SVID
	Kubernetes      Kind = "kubernetes"      // a projected service account token
	ClientAssertion Kind = "private_key_jwt" // RFC 7523 §3, signed by the agent itself

	// idToken is OpenID Connect Core's. It is never a bearer.
	idToken Kind = "id_token"
)

// Issuer is the profile of one issuer: whom Writ believes it about, and how its
// tokens are told from forged ones.
type Issuer struct {
	// URL is the exact iss of its tokens.
	URL string
	// User, Agent, Operator and Service say for whom it may speak.
	User, Agent, Operator, Service bool
	// Kind of its bearer tokens; AccessToken by default.
	Kind Kind
	// TrustDomain is whose JWT-SVIDs it issues, for those that have no iss.
	TrustDomain string
	// Operators marks its operators.
	Operators Operators
	// Audience is what its tokens must be meant for.
	Audience string
	// Algorithms is the JWS allow-list.
	Algorithms []string
	// IDTokenAlgorithms is that of its ID tokens, where it differs.
	IDTokenAlgorithms []string
	// JWKSFile or JWKSURL, when set, replaces discovery.
	JWKSFile, JWKSURL string
	// IDTokenClients are the clients whose ID tokens are believed as subject_token.
	IDTokenClients []string
	// OwnClients are Writ's own clients there.
	OwnClients []string
	// Leeway is for iat and nbf.
	Leeway time.Duration
	// MaxAge is how long after iat a token is good at most; zero: as long as its exp.
	MaxAge time.Duration
	// SubjectClaim and ClientClaim name the subject and the OAuth client, where these
	// are not the standard claims. One that begins with a slash is a JSON pointer.
	SubjectClaim, ClientClaim string
	// Match holds claims to globs: a token that does not match is refused, be it an ID
	// token.
	Match map[string]string
	// UserMatch tells the tokens of users from those that clients have of their own: a
	// token that does not match speaks for its client alone.
	UserMatch map[string]string
	// SenderConstraint, when set, refuses tokens that are not bound to a key by one of
	// these methods: dpop, mtls.
	SenderConstraint []string
	// DPoPNonce wants a nonce of Writ's in DPoP proofs.
	DPoPNonce bool
	// Signals lets it send security events.
	Signals Signals
}

// Signals is what an issuer may say besides tokens: security events (RFC 8417).
type Signals struct {
	// Audience is what they must be meant for; "" refuses all.
	Audience string
	// Subjects is the issuer whose subjects they are about.
	Subjects string
}

// matcher holds claims to globs.
type matcher map[string]*glob.Pattern

func newMatcher(globs map[string]string) (matcher, error) {
	m := matcher{}
	for name, pattern := range globs {
		g, err := glob.Compile(pattern)
		if err != nil {
			return nil, fmt.Errorf("claim %s: %q is no pattern", name, pattern)
		}
		m[name] = g
	}
	return m, nil
}

// matches reports whether every claim is there and matches: its text, or one
// member of a list.
func (m matcher) matches(claims map[string]any) bool {
	for name, g := range m {
		values, isList := claimAt(claims, name).([]any)
		if !isList {
			values = []any{claimAt(claims, name)}
		}
		if !slices.ContainsFunc(values, func(v any) bool {
			s, ok := text(v)
			return ok && g.Match(s)
		}) {
			return false
		}
	}
	return true
}

func text(v any) (string, bool) {
	switch v := v.(type) {
	case string:
		return v, v != "" // "*" is for a claim that says something
	case json.Number:
		return v.String(), true
	case bool:
		return fmt.Sprint(v), true
	}
	return "", false
}

// claimAt reads a claim by its name or, if that begins with a slash, by JSON
// pointer (RFC 6901).
func claimAt(claims map[string]any, name string) any {
	if !strings.HasPrefix(name, "/") {
		return claims[name]
	}
	var at any = claims
	for part := range strings.SplitSeq(name[1:], "/") {
		m, ok := at.(map[string]any)
		if !ok {
			return nil
		}
		at = m[strings.NewReplacer("~1", "/", "~0", "~").Replace(part)]
	}
	return at
}
