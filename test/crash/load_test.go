package crash

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/writsec/writ/client"
)

// answered is a decision as a client was told of it. A key may have several.
type answered struct {
	key, id, session string
	effect           client.Effect
	lease            string // of the credential; "" none
}

// load is clients that do what agents do, on any replica, and note every answer. A
// call that gets none, or a 503, is repeated elsewhere until it gets one.
type load struct {
	t        testing.TB
	s        *site
	http     *http.Client
	patience time.Duration // for one answer, repetitions included
	obeys    bool          // clients wait as Retry-After says

	stopping chan struct{}
	clients  sync.WaitGroup

	mu         sync.Mutex
	decisions  []answered
	sessions   []string       // opened
	ended      []string       // sessions
	released   []string       // leases
	reported   []string       // decisions whose act succeeded
	refusals   map[string]int // 503 and the like, by code
	broken     int            // calls without an answer
	breaks     map[string]int // the same, by cause
	longest    time.Duration  // that an answer took
	unexpected []string
}

func newLoad(s *site) *load {
	transport := &http.Transport{MaxIdleConnsPerHost: 64, IdleConnTimeout: 10 * time.Second}
	s.t.Cleanup(transport.CloseIdleConnections)
	l := &load{
		t: s.t, s: s, patience: 2 * time.Minute,
		stopping: make(chan struct{}), refusals: map[string]int{}, breaks: map[string]int{},
	}
	l.http = &http.Client{Transport: inspector{transport, l}, Timeout: 20 * time.Second}
	return l
}

// inspector holds every answer to the form that errors have.
type inspector struct {
	http.RoundTripper
	l *load
}

// RoundTrip implements http.RoundTripper.
func (i inspector) RoundTrip(r *http.Request) (*http.Response, error) {
	began := time.Now()
	res, err := i.RoundTripper.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	if kind := res.Header.Get("Content-Type"); res.StatusCode >= 400 && kind != "application/problem+json" {
		i.l.unexpectedly("%s %s: %d as %q", r.Method, r.URL.Path, res.StatusCode, kind)
	}
	i.l.note(func() {
		if !r.URL.Query().Has("wait") { // else it is held
			i.l.longest = max(i.l.longest, time.Since(began))
		}
	})
	return res, nil
}

// count is how many decisions were answered so far.
func (l *load) count() (n int) {
	l.note(func() { n = len(l.decisions) })
	return n
}

// refused counts refusals by code.
func (l *load) refused() (out map[string]int) {
	l.note(func() { out = maps.Clone(l.refusals) })
	return out
}

// slowest is the longest that an answer took.
func (l *load) slowest() (d time.Duration) {
	l.note(func() { d = l.longest })
	return d
}

// start runs n clients, each with a random source of its own; the last one asks
// people.
func (l *load) start(n int, source func() *rand.Rand) {
	for i := range n {
		c := &loadClient{load: l, rng: source(), token: l.s.is.token(fmt.Sprint("user-", i), fmt.Sprint("agent-", i%3))}
		run := c.work
		if i == n-1 {
			run = c.askPeople
		}
		l.clients.Go(func() {
			for !l.stopped() {
				run()
			}
		})
	}
}

// stop lets every client end what it has begun.
func (l *load) stop() {
	close(l.stopping)
	l.clients.Wait()
}

func (l *load) stopped() bool {
	select {
	case <-l.stopping:
		return true
	default:
		return false
	}
}

func (l *load) note(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f()
}

func (l *load) unexpectedly(format string, args ...any) {
	l.note(func() { l.unexpected = append(l.unexpected, fmt.Sprintf(format, args...)) })
}

// loadClient is one agent acting for one user.
type loadClient struct {
	*load
	rng   *rand.Rand
	token string
	calls int
}

// on is a client of one of the replicas.
func (c *loadClient) on(r *replica) *client.Client {
	out := client.New(r.url, client.StaticToken(c.token))
	out.HTTP = c.http
	return out
}

// call makes a call until it is answered. ok is false if it never was, or with a
// refusal that nothing excuses.
func call[T any](c *loadClient, what string, f func(context.Context, *client.Client) (T, error)) (v T, ok bool) {
	for deadline := time.Now().Add(c.patience); ; {
		r := c.s.replicas[c.rng.IntN(len(c.s.replicas))]
		v, err := f(context.Background(), c.on(r))
		if err == nil {
			return v, true
		}
		if why := c.excuse(err); why != "" {
			c.unexpectedly("%s on %s: %s", what, r.name, why)
			return v, false
		}
		if time.Now().After(deadline) {
			c.unexpectedly("%s: no answer within %v, at last: %v", what, c.patience, err)
			return v, false
		}
		wait := time.Duration(c.rng.IntN(100)) * time.Millisecond
		if p, ok := errors.AsType[*client.Error](err); ok && c.obeys {
			wait += p.RetryAfter
		}
		time.Sleep(wait)
	}
}

// excuse says why an error is none that a client has to live with; "" if it is: a
// connection that broke, or a clear "later".
func (c *loadClient) excuse(err error) string {
	p, refused := errors.AsType[*client.Error](err)
	_, connection := errors.AsType[*url.Error](err)
	switch {
	case refused && (p.Status == http.StatusServiceUnavailable || p.Status == http.StatusTooManyRequests) && p.RetryAfter > 0:
		c.note(func() { c.refusals[p.Code]++ })
		return ""
	case connection || errors.Is(err, io.ErrUnexpectedEOF):
		c.note(func() {
			c.broken++
			c.breaks[cause(err)]++
		})
		return ""
	}
	return err.Error()
}

