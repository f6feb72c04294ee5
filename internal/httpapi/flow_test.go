package httpapi_test

import (
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/writsec/writ/internal/sqlstore"
)

// parallel sends n equal calls at the same time.
func parallel(t *testing.T, n int, c call) []answer {
	t.Helper()
	out := make([]answer, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { out[i] = c.send(t) })
	}
	wg.Wait()
	return out
}

func TestIdempotencyKey(t *testing.T) {
	bearer := alice(t)
	session := open(t, bearer)
	first := decide(t, bearer, read(session), "Idempotency-Key", "retry").decided(t, "allow", "")
	// A newer token of the same user and agent is the same caller.
	again := decide(t, alice(t), read(session), "Idempotency-Key", "retry").decided(t, "allow", "")
	if again.str("decision_id") != first.str("decision_id") {
		t.Error("a retry got another decision")
	}
	old, renewed := first.str("credential", "secret", "token"), again.str("credential", "secret", "token")
	if old == renewed || first.str("credential", "lease") == again.str("credential", "lease") {
		t.Error("a retry got the same secret")
	}
	if active(t, "crm", old) || !active(t, "crm", renewed) {
		t.Error("the old credential lives on, or the new one does not")
	}
	if again.at("credential", "expires_at") != first.at("credential", "expires_at") {
		t.Errorf("a retry moved the end from %v to %v", first.at("credential", "expires_at"), again.at("credential", "expires_at"))
	}
	other := read(session)
	other["context"] = obj{"a": 1}
	decide(t, bearer, other, "Idempotency-Key", "retry").refused(t, 409, "idempotency_conflict", "-")
	call{method: "POST", path: "/v1/decide", token: bearer, body: other, header: headers("Idempotency-Key", "retry")}.send(t).
		refused(t, 409, "idempotency_conflict", "-")
	// The key is the agent's own.
	decide(t, token(t, "user=alice&agent=hr-agent"), read(""), "Idempotency-Key", "retry").decided(t, "deny", "")

	call{method: "DELETE", path: "/leases/" + again.str("credential", "lease"), token: bearer}.send(t)
	decide(t, bearer, read(session), "Idempotency-Key", "retry").refused(t, 409, "lease_ended", "-")
	if active(t, "crm", renewed) {
		t.Error("released, but active")
	}
}

func TestIdempotencyKeyOfDenyAndAsk(t *testing.T) {
	pay := obj{"intent": obj{"action": "payments.transfer.create"}, "resource": obj{"type": "payments.account", "id": "main"}}
	a := decide(t, alice(t), pay, "Idempotency-Key", "denied").decided(t, "deny", "")
	b := decide(t, alice(t), pay, "Idempotency-Key", "denied").decided(t, "deny", "")
	if a.str("decision_id") != b.str("decision_id") || a.str("session") != b.str("session") {
		t.Errorf("%s\n%s", a.raw, b.raw)
	}
	ask := offboard("", "e-retried")
	a = decide(t, bob(t), ask, "Idempotency-Key", "asked").decided(t, "require_ciba", "")
	b = decide(t, bob(t), ask, "Idempotency-Key", "asked").decided(t, "require_ciba", "")
	if a.str("decision_id") != b.str("decision_id") || a.str("approval", "id") != b.str("approval", "id") {
		t.Errorf("%s\n%s", a.raw, b.raw)
	}
	onPhone(t, "e-retried", false)
	time.Sleep(50 * time.Millisecond)
	if n := prompts("e-retried"); n != 1 {
		t.Errorf("%d prompts", n)
	}
}

func TestIdempotencyKeyInParallel(t *testing.T) {
	bearer := alice(t)
	session := open(t, bearer)
	for name, body := range map[string]obj{"in a session": read(session), "opening one": read("")} {
		t.Run(name, func(t *testing.T) {
			var answers []answer
			for _, try := range []string{"1", "2", "3"} {
				answers = parallel(t, 16, call{
					method: "POST", path: "/decide", token: bearer, body: body, header: headers("Idempotency-Key", name[:2]+try),
				})
				if !answers[0].starved() {
					break
				}
			}
			alive := 0
			for _, a := range answers {
				a.decided(t, "allow", "")
				if a.str("decision_id") != answers[0].str("decision_id") {
					t.Error("two decisions")
				}
				if active(t, "crm", a.str("credential", "secret", "token")) {
					alive++
				}
			}
			if alive != 1 {
				t.Errorf("%d of 16 credentials live, want 1", alive)
			}
		})
	}
}

