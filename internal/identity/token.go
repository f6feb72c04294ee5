package identity

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/writsec/writ/internal/strictjson"
)

// MaxName bounds a sub, client_id or jti, in bytes.
const MaxName = 512

const maxToken = 16 << 10 // bytes of a token, before anything of it is parsed

// tokenKind tells apart what RFC 8725 §3.11 demands to be told apart.
type tokenKind int

const (
	accessToken tokenKind = iota // RFC 9068
	idToken                      // OpenID Connect Core
)

// parsed is a token that is well formed; nothing in it is verified yet. claims
// are of the very bytes that the signature is checked over.
type parsed struct {
	kind   tokenKind
	alg    string
	issuer string
	claims map[string]any
}

// parse reads a compact JWS and refuses everything that an honest issuer does not
// send, before any key is touched.
func parse(raw string) (parsed, error) {
	if len(raw) > maxToken {
		return parsed{}, fmt.Errorf("is longer than %d bytes", maxToken)
	}
	parts := strings.Split(raw, ".")
	if len(parts) != 3 {
		return parsed{}, errors.New("is not a signed JWT in compact form")
	}
	header, err := object(parts[0])
	if err != nil {
		return parsed{}, fmt.Errorf("has a malformed header: %w", err)
	}
	// A key or an extension that the token brings along is never believed (RFC
	// 8725 §3.10, RFC 7515 §4.1.11).
	for _, name := range []string{"crit", "jwk", "jku", "x5u", "x5c", "b64", "zip"} {
		if _, ok := header[name]; ok {
			return parsed{}, fmt.Errorf("has %s in its header, which Writ refuses", name)
		}
	}
	p := parsed{alg: stringClaim(header, "alg")}
	typ, present := header["typ"]
	switch mediaType(typ) {
	case "at+jwt":
		p.kind = accessToken
	case "jwt":
		p.kind = idToken
	default:
		if present {
			return parsed{}, errors.New("is neither an access token (typ at+jwt) nor an ID token (typ JWT)")
		}
		p.kind = idToken
	}
	if p.claims, err = object(parts[1]); err != nil {
		return parsed{}, fmt.Errorf("has a malformed payload: %w", err)
	}
	if _, err := segment(parts[2]); err != nil {
		return parsed{}, fmt.Errorf("has a malformed signature: %w", err)
	}
	if p.issuer = stringClaim(p.claims, "iss"); p.issuer == "" {
		return parsed{}, errors.New("has no iss")
	}
	return p, nil
}

// mediaType compares by RFC 7515 §4.1.9: in any case, with or without the prefix.
func mediaType(typ any) string {
	s, _ := typ.(string)
	return strings.TrimPrefix(strings.ToLower(s), "application/")
}

// segment decodes base64url in its one canonical form, so that a token has one
// spelling. The decoder by itself skips line ends.
func segment(s string) ([]byte, error) {
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	if err != nil || strings.ContainsAny(s, "\r\n") {
		return nil, errors.New("is not base64url")
	}
	return b, nil
}

func object(s string) (map[string]any, error) {
	b, err := segment(s)
	if err != nil {
		return nil, err
	}
	return strictjson.Object(b)
}

// checkTimes holds exp, nbf and iat to now. exp gets no leeway: a token is never
// good for longer than its issuer said.
func checkTimes(claims map[string]any, now time.Time, leeway time.Duration) error {
	exp, ok := TimeClaim(claims, "exp")
	if !ok {
		return errors.New("has no usable exp")
	}
	if !now.Before(exp) {
		return errors.New("is expired")
	}
	if _, present := claims["nbf"]; present {
		nbf, ok := TimeClaim(claims, "nbf")
		if !ok {
			return errors.New("has no usable nbf")
		}
		if now.Add(leeway).Before(nbf) {
			return errors.New("is not valid yet")
		}
	}
	iat, ok := TimeClaim(claims, "iat")
	if !ok {
		return errors.New("has no usable iat")
	}
	if now.Add(leeway).Before(iat) {
		return errors.New("was issued in the future")
	}
	return nil
}

// TimeClaim reads a NumericDate (RFC 7519 §2) of a sane size.
func TimeClaim(claims map[string]any, name string) (time.Time, bool) {
	n, ok := claims[name].(json.Number)
	if !ok {
		return time.Time{}, false
	}
	f, err := n.Float64()
	if err != nil || f <= 0 || f > 1<<40 {
		return time.Time{}, false
	}
	return time.UnixMicro(int64(f * 1e6)).UTC(), true
}

// checkAccessToken holds a token to RFC 9068 §2.2 and §4.
func checkAccessToken(claims map[string]any, audience string) error {
	for _, name := range []string{"sub", "client_id", "jti"} {
		if !Usable(stringClaim(claims, name)) {
			return fmt.Errorf("has no usable %s", name)
		}
	}
	aud, ok := audiences(claims)
	if !ok {
		return errors.New("has no usable aud")
	}
	if !slices.Contains(aud, audience) {
		return fmt.Errorf("is not meant for %s", audience)
	}
	if azp, present := claims["azp"]; present && azp != claims["client_id"] {
		return errors.New("has azp and client_id that differ")
	}
	return checkUnbound(claims)
}

// checkIDToken holds a token to OpenID Connect Core §3.1.3.7 for one of clients,
// and returns that client.
func checkIDToken(claims map[string]any, clients []string) (client string, err error) {
	if !Usable(stringClaim(claims, "sub")) {
		return "", errors.New("has no usable sub")
	}
	// A logout token must never pass for an ID token (Back-Channel Logout §2.4).
	if _, ok := claims["events"]; ok {
		return "", errors.New("is a security event, not an ID token")
	}
	// Nor must an access token of an issuer that knows no at+jwt: these have a
	// scope, Keycloak's have a claim typ of their own (RFC 8725 §3.12).
	_, scope := claims["scope"]
	_, scp := claims["scp"]
	typ, typed := claims["typ"]
	if scope || scp || (typed && typ != "ID") {
		return "", errors.New("is not an ID token, though its header lets it seem one")
	}
	aud, ok := audiences(claims)
	if !ok {
		return "", errors.New("has no usable aud")
	}
	switch azp, present := claims["azp"]; {
	case present:
		client, _ = azp.(string)
	case len(aud) > 1:
		return "", errors.New("has several audiences and no azp")
	default:
		client = aud[0]
	}
	unknown := func(a string) bool { return !slices.Contains(clients, a) }
	if !slices.Contains(aud, client) || slices.ContainsFunc(aud, unknown) {
		return "", errors.New("is an ID token of a client that Writ does not know")
	}
	return client, checkUnbound(claims)
}

// checkUnbound refuses a token that is good only with a proof of its key (RFC
// 7800), as long as Writ can't check one.
func checkUnbound(claims map[string]any) error {
	if _, ok := claims["cnf"]; ok {
		return errors.New("is bound to a key (cnf), and this Writ can't check the proof")
	}
	return nil
}
