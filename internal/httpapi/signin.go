package httpapi

import (
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/session"
	"github.com/writsec/writ/internal/signin"
)

// signInBody completes a sign-in.
type signInBody struct {
	ID   string `json:"id"`
	Code string `json:"code"`
}

// sessionRequest is what a body of POST /sessions asks for.
type sessionRequest struct {
	subject            string
	spec               session.Spec
	redirectURI, state string
}

// sessionRequest reads the body. What completes a sign-in says nothing else: all the
// rest was said, and consented to, before.
func (a *API) sessionRequest(b sessionBody) (q sessionRequest, err error) {
	if b.SignIn != nil {
		if b.SubjectToken != nil || b.Task != "" || b.Envelope != nil || b.ExpiresIn != nil || b.RedirectURI != nil || b.State != nil {
			return q, fault.Invalid("/sign_in", "stands alone: leave the other members out")
		}
		return q, nil
	}
	if q.subject, err = optional("/subject_token", b.SubjectToken); err != nil {
		return q, err
	}
	q.spec.Task = b.Task
	if n := b.ExpiresIn; n != nil {
		longest := int(a.Sessions.Settings.MaxAge.Seconds())
		if *n < 1 || *n > longest {
			return q, fault.Invalid("/expires_in", "expected 1 to %d seconds", longest)
		}
		q.spec.Age = time.Duration(*n) * time.Second
	}
	if b.Envelope != nil {
		e := b.Envelope.envelope()
		q.spec.Envelope = &e
	}
	if q.redirectURI, err = optional("/redirect_uri", b.RedirectURI); err != nil {
		return q, err
	}
	q.state, err = optional("/state", b.State)
	return q, err
}

// errNoSignIn answers who wants to be led back from a sign-in that there will not be.
var errNoSignIn = fault.Invalid("/redirect_uri", "has no effect: no sign-in is needed, or none is configured; leave redirect_uri and state out")

func (a *API) openSignIn(w http.ResponseWriter, r *http.Request, c identity.Caller, q sessionRequest) error {
	ticket, err := a.SignIns.Open(r.Context(), c, signin.Ask{
		Spec: q.spec, RedirectURI: q.redirectURI, State: q.state, From: a.callerIP(r),
	})
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusAccepted, struct {
		Status string        `json:"status"`
		SignIn signin.Ticket `json:"sign_in"`
	}{"login_required", ticket})
}

func (a *API) completeSignIn(r *http.Request, c identity.Caller, b signInBody) (session.Session, error) {
	if a.SignIns == nil {
		return session.Session{}, fault.New(fault.NotFound, "no issuer is set up for users to sign in")
	}
	return a.SignIns.Complete(r.Context(), c, b.ID, b.Code)
}

// showSignIn is inert: it is also what fetches previews of links.
func (a *API) showSignIn(w http.ResponseWriter, r *http.Request) error {
	if a.SignIns == nil {
		return errNoPage
	}
	s, err := a.SignIns.Show(r.Context(), chi.URLParam(r, "token"))
	if err != nil {
		return err
	}
	return a.writePage(w, http.StatusOK, "start", "Sign in for an agent", struct {
		signin.SignIn
		Action  string
		Issuers []string
	}{s, a.base() + signInPath + url.PathEscape(chi.URLParam(r, "token")), a.SignIns.Issuers()})
}

// startSignIn leads to the identity provider by a page rather than by a redirect:
// browsers hold every redirect that follows a form to the form-action of its page, and
// where a provider redirects to is its own affair.
func (a *API) startSignIn(w http.ResponseWriter, r *http.Request) error {
	if a.SignIns == nil {
		return errNoPage
	}
	form, err := a.readForm(w, r)
	if err != nil {
		return err
	}
	s, cookie, to, err := a.SignIns.Start(r.Context(), chi.URLParam(r, "token"), form.Get("issuer"))
	if err != nil {
		return err
	}
	http.SetCookie(w, a.cookie(s.ID, cookie))
	return a.writeOnward(w, "Going to your identity provider", s.Issuer, to)
}

func (a *API) callback(w http.ResponseWriter, r *http.Request) error {
	if a.SignIns == nil {
		return errNoPage
	}
	answer, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return fault.Wrap(fault.InvalidRequest, err, "The identity provider's answer is malformed. Nothing was allowed.")
	}
	id, err := a.SignIns.Callback(r.Context(), answer, func(id string) string { return a.browser(r, id) })
	if err != nil {
		return err
	}
	return a.seeConsent(w, id)
}