func TestPreferWait(t *testing.T) {
	bearer := bob(t)
	session := open(t, bearer)
	t.Run("approved", func(t *testing.T) {
		go onPhone(t, "e-held-yes", true)
		a := decide(t, bearer, offboard(session, "e-held-yes"), "Prefer", "wait=20", "Idempotency-Key", "held").decided(t, "allow", "")
		if a.header.Get("Preference-Applied") != "wait=20" {
			t.Errorf("Preference-Applied = %q", a.header.Get("Preference-Applied"))
		}
		// A retry of the held request is the final decision, not a second prompt.
		b := decide(t, bearer, offboard(session, "e-held-yes"), "Prefer", "wait=20", "Idempotency-Key", "held").decided(t, "allow", "")
		if a.str("decision_id") != b.str("decision_id") || prompts("e-held-yes") != 1 {
			t.Errorf("retry: %s, %d prompts", b.raw, prompts("e-held-yes"))
		}
		if active(t, "hr", a.str("credential", "secret", "token")) || !active(t, "hr", b.str("credential", "secret", "token")) {
			t.Error("the wrong credential lives")
		}
	})
	t.Run("denied", func(t *testing.T) {
		go onPhone(t, "e-held-no", false)
		decide(t, bearer, offboard(session, "e-held-no"), "Prefer", "wait=20").decided(t, "deny", "approval_denied")
	})
	t.Run("timeout", func(t *testing.T) {
		start := time.Now()
		a := decide(t, bearer, offboard(session, "e-held-late"), "Prefer", "wait=1").decided(t, "require_ciba", "")
		if took := time.Since(start); took < time.Second || took > 5*time.Second || a.str("approval", "status") != "pending" {
			t.Errorf("after %v: %s", took, a.raw)
		}
		call{method: "DELETE", path: "/approvals/" + a.str("approval", "id"), token: bearer}.send(t)
	})
	t.Run("session ends", func(t *testing.T) {
		own := open(t, bearer)
		done := make(chan answer)
		go func() {
			done <- call{method: "POST", path: "/decide", token: bearer, body: offboard(own, "e-held-end"), header: headers("Prefer", "wait=20")}.send(t)
		}()
		for end := time.Now().Add(5 * time.Second); prompts("e-held-end") == 0 && time.Now().Before(end); {
			time.Sleep(5 * time.Millisecond)
		}
		call{method: "DELETE", path: "/sessions/" + own, token: bearer}.send(t)
		(<-done).refused(t, 409, "session_ended", "-")
	})
}

func TestLongPollIsWokenAtOnce(t *testing.T) {
	bearer := bob(t)
	a := decide(t, bearer, offboard("", "e-poll")).decided(t, "require_ciba", "")
	path := "/approvals/" + a.str("approval", "id")
	got := make(chan answer, 2)
	for range 2 {
		go func() { got <- call{method: "GET", path: path + "?wait=20s", token: bearer}.send(t) }()
	}
	time.Sleep(200 * time.Millisecond)
	start := time.Now()
	withdrawn := call{method: "DELETE", path: path, token: bearer}.send(t)
	for range 2 {
		if b := <-got; b.str("status") != "cancelled" {
			t.Errorf("long poll: %s", b.raw)
		}
	}
	if took := time.Since(start); took > 500*time.Millisecond {
		t.Errorf("woken after %v", took)
	}
	// Withdrawn is withdrawn, and again changes nothing.
	if again := (call{method: "DELETE", path: path, token: bearer}).send(t); string(again.raw) != string(withdrawn.raw) {
		t.Errorf("withdrawn twice: %s", again.raw)
	}
	body := with(offboard(a.str("session"), "e-poll"), "approval", a.str("approval", "id"))
	decide(t, bearer, body).decided(t, "deny", "approval_cancelled")
	// A late yes on the phone is none.
	onPhone(t, "e-poll", true)
	time.Sleep(1200 * time.Millisecond) // longer than the provider's interval
	decide(t, bearer, body).decided(t, "deny", "approval_cancelled")
}

