package minter

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/writsec/writ/internal/config"
	"github.com/writsec/writ/internal/jws"
	"github.com/writsec/writ/internal/lease"
)

// assertionType is the typ of what Writ signs for others to exchange. It keeps an
// assertion from being taken for an access token (RFC 8725 §3.11): by Writ, which
// wants at+jwt of what it minted, and by every resource server that holds to RFC 9068.
const assertionType = "JWT"

// Assert signs claims for somebody who trusts Writ as an OpenID issuer. They are never
// an access token of Writ's.
func (k *Keys) Assert(claims map[string]any) (string, error) {
	return assert(k.chosen().key, claims)
}

func assert(key jose.JSONWebKey, claims map[string]any) (string, error) {
	payload, err := json.Marshal(claims)
	if err != nil {
		return "", fmt.Errorf("sign assertion: %w", err)
	}
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.SignatureAlgorithm(key.Algorithm), Key: key},
		(&jose.SignerOptions{}).WithType(assertionType))
	if err != nil {
		return "", fmt.Errorf("sign assertion: %w", err)
	}
	signed, err := s.Sign(payload)
	if err != nil {
		return "", fmt.Errorf("sign assertion: %w", err)
	}
	return signed.CompactSerialize()
}

// OAuthAssertion is what Writ says of a lease to a target that trusts it as an issuer
// (RFC 7523 §3).
type OAuthAssertion struct {
	Issuer   string // iss
	Subject  string // sub, a template of config.ExpandTemplate
	Audience string // aud
	TTL      time.Duration
	// Claims are further ones, templates too.
	Claims map[string]string
	// KeyFile holds the key that signs it, in PEM, instead of one of Writ's own.
	KeyFile string
}

// sign makes an assertion about a lease, with the claims that are always there over
// those that are configured.
func (a *OAuthAssertion) sign(keys *Keys, l lease.Lease, jti string, now, until time.Time, more map[string]any) (string, error) {
	claims := map[string]any{}
	for name, template := range a.Claims {
		claims[name] = expand(template, l)
	}
	maps.Copy(claims, more)
	maps.Copy(claims, map[string]any{
		"iss": a.Issuer, "sub": expand(a.Subject, l), "aud": a.Audience,
		"iat": now.Unix(), "exp": until.Unix(), "jti": jti, "sid": l.Session,
	})
	return signWith(keys, a.KeyFile, claims)
}

// signWith signs by the key of a file, read each time so that it can be replaced, or by
// Writ's own.
func signWith(keys *Keys, file string, claims map[string]any) (string, error) {
	if file == "" {
		return keys.Assert(claims)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("read key_file: %w", err)
	}
	key, err := jws.ParsePrivateKey(data)
	if err != nil {
		return "", fmt.Errorf("read key_file: it %w", err)
	}
	return assert(key, claims)
}

// proof is what a client proves itself with (RFC 7523 §2.2), good for once and soon.
func (c *OAuthClient) proof(keys *Keys, audience string, now time.Time) (string, error) {
	return signWith(keys, c.KeyFile, map[string]any{
		"iss": c.ID, "sub": c.ID, "aud": audience, "iat": now.Unix(), "exp": now.Add(proofLife).Unix(), "jti": rand.Text(),
	})
}

const proofLife = time.Minute

// expand puts what a lease is about into a template of the configuration.
func expand(template string, l lease.Lease) string {
	values := map[string]string{
		"{user}": l.User.ID, "{user_issuer}": l.User.Issuer, "{agent}": l.Agent.ID, "{agent_issuer}": l.Agent.Issuer,
		"{session}": l.Session, "{lease}": l.ID,
	}
	return config.ExpandTemplate(template, func(name string) string { return values[name] })
}
