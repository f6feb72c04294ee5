package decision_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/writsec/writ/internal/approval"
	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/decision"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/policy"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/storetest"
)

// rules has one action for each thing that a decision can be.
const rules = `package writ

reason(code) := [{"code": code, "message": code}]

credential := {"minter": "m", "ttl": "1m", "scope": {"x": "y"}}

default decision := {"effect": "deny", "reasons": [{"code": "no", "message": "no"}], "labels": ["denied_once"]}

decision := {"effect": "allow", "reasons": reason("plain")} if input.intent.action == "plain"

decision := {"effect": "allow", "reasons": reason("mint"), "credential": credential, "labels": ["minted"]} if input.intent.action == "mint"

decision := {"effect": "allow", "reasons": reason("other"), "credential": object.union(credential, {"minter": "nobody"})} if input.intent.action == "other_minter"

# Spends 1 of a budget of 10, and says so.
decision := {"effect": "allow", "reasons": reason("spent"), "counters": {"spent": 1}} if {
	input.intent.action == "spend"
	object.get(input.session.counters, "spent", 0) < 10
}

asks := {"approver": "user", "code": "ask", "message": "ask"}

decision := {"effect": "require_ciba", "reasons": reason("ask"), "approval": [asks]} if {
	input.intent.action == "ask"
	not input.approvals
}

decision := {"effect": "allow", "reasons": reason("approved"), "credential": credential} if {
	input.intent.action == "ask"
	input.approvals[_].approver == "user"
	not "revoked_meanwhile" in input.session.labels
}

decision := {"effect": "require_ciba", "reasons": reason("ask"), "approval": [object.union(asks, {"approver": "manager"})]} if input.intent.action == "ask_manager"

decision := {"effect": "require_ciba", "reasons": reason("ask"), "approval": [object.union(asks, {"display": "full"})]} if input.intent.action == "ask_full"
`

func TestDenies(t *testing.T) {
	for _, tt := range []struct{ action, code string }{
		{"unheard_of", "no"},
		{"other_minter", "credential_minter"},
		{"ask_manager", "approver_unsupported"},
		{"ask_full", "approval_display"},
	} {
		t.Run(tt.action, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, rules, nil)
			a := f.decide(f.request(tt.action))
			if a.Decision != policy.Deny || a.Reasons[0].Code != tt.code || a.Credential != nil || a.Approval != nil {
				t.Errorf("got %+v, want deny %s", a, tt.code)
			}
			if n := f.entries(); n[audit.DecisionDeny] != 1 || n[audit.LeaseActive] != 0 || n[audit.ApprovalOpened] != 0 {
				t.Errorf("audit: %v", n)
			}
			if f.phone.asked.Load() != 0 || f.minter.minted.Load() != 0 {
				t.Error("somebody was asked, or something was minted")
			}
		})
	}
}

func TestNoProviderIsADeny(t *testing.T) {
	f := newFixture(t, rules, func(c *decision.Config) { c.Providers = nil })
	if a := f.decide(f.request("ask")); a.Decision != policy.Deny || a.Reasons[0].Code != "approval_unavailable" {
		t.Errorf("got %+v, want deny approval_unavailable", a)
	}
}

func TestMinterRefusalIsADeny(t *testing.T) {
	f := newFixture(t, rules, nil)
	f.minter.refuse = &lease.Refusal{Code: "credential_scope", Message: "too much"}
	if a := f.decide(f.request("mint")); a.Decision != policy.Deny || a.Reasons[0].Code != "credential_scope" {
		t.Errorf("got %+v, want deny credential_scope", a)
	}
}

func TestSessions(t *testing.T) {
	f := newFixture(t, rules, nil)
	opened := f.decide(f.request("plain")).Session
	again := f.request("plain")
	again.Session = opened
	if a := f.decide(again); a.Session != opened {
		t.Errorf("decided in %s, want %s", a.Session, opened)
	}
	theirs := again
	theirs.Presented.Token = f.token("alice", "other-agent")
	bobs := again
	bobs.Presented.Token = f.token("bob", "agent")
	nobody := f.request("plain")
	nobody.Presented.Token = f.token("", "agent")
	made := again
	made.Session = "ses_made_up"
	for name, tt := range map[string]struct {
		r    decision.Request
		want fault.Code
	}{
		"another agent's": {theirs, fault.NotFound}, "another user's": {bobs, fault.NotFound},
		"made up": {made, fault.NotFound}, "no user anywhere": {nobody, fault.InvalidToken},
	} {
		if _, err := f.Decide(context.Background(), tt.r); fault.CodeOf(err) != tt.want {
			t.Errorf("%s: %v, want %s", name, err, tt.want)
		}
	}
	// The agent's own token is enough where the session names the user.
	alone := again
	alone.Presented.Token = f.token("", "agent")
	if a := f.decide(alone); a.Decision != policy.Allow {
		t.Errorf("agent's own token in its session: %+v", a)
	}

	strict := newFixture(t, rules, func(c *decision.Config) { c.OpenOnDecide = false })
	if _, err := strict.Decide(context.Background(), strict.request("plain")); !fault.Is(err, fault.InvalidRequest) {
		t.Errorf("without a session: %v, want invalid_request", err)
	}
}

