package identity

import (
	"bytes"
	"compress/flate"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/jws"
)

// badToken is a bearer token that must be refused for the reason it is bad for,
// not for another one that it happens to have.
type badToken struct {
	name  string
	edits []edit
	want  string
}

func refuses(t *testing.T, rows []badToken) {
	t.Helper()
	v, log := world(t)
	refusesBy(t, v, rows)
	checkSilent(t, "the log", log.String())
}

func refusesBy(t *testing.T, v *Verifier, rows []badToken) {
	t.Helper()
	for _, tt := range rows {
		t.Run(tt.name, func(t *testing.T) {
			token := forge(tt.edits...)
			_, err := callerOf(v, t.Context(), token, "")
			checkRefusal(t, err, "the bearer token "+tt.want, token)
			refusedOverHTTP(t, v, token, "", "the bearer token "+tt.want)
			if _, err := operatorOf(v, t.Context(), token); !fault.Is(err, fault.InvalidToken) && !fault.Is(err, fault.Forbidden) {
				t.Errorf("Operator = %v, want it refused too", err)
			}
		})
	}
}

func checkRefusal(t *testing.T, err error, want string, tokens ...string) {
	t.Helper()
	f, ok := errors.AsType[*fault.Error](err)
	if !ok || f.Code != fault.InvalidToken {
		t.Errorf("error = %v, want an invalid_token", err)
		return
	}
	if f.Detail != want {
		t.Errorf("detail = %q\n   want %q", f.Detail, want)
	}
	checkSilent(t, "the error", err.Error(), tokens...)
}

// refusedOverHTTP brings the same tokens to the real handler.
func refusedOverHTTP(t *testing.T, v *Verifier, bearer, subject, want string) {
	t.Helper()
	if bearer == "" {
		want = "send the access token as Authorization: Bearer <access token>"
	}
	if status, detail := OverHTTP.Decide(v, bearer, subject); status != http.StatusUnauthorized || detail != want {
		t.Errorf("/decide answers %d %q\n want 401 %q", status, detail, want)
	}
}

// checkSilent holds a text to repeating nothing of a token.
func checkSilent(t *testing.T, what, text string, tokens ...string) {
	t.Helper()
	if strings.Contains(text, marker) || strings.Contains(text, "alice") || strings.Contains(text, "eyJ") {
		t.Errorf("%s tells what is in the token: %s", what, text)
	}
	for _, tok := range tokens {
		for part := range strings.SplitSeq(tok, ".") {
			if len(part) > 8 && strings.Contains(text, part) {
				t.Errorf("%s repeats a part of the token: %s", what, text)
			}
		}
	}
}

const (
	notAlg     = "is signed by an algorithm that its issuer may not use"
	noKey      = "has a signature that no key of its issuer verifies"
	notCompact = "is not a signed JWT in compact form"
	notKind    = "is neither an access token (typ at+jwt) nor an ID token (typ JWT)"
	notAccess  = "is not an access token (RFC 9068, typ at+jwt)"
	notMeant   = "is not meant for " + audience
	notKnown   = "is of an issuer that Writ does not know"
	twoClients = "has azp and client_id that differ"
	bound      = "is bound in a way that Writ can't check"
)

func refusedHeader(name string) string { return "has " + name + " in its header, which Writ refuses" }

