package devidp

import (
	"net/http"
	"strings"
	"testing"
	"time"
)

func TestDevToken(t *testing.T) {
	p := newProvider(t)
	token := func(query string) string {
		t.Helper()
		w := get(t, p, "/dev/token?"+query)
		if w.Code != http.StatusOK || strings.TrimSpace(w.Body.String()) != w.Body.String() {
			t.Fatalf("%s: %d %q", query, w.Code, w.Body)
		}
		return w.Body.String()
	}
	lifetime := func(r registered) time.Duration { return time.Duration(r.Expiry-r.IssuedAt) * time.Second }

	access := claimsOf[accessClaims](t, p, testAudience, token("user=alice&agent=sales-agent"))
	if access.Subject != "alice" || access.ClientID != "sales-agent" || access.Actor != nil ||
		access.Email != "alice@example.com" || lifetime(access.registered) != tokenLifetime {
		t.Errorf("access token %+v", access)
	}

	acted := claimsOf[accessClaims](t, p, testAudience, token("user=bob&agent=hr-agent&act=true&kind=access&ttl=90s"))
	if acted.Subject != "bob" || acted.Actor == nil || acted.Actor.Subject != "hr-agent" ||
		lifetime(acted.registered) != 90*time.Second {
		t.Errorf("access token with act %+v", acted)
	}

	raw := token("user=carol&agent=finance-agent&kind=id")
	if id := claimsOf[idClaims](t, p, "finance-agent", raw); id.Subject != "carol" || typeOf(t, raw) != "JWT" {
		t.Errorf("ID token %+v", id)
	}

	own := claimsOf[accessClaims](t, p, testAudience, token("agent=sales-agent&kind=agent"))
	if own.Subject != "sales-agent" || own.Groups != nil {
		t.Errorf("agent's own token %+v", own)
	}
}

func TestAccessToken(t *testing.T) {
	p := newProvider(t)
	token, err := p.AccessToken("alice", "sales-agent", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	claims := claimsOf[accessClaims](t, p, testAudience, token)
	if claims.Subject != "alice" || claims.Expiry-claims.IssuedAt != 3600 {
		t.Errorf("claims %+v", claims)
	}
	if _, err := p.AccessToken("mallory", "sales-agent", time.Hour); err == nil {
		t.Error("a token for an unknown user")
	}
}

func TestDevTokenErrors(t *testing.T) {
	p := newProvider(t)
	for query, want := range map[string]string{
		"":                                      "known: sales-agent, hr-agent, finance-agent",
		"user=alice&agent=writ":                 "known: sales-agent, hr-agent, finance-agent",
		"user=mallory&agent=sales-agent":        `unknown user "mallory"; known: alice, bob, carol`,
		"user=sales-agent&agent=sales-agent":    "known: alice, bob, carol",
		"user=alice&agent=sales-agent&kind=x":   "known: access, id, agent",
		"user=alice&agent=sales-agent&ttl=x":    "ttl:",
		"user=alice&agent=sales-agent&ttl=-5m":  "not between",
		"user=alice&agent=sales-agent&ttl=100h": "not between",
	} {
		w := get(t, p, "/dev/token?"+query)
		if w.Code != http.StatusBadRequest || !strings.Contains(w.Body.String(), want) {
			t.Errorf("%q: %d %q, want 400 with %q", query, w.Code, w.Body, want)
		}
	}
}
