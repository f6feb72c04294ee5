package devidp

import (
	"crypto/sha256"
	"encoding/base64"
	"net/http"
	"net/url"
	"regexp"
	"time"
)

// tokenAnswer is a successful answer of the token endpoint (RFC 6749 §5.1,
// OpenID Connect Core §3.1.3.3).
type tokenAnswer struct {
	AccessToken string `json:"access_token"`
	TokenType   string `json:"token_type"`
	ExpiresIn   int64  `json:"expires_in"`
	Scope       string `json:"scope,omitempty"`
	IDToken     string `json:"id_token,omitempty"`
}

func (p *Provider) token(r *http.Request) (any, error) {
	c, form, err := p.clientForm(r)
	if err != nil {
		return nil, err
	}
	grant := form.Get("grant_type")
	redeem := map[string]func(client, url.Values) (*tokenAnswer, error){
		grantCode:        p.redeemCode,
		grantCredentials: p.redeemCredentials,
		grantCIBA:        p.redeemPrompt,
	}[grant]
	switch {
	case grant == "":
		return nil, badRequest("invalid_request", "grant_type is missing")
	case redeem == nil:
		return nil, badRequest("unsupported_grant_type", "")
	case !c.may(grant):
		return nil, badRequest("unauthorized_client", "this client may not use this grant")
	}
	return redeem(c, form)
}

var errInvalidCode = badRequest("invalid_grant", "the code is unknown, used, expired or not for this request")

func (p *Provider) redeemCode(c client, form url.Values) (*tokenAnswer, error) {
	g, ok := p.state.takeCode(form.Get("code"))
	if !ok || g.clientID != c.ID || g.redirectURI != form.Get("redirect_uri") ||
		!verifies(form.Get("code_verifier"), g.challenge) {
		return nil, errInvalidCode
	}
	claims := idClaims{
		profile:  profileOf(g.user),
		AuthTime: g.authTime.Unix(),
		ACR:      g.acr,
		Nonce:    g.nonce,
	}
	return p.issue(c, g.user, g.scope, claims)
}

// redeemCredentials gives an agent a token that speaks for itself: its sub is
// the client (RFC 9068 §2.2).
func (p *Provider) redeemCredentials(c client, _ url.Values) (*tokenAnswer, error) {
	access, err := p.agentToken(c, tokenLifetime)
	if err != nil {
		return nil, err
	}
	return newTokenAnswer(access, ""), nil
}

// issue signs a user's tokens for c: the access token, and the ID token if the
// scope has openid. The claims say how the user was authenticated.
func (p *Provider) issue(c client, u User, scope string, claims idClaims) (*tokenAnswer, error) {
	access, err := p.userToken(c, u, scope, tokenLifetime, nil)
	if err != nil {
		return nil, err
	}
	answer := newTokenAnswer(access, scope)
	if !hasScope(scope, "openid") {
		return answer, nil
	}
	claims.Subject, claims.Audience = u.ID, c.ID
	claims.AccessTokenHash = accessTokenHash(access)
	answer.IDToken, err = p.tokens.signID(claims, tokenLifetime)
	return answer, err
}

func newTokenAnswer(access, scope string) *tokenAnswer {
	return &tokenAnswer{
		AccessToken: access,
		TokenType:   "Bearer",
		ExpiresIn:   int64(tokenLifetime / time.Second),
		Scope:       scope,
	}
}

func (p *Provider) userToken(c client, u User, scope string, lifetime time.Duration, act *actor) (string, error) {
	return p.tokens.signAccess(accessClaims{
		registered: registered{Subject: u.ID, Audience: c.audience},
		profile:    profileOf(u),
		ClientID:   c.ID,
		Scope:      scope,
		Actor:      act,
	}, lifetime)
}

func (p *Provider) agentToken(c client, lifetime time.Duration) (string, error) {
	return p.tokens.signAccess(accessClaims{
		registered: registered{Subject: c.ID, Audience: c.audience},
		ClientID:   c.ID,
	}, lifetime)
}

// codeVerifier is RFC 7636 §4.1.
var codeVerifier = regexp.MustCompile(`^[A-Za-z0-9._~-]{43,128}$`)

func verifies(verifier, challenge string) bool {
	sum := sha256.Sum256([]byte(verifier))
	return codeVerifier.MatchString(verifier) &&
		sameSecret(base64.RawURLEncoding.EncodeToString(sum[:]), challenge)
}

// revoke answers as RFC 7009 §2.2 wants for tokens that are no longer good for
// anything here. That is all of them: no endpoint of this provider takes a token
// back, and who verifies a signed one elsewhere never asks.
func (p *Provider) revoke(r *http.Request) (any, error) {
	_, form, err := p.clientForm(r)
	if err != nil {
		return nil, err
	}
	if form.Get("token") == "" {
		return nil, badRequest("invalid_request", "token is missing")
	}
	p.log.DebugContext(r.Context(), "token revoked")
	return nil, nil
}
