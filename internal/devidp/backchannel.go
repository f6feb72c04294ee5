package devidp

import (
	"crypto/rand"
	"log/slog"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

const (
	maxBindingMessage = 256 // characters
	defaultExpiry     = 2 * time.Minute
	maxExpiry         = 10 * time.Minute
)

// backchannelAnswer is CIBA Core §7.3.
type backchannelAnswer struct {
	AuthReqID string `json:"auth_req_id"`
	ExpiresIn int64  `json:"expires_in"`
	Interval  int64  `json:"interval"`
}

// backchannel puts a prompt on a user's phone (CIBA Core §7).
func (p *Provider) backchannel(r *http.Request) (any, error) {
	c, form, err := p.clientForm(r)
	if err != nil {
		return nil, err
	}
	if !c.may(grantCIBA) {
		return nil, badRequest("unauthorized_client", "this client may not use CIBA")
	}
	if form.Has("request") {
		return nil, badRequest("invalid_request", "signed requests are not supported")
	}
	scope := grantedScope(form.Get("scope"))
	if !hasScope(scope, "openid") {
		return nil, badRequest("invalid_scope", "openid is required")
	}
	user, err := p.hintedUser(form)
	if err != nil {
		return nil, err
	}
	message := form.Get("binding_message")
	if !validBindingMessage(message) {
		return nil, badRequest("invalid_binding_message", "up to 256 printable characters")
	}
	expiry, err := requestedExpiry(form.Get("requested_expiry"))
	if err != nil {
		return nil, err
	}

	now := time.Now()
	asked := &prompt{
		Prompt: Prompt{
			ID:        rand.Text(),
			User:      user.ID,
			Client:    c.ID,
			Message:   message,
			ACRValues: strings.Fields(form.Get("acr_values")),
			Status:    Pending,
			CreatedAt: now,
			ExpiresAt: now.Add(expiry),
		},
		authReqID: newSecret(),
		user:      user,
		scope:     scope,
		interval:  p.interval,
	}
	if err := p.state.addPrompt(asked); err != nil {
		return nil, err
	}
	p.log.InfoContext(r.Context(), "a user's phone asks for approval",
		slog.String("user", user.ID), slog.String("phone", p.PhoneURL()+"?user="+url.QueryEscape(user.ID)))
	return backchannelAnswer{
		AuthReqID: asked.authReqID,
		ExpiresIn: int64(expiry / time.Second),
		Interval:  int64(p.interval / time.Second),
	}, nil
}

// hintedUser wants exactly one hint (CIBA Core §7.1), and that a login_hint: a
// user's id or e-mail address.
func (p *Provider) hintedUser(form url.Values) (User, error) {
	hints := 0
	for _, name := range []string{"login_hint", "login_hint_token", "id_token_hint"} {
		if form.Get(name) != "" {
			hints++
		}
	}
	if hints != 1 {
		return User{}, badRequest("invalid_request", "exactly one hint is required")
	}
	hint := form.Get("login_hint")
	if hint == "" {
		return User{}, badRequest("invalid_request", "only login_hint is supported")
	}
	for _, u := range p.users {
		if hint == u.ID || hint == u.Email {
			return u, nil
		}
	}
	return User{}, badRequest("unknown_user_id", "no such user")
}

// validBindingMessage keeps out whatever could make the phone show another text
// than was sent: control characters, line breaks, changes of direction.
func validBindingMessage(s string) bool {
	unprintable := func(r rune) bool { return !unicode.IsPrint(r) }
	return utf8.ValidString(s) && utf8.RuneCountInString(s) <= maxBindingMessage &&
		!strings.ContainsFunc(s, unprintable)
}

// requestedExpiry is a positive number of seconds. This provider grants no more
// than maxExpiry; the answer's expires_in says so.
func requestedExpiry(s string) (time.Duration, error) {
	if s == "" {
		return defaultExpiry, nil
	}
	seconds, err := strconv.ParseUint(s, 10, 31)
	if err != nil || seconds == 0 {
		return 0, badRequest("invalid_request", "requested_expiry is not a positive integer")
	}
	return min(time.Duration(seconds)*time.Second, maxExpiry), nil
}

// redeemPrompt is one poll of the token endpoint (CIBA Core §10.1, §11).
func (p *Provider) redeemPrompt(c client, form url.Values) (*tokenAnswer, error) {
	approved, err := p.state.poll(c.ID, form.Get("auth_req_id"))
	if err != nil {
		return nil, err
	}
	return p.issue(c, approved.user, approved.scope, idClaims{
		AuthTime:  approved.AnsweredAt.Unix(),
		ACR:       grantedACR(strings.Join(approved.ACRValues, " ")),
		AMR:       []string{"swk", "user"}, // RFC 8176: a key in software, a user present
		AuthReqID: approved.authReqID,
	})
}
