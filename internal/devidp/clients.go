package devidp

import (
	"crypto/sha256"
	"crypto/subtle"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
)

// The grants of the token endpoint.
const (
	grantCode        = "authorization_code"
	grantCredentials = "client_credentials"
	grantCIBA        = "urn:openid:params:grant-type:ciba" // CIBA Core §10.1
)

// client is a registered Client and what it may do.
type client struct {
	Client
	audience string   // aud of its access tokens
	grants   []string // grant types it may use
}

func (c client) may(grant string) bool { return slices.Contains(c.grants, grant) }

// clients lists every registration. Only agents get tokens that Writ accepts: an
// approver's token, issued to Writ's own client, is good for this provider alone.
func (c Config) clients() []client {
	all := []client{{Client: c.CIBAClient, grants: []string{grantCode, grantCIBA}}}
	for _, a := range c.Agents {
		all = append(all, client{
			Client:   Client(a),
			audience: c.Audience,
			grants:   []string{grantCode, grantCredentials},
		})
	}
	return all
}

func (p *Provider) client(id string) (client, bool) {
	i := slices.IndexFunc(p.clients, func(c client) bool { return c.ID == id })
	if i < 0 {
		return client{}, false
	}
	return p.clients[i], true
}

var errInvalidClient = &oauthError{
	status: http.StatusUnauthorized, Code: "invalid_client", Description: "unknown client or wrong secret",
}

// authenticate finds who sends the form, by client_secret_basic or
// client_secret_post, never both (RFC 6749 §2.3).
func (p *Provider) authenticate(r *http.Request, form url.Values) (client, error) {
	id, secret := form.Get("client_id"), form.Get("client_secret")
	if r.Header.Get("Authorization") != "" {
		user, password, ok := r.BasicAuth()
		if !ok {
			return client{}, errInvalidClient
		}
		// Both halves are form-encoded before they are joined (RFC 6749 §2.3.1).
		user, errUser := url.QueryUnescape(user)
		password, errPassword := url.QueryUnescape(password)
		if errUser != nil || errPassword != nil {
			return client{}, errInvalidClient
		}
		if secret != "" || (id != "" && id != user) {
			return client{}, badRequest("invalid_request", "more than one way of client authentication")
		}
		id, secret = user, password
	}
	c, ok := p.client(id)
	if !ok || !sameSecret(secret, c.Secret) {
		return client{}, errInvalidClient
	}
	return c, nil
}

// sameSecret takes the same time whatever the secrets' lengths and common prefix.
func sameSecret(a, b string) bool {
	x, y := sha256.Sum256([]byte(a)), sha256.Sum256([]byte(b))
	return subtle.ConstantTimeCompare(x[:], y[:]) == 1
}

// redirectURI is the asked URI, parsed, if the client registered it.
func (c client) redirectURI(asked string) (*url.URL, bool) {
	u, err := url.Parse(asked)
	if err != nil {
		return nil, false
	}
	ok := slices.ContainsFunc(c.RedirectURIs, func(registered string) bool {
		return asked == registered || sameButPort(u, registered)
	})
	return u, ok
}

// sameButPort allows any port for a registered http loopback URI (RFC 8252 §7.3).
func sameButPort(asked *url.URL, registered string) bool {
	r, err := url.Parse(registered)
	if err != nil || r.Scheme != "http" || !isLoopback(r.Hostname()) || asked.Hostname() != r.Hostname() {
		return false
	}
	a := *asked
	a.Host, r.Host = "", ""
	return a.String() == r.String()
}

// isLoopback holds for "localhost" and for the literals of loopback addresses,
// not for other names, whatever they resolve to.
func isLoopback(host string) bool {
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.IsLoopback() && ip.Zone() == ""
}
