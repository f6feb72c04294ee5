package devidp

import (
	"context"
	"errors"
	"html"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"
	"golang.org/x/oauth2"
)

const testRedirect = "http://127.0.0.1:49152/callback"

func TestCodeFlow(t *testing.T) {
	p, browser := serve(t)
	ctx := oidc.ClientContext(t.Context(), browser)
	provider, err := oidc.NewProvider(ctx, p.Issuer())
	if err != nil {
		t.Fatal(err)
	}
	conf := oauth2.Config{
		ClientID:     "sales-agent",
		ClientSecret: salesSecret,
		Endpoint:     provider.Endpoint(),
		RedirectURL:  testRedirect,
		Scopes:       []string{"openid", "profile", "unheard-of"},
	}
	verifier := oauth2.GenerateVerifier()
	start := conf.AuthCodeURL("the state", oidc.Nonce("the nonce"), oauth2.S256ChallengeOption(verifier))

	back := pick(t, browser, start, "alice")
	if got, want := back.Host+back.Path, "127.0.0.1:49152/callback"; got != want {
		t.Errorf("sent back to %s, want %s", got, want)
	}
	q := back.Query()
	if q.Get("state") != "the state" || q.Get("iss") != p.Issuer() {
		t.Errorf("answer %v lacks state or iss", q)
	}
	token, err := conf.Exchange(ctx, q.Get("code"), oauth2.VerifierOption(verifier))
	if err != nil {
		t.Fatal(err)
	}

	rawID, _ := token.Extra("id_token").(string)
	id, err := provider.VerifierContext(ctx, &oidc.Config{ClientID: "sales-agent"}).Verify(ctx, rawID)
	if err != nil {
		t.Fatal(err)
	}
	if err := id.VerifyAccessToken(token.AccessToken); err != nil {
		t.Error(err)
	}
	if id.Subject != "alice" || id.Nonce != "the nonce" {
		t.Errorf("ID token for %s with nonce %q", id.Subject, id.Nonce)
	}
	if typ := typeOf(t, rawID); typ != "JWT" {
		t.Errorf("ID token has typ %s", typ)
	}

	access, err := provider.VerifierContext(ctx, &oidc.Config{ClientID: testAudience}).Verify(ctx, token.AccessToken)
	if err != nil {
		t.Fatal(err)
	}
	var claims accessClaims
	if err := access.Claims(&claims); err != nil {
		t.Fatal(err)
	}
	if typ := typeOf(t, token.AccessToken); typ != "at+jwt" {
		t.Errorf("access token has typ %s", typ)
	}
	if claims.Subject != "alice" || claims.ClientID != "sales-agent" || claims.ID == "" || claims.Actor != nil ||
		claims.Scope != "openid profile" || len(claims.Groups) != 1 || claims.Groups[0] != "sales" {
		t.Errorf("access token %+v", claims)
	}

	if _, err := conf.Exchange(ctx, q.Get("code"), oauth2.VerifierOption(verifier)); !isGrantError(err) {
		t.Errorf("a second use of the code: %v", err)
	}
}

func isGrantError(err error) bool {
	refusal, ok := errors.AsType[*oauth2.RetrieveError](err)
	return ok && refusal.ErrorCode == "invalid_grant"
}

// pick plays the person at the sign-in page and returns where it leads.
func pick(t *testing.T, browser *http.Client, start, user string) *url.URL {
	t.Helper()
	res, err := browser.Get(start)
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(res.Body)
	_ = res.Body.Close()
	action, err := res.Request.URL.Parse(formField(t, string(body), `action="([^"]*)"`))
	if err != nil {
		t.Fatal(err)
	}
	res, err = browser.PostForm(action.String(), url.Values{
		"user": {user},
		"csrf": {formField(t, string(body), `name="csrf" value="([^"]*)"`)},
	})
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	if res.StatusCode != http.StatusSeeOther {
		t.Fatalf("sign-in answers %s", res.Status)
	}
	back, err := res.Location()
	if err != nil {
		t.Fatal(err)
	}
	return back
}

func formField(t *testing.T, page, pattern string) string {
	t.Helper()
	m := regexp.MustCompile(pattern).FindStringSubmatch(page)
	if m == nil {
		t.Fatalf("no %s in page %q", pattern, page)
	}
	return html.UnescapeString(m[1])
}

func typeOf(t *testing.T, token string) string {
	t.Helper()
	jws, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		t.Fatal(err)
	}
	typ, _ := jws.Signatures[0].Protected.ExtraHeaders[jose.HeaderType].(string)
	return typ
}

