package e2e

import (
	"context"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/writsec/writ/test/idp"
)

// spoil queues a fault at the provider.
func (w *writ) spoil(f idp.Fault) {
	w.t.Helper()
	if err := w.idp.Fault(w.t.Context(), f); err != nil {
		w.t.Fatal(err)
	}
}

func (w *writ) hits(e idp.Endpoint) int {
	w.t.Helper()
	hits, err := w.idp.Hits(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	return hits[e]
}

func restartIdP(t *testing.T, p *idp.IdP) {
	t.Helper()
	if err := p.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestProviderTrouble(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]func(*testing.T, *writ, client){
		"slow_down": func(t *testing.T, w *writ, bob client) {
			w.spoil(idp.Fault{Endpoint: idp.PollEndpoint, Kind: idp.FaultSlowDown})
			answered := bob.hold(offboard(bob.open(), "e-slow"), 60)
			p := w.prompt("e-slow")
			w.polled(p, 1)
			w.answer(p, idp.Verdict{})
			wantHeld(t, answered, allow, "change_employment")
			polls := w.polls(p)
			// CIBA Core §11: at least five seconds more than before.
			if len(polls) != 2 || polls[1].GapMS < 6000 || polls[1].Outcome != "tokens" {
				t.Errorf("polls %+v", polls)
			}
		},
		"503 to a poll": func(t *testing.T, w *writ, bob client) {
			w.spoil(idp.Fault{Endpoint: idp.PollEndpoint, Kind: idp.FaultStatus, RetryAfter: "3"})
			answered := bob.hold(offboard(bob.open(), "e-busy-poll"), 60)
			p := w.prompt("e-busy-poll")
			w.polled(p, 1)
			w.answer(p, idp.Verdict{})
			wantHeld(t, answered, allow, "change_employment")
			if polls := w.polls(p); len(polls) != 2 || polls[1].GapMS < 3000 {
				t.Errorf("polls %+v", polls)
			}
		},
		"503 to a poll, then a crash": func(t *testing.T, w *writ, bob client) {
			w.spoil(idp.Fault{Endpoint: idp.PollEndpoint, Kind: idp.FaultStatus, RetryAfter: "5"})
			ask := offboard(bob.open(), "e-busy-crash")
			a := bob.must(requireCIBA, confirm, ask).Approval
			p := w.prompt("e-busy-crash")
			w.polled(p, 1)
			time.Sleep(300 * time.Millisecond) // until the answer is recorded
			w.kill()
			w.start()
			w.answer(p, idp.Verdict{})
			if got := bob.status(a, 30*time.Second); got.Status != "approved" {
				t.Errorf("status %+v", got)
			}
			if polls := w.polls(p); len(polls) != 2 || polls[1].GapMS < 5000 {
				t.Errorf("the provider said Retry-After: 5; polls %+v", polls)
			}
		},
		"503 to the request": func(t *testing.T, w *writ, bob client) {
			w.spoil(idp.Fault{Endpoint: idp.BackchannelEndpoint, Kind: idp.FaultStatus, RetryAfter: "2"})
			answered := bob.hold(offboard(bob.open(), "e-busy"), 60)
			p := w.prompt("e-busy")
			w.answer(p, idp.Verdict{})
			wantHeld(t, answered, allow, "change_employment")
			requests, err := w.idp.Requests(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if len(requests) != 2 || requests[1].Start.Sub(requests[0].Start) < 2*time.Second {
				t.Errorf("requests %+v", requests)
			}
		},
		// Whether the person was asked is unknown then, so that nobody is asked twice.
		"lost reply to the request": func(t *testing.T, w *writ, bob client) {
			w.spoil(idp.Fault{Endpoint: idp.BackchannelEndpoint, Kind: idp.FaultLostReply})
			answered := bob.hold(offboard(bob.open(), "e-lost"), 60)
			w.answer(w.prompt("e-lost"), idp.Verdict{})
			wantHeld(t, answered, deny, "approval_failed")
			if n := w.prompts("e-lost"); n != 1 {
				t.Errorf("%d prompts", n)
			}
		},
		// The tokens are gone with it.
		"lost reply to the poll": func(t *testing.T, w *writ, bob client) {
			answered := bob.hold(offboard(bob.open(), "e-lost-poll"), 60)
			p := w.prompt("e-lost-poll")
			w.spoil(idp.Fault{Endpoint: idp.PollEndpoint, Kind: idp.FaultLostReply})
			w.answer(p, idp.Verdict{})
			wantHeld(t, answered, deny, "approval_failed")
			w.polls(p)
		},
		"nonsense to a poll": func(t *testing.T, w *writ, bob client) {
			answered := bob.hold(offboard(bob.open(), "e-nonsense"), 60)
			p := w.prompt("e-nonsense")
			w.spoil(idp.Fault{Endpoint: idp.PollEndpoint, Kind: idp.FaultHTML})
			w.spoil(idp.Fault{Endpoint: idp.PollEndpoint, Kind: idp.FaultRedirect})
			w.polled(p, 2)
			w.answer(p, idp.Verdict{})
			wantHeld(t, answered, allow, "change_employment")
			w.polls(p)
			trapped, err := w.idp.Trapped(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if len(trapped) > 0 {
				t.Errorf("Writ followed a redirect with its secret: %+v", trapped)
			}
		},
		"down, then up": func(t *testing.T, w *writ, bob client) {
			ask := offboard(bob.open(), "e-down")
			w.idp.Stop()
			a := bob.must(requireCIBA, confirm, ask).Approval
			time.Sleep(500 * time.Millisecond)
			restartIdP(t, w.idp)
			w.answer(w.prompt("e-down"), idp.Verdict{})
			bob = w.as("bob", idp.HRAgent) // the provider's keys are new
			if got := bob.status(a, 30*time.Second); got.Status != "approved" {
				t.Fatalf("status %+v", got)
			}
			bob.must(allow, "change_employment", ask.approvedBy(a))
			if n := w.prompts("e-down"); n != 1 {
				t.Errorf("%d prompts", n)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := start(t, idp.Start(t, idp.Config{}))
			test(t, w, w.as("bob", idp.HRAgent))
		})
	}
}

// wantHeld fails unless a held call ends in this effect and reason.
func wantHeld(t *testing.T, answered <-chan held, effect, code string) {
	t.Helper()
	h := <-answered
	if h.err != nil {
		t.Fatal(h.err)
	}
	if a := read[answer](t, h.response, http.StatusOK); a.Decision != effect || a.Reasons[0].Code != code {
		t.Fatalf("got %s, want %s %s", h.body, effect, code)
	}
}

func TestIssuerDown(t *testing.T) {
	t.Parallel()
	p := idp.Start(t, idp.Config{})
	w := start(t, p)
	alice, more := w.as("alice", idp.SalesAgent), w.as("alice", idp.SalesAgent)
	session := alice.open()
	p.Stop()

	more.must(allow, "read_opportunity", readOpportunity(session)) // a token that Writ has not seen

	stranger := client{w, forged(t, p, "unknown")}
	began := time.Now()
	stranger.refused(stranger.call(http.MethodPost, "/decide", readOpportunity(session)), http.StatusUnauthorized, "invalid_token")
	if took := time.Since(began); took > 6*time.Second {
		t.Errorf("an unknown key was refused after %v", took)
	}
	alice.must(allow, "read_opportunity", readOpportunity(session)) // no harm done

	// Writ starts without its issuer, and refuses what it can't verify.
	w.stop()
	w.start()
	alice.refused(alice.call(http.MethodPost, "/decide", readOpportunity(session)), http.StatusUnauthorized, "invalid_token")
}

func TestIssuerUpAfterWrit(t *testing.T) {
	t.Parallel()
	p := idp.Start(t, idp.Config{})
	p.Stop()
	w := start(t, p)
	within(t, 10*time.Second, func() error {
		if w.logged("issuer keys not refreshed") == 0 {
			return fmt.Errorf("nothing in the log")
		}
		return nil
	})
	restartIdP(t, p)
	alice := w.as("alice", idp.SalesAgent)
	within(t, 40*time.Second, func() error { // at most 30 s between two fetches of the keys, and the time of one
		r := alice.call(http.MethodPost, "/sessions", map[string]any{})
		if r.status == http.StatusUnauthorized {
			time.Sleep(100 * time.Millisecond)
			return fmt.Errorf("still %s", r.body)
		}
		return nil
	})
	alice.must(allow, "read_opportunity", readOpportunity(alice.open()))
}

func TestKeyRotation(t *testing.T) {
	t.Parallel()
	p := idp.Start(t, idp.Config{})
	w := start(t, p)
	old := w.as("alice", idp.SalesAgent)
	session := old.open()

	restartIdP(t, p) // with new keys
	fresh := w.as("alice", idp.SalesAgent)
	fresh.must(allow, "read_opportunity", readOpportunity(session))
	if n := w.hits(idp.JWKSEndpoint); n != 1 {
		t.Errorf("%d fetches of the keys", n)
	}
	// The old key is not published any more.
	old.refused(old.call(http.MethodPost, "/decide", readOpportunity(session)), http.StatusUnauthorized, "invalid_token")

	// From here on strangers' tokens cause no fetch for 30 s.
	for i := range 20 {
		c := client{w, forged(t, p, fmt.Sprintf("unknown-%d", i))}
		c.refused(c.call(http.MethodPost, "/decide", readOpportunity(session)), http.StatusUnauthorized, "invalid_token")
	}
	if n := w.hits(idp.JWKSEndpoint); n != 1 {
		t.Errorf("%d fetches of the keys after 20 bad tokens", n)
	}
	fresh.must(allow, "read_opportunity", readOpportunity(session))
}

// The 30 s between two fetches are for strangers' tokens. What Writ itself asked for
// must not be lost to them: a yes signed with a key that is new since then is no
// reason to fail the approval.
func TestKeyRotationWhileStrangersKnock(t *testing.T) {
	t.Parallel()
	p := idp.Start(t, idp.Config{})
	w := start(t, p)
	bob := w.as("bob", idp.HRAgent)
	ask := offboard(bob.open(), "e-rotation")
	stranger := client{w, forged(t, p, "unknown")}
	stranger.refused(stranger.call(http.MethodPost, "/decide", ask), http.StatusUnauthorized, "invalid_token")

	restartIdP(t, p) // with new keys
	a := bob.must(requireCIBA, confirm, ask).Approval
	w.answer(w.prompt("e-rotation"), idp.Verdict{})
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Second)
	defer cancel()
	for ctx.Err() == nil {
		switch got := bob.status(a, 2*time.Second); got.Status {
		case "pending":
		case "approved":
			bob.must(allow, "change_employment", ask.approvedBy(a))
			return
		default:
			t.Fatalf("the person said yes, and the approval is %+v", got)
		}
	}
	// Still to be verified once a fetch is due: not lost, only late.
}
