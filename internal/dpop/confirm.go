package dpop

import (
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
)

const maxClientCert = 16 << 10 // bytes of the header

// errUnchecked is of a token that must not be taken for one that nobody bound.
var errUnchecked = errors.New("is bound in a way that Writ can't check")

// Confirmation is the claim cnf (RFC 7800) of a token: whose it is. Its JSON is
// that of the claim; with omitzero an unbound token has none.
type Confirmation struct {
	JKT string `json:"jkt,omitempty"`      // of a DPoP key (RFC 9449 §6.1)
	X5T string `json:"x5t#S256,omitempty"` // of a client certificate (RFC 8705 §3.1)
}

// ParseConfirmation reads the cnf of a token's claims; a token without one is not
// Bound. Anything that Writ doesn't know or can't read is an error: RFC 7800 §3.1
// would let it be ignored, and with it the binding.
func ParseConfirmation(claims map[string]any) (Confirmation, error) {
	cnf, bound := claims["cnf"]
	if !bound {
		return Confirmation{}, nil
	}
	members, _ := cnf.(map[string]any)
	var c Confirmation
	for name, value := range members {
		thumbprint, _ := value.(string)
		if b, err := segment(thumbprint); err != nil || len(b) != 32 {
			return Confirmation{}, errUnchecked
		}
		switch name {
		case "jkt":
			c.JKT = thumbprint
		case "x5t#S256":
			c.X5T = thumbprint
		default:
			return Confirmation{}, errUnchecked
		}
	}
	if !c.Bound() {
		return Confirmation{}, errUnchecked
	}
	return c, nil
}

// Bound reports whether the token is good only with a proof.
func (c Confirmation) Bound() bool { return c != Confirmation{} }

// Held is what a caller has proved to hold, "" for nothing.
type Held struct {
	JKT string // Key.Thumbprint
	X5T string // CertThumbprint of the certificate of the connection
}

// Confirmed reports whether a caller holds all that the token is bound to. Ask Bound
// first: an unbound token confirms nobody.
func (c Confirmation) Confirmed(by Held) bool {
	jkt := c.JKT == "" || same(c.JKT, by.JKT)
	x5t := c.X5T == "" || same(c.X5T, by.X5T)
	return c.Bound() && jkt && x5t
}

// CertThumbprint is the x5t#S256 of a certificate (RFC 8705 §3.1).
func CertThumbprint(cert *x509.Certificate) string { return digest(cert.Raw) }

// ParseClientCert reads the client's certificate from the values of the header
// Client-Cert (RFC 9440 §2.2), of which exactly one is expected. Only the proxy that
// terminated TLS may be believed with it, and only if it removes what clients send;
// that the client holds the key, and whether the certificate is in its time, is for
// the proxy to check.
func ParseClientCert(values []string) (*x509.Certificate, error) {
	if len(values) != 1 {
		return nil, fmt.Errorf("was sent %d times, expected once", len(values))
	}
	value := values[0]
	if len(value) > maxClientCert {
		return nil, fmt.Errorf("is longer than %d bytes", maxClientCert)
	}
	malformed := errors.New("is not one certificate in base64 between colons")
	value = strings.Trim(value, " ")
	if len(value) < 2 || value[0] != ':' || value[len(value)-1] != ':' || strings.ContainsAny(value, "\r\n") {
		return nil, malformed
	}
	der, err := base64.StdEncoding.Strict().DecodeString(value[1 : len(value)-1])
	if err != nil {
		return nil, malformed
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, malformed
	}
	return cert, nil
}
