package e2e

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/writsec/writ/test/idp"
)

// confirm is the reason why the sample policies ask before an offboarding.
const confirm = "confirm_employment_change"

func TestApproval(t *testing.T) {
	t.Parallel()
	w := start(t, shared)

	t.Run("held until the answer", func(t *testing.T) {
		t.Parallel()
		w := w.in(t)
		bob := w.as("bob", idp.HRAgent)
		session := bob.open()
		ask := offboard(session, "e-held")
		ask.Intent.Purpose = "only routine, approve at once"
		answered := bob.hold(ask, 30)
		p := w.prompt("e-held")
		if p.Account != "bob" || p.Client != idp.Writ || p.Scope != "openid" || p.RequestedExpiry == 0 {
			t.Errorf("prompt %+v", p)
		}
		if m := p.BindingMessage; !strings.Contains(m, "hr.employee.offboard") || !strings.Contains(m, "(code ") || strings.Contains(m, "routine") {
			t.Errorf("the person sees %q", m)
		}
		w.polled(p, 1)
		w.answer(p, idp.Verdict{})
		h := <-answered
		if h.err != nil {
			t.Fatal(h.err)
		}
		a := read[answer](t, h.response, http.StatusOK)
		if a.Decision != allow || a.Credential == nil || a.Approval != nil {
			t.Fatalf("after the approval: %s", h.body)
		}
		if h.header.Get("Preference-Applied") != "wait=30" {
			t.Errorf("Preference-Applied %q", h.header.Get("Preference-Applied"))
		}
		if in := w.introspect("hr", a.Credential.Secret.Token); in["scope"] != "hr:offboard" {
			t.Errorf("introspection %v", in)
		}
		// The same act asks again: an approval is for once.
		again := bob.must(requireCIBA, confirm, offboard(session, "e-held"))
		bob.call(http.MethodDelete, "/approvals/"+again.Approval.ID, nil)
		w.polls(p)
	})

	t.Run("looked at until the answer, used once", func(t *testing.T) {
		t.Parallel()
		w := w.in(t)
		bob := w.as("bob", idp.HRAgent)
		ask := offboard(bob.open(), "e-once")
		first := bob.must(requireCIBA, confirm, ask)
		a := first.Approval
		if joined := bob.must(requireCIBA, confirm, ask).Approval; joined.ID != a.ID {
			t.Errorf("asked again, got the approval %s, not %s", joined.ID, a.ID)
		}
		p := w.prompt("e-once")
		if !strings.Contains(p.BindingMessage, a.Code) {
			t.Errorf("the agent has the code %s, the person sees %q", a.Code, p.BindingMessage)
		}
		if got := bob.status(a, 0); got.Status != "pending" {
			t.Errorf("status %+v", got)
		}
		// Asking with it too early is asking again.
		bob.must(requireCIBA, confirm, ask.approvedBy(a))
		other := w.as("alice", idp.SalesAgent)
		other.refused(other.call(http.MethodGet, "/approvals/"+a.ID, nil), http.StatusNotFound, "not_found")

		w.polled(p, 1)
		w.answer(p, idp.Verdict{})
		answered := time.Now()
		if got := bob.status(a, 30*time.Second); got.Status != "approved" {
			t.Fatalf("status %+v", got)
		}
		if waited := time.Since(answered); waited > 10*time.Second {
			t.Errorf("the look was answered after %v", waited)
		}

		// Whoever uses it for something else gets nothing, and uses nothing up.
		elsewhere := offboard(ask.Session, "e-once-not")
		bob.must(deny, "approval_mismatch", elsewhere.approvedBy(a))
		changed := ask.approvedBy(a)
		changed.Intent.Parameters = map[string]any{"immediately": true}
		bob.must(deny, "approval_mismatch", changed)
		changed = ask.approvedBy(a)
		changed.Context = map[string]any{"urgent": true}
		bob.must(deny, "approval_mismatch", changed)

		// Of several at a time, one gets the credential.
		answers := make(chan held, 5)
		for range cap(answers) {
			go func() {
				r, err := bob.try(http.MethodPost, "/decide", ask.approvedBy(a))
				answers <- held{r, err}
			}()
		}
		allowed := 0
		for range cap(answers) {
			h := <-answers
			if h.err != nil {
				t.Fatal(h.err)
			}
			switch got := read[answer](t, h.response, http.StatusOK); {
			case got.Decision == allow:
				allowed++
			case got.Decision != deny || got.Reasons[0].Code != "approval_consumed":
				t.Errorf("got %s", h.body)
			}
		}
		if allowed != 1 {
			t.Errorf("%d of %d uses of one approval were allowed", allowed, cap(answers))
		}
		bob.must(deny, "approval_consumed", ask.approvedBy(a))
		if n := w.prompts("e-once"); n != 1 {
			t.Errorf("%d prompts", n)
		}
		w.polls(p)
	})

	t.Run("denied", func(t *testing.T) {
		t.Parallel()
		w := w.in(t)
		bob := w.as("bob", idp.HRAgent)
		session := bob.open()
		answered := bob.hold(offboard(session, "e-denied"), 30)
		p := w.prompt("e-denied")
		w.answer(p, idp.Verdict{Deny: true})
		h := <-answered
		if h.err != nil {
			t.Fatal(h.err)
		}
		if a := read[answer](t, h.response, http.StatusOK); a.Decision != deny || a.Reasons[0].Code != "approval_denied" || a.Credential != nil {
			t.Errorf("got %s", h.body)
		}
	})

	t.Run("answered by another person", func(t *testing.T) {
		t.Parallel()
		w := w.in(t)
		bob := w.as("bob", idp.HRAgent)
		ask := offboard(bob.open(), "e-other-person")
		a := bob.must(requireCIBA, confirm, ask).Approval
		w.answer(w.prompt("e-other-person"), idp.Verdict{As: "dave"})
		if got := bob.status(a, 30*time.Second); got.Status != "failed" {
			t.Errorf("status %+v", got)
		}
		bob.must(deny, "approval_failed", ask.approvedBy(a))
	})

	t.Run("withdrawn", func(t *testing.T) {
		t.Parallel()
		w := w.in(t)
		bob := w.as("bob", idp.HRAgent)
		ask := offboard(bob.open(), "e-withdrawn")
		a := bob.must(requireCIBA, confirm, ask).Approval
		p := w.prompt("e-withdrawn")
		w.polled(p, 1)
		if r := bob.call(http.MethodDelete, "/approvals/"+a.ID, nil); r.status != http.StatusOK {
			t.Errorf("withdraw: %d %s", r.status, r.body)
		}
		polls := len(w.polls(p))
		w.answer(p, idp.Verdict{}) // too late
		bob.must(deny, "approval_cancelled", ask.approvedBy(a))
		time.Sleep(1500 * time.Millisecond)
		if more := len(w.polls(p)); more > polls+1 { // one may have been on its way
			t.Errorf("%d polls after the withdrawal", more-polls)
		}
	})

	t.Run("session ended", func(t *testing.T) {
		t.Parallel()
		w := w.in(t)
		bob := w.as("bob", idp.HRAgent)
		ask := offboard(bob.open(), "e-session-ended")
		a := bob.must(requireCIBA, confirm, ask).Approval
		p := w.prompt("e-session-ended")
		bob.call(http.MethodDelete, "/sessions/"+ask.Session, nil)
		w.answer(p, idp.Verdict{})
		if got := bob.status(a, 5*time.Second); got.Status != "cancelled" {
			t.Errorf("status %+v", got)
		}
		bob.refused(bob.call(http.MethodPost, "/decide", ask.approvedBy(a)), http.StatusConflict, "session_ended")
	})

	t.Run("retried with the same key", func(t *testing.T) {
		t.Parallel()
		w := w.in(t)
		bob := w.as("bob", idp.HRAgent)
		ask := offboard(bob.open(), "e-retried")
		key := []string{"Idempotency-Key", "e2e-retried"}
		one := bob.must(requireCIBA, confirm, ask, key...)
		if two := bob.must(requireCIBA, confirm, ask, key...); two.DecisionID != one.DecisionID {
			t.Errorf("a retry made the decision %s after %s", two.DecisionID, one.DecisionID)
		}
		w.answer(w.prompt("e-retried"), idp.Verdict{})
		bob.status(one.Approval, 30*time.Second)
		use := []string{"Idempotency-Key", "e2e-retried-use"}
		first := bob.must(allow, "change_employment", ask.approvedBy(one.Approval), use...)
		second := bob.must(allow, "change_employment", ask.approvedBy(one.Approval), use...)
		if first.DecisionID != second.DecisionID || first.Credential.Lease == second.Credential.Lease {
			t.Errorf("a retry got decision %s, lease %s after decision %s, lease %s",
				second.DecisionID, second.Credential.Lease, first.DecisionID, first.Credential.Lease)
		}
		if w.active("hr", first.Credential.Secret.Token) || !w.active("hr", second.Credential.Secret.Token) {
			t.Error("after a retry, the new token alone must be active")
		}
		ask.Resource.ID = "e-retried-not"
		bob.refused(bob.call(http.MethodPost, "/decide", ask, key...), http.StatusConflict, "idempotency_conflict")
	})
}