// 64 parallel decisions against a budget of 10 let exactly 10 through: each that
// was evaluated on what is no longer true is evaluated again.
func TestParallelDecisionsKeepTheBudget(t *testing.T) {
	f := newFixture(t, rules, nil)
	r := f.request("spend")
	r.Session = f.open()
	var mu sync.Mutex
	allowed, overloaded := 0, 0
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			for {
				a, err := f.Decide(context.Background(), r)
				mu.Lock()
				switch {
				case fault.Is(err, fault.Overloaded): // told to come back, and nothing was spent
					overloaded++
					mu.Unlock()
					continue
				case err != nil:
					t.Error(err)
				case a.Decision == policy.Allow:
					allowed++
				}
				mu.Unlock()
				return
			}
		})
	}
	wg.Wait()
	if s := f.session(r.Session); allowed != 10 || s.Counters["spent"] != 10 {
		t.Errorf("%d allowed, %d spent; want 10 and 10 (%d retries)", allowed, s.Counters["spent"], overloaded)
	}
}

func TestMarks(t *testing.T) {
	f := newFixture(t, rules, nil)
	r := f.request("unheard_of")
	r.Session = f.open()
	f.decide(r)
	if s := f.session(r.Session); fmt.Sprint(s.Labels) != "[denied_once]" {
		t.Errorf("labels after a deny: %v", s.Labels)
	}
	r.Intent.Action = "mint"
	f.decide(r)
	if s := f.session(r.Session); fmt.Sprint(s.Labels) != "[denied_once minted]" {
		t.Errorf("labels after an allow: %v", s.Labels)
	}
}

// What cannot be recorded is neither answered nor minted.
func TestNoEntryNoAnswer(t *testing.T) {
	for _, table := range []string{"audit", "decisions", "leases", "replays"} {
		t.Run(table, func(t *testing.T) {
			f := newFixture(t, rules, nil)
			r := f.request("mint")
			r.Session, r.IdempotencyKey = f.open(), "k"
			mend := storetest.Break(f.t, f.url, table)
			a, err := f.Decide(context.Background(), r)
			if !fault.Is(err, fault.Unavailable) || a.Credential != nil {
				t.Fatalf("got %+v, %v; want unavailable", a, err)
			}
			if f.minter.minted.Load() != 0 {
				t.Error("minted without a record")
			}
			mend()
			if n := f.entries(); n[audit.DecisionAllow] != 0 || n[audit.LeaseActive] != 0 {
				t.Errorf("half a step stayed: %v", n)
			}
			if a := f.decide(r); a.Credential == nil {
				t.Errorf("after the repair: %+v", a)
			}
		})
	}
}

func TestIdempotency(t *testing.T) {
	f := newFixture(t, rules, nil)
	r := f.request("mint")
	r.Session, r.IdempotencyKey = f.open(), "k"
	first := f.decide(r)
	second := f.decide(r)
	if second.DecisionID != first.DecisionID {
		t.Errorf("the retry got decision %s, want %s", second.DecisionID, first.DecisionID)
	}
	if second.Credential.Secret["password"] == first.Credential.Secret["password"] || second.Credential.Lease == first.Credential.Lease {
		t.Error("the retry got the old credential")
	}
	if n := f.entries(); n[audit.DecisionAllow] != 1 || n[audit.LeaseRevoked] != 1 || n[audit.DecisionReissued] != 1 {
		t.Errorf("audit: %v", n)
	}
	same := r // an empty object is no object
	same.Context, same.Intent.Parameters, same.Resource.Properties = map[string]any{}, map[string]any{}, map[string]any{}
	if a := f.decide(same); a.DecisionID != first.DecisionID {
		t.Error("an empty context made another request of it")
	}
	other := r
	other.Resource.ID = "2"
	if _, err := f.Decide(context.Background(), other); !fault.Is(err, fault.IdempotencyConflict) {
		t.Errorf("another body: %v, want idempotency_conflict", err)
	}
	stranger := r
	stranger.Session, stranger.Presented.Token = "", f.token("alice", "other-agent")
	if a := f.decide(stranger); a.DecisionID == first.DecisionID {
		t.Error("another agent's key met this one")
	}

	// Sixteen retries at once: still one decision, and one lease that lives.
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			a, err := f.Decide(context.Background(), r)
			if err != nil || a.DecisionID != first.DecisionID {
				t.Errorf("retry: %+v, %v", a, err)
			}
		})
	}
	wg.Wait()
	if n := f.entries(); n[audit.LeaseActive]-n[audit.LeaseRevoked] != 2 { // the stranger's is the other
		t.Errorf("audit after retries: %v", n)
	}
}

