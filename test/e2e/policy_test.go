package e2e

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/bundle"

	"github.com/writsec/writ/test/idp"
)

func TestPolicyFailures(t *testing.T) {
	t.Parallel()
	w := install(t, shared, with("policy.path", "failing"), with("policy.deadline", "300ms"))
	w.tolerant = true
	w.write("failing/failing.rego", `package writ

reasons := [{"code": "fine", "message": "Fine"}]

decision := {"effect": "allow", "reasons": reasons} if input.intent.action == "test.fine"

decision := {"effect": "allow", "reasons": reasons} if {
	input.intent.action == "test.endless"
	not endless
}

endless if {
	some a in numbers.range(1, 100000)
	some b in numbers.range(1, 100000)
	a + b < 0
}

decision := {"effect": "allow", "reasons": reasons} if {
	input.intent.action == "test.huge"
	count(numbers.range(1, 1000000000)) > 0
}

decision := {"effect": "allow", "reasons": reasons, "extra": true} if input.intent.action == "test.extra"

decision := {"effect": "allow"} if input.intent.action == "test.no_reasons"

decision := "allow" if input.intent.action == "test.string"

decision := true if input.intent.action == "test.true"

decision := {"effect": "ALLOW", "reasons": reasons} if input.intent.action == "test.spelling"

decision := {
	"effect": "allow",
	"reasons": reasons,
	"credential": {"minter": "none", "ttl": "1m", "scope": {"scopes": ["crm:read"]}},
} if input.intent.action == "test.minter"

decision := {
	"effect": "allow",
	"reasons": reasons,
	"credential": {"minter": "crm", "ttl": "1m", "scope": {"scopes": ["crm:read", "crm:admin"]}},
} if input.intent.action == "test.scope"

decision := {
	"effect": "require_ciba",
	"reasons": reasons,
	"approval": [{"code": "ask", "approver": "manager", "message": "Ask"}],
} if input.intent.action == "test.approver"

decision := {"effect": "allow", "reasons": reasons} if {
	input.intent.action == "test.error"
	1 / to_number(input.resource.id) > 0
}

decision := {"effect": "allow", "reasons": reasons} if input.intent.action == "test.conflict"

decision := {"effect": "deny", "reasons": reasons} if input.intent.action == "test.conflict"
`)
	w.start()
	alice := w.as("alice", idp.SalesAgent)
	session := alice.open()
	for action, code := range map[string]string{
		"test.endless": "policy_timeout", "test.huge": "policy_timeout",
		"test.nothing": "policy_undefined",
		"test.extra":   "policy_invalid_output", "test.no_reasons": "policy_invalid_output", "test.string": "policy_invalid_output",
		"test.true": "policy_invalid_output", "test.spelling": "policy_invalid_output",
		"test.error": "policy_error", "test.conflict": "policy_error",
		"test.minter": "credential_minter", "test.scope": "credential_scope", "test.approver": "approver_unsupported",
	} {
		began := time.Now()
		a := alice.decide(q(session, action, "test", "0"))
		if a.Decision != deny || a.Reasons[0].Code != code || a.Credential != nil {
			t.Errorf("%s: got %s %v, want deny %s", action, a.Decision, a.Reasons, code)
		}
		if took := time.Since(began); took > 3*time.Second {
			t.Errorf("%s took %v", action, took)
		}
	}
	for _, code := range []string{"policy_undefined", "policy_error", "policy_timeout", "policy_invalid_output"} {
		if w.metric(`writ_policy_failures_total{reason="`+code+`"}`) == 0 {
			t.Errorf("%s is not counted", code)
		}
	}
	// Nothing of it lingers. An allow without a credential is one.
	if a := alice.decide(q(session, "test.fine", "test", "0")); a.Decision != allow || a.Credential != nil {
		t.Errorf("got %s %v", a.Decision, a.Reasons)
	}
}

// says is a policy that denies everything in these words.
func says(code string) string {
	return fmt.Sprintf(`package writ
decision := {"effect": "deny", "reasons": [{"code": %q, "message": "Said by policy"}]}
`, code)
}

