package dpop

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/go-jose/go-jose/v4"
	"pgregory.net/rapid"
)

// RFC 9449: the proofs of figure 2 (§4.1) and figure 12 (§7.1), by one key whose
// thumbprint is in figure 8 (§6.1).
const (
	rfcHeader = "eyJ0eXAiOiJkcG9wK2p3dCIsImFsZyI6IkVTMjU2IiwiandrIjp7Imt0eSI6Ik" +
		"VDIiwieCI6Imw4dEZyaHgtMzR0VjNoUklDUkRZOXpDa0RscEJoRjQyVVFVZldWQVdCR" +
		"nMiLCJ5IjoiOVZFNGpmX09rX282NHpiVFRsY3VOSmFqSG10NnY5VERWclUwQ2R2R1JE" +
		"QSIsImNydiI6IlAtMjU2In19"
	rfcTokenProof = rfcHeader + ".eyJqdGkiOiItQndDM0VTYzZhY2MybFRjIiwiaHRtIj" +
		"oiUE9TVCIsImh0dSI6Imh0dHBzOi8vc2VydmVyLmV4YW1wbGUuY29tL3Rva2VuIiwia" +
		"WF0IjoxNTYyMjYyNjE2fQ.2-GxA6T8lP4vfrg8v-FdWP0A0zdrj8igiMLvqRMUvwnQg" +
		"4PtFLbdLXiOSsX0x7NVY-FNyJK70nfbV37xRZT3Lg"
	rfcResourceProof = rfcHeader + ".eyJqdGkiOiJlMWozVl9iS2ljOC1MQUVCIiwiaHRtIj" +
		"oiR0VUIiwiaHR1IjoiaHR0cHM6Ly9yZXNvdXJjZS5leGFtcGxlLm9yZy9wcm90ZWN0Z" +
		"WRyZXNvdXJjZSIsImlhdCI6MTU2MjI2MjYxOCwiYXRoIjoiZlVIeU8ycjJaM0RaNTNF" +
		"c05yV0JiMHhXWG9hTnk1OUlpS0NBcWtzbVFFbyJ9.2oW9RP35yRqzhrtNP86L-Ey71E" +
		"OptxRimPPToA1plemAgR6pxHF8y6-yqyVnmcw6Fy1dqd-jfxSYoMxhAJpLjA"
	rfcToken      = "Kz~8mXK1EalYznwH-LC-1fBAo.4Ljp~zsPE_NeO.gxU"
	rfcThumbprint = "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"
)

func TestExamplesOfTheRFC(t *testing.T) {
	v, _ := verifier()
	v.Now = func() time.Time { return time.Unix(1562262618, 0) }
	r := Request{
		Proofs: []string{rfcResourceProof}, Method: "GET", Token: rfcToken,
		URL: "https://resource.example.org/protectedresource",
	}
	key, err := v.Verify(t.Context(), r)
	want := Key{rfcThumbprint, "e1j3V_bKic8-LAEB", time.Unix(1562262618, 0).UTC()}
	if err != nil || key != want {
		t.Errorf("%+v %v", key, err)
	}
	// That of a token request has no ath, as there is no access token yet.
	r = Request{Proofs: []string{rfcTokenProof}, Method: "POST", URL: "https://server.example.com/token", Token: rfcToken}
	if _, err := v.Verify(t.Context(), r); err == nil || err.Error() != "has no ath" {
		t.Errorf("%v", err)
	}
	p, err := parse(r.Proofs)
	if err != nil {
		t.Fatal(err)
	}
	if thumbprint, err := p.verify(); err != nil || thumbprint != rfcThumbprint {
		t.Errorf("%q %v", thumbprint, err)
	}
}

// RFC 7638 §3.1.
func TestThumbprintOfTheRFC(t *testing.T) {
	var k jose.JSONWebKey
	err := json.Unmarshal([]byte(`{"kty":"RSA","n":"0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw","e":"AQAB"}`), &k)
	if err != nil {
		t.Fatal(err)
	}
	sum, err := k.Thumbprint(5)
	if got := b64(sum); err != nil || got != "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs" {
		t.Errorf("%s %v", got, err)
	}
}

