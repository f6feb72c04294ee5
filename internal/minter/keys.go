// Package minter holds one file for each kind of credential.
package minter

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// KeyStore keeps private keys, encrypted, for all replicas.
type KeyStore interface {
	// SigningKeys lists the keys that are believed, oldest first.
	SigningKeys(ctx context.Context) ([]StoredKey, error)
	// AddSigningKey stores a key if due says so of those that are believed, at the store's
	// time. No other replica adds one meanwhile. The key signs from a time that due gives,
	// and those before it are believed until the other.
	AddSigningKey(ctx context.Context, k StoredKey, due func(believed []StoredKey, now time.Time) (active, retire time.Time, ok bool)) error
	// Now is the clock by which keys become active.
	Now() time.Time
}

// StoredKey is a private key and its id.
type StoredKey struct {
	ID       string    // the RFC 7638 thumbprint of the public key
	PKCS8    []byte    // PKCS #8
	ActiveAt time.Time // signs from then on; verifiers may know it before
}

const (
	// KeysMaxAge is how long verifiers may go on with the keys that they fetched.
	KeysMaxAge = 5 * time.Minute
	// KeyLead is how long a new key is published before it signs: longer than verifiers
	// keep the keys, replicas take to look, and clocks differ.
	KeyLead = 3 * KeysMaxAge
)

// The types of what keys sign. None can pass for another (RFC 8725 §3.11).
const (
	typeToken      = "at+jwt"         // RFC 9068 §2.1
	typeStatusList = "statuslist+jwt" // draft-ietf-oauth-status-list §5.1
)

// algorithms are those that any key of ours, new or old, may have.
var algorithms = []jose.SignatureAlgorithm{jose.ES256, jose.EdDSA}

// Rotation says how one signing key takes over from another.
type Rotation struct {
	// Algorithm of new keys: ES256, which the most verifiers know, or EdDSA (Ed25519).
	Algorithm string
	// Every is how long a key signs; zero: until a person rotates.
	Every time.Duration
	// Life is the longest that anything lives that a key signs.
	Life time.Duration
}

// Retire is when the keys before one that is active from a time need not be believed
// any more: what they signed is over, and a verifier whose clock is late knows it.
func (r Rotation) Retire(active time.Time) time.Time { return active.Add(r.Life + KeyLead) }

// Keys are what Writ signs credentials with. They follow the store, where all replicas
// rotate them together.
type Keys struct {
	store    KeyStore
	rotation Rotation
	current  atomic.Pointer[keySet]
	learned  atomic.Int64 // when Learn last read them; Unix nanoseconds
}

// keySet is the keys of one moment.
type keySet struct {
	signers []signer // the last to take over first
	public  jose.JSONWebKeySet
	byID    map[string]jose.JSONWebKey
}

type signer struct {
	key      jose.JSONWebKey
	activeAt time.Time
}

// LoadKeys reads the signing keys, and makes the first one. If the newest is of another
// algorithm than wanted, its successor is made: at a start only, so that replicas that
// are told different things don't replace each other's keys for ever.
func LoadKeys(ctx context.Context, store KeyStore, r Rotation) (*Keys, error) {
	k := &Keys{store: store, rotation: r}
	if err := k.Refresh(ctx); err != nil {
		return nil, err
	}
	if k.newest().key.Algorithm == r.Algorithm {
		return k, nil
	}
	err := k.add(ctx, func(believed []StoredKey, _ time.Time) bool {
		_, algorithm, err := believed[len(believed)-1].parse()
		return err == nil && string(algorithm) != r.Algorithm
	})
	if err != nil {
		return nil, err
	}
	return k, k.Refresh(ctx)
}

// Refresh reads the keys again. It makes one where none is believed, and the next when
// it is time to publish it; of all replicas one does.
func (k *Keys) Refresh(ctx context.Context) error {
	set, err := k.read(ctx)
	if err != nil {
		return err
	}
	if len(set.signers) > 0 {
		k.current.Store(set) // whatever becomes of the next one
	}
	if len(set.signers) == 0 || k.due(set.signers[0].activeAt, k.store.Now()) {
		err := k.add(ctx, func(believed []StoredKey, now time.Time) bool {
			return len(believed) == 0 || k.due(believed[len(believed)-1].ActiveAt, now)
		})
		if err != nil {
			return err
		}
		if set, err = k.read(ctx); err != nil {
			return err
		}
	}
	if len(set.signers) == 0 {
		return errors.New("load signing keys: there is none")
	}
	k.current.Store(set)
	return nil
}

// Rotate makes the next signing key now, whenever the last one was made. It takes over
// like any other, and its predecessors are believed until the time that is returned. If
// one of those is compromised, it signs at once and they are believed no more: what they
// signed ends, and verifiers who have not fetched the new key yet refuse what it signs.
func Rotate(ctx context.Context, store KeyStore, r Rotation, compromised bool) (next StoredKey, retire time.Time, err error) {
	if next, err = NewKey(r.Algorithm); err != nil {
		return next, retire, fmt.Errorf("make signing key: %w", err)
	}
	err = store.AddSigningKey(ctx, next, func(_ []StoredKey, now time.Time) (time.Time, time.Time, bool) {
		next.ActiveAt, retire = now.Add(KeyLead), r.Retire(now.Add(KeyLead))
		if compromised {
			next.ActiveAt, retire = now, now
		}
		return next.ActiveAt, retire, true
	})
	if err != nil {
		return next, retire, fmt.Errorf("store signing key: %w", err)
	}
	next.PKCS8 = nil
	return next, retire, nil
}

