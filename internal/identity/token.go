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

// maxToken bounds a token before anything of it is parsed.
const maxToken = 16 << 10

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
	header, err := segment(parts[0])
	if err != nil {
		return parsed{}, fmt.Errorf("header %w", err)
	}
	// A key or an extension that the token brings along is never believed (RFC
	// 8725 §3.10, RFC 7515 §4.1.11).
	for _, name := range []string{"crit", "jwk", "jku", "x5u", "x5c", "b64", "zip"} {
		if _, ok := header[name]; ok {
			return parsed{}, fmt.Errorf("header has %s, which Writ refuses", name)
		}
	}
	var p parsed
	switch typ, present := header["typ"]; {
	case !present || typ == "JWT" || typ == "jwt":
		p.kind = idToken
	case typ == "at+jwt" || typ == "application/at+jwt":
		p.kind = accessToken
	default:
		return parsed{}, errors.New("is neither an access token (typ at+jwt) nor an ID token (typ JWT)")
	}
	if p.claims, err = segment(parts[1]); err != nil {
		return parsed{}, fmt.Errorf("payload %w", err)
	}
	if p.issuer = stringClaim(p.claims, "iss"); p.issuer == "" {
		return parsed{}, errors.New("has no iss")
	}
	return p, nil
}

func segment(s string) (map[string]any, error) {
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	if err != nil {
		return nil, errors.New("is not base64url")
	}
	return strictjson.Object(b)
}

// checkTimes holds exp, nbf and iat to now. exp gets no leeway: a token is never
// good for longer than its issuer said.
func checkTimes(claims map[string]any, now time.Time, leeway time.Duration) error {
	exp, ok := timeClaim(claims, "exp")
	if !ok {
		return errors.New("has no exp")
	}
	if !now.Before(exp) {
		return errors.New("is expired")
	}
	if _, present := claims["nbf"]; present {
		nbf, ok := timeClaim(claims, "nbf")
		if !ok {
			return errors.New("has a malformed nbf")
		}
		if now.Add(leeway).Before(nbf) {
			return errors.New("is not valid yet")
		}
	}
	iat, ok := timeClaim(claims, "iat")
	if !ok {
		return errors.New("has no iat")
	}
	if now.Add(leeway).Before(iat) {
		return errors.New("was issued in the future")
	}
	return nil
}

// timeClaim reads a NumericDate (RFC 7519 §2) of a sane size.
func timeClaim(claims map[string]any, name string) (time.Time, bool) {
	n, ok := claims[name].(json.Number)
	if !ok {
		return time.Time{}, false
	}
	f, err := n.Float64()
	if err != nil || f <= 0 || f > 1<<40 {
		return time.Time{}, false
	}
	return time.UnixMicro(int64(f * 1e6)), true
}

// checkAccessToken holds a token to RFC 9068 §2.2 and §4.
func checkAccessToken(claims map[string]any, audience string) error {
	for _, name := range []string{"sub", "client_id", "jti"} {
		if v := stringClaim(claims, name); v == "" || len(v) > 512 || strings.ContainsFunc(v, isControl) {
			return fmt.Errorf("has no usable %s", name)
		}
	}
	if !slices.Contains(audiences(claims), audience) {
		return fmt.Errorf("is not meant for %s", audience)
	}
	if azp := stringClaim(claims, "azp"); azp != "" && azp != stringClaim(claims, "client_id") {
		return errors.New("has azp and client_id that differ")
	}
	if _, ok := claims["cnf"]; ok {
		return errors.New("is bound to a key (cnf), and this Writ can't check the proof")
	}
	return nil
}

// checkIDToken holds a token to OpenID Connect Core §3.1.3.7 for one of clients,
// and returns that client.
func checkIDToken(claims map[string]any, clients []string) (client string, err error) {
	if v := stringClaim(claims, "sub"); v == "" || len(v) > 255 || strings.ContainsFunc(v, isControl) {
		return "", errors.New("has no usable sub")
	}
	aud := audiences(claims)
	client = stringClaim(claims, "azp")
	if client == "" {
		if len(aud) != 1 {
			return "", errors.New("has several audiences and no azp")
		}
		client = aud[0]
	}
	if !slices.Contains(clients, client) || !slices.Contains(aud, client) {
		return "", errors.New("is an ID token of a client that Writ does not know")
	}
	// A logout token must never pass for an ID token (Back-Channel Logout §2.4).
	if _, ok := claims["events"]; ok {
		return "", errors.New("is a security event, not an ID token")
	}
	return client, nil
}
