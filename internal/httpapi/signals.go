package httpapi

import (
	"net/http"
	"net/url"

	"github.com/writsec/writ/internal/fault"
)

// logout is OpenID Back-Channel Logout §2.5: an issuer says that a login, or all that
// a user has, is over.
func (a *API) logout(w http.ResponseWriter, r *http.Request) error {
	body, err := readBody(w, r, "application/x-www-form-urlencoded")
	if err != nil {
		return err
	}
	form, err := url.ParseQuery(string(body))
	if err != nil || len(form["logout_token"]) != 1 {
		return fault.Invalid("logout_token", "expected exactly one logout token in a form")
	}
	out, err := a.Identity.Logout(r.Context(), form.Get("logout_token"))
	if err != nil {
		a.Metrics.TokensRefused.WithLabelValues("logout").Inc()
		return err
	}
	if err := a.Revoker.SignOut(r.Context(), out); err != nil {
		return err
	}
	w.WriteHeader(http.StatusOK)
	return nil
}

// signal is RFC 8935: a transmitter pushes one security event token.
func (a *API) signal(w http.ResponseWriter, r *http.Request) error {
	body, err := readBody(w, r, "application/secevent+jwt")
	if err != nil {
		return err
	}
	out, ends, err := a.Identity.SecurityEvent(r.Context(), string(body))
	if err != nil {
		a.Metrics.TokensRefused.WithLabelValues("signal").Inc()
		return err
	}
	if ends {
		if err := a.Revoker.SignOut(r.Context(), out); err != nil {
			return err
		}
	}
	w.WriteHeader(http.StatusAccepted)
	return nil
}