func TestNegative01ForgedForms(t *testing.T) {
	k := keys()
	der := must(x509.MarshalPKIXPublicKey(&k.rsa.PublicKey))
	asPEM := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	own := jwk(k.ecB, "mine", nil)
	refuses(t, []badToken{
		{"alg none", []edit{by(unsigned)}, notAlg},
		{"alg none, known kid", []edit{by(unsigned), head("kid", "ec")}, notAlg},
		{"alg None", []edit{by(unsigned), head("alg", "None")}, notAlg},
		{"alg none, signature of another", []edit{head("alg", "none")}, notAlg},
		{"alg absent", []edit{head("alg", absent)}, notAlg},
		{"alg empty", []edit{head("alg", "")}, notAlg},
		{"alg a list", []edit{head("alg", []string{"ES256"})}, notAlg},
		{"alg in another case", []edit{head("alg", "es256")}, notAlg},
		{"HS256 with the PEM of the RSA key", []edit{by(hs256("rsa", asPEM))}, notAlg},
		{"HS256 with the DER of the RSA key", []edit{by(hs256("rsa", der))}, notAlg},
		{"HS256 with the modulus", []edit{by(hs256("rsa", k.rsa.N.Bytes()))}, notAlg},
		{"HS256 with a published symmetric key", []edit{by(hs256("oct", k.oct))}, notAlg},
		{"HS256 that says ES256", []edit{by(hs256("ec", der)), head("alg", "ES256")}, noKey},
		{"embedded jwk", []edit{by(es256("mine", k.ecB)), head("jwk", own)}, refusedHeader("jwk")},
		{"embedded jwk, null", []edit{head("jwk", nil)}, refusedHeader("jwk")},
		{"jku", []edit{head("jku", "https://evil.example/keys")}, refusedHeader("jku")},
		{"x5u", []edit{head("x5u", "https://evil.example/cert")}, refusedHeader("x5u")},
		{"x5c", []edit{head("x5c", []string{base64.StdEncoding.EncodeToString(der)})}, refusedHeader("x5c")},
		{"crit", []edit{head("crit", []string{"exp"})}, refusedHeader("crit")},
		{"crit, empty", []edit{head("crit", []string{})}, refusedHeader("crit")},
		{"b64 false", []edit{head("b64", false)}, refusedHeader("b64")},
		{"b64 true", []edit{head("b64", true)}, refusedHeader("b64")},
		{"zip", []edit{head("zip", "DEF"), payload(func(s string) string {
			var b bytes.Buffer
			w := must(flate.NewWriter(&b, 9))
			_, _ = w.Write([]byte(s))
			_ = w.Close()
			return b.String()
		})}, refusedHeader("zip")},
		{"JWE", []edit{whole(func(s string) string { return s + ".aaaa.bbbb" })}, notCompact},
		{"JSON serialisation, flattened", []edit{whole(func(s string) string {
			p := strings.Split(s, ".")
			return `{"protected":"` + p[0] + `","payload":"` + p[1] + `","signature":"` + p[2] + `"}`
		})}, notCompact},
		{"JSON serialisation, with dots", []edit{whole(func(s string) string {
			p := strings.Split(s, ".")
			return `{"protected":"` + p[0] + `","payload":"` + p[1] + `","signature":"` + p[2] + `","x":"a.b.c"}`
		})}, "has a malformed header: is not base64url"},
		{"unsecured, two parts", []edit{whole(func(s string) string { return s[:strings.LastIndex(s, ".")] })}, notCompact},
		{"detached payload", []edit{whole(func(s string) string {
			p := strings.Split(s, ".")
			return p[0] + ".." + p[2]
		})}, "has a malformed payload: the body is empty or cut short"},
		{"no signature", []edit{whole(func(s string) string { return s[:strings.LastIndex(s, ".")+1] })}, noKey},
		{"empty", []edit{whole(func(string) string { return "" })}, notCompact},
		{"dots alone", []edit{whole(func(string) string { return ".." })}, "has a malformed header: the body is empty or cut short"},
		{"too long", []edit{claim("pad", strings.Repeat("a", jws.MaxSize))}, "is longer than 16384 bytes"},
	})
}

