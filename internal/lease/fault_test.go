package lease_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/writsec/writ/internal/intent"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/minter"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/storetest"
)

// pick is the number for the form of a fault test: the long one is for WRIT_CHAOS=full.
func pick(short, long int) int {
	if os.Getenv("WRIT_CHAOS") == "full" {
		return long
	}
	return short
}

// Nothing can be recorded any more. What has ended by then ends at the target too, and
// is recorded once that can be done; what had not ended is good for nothing after its
// time.
func TestFault10EndsGoOnWithoutARecord(t *testing.T) {
	inWorld(t, func(w *world) {
		db := newTarget()
		stop := w.work(map[string]lease.Target{"db": db})
		defer stop()
		open := w.lent(db, outside("db", time.Minute))
		var ended []lease.Lease
		for range pick(50, 1000) {
			ended = append(ended, w.lent(db, outside("db", time.Hour)))
		}
		db.set(func() { db.down = true })
		for _, l := range ended {
			w.end(l, lease.EndReleased)
		}
		mend := storetest.Break(t, w.url, "audit")

		begun := w.store.Update(w.ctx, func(tx *sqlstore.Tx) error {
			l := lease.New(outside("db", time.Minute), w.s.ID, w.s.EndsAt, "dec", "rev", intent.Act{User: user.Ref, Agent: agent.Ref}, "h", tx.Now())
			return lease.Begin(w.ctx, tx, l, w.s.StartedAt, lease.Limits{})
		})
		if begun == nil {
			t.Error("a lease was begun that nothing records")
		}
		db.set(func() { db.down = false })
		for back := time.Now(); db.count() > 1 && time.Since(back) < 2*time.Minute; {
			time.Sleep(time.Second)
		}
		if n := db.count(); n != 1 { // the open one
			t.Errorf("%d credentials at the target", n)
		}
		for _, l := range ended {
			w.wantState(l.ID, lease.Revoking) // so it is not called gone
		}
		err := w.store.Update(w.ctx, func(tx *sqlstore.Tx) error {
			_, err := lease.EndOne(w.ctx, tx, open, lease.End{Reason: lease.EndReleased})
			return err
		})
		if err == nil {
			t.Error("a lease was ended that nothing records")
		}
		time.Sleep(time.Minute)
		if l := w.wantState(open.ID, lease.Active); l.Alive(time.Now()) {
			t.Error("it is good after its time")
		}

		mend()
		w.expire()
		time.Sleep(time.Minute)
		for _, l := range append(ended, open) {
			w.wantState(l.ID, lease.Revoked)
		}
		gone := map[string]int{}
		w.in(func(tx *sqlstore.Tx) error {
			es, err := tx.Unsequenced(w.ctx, 100_000)
			for _, e := range es {
				if e.Kind == "lease.revoked" {
					gone[e.Lease]++
				}
			}
			return err
		})
		for _, l := range append(ended, open) {
			if gone[l.ID] != 1 {
				t.Errorf("%d entries of the end of %s", gone[l.ID], l.ID)
			}
		}
		if db.count() != 0 {
			t.Errorf("%d credentials at the target", db.count())
		}
	})
}

// saas is an authorization server that fails in every way, and knows what it issued.
type saas struct {
	t  *testing.T
	mu sync.Mutex
	// tokens are all that it ever issued.
	tokens  map[string]*issued
	asked   map[string]int // requests for a token, by lease
	well    bool           // it has no trouble any more
	trouble map[string]int // what it had, by name
}

type issued struct {
	lease string
	until time.Time
	ended time.Time // when it was revoked
}

const saasTTL = time.Minute

func (t *issued) alive(now time.Time) bool { return t.ended.IsZero() && now.Before(t.until) }