func TestVerify(t *testing.T) {
	type variant struct {
		name    string
		edits   []edit
		request func(*Request)
	}
	variants := []variant{
		{"media type in full", []edit{head("typ", "Application/DPoP+JWT")}, nil},
		{"kid beside jwk", []edit{head("kid", "mine")}, nil},
		{"jwk says what it is for", []edit{jwk("alg", "ES256"), jwk("use", "sig"), jwk("key_ops", []string{"sign", "verify"}), jwk("kid", "k")}, nil},
		{"oldest", []edit{claim("iat", noon.Add(-Window).Unix())}, nil},
		{"newest", []edit{claim("iat", noon.Add(Window).Unix())}, nil},
		{"fraction of a second", []edit{claim("iat", json.Number("1795435200.25"))}, nil},
		{"longest jti", []edit{claim("jti", strings.Repeat("j", maxJTI))}, nil},
		{"case of scheme and host, port", []edit{claim("htu", "HTTPS://Writ.EXAMPLE:443/decide")}, nil},
		{"query and fragment don't count", []edit{claim("htu", here+"?a=b#c")}, func(r *Request) { r.URL = here + "?wait=30s" }},
		{"no path is /", []edit{claim("htu", "https://writ.example")}, func(r *Request) { r.URL = "https://writ.example/" }},
		{"another port", []edit{claim("htu", "https://writ.example:8443/x")}, func(r *Request) { r.URL = "https://writ.example:8443/x" }},
		{"port of no digits", []edit{claim("htu", "https://writ.example:/decide")}, nil},
		{"plain http", []edit{claim("htu", "http://[::1]/x")}, func(r *Request) { r.URL = "http://[::1]:80/x" }},
		{"nonce that nobody asked for", []edit{claim("nonce", 5)}, nil},
		{"nonce", []edit{claim("nonce", NewNonces([32]byte{1}).Nonce(noon))}, func(r *Request) { r.NonceRequired = true }},
	}
	for _, alg := range Algorithms() {
		variants = append(variants, variant{alg, []edit{by(alg, keyOf(alg))}, nil})
	}
	for _, tt := range variants {
		t.Run(tt.name, func(t *testing.T) {
			v, store := verifier()
			r := request(forge(tt.edits...))
			if tt.request != nil {
				tt.request(&r)
			}
			key, err := v.Verify(t.Context(), r)
			if err != nil {
				t.Fatal(err)
			}
			if len(key.Thumbprint) != 43 || key.JTI == "" || key.IssuedAt.Sub(noon).Abs() > Window {
				t.Errorf("%+v", key)
			}
			if want := key.IssuedAt.Add(Window + memory); !store.expires.Equal(want) {
				t.Errorf("remembered until %v, want %v", store.expires, want)
			}
			if _, err := v.Verify(t.Context(), r); err == nil || err.Error() != "was used before" {
				t.Errorf("used again: %v", err)
			}
		})
	}
}

const (
	malformedHeader  = "has a malformed header: "
	malformedPayload = "has a malformed payload: "
	noKey            = "has a jwk that is no key"
	badSignature     = "has a signature that its jwk does not verify"
	otherURL         = "has an htu of another URL"
	otherMethod      = "has an htm of another method"
	badJTI           = "has no usable jti: expected 1 to 256 printable bytes"
	badIAT           = "has no usable iat"
	offIAT           = "has an iat that is more than 1m0s from now"
	otherToken       = "has an ath of another access token"
	badAlg           = "is signed by an algorithm that Writ does not accept"
	private          = "has a private or symmetric key in its jwk"
	notSigning       = "has a jwk that is not for signatures"
	notCompact       = "is not a signed JWT in compact form"
	badTyp           = "is not of the typ dpop+jwt"
)

func refused(in, name string) string { return "has " + name + " in its " + in + ", which Writ refuses" }

// none is a draft's key that signs by nothing.
func unsigned(alg string) edit {
	return func(d *draft) { d.header["alg"], d.key = alg, nil }
}