// cause is the call and the innermost error.
func cause(err error) string {
	call := ""
	if u, ok := errors.AsType[*url.Error](err); ok {
		call = u.Op + " /" + strings.Split(u.URL, "/")[3] + ": "
	}
	for inner := errors.Unwrap(err); inner != nil; inner = errors.Unwrap(err) {
		err = inner
	}
	return call + err.Error()
}

func (c *loadClient) pause() { time.Sleep(time.Duration(c.rng.IntN(15)) * time.Millisecond) }

// decide asks and notes the answer.
func (c *loadClient) decide(r client.Request) (*client.Decision, bool) {
	d, ok := call(c, "decide "+r.Intent.Action, func(ctx context.Context, w *client.Client) (*client.Decision, error) {
		return w.Decide(ctx, r)
	})
	if ok {
		a := answered{key: r.IdempotencyKey, id: d.ID, session: d.Session, effect: d.Effect}
		if d.Credential != nil {
			a.lease = d.Credential.Lease
		}
		c.note(func() { c.decisions = append(c.decisions, a) })
	}
	return d, ok
}

// question is one that nobody asked before: its resource is named as its key.
func (c *loadClient) question(session, action string) client.Request {
	key := fmt.Sprintf("%s-%s-%d-%x", action, session, c.calls, c.rng.Uint64())
	c.calls++
	return client.Request{
		Session: session, Intent: client.Intent{Action: action}, Resource: client.Resource{Type: "thing", ID: key}, IdempotencyKey: key,
	}
}

func (c *loadClient) open() (session string, ok bool) {
	s, ok := call(c, "open session", func(ctx context.Context, w *client.Client) (*client.Session, error) {
		return w.OpenSession(ctx, client.SessionRequest{Task: "break it"})
	})
	if ok {
		c.note(func() { c.sessions = append(c.sessions, s.ID) })
		session = s.ID
	}
	return session, ok
}

// work is the life of one session.
func (c *loadClient) work() {
	session, ok := c.open()
	for range 4 + c.rng.IntN(16) {
		if !ok || c.stopped() {
			return
		}
		c.pause()
		r := c.question(session, []string{"read", "read", "pay", "refuse"}[c.rng.IntN(4)])
		d, decided := c.decide(r)
		if !decided {
			return
		}
		if c.rng.IntN(5) == 0 { // as a client does that lost the answer
			again, ok := c.decide(r)
			if !ok {
				return
			}
			d = again
		}
		if d.Credential != nil {
			c.use(d)
		}
	}
	if c.rng.IntN(2) == 0 {
		_, ok := call(c, "end session", func(ctx context.Context, w *client.Client) (*client.Session, error) {
			return w.EndSession(ctx, session)
		})
		if ok {
			c.note(func() { c.ended = append(c.ended, session) })
		}
	}
}

// use reports an outcome, and gives the credential back, or neither.
func (c *loadClient) use(d *client.Decision) {
	if c.rng.IntN(2) == 0 {
		_, ok := call(c, "report outcome", func(ctx context.Context, w *client.Client) (struct{}, error) {
			return struct{}{}, w.Report(ctx, d.ID, "succeeded", "")
		})
		if ok {
			c.note(func() { c.reported = append(c.reported, d.ID) })
		}
	}
	if c.rng.IntN(2) == 0 {
		l, ok := call(c, "release lease", func(ctx context.Context, w *client.Client) (*client.Lease, error) {
			return w.Release(ctx, d.Credential.Lease)
		})
		if ok {
			c.note(func() { c.released = append(c.released, l.ID) })
		}
	}
}

// askPeople gets an approval, uses it, and tries to use it again.
func (c *loadClient) askPeople() {
	session, ok := c.open()
	if !ok {
		return
	}
	r := c.question(session, "ask")
	d, ok := c.decide(r)
	if !ok {
		return
	}
	if d.Effect != client.RequireCIBA || d.Approval == nil {
		c.unexpectedly("decision %s is %s, want require_ciba", d.ID, d.Effect)
		return
	}
	a := d.Approval
	for a.Status == "pending" {
		if c.stopped() {
			return
		}
		if a, ok = call(c, "look at approval", func(ctx context.Context, w *client.Client) (*client.Approval, error) {
			return w.Approval(ctx, d.Approval.ID, 2*time.Second)
		}); !ok {
			return
		}
	}
	if a.Status != "approved" { // a kill while the provider answered may cost the approval
		if a.Status != "failed" && a.Status != "expired" {
			c.unexpectedly("approval %s is %s", a.ID, a.Status)
		}
		return
	}
	r.Approval = a.ID
	for _, want := range []client.Effect{client.Allow, client.Deny} {
		r.IdempotencyKey += "-used"
		d, ok := c.decide(r)
		if ok && d.Effect != want {
			c.unexpectedly("approval %s: %s with %v, want %s", a.ID, d.Effect, d.Reasons, want)
		}
	}
}
