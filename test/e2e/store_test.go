package e2e

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/writsec/writ/internal/storetest"
	"github.com/writsec/writ/test/idp"
)

// onEach runs a test of a served Writ on each engine.
func onEach(t *testing.T, test func(t *testing.T, w *writ), changes ...func(settings)) {
	t.Parallel()
	t.Run("sqlite", func(t *testing.T) {
		t.Parallel()
		test(t, start(t, shared, changes...))
	})
	t.Run("postgres", func(t *testing.T) {
		t.Parallel()
		url := storetest.Database(t, "empty", func(context.Context, string) error { return nil })
		test(t, start(t, shared, append(changes, with("store", url))...))
	})
}

// tool runs a command on the store of a Writ that is running.
func (w *writ) tool(args ...string) string {
	w.t.Helper()
	code, stdout, stderr := command(w.t, append(args, "--config", w.path("writ.yaml"))...)
	if code != 0 {
		w.t.Fatalf("writ %s ended with %d: %s", strings.Join(args, " "), code, stderr)
	}
	return stdout
}

// kids lists the published signing keys.
func (w *writ) kids() (out []string) {
	w.t.Helper()
	set := read[struct {
		Keys []struct{ Kid string }
	}](w.t, client{w: w}.call(http.MethodGet, "/.well-known/jwks.json", nil), http.StatusOK)
	for _, k := range set.Keys {
		out = append(out, k.Kid)
	}
	return out
}

func TestKeys(t *testing.T) {
	onEach(t, func(t *testing.T, w *writ) {
		alice := w.as("alice", idp.SalesAgent)
		session := alice.open()
		old := alice.must(allow, "read_opportunity", readOpportunity(session)).Credential.Secret.Token
		if list := w.tool("keys", "list"); strings.Count(list, "\n") != 5 || strings.Contains(list, "PRIVATE") {
			t.Errorf("keys:\n%s", list)
		}
		known := func(n int) {
			t.Helper()
			within(t, 20*time.Second, func() error {
				if got := w.kids(); len(got) != n {
					return fmt.Errorf("%d keys are published, want %d", len(got), n)
				}
				return nil
			})
		}
		known(1)
		first := w.kids()[0]
		w.tool("keys", "rotate", "signing")
		known(2)
		if !w.active("crm", old) {
			t.Error("a token ended with a rotation")
		}
		if next := alice.must(allow, "read_opportunity", readOpportunity(session)).Credential.Secret.Token; kidOf(t, next) != first {
			t.Error("a key signs that verifiers may not know yet")
		}
		w.tool("keys", "rotate", "signing", "--compromised")
		known(1)
		if w.active("crm", old) {
			t.Error("a token of a compromised key is believed")
		}
		next := alice.must(allow, "read_opportunity", readOpportunity(session)).Credential.Secret.Token
		if kidOf(t, next) != w.kids()[0] || !w.active("crm", next) {
			t.Error("the new key does not sign")
		}
		if out := w.tool("keys", "rotate", "checkpoint"); !strings.Contains(out, "/audit/") {
			t.Errorf("no verifier key: %s", out)
		}
		w.tool("keys", "rotate", "data")

		w.write("next.key", "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n")
		w.tool("keys", "rewrap", "--new-root-key-file", w.path("next.key"))
		if !w.active("crm", next) {
			t.Error("a Writ that runs was disturbed")
		}
		w.stop()
		if code, _, stderr := command(t, "serve", "--config", w.path("writ.yaml")); code != 1 || !strings.Contains(stderr, "root key") {
			t.Errorf("with the old root key it ended with %d: %s", code, stderr)
		}
		if err := os.Rename(w.path("next.key"), w.path("root.key")); err != nil {
			t.Fatal(err)
		}
		w.start()
		if !w.active("crm", next) {
			t.Error("a token is lost")
		}
	})
}

func kidOf(t *testing.T, token string) string {
	t.Helper()
	var header struct{ Kid string }
	part, _, _ := strings.Cut(token, ".")
	text, err := base64.RawURLEncoding.DecodeString(part)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &header); err != nil {
		t.Fatal(err)
	}
	return header.Kid
}