func TestVerifyRefuses(t *testing.T) {
	small := jwkOf(rsa2k.Public())
	for _, tt := range []struct {
		name  string
		edits []edit
		want  string
	}{
		// Its form.
		{"too long", []edit{claim("pad", strings.Repeat("x", maxProof))}, "is longer than 8192 bytes"},
		{"empty", []edit{whole(func(string) string { return "" })}, notCompact},
		{"two parts", []edit{whole(func(s string) string { return s[:strings.LastIndexByte(s, '.')] })}, notCompact},
		{"JWE", []edit{whole(func(s string) string { return s + ".a.b" })}, notCompact},
		{"JSON form", []edit{whole(func(string) string { return `{"payload":"a"}` })}, notCompact},
		{"two in one header", []edit{whole(func(s string) string { return s + ", " + s })}, notCompact},
		{"padding", []edit{whole(func(s string) string { return s + "=" })}, "has a malformed signature: is not base64url"},
		{"line end", []edit{whole(func(s string) string { return s + "\n" })}, "has a malformed signature: is not base64url"},
		{"line end in the payload", []edit{whole(func(s string) string { return strings.Replace(s, ".", ".\r\n", 1) })}, malformedPayload + "is not base64url"},
		{"space before", []edit{whole(func(s string) string { return " " + s })}, malformedHeader + "is not base64url"},
		{"no header", []edit{whole(func(s string) string { return s[strings.IndexByte(s, '.'):] })}, malformedHeader},
		{"header is an array", []edit{func(d *draft) { d.rawHeader = `["typ"]` }}, malformedHeader},
		{"header is null", []edit{func(d *draft) { d.rawHeader = `null` }}, malformedHeader},
		{"payload is text", []edit{func(d *draft) { d.rawClaims = marker }}, malformedPayload},
		{"payload is null", []edit{func(d *draft) { d.rawClaims = `null` }}, malformedPayload},
		{"two jti", []edit{func(d *draft) { d.rawClaims = `{"jti":"a","jti":"b"}` }}, malformedPayload + "duplicate member"},
		{"two htu, escaped", []edit{func(d *draft) { d.rawClaims = `{"htu":"a","h\u0074u":"b"}` }}, malformedPayload + "duplicate member"},
		{"two alg", []edit{func(d *draft) { d.rawHeader = `{"typ":"dpop+jwt","alg":"ES256","alg":"none"}` }}, malformedHeader + "duplicate member"},
		{"two x in jwk", []edit{func(d *draft) { d.rawHeader = `{"typ":"dpop+jwt","alg":"ES256","jwk":{"x":"a","x":"b"}}` }}, malformedHeader + "duplicate member"},
		{"text after", []edit{func(d *draft) { d.rawClaims = `{}{}` }}, malformedPayload},
		{"deep", []edit{func(d *draft) { d.rawClaims = `{"a":` + strings.Repeat("[", 100) + strings.Repeat("]", 100) + `}` }}, malformedPayload},

		// Its header.
		{"no typ", []edit{head("typ", drop)}, badTyp},
		{"typ JWT", []edit{head("typ", "JWT")}, badTyp},
		{"access token", []edit{head("typ", "at+jwt")}, badTyp},
		{"typ with more", []edit{head("typ", "dpop+jwt;v=1")}, badTyp},
		{"typ is a list", []edit{head("typ", []string{"dpop+jwt"})}, badTyp},
		{"no alg", []edit{head("alg", drop)}, badAlg},
		{"unsigned", []edit{unsigned("none"), whole(func(s string) string { return s[:strings.LastIndexByte(s, '.')+1] })}, badAlg},
		{"HMAC", []edit{unsigned("HS256")}, badAlg},
		{"HMAC keyed with the public key", []edit{func(d *draft) { d.header["alg"] = "HS512" }}, badAlg},
		{"alg by case", []edit{head("alg", "es256")}, badAlg},
		{"ES256K", []edit{head("alg", "ES256K")}, badAlg},
		{"alg is a number", []edit{head("alg", 256)}, badAlg},
		{"crit", []edit{head("crit", []string{"exp"})}, refused("header", "crit")},
		{"empty crit", []edit{head("crit", []string{})}, refused("header", "crit")},
		{"jku", []edit{head("jku", "https://evil.example/keys")}, refused("header", "jku")},
		{"x5u", []edit{head("x5u", "https://evil.example/cert")}, refused("header", "x5u")},
		{"x5c", []edit{head("x5c", []string{"MIIB"})}, refused("header", "x5c")},
		{"payload that is not encoded", []edit{head("b64", false)}, refused("header", "b64")},
		{"compressed", []edit{head("zip", "DEF")}, refused("header", "zip")},
		{"kid is a number", []edit{head("kid", 5)}, noKey},

		// Its key.
		{"no jwk", []edit{head("jwk", nil)}, "has no jwk in its header"},
		{"jwk is text", []edit{head("jwk", "{}")}, "has no jwk in its header"},
		{"jwk is empty", []edit{head("jwk", map[string]any{})}, "has a jwk of a kty that Writ does not accept"},
		{"private EC key", []edit{jwk("d", b64(p256.D.Bytes()))}, private}, //nolint:staticcheck // the raw number is what leaks
		{"empty d", []edit{jwk("d", "")}, private},
		{"null d", []edit{jwk("d", nil)}, private},
		{"prime of RSA", []edit{by("RS256", rsa2k), jwk("p", b64(rsa2k.Primes[0].Bytes()))}, private},
		{"other prime of RSA", []edit{by("RS256", rsa2k), jwk("q", "AQ")}, private},
		{"symmetric key", []edit{head("jwk", map[string]any{"kty": "oct", "k": "AAAA"})}, private},
		{"oct without k", []edit{head("jwk", map[string]any{"kty": "oct"})}, "has a jwk of a kty that Writ does not accept"},
		{"kty AKP", []edit{jwk("kty", "AKP")}, "has a jwk of a kty that Writ does not accept"},
		{"certificates in jwk", []edit{jwk("x5c", []string{"MIIB"})}, refused("jwk", "x5c")},
		{"address in jwk", []edit{jwk("x5u", "https://evil.example")}, refused("jwk", "x5u")},
		{"no y", []edit{jwk("y", drop)}, "has no usable y in its jwk"},
		{"x is a number", []edit{jwk("x", 5)}, "has no usable x in its jwk"},
		{"x with padding", []edit{jwk("x", b64(make([]byte, 32))+"=")}, "has no usable x in its jwk"},
		{"x with a line end", []edit{func(d *draft) { d.jwk["x"] = d.jwk["x"].(string) + "\n" }}, "has no usable x in its jwk"},
		{"off the curve", []edit{jwk("x", b64(make([]byte, 32)))}, noKey},
		{"short x", []edit{jwk("x", b64(make([]byte, 31)))}, noKey},
		{"unknown curve", []edit{jwk("crv", "secp256k1")}, noKey},
		{"curve of another size", []edit{jwk("crv", "P-384")}, noKey},
		{"X25519", []edit{by("EdDSA", ed), jwk("crv", "X25519")}, noKey},
		{"Ed25519 key of low order", []edit{by("EdDSA", ed), jwk("x", b64(append([]byte{1}, make([]byte, 31)...)))}, noKey},
		{"RSA of 1024 bits", []edit{by("RS256", rsa1k)}, "has an RSA key of fewer than 2048 bits"},
		{"RSA of 8192 bits", []edit{by("RS256", rsa2k), jwk("n", b64(new(big.Int).SetBit(big.NewInt(1), 8191, 1).Bytes()))}, noKey},
		{"RSA with e = 1", []edit{by("RS256", rsa2k), jwk("e", "AQ")}, noKey},
		{"RSA with even e", []edit{by("RS256", rsa2k), jwk("e", "Ag")}, badSignature},
		{"RSA without n", []edit{by("RS256", rsa2k), jwk("n", "")}, "has no usable n in its jwk"},
		{"jwk for another alg", []edit{jwk("alg", "ES384")}, "has a jwk for another alg"},
		{"jwk for encryption by alg", []edit{jwk("alg", "ECDH-ES")}, "has a jwk for another alg"},
		{"jwk for encryption by use", []edit{jwk("use", "enc")}, notSigning},
		{"use is null", []edit{jwk("use", nil)}, notSigning},
		{"key_ops without verify", []edit{jwk("key_ops", []string{"deriveKey"})}, notSigning},
		{"key_ops is text", []edit{jwk("key_ops", "verify")}, notSigning},

		// Its signature.
		{"of another key", []edit{func(d *draft) { d.key = other }}, badSignature},
		{"RSA key, ES256", []edit{head("jwk", small)}, badSignature},
		{"EC key, RS256", []edit{head("alg", "RS256")}, badSignature},
		{"EC key, EdDSA", []edit{head("alg", "EdDSA")}, badSignature},
		{"P-256 key, ES384", []edit{head("alg", "ES384")}, badSignature},
		{"PSS for PKCS #1", []edit{by("RS256", rsa2k), func(d *draft) { d.signAs = "PS256" }}, badSignature},
		{"another hash", []edit{by("RS256", rsa2k), func(d *draft) { d.signAs = "RS512" }}, badSignature},
		{"no signature", []edit{whole(func(s string) string { return s[:strings.LastIndexByte(s, '.')+1] })}, badSignature},
		{"zeros", []edit{whole(func(s string) string { return s[:strings.LastIndexByte(s, '.')+1] + b64(make([]byte, 64)) })}, badSignature},
		{"in DER", []edit{whole(func(s string) string { return s[:strings.LastIndexByte(s, '.')+1] + b64(make([]byte, 71)) })}, badSignature},
		{"payload of another proof", []edit{whole(func(s string) string {
			a, b := strings.Split(s, "."), strings.Split(forge(claim("jti", "jti-2")), ".")
			return a[0] + "." + b[1] + "." + a[2]
		})}, badSignature},

		// Its claims.
		{"no jti", []edit{claim("jti", drop)}, badJTI},
		{"empty jti", []edit{claim("jti", "")}, badJTI},
		{"long jti", []edit{claim("jti", strings.Repeat("j", maxJTI+1))}, badJTI},
		{"jti is a number", []edit{claim("jti", 1)}, badJTI},
		{"jti with a line end", []edit{claim("jti", "a\nb")}, badJTI},
		{"jti with NUL", []edit{claim("jti", "a\x00")}, badJTI},
		{"jti that turns text around", []edit{claim("jti", "a\u202eb")}, badJTI},
		{"no htm", []edit{claim("htm", drop)}, otherMethod},
		{"htm by case", []edit{claim("htm", "post")}, otherMethod},
		{"htm of another method", []edit{claim("htm", "GET")}, otherMethod},
		{"htm is a list", []edit{claim("htm", []string{"POST"})}, otherMethod},
		{"no htu", []edit{claim("htu", drop)}, otherURL},
		{"htu is a list", []edit{claim("htu", []string{here})}, otherURL},
		{"another path", []edit{claim("htu", "https://writ.example/revocations")}, otherURL},
		{"path by case", []edit{claim("htu", "https://writ.example/Decide")}, otherURL},
		{"slash after", []edit{claim("htu", here+"/")}, otherURL},
		{"dot segments", []edit{claim("htu", "https://writ.example/x/../decide")}, otherURL},
		{"escaped path", []edit{claim("htu", "https://writ.example/%64ecide")}, otherURL},
		{"another host", []edit{claim("htu", "https://evil.example/decide")}, otherURL},
		{"host behind a user", []edit{claim("htu", "https://x@writ.example/decide")}, otherURL},
		{"host with a dot", []edit{claim("htu", "https://writ.example./decide")}, otherURL},
		{"host that folds to ours", []edit{claim("htu", "https://wr\u0131t.example/decide")}, otherURL},
		{"another port", []edit{claim("htu", "https://writ.example:8443/decide")}, otherURL},
		{"port of http", []edit{claim("htu", "https://writ.example:80/decide")}, otherURL},
		{"plain http", []edit{claim("htu", "http://writ.example/decide")}, otherURL},
		{"two ports", []edit{claim("htu", "https://writ.example:443:443/decide")}, otherURL},
		{"two colons", []edit{claim("htu", "https://writ.example::443/decide")}, otherURL},
		{"port in another form", []edit{claim("htu", "https://writ.example:0443/decide")}, otherURL},
		{"escaped host", []edit{claim("htu", "https://wri%74.example/decide")}, otherURL},
		{"scheme that folds to ours", []edit{claim("htu", "http\u017f://writ.example/decide")}, otherURL},
		{"backslash", []edit{claim("htu", "https://writ.example\\decide")}, otherURL},
		{"only a path", []edit{claim("htu", "/decide")}, otherURL},
		{"no scheme", []edit{claim("htu", "//writ.example/decide")}, otherURL},
		{"space", []edit{claim("htu", " "+here)}, otherURL},
		{"path in the query", []edit{claim("htu", "https://writ.example?/decide")}, otherURL},
		{"no iat", []edit{claim("iat", drop)}, badIAT},
		{"iat is text", []edit{claim("iat", "1795435200")}, badIAT},
		{"negative iat", []edit{claim("iat", -1)}, badIAT},
		{"huge iat", []edit{claim("iat", json.Number("1e400"))}, badIAT},
		{"large iat", []edit{claim("iat", json.Number("1e13"))}, badIAT},
		{"in milliseconds", []edit{claim("iat", noon.UnixMilli())}, badIAT},
		{"old", []edit{claim("iat", noon.Add(-Window-time.Second).Unix())}, offIAT},
		{"of the future", []edit{claim("iat", noon.Add(Window+time.Second).Unix())}, offIAT},
		{"no ath", []edit{claim("ath", drop)}, "has no ath"},
		{"ath is null", []edit{claim("ath", nil)}, "has no ath"},
		{"ath of another token", []edit{claim("ath", digest([]byte("other")))}, otherToken},
		{"ath of no token", []edit{claim("ath", digest(nil))}, otherToken},
		{"ath in hex", []edit{claim("ath", fmt.Sprintf("%x", sha256.Sum256([]byte(token))))}, otherToken},
		{"ath with padding", []edit{claim("ath", digest([]byte(token))+"=")}, otherToken},
	} {
		t.Run(tt.name, func(t *testing.T) {
			v, store := verifier()
			raw := forge(tt.edits...)
			_, err := v.Verify(t.Context(), request(raw))
			wantRefused(t, err, tt.want)
			if len(store.uses()) != 0 {
				t.Error("a refused proof was spent")
			}
		})
	}
}