func TestDuplicatesAndSpelling(t *testing.T) {
	// With a leading member, a reader that takes the last one sees the honest
	// token, a reader that takes the first one another.
	refuses(t, []badToken{
		{"alg twice", []edit{header(second(`"alg":"none"`))}, "has a malformed header: duplicate member"},
		{"kid twice", []edit{header(second(`"kid":"rsa"`))}, "has a malformed header: duplicate member"},
		{"alg twice, escaped", []edit{header(second(`"\u0061lg":"none"`))}, "has a malformed header: duplicate member"},
		{"sub twice", []edit{payload(second(`"sub":"mallory"`))}, "has a malformed payload: duplicate member"},
		{"sub twice, escaped", []edit{payload(second(`"s\u0075b":"mallory"`))}, "has a malformed payload: duplicate member"},
		{"iss twice", []edit{payload(second(`"iss":"` + issB + `"`))}, "has a malformed payload: duplicate member"},
		{"nested twice", []edit{raw("act", `{"sub":"a","sub":"b"}`)}, "has a malformed payload: duplicate member"},
		{"ISS, which go-oidc's reader takes for iss", []edit{payload(func(s string) string {
			return strings.TrimSuffix(s, "}") + `,"ISS":"` + issB + `"}`
		})}, "is signed, but its claims are malformed"},
		{"text after the payload", []edit{payload(func(s string) string { return s + "{}" })}, "has a malformed payload: text after the end of the JSON value"},
		{"payload an array", []edit{payload(func(s string) string { return "[" + s + "]" })}, "has a malformed payload: is an array, expected an object"},
		{"payload null", []edit{payload(func(string) string { return "null" })}, "has a malformed payload: is null, expected an object"},
		{"header an array", []edit{header(func(s string) string { return "[" + s + "]" })}, "has a malformed header: is an array, expected an object"},
		{"padding", []edit{whole(func(s string) string { return s + "=" })}, "has a malformed signature: is not base64url"},
		{"standard alphabet", []edit{claim("x", "???>>>"), whole(func(s string) string {
			return strings.NewReplacer("_", "/", "-", "+").Replace(s)
		})}, "has a malformed payload: is not base64url"},
		{"trailing bits in the signature", []edit{whole(otherLast)}, "has a malformed signature: is not base64url"},
		{"line end in the signature", []edit{whole(func(s string) string { return s + "\n" })}, "has a malformed signature: is not base64url"},
		{"line end in the payload", []edit{whole(func(s string) string {
			p := strings.Split(s, ".")
			return p[0] + "." + p[1][:8] + "\r\n" + p[1][8:] + "." + p[2]
		})}, "has a malformed payload: is not base64url"},
		{"space in the signature", []edit{whole(func(s string) string { return s[:len(s)-4] + " " + s[len(s)-4:] })}, "has a malformed signature: is not base64url"},
		{"space before", []edit{whole(func(s string) string { return " " + s })}, "has a malformed header: is not base64url"},
		{"a flipped payload bit", []edit{whole(func(s string) string {
			p := strings.Split(s, ".")
			b := must(base64.RawURLEncoding.DecodeString(p[1]))
			return p[0] + "." + base64.RawURLEncoding.EncodeToString(bytes.Replace(b, []byte("alice"), []byte("aLice"), 1)) + "." + p[2]
		})}, noKey},
	})
	// The JSON decoder names the character that it stumbled over, no more.
	v, _ := world(t)
	for name, e := range map[string]edit{
		"invalid UTF-8":  payload(func(s string) string { return strings.Replace(s, "alice", "ali\xffce", 1) }),
		"lone surrogate": payload(func(s string) string { return strings.Replace(s, "alice", `ali\ud800ce`, 1) }),
		"NaN":            payload(second(`"x":NaN`)),
		"deep":           payload(second(`"x":` + strings.Repeat("[", 100) + strings.Repeat("]", 100))),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := callerOf(v, t.Context(), forge(e), "")
			if !fault.Is(err, fault.InvalidToken) || !strings.Contains(err.Error(), "has a malformed payload") {
				t.Errorf("error = %v, want a malformed payload", err)
			}
			checkSilent(t, "the error", err.Error())
		})
	}
}

// otherLast spells the same 64 bytes of signature with other trailing bits.
func otherLast(s string) string {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	i := strings.IndexByte(alphabet, s[len(s)-1])
	return s[:len(s)-1] + string(alphabet[i|1])
}

