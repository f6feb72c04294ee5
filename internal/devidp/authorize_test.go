package devidp

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"golang.org/x/oauth2"
)

// goodRequest is the query of an authorization request that is served.
func goodRequest() url.Values {
	return url.Values{
		"client_id":             {"sales-agent"},
		"redirect_uri":          {testRedirect},
		"response_type":         {"code"},
		"scope":                 {"openid"},
		"state":                 {"xyz"},
		"code_challenge":        {oauth2.S256ChallengeFromVerifier(oauth2.GenerateVerifier())},
		"code_challenge_method": {"S256"},
	}
}

func TestUntrustedRedirectsAreNotFollowed(t *testing.T) {
	p := newProvider(t)
	tests := map[string]string{
		"http://127.0.0.1:1/callback":             "",
		"http://localhost:65535/callback":         "",
		"http://[::1]/callback":                   "",
		"http://127.0.0.1:1/callback/":            "redirect",
		"http://127.0.0.1:1/callback?x=1":         "redirect",
		"http://127.0.0.1:1/callback#f":           "redirect",
		"http://127.0.0.1:1/other":                "redirect",
		"http://127.0.0.2:1/callback":             "redirect",
		"http://user@127.0.0.1:1/callback":        "redirect",
		"https://127.0.0.1:1/callback":            "redirect",
		"http://127.0.0.1.example.com:1/callback": "redirect",
		"http://127.0.0.1:1@example.com/callback": "redirect",
		"": "redirect",
	}
	for uri, want := range tests {
		q := goodRequest()
		q.Set("redirect_uri", uri)
		w := get(t, p, "/authorize?"+q.Encode())
		if want == "" && w.Code != http.StatusOK {
			t.Errorf("%s: %d", uri, w.Code)
		}
		if want != "" && (w.Code != http.StatusBadRequest || !strings.Contains(w.Body.String(), want)) {
			t.Errorf("%s: %d %s", uri, w.Code, w.Body)
		}
	}

	q := goodRequest()
	q.Set("client_id", "stranger")
	if w := get(t, p, "/authorize?"+q.Encode()); w.Code != http.StatusBadRequest {
		t.Errorf("unknown client: %d", w.Code)
	}
}

// Only http on loopback may vary its port; elsewhere another port is another party.
func TestPortsOfOtherRedirectsAreExact(t *testing.T) {
	c := client{Client: Client{RedirectURIs: []string{"https://127.0.0.1/cb", "http://app.example/cb"}}}
	for uri, want := range map[string]bool{
		"https://127.0.0.1/cb":       true,
		"https://127.0.0.1:8443/cb":  false,
		"http://app.example/cb":      true,
		"http://app.example:8080/cb": false,
	} {
		if _, got := c.redirectURI(uri); got != want {
			t.Errorf("%s: %v, want %v", uri, got, want)
		}
	}
}

func TestAuthorizationErrorsGoToTheClient(t *testing.T) {
	p := newProvider(t)
	tests := map[string]struct {
		change func(url.Values)
		want   string
	}{
		"no PKCE":        {func(q url.Values) { q.Del("code_challenge"); q.Del("code_challenge_method") }, "invalid_request"},
		"plain PKCE":     {func(q url.Values) { q.Set("code_challenge_method", "plain") }, "invalid_request"},
		"implied plain":  {func(q url.Values) { q.Del("code_challenge_method") }, "invalid_request"},
		"short PKCE":     {func(q url.Values) { q.Set("code_challenge", "abc") }, "invalid_request"},
		"implicit":       {func(q url.Values) { q.Set("response_type", "id_token token") }, "unsupported_response_type"},
		"form_post":      {func(q url.Values) { q.Set("response_mode", "form_post") }, "invalid_request"},
		"silent":         {func(q url.Values) { q.Set("prompt", "none") }, "login_required"},
		"request object": {func(q url.Values) { q.Set("request", "e30.e30.") }, "request_not_supported"},
		"request URI":    {func(q url.Values) { q.Set("request_uri", "urn:x") }, "request_uri_not_supported"},
		"twice":          {func(q url.Values) { q.Add("scope", "email") }, "invalid_request"},
	}
	for name, tt := range tests {
		q := goodRequest()
		tt.change(q)
		w := get(t, p, "/authorize?"+q.Encode())
		back, err := url.Parse(w.Header().Get("Location"))
		if err != nil || w.Code != http.StatusSeeOther || back.Host != "127.0.0.1:49152" {
			t.Errorf("%s: %d to %s", name, w.Code, back)
			continue
		}
		if got := back.Query(); got.Get("error") != tt.want || got.Get("iss") != p.Issuer() || got.Get("state") != "xyz" {
			t.Errorf("%s: %v, want error %s with iss and state", name, got, tt.want)
		}
	}
}

func TestSignInPage(t *testing.T) {
	p := newProvider(t)
	query := goodRequest().Encode()
	w := get(t, p, "/authorize?"+query)
	for _, want := range []string{"sales-agent", "Alice Archer", "Bob Baker", "Carol Cole"} {
		if !strings.Contains(w.Body.String(), want) {
			t.Errorf("page lacks %q", want)
		}
	}
	wantCSP := "default-src 'none'; style-src 'self'; form-action 'self' http://127.0.0.1:49152; " +
		"frame-ancestors 'none'; base-uri 'none'"
	if got := w.Header().Get("Content-Security-Policy"); got != wantCSP {
		t.Errorf("CSP %q, want %q", got, wantCSP)
	}

	csrf := formField(t, w.Body.String(), `name="csrf" value="([^"]*)"`)
	send := func(csrf, user string, cookies ...*http.Cookie) *httptest.ResponseRecorder {
		form := url.Values{"csrf": {csrf}, "user": {user}}
		r := httptest.NewRequest(http.MethodPost, p.Issuer()+"/authorize?"+query, strings.NewReader(form.Encode()))
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		for _, c := range cookies {
			r.AddCookie(c)
		}
		w := httptest.NewRecorder()
		p.ServeHTTP(w, r)
		return w
	}
	cookie := w.Result().Cookies()[0]
	if got := send(csrf, "alice"); got.Code != http.StatusForbidden {
		t.Errorf("without the cookie: %d", got.Code)
	}
	if got := send("", "alice", cookie); got.Code != http.StatusForbidden {
		t.Errorf("without the token: %d", got.Code)
	}
	if got := send(csrf, "", cookie); !strings.Contains(got.Header().Get("Location"), "error=access_denied") {
		t.Errorf("cancel: %d to %s", got.Code, got.Header().Get("Location"))
	}
	if got := send(csrf, "bob", cookie); !strings.Contains(got.Header().Get("Location"), "code=") {
		t.Errorf("pick: %d to %s", got.Code, got.Header().Get("Location"))
	}
}
