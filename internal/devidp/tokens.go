package devidp

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// tokenLifetime is for tokens whose lifetime nobody chose.
const tokenLifetime = 5 * time.Minute

// registered are the claims that both kinds of token have (RFC 7519 §4.1).
type registered struct {
	Issuer   string `json:"iss"`
	Subject  string `json:"sub"`
	Audience string `json:"aud"`
	IssuedAt int64  `json:"iat"`
	Expiry   int64  `json:"exp"`
}

// profile says who the user is; an agent's own token has none of it.
type profile struct {
	Name   string   `json:"name,omitempty"`
	Email  string   `json:"email,omitempty"`
	Groups []string `json:"groups,omitempty"`
}

func profileOf(u User) profile { return profile{Name: u.Name, Email: u.Email, Groups: u.Groups} }

// accessClaims is an access token of RFC 9068.
type accessClaims struct {
	registered
	profile
	ID       string `json:"jti"`
	ClientID string `json:"client_id"`
	Scope    string `json:"scope,omitempty"`
	Actor    *actor `json:"act,omitempty"`
}

// actor is who acts for the subject (RFC 8693 §4.1).
type actor struct {
	Subject string `json:"sub"`
}

// idClaims is an ID token (OpenID Connect Core §2, CIBA Core §10.3.1).
type idClaims struct {
	registered
	profile
	AuthTime        int64    `json:"auth_time"`
	ACR             string   `json:"acr"`
	AMR             []string `json:"amr,omitempty"`
	Nonce           string   `json:"nonce,omitempty"`
	AccessTokenHash string   `json:"at_hash,omitempty"`
	AuthReqID       string   `json:"urn:openid:params:jwt:claim:auth_req_id,omitempty"`
}

// tokens signs both kinds with one key. Their `typ` keeps them apart, so that
// neither passes for the other (RFC 9068 §2.1).
type tokens struct {
	issuer string
	access jose.Signer
	id     jose.Signer
	keys   jose.JSONWebKeySet // public
}

func newTokens(issuer string, key *ecdsa.PrivateKey) (*tokens, error) {
	if key == nil {
		var err error
		if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			return nil, fmt.Errorf("make signing key: %w", err)
		}
	}
	private := jose.JSONWebKey{Key: key, Algorithm: string(jose.ES256), Use: "sig"}
	thumbprint, err := private.Thumbprint(crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("name signing key: %w", err)
	}
	private.KeyID = base64.RawURLEncoding.EncodeToString(thumbprint)

	signer := func(typ string) (jose.Signer, error) {
		signing := jose.SigningKey{Algorithm: jose.ES256, Key: private}
		return jose.NewSigner(signing, (&jose.SignerOptions{}).WithType(jose.ContentType(typ)))
	}
	access, err := signer("at+jwt")
	if err != nil {
		return nil, fmt.Errorf("make signer: %w", err)
	}
	id, err := signer("JWT")
	if err != nil {
		return nil, fmt.Errorf("make signer: %w", err)
	}
	keys := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{private.Public()}}
	return &tokens{issuer: issuer, access: access, id: id, keys: keys}, nil
}

// signAccess fills in issuer, times and jti. An empty audience means this
// provider itself.
func (t *tokens) signAccess(c accessClaims, lifetime time.Duration) (string, error) {
	t.stamp(&c.registered, lifetime)
	c.ID = rand.Text()
	return sign(t.access, c)
}

// signID fills in issuer and times.
func (t *tokens) signID(c idClaims, lifetime time.Duration) (string, error) {
	t.stamp(&c.registered, lifetime)
	return sign(t.id, c)
}

func (t *tokens) stamp(c *registered, lifetime time.Duration) {
	now := time.Now()
	c.Issuer = t.issuer
	if c.Audience == "" {
		c.Audience = t.issuer
	}
	c.IssuedAt, c.Expiry = now.Unix(), now.Add(lifetime).Unix()
}

func sign(signer jose.Signer, claims any) (string, error) {
	token, err := jwt.Signed(signer).Claims(claims).Serialize()
	if err != nil {
		return "", fmt.Errorf("sign token: %w", err)
	}
	return token, nil
}

// accessTokenHash is at_hash (OpenID Connect Core §3.1.3.6).
func accessTokenHash(token string) string {
	sum := sha256.Sum256([]byte(token))
	return base64.RawURLEncoding.EncodeToString(sum[:len(sum)/2])
}

// grantedACR plays whichever assurance was asked for first, so that policies
// that demand one can be tried. Unasked it is "0": none (OpenID Connect Core §2).
func grantedACR(acrValues string) string {
	for acr := range strings.FieldsSeq(acrValues) {
		return acr
	}
	return "0"
}
