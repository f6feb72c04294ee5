package approval_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/writsec/writ/internal/approval"
	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/revocation"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/telemetry"
)

const day = 24 * time.Hour

func TestYesIsApprovedOnceAndRecorded(t *testing.T) {
	t.Parallel()
	inWorld(t, func(w *world) {
		w.idp.onPoll = script(pending(), pending(), answered("tokens"))
		p := w.start()
		defer p.stop()
		a := w.ask(5 * time.Minute)
		time.Sleep(time.Minute)
		got := w.want(a.ID, approval.Approved, "")
		if got.ACR != "phr" || !cmp.Equal(got.AMR, []string{"pin"}) {
			t.Errorf("evidence not kept: %q %q", got.ACR, got.AMR)
		}
		if d := got.ExpiresAt.Sub(w.idp.times("verify")[0].Truncate(time.Microsecond)); d != 2*time.Minute {
			t.Errorf("usable for %v, want the two minutes of the configuration", d)
		}
		if n := w.idp.count("start"); n != 1 {
			t.Errorf("%d prompts, want 1", n)
		}
		if !cmp.Equal(w.idp.discarded, []string{"tokens"}) {
			t.Errorf("discarded %q, want the tokens once", w.idp.discarded)
		}
		wantAudit(w, a.ID, audit.ApprovalOpened, audit.ApprovalAsking, audit.ApprovalPrompted, audit.ApprovalAnswered, audit.ApprovalApproved)
	})
}

func wantAudit(w *world, id string, kinds ...audit.Kind) {
	w.t.Helper()
	var got []audit.Kind
	err := w.store.View(w.ctx, func(tx *sqlstore.Tx) error {
		es, err := tx.Unsequenced(w.ctx, 10000)
		for _, e := range es {
			if e.Approval == id {
				got = append(got, e.Kind)
			}
		}
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	if d := cmp.Diff(kinds, got); d != "" {
		w.t.Errorf("audit entries (-want +got):\n%s", d)
	}
}

func TestIntervalCountsFromSending(t *testing.T) {
	t.Parallel()
	for _, held := range []time.Duration{0, 3 * time.Second, 30 * time.Second} {
		t.Run(held.String(), func(t *testing.T) {
			t.Parallel()
			inWorld(t, func(w *world) {
				w.idp.onPoll = func(ctx context.Context, _ int, _ string) approval.PollResult {
					if pause(ctx, held) != nil {
						return approval.PollResult{Outcome: approval.PollUnreachable}
					}
					return pending()
				}
				p := w.start()
				defer p.stop()
				w.ask(10 * time.Minute)
				time.Sleep(5 * time.Minute)
				polls := w.idp.times("poll")
				least := max(5*time.Second, held)
				for _, g := range append(gaps(polls), polls[0].Sub(w.idp.times("start")[0])) {
					if g < 5*time.Second {
						t.Errorf("polls %v apart, want at least 5s", g)
					}
					if g > least+1500*time.Millisecond {
						t.Errorf("polls %v apart, want about %v", g, least)
					}
				}
				if len(w.idp.overlaps) > 0 {
					t.Error("polls overlap")
				}
			})
		})
	}
}

// Negative test 14: slow_down twice from 2 s, then a restart.
func TestSlowDownIsKeptAcrossRestarts(t *testing.T) {
	t.Parallel()
	inWorld(t, func(w *world) {
		w.idp.onStart = func(context.Context, int, approval.StartRequest) approval.StartResult {
			return started("req", day, 2*time.Second)
		}
		slow := approval.PollResult{Outcome: approval.PollSlowDown}
		w.idp.onPoll = script(slow, slow, pending())
		p := w.start()
		w.ask(10 * time.Minute)
		time.Sleep(20 * time.Second) // polls at about 2, 9 and 21 s
		p = w.restart(p)
		defer p.stop()
		time.Sleep(2 * time.Minute)
		g := gaps(w.idp.times("poll"))
		if g[0] < 7*time.Second {
			t.Errorf("%v after the first slow_down, want 7s", g[0])
		}
		for _, d := range g[1:] {
			if d < 12*time.Second {
				t.Errorf("%v after the second slow_down, want 12s", d)
			}
		}
		if len(g) < 8 {
			t.Errorf("only %d polls", len(g)+1)
		}
	})
}

func TestSlowDownWithAnIntervalOfItsOwn(t *testing.T) {
	t.Parallel()
	inWorld(t, func(w *world) {
		w.idp.onPoll = script(approval.PollResult{Outcome: approval.PollSlowDown, Interval: 30 * time.Second}, pending())
		p := w.start()
		defer p.stop()
		w.ask(10 * time.Minute)
		time.Sleep(3 * time.Minute)
		for _, d := range gaps(w.idp.times("poll")) {
			if d < 30*time.Second {
				t.Errorf("polls %v apart, want 30s", d)
			}
		}
	})
}

// Negative test 15, and the same across a restart, where the wait was once cut to
// the interval.
func TestRetryAfterOfAPollIsObeyed(t *testing.T) {
	t.Parallel()
	for name, restart := range map[string]bool{"running": false, "restarted": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inWorld(t, func(w *world) {
				w.idp.onPoll = script(approval.PollResult{Outcome: approval.PollUnreachable, RetryAfter: 20 * time.Second}, pending())
				p := w.start()
				w.ask(10 * time.Minute)
				time.Sleep(8 * time.Second)
				if w.idp.count("poll") != 1 {
					t.Fatalf("%d polls, want 1", w.idp.count("poll"))
				}
				if restart {
					p = w.restart(p)
				}
				defer p.stop()
				time.Sleep(time.Minute)
				if g := gaps(w.idp.times("poll"))[0]; g < 20*time.Second || g > 22*time.Second {
					t.Errorf("polled again after %v, want 20s", g)
				}
			})
		})
	}
}