// due reports whether the successor of a key has to be published by now.
func (k *Keys) due(active, now time.Time) bool {
	return k.rotation.Every > 0 && !now.Before(active.Add(k.rotation.Every-KeyLead))
}

// add stores a new key if it is due.
func (k *Keys) add(ctx context.Context, due func(believed []StoredKey, now time.Time) bool) error {
	next, err := NewKey(k.rotation.Algorithm)
	if err != nil {
		return fmt.Errorf("make signing key: %w", err)
	}
	err = k.store.AddSigningKey(ctx, next, func(believed []StoredKey, now time.Time) (active, retire time.Time, ok bool) {
		byActive(believed)
		active = now
		if len(believed) > 0 { // else there is nothing that could sign until verifiers know it
			active = now.Add(KeyLead)
		}
		return active, k.rotation.Retire(active), due(believed, now)
	})
	if err != nil {
		return fmt.Errorf("store signing key: %w", err)
	}
	return nil
}

// byActive sorts keys by when they take over.
func byActive(keys []StoredKey) {
	slices.SortStableFunc(keys, func(a, b StoredKey) int { return a.ActiveAt.Compare(b.ActiveAt) })
}

func (k *Keys) read(ctx context.Context) (*keySet, error) {
	stored, err := k.store.SigningKeys(ctx)
	if err != nil {
		return nil, fmt.Errorf("load signing keys: %w", err)
	}
	byActive(stored)
	set := &keySet{byID: map[string]jose.JSONWebKey{}}
	for _, s := range stored {
		private, algorithm, err := s.parse()
		if err != nil {
			return nil, fmt.Errorf("load signing key %s: %w", s.ID, err)
		}
		key := jose.JSONWebKey{Key: private, KeyID: s.ID, Algorithm: string(algorithm), Use: "sig"}
		public := key.Public()
		set.public.Keys = append(set.public.Keys, public)
		set.byID[s.ID] = public
		set.signers = append([]signer{{key, s.ActiveAt}}, set.signers...)
	}
	return set, nil
}

// parse reads a private key of one of our algorithms.
func (s StoredKey) parse() (crypto.Signer, jose.SignatureAlgorithm, error) {
	parsed, err := x509.ParsePKCS8PrivateKey(s.PKCS8)
	if err != nil {
		return nil, "", err
	}
	switch private := parsed.(type) {
	case *ecdsa.PrivateKey:
		if private.Curve == elliptic.P256() {
			return private, jose.ES256, nil
		}
	case ed25519.PrivateKey:
		return private, jose.EdDSA, nil
	}
	return nil, "", errors.New("neither a P-256 nor an Ed25519 key")
}

// NewKey makes a signing key for ES256 or EdDSA.
func NewKey(algorithm string) (StoredKey, error) {
	var private crypto.Signer
	var err error
	switch jose.SignatureAlgorithm(algorithm) {
	case jose.ES256:
		private, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case jose.EdDSA:
		_, private, err = ed25519.GenerateKey(rand.Reader)
	default:
		return StoredKey{}, fmt.Errorf("no signing key for algorithm %q", algorithm)
	}
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

// JWKS is the set that verifiers fetch (RFC 7517 §5): the keys that sign, signed or are
// about to.
func (k *Keys) JWKS() jose.JSONWebKeySet { return k.current.Load().public }

// newest is the key that takes over last.
func (k *Keys) newest() signer { return k.current.Load().signers[0] }

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

// sign makes a compact JWS of a type.
func (k *Keys) sign(typ string, payload []byte) (string, error) {
	key := k.chosen().key
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.SignatureAlgorithm(key.Algorithm), Key: key},
		(&jose.SignerOptions{}).WithType(jose.ContentType(typ)))
	if err != nil {
		return "", fmt.Errorf("sign: %w", err)
	}
	jws, err := s.Sign(payload)
	if err != nil {
		return "", fmt.Errorf("sign: %w", err)
	}
	return jws.CompactSerialize()
}

// verify returns the payload of a JWS that these keys signed as an access token.
func (k *Keys) verify(token string) ([]byte, error) {
	jws, err := jose.ParseSignedCompact(token, algorithms)
	if err != nil {
		return nil, errors.New("not a token of ours")
	}
	header := jws.Signatures[0].Header
	key, ok := k.current.Load().byID[header.KeyID]
	if !ok || header.Algorithm != key.Algorithm || header.ExtraHeaders[jose.HeaderType] != typeToken {
		return nil, errors.New("not a token of ours")
	}
	return jws.Verify(key)
}

// keyOf is the id of the key that a token says it is signed by; ok if it says that it is
// an access token.
func keyOf(token string) (id string, ok bool) {
	jws, err := jose.ParseSignedCompact(token, algorithms)
	if err != nil {
		return "", false
	}
	h := jws.Signatures[0].Header
	return h.KeyID, h.ExtraHeaders[jose.HeaderType] == typeToken
}

// Learn reads the keys again if a token is signed by one that is not known here yet, such
// as the one that replaces a compromised key. It reports false where it has just done so
// for another, and can't tell.
func (k *Keys) Learn(ctx context.Context, token string) (bool, error) {
	id, ours := keyOf(token)
	if _, known := k.current.Load().byID[id]; known || !ours {
		return true, nil
	}
	now, last := time.Now().UnixNano(), k.learned.Load()
	if now-last < int64(time.Second) || !k.learned.CompareAndSwap(last, now) {
		return false, nil
	}
	return true, k.Refresh(ctx)
}

// Signer is the id of the key that signs now.
func (k *Keys) Signer() string { return k.chosen().key.KeyID }
