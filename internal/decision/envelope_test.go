package decision_test

import (
	"context"
	"testing"
	"time"

	"github.com/writsec/writ/internal/approval"
	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/decision"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/policy"
	"github.com/writsec/writ/internal/session"
	"github.com/writsec/writ/internal/storetest"
)

// envelopes asks the user about envelopes of "ask", allows those of "free" to anyone,
// with a credential and without a human, and denies the rest.
const envelopes = `package writ

default decision := {"effect": "deny", "reasons": [{"code": "no", "message": "no"}]}

widens if {
	input.intent.action == "writ.envelope.widen"
	input.resource == {"type": "writ.session", "id": input.session.id, "properties": {}}
}

decision := {
	"effect": "require_ciba", "reasons": [{"code": "ask", "message": "ask"}],
	"approval": [{"approver": "user", "code": "ask", "message": concat(" ", input.intent.parameters.actions)}],
} if {
	widens
	"ask" in input.intent.parameters.actions
	not input.approvals
}

decision := {
	"effect": "allow", "reasons": [{"code": "yes", "message": "yes"}],
	"credential": {"minter": "m", "ttl": "1m", "scope": {}}, "labels": ["widened"],
} if {
	widens
	"ask" in input.intent.parameters.actions
	input.approvals[_].approver == "user"
}

decision := {
	"effect": "allow", "reasons": [{"code": "free", "message": "free"}],
	"credential": {"minter": "m", "ttl": "1m", "scope": {}}, "counters": {"n": 1},
} if {
	widens
	"free" in input.intent.parameters.actions
}
`

type envelopeTest struct {
	*fixture
	session string
}

func newEnvelopeTest(t *testing.T) envelopeTest {
	t.Helper()
	f := newFixture(t, envelopes, windowed)
	e := envelopeTest{f, f.open()}
	if a := e.change("", "small"); a.Decision != nil {
		t.Fatalf("the first envelope: %+v", a)
	}
	return e
}

func (e envelopeTest) request(approval string, actions ...string) decision.EnvelopeRequest {
	return decision.EnvelopeRequest{
		Presented: identity.Presented{Token: e.token("alice", "agent")}, Session: e.session, Approval: approval,
		Envelope: session.Envelope{Actions: actions, Resources: []session.ResourcePattern{{Type: "t", ID: "*"}}, Source: session.SourceUser},
	}
}

func (e envelopeTest) change(approval string, actions ...string) decision.EnvelopeAnswer {
	e.t.Helper()
	a, err := e.Envelope(context.Background(), e.request(approval, actions...))
	e.must(err)
	return a
}

// approved asks about an envelope, and returns the approval once the user said yes.
func (e envelopeTest) approved(actions ...string) string {
	e.t.Helper()
	e.phone.answer.Store(int64(approval.PollAnswered))
	a := e.change("", actions...)
	if a.Decision == nil || a.Decision.Decision != policy.RequireCIBA {
		e.t.Fatalf("got %+v, want require_ciba", a.Decision)
	}
	e.wait(a.Decision.Approval.ID, "approved")
	return a.Decision.Approval.ID
}

// denied wants a deny, and the envelope as it was.
func (e envelopeTest) denied(a decision.EnvelopeAnswer, code string) {
	e.t.Helper()
	if a.Decision == nil || a.Decision.Decision != policy.Deny || a.Decision.Reasons[0].Code != code || a.Decision.Credential != nil {
		e.t.Errorf("got %+v, want deny %s", a.Decision, code)
	}
	if got := e.fixture.session(e.session).Envelope; got.Source != session.SourceAgent || len(got.Actions) != 1 {
		e.t.Errorf("the envelope is %+v", got)
	}
}

func TestWiden(t *testing.T) {
	e := newEnvelopeTest(t)
	before := e.fixture.session(e.session)
	id := e.approved("small", "ask")
	a := e.change(id, "ask", "small", "ask") // the same envelope, written otherwise
	if a.Decision == nil || a.Decision.Decision != policy.Allow || a.Decision.Credential != nil || !a.Alive {
		t.Fatalf("got %+v", a.Decision)
	}
	got := e.fixture.session(e.session)
	if got.Envelope.Source != session.SourceUser || len(got.Envelope.Actions) != 2 || got.Version != before.Version+1 {
		t.Errorf("version %d after %d, envelope %+v", got.Version, before.Version, got.Envelope)
	}
	if len(got.Labels) != 1 || len(e.recent(e.session).Labels) != 1 {
		t.Errorf("labels %v", got.Labels)
	}
	n := e.entries()
	if e.minter.minted.Load() != 0 || n[audit.LeaseActive] != 0 || n[audit.ApprovalConsumed] != 1 || n[audit.SessionEnvelope] != 2 {
		t.Errorf("audit %v", n)
	}
	if again := e.change(id, "small", "ask"); again.Decision != nil || e.fixture.session(e.session).Version != got.Version {
		t.Errorf("again: %+v", again.Decision)
	}
}

