package idp

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"strings"
)

// callback is where codes go; nothing listens there, since UserToken takes the
// code from the redirect itself.
const callback = "http://127.0.0.1/callback"

// UserToken signs a user in at a client, as a browser would: Authorization
// Code Flow with PKCE, state and nonce.
func (p *IdP) UserToken(ctx context.Context, user, client string) (accessToken, idToken string, err error) {
	state, nonce := rand.Text(), rand.Text()
	verifier := rand.Text() + rand.Text() // RFC 7636 wants 43 characters at least
	challenge := sha256.Sum256([]byte(verifier))

	answer, err := p.authorize(ctx, url.Values{
		"response_type":         {"code"},
		"client_id":             {client},
		"redirect_uri":          {callback},
		"scope":                 {"openid"},
		"login_hint":            {user},
		"state":                 {state},
		"nonce":                 {nonce},
		"code_challenge":        {base64.RawURLEncoding.EncodeToString(challenge[:])},
		"code_challenge_method": {"S256"},
	})
	if err != nil {
		return "", "", fmt.Errorf("sign %s in at %s: %w", user, client, err)
	}
	switch {
	case answer.Get("state") != state:
		return "", "", errors.New("the provider answered with another state")
	case answer.Get("iss") != p.Issuer:
		return "", "", fmt.Errorf("the provider answered as %q", answer.Get("iss"))
	}

	var tokens struct {
		AccessToken string `json:"access_token"`
		IDToken     string `json:"id_token"`
	}
	err = p.post(ctx, "/token", client, url.Values{
		"grant_type":    {"authorization_code"},
		"code":          {answer.Get("code")},
		"redirect_uri":  {callback},
		"code_verifier": {verifier},
	}, &tokens)
	if err != nil {
		return "", "", fmt.Errorf("redeem the code of %s at %s: %w", user, client, err)
	}
	claims, err := unverifiedClaims(tokens.IDToken)
	if err != nil {
		return "", "", err
	}
	if claims["nonce"] != nonce {
		return "", "", errors.New("the ID token has another nonce")
	}
	return tokens.AccessToken, tokens.IDToken, nil
}

// AgentToken is a client's own access token, by client credentials: its sub is
// the client.
func (p *IdP) AgentToken(ctx context.Context, client string) (string, error) {
	var tokens struct {
		AccessToken string `json:"access_token"`
	}
	err := p.post(ctx, "/token", client, url.Values{"grant_type": {"client_credentials"}}, &tokens)
	if err != nil {
		return "", fmt.Errorf("token for %s: %w", client, err)
	}
	return tokens.AccessToken, nil
}

// authorize follows the redirects of an authorization request, keeping
// cookies, to the one that leads to the callback, and returns its query.
func (p *IdP) authorize(ctx context.Context, query url.Values) (url.Values, error) {
	jar, err := cookiejar.New(nil)
	if err != nil {
		return nil, fmt.Errorf("cookie jar: %w", err)
	}
	browser := &http.Client{
		Transport:     p.client.Transport,
		Jar:           jar,
		Timeout:       p.client.Timeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	next := p.Issuer + "/auth?" + query.Encode()
	for range 10 {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, next, http.NoBody)
		if err != nil {
			return nil, fmt.Errorf("request: %w", err)
		}
		res, err := browser.Do(req)
		if err != nil {
			return nil, err
		}
		res.Body.Close()
		location, err := res.Location()
		if err != nil {
			return nil, fmt.Errorf("%s answered %d, not a redirect", req.URL.Path, res.StatusCode)
		}
		if strings.HasPrefix(location.String(), callback) {
			answer := location.Query()
			if code := answer.Get("error"); code != "" {
				return nil, &OAuthError{Status: res.StatusCode, Code: code, Description: answer.Get("error_description")}
			}
			return answer, nil
		}
		next = location.String()
	}
	return nil, errors.New("too many redirects")
}

// unverifiedClaims reads a token that came straight from the provider.
func unverifiedClaims(token string) (map[string]any, error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return nil, errors.New("not a signed token")
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return nil, fmt.Errorf("decode token: %w", err)
	}
	var claims map[string]any
	if err := json.Unmarshal(payload, &claims); err != nil {
		return nil, fmt.Errorf("decode claims: %w", err)
	}
	return claims, nil
}