func TestApprovalIsForOneActOnce(t *testing.T) {
	bearer := bob(t)
	session := open(t, bearer)
	id := approved(t, bearer, offboard(session, "e-act"), "e-act")
	changed := func(change func(obj)) obj {
		b := with(offboard(session, "e-act"), "approval", id)
		change(b)
		return b
	}
	for name, change := range map[string]func(obj){
		"parameter":         func(b obj) { b["intent"].(obj)["parameters"] = obj{"last_day": "2027-01-01"} },
		"parameter added":   func(b obj) { b["intent"].(obj)["parameters"] = obj{"last_day": "2026-12-31", "wipe": true} },
		"parameters away":   func(b obj) { delete(b["intent"].(obj), "parameters") },
		"action":            func(b obj) { b["intent"].(obj)["action"] = "hr.employee.onboard" },
		"resource":          func(b obj) { b["resource"].(obj)["id"] = "e-other" },
		"resource property": func(b obj) { b["resource"].(obj)["properties"] = obj{"force": true} },
		"context":           func(b obj) { b["context"] = obj{"ticket": "HR-8"} },
		"context away":      func(b obj) { delete(b, "context") },
	} {
		t.Run(name, func(t *testing.T) { decide(t, bearer, changed(change)).decided(t, "deny", "approval_mismatch") })
	}
	reworded := changed(func(b obj) { b["intent"].(obj)["purpose"] = "Said otherwise" })
	decide(t, bearer, reworded).decided(t, "allow", "change_employment")
	decide(t, bearer, reworded).decided(t, "deny", "approval_consumed")
	got := call{method: "GET", path: "/approvals/" + id, token: bearer}.send(t)
	if got.str("status") != "consumed" {
		t.Errorf("approval: %s", got.raw)
	}
	if n := prompts("e-act"); n != 1 {
		t.Errorf("%d prompts", n)
	}
}

func TestContinuationsInParallelAllowOnce(t *testing.T) {
	bearer := bob(t)
	session := open(t, bearer)
	id := approved(t, bearer, offboard(session, "e-race"), "e-race")
	allowed := 0
	for _, a := range parallel(t, 16, call{method: "POST", path: "/decide", token: bearer, body: with(offboard(session, "e-race"), "approval", id)}) {
		switch {
		case a.str("decision") == "allow":
			allowed++
		case !a.starved():
			a.decided(t, "deny", "approval_consumed")
		}
	}
	if allowed == 0 { // all starved: the approval is still good
		decide(t, bearer, with(offboard(session, "e-race"), "approval", id)).decided(t, "allow", "")
		allowed++
	}
	decide(t, bearer, with(offboard(session, "e-race"), "approval", id)).decided(t, "deny", "approval_consumed")
	if allowed != 1 {
		t.Errorf("%d of 16 continuations were allowed, want 1", allowed)
	}
}

func TestContinuationThatComesTooEarlyJoinsThePrompt(t *testing.T) {
	bearer := bob(t)
	a := decide(t, bearer, offboard("", "e-early")).decided(t, "require_ciba", "")
	b := decide(t, bearer, with(offboard(a.str("session"), "e-early"), "approval", a.str("approval", "id"))).decided(t, "require_ciba", "")
	if a.str("approval", "id") != b.str("approval", "id") {
		t.Error("a second prompt")
	}
	call{method: "DELETE", path: "/approvals/" + a.str("approval", "id"), token: bearer}.send(t)
}

func TestPromptsToOnePersonAreBounded(t *testing.T) {
	bearer := token(t, "user=carol&agent=finance-agent")
	var ids []string
	for i := range 6 {
		body := obj{
			"intent":   obj{"action": "payments.transfer.create", "parameters": obj{"amount": 20_000 + i, "currency": "EUR", "creditor": "ACME"}},
			"resource": obj{"type": "payments.account", "id": "flood"},
		}
		a := decide(t, bearer, body)
		if i == 5 {
			a.refused(t, 429, "overloaded", "-")
			break
		}
		ids = append(ids, a.decided(t, "require_ciba", "").str("approval", "id"))
	}
	for _, id := range ids {
		call{method: "DELETE", path: "/approvals/" + id, token: bearer}.send(t)
	}
}