func TestWidenNeedsTheUser(t *testing.T) {
	e := newEnvelopeTest(t)
	e.denied(e.change("", "free"), "envelope_needs_human")
	e.denied(e.change("", "other"), "no")
	if s := e.fixture.session(e.session); len(s.Counters) != 0 || e.minter.minted.Load() != 0 {
		t.Errorf("left %v", s.Counters)
	}
	e.phone.answer.Store(int64(approval.PollDenied))
	r := e.request("", "ask")
	r.Wait = 20 * time.Second
	a, err := e.Envelope(t.Context(), r)
	e.must(err)
	e.denied(a, "approval_denied")
}

// What the provider has no room for is not approved by a summary of something else.
func TestWidenShowsWhatIsWidened(t *testing.T) {
	e := newEnvelopeTest(t)
	var actions []string
	for i := range 20 { // more than the 200 letters of the phone, less than the 256 of policy
		actions = append(actions, "ask", "ask.long"+string(rune('a'+i%26))+string(rune('a'+i/26)))
	}
	e.denied(e.change("", actions...), "approval_display")
}

func TestApprovalIsForOneEnvelopeOfOneSession(t *testing.T) {
	e := newEnvelopeTest(t)
	id := e.approved("ask", "small")
	e.denied(e.change(id, "ask", "more", "small"), "approval_mismatch")
	e.denied(e.change(id, "ask"), "approval_mismatch")
	limited := e.request(id, "ask", "small")
	limited.Envelope.Limits = map[string]int64{"n": 1}
	a, err := e.Envelope(t.Context(), limited)
	e.must(err)
	e.denied(a, "approval_mismatch")
	typed := e.request(id, "ask", "small")
	typed.Envelope.Resources[0].Type = "T"
	a, err = e.Envelope(t.Context(), typed)
	e.must(err)
	e.denied(a, "approval_mismatch")

	other := e
	other.session = e.open()
	other.change("", "small")
	if _, err := e.Envelope(t.Context(), other.request(id, "ask", "small")); !fault.Is(err, fault.NotFound) {
		t.Errorf("in another session: %v", err)
	}
	stranger := e.request(id, "ask", "small")
	stranger.Presented.Token = e.token("alice", "other-agent")
	if _, err := e.Envelope(t.Context(), stranger); !fault.Is(err, fault.NotFound) {
		t.Errorf("by another agent: %v", err)
	}
	// Nor is it an approval of an act that only looks like it.
	act := e.fixture.request("ask")
	act.Session, act.Approval = e.session, id
	if a := e.decide(act); a.Reasons[0].Code != "approval_mismatch" {
		t.Errorf("another act: %+v", a)
	}
	// It is still good for what it was given for.
	if a := e.change(id, "ask", "small"); a.Decision.Decision != policy.Allow {
		t.Errorf("got %+v", a.Decision)
	}
	if n := e.entries(); n[audit.ApprovalConsumed] != 1 {
		t.Errorf("audit %v", n)
	}
}

func TestWidenAfterTheEnd(t *testing.T) {
	e := newEnvelopeTest(t)
	id := e.approved("ask")
	e.sql(`UPDATE sessions SET ended_at = 1, end_reason = 'x', version = version + 1`)
	for _, r := range []decision.EnvelopeRequest{e.request(id, "ask"), e.request("", "small")} {
		if _, err := e.Envelope(t.Context(), r); !fault.Is(err, fault.SessionEnded) {
			t.Errorf("got %v, want session_ended", err)
		}
	}
}

// Without its entry no envelope changes, and no approval is used up.
func TestWidenIsWholeOrNothing(t *testing.T) {
	e := newEnvelopeTest(t)
	id := e.approved("ask")
	for _, table := range []string{"audit", "decisions"} {
		mend := storetest.Break(t, e.url, table)
		if _, err := e.Envelope(t.Context(), e.request(id, "ask")); !fault.Is(err, fault.Unavailable) {
			t.Errorf("%s: %v", table, err)
		}
		mend()
	}
	if got := e.fixture.session(e.session); got.Envelope.Source != session.SourceAgent || got.Version != 2 {
		t.Errorf("%+v", got)
	}
	if a := e.change(id, "ask"); a.Decision.Decision != policy.Allow {
		t.Errorf("after the repair: %+v", a.Decision)
	}
}

// Of parallel repeats, one uses the approval.
func TestWidenInParallel(t *testing.T) {
	e := newEnvelopeTest(t)
	id := e.approved("ask", "small")
	done := make(chan error, 8)
	for range cap(done) {
		go func() {
			a, err := e.Envelope(context.Background(), e.request(id, "ask", "small"))
			if err == nil && a.Session.Envelope.Source != session.SourceUser {
				err = fault.New(fault.Internal, "not widened")
			}
			done <- err
		}()
	}
	for range cap(done) {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if n := e.entries(); n[audit.ApprovalConsumed] != 1 || n[audit.SessionEnvelope] != 2 {
		t.Errorf("audit %v", n)
	}
}
