package identity

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// now is the clock of the tests that don't run in a bubble.
var now = time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)

const (
	audience = "https://writ.example"
	issA     = "https://a.example"
	issB     = "https://b.example"
	issUsers = "https://users.example"  // speaks for users alone
	issBots  = "https://agents.example" // speaks for agents alone
	issOps   = "https://ops.example"    // operators only, any client
	issES    = "https://es.example"     // may sign by ES256 alone
	issBound = "https://bound.example"  // wants DPoP

	// marker stands in every forged token and must never come out again.
	marker = "s3cr3t-in-the-token"
)

// signer makes a signature of one algorithm over the signing input.
type signer struct {
	alg, kid string
	sign     func(input []byte) []byte
}

func digest(b []byte) []byte { d := sha256.Sum256(b); return d[:] }

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func rs256(kid string, k *rsa.PrivateKey) signer {
	return signer{"RS256", kid, func(b []byte) []byte {
		return must(rsa.SignPKCS1v15(rand.Reader, k, crypto.SHA256, digest(b)))
	}}
}

func ps256(kid string, k *rsa.PrivateKey) signer {
	return signer{"PS256", kid, func(b []byte) []byte {
		return must(rsa.SignPSS(rand.Reader, k, crypto.SHA256, digest(b), &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}))
	}}
}

func es256(kid string, k *ecdsa.PrivateKey) signer {
	return signer{"ES256", kid, func(b []byte) []byte {
		r, s, err := ecdsa.Sign(rand.Reader, k, digest(b))
		if err != nil {
			panic(err)
		}
		out := make([]byte, 64)
		r.FillBytes(out[:32])
		s.FillBytes(out[32:])
		return out
	}}
}

func eddsa(kid string, k ed25519.PrivateKey) signer {
	return signer{"EdDSA", kid, func(b []byte) []byte { return ed25519.Sign(k, b) }}
}

func hs256(kid string, secret []byte) signer {
	return signer{"HS256", kid, func(b []byte) []byte {
		h := hmac.New(sha256.New, secret)
		h.Write(b)
		return h.Sum(nil)
	}}
}

var unsigned = signer{"none", "", func([]byte) []byte { return nil }}

// keys are slow to make, so all tests share one lot. kids name what is special.
var keys = sync.OnceValue(func() (k struct {
	rsa, rsaPS, rsaB, weak       *rsa.PrivateKey
	ec, ecB, ecOld, enc, signing *ecdsa.PrivateKey
	ecP384                       *ecdsa.PrivateKey
	ed                           ed25519.PrivateKey
	oct                          []byte
}) {
	for _, p := range []**rsa.PrivateKey{&k.rsa, &k.rsaPS, &k.rsaB} {
		*p = must(rsa.GenerateKey(rand.Reader, 2048))
	}
	k.weak = must(rsa.GenerateKey(rand.Reader, 1024))
	for _, p := range []**ecdsa.PrivateKey{&k.ec, &k.ecB, &k.ecOld, &k.enc, &k.signing} {
		*p = must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	}
	k.ecP384 = must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))
	_, k.ed, _ = ed25519.GenerateKey(rand.Reader)
	k.oct = []byte("a shared secret of thirty-two b.")
	return k
})

// jwk renders a key as a member of a set; extra overrides its members.
func jwk(key any, kid string, extra map[string]any) map[string]any {
	if priv, ok := key.(crypto.Signer); ok {
		key = priv.Public()
	}
	return jwkOf(key, kid, extra)
}

// jwkOf renders private and symmetric keys as they are.
func jwkOf(key any, kid string, extra map[string]any) map[string]any {
	var m map[string]any
	if err := json.Unmarshal(must(json.Marshal(jose.JSONWebKey{Key: key, KeyID: kid})), &m); err != nil {
		panic(err)
	}
	maps.Copy(m, extra)
	return m
}

func jwks(members ...map[string]any) []byte {
	if members == nil {
		members = []map[string]any{}
	}
	return must(json.Marshal(map[string]any{"keys": members}))
}

// forged is a token under construction: an honest access token of issuer A for
// alice through the client "crm-agent", until an edit makes it something else.
type forged struct {
	header, claims map[string]any
	headerJSON     func(string) string // last changes to the bytes
	payloadJSON    func(string) string
	key            signer
	whole          func(string) string
}

type edit func(*forged)

func forge(edits ...edit) string {
	f := &forged{
		header: map[string]any{"typ": "at+jwt"},
		claims: map[string]any{
			"iss": issA, "sub": "alice", "client_id": "crm-agent", "aud": audience, "jti": "j1",
			"iat": now.Unix(), "exp": now.Add(time.Minute).Unix(), "marker": marker,
		},
		key: es256("ec", keys().ec),
	}
	for _, e := range edits {
		e(f)
	}
	if _, set := f.header["alg"]; !set {
		f.header["alg"] = f.key.alg
	}
	if _, set := f.header["kid"]; !set && f.key.kid != "" {
		f.header["kid"] = f.key.kid
	}
	header, payload := render(f.header), render(f.claims)
	if f.headerJSON != nil {
		header = f.headerJSON(header)
	}
	if f.payloadJSON != nil {
		payload = f.payloadJSON(payload)
	}
	input := base64.RawURLEncoding.EncodeToString([]byte(header)) + "." + base64.RawURLEncoding.EncodeToString([]byte(payload))
	token := input + "." + base64.RawURLEncoding.EncodeToString(f.key.sign([]byte(input)))
	if f.whole != nil {
		token = f.whole(token)
	}
	return token
}