func TestNegative02KeyMisuse(t *testing.T) {
	k := keys()
	refuses(t, []badToken{
		{"RS256 under a PS256 JWK", []edit{by(rs256("rsa-ps", k.rsaPS))}, noKey},
		{"use enc", []edit{by(es256("enc", k.enc))}, noKey},
		{"key_ops without verify", []edit{by(es256("signing", k.signing))}, noKey},
		{"key_ops empty", []edit{by(es256("no-ops", k.signing))}, noKey},
		{"EC algorithm under an RSA key", []edit{by(es256("rsa", k.ec))}, noKey},
		{"RSA of 1024 bits", []edit{by(rs256("weak", k.weak))}, noKey},
		{"published private key", []edit{by(es256("private", k.ecOld))}, noKey},
		{"ES256 under a P-384 key", []edit{by(es256("p384", k.ec))}, noKey},
		{"right key, another's kid", []edit{by(es256("rsa-ps", k.ec))}, noKey},
		{"kid not a string", []edit{head("kid", 5)}, "has a kid that is not a string"},
		{"algorithm outside the list of its issuer", []edit{of(issES, rs256("rsa", k.rsa))}, notAlg},
		{"algorithm for ID tokens under an access token", []edit{of(issES, ps256("rsa", k.rsa))}, notAlg},
	})
}

func TestNegative03Times(t *testing.T) {
	const noExp, noIat, noNbf, expired = "has no usable exp", "has no usable iat", "has no usable nbf", "is expired"
	refuses(t, []badToken{
		{"expired", []edit{claim("exp", at(-time.Second))}, expired},
		{"expired, within the leeway for iat", []edit{claim("exp", at(-time.Millisecond*500))}, expired},
		{"exp exactly now", []edit{claim("exp", at(0))}, expired},
		{"exp absent", []edit{claim("exp", absent)}, noExp},
		{"exp null", []edit{claim("exp", nil)}, noExp},
		{"exp zero", []edit{claim("exp", 0)}, noExp},
		{"exp negative", []edit{claim("exp", -1)}, noExp},
		{"exp minus zero", []edit{raw("exp", "-0")}, noExp},
		{"exp 1e300", []edit{raw("exp", "1e300")}, noExp},
		{"exp 1e400", []edit{raw("exp", "1e400")}, noExp},
		{"exp of 400 digits", []edit{raw("exp", strings.Repeat("9", 400))}, noExp},
		{"exp past the year 36812", []edit{claim("exp", int64(1)<<40+1)}, noExp},
		{"exp true", []edit{claim("exp", true)}, noExp},
		{"exp a list", []edit{claim("exp", []int64{at(time.Minute)})}, noExp},
		{"exp in 9999, as a string", []edit{claim("exp", "253402300799")}, noExp},
		{"exp NaN, as a string", []edit{claim("exp", "NaN")}, noExp},
		{"exp Infinity, as a string", []edit{claim("exp", "Infinity")}, noExp},
		{"exp in 9999", []edit{claim("exp", 253402300799)}, "has an exp beyond reason"},
		{"exp in 401 days", []edit{claim("exp", at(401*24*time.Hour))}, "has an exp beyond reason"},
		{"iat absent", []edit{claim("iat", absent)}, noIat},
		{"iat null", []edit{claim("iat", nil)}, noIat},
		{"iat negative", []edit{claim("iat", -5)}, noIat},
		{"iat future", []edit{claim("iat", at(31*time.Second))}, "was issued in the future"},
		{"nbf future", []edit{claim("nbf", at(31*time.Second))}, "is not valid yet"},
		{"nbf far future", []edit{claim("nbf", at(time.Hour)), claim("exp", at(2*time.Hour))}, "is not valid yet"},
		{"nbf null", []edit{claim("nbf", nil)}, noNbf},
		{"nbf negative", []edit{claim("nbf", -1)}, noNbf},
		{"nbf a string", []edit{claim("nbf", "0")}, noNbf},
	})
}