func TestPolicyReload(t *testing.T) {
	t.Parallel()
	w := install(t, shared, with("policy.path", "live"), with("policy.reload", "200ms"))
	w.tolerant = true
	w.write("live/live.rego", says("one"))
	w.start()
	alice := w.as("alice", idp.SalesAgent)
	ask := readOpportunity(alice.open())
	first := alice.must(deny, "one", ask)

	refused := 0
	refuse := func(file, content, why string) {
		t.Helper()
		w.write(file, content)
		refused++
		within(t, 10*time.Second, func() error {
			if n := w.metric(`writ_policy_loads_total{result="refused"}`); n != float64(refused) {
				return fmt.Errorf("%v refused loads, want %d", n, refused)
			}
			return nil
		})
		if log := w.log(); !strings.Contains(log[len(log)-1].Error, why) {
			t.Errorf("the log says %q, not %q", log[len(log)-1].Error, why)
		}
		if a := alice.must(deny, "one", ask); a.Policy != first.Policy {
			t.Errorf("policy %+v, want %+v", a.Policy, first.Policy)
		}
	}
	refuse("live/live.rego", says("two")+"\noops(", "live.rego:4")
	refuse("live/live.rego", says("two")+`
fetched := http.send({"method": "get", "url": input.context.url})`, "http.send")
	refuse("live/live.rego", says("two")+"\nunsafe if not nowhere(input)", "nowhere")
	refuse("live/live_test.rego", `package writ_test
test_nothing if data.writ.decision.effect == "allow"`, "nowhere") // the folder is still broken
	refuse("live/live.rego", says("two"), "data.writ_test.test_nothing")

	// Mended.
	w.write("live/live_test.rego", `package writ_test
test_nothing if data.writ.decision.effect == "deny"`)
	within(t, 10*time.Second, func() error {
		if a := alice.decide(ask); a.Reasons[0].Code != "two" || a.Policy == first.Policy {
			return fmt.Errorf("still %v of %+v", a.Reasons, a.Policy)
		}
		return nil
	})
}

func TestPolicyRefusedAtStart(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ content, want string }{
		"http.send":          {says("x") + `fetched := http.send({"method": "get", "url": "http://127.0.0.1"})`, "http.send"},
		"net.lookup_ip_addr": {says("x") + `found := net.lookup_ip_addr("localhost")`, "net.lookup_ip_addr"},
		"opa.runtime":        {says("x") + `env := opa.runtime().env`, "opa.runtime"},
		"rand.intn":          {says("x") + `n := rand.intn("x", 10)`, "rand.intn"},
		"syntax":             {"package writ\noops(", "policy.rego:2"},
		"no Rego":            {"", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := install(t, shared, with("policy.path", "broken"))
			w.write("broken/policy.rego", test.content)
			w.refusesPolicies(test.want)
		})
	}
}

// refusesPolicies starts Writ on policies that it must not take: it says why, is not
// ready and decides nothing, but the kill switch works.
func (w *writ) refusesPolicies(why string) {
	w.t.Helper()
	w.tolerant = true
	w.launch()
	within(w.t, 30*time.Second, func() error {
		res, err := w.http.Get(w.ops + "/readyz")
		if err != nil {
			return err
		}
		defer res.Body.Close()
		if res.StatusCode != http.StatusServiceUnavailable {
			w.t.Errorf("readyz %d", res.StatusCode)
		}
		return nil
	})
	refused := false
	for _, l := range w.log() {
		refused = refused || l.Message == "policies refused" && strings.Contains(l.Error, why)
	}
	if !refused {
		w.t.Errorf("the log does not say %q", why)
	}
	body := map[string]any{"intent": map[string]any{"action": "x"}, "resource": map[string]any{"type": "x", "id": "1"}}
	agent := w.as("alice", idp.SalesAgent)
	session := read[map[string]any](w.t, agent.call(http.MethodPost, "/sessions", map[string]any{}), http.StatusCreated)
	body["session"] = session["session"]
	if r := agent.call(http.MethodPost, "/decide", body); r.status != http.StatusServiceUnavailable {
		w.t.Errorf("decided without policies: %d %s", r.status, r.body)
	}
	token, _, err := w.idp.UserToken(w.t.Context(), "olga", opsConsole)
	if err != nil {
		w.t.Fatal(err)
	}
	operator := client{w, token}
	if r := operator.call(http.MethodPost, "/revocations", map[string]any{"all": true}); r.status != http.StatusOK {
		w.t.Errorf("the kill switch answers %d %s", r.status, r.body)
	}
	w.stop()
}