func TestAnIntervalOfNothingIsASecond(t *testing.T) {
	t.Parallel()
	inWorld(t, func(w *world) {
		w.idp.onStart = func(context.Context, int, approval.StartRequest) approval.StartResult { return started("req", day, 0) }
		p := w.start()
		defer p.stop()
		w.ask(time.Minute)
		time.Sleep(30 * time.Second)
		for _, d := range gaps(w.idp.times("poll")) {
			if d < time.Second {
				t.Errorf("polls %v apart", d)
			}
		}
	})
}

// Negative test 30: the deadline bounds a huge interval.
func TestHugeIntervalEndsAtTheDeadline(t *testing.T) {
	t.Parallel()
	inWorld(t, func(w *world) {
		w.idp.onStart = func(context.Context, int, approval.StartRequest) approval.StartResult {
			return started("req", day, 1<<31*time.Second)
		}
		p := w.start()
		defer p.stop()
		a := w.ask(5 * time.Minute)
		time.Sleep(5*time.Minute + 2*time.Second)
		w.want(a.ID, approval.Expired, "")
		if n := w.idp.count("poll"); n != 0 {
			t.Errorf("%d polls before the interval was over", n)
		}
	})
}

func TestStartOutcomes(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		result approval.StartResult
		state  approval.State
		reason string
	}{
		{"unknown user", approval.StartResult{Outcome: approval.StartRefused, Reason: "unknown_user_id"}, approval.Failed, "unknown_user_id"},
		{"bad client", approval.StartResult{Outcome: approval.StartRefused, Reason: "invalid_client"}, approval.Failed, "invalid_client"},
		{"unclear", approval.StartResult{Outcome: approval.StartUnclear, Reason: "status_502"}, approval.StartUnknown, "status_502"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			inWorld(t, func(w *world) {
				w.idp.onStart = func(context.Context, int, approval.StartRequest) approval.StartResult { return c.result }
				p := w.start()
				a := w.ask(5 * time.Minute)
				time.Sleep(time.Minute)
				p = w.restart(p)
				defer p.stop()
				time.Sleep(2 * time.Minute)
				w.want(a.ID, c.state, c.reason)
				if s, n := w.idp.count("start"), w.idp.count("poll"); s != 1 || n != 0 {
					t.Errorf("%d starts and %d polls, want 1 and 0", s, n)
				}
				wantAudit(w, a.ID, audit.ApprovalOpened, audit.ApprovalAsking, audit.ApprovalClosed)
			})
		})
	}
}

func TestProviderThatTakesNothingIsTriedUntilTheDeadline(t *testing.T) {
	t.Parallel()
	inWorld(t, func(w *world) {
		w.idp.onStart = func(context.Context, int, approval.StartRequest) approval.StartResult {
			return approval.StartResult{Outcome: approval.StartLater, RetryAfter: 20 * time.Second}
		}
		p := w.start()
		a := w.ask(5 * time.Minute)
		time.Sleep(2 * time.Minute)
		w.want(a.ID, approval.Created, "")
		p = w.restart(p)
		defer p.stop()
		time.Sleep(3*time.Minute + 2*time.Second)
		w.want(a.ID, approval.Failed, "the provider could not be reached")
		starts := w.idp.times("start")
		for _, d := range gaps(starts) {
			if d < 20*time.Second {
				t.Errorf("tried again after %v, want 20s", d)
			}
		}
		if len(starts) < 4 {
			t.Errorf("tried only %d times", len(starts))
		}
	})
}