// An earlier decision is decided again, on what it was made on: by the policies in
// force, and by those that are to come.
func TestPolicyReplay(t *testing.T) {
	onEach(t, func(t *testing.T, w *writ) {
		type side struct {
			Decision string
			Reasons  []reason
		}
		type replay struct {
			Then, Now side
			Same      bool
			Input     map[string]any
		}
		again := func(decision string, args ...string) (r replay) {
			t.Helper()
			if err := json.Unmarshal([]byte(w.tool(append([]string{"policy", "replay", decision}, args...)...)), &r); err != nil {
				t.Fatal(err)
			}
			return r
		}
		alice := w.as("alice", idp.SalesAgent)
		session := alice.open()
		yes := alice.must(allow, "read_opportunity", readOpportunity(session))
		if r := again(yes.DecisionID); !r.Same || r.Now.Reasons[0].Code != "read_opportunity" || r.Input["user"].(map[string]any)["id"] != "alice" {
			t.Errorf("%+v", r)
		}
		w.write("strict/writ.rego", `package writ

decision := {"effect": "deny", "reasons": [{"code": "closed", "message": "Closed"}]}
`)
		if r := again(yes.DecisionID, "--policies", w.path("strict")); r.Same || r.Then.Decision != allow || r.Now.Decision != deny || r.Now.Reasons[0].Code != "closed" {
			t.Errorf("%+v", r)
		}
		// HR's inputs are kept redacted here: they can't be decided again.
		bob := w.as("bob", idp.HRAgent)
		ask := bob.must(requireCIBA, "confirm_employment_change", offboard(bob.open(), "e-replay"))
		code, _, stderr := command(t, "policy", "replay", ask.DecisionID, "--config", w.path("writ.yaml"))
		if code != 1 || !strings.Contains(stderr, "kept redacted") {
			t.Errorf("ended with %d: %s", code, stderr)
		}
		if code, _, stderr := command(t, "policy", "replay", "dec_x", "--config", w.path("writ.yaml")); code != 1 || !strings.Contains(stderr, "dec_x") {
			t.Errorf("ended with %d: %s", code, stderr)
		}
	}, with("audit", map[string]any{"inputs": []any{map[string]any{"actions": []any{"hr.**"}, "keep": "redacted"}}}))
}

// The whole way of an approval on PostgreSQL, through two replicas: asked through one,
// used through the other.
func TestReplicasShareAnApproval(t *testing.T) {
	t.Parallel()
	url := storetest.Database(t, "empty", func(context.Context, string) error { return nil })
	one := start(t, shared, with("store", url))
	root, err := os.ReadFile(one.path("root.key"))
	if err != nil {
		t.Fatal(err)
	}
	two := install(t, shared, with("store", url))
	two.write("root.key", string(root))
	two.start()

	bob, bobAtTwo := one.as("bob", idp.HRAgent), two.as("bob", idp.HRAgent)
	act := offboard(bob.open(), "e-replicas")
	asked := bob.must(requireCIBA, "confirm_employment_change", act)
	again := bobAtTwo.must(requireCIBA, "confirm_employment_change", act)
	if again.Approval.ID != asked.Approval.ID {
		t.Fatal("two prompts for one act")
	}
	p := one.prompt("e-replicas")
	waiting := make(chan approval, 1)
	go func() { waiting <- bobAtTwo.status(asked.Approval, 30*time.Second) }()
	one.answer(p, idp.Verdict{})
	if got := <-waiting; got.Status != "approved" {
		t.Fatalf("the approval is %s", got.Status)
	}
	got := bobAtTwo.must(allow, "change_employment", act.approvedBy(asked.Approval))
	bob.must(deny, "approval_consumed", act.approvedBy(asked.Approval))
	if !one.active("hr", got.Credential.Secret.Token) {
		t.Error("a token of one replica is unknown to the other")
	}
	if n := one.prompts("e-replicas"); n != 1 {
		t.Errorf("%d prompts", n)
	}
	if one.kids()[0] != two.kids()[0] {
		t.Error("the replicas have keys of their own")
	}
}