func TestNegative03Names(t *testing.T) {
	rows := []badToken{
		{"no sub", []edit{claim("sub", absent)}, "has no usable sub"},
		{"no client_id", []edit{claim("client_id", absent)}, "has no usable client_id"},
		{"azp instead of client_id", []edit{claim("client_id", absent), claim("azp", "crm-agent")}, "has no usable client_id"},
		{"no jti", []edit{claim("jti", absent)}, "has no usable jti"},
		{"jti a number", []edit{claim("jti", 5)}, "has no usable jti"},
		{"client_id a list", []edit{claim("client_id", []string{"crm-agent"})}, "has no usable client_id"},
		{"sub empty", []edit{claim("sub", "")}, "has no usable sub"},
		{"sub null", []edit{claim("sub", nil)}, "has no usable sub"},
		{"sub too long", []edit{claim("sub", strings.Repeat("a", MaxName+1))}, "has no usable sub"},
		{"foreign azp", []edit{claim("azp", "web")}, twoClients},
		{"azp empty", []edit{claim("azp", "")}, twoClients},
		{"azp null", []edit{claim("azp", nil)}, twoClients},
		{"azp a list", []edit{claim("azp", []string{"crm-agent"})}, twoClients},
	}
	for name, s := range map[string]string{
		"NUL": "\x00", "line end": "\n", "DEL": "\x7f", "C1": "\u0085", "right-to-left override": "\u202e",
		"zero width": "\u200b", "line separator": "\u2028", "no-break space": "\u00a0", "noncharacter": "\ufffe", "private use": "\ue000",
	} {
		rows = append(rows,
			badToken{"sub with " + name, []edit{claim("sub", "ali"+s+"ce")}, "has no usable sub"},
			badToken{"client_id with " + name, []edit{claim("client_id", "crm"+s)}, "has no usable client_id"},
			badToken{"act.sub with " + name, []edit{claim("act", map[string]any{"sub": "crm" + s})}, "has an act that names no actor of its issuer"})
	}
	refuses(t, rows)
}

func TestNegative04IssuerAndAudience(t *testing.T) {
	refuses(t, []badToken{
		{"unknown issuer", []edit{claim("iss", "https://evil.example")}, notKnown},
		{"trailing slash", []edit{claim("iss", issA+"/")}, notKnown},
		{"upper case", []edit{claim("iss", "https://A.example")}, notKnown},
		{"default port", []edit{claim("iss", issA+":443")}, notKnown},
		{"no scheme", []edit{claim("iss", "a.example")}, notKnown},
		{"no iss", []edit{claim("iss", absent)}, "has no iss"},
		{"iss a list", []edit{claim("iss", []string{issA})}, "has no iss"},
		{"iss empty", []edit{claim("iss", "")}, "has no iss"},
		{"wrong aud", []edit{claim("aud", "https://other.example")}, notMeant},
		{"aud with a trailing slash", []edit{claim("aud", audience+"/")}, notMeant},
		{"aud a prefix", []edit{claim("aud", "https://writ.exampl")}, notMeant},
		{"aud a list of others", []edit{claim("aud", []string{"a", "b"})}, notMeant},
		{"aud the issuer", []edit{claim("aud", issA)}, notMeant},
		{"no aud", []edit{claim("aud", absent)}, "has no usable aud"},
		{"aud null", []edit{claim("aud", nil)}, "has no usable aud"},
		{"aud an empty list", []edit{claim("aud", []string{})}, "has no usable aud"},
		{"aud a list with a number", []edit{claim("aud", []any{audience, 5})}, "has no usable aud"},
		{"aud a list with null", []edit{claim("aud", []any{audience, nil})}, "has no usable aud"},
		{"aud an object", []edit{claim("aud", map[string]any{"a": audience})}, "has no usable aud"},
	})
}

