package devidp

import (
	"net/url"
	"testing"
)

func TestAgentsOwnToken(t *testing.T) {
	p := newProvider(t)
	w := post(t, p, "/token", "sales-agent", salesSecret, url.Values{"grant_type": {grantCredentials}})
	answer := decode[tokenAnswer](t, w)
	claims := claimsOf[accessClaims](t, p, testAudience, answer.AccessToken)
	if claims.Subject != "sales-agent" || claims.ClientID != "sales-agent" || claims.Name != "" || answer.IDToken != "" {
		t.Errorf("answer %+v with claims %+v", answer, claims)
	}
}

// RFC 6749 §2.3.1 encodes both halves, so that an id may hold a colon.
func TestBasicCredentialsAreFormDecoded(t *testing.T) {
	cfg := testConfig()
	cfg.Agents = []Agent{{ID: "desk agent:7", Secret: "50% + x"}}
	p, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = p.Close() }()
	w := post(t, p, "/token", "desk agent:7", "50% + x", url.Values{"grant_type": {grantCredentials}})
	if w.Code != 200 {
		t.Errorf("answer %d %s", w.Code, w.Body)
	}
}

func TestTokenEndpointErrors(t *testing.T) {
	p := newProvider(t)
	credentials := url.Values{"grant_type": {grantCredentials}}
	with := func(more ...string) url.Values {
		f := url.Values{"grant_type": {grantCredentials}}
		for i := 0; i < len(more); i += 2 {
			f.Add(more[i], more[i+1])
		}
		return f
	}
	tests := map[string]struct {
		id, secret string
		form       url.Values
		status     int
		code       string
	}{
		"no client":         {"", "", credentials, 401, "invalid_client"},
		"unknown client":    {"stranger", salesSecret, credentials, 401, "invalid_client"},
		"wrong secret":      {"sales-agent", "guess", credentials, 401, "invalid_client"},
		"empty secret":      {"sales-agent", "", credentials, 401, "invalid_client"},
		"wrong posted":      {"", "", with("client_id", "sales-agent", "client_secret", "guess"), 401, "invalid_client"},
		"two ways":          {"sales-agent", salesSecret, with("client_secret", salesSecret), 400, "invalid_request"},
		"two clients":       {"sales-agent", salesSecret, with("client_id", "hr-agent"), 400, "invalid_request"},
		"a parameter twice": {"sales-agent", salesSecret, with("grant_type", grantCode), 400, "invalid_request"},
		"no grant":          {"sales-agent", salesSecret, nil, 400, "invalid_request"},
		"unknown grant":     {"sales-agent", salesSecret, url.Values{"grant_type": {"password"}}, 400, "unsupported_grant_type"},
		"Writ as agent":     {"writ", writSecret, credentials, 400, "unauthorized_client"},
		"agent polls":       {"sales-agent", salesSecret, url.Values{"grant_type": {grantCIBA}}, 400, "unauthorized_client"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			w := post(t, p, "/token", tt.id, tt.secret, tt.form)
			wantError(t, w, tt.status, tt.code)
			if challenged := w.Header().Get("WWW-Authenticate") != ""; challenged != (tt.status == 401) {
				t.Errorf("%d with challenge: %v", tt.status, challenged)
			}
		})
	}
	if w := post(t, p, "/token", "", "", with("client_id", "sales-agent", "client_secret", salesSecret)); w.Code != 200 {
		t.Errorf("client_secret_post: %d %s", w.Code, w.Body)
	}
}

func TestRevocation(t *testing.T) {
	p := newProvider(t)
	if w := post(t, p, "/revoke", "writ", writSecret, url.Values{"token": {"anything"}}); w.Code != 200 || w.Body.Len() != 0 {
		t.Errorf("answer %d %q, want an empty 200", w.Code, w.Body)
	}
	wantError(t, post(t, p, "/revoke", "writ", writSecret, nil), 400, "invalid_request")
	wantError(t, post(t, p, "/revoke", "writ", "guess", url.Values{"token": {"x"}}), 401, "invalid_client")
}