func TestProviderThatRecoversGetsOnePrompt(t *testing.T) {
	t.Parallel()
	inWorld(t, func(w *world) {
		w.idp.onStart = func(_ context.Context, n int, r approval.StartRequest) approval.StartResult {
			if n < 4 {
				return approval.StartResult{Outcome: approval.StartLater}
			}
			if r.ExpiresIn >= 5*time.Minute {
				t.Errorf("asked for %v although some of the five minutes are over", r.ExpiresIn)
			}
			return started("req", day, 5*time.Second)
		}
		w.idp.onPoll = script(answered("tokens"))
		p := w.start()
		defer p.stop()
		a := w.ask(5 * time.Minute)
		time.Sleep(time.Minute)
		w.want(a.ID, approval.Approved, "")
	})
}

func TestPollOutcomes(t *testing.T) {
	t.Parallel()
	lost := approval.PollResult{Outcome: approval.PollUnreachable}
	unknown := approval.PollResult{Outcome: approval.PollUnknown}
	for _, c := range []struct {
		name   string
		polls  []approval.PollResult
		state  approval.State
		reason string
	}{
		{"denied", []approval.PollResult{pending(), {Outcome: approval.PollDenied}}, approval.Denied, ""},
		{"expired", []approval.PollResult{{Outcome: approval.PollExpired}}, approval.Expired, ""},
		{"transaction_failed", []approval.PollResult{{Outcome: approval.PollFailed, Reason: "transaction_failed"}}, approval.Failed, "transaction_failed"},
		{"unauthorized_client", []approval.PollResult{{Outcome: approval.PollFailed, Reason: "unauthorized_client"}}, approval.Failed, "unauthorized_client"},
		{"invalid_grant", []approval.PollResult{pending(), unknown}, approval.Failed, "invalid_grant"},
		{"invalid_grant after a lost poll", []approval.PollResult{lost, unknown}, approval.OutcomeLost, "interrupted while the provider answered"},
		{"invalid_grant long after a lost poll", []approval.PollResult{lost, pending(), unknown}, approval.Failed, "invalid_grant"},
		{"never reached", []approval.PollResult{lost}, approval.Failed, "the provider could not be reached"},
		{"nobody answers", []approval.PollResult{pending()}, approval.Expired, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			inWorld(t, func(w *world) {
				w.idp.onPoll = script(c.polls...)
				p := w.start()
				defer p.stop()
				a := w.ask(5 * time.Minute)
				time.Sleep(5*time.Minute + 2*time.Second)
				w.want(a.ID, c.state, c.reason)
				polls := w.idp.count("poll")
				time.Sleep(2 * time.Minute)
				if n := w.idp.count("poll"); n != polls {
					t.Errorf("%d polls after the end", n-polls)
				}
				if last := w.idp.times("poll")[polls-1]; !last.Before(a.ExpiresAt) {
					t.Errorf("polled %v after the deadline", last.Sub(a.ExpiresAt))
				}
				if n := w.idp.count("start"); n != 1 {
					t.Errorf("%d prompts", n)
				}
				wantAudit(w, a.ID, audit.ApprovalOpened, audit.ApprovalAsking, audit.ApprovalPrompted, audit.ApprovalClosed)
			})
		})
	}
}

func TestProvidersShorterLifeCounts(t *testing.T) {
	t.Parallel()
	inWorld(t, func(w *world) {
		w.idp.onStart = func(context.Context, int, approval.StartRequest) approval.StartResult {
			return started("req", 30*time.Second, 5*time.Second)
		}
		p := w.start()
		defer p.stop()
		a := w.ask(5 * time.Minute)
		time.Sleep(33 * time.Second)
		w.want(a.ID, approval.Expired, "")
	})
}

