package e2e

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/writsec/writ/test/idp"
)

func TestKilledWhilePending(t *testing.T) {
	t.Parallel()
	w := start(t, shared)
	bob := w.as("bob", idp.HRAgent)
	ask := offboard(bob.open(), "e-killed")
	a := bob.must(requireCIBA, confirm, ask).Approval
	p := w.prompt("e-killed")
	w.polled(p, 1)
	before := bob.must(allow, "change_employment", approvedNow(w, bob, "e-killed-before")).Credential

	w.kill()
	w.answer(p, idp.Verdict{}) // nobody is there to hear it
	w.start()

	if got := bob.status(a, 30*time.Second); got.Status != "approved" {
		t.Fatalf("status %+v", got)
	}
	c := bob.must(allow, "change_employment", ask.approvedBy(a)).Credential
	bob.must(deny, "approval_consumed", ask.approvedBy(a))
	// What was minted before still holds, and ends with the session.
	if !w.active("hr", before.Secret.Token) || !w.active("hr", c.Secret.Token) {
		t.Error("a token did not survive the crash")
	}
	if n := w.prompts("e-killed"); n != 1 {
		t.Errorf("%d prompts", n)
	}
	w.polls(p)

	// The same by an orderly stop.
	ask.Resource.ID = "e-stopped"
	a = bob.must(requireCIBA, confirm, ask).Approval
	p = w.prompt("e-stopped")
	w.stop()
	w.answer(p, idp.Verdict{})
	w.start()
	if got := bob.status(a, 30*time.Second); got.Status != "approved" {
		t.Fatalf("status %+v", got)
	}
	bob.must(allow, "change_employment", ask.approvedBy(a))
	if n := w.prompts("e-stopped"); n != 1 {
		t.Errorf("%d prompts", n)
	}
	w.polls(p)
}

// approvedNow gets an approval for a session of its own and returns the question
// that uses it.
func approvedNow(w *writ, c client, employee string) question {
	w.t.Helper()
	ask := offboard(c.open(), employee)
	a := c.must(requireCIBA, confirm, ask).Approval
	w.answer(w.prompt(employee), idp.Verdict{})
	if got := c.status(a, 30*time.Second); got.Status != "approved" {
		w.t.Fatalf("status %+v", got)
	}
	return ask.approvedBy(a)
}

func TestKilledAgainAndAgain(t *testing.T) {
	t.Parallel()
	w := start(t, shared)
	bob := w.as("bob", idp.HRAgent)
	ask := offboard(bob.open(), "e-again")
	a := bob.must(requireCIBA, confirm, ask).Approval
	p := w.prompt("e-again")
	w.polled(p, 1)
	for range 3 {
		time.Sleep(rand.N(1500 * time.Millisecond))
		w.kill()
		w.start()
	}
	w.answer(p, idp.Verdict{})
	if got := bob.status(a, 30*time.Second); got.Status != "approved" {
		t.Fatalf("status %+v", got)
	}
	bob.must(allow, "change_employment", ask.approvedBy(a))
	if n := w.prompts("e-again"); n != 1 {
		t.Errorf("%d prompts", n)
	}
	w.polls(p)
}

