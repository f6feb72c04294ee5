// Package dpop ties a token to a key that its caller has to hold: by DPoP proofs
// (RFC 9449) and by certificates of mutual TLS (RFC 8705).
package dpop

import (
	"context"
	"crypto"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"
	"unicode"

	"github.com/writsec/writ/internal/jws"
)

const (
	maxProof = 8 << 10          // bytes, before anything is parsed
	maxID    = 256              // bytes of a jti
	window   = 60 * time.Second // how far iat may be from now

	nonceEvery = time.Minute // a fresh nonce
	nonceSteps = 5           // for how many of these it is good
)

// Verifier verifies proofs.
type Verifier struct {
	// Now is the clock, the same for all replicas.
	Now func() time.Time
	// Spend uses up a proof until a time, for all replicas: fresh says that nobody has
	// used it up before.
	Spend func(ctx context.Context, use string, expires time.Time) (fresh bool, err error)
	// NonceKey makes nonces, the same on all replicas.
	NonceKey []byte
}

// Request is what a proof has to fit.
type Request struct {
	// Proof is the value of the DPoP header.
	Proof string
	// Method and URL are of the HTTP request that it came with.
	Method, URL string
	// Token is the access token that it came with.
	Token string
	// NonceRequired wants one of Verifier.Nonce in it.
	NonceRequired bool
}

// Invalid is why a proof is refused.
type Invalid struct{ reason string }

func (e *Invalid) Error() string { return e.reason }

func invalid(format string, args ...any) error { return &Invalid{fmt.Sprintf(format, args...)} }

// ErrUseNonce asks for a proof with the nonce of Verifier.Nonce (RFC 9449 §9).
var ErrUseNonce = errors.New("needs a current nonce, as the DPoP-Nonce header gives it")

// Verify holds a proof to RFC 9449 §4.3 and returns the thumbprint of its key (RFC
// 7638, SHA-256, base64url). A proof that is not good is an *Invalid or ErrUseNonce;
// any other error is of Spend.
func (v *Verifier) Verify(ctx context.Context, r Request) (thumbprint string, err error) {
	if len(r.Proof) > maxProof {
		return "", invalid("is longer than %d bytes", maxProof)
	}
	t, err := jws.Parse(r.Proof, "jwk")
	if err != nil {
		return "", invalid("%v", err)
	}
	if typ, _ := t.Type(); typ != "dpop+jwt" {
		return "", invalid("is not of typ dpop+jwt")
	}
	key, err := keyOf(t)
	if err != nil {
		return "", err
	}
	claims, err := t.Claims()
	if err != nil {
		return "", invalid("%v", err)
	}
	id, expires, err := v.check(claims, r)
	if err != nil {
		return "", err
	}
	if ok, _ := (jws.Keys{key}).Verify(t, jws.Algorithms); !ok {
		return "", invalid("is not signed by its key")
	}
	sum, err := key.Thumbprint(crypto.SHA256)
	if err != nil {
		return "", invalid("has a jwk without a thumbprint")
	}
	thumbprint = base64.RawURLEncoding.EncodeToString(sum)
	// Last, and under the key: nobody can use up what is another's.
	fresh, err := v.Spend(ctx, "dpop:"+thumbprint+":"+id, expires)
	if err != nil {
		return "", err
	}
	if !fresh {
		return "", invalid("was used before; make a new one, with a new jti, for each request")
	}
	return thumbprint, nil
}

// keyOf reads the one public key that a proof is signed by.
func keyOf(t jws.Token) (jws.Key, error) {
	jwk, ok := t.Header["jwk"].(map[string]any)
	if !ok {
		return jws.Key{}, invalid("has no jwk in its header")
	}
	raw, err := json.Marshal(jwk)
	if err != nil {
		return jws.Key{}, invalid("has a malformed jwk in its header")
	}
	key, ok := jws.ParseKey(raw)
	if !ok {
		return jws.Key{}, invalid("has a jwk that is not a strong public key")
	}
	key.KeyID = t.KeyID
	return key, nil
}

// check holds the claims to the request, and returns the proof's id and when it would
// not be good any more.
func (v *Verifier) check(claims map[string]any, r Request) (id string, expires time.Time, err error) {
	id, _ = claims["jti"].(string)
	if id == "" || len(id) > maxID || strings.ContainsFunc(id, func(c rune) bool { return !unicode.IsPrint(c) }) {
		return "", expires, invalid("has no jti of 1 to %d printable bytes", maxID)
	}
	if claims["htm"] != r.Method {
		return "", expires, invalid("has an htm that is not the method of the request")
	}
	htu, _ := claims["htu"].(string)
	if got, ok := normal(htu); !ok || got != mustNormal(r.URL) {
		return "", expires, invalid("has an htu that is not the URL of the request, which is %s", mustNormal(r.URL))
	}
	seconds, ok := claims["iat"].(json.Number)
	iat, numErr := seconds.Float64()
	now := v.Now()
	if age := float64(now.UnixMicro())/1e6 - iat; !ok || numErr != nil || age > window.Seconds() || age < -window.Seconds() {
		return "", expires, invalid("has an iat that is not within %v of now", window)
	}
	sum := sha256.Sum256([]byte(r.Token))
	ath, _ := claims["ath"].(string)
	if subtle.ConstantTimeCompare([]byte(ath), []byte(base64.RawURLEncoding.EncodeToString(sum[:]))) != 1 {
		return "", expires, invalid("has an ath that is not of the access token")
	}
	nonce, given := claims["nonce"].(string)
	if _, present := claims["nonce"]; present != given || (given || r.NonceRequired) && !v.goodNonce(nonce) {
		return "", expires, ErrUseNonce
	}
	return id, now.Add(2*window + time.Second), nil
}

// normal is a URL without query and fragment, in the one form that RFC 3986 §6.2.2 and
// §6.2.3 give it.
func normal(raw string) (string, bool) {
	u, err := url.Parse(raw)
	if err != nil || u.Host == "" || u.User != nil {
		return "", false
	}
	scheme, host := strings.ToLower(u.Scheme), strings.ToLower(u.Host)
	switch scheme {
	case "https":
		host = strings.TrimSuffix(host, ":443")
	case "http":
		host = strings.TrimSuffix(host, ":80")
	default:
		return "", false
	}
	path := u.EscapedPath()
	if path == "" {
		path = "/"
	}
	return scheme + "://" + host + path, true
}

// mustNormal is for Writ's own URLs.
func mustNormal(raw string) string {
	s, _ := normal(raw)
	return s
}

// Nonce is for the DPoP-Nonce header: good on any replica for some minutes, and kept
// nowhere.
func (v *Verifier) Nonce() string { return v.nonce(v.Now().Unix() / int64(nonceEvery.Seconds())) }

func (v *Verifier) nonce(step int64) string {
	h := hmac.New(sha256.New, v.NonceKey)
	at := binary.BigEndian.AppendUint64(nil, uint64(step)) //nolint:gosec // a count of minutes
	h.Write(at)
	return base64.RawURLEncoding.EncodeToString(h.Sum(at))
}

func (v *Verifier) goodNonce(nonce string) bool {
	raw, err := base64.RawURLEncoding.DecodeString(nonce)
	if err != nil || len(raw) != 8+sha256.Size {
		return false
	}
	step := int64(binary.BigEndian.Uint64(raw)) //nolint:gosec // compared as it is
	age := v.Now().Unix()/int64(nonceEvery.Seconds()) - step
	return subtle.ConstantTimeCompare([]byte(nonce), []byte(v.nonce(step))) == 1 && age >= -1 && age < nonceSteps // -1: another replica was faster
}