// absent removes a member.
var absent = new(int)

func render(m map[string]any) string {
	m = maps.Clone(m)
	maps.DeleteFunc(m, func(_ string, v any) bool { return v == any(absent) })
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(m); err != nil {
		panic(err)
	}
	return strings.TrimSpace(b.String())
}

func head(name string, v any) edit  { return func(f *forged) { f.header[name] = v } }
func claim(name string, v any) edit { return func(f *forged) { f.claims[name] = v } }
func by(s signer) edit              { return func(f *forged) { f.key = s } }
func whole(c func(string) string) edit {
	return func(f *forged) { f.whole = c }
}
func payload(c func(string) string) edit {
	return func(f *forged) { f.payloadJSON = c }
}
func header(c func(string) string) edit {
	return func(f *forged) { f.headerJSON = c }
}

// raw writes JSON that no Go value makes, such as an exp of 1e300.
func raw(name, text string) edit { return claim(name, json.RawMessage(text)) }

// second adds a member in front of one of the same name.
func second(member string) func(string) string {
	return func(s string) string { return "{" + member + "," + s[1:] }
}

func of(iss string, key signer) edit {
	return func(f *forged) { f.claims["iss"], f.key = iss, key }
}

// own makes it an agent's own token.
func own(agent string) edit {
	return func(f *forged) { f.claims["sub"], f.claims["client_id"] = agent, agent }
}

// asIDToken makes it an honest ID token for alice, for a client.
func asIDToken(client string) edit {
	return func(f *forged) {
		f.header["typ"] = "JWT"
		f.claims["aud"] = client
		for _, name := range []string{"client_id", "jti"} {
			f.claims[name] = absent
		}
	}
}

func at(d time.Duration) int64 { return now.Add(d).Unix() }

// world is a verifier of the issuers above, with their keys in files.
func world(t testing.TB) (*Verifier, *bytes.Buffer) {
	t.Helper()
	k := keys()
	dir := t.TempDir()
	file := func(name string, data []byte) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	setA := file("a", jwks(
		jwk(k.ec, "ec", map[string]any{"use": "sig", "alg": "ES256", "key_ops": []string{"verify"}}),
		jwk(k.rsa, "rsa", nil),
		jwk(k.rsaPS, "rsa-ps", map[string]any{"alg": "PS256"}),
		jwk(k.ed, "ed", nil),
		jwk(k.enc, "enc", map[string]any{"use": "enc"}),
		jwk(k.signing, "signing", map[string]any{"key_ops": []string{"sign"}}),
		jwk(k.signing, "no-ops", map[string]any{"key_ops": []string{}}),
		jwk(k.ecP384, "p384", nil),
		jwk(k.weak, "weak", nil),
		jwkOf(k.oct, "oct", nil),
		jwkOf(k.ecOld, "private", nil),
		map[string]any{"kty": "XYZ", "kid": "unheard-of"},
	))
	setB := file("b", jwks(jwk(k.ecB, "ec", nil), jwk(k.rsaB, "rsa", nil)))
	var log bytes.Buffer
	v, err := New(Config{
		Now: func() time.Time { return now },
		SignedOut: func(_ context.Context, subject Ref, sid string) (time.Time, error) {
			if subject.ID == "signed-out" || sid == "signed-out" {
				return now.Add(-time.Second), nil
			}
			return time.Time{}, nil
		},
		Logger: slog.New(slog.NewTextHandler(&log, nil)),
		Issuers: []Issuer{
			{
				URL: issA, User: true, Agent: true, Operator: true, Audience: audience, JWKSFile: setA,
				Operators:      Operators{Claim: "groups", Value: "writ-operators", Clients: []string{"console"}},
				Algorithms:     []string{"ES256", "RS256", "PS256", "EdDSA"},
				IDTokenClients: []string{"crm-agent", "web"}, Leeway: 30 * time.Second,
			},
			{
				URL: issB, User: true, Agent: true, Audience: audience, JWKSFile: setB, Algorithms: []string{"ES256", "RS256"},
				Operators: Operators{Claim: "groups", Value: "writ-operators"}, // of no use: it may not speak for operators
			},
			{URL: issUsers, User: true, Audience: audience, JWKSFile: setB, Algorithms: []string{"ES256"}},
			{URL: issBots, Agent: true, Audience: audience, JWKSFile: setB, Algorithms: []string{"ES256"}},
			{
				URL: issOps, Operator: true, Audience: audience, JWKSFile: setB, Algorithms: []string{"ES256"},
				Operators: Operators{Claim: "role", Value: "security"},
			},
			{
				URL: issBound, User: true, Agent: true, Operator: true, Audience: audience, JWKSFile: setB, Algorithms: []string{"ES256"},
				SenderConstraint: []string{"dpop"}, DPoPNonce: true,
			},
			{
				URL: issES, User: true, Agent: true, Audience: audience, JWKSFile: setA, Algorithms: []string{"ES256"},
				IDTokenAlgorithms: []string{"RS256"}, IDTokenClients: []string{"crm-agent"},
			},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return v, &log
}

func callerOf(v *Verifier, ctx context.Context, bearer, subject string) (Caller, error) {
	return v.Caller(ctx, Presented{Token: bearer, Subject: subject})
}

func operatorOf(v *Verifier, ctx context.Context, bearer string) (Principal, error) {
	return v.Operator(ctx, Presented{Token: bearer})
}