// Kills at any moment, also while the provider is asked and while it answers. An
// approval may be lost to that, but never be allowed twice or asked twice, and none
// stays open for ever.
func TestKilledAtAnyMoment(t *testing.T) {
	t.Parallel()
	w := start(t, shared)
	bob := w.as("bob", idp.HRAgent)
	session := bob.open()
	var asks []question
	for round := range 3 {
		for i := range 3 {
			ask := offboard(session, fmt.Sprintf("e-any-%d-%d", round, i))
			asks = append(asks, ask.approvedBy(bob.must(requireCIBA, confirm, ask).Approval))
			time.Sleep(rand.N(20 * time.Millisecond))
		}
		time.Sleep(rand.N(300 * time.Millisecond))
		prompts, err := shared.Prompts(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range prompts {
			for i := range 3 {
				if w.about(p, fmt.Sprintf("e-any-%d-%d", round, i)) {
					w.answer(p, idp.Verdict{})
				}
			}
		}
		time.Sleep(rand.N(1200 * time.Millisecond))
		w.kill()
		w.start()
	}
	allowed := 0
	for _, ask := range asks {
		id := ask.Resource.ID
		if n := w.prompts(id); n > 1 {
			t.Errorf("%d prompts about %s", n, id)
		} else if n == 1 {
			p := w.prompt(id)
			if p.Status == idp.Pending {
				w.answer(p, idp.Verdict{})
			}
			w.polls(p)
		}
		a := bob.status(&approval{ID: ask.Approval}, 30*time.Second)
		switch got := bob.decide(ask); {
		case got.Decision == allow && a.Status == "approved":
			allowed++
			bob.must(deny, "approval_consumed", ask)
		case got.Decision == deny && got.Reasons[0].Code == "approval_failed" && a.Status == "failed":
		default:
			t.Errorf("%s: approval %+v, then %s %v", id, a, got.Decision, got.Reasons)
		}
	}
	t.Logf("%d of %d approvals survived", allowed, len(asks))
}

func TestSecretsStaySecret(t *testing.T) {
	t.Parallel()
	w := start(t, shared, with("log.level", "debug"))
	secrets := map[string]string{"the CIBA client's secret": shared.Clients[idp.Writ]}
	for _, minter := range []string{"crm", "hr", "payments"} {
		secrets["the service's secret for "+minter] = secretOf(minter)
	}
	root, err := os.ReadFile(w.path("root.key"))
	if err != nil {
		t.Fatal(err)
	}
	secrets["the root key"] = strings.TrimSpace(string(root))
	token := func(what, token string) {
		secrets[what] = token
		// A token that lost its signature in the log is still a reason to ask why.
		parts := strings.Split(token, ".")
		secrets[what+", its claims"], secrets[what+", its signature"] = parts[1], parts[2]
	}

	bob := w.as("bob", idp.HRAgent)
	token("the user's token", bob.token)
	user, _, err := shared.UserToken(t.Context(), "bob", idp.HRAgent)
	if err != nil {
		t.Fatal(err)
	}
	agent := client{w, agentToken(t, shared, idp.HRAgent)}
	token("the subject token", user)
	token("the agent's token", agent.token)
	agent.call(http.MethodPost, "/sessions", map[string]any{"subject_token": user})
	wrong := client{w, forged(t, shared, "secrets")}
	token("a refused token", wrong.token)
	wrong.call(http.MethodPost, "/decide", readOpportunity("ses_x"))

	used := bob.must(allow, "change_employment", approvedNow(w, bob, "e-secrets"), "Idempotency-Key", "e2e-secrets")
	token("the minted token", used.Credential.Secret.Token)
	secrets["the auth_req_id"] = w.prompt("e-secrets").AuthReqID
	ask := offboard(used.Session, "e-secrets-pending")
	bob.must(requireCIBA, confirm, ask)
	pending := w.prompt("e-secrets-pending")
	secrets["the pending auth_req_id"] = pending.AuthReqID
	w.polled(pending, 1)

	look := func(when string, wantFiles ...string) {
		t.Helper()
		said := w.out.String() + w.errs.String()
		content := map[string]string{"the log": said}
		names, err := filepath.Glob(w.path("data/*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			data, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			content[filepath.Base(name)] = string(data)
			if info, err := os.Stat(name); err != nil || info.Mode().Perm()&0o077 != 0 {
				t.Errorf("%s, %s is readable by others: %v %v", when, filepath.Base(name), info.Mode(), err)
			}
		}
		everything := ""
		for name, text := range content {
			everything += text
			for what, secret := range secrets {
				if strings.Contains(text, secret) {
					t.Errorf("%s, %s holds %s", when, name, what)
				}
			}
		}
		for _, name := range wantFiles {
			if content[name] == "" {
				t.Errorf("%s, there is no %s", when, name)
			}
		}
		if !strings.Contains(everything, used.DecisionID) { // the search itself works
			t.Errorf("%s, not even the decision is to be found", when)
		}
	}
	w.kill() // leaves the WAL
	look("after a crash", "writ.db", "writ.db-wal")
	w.start()
	w.stop()
	look("after a stop", "writ.db")
}

func TestAnotherRootKey(t *testing.T) {
	t.Parallel()
	w := start(t, shared)
	w.stop()
	w.write("root.key", "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n")
	code, _, stderr := command(t, "serve", "--config", w.path("writ.yaml"))
	if code != 1 || !strings.Contains(stderr, "root key") {
		t.Errorf("ended with %d: %s", code, stderr)
	}
	w.write("root.key", "too short\n")
	code, _, stderr = command(t, "serve", "--config", w.path("writ.yaml"))
	if code != 2 || !strings.Contains(stderr, "root_key_file") || !strings.Contains(stderr, "32 random bytes") {
		t.Errorf("ended with %d: %s", code, stderr)
	}
}

func TestOneWritPerStore(t *testing.T) {
	t.Parallel()
	w := start(t, shared)
	code, _, stderr := command(t, "serve", "--config", w.path("writ.yaml"))
	if code != 1 || !strings.Contains(stderr, "another Writ uses") {
		t.Errorf("a second Writ ended with %d: %s", code, stderr)
	}
}
