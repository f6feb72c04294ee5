package signin

import (
	"context"
	"errors"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/session"
)

// Flow carries sign-ins from the agent that opens one, through a browser, back to the
// agent. The details of its faults are for the person at the browser, but for those of
// Open and Complete, which are for the agent.
type Flow struct {
	Store    Store
	Sessions session.Settings
	// Providers are those that users can sign in at, in this order.
	Providers []*Provider
	// Redirects are the registered redirect URIs of agents.
	Redirects map[identity.Ref][]string
	// ExternalURL is where browsers reach Writ's pages.
	ExternalURL string
}

// Ask is what an agent asks a user to sign in for.
type Ask struct {
	Spec session.Spec
	// RedirectURI and State are optional; a state needs a redirect URI.
	RedirectURI, State string
	// From is the agent's address.
	From string
}

// Ticket is what the agent gets: the link is for its user.
type Ticket struct {
	ID        string    `json:"id"`
	URL       string    `json:"url"`
	ExpiresAt time.Time `json:"expires_at"`
}

// agentState is what an agent may ask to have back.
var agentState = regexp.MustCompile(`^[!-~]{1,512}$`)

// Open opens a sign-in for the caller's agent.
func (f *Flow) Open(ctx context.Context, c identity.Caller, ask Ask) (Ticket, error) {
	if err := ask.Spec.Check(f.Sessions); err != nil {
		return Ticket{}, err
	}
	if ask.RedirectURI != "" && !slices.Contains(f.Redirects[c.Agent.Ref], ask.RedirectURI) {
		return Ticket{}, fault.Invalid("/redirect_uri", "is not registered for this agent, to the last character")
	}
	if ask.State != "" && (ask.RedirectURI == "" || !agentState.MatchString(ask.State)) {
		return Ticket{}, fault.Invalid("/state", "expected 1 to 512 visible ASCII characters, beside a redirect_uri")
	}
	token := newSecret(16)
	s := SignIn{
		ID: id.New(id.SignIn), Version: 1, State: Opened, Agent: c.Agent.Ref, From: ask.From, Spec: ask.Spec,
		RedirectURI: ask.RedirectURI, AgentState: ask.State, TokenHash: hash(token),
	}
	err := f.Store.Update(ctx, func(tx Tx) error {
		n, err := tx.CountOpenSignIns(ctx, s.Agent)
		if err != nil {
			return err
		}
		if n >= maxOpen {
			return &fault.Error{
				Code: fault.Overloaded, RetryAfter: time.Minute,
				Detail: "this agent has too many open sign-ins; wait until some are answered or over",
			}
		}
		s.OpenedAt, s.ExpiresAt = tx.Now(), tx.Now().Add(consentWithin)
		if err := tx.InsertSignIn(ctx, s); err != nil {
			return err
		}
		detail := told(s)
		detail["from"], detail["expires_at"] = s.From, s.ExpiresAt
		if s.RedirectURI != "" {
			detail["redirect_uri"] = s.RedirectURI
		}
		return record(ctx, tx, audit.SignInOpened, s, detail)
	})
	return Ticket{ID: s.ID, URL: f.ExternalURL + "/signin/" + token, ExpiresAt: s.ExpiresAt}, err
}

// told is what of the session the record shows.
func told(s SignIn) map[string]any {
	detail := map[string]any{}
	if s.Spec.Task != "" {
		detail["task"] = s.Spec.Task
	}
	if s.Spec.Envelope != nil {
		detail["envelope"] = s.Spec.Envelope.Document()
	}
	if s.Spec.Age > 0 {
		detail["expires_in"] = int64(s.Spec.Age.Seconds())
	}
	return detail
}