func wantRefused(t *testing.T, err error, want string) {
	t.Helper()
	if err == nil || (err.Error() != want && (!strings.HasSuffix(want, ": ") || !strings.HasPrefix(err.Error(), want))) {
		t.Fatalf("Verify = %v, want %q", err, want)
	}
	if strings.Contains(err.Error(), marker) || strings.Contains(err.Error(), "evil") {
		t.Errorf("%q repeats the proof", err)
	}
}

func TestVerifyRefusesForTheRequest(t *testing.T) {
	honest := forge()
	for _, tt := range []struct {
		name string
		edit func(*Request)
		want string
	}{
		{"no header", func(r *Request) { r.Proofs = nil }, "was sent 0 times, expected once"},
		{"two headers", func(r *Request) { r.Proofs = []string{honest, honest} }, "was sent 2 times, expected once"},
		{"another method", func(r *Request) { r.Method = "DELETE" }, otherMethod},
		{"no method", func(r *Request) { r.Method = "" }, otherMethod},
		{"another URL", func(r *Request) { r.URL = "https://writ.example/leases" }, otherURL},
		{"relative URL", func(r *Request) { r.URL = "/decide" }, "can't be checked: the URL of the request is unknown"},
		{"another token", func(r *Request) { r.Token = "x" }, otherToken},
		{"no token", func(r *Request) { r.Token = "" }, "can't be checked: there is no access token"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			v, _ := verifier()
			r := request(honest)
			tt.edit(&r)
			_, err := v.Verify(t.Context(), r)
			wantRefused(t, err, tt.want)
			if _, err := v.Verify(t.Context(), request(honest)); err != nil {
				t.Errorf("the refusal spent it: %v", err)
			}
		})
	}
}

