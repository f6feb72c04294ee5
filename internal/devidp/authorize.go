package devidp

import (
	"errors"
	"log/slog"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"
)

// authRequest is an authorization request whose client and redirect URI are
// known to belong together.
type authRequest struct {
	client      client
	redirectURI string // as it was sent: the token request must repeat it
	target      *url.URL
	scope       string
	state       string
	nonce       string
	challenge   string
	acr         string
}

// s256Challenge is a SHA-256 in base64url (RFC 7636 §4.2).
var s256Challenge = regexp.MustCompile(`^[A-Za-z0-9_-]{43}$`)

// authRequest checks the query of an authorization request. Without a request
// the error is for the person at the browser, since nothing shows that the
// redirect URI may be trusted (RFC 6749 §4.1.2.1); with one it is for the client.
func (p *Provider) authRequest(r *http.Request) (*authRequest, error) {
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, errors.New("its query is malformed")
	}
	c, ok := p.client(q.Get("client_id"))
	if !ok || len(q["client_id"]) > 1 {
		return nil, errors.New("no client of this name is registered here")
	}
	target, ok := c.redirectURI(q.Get("redirect_uri"))
	if !ok || len(q["redirect_uri"]) > 1 {
		return nil, errors.New("the client did not register this redirect URI")
	}
	req := &authRequest{
		client:      c,
		redirectURI: q.Get("redirect_uri"),
		target:      target,
		scope:       grantedScope(q.Get("scope")),
		state:       q.Get("state"),
		nonce:       q.Get("nonce"),
		challenge:   q.Get("code_challenge"),
		acr:         grantedACR(q.Get("acr_values")),
	}
	return req, checkAuthRequest(q)
}

func checkAuthRequest(q url.Values) error {
	if err := checkSingle(q); err != nil {
		return err
	}
	switch {
	case q.Has("request"):
		return badRequest("request_not_supported", "")
	case q.Has("request_uri"):
		return badRequest("request_uri_not_supported", "")
	case q.Get("response_type") != "code":
		return badRequest("unsupported_response_type", "only code")
	case q.Has("response_mode") && q.Get("response_mode") != "query":
		return badRequest("invalid_request", "response_mode: only query")
	case q.Get("code_challenge_method") != "S256" || !s256Challenge.MatchString(q.Get("code_challenge")):
		return badRequest("invalid_request", "PKCE with S256 is required")
	case hasScope(q.Get("prompt"), "none"):
		return badRequest("login_required", "every sign-in here picks a user anew")
	}
	return nil
}

// showSignIn asks the person at the browser who they are. Nobody stays signed in.
func (p *Provider) showSignIn(w http.ResponseWriter, r *http.Request) {
	req, err := p.authRequest(r)
	if err != nil {
		p.refuseSignIn(w, r, req, err)
		return
	}
	p.render(w, r, "signin.html", page{formTarget: formTarget(req.target)}, signInPage{
		Action: r.URL.RequestURI(),
		CSRF:   p.csrf.token(w, r),
		Client: req.client.ID,
		Users:  p.users,
	})
}

// signIn takes the pick. The form's action repeats the request's query, which is
// checked again, so nothing is kept for people who walk away.
func (p *Provider) signIn(w http.ResponseWriter, r *http.Request) {
	req, err := p.authRequest(r)
	if err != nil {
		p.refuseSignIn(w, r, req, err)
		return
	}
	if !p.csrf.valid(r) {
		p.showMessage(w, r, http.StatusForbidden, "This page is too old. Start the sign-in again.")
		return
	}
	user, ok := p.user(r.PostFormValue("user"))
	if !ok {
		p.refuseSignIn(w, r, req, badRequest("access_denied", "the user did not sign in"))
		return
	}
	code, err := p.state.addCode(codeGrant{
		clientID:    req.client.ID,
		user:        user,
		redirectURI: req.redirectURI,
		scope:       req.scope,
		nonce:       req.nonce,
		challenge:   req.challenge,
		acr:         req.acr,
		authTime:    time.Now(),
	})
	if err != nil {
		p.refuseSignIn(w, r, req, err)
		return
	}
	p.log.InfoContext(r.Context(), "user signed in",
		slog.String("user", user.ID), slog.String("client", req.client.ID))
	p.sendBack(w, r, req, url.Values{"code": {code}})
}

func (p *Provider) refuseSignIn(w http.ResponseWriter, r *http.Request, req *authRequest, err error) {
	refusal, ok := errors.AsType[*oauthError](err)
	if req == nil || !ok {
		p.showMessage(w, r, http.StatusBadRequest, "This sign-in request cannot be served: "+err.Error()+".")
		return
	}
	answer := url.Values{"error": {refusal.Code}}
	if refusal.Description != "" {
		answer.Set("error_description", refusal.Description)
	}
	p.sendBack(w, r, req, answer)
}

// sendBack answers the client through the browser, saying who answers (RFC 9207 §2).
func (p *Provider) sendBack(w http.ResponseWriter, r *http.Request, req *authRequest, answer url.Values) {
	answer.Set("iss", p.issuer)
	if req.state != "" {
		answer.Set("state", req.state)
	}
	target := *req.target
	target.RawQuery = strings.TrimPrefix(target.RawQuery+"&"+answer.Encode(), "&")
	w.Header().Set("Cache-Control", "no-store")
	//nolint:gosec // G710: target is one of the client's registered redirect URIs
	http.Redirect(w, r, target.String(), http.StatusSeeOther) // a POST must not be repeated there
}

// formTarget is where browsers must let the sign-in form lead besides this
// provider: they apply CSP's form-action to the redirect that follows it too.
// CSP cannot name an IPv6 address, so its scheme has to do.
func formTarget(u *url.URL) string {
	if strings.HasPrefix(u.Host, "[") {
		return u.Scheme + ":"
	}
	return u.Scheme + "://" + u.Host
}