// Complete opens the session that the user consented to, for the agent that asked.
func (f *Flow) Complete(ctx context.Context, c identity.Caller, signIn, code string) (out session.Session, err error) {
	if c.User != nil {
		return out, fault.Invalid("/sign_in", "needs the agent's own token; this one names a user")
	}
	gone := fault.New(fault.NotFound, "no such sign-in of this agent, or it is over; open a new one")
	if !id.Valid(id.SignIn, signIn) {
		return out, gone
	}
	var refused error // is to be recorded, unlike other errors
	err = f.Store.Update(ctx, func(tx Tx) error {
		refused = nil
		s, err := tx.SignIn(ctx, signIn)
		switch {
		case fault.Is(err, fault.NotFound) || err == nil && s.Agent != c.Agent.Ref:
			return gone
		case err != nil:
			return err
		case s.State == Declined:
			return fault.New(fault.Forbidden, "the user declined")
		case s.Over(tx.Now()):
			return gone
		case s.State != Consented:
			return fault.New(fault.LoginRequired, "%s", pending[s.State])
		}
		if !same(codeHash(s.ID, code), s.CodeHash) {
			s.WrongCodes++
			refused = fault.Invalid("/sign_in/code", "is not the code that the user was given; %d tries are left", maxWrongCodes-s.WrongCodes)
			return tx.UpdateSignIn(ctx, &s)
		}
		spec := s.Spec
		spec.Source = session.SourceUser
		out = session.New(s.User, s.Agent, spec, f.Sessions, tx.Now())
		if err := session.Open(ctx, tx, out, c.Agent); err != nil {
			return err
		}
		s.State, s.Session, s.CodeHash = Completed, out.ID, ""
		if err := tx.UpdateSignIn(ctx, &s); err != nil {
			return err
		}
		return record(ctx, tx, audit.SignInCompleted, s, nil)
	})
	if err == nil {
		err = refused
	}
	if err != nil {
		return session.Session{}, err
	}
	return out, nil
}

// pending says to an agent what has not happened yet.
var pending = map[State]string{
	Opened:   "the user has not opened the link yet",
	Started:  "the user is signing in at the identity provider",
	SignedIn: "the user has signed in and has not consented yet",
}

// Issuers lists where users can sign in.
func (f *Flow) Issuers() []string {
	var out []string
	for _, p := range f.Providers {
		out = append(out, p.Issuer)
	}
	return out
}

func (f *Flow) provider(issuer string) (*Provider, bool) {
	i := slices.IndexFunc(f.Providers, func(p *Provider) bool { return p.Issuer == issuer })
	if i < 0 {
		return nil, false
	}
	return f.Providers[i], true
}

var (
	errLink = fault.New(fault.NotFound, "There is no sign-in behind this link. Check that it is whole, or ask the agent for a new one.")
	errOver = fault.New(fault.SessionEnded, "Its time is over, or it was answered already. If you still want to go on, ask the agent for a new link.")
	// The same for a browser that never started and for one whose start was superseded.
	errBrowser = fault.New(fault.Forbidden, "This browser is not the one that started this sign-in, or it was started again since. Nothing was allowed. You can start again with the link that you were given.")
)

// Show returns the sign-in behind a link and changes nothing: whoever previews links
// does this too.
func (f *Flow) Show(ctx context.Context, token string) (s SignIn, err error) {
	err = f.Store.View(ctx, func(tx Tx) (err error) {
		s, err = startable(ctx, tx, token)
		return err
	})
	return s, err
}

// startable finds a sign-in that a browser can start.
func startable(ctx context.Context, tx Tx, token string) (SignIn, error) {
	s, err := tx.SignInByToken(ctx, hash(token))
	switch {
	case fault.Is(err, fault.NotFound):
		return s, errLink
	case err == nil && (s.State == Consented || s.Over(tx.Now())):
		return s, errOver
	}
	return s, err
}