// The first requests of one key, all at once, make one decision.
func TestIdempotencyRace(t *testing.T) {
	f := newFixture(t, rules, nil)
	r := f.request("mint")
	r.IdempotencyKey = "k" // and no session: only the winner opens one
	ids := sync.Map{}
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			a, err := f.Decide(context.Background(), r)
			if err != nil {
				t.Error(err)
				return
			}
			ids.Store(a.DecisionID+a.Session, true)
		})
	}
	wg.Wait()
	n := 0
	ids.Range(func(any, any) bool { n++; return true })
	if e := f.entries(); n != 1 || e[audit.DecisionAllow] != 1 || e[audit.SessionOpened] != 1 {
		t.Errorf("%d decisions, audit %v; want one", n, e)
	}
}

// A mint that fails costs nothing: the same key gets the credential later, without
// another approval.
func TestMintFailureKeepsTheApproval(t *testing.T) {
	f := newFixture(t, rules, nil)
	f.phone.answer.Store(int64(approval.PollAnswered))
	f.minter.fail.Store(true)
	r := f.request("ask")
	r.Session, r.IdempotencyKey, r.Wait = f.open(), "k", 10*time.Second
	if _, err := f.Decide(context.Background(), r); !fault.Is(err, fault.MintFailed) {
		t.Fatalf("got %v, want mint_failed", err)
	}
	if n := f.entries(); n[audit.LeaseRevoked] != 1 {
		t.Errorf("the lease of a failed mint lives on: %v", n)
	}
	f.minter.fail.Store(false)
	if a := f.decide(r); a.Decision != policy.Allow || a.Credential == nil {
		t.Errorf("the retry: %+v", a)
	}
	if f.phone.asked.Load() != 1 {
		t.Errorf("the person was asked %d times", f.phone.asked.Load())
	}
}

func TestWait(t *testing.T) {
	for _, tt := range []struct {
		answer approval.PollOutcome
		effect policy.Effect
		code   string
	}{
		{approval.PollAnswered, policy.Allow, "approved"},
		{approval.PollDenied, policy.Deny, "approval_denied"},
		{approval.PollExpired, policy.Deny, "approval_expired"},
		{approval.PollFailed, policy.Deny, "approval_failed"},
	} {
		t.Run(tt.code, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, rules, nil)
			f.phone.answer.Store(int64(tt.answer))
			r := f.request("ask")
			r.Wait = 20 * time.Second
			a := f.decide(r)
			if a.Decision != tt.effect || a.Reasons[0].Code != tt.code {
				t.Errorf("got %s %v, want %s %s", a.Decision, a.Reasons, tt.effect, tt.code)
			}
		})
	}
	t.Run("nobody answers", func(t *testing.T) {
		t.Parallel()
		f := newFixture(t, rules, nil)
		r := f.request("ask")
		r.Wait = 50 * time.Millisecond
		a := f.decide(r)
		if a.Decision != policy.RequireCIBA || a.Approval.Status != "pending" || a.Approval.Code == "" {
			t.Errorf("got %+v, want require_ciba, pending", a)
		}
		// The same question joins the same prompt.
		r.Session = a.Session
		if b := f.decide(r); b.Approval.ID != a.Approval.ID {
			t.Errorf("asked again as %s, want %s", b.Approval.ID, a.Approval.ID)
		}
	})
}

// After a yes, policy is asked again on what is true by then.
func TestApprovalIsNoAllow(t *testing.T) {
	f := newFixture(t, rules, nil)
	r := f.request("ask")
	r.Session = f.open()
	asked := f.decide(r)
	f.phone.answer.Store(int64(approval.PollAnswered))
	f.wait(asked.Approval.ID, "approved")
	f.sql(`UPDATE sessions SET labels = '["revoked_meanwhile"]', version = version + 1`)
	r.Approval = asked.Approval.ID
	if a := f.decide(r); a.Decision != policy.Deny || a.Reasons[0].Code != "no" {
		t.Errorf("got %+v, want policy's deny", a)
	}
	f.sql(`UPDATE sessions SET labels = '[]', version = version + 1`)
	if a := f.decide(r); a.Decision != policy.Allow {
		t.Errorf("a deny must not use the approval up: %+v", a)
	}
	if a := f.decide(r); a.Reasons[0].Code != "approval_consumed" {
		t.Errorf("the second use: %+v, want approval_consumed", a)
	}
}

func (f *fixture) wait(approvalID, status string) {
	f.t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if f.status(approvalID) == status {
			return
		}
	}
	f.t.Fatalf("the approval never became %s", status)
}

