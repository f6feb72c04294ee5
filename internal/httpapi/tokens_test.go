package httpapi_test

import (
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3filter"

	"github.com/writsec/writ/internal/dev"
)

func init() {
	openapi3filter.RegisterBodyDecoder("application/statuslist+jwt", openapi3filter.FileBodyDecoder)
}

// revokeToken asks as a service, by its secret in the form.
func revokeToken(t *testing.T, minter, token string, loose bool) answer {
	t.Helper()
	s := w.dev.Services[minter]
	return call{method: "POST", path: "/revoke", loose: loose, body: url.Values{
		"token": {token}, "token_type_hint": {"refresh_token"}, "client_id": {s.ID}, "client_secret": {s.Secret},
	}}.send(t)
}

func TestServiceRevokesToken(t *testing.T) {
	a := decide(t, alice(t), read("")).decided(t, "allow", "")
	minted := a.str("credential", "secret", "token")
	for range 2 { // what has ended is as good as revoked
		if r := revokeToken(t, "crm", minted, false); r.status != http.StatusOK || len(r.raw) != 0 {
			t.Fatalf("%d %s", r.status, r.raw)
		}
		if active(t, "crm", minted) {
			t.Error("a revoked token is active")
		}
	}
	// The agent learns it from its lease, and a retry mints nothing for it.
	l := call{method: "DELETE", path: "/leases/" + a.str("credential", "lease"), token: alice(t)}.send(t)
	if l.str("end_reason") != "revoked_by_service" {
		t.Errorf("the lease says %s", l.raw)
	}
}

func TestServicesRevokeTheirOwnOnly(t *testing.T) {
	minted := decide(t, alice(t), read("")).decided(t, "allow", "").str("credential", "secret", "token")
	for _, other := range []string{"hr", "payments"} {
		r := revokeToken(t, other, minted, true)
		r.refused(t, 400, "invalid_request", "token")
		if r.str("error") != "invalid_request" {
			t.Errorf("no error of RFC 6749 §5.2: %s", r.raw)
		}
	}
	if !active(t, "crm", minted) {
		t.Fatal("another audience's service ended it")
	}
	for name, token := range map[string]string{
		"garbage": "garbage", "the agent's own token": alice(t), "signature cut": minted[:len(minted)-4],
		"alg none": "eyJhbGciOiJub25lIn0.e30.", "long": strings.Repeat("a.", 20_000),
	} {
		if r := revokeToken(t, "crm", token, false); r.status != http.StatusOK {
			t.Errorf("%s: %s", name, r.raw)
		}
	}
	s := w.dev.Services["crm"]
	for name, c := range map[string]struct {
		header http.Header
		form   url.Values
	}{
		"nobody":            {nil, url.Values{"token": {minted}}},
		"wrong secret":      {nil, url.Values{"token": {minted}, "client_id": {s.ID}, "client_secret": {"x"}}},
		"the token itself":  {headers("Authorization", "Bearer "+minted), url.Values{"token": {minted}}},
		"the agent":         {headers("Authorization", "Bearer "+alice(t)), url.Values{"token": {minted}}},
		"an operator":       {headers("Authorization", "Bearer "+olga(t)), url.Values{"token": {minted}}},
		"both ways at once": {headers("Authorization", "Bearer "+minted), url.Values{"token": {minted}, "client_id": {s.ID}, "client_secret": {s.Secret}}},
	} {
		t.Run(name, func(t *testing.T) {
			r := call{method: "POST", path: "/revoke", header: c.header, body: c.form, loose: true}.send(t)
			r.refused(t, 401, "invalid_client", "-")
			if r.str("error") != "invalid_client" {
				t.Errorf("no error of RFC 6749 §5.2: %s", r.raw)
			}
		})
	}
	call{method: "POST", path: "/revoke", body: obj{"token": minted}, invalid: true}.send(t).refused(t, 415, "unsupported_media_type", "-")
	call{method: "POST", path: "/revoke", body: url.Values{"token": {strings.Repeat("x", 64<<10)}}}.send(t).refused(t, 413, "body_too_large", "-")
	twice := url.Values{"token": {minted, minted}, "client_id": {s.ID}, "client_secret": {s.Secret}}
	call{method: "POST", path: "/revoke", body: twice, loose: true}.send(t).refused(t, 400, "invalid_request", "token")
	if !active(t, "crm", minted) {
		t.Fatal("ended by who may not")
	}
	own := serviceToken(t, obj{"sub": dev.Gateway, "client_id": dev.Gateway})
	by := call{method: "POST", path: "/revoke", header: headers("Authorization", "Bearer "+own), body: url.Values{"token": {minted}}}.send(t)
	if by.status != http.StatusOK || active(t, "crm", minted) {
		t.Errorf("by a token of its own: %s", by.raw)
	}
}

func TestStatusLists(t *testing.T) {
	a := call{method: "GET", path: "/status/1"}.send(t)
	if a.status != http.StatusOK || a.header.Get("Content-Type") != "application/statuslist+jwt" || strings.Count(string(a.raw), ".") != 2 {
		t.Errorf("%v %s", a.header, a.raw)
	}
	for _, list := range []string{"0", "3", "01", "+1", "1e0", "-1", "1.0", "9223372036854775807", "9223372036854775808", "x", "%31%00", "1?time=1700000000"} {
		call{method: "GET", path: "/status/" + list, loose: true}.send(t).refused(t, 404, "not_found", "-")
	}
}

func TestKeySetIsNotFetchedTwice(t *testing.T) {
	const path = "/.well-known/jwks.json"
	first := call{method: "GET", path: path}.send(t)
	tag := first.header.Get("ETag")
	for name, c := range map[string]struct {
		given  string
		status int
	}{
		"the same": {tag, 304}, "weak": {"W/" + tag, 304}, "any": {"*", 304}, "among others": {`"x", ` + tag, 304},
		"another": {`"x"`, 200}, "unquoted": {strings.Trim(tag, `"`), 200}, "nothing": {"", 200},
	} {
		a := call{method: "GET", path: path, header: headers("If-None-Match", c.given)}.send(t)
		if a.status != c.status || a.header.Get("ETag") != tag || (len(a.raw) == 0) != (c.status == 304) {
			t.Errorf("%s: %d %v", name, a.status, a.header)
		}
	}
}