// Without a method or token, an honest proof of nothing must not pass either.
func TestVerifyRefusesEmptyForEmpty(t *testing.T) {
	v, _ := verifier()
	r := request(forge(claim("htm", ""), claim("ath", digest(nil))))
	r.Method, r.Token = "", ""
	if _, err := v.Verify(t.Context(), r); err == nil {
		t.Error("accepted")
	}
	r = request(forge(claim("ath", digest(nil))))
	r.Token = ""
	if _, err := v.Verify(t.Context(), r); err == nil {
		t.Error("accepted")
	}
}

func TestReplay(t *testing.T) {
	v, store := verifier()
	verify := func(edits ...edit) error {
		_, err := v.Verify(t.Context(), request(forge(edits...)))
		return err
	}
	if err := verify(); err != nil {
		t.Fatal(err)
	}
	for name, edits := range map[string][]edit{
		"signed anew":  nil,
		"of later":     {claim("iat", noon.Add(time.Second).Unix())},
		"another form": {claim("htu", "HTTPS://writ.example:443/decide"), jwk("kid", "other")},
	} {
		if err := verify(edits...); err == nil || err.Error() != "was used before" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := verify(by("ES256", other)); err != nil {
		t.Errorf("another key's proof of the same jti: %v", err)
	}
	if err := verify(claim("jti", "jti-2")); err != nil {
		t.Errorf("another jti: %v", err)
	}
	for _, use := range store.uses() {
		if !strings.HasPrefix(use, "dpop ") || len(use) != len("dpop ")+43 || strings.Contains(use, "jti") {
			t.Errorf("use %q", use)
		}
	}
	store.err = errors.New("disk full")
	if err := verify(claim("jti", "jti-3")); !errors.Is(err, store.err) {
		t.Errorf("with the store down: %v", err)
	}
}

func TestReplayInParallel(t *testing.T) {
	v, _ := verifier()
	r := request(forge())
	var accepted atomic.Int32
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			if _, err := v.Verify(t.Context(), r); err == nil {
				accepted.Add(1)
			}
		})
	}
	wg.Wait()
	if n := accepted.Load(); n != 1 {
		t.Errorf("accepted %d times", n)
	}
}

