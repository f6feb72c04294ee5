// Package jws reads and verifies JSON Web Signatures (RFC 7515) in compact form,
// as RFC 8725 wants it: bounded before it is parsed, spelt in one way only, and
// never with a key that the signer brought along.
package jws

import (
	"encoding/base64"
	"errors"
	"fmt"
	"strings"

	"github.com/writsec/writ/internal/strictjson"
)

// MaxSize bounds a token, in bytes, before anything of it is parsed.
const MaxSize = 16 << 10

// Token is a compact JWS that is well formed; nothing in it is verified yet.
type Token struct {
	Raw       string
	Header    map[string]any // numbers are json.Number
	Algorithm string         // alg
	KeyID     string         // kid
	Payload   []byte         // the very bytes that the signature is over
}

// Parse refuses everything that an honest signer does not send, before any key is
// touched. The error says what is wrong and nothing of the token.
func Parse(raw string) (Token, error) {
	if len(raw) > MaxSize {
		return Token{}, fmt.Errorf("is longer than %d bytes", MaxSize)
	}
	parts := strings.Split(raw, ".")
	if len(parts) != 3 {
		return Token{}, errors.New("is not a signed JWT in compact form")
	}
	head, err := segment(parts[0])
	if err != nil {
		return Token{}, fmt.Errorf("has a malformed header: %w", err)
	}
	t := Token{Raw: raw}
	if t.Header, err = strictjson.Object(head); err != nil {
		return Token{}, fmt.Errorf("has a malformed header: %w", err)
	}
	// A key or an extension that the token brings along is never believed (RFC
	// 8725 §3.10, RFC 7515 §4.1.11).
	for _, name := range []string{"crit", "jwk", "jku", "x5u", "x5c", "b64", "zip"} {
		if _, ok := t.Header[name]; ok {
			return Token{}, fmt.Errorf("has %s in its header, which Writ refuses", name)
		}
	}
	t.Algorithm, _ = t.Header["alg"].(string)
	if kid, present := t.Header["kid"]; present {
		var ok bool
		if t.KeyID, ok = kid.(string); !ok {
			return Token{}, errors.New("has a kid that is not a string")
		}
	}
	if t.Payload, err = segment(parts[1]); err != nil {
		return Token{}, fmt.Errorf("has a malformed payload: %w", err)
	}
	if _, err := segment(parts[2]); err != nil {
		return Token{}, fmt.Errorf("has a malformed signature: %w", err)
	}
	return t, nil
}

// Type is typ as RFC 7515 §4.1.9 compares it: in lower case, without the prefix
// application/. ok is false where there is none.
func (t Token) Type() (typ string, ok bool) {
	v, present := t.Header["typ"]
	s, _ := v.(string)
	return strings.TrimPrefix(strings.ToLower(s), "application/"), present
}

// Claims reads the payload of a JWT.
func (t Token) Claims() (map[string]any, error) {
	c, err := strictjson.Object(t.Payload)
	if err != nil {
		return nil, fmt.Errorf("has a malformed payload: %w", err)
	}
	return c, nil
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