func TestNegative05Kinds(t *testing.T) {
	refuses(t, []badToken{
		{"ID token as bearer", []edit{asIDToken("crm-agent")}, notAccess},
		{"ID token for Writ as bearer", []edit{asIDToken("crm-agent"), claim("aud", []string{"crm-agent", "web"}), claim("azp", "crm-agent")}, notAccess},
		{"ID token of an unlisted client", []edit{asIDToken("stranger")}, "is an ID token of a client that Writ does not know"},
		{"access token with typ JWT", []edit{head("typ", "JWT")}, "is an ID token of a client that Writ does not know"},
		{"access token without typ", []edit{head("typ", absent)}, "is an ID token of a client that Writ does not know"},
		{"access token with typ JWT, for a client, with scope", []edit{asIDToken("web"), claim("scope", "openid")}, "is not an ID token, though its header lets it seem one"},
		{"Entra's access token", []edit{asIDToken("web"), claim("scp", "read")}, "is not an ID token, though its header lets it seem one"},
		{"Keycloak's access token", []edit{asIDToken("web"), claim("typ", "Bearer")}, "is not an ID token, though its header lets it seem one"},
		{"logout token", []edit{head("typ", "logout+jwt")}, notKind},
		{"logout token with typ JWT", []edit{asIDToken("web"), claim("events", map[string]any{})}, "is a security event, not an ID token"},
		{"security event", []edit{head("typ", "secevent+jwt")}, notKind},
		{"ID-JAG", []edit{head("typ", "oauth-id-jag+jwt")}, notKind},
		{"transaction token", []edit{head("typ", "txntoken+jwt")}, notKind},
		{"DPoP proof", []edit{head("typ", "dpop+jwt")}, notKind},
		{"client assertion", []edit{head("typ", "client-authentication+jwt")}, notKind},
		{"typ empty", []edit{head("typ", "")}, notKind},
		{"typ null", []edit{head("typ", nil)}, notKind},
		{"typ a number", []edit{head("typ", 5)}, notKind},
		{"typ a list", []edit{head("typ", []string{"at+jwt"})}, notKind},
		{"typ with a space", []edit{head("typ", "at+jwt ")}, notKind},
		{"typ with a parameter", []edit{head("typ", "at+jwt;x=y")}, notKind},
		{"typ with the prefix twice", []edit{head("typ", "application/application/at+jwt")}, notKind},
		{"typ with another prefix", []edit{head("typ", "text/at+jwt")}, notKind},
	})
}

func TestNegative06ForeignKey(t *testing.T) {
	k := keys()
	refuses(t, []badToken{
		{"issuer B's key under a kid that both have", []edit{by(es256("ec", k.ecB))}, noKey},
		{"issuer B's RSA key", []edit{by(rs256("rsa", k.rsaB))}, noKey},
		{"issuer B's key without kid", []edit{by(es256("", k.ecB))}, noKey},
		{"issuer A's key signs for B", []edit{claim("iss", issB)}, noKey},
	})
}