func TestKeysAwayWhileVerifying(t *testing.T) {
	t.Parallel()
	t.Run("for a while", func(t *testing.T) {
		t.Parallel()
		inWorld(t, func(w *world) {
			w.idp.onPoll = script(answered("tokens"))
			w.idp.onVerify = func(n int, _ []byte, _ approval.Expectation) (approval.Evidence, error) {
				if n < 4 {
					return approval.Evidence{}, fmt.Errorf("%w: down", approval.ErrUnavailable)
				}
				return yes, nil
			}
			p := w.start()
			a := w.ask(5 * time.Minute)
			time.Sleep(7 * time.Second)
			w.want(a.ID, approval.Redeemed, "")
			p = w.restart(p)
			defer p.stop()
			time.Sleep(30 * time.Second)
			w.want(a.ID, approval.Approved, "")
			if len(w.idp.discarded) != 1 || w.idp.count("poll") != 1 {
				t.Errorf("discarded %q after %d polls", w.idp.discarded, w.idp.count("poll"))
			}
			// Nobody uses it. That once ended as "could not be reached".
			time.Sleep(3 * time.Minute)
			w.want(a.ID, approval.Expired, "")
		})
	})
	// The tokens once stayed good, and the reason was answer_invalid.
	t.Run("until the deadline", func(t *testing.T) {
		t.Parallel()
		inWorld(t, func(w *world) {
			w.idp.onPoll = script(answered("tokens"))
			w.idp.onVerify = func(int, []byte, approval.Expectation) (approval.Evidence, error) {
				return approval.Evidence{}, approval.ErrUnavailable
			}
			p := w.start()
			defer p.stop()
			a := w.ask(5 * time.Minute)
			time.Sleep(5*time.Minute + 2*time.Second)
			w.want(a.ID, approval.Failed, "the provider could not be reached")
			if len(w.idp.discarded) != 1 {
				t.Errorf("discarded %q, want the tokens once", w.idp.discarded)
			}
		})
	})
}

// Negative tests 22, 23 and 29 as the engine sees them; package ciba has the rest.
func TestRefusedAnswerFails(t *testing.T) {
	t.Parallel()
	inWorld(t, func(w *world) {
		w.idp.onPoll = script(answered("tokens"))
		var want approval.Expectation
		w.idp.onVerify = func(_ int, _ []byte, x approval.Expectation) (approval.Evidence, error) {
			want = x
			return yes, errors.New("somebody else answered than was asked")
		}
		p := w.start()
		defer p.stop()
		a := w.ask(5 * time.Minute)
		time.Sleep(time.Minute)
		w.want(a.ID, approval.Failed, "answer_invalid")
		if want.Subject != "alice" || !cmp.Equal(want.ACRValues, []string{"phr"}) || want.AuthReqID != "req-1" ||
			!want.NotBefore.Equal(w.idp.times("start")[0].Truncate(time.Microsecond)) {
			t.Errorf("verified against %+v", want)
		}
		if len(w.idp.discarded) != 1 || w.idp.count("verify") != 1 {
			t.Errorf("discarded %q after %d verifications", w.idp.discarded, w.idp.count("verify"))
		}
	})
}

// Negative test 33: a yes that arrives after the agent, or the end of the session,
// took the question back.
func TestLateYesIsRefused(t *testing.T) {
	t.Parallel()
	ends := map[string]func(w *world, p *process, id string){
		"withdrawn": func(w *world, p *process, id string) {
			if _, err := p.engine.Withdraw(w.ctx, id, caller); err != nil {
				t.Error(err)
			}
		},
		"session ended": func(w *world, _ *process, _ string) {
			r := revocation.Revoker{Store: sqlstore.For[revocation.Tx](w.store), Metrics: telemetry.NewMetrics()}
			if _, err := r.EndSession(w.ctx, caller, w.session.ID); err != nil {
				t.Error(err)
			}
		},
	}
	for name, end := range ends {
		for _, during := range []string{"poll", "verify"} {
			t.Run(name+" during "+during, func(t *testing.T) {
				t.Parallel()
				inWorld(t, func(w *world) {
					hold := func(what string) {
						if what == during {
							time.Sleep(10 * time.Second)
						}
					}
					w.idp.onPoll = func(context.Context, int, string) approval.PollResult {
						hold("poll")
						return answered("tokens")
					}
					w.idp.onVerify = func(int, []byte, approval.Expectation) (approval.Evidence, error) {
						hold("verify")
						return yes, nil
					}
					p := w.start()
					defer p.stop()
					a := w.ask(5 * time.Minute)
					time.Sleep(8 * time.Second)
					if w.idp.count(during) != 1 {
						t.Fatalf("no %s in flight", during)
					}
					end(w, p, a.ID)
					time.Sleep(5 * time.Minute)
					if got := w.get(a.ID); got.State != approval.Cancelled || got.Answer != nil || got.AuthReqID != "" {
						t.Errorf("approval is %s with answer %q", got.State, got.Answer)
					}
					if !cmp.Equal(w.idp.discarded, []string{"tokens"}) {
						t.Errorf("discarded %q, want the tokens", w.idp.discarded)
					}
				})
			})
		}
	}
}

