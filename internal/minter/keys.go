// Package minter holds one file for each kind of credential.
package minter

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"

	"github.com/go-jose/go-jose/v4"
)

// KeyStore keeps private keys, encrypted.
type KeyStore interface {
	// SigningKeys lists the private keys (PKCS #8) by id, oldest first.
	SigningKeys(ctx context.Context) ([]StoredKey, error)
	// AddSigningKey stores one.
	AddSigningKey(ctx context.Context, k StoredKey) error
}

// StoredKey is a private key and its id.
type StoredKey struct {
	ID    string // the RFC 7638 thumbprint of the public key
	PKCS8 []byte
}

// Keys are what Writ signs credentials with: ES256, which the most verifiers know.
type Keys struct {
	signer  jose.Signer
	public  jose.JSONWebKeySet
	byKeyID map[string]jose.JSONWebKey
}

// LoadKeys reads the signing keys and makes the first one where there is none. The
// newest signs.
func LoadKeys(ctx context.Context, store KeyStore) (*Keys, error) {
	stored, err := store.SigningKeys(ctx)
	if err != nil {
		return nil, fmt.Errorf("load signing keys: %w", err)
	}
	if len(stored) == 0 {
		k, err := newKey()
		if err != nil {
			return nil, fmt.Errorf("make signing key: %w", err)
		}
		if err := store.AddSigningKey(ctx, k); err != nil {
			return nil, fmt.Errorf("store signing key: %w", err)
		}
		stored = []StoredKey{k}
	}
	keys := &Keys{byKeyID: map[string]jose.JSONWebKey{}}
	var newest jose.JSONWebKey
	for _, s := range stored {
		parsed, err := x509.ParsePKCS8PrivateKey(s.PKCS8)
		if err != nil {
			return nil, fmt.Errorf("load signing key %s: %w", s.ID, err)
		}
		private, ok := parsed.(*ecdsa.PrivateKey)
		if !ok || private.Curve != elliptic.P256() {
			return nil, fmt.Errorf("load signing key %s: not a P-256 key", s.ID)
		}
		newest = jose.JSONWebKey{Key: private, KeyID: s.ID, Algorithm: string(jose.ES256), Use: "sig"}
		public := newest.Public()
		keys.public.Keys = append(keys.public.Keys, public)
		keys.byKeyID[s.ID] = public
	}
	keys.signer, err = jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: newest},
		(&jose.SignerOptions{}).WithType("at+jwt"))
	if err != nil {
		return nil, fmt.Errorf("make signer: %w", err)
	}
	return keys, nil
}

func newKey() (StoredKey, error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return StoredKey{}, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return StoredKey{}, err
	}
	thumbprint, err := (&jose.JSONWebKey{Key: private.Public()}).Thumbprint(crypto.SHA256)
	if err != nil {
		return StoredKey{}, err
	}
	return StoredKey{ID: base64.RawURLEncoding.EncodeToString(thumbprint), PKCS8: der}, nil
}

// JWKS is the set that verifiers fetch (RFC 7517 §5).
func (k *Keys) JWKS() jose.JSONWebKeySet { return k.public }

// sign makes a compact JWS.
func (k *Keys) sign(payload []byte) (string, error) {
	jws, err := k.signer.Sign(payload)
	if err != nil {
		return "", fmt.Errorf("sign: %w", err)
	}
	return jws.CompactSerialize()
}

// verify returns the payload of a JWS that these keys signed as an access token.
func (k *Keys) verify(token string) ([]byte, error) {
	jws, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return nil, errors.New("not a token of ours")
	}
	header := jws.Signatures[0].Header
	key, ok := k.byKeyID[header.KeyID]
	if !ok || header.ExtraHeaders[jose.HeaderType] != "at+jwt" {
		return nil, errors.New("not a token of ours")
	}
	return jws.Verify(key)
}
