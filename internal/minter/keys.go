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
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// KeyStore keeps private keys, encrypted, for all replicas.
type KeyStore interface {
	// SigningKeys lists the keys that are believed, oldest first.
	SigningKeys(ctx context.Context) ([]StoredKey, error)
	// FirstSigningKey stores one where none is believed; otherwise it does nothing.
	FirstSigningKey(ctx context.Context, k StoredKey) error
	// Now is the clock by which keys become active.
	Now() time.Time
}

// StoredKey is a private key and its id.
type StoredKey struct {
	ID       string    // the RFC 7638 thumbprint of the public key
	PKCS8    []byte    // PKCS #8
	ActiveAt time.Time // signs from then on; verifiers may know it before
}

// Keys are what Writ signs credentials with: ES256, which the most verifiers know.
// They follow the store, where another replica may rotate them.
type Keys struct {
	store   KeyStore
	current atomic.Pointer[keySet]
}

// keySet is the keys of one moment.
type keySet struct {
	signers []signer // newest first
	public  jose.JSONWebKeySet
	byID    map[string]jose.JSONWebKey
	private map[string]jose.JSONWebKey // for Assert
}

type signer struct {
	jose.Signer
	id       string
	activeAt time.Time
}

// LoadKeys reads the signing keys.
func LoadKeys(ctx context.Context, store KeyStore) (*Keys, error) {
	k := &Keys{store: store}
	return k, k.Refresh(ctx)
}

// Refresh reads the keys again, and makes one where none is believed.
func (k *Keys) Refresh(ctx context.Context) error {
	stored, err := k.store.SigningKeys(ctx)
	if err == nil && len(stored) == 0 {
		first, keyErr := NewKey()
		if keyErr != nil {
			return fmt.Errorf("make signing key: %w", keyErr)
		}
		if err := k.store.FirstSigningKey(ctx, first); err != nil {
			return fmt.Errorf("store signing key: %w", err)
		}
		stored, err = k.store.SigningKeys(ctx)
	}
	if err != nil {
		return fmt.Errorf("load signing keys: %w", err)
	}
	if len(stored) == 0 {
		return errors.New("load signing keys: there is none")
	}
	set := &keySet{byID: map[string]jose.JSONWebKey{}, private: map[string]jose.JSONWebKey{}}
	for _, s := range stored {
		parsed, err := x509.ParsePKCS8PrivateKey(s.PKCS8)
		if err != nil {
			return fmt.Errorf("load signing key %s: %w", s.ID, err)
		}
		private, ok := parsed.(*ecdsa.PrivateKey)
		if !ok || private.Curve != elliptic.P256() {
			return fmt.Errorf("load signing key %s: not a P-256 key", s.ID)
		}
		key := jose.JSONWebKey{Key: private, KeyID: s.ID, Algorithm: string(jose.ES256), Use: "sig"}
		js, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, (&jose.SignerOptions{}).WithType("at+jwt"))
		if err != nil {
			return fmt.Errorf("make signer: %w", err)
		}
		public := key.Public()
		set.public.Keys = append(set.public.Keys, public)
		set.byID[s.ID] = public
		set.private[s.ID] = key
		set.signers = append([]signer{{js, s.ID, s.ActiveAt}}, set.signers...)
	}
	k.current.Store(set)
	return nil
}

// NewKey makes a signing key.
func NewKey() (StoredKey, error) {
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
func (k *Keys) JWKS() jose.JSONWebKeySet { return k.current.Load().public }

// chosen is the newest key that every verifier can know by now.
func (k *Keys) chosen() signer {
	signers, now := k.current.Load().signers, k.store.Now()
	for _, s := range signers {
		if !now.Before(s.activeAt) {
			return s
		}
	}
	return signers[len(signers)-1]
}

// sign makes a compact JWS.
func (k *Keys) sign(payload []byte) (string, error) {
	jws, err := k.chosen().Sign(payload)
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
	key, ok := k.current.Load().byID[header.KeyID]
	if !ok || header.ExtraHeaders[jose.HeaderType] != "at+jwt" {
		return nil, errors.New("not a token of ours")
	}
	return jws.Verify(key)
}

// Signer is the id of the key that signs now.
func (k *Keys) Signer() string { return k.chosen().id }