// Negative test 33: a yes that arrives, or can be verified, only after the deadline.
func TestYesAfterTheDeadline(t *testing.T) {
	t.Parallel()
	for _, late := range []string{"poll", "verify"} {
		t.Run(late, func(t *testing.T) {
			t.Parallel()
			inWorld(t, func(w *world) {
				hold := func(what string) {
					if what == late {
						time.Sleep(10 * time.Second)
					}
				}
				w.idp.onPoll = func(context.Context, int, string) approval.PollResult {
					hold("poll")
					return answered("tokens")
				}
				w.idp.onVerify = func(int, []byte, approval.Expectation) (approval.Evidence, error) {
					hold("verify")
					return yes, nil
				}
				p := w.start()
				defer p.stop()
				a := w.ask(10 * time.Second)
				time.Sleep(30 * time.Second)
				w.want(a.ID, approval.Expired, "")
				if !cmp.Equal(w.idp.discarded, []string{"tokens"}) {
					t.Errorf("discarded %q, want the tokens", w.idp.discarded)
				}
			})
		})
	}
}

// Negative tests 17 to 20: a process that dies at each point, and what the next one
// makes of what it left.
func TestKilledAtEachPoint(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, point string
		nth         int // the how-manieth time that the point is reached
		state       approval.State
		starts      int
	}{
		{"before the start", "begun", 1, approval.StartUnknown, 0},
		{"after the start", "started", 1, approval.StartUnknown, 1},
		{"before a poll", "begun", 2, approval.Approved, 1},
		{"after a pending poll", "polled", 1, approval.Approved, 1},
		{"after the poll with the answer", "polled", 2, approval.OutcomeLost, 1},
		{"after redeeming", "redeemed", 1, approval.Approved, 1},
		{"after verifying", "verified", 1, approval.Approved, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			inWorld(t, func(w *world) {
				given := false
				w.idp.onPoll = func(_ context.Context, n int, _ string) approval.PollResult {
					switch {
					case n == 1:
						return pending()
					case !given: // the provider answers once
						given = true
						return answered("tokens")
					}
					return approval.PollResult{Outcome: approval.PollUnknown}
				}
				p := w.newProcess()
				reached := 0
				p.engine.Crash(func(point string) bool {
					if point == c.point {
						reached++
					}
					if reached >= c.nth {
						p.dead.Store(true)
					}
					return p.dead.Load()
				})
				p.run()
				a := w.ask(5 * time.Minute)
				time.Sleep(20 * time.Second)
				if !p.dead.Load() {
					t.Fatal("the point was not reached")
				}
				p = w.restart(p)
				defer p.stop()
				time.Sleep(40 * time.Second)
				if got := w.get(a.ID); got.State != c.state {
					t.Errorf("approval is %s (%q), want %s", got.State, got.Reason, c.state)
				}
				if n := w.idp.count("start"); n != c.starts {
					t.Errorf("%d prompts, want %d", n, c.starts)
				}
				for _, g := range gaps(w.idp.times("poll")) {
					if g < 5*time.Second {
						t.Errorf("polls %v apart", g)
					}
				}
			})
		})
	}
}

// A worker that loses the store, but not its life, takes the prompt up again.
func TestClaimRunsOutWithoutARestart(t *testing.T) {
	t.Parallel()
	inWorld(t, func(w *world) {
		first := w.newProcess()
		var once sync.Once
		first.engine.Crash(func(point string) (crash bool) {
			if point == "polled" {
				once.Do(func() { crash = true })
			}
			return crash
		})
		w.idp.onPoll = script(pending(), answered("tokens"))
		a := w.ask(10 * time.Minute)
		first.run()
		time.Sleep(6 * time.Second)
		time.Sleep(55 * time.Second) // under the 60 s of the claim
		if n := w.idp.count("poll"); n != 1 {
			t.Fatalf("%d polls while one may be in flight", n)
		}
		time.Sleep(10 * time.Second)
		w.want(a.ID, approval.Approved, "")
		first.stop()
	})
}