// TestNegative10Bound: nothing bound to a key is good without its proof.
func TestNegative10Bound(t *testing.T) {
	cnf := func(v any) edit { return claim("cnf", v) }
	print := strings.Repeat("A", 43)
	refuses(t, []badToken{
		{"DPoP", []edit{cnf(map[string]any{"jkt": print})}, "is bound to a DPoP key: send it as Authorization: DPoP, with a proof in the DPoP header"},
		{"mTLS", []edit{cnf(map[string]any{"x5t#S256": print})}, "is bound to a TLS client certificate, and the request came without one"},
		{"both", []edit{cnf(map[string]any{"jkt": print, "x5t#S256": print})}, "is bound to a DPoP key: send it as Authorization: DPoP, with a proof in the DPoP header"},
		{"no thumbprint", []edit{cnf(map[string]any{"jkt": "x"})}, bound},
		{"a thumbprint of another hash", []edit{cnf(map[string]any{"jkt": strings.Repeat("A", 27)})}, bound},
		{"a thumbprint in padded base64", []edit{cnf(map[string]any{"jkt": print + "="})}, bound},
		{"an embedded key", []edit{cnf(map[string]any{"jwk": jwk(keys().ec, "ec", nil)})}, bound},
		{"a method besides", []edit{cnf(map[string]any{"jkt": print, "kid": "ec"})}, bound},
		{"empty cnf", []edit{cnf(map[string]any{})}, bound},
		{"null cnf", []edit{cnf(nil)}, bound},
		{"cnf a text", []edit{cnf("jkt")}, bound},
		{"unbound, of an issuer that wants it", []edit{of(issBound, es256("ec", keys().ecB))}, "is not bound to a key by dpop, as its issuer's profile wants"},
		{"bound otherwise, of an issuer that wants it", []edit{of(issBound, es256("ec", keys().ecB)), cnf(map[string]any{"x5t#S256": print})}, "is not bound to a key by dpop, as its issuer's profile wants"},
	})
}

// TestAccepts has every good token beside the bad ones, without which all the
// refusals above would prove nothing.
func TestAccepts(t *testing.T) {
	k := keys()
	for _, tt := range []struct {
		name        string
		edits       []edit
		agent, user string
	}{
		{"honest", nil, "crm-agent", "alice"},
		{"RS256", []edit{by(rs256("rsa", k.rsa))}, "crm-agent", "alice"},
		{"PS256 under a PS256 JWK", []edit{by(ps256("rsa-ps", k.rsaPS))}, "crm-agent", "alice"},
		{"PS256 under a JWK without alg", []edit{by(ps256("rsa", k.rsa))}, "crm-agent", "alice"},
		{"EdDSA", []edit{by(eddsa("ed", k.ed))}, "crm-agent", "alice"},
		{"no kid", []edit{by(rs256("", k.rsa))}, "crm-agent", "alice"},
		{"typ in full", []edit{head("typ", "application/at+jwt")}, "crm-agent", "alice"},
		{"typ in another case", []edit{head("typ", "AT+JWT")}, "crm-agent", "alice"},
		{"typ in full and another case", []edit{head("typ", "Application/at+JWT")}, "crm-agent", "alice"},
		{"x5t is only a hint", []edit{head("x5t", "abc")}, "crm-agent", "alice"},
		{"aud a list", []edit{claim("aud", []string{"x", audience})}, "crm-agent", "alice"},
		{"azp the client", []edit{claim("azp", "crm-agent")}, "crm-agent", "alice"},
		{"exp in a moment", []edit{raw("exp", "1772600767.5"), claim("iat", at(-time.Minute))}, "crm-agent", "alice"},
		{"exp as far as may be", []edit{claim("exp", at(maxLife))}, "crm-agent", "alice"},
		{"iat ahead within the leeway", []edit{claim("iat", at(30*time.Second))}, "crm-agent", "alice"},
		{"nbf ahead within the leeway", []edit{claim("nbf", at(30*time.Second))}, "crm-agent", "alice"},
		{"nbf long ago", []edit{claim("nbf", 1)}, "crm-agent", "alice"},
		{"sub not ASCII", []edit{claim("sub", "José 東")}, "crm-agent", "José 東"},
		{"sub as long as may be", []edit{claim("sub", strings.Repeat("a", MaxName))}, "crm-agent", strings.Repeat("a", MaxName)},
		{"act", []edit{claim("act", map[string]any{"sub": "bot-7"})}, "bot-7", "alice"},
		{"act with its issuer", []edit{claim("act", map[string]any{"sub": "bot-7", "iss": issA})}, "bot-7", "alice"},
		{"act nested: the outermost decides", []edit{claim("act", map[string]any{"sub": "bot-7", "act": map[string]any{"sub": "bot-1", "iss": issB}})}, "bot-7", "alice"},
		{"act the client", []edit{claim("act", map[string]any{"sub": "crm-agent"})}, "crm-agent", "alice"},
		{"an agent's own", []edit{own("crm-agent")}, "crm-agent", ""},
		{"an agent's own, of an issuer of agents", []edit{of(issBots, es256("ec", k.ecB)), own("bot")}, "bot", ""},
		{"scope and claims of an access token", []edit{claim("scope", "a b"), claim("typ", "Bearer")}, "crm-agent", "alice"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			v, _ := world(t)
			c, err := callerOf(v, t.Context(), forge(tt.edits...), "")
			if err != nil {
				t.Fatal(err)
			}
			user := ""
			if c.User != nil {
				user = c.User.ID
			}
			if c.Agent.ID != tt.agent || user != tt.user {
				t.Errorf("agent %q, user %q; want %q, %q", c.Agent.ID, user, tt.agent, tt.user)
			}
		})
	}
}

// TestCallerClaims: a combined token's claims are the user's, so that an agent
// never gets a right of its user's.
func TestCallerClaims(t *testing.T) {
	v, _ := world(t)
	c, err := callerOf(v, t.Context(), forge(claim("groups", []string{"sales"})), "")
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Agent.Claims) != 0 {
		t.Errorf("the agent has claims %v", c.Agent.Claims)
	}
	if diff := cmp.Diff([]any{"sales"}, c.User.Claims["groups"]); diff != "" {
		t.Error(diff)
	}
	if n, ok := c.User.Claims["exp"].(json.Number); !ok || n == "" {
		t.Errorf("exp = %#v, want a json.Number", c.User.Claims["exp"])
	}
	if want := (Ref{issA, "alice"}); c.User.Ref != want {
		t.Errorf("user = %v, want %v", c.User.Ref, want)
	}
}

func TestCombinedTokensRefused(t *testing.T) {
	k := keys()
	const noActor = "has an act that names no actor of its issuer"
	const noUser = "has an actor but no user: its sub is its client or its actor"
	act := func(v any) edit { return claim("act", v) }
	refuses(t, []badToken{
		{"act of another issuer", []edit{act(map[string]any{"sub": "bot", "iss": issB})}, noActor},
		{"act of an issuer that is no string", []edit{act(map[string]any{"sub": "bot", "iss": []string{issA}})}, noActor},
		{"act a string", []edit{act("bot")}, noActor},
		{"act null", []edit{act(nil)}, noActor},
		{"act a list", []edit{act([]any{map[string]any{"sub": "bot"}})}, noActor},
		{"act without sub", []edit{act(map[string]any{"client_id": "bot"})}, noActor},
		{"act with an inner sub alone", []edit{act(map[string]any{"act": map[string]any{"sub": "bot"}})}, noActor},
		{"act.sub a number", []edit{act(map[string]any{"sub": 5})}, noActor},
		{"act.sub too long", []edit{act(map[string]any{"sub": strings.Repeat("a", MaxName+1)})}, noActor},
		{"an agent's own with an actor", []edit{own("crm-agent"), act(map[string]any{"sub": "bot"})}, noUser},
		{"an agent's own with itself as actor", []edit{own("crm-agent"), act(map[string]any{"sub": "crm-agent"})}, noUser},
		{"the user acts for herself", []edit{act(map[string]any{"sub": "alice"})}, noUser},
		{"issuer of users speaks of an agent", []edit{of(issUsers, es256("ec", k.ecB))}, "is of an issuer that may not speak for agents"},
		{"issuer of users, an agent's own", []edit{of(issUsers, es256("ec", k.ecB)), own("bot")}, "is of an issuer that may not speak for agents"},
		{"issuer of agents speaks of a user", []edit{of(issBots, es256("ec", k.ecB))}, "is of an issuer that may not speak for users"},
		{"issuer of operators", []edit{of(issOps, es256("ec", k.ecB)), own("bot")}, "is of an issuer that may not speak for agents"},
	})
}