// Start binds a sign-in to a browser that has the link, and says where to send it.
// cookie is the browser's secret; whoever had started before is out.
func (f *Flow) Start(ctx context.Context, token, issuer string) (s SignIn, cookie, redirect string, err error) {
	if issuer == "" && len(f.Providers) == 1 {
		issuer = f.Providers[0].Issuer
	}
	p, ok := f.provider(issuer)
	if !ok {
		return s, "", "", fault.New(fault.InvalidRequest, "Choose where to sign in.")
	}
	if s, err = f.Show(ctx, token); err != nil { // before any call to the provider
		return s, "", "", err
	}
	b := newBrowser()
	if redirect, err = p.authorize(ctx, f.callback(), b); err != nil {
		return s, "", "", err
	}
	err = f.Store.Update(ctx, func(tx Tx) (err error) {
		if s, err = startable(ctx, tx, token); err != nil {
			return err
		}
		s.State, s.Issuer, s.User = Started, issuer, identity.Principal{}
		s.BrowserHash, s.StateHash = hash(string(b)), hash(b.state())
		return tx.UpdateSignIn(ctx, &s)
	})
	return s, string(b), redirect, err
}

func (f *Flow) callback() string { return f.ExternalURL + "/callback" }

// maxParameter bounds a parameter of the provider's answer, in bytes.
const maxParameter = 4096

// oauthError is the form of an error code (RFC 6749 §4.1.2.1).
var oauthError = regexp.MustCompile(`^[!#-\[\]-~]{1,64}$`)

// Callback takes the provider's answer, which a browser brings. cookie returns the
// secret that this browser has for a sign-in. The state is good for one answer,
// whatever becomes of it.
func (f *Flow) Callback(ctx context.Context, answer url.Values, cookie func(id string) string) (signIn string, err error) {
	for _, values := range answer {
		if len(values) > 1 || len(values[0]) > maxParameter { // RFC 6749 §3.1
			return "", fault.New(fault.InvalidRequest, "The identity provider's answer is malformed. Nothing was allowed.")
		}
	}
	var s SignIn
	var b browser
	err = f.Store.Update(ctx, func(tx Tx) (err error) {
		s, err = tx.SignInByState(ctx, hash(answer.Get("state")))
		if fault.Is(err, fault.NotFound) {
			return fault.New(fault.NotFound, "This answer of an identity provider belongs to no sign-in that waits for one. If you came here by going back, go forward again; otherwise start again with the link that you were given.")
		}
		if err != nil {
			return err
		}
		if b = browser(cookie(s.ID)); !b.started(s) {
			return errBrowser
		}
		if s.Over(tx.Now()) {
			return errOver
		}
		s.StateHash = ""
		return tx.UpdateSignIn(ctx, &s)
	})
	if err != nil {
		return "", err
	}
	user, err := f.identify(ctx, s.Issuer, answer, b)
	if err != nil {
		return "", err
	}
	err = f.Store.Update(ctx, func(tx Tx) error {
		if s.Over(tx.Now()) {
			return errOver
		}
		next := s
		next.State, next.User = SignedIn, user
		if err := tx.UpdateSignIn(ctx, &next); err != nil {
			return err
		}
		return record(ctx, tx, audit.SignInSignedIn, next, nil)
	})
	if errors.Is(err, ErrStale) { // started again meanwhile
		return "", errBrowser
	}
	return s.ID, err
}

// identify finds out who an answer is about.
func (f *Flow) identify(ctx context.Context, issuer string, answer url.Values, b browser) (identity.Principal, error) {
	p, ok := f.provider(issuer)
	if !ok { // the configuration changed meanwhile
		return identity.Principal{}, errAnswer(errors.New("the provider is not configured any more"))
	}
	if err := p.answered(ctx, answer.Get("iss"), answer.Has("iss")); err != nil {
		return identity.Principal{}, err
	}
	if code := answer.Get("error"); answer.Has("error") {
		if !oauthError.MatchString(code) {
			code = "malformed"
		}
		return identity.Principal{}, fault.Wrap(fault.Forbidden, errors.New("the provider answered "+code),
			"You did not sign in, and nothing was allowed. If you still want to, start again with the link that you were given.")
	}
	if answer.Get("code") == "" {
		return identity.Principal{}, errAnswer(errors.New("it has neither code nor error"))
	}
	return p.redeem(ctx, f.callback(), answer.Get("code"), b)
}