// Negative test 16.
func TestTwoEnginesNeverPollOnePromptAtOnce(t *testing.T) {
	t.Parallel()
	inWorld(t, func(w *world) {
		const prompts = 100
		var mu sync.Mutex
		polls, answers := map[string]int{}, map[string]int{}
		w.idp.onPoll = func(ctx context.Context, _ int, id string) approval.PollResult {
			_ = pause(ctx, 7*time.Second) // longer than the interval
			mu.Lock()
			defer mu.Unlock()
			if polls[id]++; polls[id] < 3 {
				return pending()
			}
			answers[id]++
			return answered(id)
		}
		p, q := w.start(), w.start()
		defer p.stop()
		defer q.stop()
		var ids []string
		for range prompts {
			ids = append(ids, w.ask(5*time.Minute).ID)
		}
		time.Sleep(100 * time.Second)
		for _, id := range ids {
			w.want(id, approval.Approved, "")
		}
		mu.Lock()
		defer mu.Unlock()
		for id, n := range answers {
			if n != 1 {
				t.Errorf("%s redeemed %d times", id, n)
			}
		}
		if len(w.idp.overlaps) > 0 || w.idp.count("start") != prompts || w.idp.count("verify") != prompts {
			t.Errorf("%d overlapping polls, %d starts, %d verifications", len(w.idp.overlaps), w.idp.count("start"), w.idp.count("verify"))
		}
	})
}

// Eight workers once waited for eight held polls while everyone else's prompt grew
// old.
func TestHeldPollsDoNotDelayOthers(t *testing.T) {
	t.Parallel()
	inWorld(t, func(w *world) {
		w.idp.onPoll = func(ctx context.Context, _ int, id string) approval.PollResult {
			if id == "req-51" {
				return answered("tokens")
			}
			<-ctx.Done()
			return approval.PollResult{Outcome: approval.PollUnreachable}
		}
		p := w.start()
		defer p.stop()
		for range 50 {
			w.ask(time.Hour)
		}
		time.Sleep(10 * time.Second)
		a := w.ask(time.Hour)
		time.Sleep(8 * time.Second)
		w.want(a.ID, approval.Approved, "")
	})
}

func TestStopKeepsAnAnswerOnItsWay(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		takes time.Duration
		state approval.State // when the engine has stopped
		after approval.State // of a provider that answers once, when another engine ran
	}{
		{"within the grace", 3 * time.Second, approval.Approved, approval.Approved},
		{"after the grace", 20 * time.Second, approval.Pending, approval.OutcomeLost},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			inWorld(t, func(w *world) {
				w.idp.onPoll = func(ctx context.Context, n int, _ string) approval.PollResult {
					if n > 1 {
						return approval.PollResult{Outcome: approval.PollUnknown}
					}
					if pause(ctx, c.takes) != nil {
						return approval.PollResult{Outcome: approval.PollUnreachable}
					}
					return answered("tokens")
				}
				p := w.start()
				a := w.ask(5 * time.Minute)
				time.Sleep(6 * time.Second)
				begin := time.Now()
				p.stop()
				if d := time.Since(begin); d > 6*time.Second {
					t.Errorf("stopping took %v", d)
				}
				w.want(a.ID, c.state, "")
				p = w.start()
				defer p.stop()
				time.Sleep(30 * time.Second)
				if got := w.get(a.ID); got.State != c.after {
					t.Errorf("approval is %s, want %s", got.State, c.after)
				}
			})
		})
	}
}

func TestProviderTakenOutOfTheConfiguration(t *testing.T) {
	t.Parallel()
	inWorld(t, func(w *world) {
		a := w.ask(5 * time.Minute)
		e := approval.NewEngine(approval.Config{
			Store: sqlstore.For[approval.Tx](w.store), Metrics: telemetry.NewMetrics(), Logger: quiet,
		})
		if more, err := e.Step(w.ctx); !more || err != nil {
			t.Fatal(more, err)
		}
		w.want(a.ID, approval.Failed, "the provider is not configured any more")
		if more, err := e.Step(w.ctx); more || err != nil {
			t.Error("there is more to do:", more, err)
		}
	})
}

