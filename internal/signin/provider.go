package signin

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"sync/atomic"
	"time"

	"golang.org/x/oauth2"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
)

// Provider makes Writ a client of one identity provider.
type Provider struct {
	Issuer       string
	ClientID     string
	ClientSecret string
	// AuthInBody sends the client's credentials as client_secret_post, not _basic.
	AuthInBody bool
	Scopes     []string
	HTTP       *http.Client // made by identity.NewHTTPClient
	Verifier   *identity.Verifier

	known atomic.Pointer[metadata]
}

// metadata is what is needed of OpenID Connect Discovery §3 and RFC 9207 §3.
type metadata struct {
	Authorization string `json:"authorization_endpoint"`
	Token         string `json:"token_endpoint"`
	NamesItself   bool   `json:"authorization_response_iss_parameter_supported"`

	until time.Time
}

// metadataAge is how long metadata are believed without a second look.
const metadataAge = 10 * time.Minute

func (p *Provider) discover(ctx context.Context) (metadata, error) {
	if m := p.known.Load(); m != nil && time.Now().Before(m.until) {
		return *m, nil
	}
	var m metadata
	if err := identity.Discover(ctx, p.HTTP, p.Issuer, &m); err != nil {
		return m, fault.Wrap(fault.Unavailable, err, "The identity provider cannot be reached. Try again in a moment.")
	}
	for name, endpoint := range map[string]string{"authorization_endpoint": m.Authorization, "token_endpoint": m.Token} {
		if u, err := url.Parse(endpoint); err != nil || u.Host == "" || !identity.Trustworthy(p.Issuer, endpoint) {
			return m, fmt.Errorf("discover: the metadata of %s name no https %s", p.Issuer, name)
		}
	}
	m.until = time.Now().Add(metadataAge)
	p.known.Store(&m)
	return m, nil
}

func (p *Provider) client(m metadata, redirect string) *oauth2.Config {
	style := oauth2.AuthStyleInHeader
	if p.AuthInBody {
		style = oauth2.AuthStyleInParams
	}
	return &oauth2.Config{
		ClientID: p.ClientID, ClientSecret: p.ClientSecret, RedirectURL: redirect, Scopes: p.Scopes,
		Endpoint: oauth2.Endpoint{AuthURL: m.Authorization, TokenURL: m.Token, AuthStyle: style},
	}
}

// authorize is where a browser is sent (OpenID Connect Core §3.1.2.1, RFC 7636 §4.3).
func (p *Provider) authorize(ctx context.Context, redirect string, b browser) (string, error) {
	m, err := p.discover(ctx)
	if err != nil {
		return "", err
	}
	return p.client(m, redirect).AuthCodeURL(b.state(), oauth2.S256ChallengeOption(b.verifier()),
		oauth2.SetAuthURLParam("nonce", b.nonce())), nil
}

// errAnswer is an answer of the provider that is not believed, or no yes.
func errAnswer(err error) error {
	return fault.Wrap(fault.Forbidden, err,
		"The identity provider's answer was not accepted, and nothing was allowed. You can start again with the link that you were given.")
}

// answered checks who answers before anything that it says is used: a code must never
// go to another provider than the one that gave it (RFC 9207 §2.4, mix-up).
func (p *Provider) answered(ctx context.Context, iss string, named bool) error {
	m, err := p.discover(ctx)
	if err != nil {
		return err
	}
	switch {
	case named && iss != p.Issuer:
		return errAnswer(errors.New("iss names another provider than the one that was asked"))
	case !named && m.NamesItself:
		return errAnswer(errors.New("iss is missing, though the provider's metadata promise it"))
	}
	return nil
}

// redeem turns a code into the user who signed in.
func (p *Provider) redeem(ctx context.Context, redirect, code string, b browser) (user identity.Principal, err error) {
	m, err := p.discover(ctx)
	if err != nil {
		return user, err
	}
	ctx = context.WithValue(ctx, oauth2.HTTPClient, p.HTTP)
	t, err := p.client(m, redirect).Exchange(ctx, code, oauth2.VerifierOption(b.verifier()))
	if refusal, ok := errors.AsType[*oauth2.RetrieveError](err); ok {
		if status := refusal.Response.StatusCode; status >= 500 || status == http.StatusTooManyRequests {
			return user, fault.Wrap(fault.Unavailable, fmt.Errorf("the token endpoint answered with status %d", status), unfinished)
		}
		return user, errAnswer(fmt.Errorf("the token endpoint answered with status %d, error %.64q", refusal.Response.StatusCode, refusal.ErrorCode))
	}
	if err != nil {
		return user, fault.Wrap(fault.Unavailable, scrub(err), unfinished)
	}
	raw, _ := t.Extra("id_token").(string)
	claims, err := p.Verifier.IDToken(ctx, p.Issuer, p.ClientID, raw)
	if errors.Is(err, identity.ErrKeysUnavailable) {
		return user, fault.Wrap(fault.Unavailable, err, unfinished)
	}
	if err != nil {
		return user, errAnswer(fmt.Errorf("the ID token %w", err))
	}
	if nonce, _ := claims["nonce"].(string); !same(nonce, b.nonce()) {
		return user, errAnswer(errors.New("the ID token is of another request: its nonce differs"))
	}
	if h, present := claims["at_hash"]; present && !identity.AccessTokenHashed(raw, t.AccessToken, h) {
		return user, errAnswer(errors.New("at_hash does not fit the access token"))
	}
	sub := p.Verifier.Subject(p.Issuer, claims)
	if sub == "" {
		return user, errAnswer(errors.New("the ID token lacks the claim that the issuer's profile knows its users by"))
	}
	if sub == p.ClientID {
		return user, errAnswer(errors.New("the ID token names no user: its sub is the client"))
	}
	for _, name := range []string{"nonce", "at_hash", "c_hash"} { // of the protocol, not of the user
		delete(claims, name)
	}
	return identity.Principal{Ref: identity.Ref{Issuer: p.Issuer, ID: sub}, Claims: claims}, nil
}

const unfinished = "The identity provider could not complete the sign-in. Nothing was allowed. You can start again with the link that you were given."

// scrub drops the request that an error of the HTTP client repeats, and what a
// provider sent in place of an answer.
func scrub(err error) error {
	if u, ok := errors.AsType[*url.Error](err); ok {
		return fmt.Errorf("call the token endpoint: %w", u.Err)
	}
	return errors.New("the token endpoint's answer is no token response")
}