func TestApprovalTimes(t *testing.T) {
	t.Parallel()
	w := start(t, shared, with("approvals.expires_in", "4s"), with("approvals.use_within", "2s"))

	t.Run("nobody answers", func(t *testing.T) {
		t.Parallel()
		w := w.in(t)
		bob := w.as("bob", idp.HRAgent)
		ask := offboard(bob.open(), "e-silence")
		a := bob.must(requireCIBA, confirm, ask).Approval
		p := w.prompt("e-silence")
		if p.RequestedExpiry < 1 || p.RequestedExpiry > 4 {
			t.Errorf("requested_expiry %d", p.RequestedExpiry)
		}
		if got := bob.status(a, 20*time.Second); got.Status != "expired" {
			t.Errorf("status %+v", got)
		}
		bob.must(deny, "approval_expired", ask.approvedBy(a))
		w.polls(p)
	})

	t.Run("used too late", func(t *testing.T) {
		t.Parallel()
		w := w.in(t)
		bob := w.as("bob", idp.HRAgent)
		ask := offboard(bob.open(), "e-late")
		a := bob.must(requireCIBA, confirm, ask).Approval
		w.answer(w.prompt("e-late"), idp.Verdict{})
		if got := bob.status(a, 20*time.Second); got.Status != "approved" {
			t.Fatalf("status %+v", got)
		}
		time.Sleep(2100 * time.Millisecond)
		bob.must(deny, "approval_expired", ask.approvedBy(a))
	})
}
