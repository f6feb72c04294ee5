package config_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/writsec/writ/internal/config"
)

func privateKey(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

const (
	exchanger = `
  x:
    max_ttl: 10m
    oauth:
      grant: token_exchange
      issuer: https://idp.example
      client:
        id: writ
        secret_file: secret
      token_ttl: 5m
      revocation:
        takes_effect: instant
`
	asserter = `
  x:
    max_ttl: 10m
    oauth:
      grant: jwt_bearer
      token_endpoint: https://target.example/token
      client:
        auth: none
      assertion:
        subject: "{agent}"
        audience: https://target.example
      token_ttl: 5m
`
)

func withMinter(minter string) string {
	return strings.Replace(good, "\nservices:", minter+"services:", 1)
}

func TestOAuthDefaults(t *testing.T) {
	dir := folder(t)
	cfg, msg := load(t, dir, withMinter(exchanger))
	if msg != "" {
		t.Fatal(msg)
	}
	want := &config.OAuth{
		Grant: "token_exchange", Issuer: "https://idp.example", Encoding: "form", Timeout: 5 * time.Second, TokenTTL: 5 * time.Minute,
		SubjectTokenType: "urn:ietf:params:oauth:token-type:access_token",
		Client:           config.OAuthClient{ID: "writ", Auth: "client_secret_basic", SecretFile: filepath.Join(dir, "secret")},
		Revocation:       &config.OAuthRevocation{TakesEffect: "instant"},
	}
	if d := cmp.Diff(want, cfg.Minters["x"].OAuth); d != "" {
		t.Error(d)
	}
	cfg, msg = load(t, dir, withMinter(asserter))
	if msg != "" {
		t.Fatal(msg)
	}
	assertion := &config.OAuthAssertion{Issuer: "https://writ.example", Subject: "{agent}", Audience: "https://target.example", TTL: time.Minute}
	if d := cmp.Diff(assertion, cfg.Minters["x"].OAuth.Assertion); d != "" {
		t.Error(d)
	}
}

// Each rule, by its whole message but for file and line.
func TestOAuthErrors(t *testing.T) {
	dir := folder(t)
	if err := os.WriteFile(filepath.Join(dir, "good-key.pem"), []byte(privateKey(t)), 0o600); err != nil {
		t.Fatal(err)
	}
	const client = "      client:\n        id: writ\n        secret_file: secret\n"
	for _, tt := range []struct{ name, base, old, new, want string }{
		{"kind beside", exchanger, "    oauth:", "    kind: jwt\n    oauth:", "kind: unknown key, expected one of: jwt, max_active, max_ttl, oauth, postgres"},
		{"scopes beside", exchanger, "    oauth:", "    scopes: [a]\n    oauth:", "scopes: unknown key, expected one of: jwt, max_active, max_ttl, oauth, postgres"},
		{"no grant", exchanger, "      grant: token_exchange\n", "", "oauth.grant: is missing, expected one of token_exchange, jwt_bearer"},
		{"unknown encoding", exchanger, "      grant", "      encoding: xml\n      grant", `oauth.encoding: is "xml", expected one of form, json`},
		{"too long a timeout", exchanger, "      grant", "      timeout: 11s\n      grant", "oauth.timeout: is 11s, expected at most 10s, within which a credential has to be made"},
		{"unknown issuer", exchanger, "issuer: https://idp.example", "issuer: https://other.example", `oauth.issuer: is "https://other.example", expected one of issuers that speaks for user`},
		{"no issuer", exchanger, "      issuer: https://idp.example\n", "      token_endpoint: https://idp.example/token\n", "oauth.issuer: is missing: whose users' tokens are exchanged? A token goes to nobody but its issuer\noauth.revocation.endpoint: is missing, and there is no issuer to find it by"},
		{"endpoint in clear", asserter, "https://target.example/token", "http://target.example/token", `oauth.token_endpoint: is "http://target.example/token", expected https: plain http is for loopback only`},
		{"no endpoint", asserter, "      token_endpoint: https://target.example/token\n", "", "oauth.token_endpoint: is missing, and there is no issuer to find it by"},
		{"revocation in clear", exchanger, "takes_effect: instant", "takes_effect: instant\n        endpoint: http://idp.example/r", `oauth.revocation.endpoint: is "http://idp.example/r", expected https: plain http is for loopback only`},
		{"introspection in clear", exchanger, "      grant", "      introspection_endpoint: http://idp.example/i\n      grant", `oauth.introspection_endpoint: is "http://idp.example/i", expected https: plain http is for loopback only`},
		{"no effect of revocation", exchanger, "takes_effect: instant", "takes_effect: soon", `oauth.revocation.takes_effect: is "soon", expected one of instant, introspect, expiry`},
		{"introspection of what is not revoked", asserter, "      grant", "      introspection_endpoint: https://target.example/i\n      grant", "oauth.introspection_endpoint: has no effect without revocation"},
		{"no client", exchanger, client, "", "oauth.client.id: is missing\noauth.client.secret_file: is missing"},
		{"secret without use", exchanger, "id: writ", "id: writ\n        auth: none", "oauth.client.secret_file: has no effect: auth is none"},
		{"key without use", exchanger, "id: writ", "id: writ\n        key_file: good-key.pem", "oauth.client.key_file: has no effect: auth is client_secret_basic"},
		{"audience without use", exchanger, "id: writ", "id: writ\n        audience: x", "oauth.client.audience: has no effect: auth is client_secret_basic"},
		{"a client's proof for Writ", exchanger, "        secret_file: secret", "        auth: private_key_jwt\n        audience: https://writ.example/", "oauth.client.audience: takes tokens of Writ's, for one of which an assertion could pass"},
		{"a client's proof for a minter's audience", exchanger, "        secret_file: secret", "        auth: private_key_jwt\n        audience: https://crm.example", "oauth.client.audience: takes tokens of Writ's, for one of which an assertion could pass"},
		{"a key that is none", asserter, "        subject:", "        key_file: secret\n        subject:", "oauth.assertion.key_file: names secret, which holds no private key in PEM"},
		{"a scope that is none", exchanger, "      grant", "      scopes: [\"a b\"]\n      grant", `oauth.scopes[0]: is "a b", which is no scope`},
		{"implied without scopes", exchanger, "      grant", "      implied_scopes: [a]\n      grant", "oauth.implied_scopes: has no effect without scopes"},
		{"a parameter of Writ's", exchanger, "      grant", "      parameters: {subject_token: x}\n      grant", "oauth.parameters.subject_token: is set by Writ, by a key of its own"},
		{"a parameter without value", exchanger, "      grant", "      parameters: {a: \"\"}\n      grant", `oauth.parameters: has "a": "", expected a parameter and its value`},
		{"authorization as a header", exchanger, "      grant", "      headers: {Authorization: Bearer x}\n      grant", `oauth.headers: has "Authorization": "Bearer x", expected a header that Writ does not set by itself, and its value`},
		{"a header in two", exchanger, "      grant", "      headers: {a: \"b\\r\\nc: d\"}\n      grant", `oauth.headers: has "a": "b\r\nc: d", expected a header that Writ does not set by itself, and its value`},
		{"refresh token to agents", exchanger, "      grant", "      returns: [refresh_token]\n      grant", `oauth.returns[0]: is "refresh_token", which is not among what a target adds for whoever uses the token`},
		{"ID token to agents", exchanger, "      grant", "      returns: [id_token]\n      grant", `oauth.returns[0]: is "id_token", which is not among what a target adds for whoever uses the token`},
		{"asking for a refresh token", exchanger, "      grant", "      requested_token_type: urn:ietf:params:oauth:token-type:refresh_token\n      grant", "oauth.requested_token_type: is a refresh token, which outlives every lease"},
		{"type without exchange", asserter, "      grant", "      subject_token_type: x\n      grant", "oauth.subject_token_type: has no effect: grant is not token_exchange"},
		{"actor without exchange", asserter, "      grant", "      actor: {audience: x}\n      grant", "oauth.actor: has no effect: grant is not token_exchange"},
		{"actor without audience", exchanger, "      grant", "      actor: {}\n      grant", "oauth.actor.audience: is missing"},
		{"actor's token and audience", exchanger, "      grant", "      actor: {token_file: secret, audience: x}\n      grant", "oauth.actor.audience: has no effect: token_file holds the token"},
		{"bearer without assertion", asserter, "      assertion:\n        subject: \"{agent}\"\n        audience: https://target.example\n", "", "oauth.assertion: is missing, which grant jwt_bearer shows"},
		{"for Writ", asserter, "audience: https://target.example", "audience: https://writ.example/", "oauth.assertion.audience: takes tokens of Writ's, for one of which an assertion could pass"},
		{"for a minter's audience", asserter, "audience: https://target.example", "audience: https://crm.example", "oauth.assertion.audience: takes tokens of Writ's, for one of which an assertion could pass"},
		{"actor for Writ", exchanger, "      grant", "      actor: {audience: \"https://writ.example\"}\n      grant", "oauth.actor.audience: takes tokens of Writ's, for one of which an assertion could pass"},
		{"as an issuer", asserter, "        subject:", "        issuer: https://idp.example\n        subject:", "oauth.assertion.issuer: is one of issuers, for which Writ must not speak"},
		{"no subject", asserter, "        subject: \"{agent}\"\n", "", "oauth.assertion.subject: is missing"},
		{"unknown name", asserter, "{agent}", "{email}", "oauth.assertion.subject: has {email}, expected one of {user}, {user_issuer}, {agent}, {agent_issuer}, {session}, {lease}"},
		{"open brace", asserter, "{agent}", "{agent", `oauth.assertion.subject: is "{agent", expected visible ASCII characters and names in braces`},
		{"space", asserter, "{agent}", "an agent", `oauth.assertion.subject: is "an agent", expected visible ASCII characters and names in braces`},
		{"two names without a separator", asserter, "{agent}", "{user}-{agent}", "oauth.assertion.subject: is \"{user}-{agent}\", expected a character such as : / # or | between any two names: others can be part of one"},
		{"two names side by side in a claim", asserter, "        subject:", "        claims: {who: 'a:{user}{agent}'}\n        subject:", "oauth.assertion.claims.who: is \"a:{user}{agent}\", expected a character such as : / # or | between any two names: others can be part of one"},
		{"the last of three", asserter, "{agent}", "{user}:{agent}+{lease}", "oauth.assertion.subject: is \"{user}:{agent}+{lease}\", expected a character such as : / # or | between any two names: others can be part of one"},
		{"names separated by what escapes others", asserter, "{agent}", "{user}%20{agent}", "oauth.assertion.subject: is \"{user}%20{agent}\", expected a character such as : / # or | between any two names: others can be part of one"},
		{"names separated", asserter, "{agent}", "u-{user}/{agent}|{session}-x:{lease}", ""},
		{"long assertion", asserter, "        subject:", "        ttl: 11m\n        subject:", "oauth.assertion.ttl: is 11m0s, expected 5s to 10m0s"},
		{"a claim of Writ's", asserter, "        subject:", "        claims: {act: x}\n        subject:", "oauth.assertion.claims.act: is a claim that can't be configured, or empty"},
		{"no life", asserter, "      token_ttl: 5m\n", "", "oauth.token_ttl: is 0s, expected how long the target's tokens live at most; or state ends_with_assertion"},
		{"two lives", asserter, "      token_ttl: 5m\n", "      token_ttl: 5m\n      ends_with_assertion: true\n", "oauth.token_ttl: stands beside ends_with_assertion, expected one of them"},
		{"end with nothing", exchanger, "      token_ttl: 5m\n", "      ends_with_assertion: true\n", "oauth.ends_with_assertion: has no effect without assertion"},
		{"tokens that outlive every lease", asserter, "max_ttl: 10m", "max_ttl: 5m", "max_ttl: is 5m0s, but the target's tokens live 5m0s and can't be ended at once: expected 5m12s or more"},
		{"no max_ttl", asserter, "max_ttl: 10m", "max_ttl: 0s", "max_ttl: is 0s, expected more than zero\nmax_ttl: is 0s, but the target's tokens live 5m0s and can't be ended at once: expected 5m12s or more"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if !strings.Contains(tt.base, tt.old) {
				t.Fatalf("%q is not in the base", tt.old)
			}
			_, got := load(t, dir, withMinter(strings.Replace(tt.base, tt.old, tt.new, 1)))
			var lines []string
			for line := range strings.Lines(got) {
				_, text, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": minters.x.")
				lines = append(lines, text)
			}
			if d := cmp.Diff(tt.want, strings.Join(lines, "\n")); d != "" {
				t.Errorf("(-want +got):\n%s\n%s", d, got)
			}
		})
	}
}

// A name is one principal's only within its issuer.
func TestOAuthSubjectsOfSeveralIssuers(t *testing.T) {
	dir := folder(t)
	two := func(minter string) string {
		return strings.Replace(withMinter(minter), "minters:\n", "  - issuer: https://second.example\n    speaks_for: [user, agent]\n    audience: https://writ.example\n    algorithms: [ES256]\nminters:\n", 1)
	}
	for subject, want := range map[string]string{
		"{agent}": "agents", "{user}": "users", "{user}:{agent_issuer}:{agent}": "users",
		"{agent_issuer}#{agent}": "", "{user_issuer}#{user}": "", "{session}": "", "static": "",
	} {
		_, got := load(t, dir, two(strings.Replace(asserter, "{agent}", subject, 1)))
		if (want == "") != (got == "") || !strings.Contains(got, want) {
			t.Errorf("%s: %s", subject, got)
		}
	}
	one := strings.Replace(strings.Replace(asserter, "{agent}", "{user}", 1), "      grant", "      issuer: https://idp.example\n      grant", 1)
	if _, got := load(t, dir, two(one)); got != "" {
		t.Errorf("users of one issuer: %s", got)
	}
}