func TestWait(t *testing.T) {
	t.Parallel()
	wait := func(w *world, p *process, id string, d time.Duration) (<-chan approval.Approval, func() time.Duration) {
		out, begin := make(chan approval.Approval, 1), time.Now()
		var took time.Duration
		go func() {
			a, err := p.engine.Wait(w.ctx, id, caller, d)
			if err != nil {
				t.Error(err)
			}
			took = time.Since(begin)
			out <- a
		}()
		return out, func() time.Duration { return took }
	}
	t.Run("wakes at once", func(t *testing.T) {
		t.Parallel()
		inWorld(t, func(w *world) {
			w.idp.onPoll = script(answered("tokens"))
			p := w.start()
			defer p.stop()
			a := w.ask(5 * time.Minute)
			got, _ := wait(w, p, a.ID, 5*time.Minute)
			if s := (<-got).State; s != approval.Approved {
				t.Errorf("returned %s", s)
			}
			if d := time.Since(w.idp.times("verify")[0]); d != 0 {
				t.Errorf("woken %v after the commit", d)
			}
		})
	})
	t.Run("is woken by another engine", func(t *testing.T) {
		t.Parallel()
		inWorld(t, func(w *world) {
			p := w.newProcess()
			a := w.ask(5 * time.Minute)
			got, took := wait(w, p, a.ID, time.Minute)
			time.Sleep(10 * time.Second)
			if _, err := w.newProcess().engine.Withdraw(w.ctx, a.ID, caller); err != nil {
				t.Error(err)
			}
			if s := (<-got).State; s != approval.Cancelled || took() != 10*time.Second {
				t.Errorf("returned %s after %v", s, took())
			}
		})
	})
	t.Run("gives up", func(t *testing.T) {
		t.Parallel()
		inWorld(t, func(w *world) {
			p := w.newProcess()
			got, took := wait(w, p, w.ask(5*time.Minute).ID, 30*time.Second)
			if a := <-got; !a.Open() || took() != 30*time.Second {
				t.Errorf("returned %s after %v", a.State, took())
			}
		})
	})
	t.Run("lets go when Writ stops", func(t *testing.T) {
		t.Parallel()
		inWorld(t, func(w *world) {
			p := w.newProcess()
			got, took := wait(w, p, w.ask(5*time.Minute).ID, time.Minute)
			time.Sleep(time.Second)
			close(p.stopping)
			if a := <-got; !a.Open() || took() != time.Second {
				t.Errorf("returned %s after %v", a.State, took())
			}
		})
	})
	t.Run("ends with its request", func(t *testing.T) {
		t.Parallel()
		inWorld(t, func(w *world) {
			a := w.ask(5 * time.Minute)
			ctx, cancel := context.WithTimeout(w.ctx, time.Second)
			defer cancel()
			if _, err := w.newProcess().engine.Wait(ctx, a.ID, caller, time.Minute); !errors.Is(err, context.DeadlineExceeded) {
				t.Error(err)
			}
		})
	})
	t.Run("shows nobody else's", func(t *testing.T) {
		t.Parallel()
		inWorld(t, func(w *world) {
			a, e := w.ask(5*time.Minute), w.newProcess().engine
			bob := identity.Principal{Ref: identity.Ref{Issuer: issuer, ID: "bob"}}
			for _, c := range []identity.Caller{
				{Agent: bob}, {Agent: agent, User: &bob},
				{Agent: identity.Principal{Ref: identity.Ref{Issuer: "https://other.example", ID: agent.ID}}},
			} {
				if _, err := e.Wait(w.ctx, a.ID, c, 0); !fault.Is(err, fault.NotFound) {
					t.Errorf("Wait for %v: %v", c, err)
				}
				if _, err := e.Withdraw(w.ctx, a.ID, c); !fault.Is(err, fault.NotFound) {
					t.Errorf("Withdraw for %v: %v", c, err)
				}
			}
			if _, err := e.Wait(w.ctx, "apr_nonsense", caller, 0); !fault.Is(err, fault.NotFound) {
				t.Error(err)
			}
			if _, err := e.Wait(w.ctx, a.ID, identity.Caller{Agent: agent}, 0); err != nil {
				t.Errorf("the agent alone: %v", err)
			}
		})
	})
}

func TestWithdraw(t *testing.T) {
	t.Parallel()
	inWorld(t, func(w *world) {
		w.idp.onPoll = script(answered("tokens"))
		p := w.start()
		defer p.stop()
		withdraw := func(id string, want approval.State) {
			t.Helper()
			a, err := p.engine.Withdraw(w.ctx, id, caller)
			if err != nil || a.State != want {
				t.Errorf("withdrawing: %s, %v; want %s", a.State, err, want)
			}
		}
		first := w.ask(5 * time.Minute)
		synctest.Wait() // until the provider has taken it
		withdraw(first.ID, approval.Cancelled)
		withdraw(first.ID, approval.Cancelled) // again: nothing changes
		wantAudit(w, first.ID, audit.ApprovalOpened, audit.ApprovalAsking, audit.ApprovalPrompted, audit.ApprovalClosed)

		unused := w.ask(5 * time.Minute)
		time.Sleep(10 * time.Second)
		w.want(unused.ID, approval.Approved, "")
		withdraw(unused.ID, approval.Cancelled)

		used := w.ask(5 * time.Minute)
		time.Sleep(10 * time.Second)
		w.update(func(tx *sqlstore.Tx) error { return approval.Consume(w.ctx, tx, w.get(used.ID), "dec") })
		withdraw(used.ID, approval.Consumed)
	})
}