func TestMaxPending(t *testing.T) {
	f := newFixture(t, rules, nil)
	for i := range 4 {
		r := f.request("ask")
		r.Resource.ID = fmt.Sprint(i)
		_, err := f.Decide(context.Background(), r)
		if want := i == 3; fault.Is(err, fault.Overloaded) != want {
			t.Errorf("prompt %d: %v", i+1, err)
		}
	}
	if n := f.entries(); n[audit.ApprovalOpened] != 3 {
		t.Errorf("%d prompts were opened, want 3", n[audit.ApprovalOpened])
	}
}

// Whoever asks again after the yes, having lost the answer, gets that yes and no
// second prompt.
func TestAnUnusedYesIsJoined(t *testing.T) {
	f := newFixture(t, rules, nil)
	f.phone.answer.Store(int64(approval.PollAnswered))
	r := f.request("ask")
	r.Session = f.open()
	asked := f.decide(r)
	f.wait(asked.Approval.ID, "approved")
	again := f.decide(r)
	if again.Decision != policy.RequireCIBA || again.Approval.ID != asked.Approval.ID || again.Approval.Status != "approved" {
		t.Errorf("asked again: %+v", again.Approval)
	}
	r.Wait = time.Second
	if a := f.decide(r); a.Decision != policy.Allow {
		t.Errorf("a wait on it: %+v", a)
	}
	if n := f.phone.asked.Load(); n != 1 {
		t.Errorf("the person was asked %d times", n)
	}
}

// One damaged row stops neither other prompts nor anything else.
func TestDamagedApproval(t *testing.T) {
	f := newFixture(t, rules, nil)
	r := f.request("ask")
	r.Session = f.open()
	a := f.decide(r).Approval.ID
	for end := time.Now().Add(20 * time.Second); f.entries()[audit.ApprovalPrompted] == 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("never prompted")
		}
	}
	damaged := `x'00'`
	if storetest.OnPostgres() {
		damaged = `'\x00'`
	}
	f.sql(`UPDATE approvals SET auth_req_id_sealed = ` + damaged + `, version = version + 1`)
	f.wait(a, "failed")
	r.Resource.ID = "2"
	f.phone.answer.Store(int64(approval.PollAnswered))
	r.Wait = 20 * time.Second
	if a := f.decide(r); a.Decision != policy.Allow {
		t.Errorf("another prompt: %+v", a)
	}
}

func TestOldKeysAreForgotten(t *testing.T) {
	f := newFixture(t, rules, nil)
	r := f.request("mint")
	r.Session, r.IdempotencyKey = f.open(), "k"
	first := f.decide(r)
	ctx := context.Background()
	f.must(f.store.Update(ctx, func(tx *sqlstore.Tx) error {
		n, err := tx.ForgetReplays(ctx, tx.Now().Add(-time.Hour), 10)
		if n != 0 {
			t.Errorf("%d young keys were forgotten", n)
		}
		return err
	}))
	f.must(f.store.Update(ctx, func(tx *sqlstore.Tx) error {
		n, err := tx.ForgetReplays(ctx, tx.Now().Add(time.Second), 10)
		if n != 1 {
			t.Errorf("%d keys were forgotten, want 1", n)
		}
		return err
	}))
	if a := f.decide(r); a.DecisionID == first.DecisionID {
		t.Error("a forgotten key is still known")
	}
}

// A request and its retries, all held for one person, get one decision: whoever is
// second to wake finds the key passed on.
func TestHeldRetriesShareOneDecision(t *testing.T) {
	f := newFixture(t, rules, nil)
	r := f.request("ask")
	r.Session, r.IdempotencyKey, r.Wait = f.open(), "k", 30*time.Second
	answers := make([]decision.Answer, 4)
	var wg sync.WaitGroup
	for i := range answers {
		wg.Go(func() {
			var err error
			if answers[i], err = f.Decide(context.Background(), r); err != nil {
				t.Error(err)
			}
		})
	}
	for end := time.Now().Add(20 * time.Second); f.entries()[audit.ApprovalPrompted] == 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("never prompted")
		}
	}
	f.phone.answer.Store(int64(approval.PollAnswered))
	wg.Wait()
	for _, a := range answers {
		if a.Decision != policy.Allow || a.DecisionID != answers[0].DecisionID {
			t.Errorf("got %s %s %v, want allow %s", a.DecisionID, a.Decision, a.Reasons, answers[0].DecisionID)
		}
	}
	n := f.entries()
	if f.phone.asked.Load() != 1 || n[audit.DecisionAllow] != 1 || n[audit.LeaseActive]-n[audit.LeaseRevoked] != 1 {
		t.Errorf("asked %d times; audit %v", f.phone.asked.Load(), n)
	}
}
