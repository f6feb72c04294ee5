package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/writsec/writ/test/idp"
)

// exchangeAt makes the CRM's credentials tokens of the provider itself.
func exchangeAt(p *idp.IdP) func(settings) {
	return with("minters.crm", map[string]any{
		"max_ttl": "5m",
		"oauth": map[string]any{
			"grant": "token_exchange", "issuer": p.Issuer, "audience": audience("crm"), "scopes": []string{"crm:read", "crm:write"},
			"client":                 map[string]any{"id": idp.Writ, "secret_file": "ciba.secret"},
			"token_ttl":              "1m",
			"revocation":             map[string]any{"takes_effect": "instant"},
			"introspection_endpoint": p.Issuer + "/token/introspection",
		},
	})
}

// activeAt asks the provider about a token, as the CRM would.
func activeAt(t *testing.T, p *idp.IdP, token string) map[string]any {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, p.Issuer+"/token/introspection", strings.NewReader(url.Values{"token": {token}}.Encode()))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.SetBasicAuth(idp.FinanceAgent, p.Clients[idp.FinanceAgent])
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	var out map[string]any
	if err := json.NewDecoder(res.Body).Decode(&out); err != nil {
		t.Fatal(err)
	}
	return out
}

func inactive(t *testing.T, p *idp.IdP, token string, d time.Duration) {
	t.Helper()
	within(t, d, func() error {
		if activeAt(t, p, token)["active"] != false {
			return fmt.Errorf("the token is active")
		}
		return nil
	})
}

// A credential of the provider's own, from the decision to its end, whatever ends it and
// whatever happens on the line.
func TestExchangedToken(t *testing.T) {
	t.Parallel()
	p := idp.Start(t, idp.Config{Exchange: &idp.Exchange{Audience: audience("crm"), Scope: "crm:read crm:write", TTL: 60}})
	w := start(t, p, exchangeAt(p))
	alice := w.as("alice", idp.SalesAgent)

	session := alice.open()
	c := alice.must(allow, "read_opportunity", readOpportunity(session)).Credential
	if c.Kind != "oauth" || c.Revocability != "instant" || c.Precision != "coarse" {
		t.Errorf("credential %+v", c)
	}
	if seen := activeAt(t, p, c.Secret.Token); seen["active"] != true || seen["sub"] != "alice" || seen["scope"] != "crm:read" || seen["aud"] != audience("crm") {
		t.Errorf("introspected %v", seen)
	}
	if r := alice.call(http.MethodDelete, "/leases/"+c.Lease, nil); r.status/100 != 2 {
		t.Errorf("release: %s", r.body)
	}
	inactive(t, p, c.Secret.Token, 10*time.Second)

	// The end of the session ends it too, as soon as the provider lets it.
	c = alice.must(allow, "read_opportunity", readOpportunity(session)).Credential
	w.spoil(idp.Fault{Endpoint: idp.RevocationEndpoint, Kind: idp.FaultStatus, Status: 503})
	w.spoil(idp.Fault{Endpoint: idp.RevocationEndpoint, Kind: idp.FaultDrop})
	if r := alice.call(http.MethodDelete, "/sessions/"+session, nil); r.status/100 != 2 {
		t.Errorf("end: %s", r.body)
	}
	inactive(t, p, c.Secret.Token, 20*time.Second)

	// An answer that is lost is no credential, and nothing is asked for twice.
	session = alice.open()
	before := w.hits(idp.TokenEndpoint)
	w.spoil(idp.Fault{Endpoint: idp.TokenEndpoint, Kind: idp.FaultLostReply})
	alice.refused(alice.call(http.MethodPost, "/decide", readOpportunity(session)), http.StatusServiceUnavailable, "mint_failed")
	if n := w.hits(idp.TokenEndpoint) - before; n != 1 {
		t.Errorf("asked %d times", n)
	}

	// A session whose user came before has no token of theirs to exchange.
	own := client{w, agentToken(t, p, idp.SalesAgent)}
	if a := own.decide(readOpportunity(session)); a.Decision != deny || a.Reasons[0].Code != "credential_subject_token" {
		t.Errorf("without the user's token: %+v", a)
	}

	secrets := []string{c.Secret.Token, p.Clients[idp.Writ]}
	for _, secret := range secrets {
		if strings.Contains(w.out.String()+w.errs.String(), secret) {
			t.Error("the log has a secret in it")
		}
	}
	w.tolerant = true // of what the faults above made of it
}
