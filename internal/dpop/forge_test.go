package dpop

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	_ "crypto/sha512" // for the algorithms of that size
	"encoding/base64"
	"encoding/json"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
)

var (
	noon  = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	p256  = must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	other = must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	p384  = must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))
	p521  = must(ecdsa.GenerateKey(elliptic.P521(), rand.Reader))
	ed    = ed25519.NewKeyFromSeed(make([]byte, 32))
	rsa2k = must(rsa.GenerateKey(rand.Reader, 2048))
	rsa1k = must(rsa.GenerateKey(rand.Reader, 1024))
)

const (
	token  = "tok.en.of-alice"
	marker = "s3cr3t-in-the-proof" // stands in every forged proof and must never come out
	here   = "https://writ.example/decide"
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// keyOf has a key for each algorithm.
func keyOf(alg string) crypto.Signer {
	switch alg {
	case "ES256":
		return p256
	case "ES384":
		return p384
	case "ES512":
		return p521
	case "EdDSA":
		return ed
	}
	return rsa2k
}

// draft is a proof in the making.
type draft struct {
	header, jwk, claims map[string]any
	rawHeader           string // in place of header
	rawClaims           string // in place of claims
	key                 crypto.Signer
	signAs              string // an algorithm that the header doesn't name
	finish              func(string) string
}

type edit func(*draft)

func head(name string, v any) edit  { return func(d *draft) { set(d.header, name, v) } }
func claim(name string, v any) edit { return func(d *draft) { set(d.claims, name, v) } }
func jwk(name string, v any) edit   { return func(d *draft) { set(d.jwk, name, v) } }
func whole(f func(string) string) edit {
	return func(d *draft) { d.finish = f }
}
func by(alg string, key crypto.Signer) edit {
	return func(d *draft) { d.header["alg"], d.key, d.jwk = alg, key, jwkOf(key.Public()) }
}

// drop as a value takes the member away.
var drop = new(int)

func set(m map[string]any, name string, v any) {
	if v == any(drop) {
		delete(m, name)
		return
	}
	m[name] = v
}

func jwkOf(public any) (m map[string]any) {
	b := must(jose.JSONWebKey{Key: public}.MarshalJSON())
	if err := json.Unmarshal(b, &m); err != nil {
		panic(err)
	}
	return m
}

// forge makes an honest proof of p256, but for the edits.
func forge(edits ...edit) string {
	d := &draft{
		header: map[string]any{"typ": "dpop+jwt", "alg": "ES256"},
		claims: map[string]any{
			"jti": "jti-1", "htm": "POST", "htu": here, "iat": noon.Unix(), "ath": digest([]byte(token)), "x": marker,
		},
		jwk: jwkOf(p256.Public()), key: p256, finish: func(s string) string { return s },
	}
	for _, e := range edits {
		e(d)
	}
	if _, ok := d.header["jwk"]; !ok && d.jwk != nil {
		d.header["jwk"] = d.jwk
	}
	alg, _ := d.header["alg"].(string)
	if d.signAs != "" {
		alg = d.signAs
	}
	header, claims := string(must(json.Marshal(d.header))), string(must(json.Marshal(d.claims)))
	if d.rawHeader != "" {
		header = d.rawHeader
	}
	if d.rawClaims != "" {
		claims = d.rawClaims
	}
	input := b64([]byte(header)) + "." + b64([]byte(claims))
	return d.finish(input + "." + b64(sign(alg, d.key, input)))
}

func b64(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

func sign(alg string, key crypto.Signer, input string) []byte {
	hash := map[string]crypto.Hash{"256": crypto.SHA256, "384": crypto.SHA384, "512": crypto.SHA512}[strings.TrimLeft(alg, "ERPS")]
	if hash == 0 {
		hash = crypto.SHA256
	}
	h := hash.New()
	h.Write([]byte(input))
	sum := h.Sum(nil)
	switch k := key.(type) {
	case *ecdsa.PrivateKey:
		r, s, err := ecdsa.Sign(rand.Reader, k, sum)
		if err != nil {
			panic(err)
		}
		n := (k.Params().BitSize + 7) / 8
		out := make([]byte, 2*n)
		r.FillBytes(out[:n])
		s.FillBytes(out[n:])
		return out
	case ed25519.PrivateKey:
		return ed25519.Sign(k, []byte(input))
	case *rsa.PrivateKey:
		if strings.HasPrefix(alg, "PS") {
			return must(rsa.SignPSS(rand.Reader, k, hash, sum, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}))
		}
		return must(rsa.SignPKCS1v15(rand.Reader, k, hash, sum))
	}
	return []byte("no signature")
}

// memStore is a Store.
type memStore struct {
	mu      sync.Mutex
	spent   map[string]time.Time
	expires time.Time // of the last
	err     error
}

func (s *memStore) Spend(_ context.Context, use string, expires time.Time) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return false, s.err
	}
	if _, spent := s.spent[use]; spent {
		return false, nil
	}
	if s.spent == nil {
		s.spent = map[string]time.Time{}
	}
	s.spent[use], s.expires = expires, expires
	return true, nil
}

func (s *memStore) uses() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []string
	for u := range maps.Keys(s.spent) {
		out = append(out, u)
	}
	return out
}

func verifier() (*Verifier, *memStore) {
	s := &memStore{}
	return &Verifier{Store: s, Now: func() time.Time { return noon }, Nonces: NewNonces([32]byte{1})}, s
}

func request(proof string) Request {
	return Request{Proofs: []string{proof}, Method: "POST", URL: here, Token: token}
}
