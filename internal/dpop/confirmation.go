package dpop

import (
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"strings"
)

// Confirmation is what a token is bound to (RFC 7800 §3.1); both zero: nothing. It is
// also what a caller has proved to hold.
type Confirmation struct {
	// JKT is the thumbprint of a DPoP key (RFC 9449 §6.1).
	JKT string `json:"jkt,omitempty"`
	// X5T is the thumbprint of a TLS client certificate (RFC 8705 §3.1).
	X5T string `json:"x5t#S256,omitempty"`
}

// IsZero reports whether a token is bound to nothing.
func (c Confirmation) IsZero() bool { return c == Confirmation{} }

// Confirmed reports whether all that c wants is held.
func (c Confirmation) Confirmed(held Confirmation) bool {
	same := func(want, got string) bool {
		return want == "" || subtle.ConstantTimeCompare([]byte(want), []byte(got)) == 1
	}
	return same(c.JKT, held.JKT) && same(c.X5T, held.X5T)
}

// ConfirmationOf reads cnf of a token's claims. A method that Writ does not know is an
// error, and so is one that says nothing.
func ConfirmationOf(claims map[string]any) (c Confirmation, err error) {
	raw, present := claims["cnf"]
	if !present {
		return c, nil
	}
	methods, _ := raw.(map[string]any)
	for name, v := range methods {
		s, _ := v.(string)
		if b, err := base64.RawURLEncoding.Strict().DecodeString(s); err != nil || len(b) != sha256.Size {
			methods = nil
		}
		switch name {
		case "jkt":
			c.JKT = s
		case "x5t#S256":
			c.X5T = s
		default:
			methods = nil
		}
	}
	if len(methods) == 0 {
		return Confirmation{}, errors.New("is bound in a way that Writ can't check (cnf)")
	}
	return c, nil
}

// CertThumbprint is the x5t#S256 of a certificate.
func CertThumbprint(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.Raw)
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

const maxCert = 16 << 10 // bytes of a header

// ParseClientCert reads the Client-Cert header (RFC 9440 §2.2) of a proxy that
// terminates TLS.
func ParseClientCert(header string) (*x509.Certificate, error) {
	inner, ok := strings.CutPrefix(header, ":")
	inner, end := strings.CutSuffix(inner, ":")
	if !ok || !end || len(header) > maxCert {
		return nil, errors.New("is no byte sequence such as :MIIB…:")
	}
	der, err := base64.StdEncoding.DecodeString(inner)
	if err != nil {
		return nil, errors.New("is not base64")
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, errors.New("holds no certificate")
	}
	return cert, nil
}