// Consent is a sign-in as the browser that signed in sees it.
type Consent struct {
	SignIn
	// Form proves that an answer comes from the page that this browser was shown.
	Form string
	// Code is what the user carries to the agent, once they consented and as long as it
	// is good, unless Return says where to go.
	Code string
	// Return is where the browser goes on to, at the agent; "" stays here.
	Return string
	// Age is how long the session can last.
	Age time.Duration
}

// Consent shows a sign-in to its browser, from the moment that it is known who is
// there.
func (f *Flow) Consent(ctx context.Context, signIn, cookie string) (c Consent, err error) {
	err = f.Store.View(ctx, func(tx Tx) error {
		s, err := shown(ctx, tx, signIn, cookie)
		if err != nil {
			return err
		}
		if s.Over(tx.Now()) && s.State != Declined && s.State != Completed {
			return errOver
		}
		c = f.consent(s, browser(cookie))
		return nil
	})
	return c, err
}

func (f *Flow) consent(s SignIn, b browser) Consent {
	c := Consent{SignIn: s, Form: b.form(), Age: s.Spec.Age}
	if c.Age == 0 {
		c.Age = f.Sessions.DefaultAge
	}
	switch {
	case s.State == Consented && s.RedirectURI == "":
		c.Code = b.code()
	case s.State == Consented:
		c.Return = f.returnTo(s, url.Values{"code": {b.code()}})
	case s.State == Declined && s.RedirectURI != "":
		c.Return = f.returnTo(s, url.Values{"error": {"access_denied"}})
	}
	return c
}

// returnTo is the agent's redirect URI with an answer, and with who answers (RFC 9207).
func (f *Flow) returnTo(s SignIn, answer url.Values) string {
	answer.Set("sign_in", s.ID)
	answer.Set("iss", f.ExternalURL)
	if s.AgentState != "" {
		answer.Set("state", s.AgentState)
	}
	glue := "?"
	if strings.Contains(s.RedirectURI, "?") {
		glue = "&"
	}
	return s.RedirectURI + glue + answer.Encode()
}

// shown finds a sign-in for its browser. To any other, one that exists and one that
// doesn't look the same.
func shown(ctx context.Context, tx Tx, signIn, cookie string) (SignIn, error) {
	if !id.Valid(id.SignIn, signIn) {
		return SignIn{}, errBrowser
	}
	s, err := tx.SignIn(ctx, signIn)
	switch {
	case fault.Is(err, fault.NotFound) || err == nil && (!browser(cookie).started(s) || s.State == Started):
		return SignIn{}, errBrowser
	case err != nil:
		return SignIn{}, err
	}
	return s, nil
}

// Answer takes the user's yes or no, once. from is the browser's address.
func (f *Flow) Answer(ctx context.Context, signIn, cookie, form, from string, accept bool) error {
	b := browser(cookie)
	return f.Store.Update(ctx, func(tx Tx) error {
		s, err := shown(ctx, tx, signIn, cookie)
		if err != nil {
			return err
		}
		if !same(form, b.form()) {
			return fault.New(fault.Forbidden, "This form is not one that Writ showed to this browser. Nothing was allowed.")
		}
		if s.State != SignedIn || s.Over(tx.Now()) {
			return errOver
		}
		kind, detail := audit.SignInDeclined, map[string]any{}
		s.State = Declined
		if accept {
			kind, detail = audit.SignInConsented, told(s)
			s.State, s.CodeHash, s.ExpiresAt = Consented, codeHash(s.ID, b.code()), tx.Now().Add(codeLife)
		}
		if err := tx.UpdateSignIn(ctx, &s); err != nil {
			return err
		}
		detail["from"] = from
		return record(ctx, tx, kind, s, detail)
	})
}
