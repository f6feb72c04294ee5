package jws

import (
	"crypto"
	"crypto/rsa"
	_ "crypto/sha256" // for pssHashes
	_ "crypto/sha512"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/go-jose/go-jose/v4"
)

// Algorithms are the asymmetric JWS algorithms that Writ verifies (RFC 7518 §3.1,
// RFC 8037).
var Algorithms = []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}

var pssHashes = map[string]crypto.Hash{"PS256": crypto.SHA256, "PS384": crypto.SHA384, "PS512": crypto.SHA512}

const minRSA = 2048 // bits (RFC 7518 §3.3)

// Keys are an issuer's public keys.
type Keys []Key

// Key is one of them, with what its owner published it for.
type Key struct {
	jose.JSONWebKey
	ops []string // key_ops (RFC 7517 §4.3), which go-jose drops
}

// ParseKeys reads a JWK set (RFC 7517 §5) and leaves out keys that it can't use:
// symmetric, private, weak, of unknown type.
func ParseKeys(data []byte) (Keys, error) {
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(data, &set); err != nil {
		return nil, fmt.Errorf("read key set: %w", err)
	}
	if set.Keys == nil {
		return nil, errors.New("read key set: it has no keys member")
	}
	keys := Keys{}
	for _, raw := range set.Keys {
		if key, ok := parseKey(raw); ok {
			keys = append(keys, key)
		}
	}
	return keys, nil
}

func parseKey(raw []byte) (key Key, ok bool) {
	var extra struct {
		Ops []string `json:"key_ops"`
	}
	if json.Unmarshal(raw, &key.JSONWebKey) != nil || json.Unmarshal(raw, &extra) != nil {
		return Key{}, false
	}
	if !key.Valid() || !key.IsPublic() {
		return Key{}, false
	}
	if r, isRSA := key.Key.(*rsa.PublicKey); isRSA && r.N.BitLen() < minRSA {
		return Key{}, false
	}
	key.ops = extra.Ops
	return key, true
}

// Verify tries the keys on a token of one of the algorithms. known says that one
// of them has the token's kid, so that other keys than these would not help. uses
// lists what else than signatures a key may be published for, such as jwt-svid.
func (ks Keys) Verify(t Token, algorithms []string, uses ...string) (verified, known bool) {
	if !slices.Contains(algorithms, t.Algorithm) || !slices.Contains(Algorithms, t.Algorithm) {
		return false, false
	}
	parsed, err := jose.ParseSignedCompact(t.Raw, []jose.SignatureAlgorithm{jose.SignatureAlgorithm(t.Algorithm)})
	if err != nil {
		return false, true
	}
	for _, key := range ks {
		if t.KeyID != "" && key.KeyID != t.KeyID {
			continue
		}
		known = known || t.KeyID != ""
		if !key.usableFor(t.Algorithm, uses) {
			continue
		}
		if _, err := parsed.Verify(key.JSONWebKey); err == nil && key.saltHolds(t, parsed) {
			return true, true
		}
	}
	return false, known
}

// usableFor holds the key to what its owner published it for (RFC 7517 §4.2–4.4).
func (k Key) usableFor(alg string, uses []string) bool {
	return (k.Use == "" || k.Use == "sig" || slices.Contains(uses, k.Use)) &&
		(k.Algorithm == "" || k.Algorithm == alg) &&
		(k.ops == nil || slices.Contains(k.ops, "verify"))
}

// saltHolds refuses a PSS signature whose salt is not as long as its hash (RFC 7518
// §3.5), which go-jose lets pass.
func (k Key) saltHolds(t Token, parsed *jose.JSONWebSignature) bool {
	hash, pss := pssHashes[t.Algorithm]
	if !pss {
		return true
	}
	public, ok := k.Key.(*rsa.PublicKey)
	if !ok {
		return false
	}
	h := hash.New()
	h.Write([]byte(t.Raw[:strings.LastIndexByte(t.Raw, '.')]))
	return rsa.VerifyPSS(public, hash, h.Sum(nil), parsed.Signatures[0].Signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
}