// The handle of a prompt at the provider is a secret like a token: leaks() looks
// for it in the log.
func TestAuthReqIDIsNotShown(t *testing.T) {
	a := decide(t, bob(t), offboard("", "e-handle")).decided(t, "require_ciba", "")
	id, handle := a.str("approval", "id"), ""
	for end := time.Now().Add(5 * time.Second); handle == "" && time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		err := w.dev.Server.Store().View(t.Context(), func(tx *sqlstore.Tx) error {
			got, err := tx.Approval(t.Context(), id)
			handle = got.AuthReqID
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(handle) < 12 {
		t.Fatalf("auth_req_id = %q", handle)
	}
	w.secret(handle, "an auth_req_id")
	onPhone(t, "e-handle", true)
	got := call{method: "GET", path: "/approvals/" + id + "?wait=10s", token: bob(t)}.send(t)
	if got.str("status") != "approved" || strings.Contains(string(got.raw)+string(a.raw), handle) {
		t.Errorf("approval: %s", got.raw)
	}
}

func TestReleaseAndSessionEnd(t *testing.T) {
	bearer := alice(t)
	session := open(t, bearer)
	a, b := decide(t, bearer, read(session)).decided(t, "allow", ""), decide(t, bearer, read(session)).decided(t, "allow", "")
	release := call{method: "DELETE", path: "/leases/" + a.str("credential", "lease"), token: bearer}
	first, second := release.send(t), release.send(t)
	if first.str("end_reason") != "released" || string(first.raw) != string(second.raw) {
		t.Errorf("released: %s, then %s", first.raw, second.raw)
	}
	if active(t, "crm", a.str("credential", "secret", "token")) || !active(t, "crm", b.str("credential", "secret", "token")) {
		t.Error("the wrong lease ended")
	}
	ended := call{method: "DELETE", path: "/sessions/" + session, token: bearer}.send(t)
	if ended.str("status") != "ended" || ended.str("end_reason") == "" {
		t.Errorf("session: %s", ended.raw)
	}
	if again := (call{method: "DELETE", path: "/sessions/" + session, token: bearer}).send(t); string(again.raw) != string(ended.raw) {
		t.Errorf("ended twice: %s", again.raw)
	}
	if active(t, "crm", b.str("credential", "secret", "token")) {
		t.Error("a lease outlived its session")
	}
	decide(t, bearer, read(session)).refused(t, 409, "session_ended", "-")
	call{method: "POST", path: "/v1/decide", token: bearer, body: read(session)}.send(t).refused(t, 409, "session_ended", "-")
	late := call{method: "DELETE", path: "/leases/" + b.str("credential", "lease"), token: bearer}.send(t)
	if late.str("end_reason") != "session_ended" {
		t.Errorf("released late: %s", late.raw)
	}
}

func instant(t *testing.T, s string) time.Time {
	t.Helper()
	at, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		t.Fatal(err)
	}
	return at
}

func TestSessionEndsByTime(t *testing.T) {
	bearer := alice(t)
	s := call{method: "POST", path: "/sessions", token: bearer, body: obj{"expires_in": 2}}.send(t)
	a := decide(t, bearer, read(s.str("session"))).decided(t, "allow", "")
	minted := a.str("credential", "secret", "token")
	if !active(t, "crm", minted) || instant(t, a.str("credential", "expires_at")).After(instant(t, s.str("ends_at"))) {
		t.Errorf("credential: %s of session %s", a.raw, s.raw)
	}
	time.Sleep(2 * time.Second)
	if active(t, "crm", minted) {
		t.Error("active after the session's end")
	}
	decide(t, bearer, read(s.str("session"))).refused(t, 409, "session_ended", "-")
	got := call{method: "GET", path: s.header.Get("Location"), token: bearer}.send(t)
	if got.str("status") != "ended" {
		t.Errorf("session: %s", got.raw)
	}
}

func TestEnvelopeNarrows(t *testing.T) {
	bearer := alice(t)
	s := call{method: "POST", path: "/sessions", token: bearer, body: obj{
		"task":     "Read <one> opportunity & nothing else",
		"envelope": obj{"actions": []string{"crm.opportunity.read"}, "resources": []obj{{"type": "crm.opportunity", "id": "opp-42"}}},
	}}.send(t)
	if s.str("envelope", "source") != "agent" || s.str("task", "source") != "agent" {
		t.Errorf("session: %s", s.raw)
	}
	decide(t, bearer, read(s.str("session"))).decided(t, "allow", "")
	other := read(s.str("session"))
	other["resource"].(obj)["id"] = "opp-43"
	decide(t, bearer, other).decided(t, "deny", "outside_envelope")
}

func TestKillSwitch(t *testing.T) {
	operator := olga(t)
	kill := func(t *testing.T, scope obj) answer {
		t.Helper()
		scope["reason"] = "test"
		a := call{method: "POST", path: "/revocations", token: operator, body: scope}.send(t)
		if a.status != http.StatusOK {
			t.Fatalf("revoke: %s", a.raw)
		}
		return a
	}
	ref := func(sub string) obj { return obj{"iss": w.dev.IDP.Issuer(), "sub": sub} }
	type live struct{ bearer, session, lease, token string }
	start := func(t *testing.T) live {
		t.Helper()
		l := live{bearer: alice(t)}
		l.session = open(t, l.bearer)
		a := decide(t, l.bearer, read(l.session)).decided(t, "allow", "")
		l.lease, l.token = a.str("credential", "lease"), a.str("credential", "secret", "token")
		return l
	}
	t.Run("lease", func(t *testing.T) {
		a, b := start(t), start(t)
		got := kill(t, obj{"lease": a.lease})
		if got.at("leases") != 1.0 || got.at("sessions") != 0.0 || active(t, "crm", a.token) || !active(t, "crm", b.token) {
			t.Errorf("killed: %s", got.raw)
		}
		if again := kill(t, obj{"lease": a.lease}); again.at("leases") != 0.0 {
			t.Errorf("killed twice: %s", again.raw)
		}
		decide(t, a.bearer, read(a.session)).decided(t, "allow", "") // the session goes on
	})
	for _, tt := range []struct {
		name  string
		scope func(live) obj
		other bool // another session of the same pair survives
	}{
		{"session", func(l live) obj { return obj{"session": l.session} }, true},
		{"user", func(live) obj { return obj{"user": ref("alice")} }, false},
		{"agent", func(live) obj { return obj{"agent": ref("sales-agent")} }, false},
		{"all", func(live) obj { return obj{"all": true} }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, b := start(t), start(t)
			hr := open(t, bob(t))
			kill(t, tt.scope(a))
			if active(t, "crm", a.token) || active(t, "crm", b.token) != tt.other {
				t.Error("the wrong credentials live")
			}
			decide(t, a.bearer, read(a.session)).refused(t, 409, "session_ended", "-")
			if !tt.other {
				decide(t, b.bearer, read(b.session)).refused(t, 409, "session_ended", "-")
			}
			got := call{method: "GET", path: "/sessions/" + hr, token: bob(t)}.send(t)
			if (got.str("status") == "ended") != (tt.name == "all") {
				t.Errorf("a bystander: %s", got.raw)
			}
		})
	}
	t.Run("nobody", func(t *testing.T) {
		a := start(t)
		for _, scope := range []obj{{"user": ref("nobody")}, {"user": obj{"iss": "https://elsewhere.example", "sub": "alice"}}, {"agent": ref("alice")}} {
			if got := kill(t, scope); got.at("leases") != 0.0 || got.at("sessions") != 0.0 {
				t.Errorf("killed: %s", got.raw)
			}
		}
		if !active(t, "crm", a.token) {
			t.Error("a bystander lost its lease")
		}
	})
	t.Run("a pending approval", func(t *testing.T) {
		a := decide(t, bob(t), offboard("", "e-killed")).decided(t, "require_ciba", "")
		kill(t, obj{"user": ref("bob")})
		got := call{method: "GET", path: "/approvals/" + a.str("approval", "id"), token: bob(t)}.send(t)
		if got.str("status") != "cancelled" {
			t.Errorf("approval: %s", got.raw)
		}
	})
	t.Run("refusals", func(t *testing.T) {
		a := start(t)
		for name, bearer := range map[string]string{
			"an agent":                 a.bearer,
			"the operator by an agent": token(t, "user=olga&agent=sales-agent"),
			"an agent in the console":  token(t, "user=olga&agent=ops-console&act=true"),
			"alice at the console":     token(t, "user=alice&agent=ops-console"),
			"the console itself":       token(t, "kind=agent&agent=ops-console"),
		} {
			t.Run(name, func(t *testing.T) {
				call{method: "POST", path: "/revocations", token: bearer, body: obj{"all": true}}.send(t).refused(t, 403, "forbidden", "-")
			})
		}
		call{method: "POST", path: "/revocations", token: token(t, "kind=id&user=olga&agent=ops-console"), body: obj{"all": true}}.send(t).
			refused(t, 401, "invalid_token", "-")
		call{method: "POST", path: "/revocations", token: operator, body: `{"all":true}`, header: headers("Content-Type", "text/plain"), invalid: true}.send(t).
			refused(t, 415, "unsupported_media_type", "-")
		call{method: "POST", path: "/sessions", token: a.bearer, body: `{}`, header: headers("Content-Type", "text/plain"), invalid: true}.send(t).
			refused(t, 415, "unsupported_media_type", "-")
		if !active(t, "crm", a.token) {
			t.Error("a refused revocation revoked")
		}
	})
}