// seeConsent leads to the page that a reload shows again.
func (a *API) seeConsent(w http.ResponseWriter, id string) error {
	w.Header().Set("Location", a.base()+"/consent/"+id)
	w.WriteHeader(http.StatusSeeOther)
	return nil
}

func (a *API) showConsent(w http.ResponseWriter, r *http.Request) error {
	if a.SignIns == nil {
		return errNoPage
	}
	id := chi.URLParam(r, "id")
	c, err := a.SignIns.Consent(r.Context(), id, a.browser(r, id))
	if err != nil {
		return err
	}
	switch c.State {
	case signin.SignedIn:
		return a.writePage(w, http.StatusOK, "consent", "Let an agent work for you?", struct {
			signin.Consent
			Action string
		}{c, a.base() + "/consent/" + id})
	case signin.Consented:
		if c.Return != "" {
			return a.writeOnward(w, "Going back to the agent", origin(c.RedirectURI), c.Return)
		}
		return a.writePage(w, http.StatusOK, "code", "Your code for the agent", c)
	case signin.Declined:
		return a.writePage(w, http.StatusOK, "declined", "You declined", c)
	default:
		return a.writePage(w, http.StatusOK, "done", "The agent has started", c)
	}
}

func (a *API) answerConsent(w http.ResponseWriter, r *http.Request) error {
	if a.SignIns == nil {
		return errNoPage
	}
	form, err := a.readForm(w, r)
	if err != nil {
		return err
	}
	answer := form.Get("answer")
	if answer != "accept" && answer != "decline" {
		return fault.New(fault.InvalidRequest, "Choose to allow or to decline.")
	}
	id := chi.URLParam(r, "id")
	if err := a.SignIns.Answer(r.Context(), id, a.browser(r, id), form.Get("form"), a.callerIP(r), answer == "accept"); err != nil {
		return err
	}
	return a.seeConsent(w, id)
}

// readForm reads a form that one of our own pages has sent: the Origin or Sec-Fetch-Site
// header, which no page can forge, says so.
func (a *API) readForm(w http.ResponseWriter, r *http.Request) (url.Values, error) {
	foreign := fault.New(fault.Forbidden, "This form does not come from Writ's own page. Nothing was allowed.")
	if r.Header.Get("Origin") == "" && r.Header.Get("Sec-Fetch-Site") == "" {
		return nil, foreign
	}
	var own http.CrossOriginProtection
	if err := own.Check(r); err != nil {
		return nil, foreign
	}
	body, err := readBody(w, r, "application/x-www-form-urlencoded")
	if err != nil {
		return nil, err
	}
	form, err := url.ParseQuery(string(body))
	if err != nil {
		return nil, fault.Wrap(fault.InvalidRequest, err, "The form cannot be read.")
	}
	for _, values := range form {
		if len(values) > 1 {
			return nil, fault.New(fault.InvalidRequest, "The form says one thing twice.")
		}
	}
	return form, nil
}

// cookieLife outlives any sign-in.
const cookieLife = 20 * time.Minute

// cookie ties a sign-in to this browser. The prefix keeps other hosts, and plain http,
// from setting it; on loopback without TLS there is no such protection.
func (a *API) cookie(id, value string) *http.Cookie {
	return &http.Cookie{ //nolint:gosec // G124: plain http, on loopback, has no Secure cookies
		Name: a.cookieName(id), Value: value, Path: "/", MaxAge: int(cookieLife.Seconds()),
		HttpOnly: true, Secure: a.secure(), SameSite: http.SameSiteLaxMode, // Lax: the provider leads back here
	}
}

func (a *API) secure() bool { return strings.HasPrefix(a.ExternalURL, "https://") }

func (a *API) cookieName(id string) string {
	if a.secure() {
		return "__Host-writ-" + id
	}
	return "writ-" + id
}

// browser is this browser's secret of a sign-in, "" where it has none.
func (a *API) browser(r *http.Request, id string) string {
	c, err := r.Cookie(a.cookieName(id))
	if err != nil {
		return ""
	}
	return c.Value
}