func TestNonces(t *testing.T) {
	n := NewNonces([32]byte{1})
	if a := n.Nonce(noon); a != n.Nonce(noon.Add(59*time.Second)) || a == n.Nonce(noon.Add(time.Minute)) {
		t.Error("not one a minute")
	}
	if len(n.Nonce(noon)) != 54 || n.Nonce(noon) != NewNonces([32]byte{1}).Nonce(noon) {
		t.Error("replicas differ")
	}
	mac := hmac.New(sha256.New, append([]byte{1}, make([]byte, 31)...))
	mac.Write([]byte{0, 0, 0, 0, 0x01, 0xc8, 0x86, 0xec})
	if got := n.Nonce(time.Unix(0x1c886ec*60, 0)); got != b64(append([]byte{0, 0, 0, 0, 1, 0xc8, 0x86, 0xec}, mac.Sum(nil)...)) {
		t.Errorf("%s", got)
	}
	for _, tt := range []struct {
		name  string
		nonce string
		want  bool
	}{
		{"now", n.Nonce(noon), true},
		{"4 minutes ago", n.Nonce(noon.Add(-4 * time.Minute)), true},
		{"5 minutes ago", n.Nonce(noon.Add(-5 * time.Minute)), false},
		{"of a replica ahead", n.Nonce(noon.Add(time.Minute)), true},
		{"of the future", n.Nonce(noon.Add(2 * time.Minute)), false},
		{"before 1970", n.at(-1), false},
		{"at the end of time", n.at(-1 << 63), false},
		{"another key's", NewNonces([32]byte{2}).Nonce(noon), false},
		{"none", "", false},
		{"padded", n.Nonce(noon) + "=", false},
		{"line end", n.Nonce(noon) + "\n", false},
		{"cut", n.Nonce(noon)[:52], false},
		{"only the time", n.Nonce(noon)[:11], false},
		{"moved to now", b64(append(must(base64.RawURLEncoding.DecodeString(n.Nonce(noon)))[:8],
			must(base64.RawURLEncoding.DecodeString(n.Nonce(noon.Add(-time.Hour))))[8:]...)), false},
	} {
		if got := n.fresh(tt.nonce, noon); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
		v, store := verifier()
		r := request(forge(claim("nonce", tt.nonce)))
		r.NonceRequired = true
		_, err := v.Verify(t.Context(), r)
		if tt.want != (err == nil) || (!tt.want && !errors.Is(err, ErrUseNonce)) {
			t.Errorf("%s: Verify = %v", tt.name, err)
		}
		if !tt.want && len(store.uses()) > 0 {
			t.Errorf("%s: spent", tt.name)
		}
	}
	for name, edits := range map[string][]edit{"missing": nil, "a number": {claim("nonce", 5)}} {
		v, _ := verifier()
		r := request(forge(edits...))
		r.NonceRequired = true
		if _, err := v.Verify(t.Context(), r); !errors.Is(err, ErrUseNonce) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Required where none are made: refused, not let through.
	v, _ := verifier()
	v.Nonces = nil
	r := request(forge(claim("nonce", n.Nonce(noon))))
	r.NonceRequired = true
	if _, err := v.Verify(t.Context(), r); !errors.Is(err, ErrUseNonce) {
		t.Errorf("without nonces: %v", err)
	}
}

// No bit of a proof is without meaning.
func TestEveryBitCounts(t *testing.T) {
	proofs := map[string]string{}
	for _, alg := range []string{"ES256", "ES384", "EdDSA", "PS256", "RS256"} {
		proofs[alg] = forge(by(alg, keyOf(alg)))
	}
	rapid.Check(t, func(t *rapid.T) {
		alg := rapid.SampledFrom(slices.Sorted(maps.Keys(proofs))).Draw(t, "alg")
		b := []byte(proofs[alg])
		b[rapid.IntRange(0, len(b)-1).Draw(t, "byte")] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		v, _ := verifier()
		if _, err := v.Verify(t.Context(), request(string(b))); err == nil {
			t.Fatalf("accepted %q", b)
		}
	})
	for i := range proofs["ES256"] {
		for bit := range 8 {
			b := []byte(proofs["ES256"])
			b[i] ^= 1 << bit
			v, _ := verifier()
			if _, err := v.Verify(t.Context(), request(string(b))); err == nil {
				t.Fatalf("accepted bit %d of byte %d", bit, i)
			}
		}
	}
}

// FuzzProof holds what is accepted to what callers rely on, by a second reading.
func FuzzProof(f *testing.F) {
	for _, edits := range [][]edit{
		nil,
		{by("EdDSA", ed)},
		{by("RS256", rsa2k)},
		{unsigned("none")},
		{head("typ", "application/dpop+jwt")},
		{head("crit", []string{"exp"})},
		{jwk("d", "AA")},
		{jwk("key_ops", []string{"verify"})},
		{claim("htu", "HTTPS://WRIT.example:443/decide?x")},
		{claim("iat", json.Number("1e400"))},
		{func(d *draft) { d.rawClaims = `{"jti":"a","jti":"b"}` }},
		{whole(func(s string) string { return s + "\n" })},
		{whole(func(s string) string { return s + ", " + s })},
	} {
		f.Add(forge(edits...))
	}
	f.Add(rfcResourceProof)
	f.Fuzz(func(t *testing.T, raw string) {
		v, store := verifier()
		key, err := v.Verify(t.Context(), request(raw))
		if err != nil {
			if !utf8.ValidString(err.Error()) || len(err.Error()) > 200 {
				t.Fatalf("reason %q", err)
			}
			if len(store.uses()) > 0 {
				t.Fatal("refused and spent")
			}
			return
		}
		for _, part := range strings.Split(raw, ".") {
			if b, err := base64.RawURLEncoding.DecodeString(part); err != nil || b64(b) != part {
				t.Fatalf("%q is not the one spelling of its bytes", part)
			}
		}
		jws, err := jose.ParseSignedCompact(raw, algorithms)
		if err != nil {
			t.Fatal(err)
		}
		payload, err := jws.Verify(jws.Signatures[0].Header.JSONWebKey.Key)
		if err != nil {
			t.Fatal(err)
		}
		var c struct{ JTI, HTM, ATH string }
		if err := json.Unmarshal(payload, &c); err != nil || c.JTI != key.JTI || c.HTM != "POST" || c.ATH != digest([]byte(token)) {
			t.Fatalf("%s %v", payload, err)
		}
	})
}

// FuzzTarget: equal targets are the same to net/url, which decides nothing here.
func FuzzTarget(f *testing.F) {
	for _, s := range []string{
		here, "HTTPS://a:443", "http://a:80/%2f?q#f", "https://[::1]:443/", "https://a:/", "https://a@b/", "https://a\\b/",
		"https:///x", "https://a:443:443/", "https://a::443/", "http\u017f://a/", "http://a%80/", "https://A/../b", "https://\u212a/", "ftp://a/", "//a/", "https://a:0443/",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		got, ok := target(raw)
		if !ok {
			return
		}
		if again, ok := target(got); !ok || again != got {
			t.Fatalf("%q → %q → %q", raw, got, again)
		}
		u, err := url.Parse(raw)
		if err != nil {
			return
		}
		n, err := url.Parse(got)
		if err != nil {
			t.Fatalf("%q → %q: %v", raw, got, err)
		}
		port := map[string]string{"https": "443", "http": "80"}[u.Scheme]
		if u.Port() != "" {
			port = u.Port()
		}
		nport := n.Port()
		if nport == "" {
			nport = map[string]string{"https": "443", "http": "80"}[n.Scheme]
		}
		if n.Scheme != u.Scheme || n.Hostname() != strings.ToLower(u.Hostname()) || nport != port || (n.Path != u.Path && u.Path != "") || u.User != nil {
			t.Fatalf("%q → %q", raw, got)
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	for _, alg := range []string{"ES256", "EdDSA", "RS256"} {
		b.Run(alg, func(b *testing.B) {
			r := request(forge(by(alg, keyOf(alg))))
			b.ReportAllocs()
			for b.Loop() {
				v, _ := verifier()
				if _, err := v.Verify(b.Context(), r); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
