package httpapi

import (
	"crypto/x509"
	"net/http"
	"strings"

	"github.com/writsec/writ/internal/dpop"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
)

// bearer reads the one access token of a request (RFC 6750 §2.1, RFC 9449 §7.1), and
// with it what may prove that it is the caller's.
func (a *API) bearer(r *http.Request) (identity.Presented, error) {
	h := r.Header.Values("Authorization")
	if len(h) != 1 {
		return identity.Presented{}, fault.New(fault.InvalidToken, "send exactly one header Authorization: Bearer <access token>")
	}
	scheme, token, _ := strings.Cut(h[0], " ")
	p := identity.Presented{
		Token: token, DPoP: strings.EqualFold(scheme, "DPoP"), Method: r.Method, URL: a.ExternalURL + r.URL.EscapedPath(),
	}
	if !p.DPoP && !strings.EqualFold(scheme, "Bearer") || token == "" {
		return identity.Presented{}, fault.New(fault.InvalidToken, "send the access token as Authorization: Bearer <access token>")
	}
	if p.DPoP {
		p.Proofs = r.Header.Values("DPoP")
	}
	var err error
	p.Certificate, err = a.clientCert(r)
	return p, err
}

// usesDPoP reports whether a request's token came by the scheme DPoP.
func usesDPoP(r *http.Request) bool {
	scheme, _, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	return strings.EqualFold(scheme, "DPoP")
}

// clientCert is the TLS client's certificate, nil for none. That its key is the
// client's, the handshake has proved, here or at the proxy; nobody has to vouch for it.
func (a *API) clientCert(r *http.Request) (*x509.Certificate, error) {
	if !a.ProxyClientCert {
		if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
			return nil, nil
		}
		return r.TLS.PeerCertificates[0], nil
	}
	h := r.Header.Values("Client-Cert")
	if len(h) == 0 {
		return nil, nil
	}
	cert, err := dpop.ParseClientCert(h)
	if err != nil {
		return nil, fault.Invalid("Client-Cert", "%v", err)
	}
	return cert, nil
}