// RoundTrip implements http.RoundTripper.
func (s *saas) RoundTrip(r *http.Request) (*http.Response, error) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	form, err := url.ParseQuery(string(body))
	if err != nil {
		return nil, err
	}
	var trouble string
	var status int
	var answer string
	switch r.URL.Path {
	case "/token":
		trouble = s.pick("500", "500 after success", "timeout", "timeout after success", "429")
		if trouble == "" || strings.HasSuffix(trouble, "success") {
			answer = s.issue(form.Get("assertion"))
		} else {
			s.ask(form.Get("assertion"))
		}
	case "/revoke":
		trouble = s.pick("500", "500 after success", "timeout", "timeout after success", "429", "404", "404 after success")
		if trouble == "" || strings.HasSuffix(trouble, "success") {
			s.revoke(form.Get("token"))
		}
	case "/introspect":
		trouble = s.pick("500", "timeout", "429")
		answer = s.introspect(form.Get("token"))
	default:
		s.t.Errorf("asked for %s", r.URL)
	}
	header := http.Header{"Content-Type": {"application/json"}}
	switch status = http.StatusOK; {
	case strings.HasPrefix(trouble, "timeout"):
		<-r.Context().Done()
		return nil, r.Context().Err()
	case strings.HasPrefix(trouble, "500"):
		status, answer = http.StatusInternalServerError, ""
	case strings.HasPrefix(trouble, "404"):
		status, answer = http.StatusNotFound, ""
	case trouble == "429":
		status, answer = http.StatusTooManyRequests, ""
		header.Set("Retry-After", "1")
	}
	return &http.Response{
		Status: http.StatusText(status), StatusCode: status, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: header, Body: io.NopCloser(strings.NewReader(answer)), ContentLength: int64(len(answer)), Request: r,
	}, nil
}

// pick chooses a trouble for half of the requests.
func (s *saas) pick(of ...string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.well || rand.IntN(2) == 0 {
		return ""
	}
	trouble := of[rand.IntN(len(of))]
	s.trouble[trouble]++
	return trouble
}

// ask counts who asks for a token.
func (s *saas) ask(assertion string) (leaseID string) {
	var claims struct{ Lease string }
	parts := strings.Split(assertion, ".")
	payload, err := base64.RawURLEncoding.DecodeString(parts[min(1, len(parts)-1)])
	if err := errors.Join(err, json.Unmarshal(payload, &claims)); err != nil || claims.Lease == "" {
		s.t.Errorf("assertion %q: %v", assertion, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked[claims.Lease]++
	return claims.Lease
}

func (s *saas) issue(assertion string) string {
	id := s.ask(assertion)
	s.mu.Lock()
	defer s.mu.Unlock()
	token := fmt.Sprint("token-", len(s.tokens))
	s.tokens[token] = &issued{lease: id, until: time.Now().Add(saasTTL)}
	return fmt.Sprintf(`{"access_token":%q,"token_type":"Bearer","expires_in":%d}`, token, int(saasTTL.Seconds()))
}

func (s *saas) revoke(token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := s.tokens[token]; t == nil {
		s.t.Errorf("asked to revoke %q", token)
	} else if t.ended.IsZero() {
		t.ended = time.Now()
	}
}

func (s *saas) introspect(token string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.tokens[token]
	return fmt.Sprintf(`{"active":%v}`, t != nil && t.alive(time.Now()))
}

// The whole engine against such a server: a request for a token is never repeated, no
// token is given out twice, none lives on behind a lease that is called gone, and a 404
// ends a lease only where something verified it.
func TestFault14EngineAtAFailingSaaS(t *testing.T) {
	for name, introspects := range map[string]bool{"with introspection": true, "without": false} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(w *world) { failingSaaS(w, introspects) })
		})
	}
}

