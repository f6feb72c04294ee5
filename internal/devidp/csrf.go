package devidp

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"net/http"
)

const csrfCookie = "devidp"

// csrf makes forms that only a page of this provider, in this browser, can have
// sent: the form carries a MAC of the browser's cookie. The key is new at each
// start, while the cookie may well be another provider's: browsers share cookies
// between the ports of a host.
type csrf struct{ key [32]byte }

func newCSRF() csrf {
	var c csrf
	_, _ = rand.Read(c.key[:]) // never fails (crypto/rand)
	return c
}

// token is for a form; it gives the browser a cookie if it has none.
func (c csrf) token(w http.ResponseWriter, r *http.Request) string {
	cookie, err := r.Cookie(csrfCookie)
	if err != nil {
		cookie = &http.Cookie{ //nolint:gosec // G124: plain http on loopback has no Secure cookies
			Name:     csrfCookie,
			Value:    rand.Text(),
			Path:     "/",
			HttpOnly: true,
			SameSite: http.SameSiteLaxMode, // Strict would hide it when a client sends the browser here
		}
		http.SetCookie(w, cookie)
	}
	return c.mac(cookie.Value)
}

func (c csrf) valid(r *http.Request) bool {
	cookie, err := r.Cookie(csrfCookie)
	return err == nil && sameSecret(r.PostFormValue("csrf"), c.mac(cookie.Value))
}

func (c csrf) mac(value string) string {
	h := hmac.New(sha256.New, c.key[:])
	h.Write([]byte(value))
	return base64.RawURLEncoding.EncodeToString(h.Sum(nil))
}