// TestBundle decides by the committed bundle, without its tests: those run at each
// start of TestDev.
func TestBundle(t *testing.T) {
	t.Parallel()
	file, err := os.Open(filepath.Join("..", "..", "bundles", "writ.tar.gz"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	unzipped, err := gzip.NewReader(file)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	zip := gzip.NewWriter(&out)
	from, to := tar.NewReader(unzipped), tar.NewWriter(zip)
	for {
		header, err := from.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(header.Name, "_test.rego") {
			continue
		}
		if err := to.WriteHeader(header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(to, from); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(to.Close(), zip.Close()); err != nil {
		t.Fatal(err)
	}
	w := install(t, shared, with("policy.path", "writ.tar.gz"))
	w.write("writ.tar.gz", out.String())
	w.start()
	alice := w.as("alice", idp.SalesAgent)
	alice.must(allow, "read_opportunity", readOpportunity(alice.open()))
}

// keyPair makes a P-256 key in PEM.
func keyPair(t *testing.T) (private, public string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	privateDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	publicDER, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: privateDER})),
		string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: publicDER}))
}

// signed is a bundle as `opa build --signing-alg ES256` makes it; without a key, as
// it makes it without.
func signed(t *testing.T, rego, privateKey string) string {
	t.Helper()
	parsed, err := ast.ParseModuleWithOpts("policy.rego", rego, ast.ParserOptions{RegoVersion: ast.RegoV1})
	if err != nil {
		t.Fatal(err)
	}
	b := bundle.Bundle{
		Manifest: bundle.Manifest{Revision: "signed-1", Roots: &[]string{"writ"}}, Data: map[string]any{},
		Modules: []bundle.ModuleFile{{URL: "policy.rego", Path: "/policy.rego", RelativePath: "/policy.rego", Raw: []byte(rego), Parsed: parsed}},
	}
	if privateKey != "" {
		if err := b.GenerateSignature(bundle.NewSigningConfig(privateKey, "ES256", ""), "release", false); err != nil {
			t.Fatal(err)
		}
	}
	var out bytes.Buffer
	if err := bundle.NewWriter(&out).Write(b); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func TestSignedBundle(t *testing.T) {
	t.Parallel()
	private, public := keyPair(t)
	_, wrong := keyPair(t)
	signature := func(s settings) {
		s.set("policy.path", "bundle.tar.gz")
		s.set("policy.reload", "200ms")
		s.set("policy.signature", map[string]any{"public_key_file": "bundle.pem", "algorithm": "ES256", "key_id": "release"})
	}
	w := install(t, shared, signature)
	w.tolerant = true
	w.write("bundle.pem", public)
	w.write("bundle.tar.gz", signed(t, says("signed"), private))
	w.start()
	alice := w.as("alice", idp.SalesAgent)
	ask := readOpportunity(alice.open())
	if a := alice.must(deny, "signed", ask); a.Policy.Revision != "signed-1" {
		t.Errorf("policy %+v", a.Policy)
	}
	// A replacement that nobody signed is refused, and the signed one stays.
	w.write("bundle.tar.gz", signed(t, says("unsigned"), ""))
	within(t, 10*time.Second, func() error {
		if w.metric(`writ_policy_loads_total{result="refused"}`) == 0 {
			return fmt.Errorf("not refused yet")
		}
		return nil
	})
	alice.must(deny, "signed", ask)

	for name, test := range map[string]struct {
		key    string
		bundle string
		change func(settings)
	}{
		"wrong key":   {wrong, signed(t, says("x"), private), nil},
		"unsigned":    {public, signed(t, says("x"), ""), nil},
		"a directory": {public, "", with("policy.path", "dir")},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			changes := []func(settings){signature}
			if test.change != nil {
				changes = append(changes, test.change)
			}
			w := install(t, shared, changes...)
			w.write("bundle.pem", test.key)
			w.write("bundle.tar.gz", test.bundle)
			w.write("dir/policy.rego", says("x"))
			w.refusesPolicies("policies")
		})
	}
}