// claimsOf verifies a token as go-oidc does and returns its claims.
func claimsOf[T any](t *testing.T, p *Provider, audience, token string) T {
	t.Helper()
	keys := &oidc.StaticKeySet{}
	for _, k := range p.tokens.keys.Keys {
		keys.PublicKeys = append(keys.PublicKeys, k.Key)
	}
	verifier := oidc.NewVerifier(p.Issuer(), keys, &oidc.Config{
		ClientID: audience, SupportedSigningAlgs: []string{oidc.ES256},
	})
	verified, err := verifier.Verify(context.Background(), token)
	if err != nil {
		t.Fatal(err)
	}
	var claims T
	if err := verified.Claims(&claims); err != nil {
		t.Fatal(err)
	}
	return claims
}

// goodCode is a fresh code, and a form that redeems it for sales-agent.
func goodCode(t *testing.T, p *Provider) url.Values {
	t.Helper()
	verifier := oauth2.GenerateVerifier()
	code, err := p.state.addCode(codeGrant{
		clientID:    "sales-agent",
		user:        p.users[0],
		redirectURI: testRedirect,
		scope:       "openid",
		challenge:   oauth2.S256ChallengeFromVerifier(verifier),
		authTime:    time.Now(),
	})
	if err != nil {
		t.Fatal(err)
	}
	return url.Values{
		"grant_type":    {grantCode},
		"code":          {code},
		"redirect_uri":  {testRedirect},
		"code_verifier": {verifier},
	}
}

func TestCodeIsRefused(t *testing.T) {
	p := newProvider(t)
	hr, _ := p.Client("hr-agent")
	tests := map[string]struct {
		change     func(url.Values)
		id, secret string
	}{
		"wrong verifier":     {func(f url.Values) { f.Set("code_verifier", oauth2.GenerateVerifier()) }, "sales-agent", salesSecret},
		"no verifier":        {func(f url.Values) { f.Del("code_verifier") }, "sales-agent", salesSecret},
		"other redirect URI": {func(f url.Values) { f.Set("redirect_uri", "http://127.0.0.1/callback") }, "sales-agent", salesSecret},
		"unknown code":       {func(f url.Values) { f.Set("code", "x") }, "sales-agent", salesSecret},
		"other client":       {func(url.Values) {}, hr.ID, hr.Secret},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			good := goodCode(t, p)
			bad, _ := url.ParseQuery(good.Encode())
			tt.change(bad)
			wantError(t, post(t, p, "/token", tt.id, tt.secret, bad), http.StatusBadRequest, "invalid_grant")

			// A code that was shown wrongly is spent; an unknown one spends nothing.
			w := post(t, p, "/token", "sales-agent", salesSecret, good)
			if bad.Get("code") != good.Get("code") {
				if w.Code != http.StatusOK {
					t.Errorf("the good code: %d %s", w.Code, w.Body)
				}
				return
			}
			wantError(t, w, http.StatusBadRequest, "invalid_grant")
		})
	}
}

func TestIDTokenOnlyForOpenID(t *testing.T) {
	p := newProvider(t)
	withOpenID := goodCode(t, p)
	without := goodCode(t, p)
	g := p.state.codes[without.Get("code")]
	g.scope = "profile"
	p.state.codes[without.Get("code")] = g

	for _, tt := range []struct {
		form url.Values
		want bool
	}{{withOpenID, true}, {without, false}} {
		answer := decode[tokenAnswer](t, post(t, p, "/token", "sales-agent", salesSecret, tt.form))
		if got := answer.IDToken != ""; got != tt.want || answer.AccessToken == "" {
			t.Errorf("scope %q: ID token %v, want %v", answer.Scope, got, tt.want)
		}
	}
}

func TestCodeExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProvider(t)
		inTime, late := goodCode(t, p), goodCode(t, p)
		time.Sleep(codeLifetime - time.Millisecond)
		if w := post(t, p, "/token", "sales-agent", salesSecret, inTime); w.Code != http.StatusOK {
			t.Errorf("in time: %d %s", w.Code, w.Body)
		}
		time.Sleep(time.Millisecond)
		wantError(t, post(t, p, "/token", "sales-agent", salesSecret, late), http.StatusBadRequest, "invalid_grant")
	})
}

func TestCodesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProvider(t)
		for range maxCodes {
			goodCode(t, p)
		}
		if _, err := p.state.addCode(codeGrant{authTime: time.Now()}); !errors.Is(err, errBusy) {
			t.Errorf("one code too many: %v, want %v", err, errBusy)
		}
		time.Sleep(codeLifetime)
		goodCode(t, p)
		if n := len(p.state.codes); n != 1 {
			t.Errorf("%d codes kept, want the fresh one alone", n)
		}
	})
}