// Parallel withdrawals, polls and uses of one approval: exactly one of them is the
// last word.
func TestWithdrawRaces(t *testing.T) {
	t.Parallel()
	inWorld(t, func(w *world) {
		w.idp.onPoll = script(answered("tokens"))
		p := w.start()
		defer p.stop()
		for range 5 {
			a := w.ask(5 * time.Minute)
			var g sync.WaitGroup
			var mu sync.Mutex
			consumed := 0
			time.Sleep(5 * time.Second)
			for range 4 {
				g.Go(func() { _, _ = p.engine.Withdraw(w.ctx, a.ID, caller) })
				g.Go(func() {
					for range 15 {
						time.Sleep(50 * time.Millisecond)
						got := w.get(a.ID)
						if got.State != approval.Approved {
							continue
						}
						err := w.store.Update(w.ctx, func(tx *sqlstore.Tx) error { return approval.Consume(w.ctx, tx, got, "dec") })
						if err == nil {
							mu.Lock()
							consumed++
							mu.Unlock()
						} else if !errors.Is(err, approval.ErrStale) {
							t.Error(err)
						}
					}
				})
			}
			g.Wait()
			got := w.get(a.ID)
			if consumed > 1 || (consumed == 1) != (got.State == approval.Consumed) {
				t.Errorf("consumed %d times, and is %s", consumed, got.State)
			}
		}
	})
}

func TestConsume(t *testing.T) {
	t.Parallel()
	inWorld(t, func(w *world) {
		w.idp.onPoll = script(answered("tokens"))
		p := w.start()
		a, late := w.ask(5*time.Minute), w.ask(5*time.Minute)
		consume := func(a approval.Approval) error {
			return w.store.Update(w.ctx, func(tx *sqlstore.Tx) error { return approval.Consume(w.ctx, tx, a, "dec") })
		}
		if err := consume(a); !errors.Is(err, approval.ErrStale) {
			t.Errorf("consumed before it was approved: %v", err)
		}
		time.Sleep(10 * time.Second)
		p.stop() // so that nobody marks anything expired
		a, late = w.get(a.ID), w.get(late.ID)
		if err := consume(a); err != nil {
			t.Fatal(err)
		}
		if err := consume(a); !errors.Is(err, approval.ErrStale) {
			t.Errorf("consumed twice: %v", err)
		}
		wantAudit(w, a.ID, audit.ApprovalOpened, audit.ApprovalAsking, audit.ApprovalPrompted, audit.ApprovalAnswered, audit.ApprovalApproved, audit.ApprovalConsumed)
		time.Sleep(time.Until(late.ExpiresAt))
		if _, _, ok := late.Usable(time.Now(), late.IntentHash); ok {
			t.Error("usable at its deadline")
		}
		if err := consume(late); !errors.Is(err, approval.ErrStale) {
			t.Errorf("consumed at its deadline: %v", err)
		}
	})
}

func TestOpenJoinsAndIsBounded(t *testing.T) {
	t.Parallel()
	inWorld(t, func(w *world) {
		o := approval.Opening{
			Plan:    approval.Plan{Approver: "user", ApproverRef: alice.Ref, Code: "AAAA", ExpiresIn: time.Minute},
			Session: w.session.ID, User: alice.Ref, Agent: agent.Ref, IntentHash: "h1", MaxPending: 2,
		}
		first, err := w.open(o)
		if err != nil {
			t.Fatal(err)
		}
		o.Plan.Code = "BBBB"
		if again, err := w.open(o); err != nil || again.ID != first.ID || again.Code != "AAAA" {
			t.Errorf("not joined: %v %v", again, err)
		}
		o.IntentHash = "h2"
		if other, err := w.open(o); err != nil || other.ID == first.ID {
			t.Errorf("another act joined: %v", err)
		}
		o.IntentHash = "h3"
		if _, err := w.open(o); !fault.Is(err, fault.Overloaded) {
			t.Errorf("a third prompt to one person: %v", err)
		}
		o.Plan.ApproverRef.Issuer = "https://other.example" // another person of the same name
		if _, err := w.open(o); err != nil {
			t.Error(err)
		}
	})
}

func TestStopsWhileIdle(t *testing.T) {
	t.Parallel()
	inWorld(t, func(w *world) {
		p := w.start()
		time.Sleep(time.Minute)
		begin := time.Now()
		p.stop()
		if d := time.Since(begin); d != 0 {
			t.Errorf("stopping took %v", d)
		}
		synctest.Wait()
	})
}
