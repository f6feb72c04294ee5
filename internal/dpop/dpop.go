// Package dpop holds tokens to the key that they are bound to (RFC 7800): it
// verifies DPoP proofs (RFC 9449) and names client certificates (RFC 8705). It
// refuses a binding that it can't check, and a proof that was seen before. It
// does not verify the tokens themselves.
package dpop

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"time"
)

const (
	// Window is how far the iat of a proof may lie from now, on either side.
	Window = time.Minute
	// memory is how long after its window a proof is remembered, so that clocks which
	// differ can't open a gap.
	memory = time.Minute
)

// ErrUseNonce says that a proof lacks a fresh nonce. The answer is the error
// use_dpop_nonce with a nonce in the header DPoP-Nonce (RFC 9449 §9); the client
// then tries again by itself.
var ErrUseNonce = errors.New("has no fresh nonce; repeat it with the one in DPoP-Nonce")

// Store remembers what may be used once, for all replicas.
type Store interface {
	// Spend records a use until expires, and reports whether it is the first. Of any
	// number of calls at once exactly one is told so. A use that is over by the
	// store's clock is not fresh. The text begins with the kind of use, so that kinds
	// don't meet, and holds a digest of what strangers chose.
	Spend(ctx context.Context, use string, expires time.Time) (fresh bool, err error)
}

// Verifier verifies DPoP proofs.
type Verifier struct {
	Store  Store
	Now    func() time.Time
	Nonces *Nonces // nil where Request.NonceRequired is never set
}

// Request is what a proof must be for.
type Request struct {
	// Proofs are the values of the request's DPoP headers: exactly one is expected.
	Proofs []string
	Method string
	// URL is the absolute URL of the request as the client sees it. Its origin comes
	// from the configuration, not from a header of the request. Query and fragment
	// don't count.
	URL string
	// Token is the access token that came with the proof.
	Token string
	// NonceRequired demands a fresh nonce of Verifier.Nonces.
	NonceRequired bool
}

// Key is the key that signed a proof.
type Key struct {
	Thumbprint string // jkt: base64url SHA-256 of RFC 7638
	JTI        string // of the proof, as the client chose it
	IssuedAt   time.Time
}

// Verify holds a proof to RFC 9449 §4.3 and spends it: the same proof is refused
// from then on, whatever becomes of the request. The error's text goes on from
// "the DPoP proof"; it repeats nothing of the proof. ErrUseNonce and a failure of
// the store, which is wrapped, are to be told apart from the rest.
func (v *Verifier) Verify(ctx context.Context, r Request) (Key, error) {
	p, err := parse(r.Proofs)
	if err != nil {
		return Key{}, err
	}
	if err := v.checkClaims(p.claims, r); err != nil {
		return Key{}, err
	}
	key := Key{JTI: text(p.claims, "jti")}
	key.IssuedAt, _ = issuedAt(p.claims)
	if key.Thumbprint, err = p.verify(); err != nil {
		return Key{}, err
	}
	// The thumbprint is of one length, so that no other pair has this digest; and it
	// keeps one client from spending the jti of another.
	use := "dpop " + digest([]byte(key.Thumbprint+key.JTI))
	fresh, err := v.Store.Spend(ctx, use, key.IssuedAt.Add(Window+memory))
	if err != nil {
		return Key{}, fmt.Errorf("can't be spent: %w", err)
	}
	if !fresh {
		return Key{}, errors.New("was used before")
	}
	return key, nil
}

// checkClaims checks what needs no key.
func (v *Verifier) checkClaims(claims map[string]any, r Request) error {
	if jti := text(claims, "jti"); !usable(jti) {
		return fmt.Errorf("has no usable jti: expected 1 to %d printable bytes", maxJTI)
	}
	if htm := text(claims, "htm"); htm == "" || htm != r.Method {
		return errors.New("has an htm of another method")
	}
	want, ok := target(r.URL)
	if !ok {
		return errors.New("can't be checked: the URL of the request is unknown")
	}
	if htu, ok := target(text(claims, "htu")); !ok || htu != want {
		return errors.New("has an htu of another URL")
	}
	iat, ok := issuedAt(claims)
	if !ok {
		return errors.New("has no usable iat")
	}
	now := v.Now()
	if now.Sub(iat).Abs() > Window {
		return fmt.Errorf("has an iat that is more than %v from now", Window)
	}
	if r.Token == "" {
		return errors.New("can't be checked: there is no access token")
	}
	ath, ok := claims["ath"].(string)
	if !ok {
		return errors.New("has no ath")
	}
	if !same(ath, digest([]byte(r.Token))) {
		return errors.New("has an ath of another access token")
	}
	if r.NonceRequired && !v.Nonces.fresh(text(claims, "nonce"), now) {
		return ErrUseNonce
	}
	return nil
}

// digest is base64url SHA-256, as in ath, jkt and x5t#S256.
func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

// same compares in constant time.
func same(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }
