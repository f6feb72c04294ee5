package approval_test

import (
	"context"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/writsec/writ/internal/approval"
	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/sqlstore"
)

// TestRandomHistories throws chance at the engine: providers that answer, deny,
// stall, lose replies and forget, people who take their time, agents that withdraw,
// one process that is killed at any moment and another beside it. Whatever happens,
// the rules of DESIGN.md (Approvals) hold.
func TestRandomHistories(t *testing.T) {
	t.Parallel()
	histories := 20
	if testing.Short() {
		histories = 10
	}
	for seed := range uint64(histories) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			inWorld(t, func(w *world) { newHistory(w, seed).play() })
		})
	}
}

// history is one run. Chance depends on the seed and on who rolls for the
// how-manieth time, not on the order of goroutines.
type history struct {
	*world
	seed uint64

	mu      sync.Mutex
	rolls   map[string]uint64
	prompts map[string]*prompt // by hint
	byID    map[string]*prompt // by auth_req_id
}

// prompt is what really happened to one prompt.
type prompt struct {
	approval approval.Approval
	started  bool // the provider may have shown it
	again    bool // it was asked a second time after that
	interval time.Duration
	decides  time.Time // when the person decides
	yes      bool
	given    bool // the provider gave the tokens out
	genuine  bool // they are of the person who was asked
	verified bool // and Writ was told so
	polled   time.Time
	hurried  time.Duration // the shortest wait below the interval, if any
}

func newHistory(w *world, seed uint64) *history {
	h := &history{world: w, seed: seed, rolls: map[string]uint64{}, prompts: map[string]*prompt{}, byID: map[string]*prompt{}}
	w.idp.onStart, w.idp.onPoll, w.idp.onVerify = h.start, h.poll, h.verify
	return h
}

func (h *history) roll(who string) *rand.Rand {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.rolls[who]++
	sum := fnv.New64a()
	_, _ = fmt.Fprint(sum, who, h.rolls[who])
	return rand.New(rand.NewPCG(h.seed, sum.Sum64()))
}

func seconds(r *rand.Rand, most int) time.Duration {
	return time.Duration(r.IntN(most*1000)) * time.Millisecond
}

func (h *history) play() {
	r := h.roll("driver")
	processes := []*process{h.world.start()}
	var last time.Time
	for i := range 5 {
		p := h.openPrompt(fmt.Sprint("prompt", i), 10*time.Second+seconds(r, 180))
		if p.approval.ExpiresAt.After(last) {
			last = p.approval.ExpiresAt
		}
		time.Sleep(seconds(r, 10))
	}
	for time.Now().Before(last) {
		time.Sleep(seconds(r, 30))
		switch r.IntN(6) {
		case 0, 1: // every process is killed, and one starts
			for _, p := range processes {
				p.kill()
			}
			processes = []*process{h.restart(processes[0])}
		case 2:
			if len(processes) < 3 {
				processes = append(processes, h.world.start())
			}
		case 3:
			id := h.prompts[fmt.Sprint("prompt", r.IntN(5))].approval.ID
			if _, err := processes[0].engine.Withdraw(h.ctx, id, identity.Caller{Agent: agent}); err != nil {
				h.t.Error(err)
			}
		}
	}
	time.Sleep(time.Until(last) + fakeTimeout + 10*time.Second) // a call may have been in flight
	for hint, p := range h.prompts {
		h.check(hint, p)
	}
	if len(h.idp.overlaps) > 0 {
		h.t.Errorf("overlapping polls of %q", h.idp.overlaps)
	}
	for _, p := range processes {
		p.stop()
	}
}

func (h *history) openPrompt(hint string, life time.Duration) *prompt {
	h.mu.Lock()
	p := &prompt{}
	h.prompts[hint] = p
	h.mu.Unlock()
	a, err := h.open(approval.Opening{
		Plan:    approval.Plan{Approver: "user", ApproverRef: alice.Ref, Hint: hint, Code: "CODE", ExpiresIn: life},
		Session: h.session.ID, User: alice.Ref, Agent: agent.Ref, IntentHash: hint, MaxPending: 100,
	})
	if err != nil {
		h.t.Fatal(err)
	}
	h.mu.Lock()
	p.approval = a
	h.mu.Unlock()
	return p
}

func (h *history) start(ctx context.Context, _ int, r approval.StartRequest) approval.StartResult {
	chance := h.roll("start " + r.Hint)
	h.mu.Lock()
	p := h.prompts[r.Hint]
	p.again = p.again || p.started
	kind := chance.IntN(10)
	if kind > 1 {
		p.started = true
	}
	h.mu.Unlock()
	if kind < 2 {
		return approval.StartResult{Outcome: approval.StartLater, RetryAfter: seconds(chance, 20)}
	}
	if pause(ctx, seconds(chance, 8)) != nil || kind == 2 {
		return approval.StartResult{Outcome: approval.StartUnclear, Reason: "lost"}
	}
	if kind == 3 {
		return approval.StartResult{Outcome: approval.StartRefused, Reason: "unknown_user_id"}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	id := "req of " + r.Hint
	h.byID[id] = p
	p.interval = time.Second + seconds(chance, 6)
	p.decides, p.yes, p.genuine = time.Now().Add(seconds(chance, 90)), chance.IntN(4) > 0, chance.IntN(5) > 0
	return started(id, r.ExpiresIn+seconds(chance, 20)-10*time.Second, p.interval)
}

func (h *history) poll(ctx context.Context, _ int, id string) approval.PollResult {
	chance := h.roll("poll " + id)
	sent := time.Now()
	h.mu.Lock()
	p := h.byID[id]
	if wait := sent.Sub(p.polled); !p.polled.IsZero() && wait < p.interval {
		p.hurried = wait
	}
	p.polled = sent
	h.mu.Unlock()
	if chance.IntN(3) == 0 && pause(ctx, seconds(chance, 50)) != nil {
		return approval.PollResult{Outcome: approval.PollUnreachable}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	kind := chance.IntN(12)
	switch {
	case kind == 0:
		return approval.PollResult{Outcome: approval.PollUnreachable, RetryAfter: seconds(chance, 20)}
	case kind == 1:
		return approval.PollResult{Outcome: approval.PollSlowDown}
	case p.given:
		return approval.PollResult{Outcome: approval.PollUnknown}
	case time.Now().Before(p.decides):
		return pending()
	case !p.yes:
		return approval.PollResult{Outcome: approval.PollDenied}
	}
	p.given = true
	if kind == 2 { // the reply is lost
		return approval.PollResult{Outcome: approval.PollUnreachable}
	}
	return answered(id)
}

func (h *history) verify(_ int, answer []byte, want approval.Expectation) (approval.Evidence, error) {
	chance := h.roll("verify " + string(answer))
	if chance.IntN(3) == 0 {
		return approval.Evidence{}, approval.ErrUnavailable
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.byID[string(answer)]
	if want.AuthReqID != string(answer) {
		h.t.Errorf("an answer to %q is verified for %q", answer, want.AuthReqID)
	}
	if !p.genuine {
		return approval.Evidence{}, fmt.Errorf("somebody else answered than was asked")
	}
	p.verified = true
	return yes, nil
}

func (h *history) check(hint string, p *prompt) {
	t := h.t
	a := h.get(p.approval.ID)
	switch {
	case a.Open():
		t.Errorf("%s is still %s %v after its deadline", hint, a.State, time.Since(p.approval.ExpiresAt))
	case a.AuthReqID != "" || a.Answer != nil || a.Polling:
		t.Errorf("%s is %s and still holds what the provider sent", hint, a.State)
	}
	if p.again {
		t.Errorf("%s was put to the person twice", hint)
	}
	if p.hurried > 0 {
		t.Errorf("%s was polled after %v, its interval is %v", hint, p.hurried, p.interval)
	}
	kinds := h.auditOf(a.ID)
	approved := strings.Count(kinds, string(audit.ApprovalApproved))
	if approved > 0 && (!p.verified || !p.yes || !p.genuine) {
		t.Errorf("%s was approved without a verified yes: %+v", hint, p)
	}
	ends := strings.Count(kinds, string(audit.ApprovalClosed))
	if approved > 1 || ends > 1 || ends == 0 && a.State != approval.Approved {
		t.Errorf("%s is %s with the record %s", hint, a.State, kinds)
	}
	if a.State == approval.Approved && approved != 1 {
		t.Errorf("%s is approved without a record of it: %s", hint, kinds)
	}
}

func (h *history) auditOf(id string) string {
	var kinds []string
	err := h.store.View(h.ctx, func(tx *sqlstore.Tx) error {
		es, err := tx.Unsequenced(h.ctx, 10000)
		for _, e := range es {
			if e.Approval == id {
				kinds = append(kinds, string(e.Kind))
			}
		}
		return err
	})
	if err != nil {
		h.t.Error(err)
	}
	return strings.Join(kinds, " ")
}