func failingSaaS(w *world, introspects bool) {
	t := w.t
	keys, err := minter.LoadKeys(w.ctx, w.store, minter.Rotation{Algorithm: "ES256"})
	if err != nil {
		t.Fatal(err)
	}
	s := &saas{t: t, tokens: map[string]*issued{}, asked: map[string]int{}, trouble: map[string]int{}}
	m := &minter.OAuth{
		Name: "saas", MaxTTL: 5 * time.Minute, Grant: minter.JWTBearer, TokenEndpoint: "https://saas.example/token", TokenTTL: saasTTL,
		Client: minter.OAuthClient{ID: "writ", Auth: "none"},
		Assertion: &minter.OAuthAssertion{
			Issuer: "https://writ.example", Subject: "{agent}", Audience: "https://saas.example", TTL: time.Minute, Claims: map[string]string{"lease": "{lease}"},
		},
		Revocation: &minter.OAuthRevocation{Endpoint: "https://saas.example/revoke", TakesEffect: lease.RevocableInstant},
		Keys:       keys, HTTP: &http.Client{Transport: s, Timeout: 3 * time.Second}, Now: time.Now,
	}
	if introspects {
		m.Introspection = "https://saas.example/introspect"
	}
	stop := w.work(map[string]lease.Target{"saas": m})
	defer stop()

	var all []lease.Lease
	delivered := map[string]string{} // lease by token
	for i := range pick(80, 2000) {
		g, refusal := m.Plan(lease.Want{TTL: 2 * time.Minute})
		if refusal != nil {
			t.Fatal(refusal)
		}
		l := w.intent(g)
		all = append(all, l)
		secret, err := w.mint(m, l)
		if err == nil {
			if delivered[secret["token"]] != "" {
				t.Error("a token was given out twice")
			}
			delivered[secret["token"]] = l.ID
			if rand.IntN(2) == 0 {
				w.end(l, lease.EndReleased)
			}
		}
		time.Sleep(time.Duration(rand.IntN(1000)) * time.Millisecond)
		if i%10 == 0 {
			w.expire()
		}
	}
	s.mu.Lock()
	s.well = true
	s.mu.Unlock()
	for range 60 {
		time.Sleep(15 * time.Second)
		w.expire()
		if w.open() == 0 {
			break
		}
	}

	tokens := map[string]int{} // by lease
	for token, of := range s.tokens {
		tokens[of.lease]++
		l := w.get(of.lease)
		end := of.until
		if !of.ended.IsZero() {
			end = of.ended
		}
		if l.State == lease.Revoked && l.GoneAt.Before(end.Truncate(time.Microsecond)) {
			t.Errorf("the lease of %s was called gone %v before its end", token, end.Sub(l.GoneAt))
		}
		if of.alive(time.Now()) {
			t.Errorf("%s lives", token)
		}
	}
	for _, l := range all {
		w.wantState(l.ID, lease.Revoked)
		if tokens[l.ID] > 1 || s.asked[l.ID] > 1 {
			t.Errorf("%d tokens by %d requests for %s", tokens[l.ID], s.asked[l.ID], l.ID)
		}
	}
	t.Logf("fault 14: %d leases, %d tokens issued, %d given out; troubles %v", len(all), len(s.tokens), len(delivered), s.trouble)
	for _, trouble := range []string{"500", "500 after success", "timeout after success", "429", "404", "404 after success"} {
		if s.trouble[trouble] == 0 {
			t.Errorf("no %s, so it proves less", trouble)
		}
	}
	if len(delivered) == 0 || len(delivered) == len(s.tokens) {
		t.Errorf("%d of %d tokens were given out", len(delivered), len(s.tokens))
	}
}

// open counts leases that are not gone.
func (w *world) open() (n int) {
	w.t.Helper()
	w.in(func(tx *sqlstore.Tx) error {
		n = 0
		for _, state := range []lease.State{lease.Intent, lease.Active, lease.Revoking} {
			ls, err := tx.Leases(w.ctx, lease.Query{State: state, Limit: 1})
			if err != nil {
				return err
			}
			n += len(ls)
		}
		return nil
	})
	return n
}

// mint does what a decision does after its commit.
func (w *world) mint(m lease.Minter, l lease.Lease) (lease.Secret, error) {
	ctx, cancel := context.WithTimeout(w.ctx, lease.MintTime)
	defer cancel()
	made, err := m.Mint(ctx, lease.Order{Lease: l, Act: intent.Act{User: user.Ref, Agent: agent.Ref}})
	if err == nil {
		err = w.store.Update(w.ctx, func(tx *sqlstore.Tx) error { return lease.Activate(w.ctx, tx, l, made.Recall) })
	}
	if err == nil {
		return made.Secret, nil
	}
	w.in(func(tx *sqlstore.Tx) error {
		return errors.Join(lease.Fail(w.ctx, tx, l), lease.Recalled(w.ctx, tx, l, made.Recall))
	})
	return nil, err
}
