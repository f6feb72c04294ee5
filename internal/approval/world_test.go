package approval_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/writsec/writ/internal/approval"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/session"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/telemetry"
)

const issuer = "https://idp.example"

var (
	alice  = identity.Principal{Ref: identity.Ref{Issuer: issuer, ID: "alice"}}
	agent  = identity.Principal{Ref: identity.Ref{Issuer: issuer, ID: "crm-agent"}}
	caller = identity.Caller{Agent: agent, User: &alice}
	quiet  = slog.New(slog.DiscardHandler)
)

// world is one Writ's approvals on the real store, with a provider that does as the
// test says and time that passes only while everyone waits.
type world struct {
	t       *testing.T
	ctx     context.Context
	path    string
	store   *sqlstore.Store
	idp     *fakeProvider
	session session.Session
	acts    int
}

// inWorld runs f in a bubble of its own.
func inWorld(t *testing.T, f func(w *world)) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "writ.db")
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, ctx: t.Context(), path: path, idp: newFakeProvider()}
		w.openStore()
		defer func() { _ = w.store.Close() }()
		w.session = w.newSession()
		f(w)
	})
}

func (w *world) openStore() {
	w.t.Helper()
	s, err := sqlstore.Open(w.ctx, sqlstore.Config{URL: "sqlite:" + w.path, Root: sqlstore.RootKey{1}, Now: time.Now, Logger: quiet})
	if err != nil {
		w.t.Fatal(err)
	}
	w.store = s
}

func (w *world) newSession() session.Session {
	w.t.Helper()
	var s session.Session
	w.update(func(tx *sqlstore.Tx) error {
		s = session.New(alice, agent.Ref, session.Spec{}, session.Settings{DefaultAge: 24 * time.Hour}, tx.Now())
		return session.Open(w.ctx, tx, s, identity.Principal{})
	})
	return s
}

func (w *world) update(f func(*sqlstore.Tx) error) {
	w.t.Helper()
	if err := w.store.Update(w.ctx, f); err != nil {
		w.t.Fatal(err)
	}
}

// ask opens a prompt about an act of its own that lives as long as given.
func (w *world) ask(life time.Duration) approval.Approval {
	w.t.Helper()
	w.acts++
	a, err := w.open(approval.Opening{
		Plan: approval.Plan{
			Approver: "user", ApproverRef: alice.Ref, Hint: "alice", Message: "m", Code: "CODE",
			ACRValues: []string{"phr"}, ExpiresIn: life,
		},
		Session: w.session.ID, User: alice.Ref, Agent: agent.Ref, IntentHash: fmt.Sprint("act ", w.acts), MaxPending: 1000,
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return a
}

func (w *world) open(o approval.Opening) (a approval.Approval, err error) {
	err = w.store.Update(w.ctx, func(tx *sqlstore.Tx) (err error) {
		a, err = approval.Open(w.ctx, tx, o)
		return err
	})
	return a, err
}

func (w *world) get(id string) approval.Approval {
	w.t.Helper()
	var a approval.Approval
	err := w.store.View(w.ctx, func(tx *sqlstore.Tx) (err error) {
		a, err = tx.Approval(w.ctx, id)
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return a
}

// want fails unless the approval is where it should be, and has forgotten what the
// provider sent if that is an end.
func (w *world) want(id string, s approval.State, reason string) approval.Approval {
	w.t.Helper()
	a := w.get(id)
	if a.State != s || a.Reason != reason {
		w.t.Fatalf("approval is %s (%q), want %s (%q)", a.State, a.Reason, s, reason)
	}
	if !a.Open() && (a.AuthReqID != "" || a.Answer != nil || a.Polling) {
		w.t.Errorf("approval that ended still holds auth_req_id %q, answer %q, polling %v", a.AuthReqID, a.Answer, a.Polling)
	}
	return a
}

// process is one running engine, that can be killed.
type process struct {
	w        *world
	engine   *approval.Engine
	dead     atomic.Bool
	cancel   context.CancelFunc
	done     chan struct{}
	stopping chan struct{}
}

func (w *world) newProcess() *process {
	p := &process{w: w, done: make(chan struct{}), stopping: make(chan struct{})}
	provider := livingProvider{w.idp, &p.dead}
	p.engine = approval.NewEngine(approval.Config{
		Store:     mortalStore{sqlstore.For[approval.Tx](w.store), &p.dead},
		Providers: map[string]approval.Provider{issuer: provider},
		UseWithin: 2 * time.Minute, Stopping: p.stopping, Metrics: telemetry.NewMetrics(), Logger: quiet,
	})
	p.engine.Crash(func(string) bool { return p.dead.Load() })
	return p
}

// start runs an engine until the test stops or kills it.
func (w *world) start() *process {
	p := w.newProcess()
	p.run()
	return p
}

func (p *process) run() {
	ctx, cancel := context.WithCancel(p.w.ctx)
	p.cancel = cancel
	go func() {
		defer close(p.done)
		_ = p.engine.Run(ctx)
	}()
}

// stop lets the engine finish, as SIGTERM does.
func (p *process) stop() {
	p.cancel()
	<-p.done
}

// kill ends it at once, as SIGKILL does: it changes nothing any more, and calls in
// flight are gone.
func (p *process) kill() {
	p.dead.Store(true)
	p.cancel()
	<-p.done
}

// restart kills p, and opens the store again for a new process.
func (w *world) restart(p *process) *process {
	w.t.Helper()
	p.kill()
	if err := w.store.Close(); err != nil {
		w.t.Fatal(err)
	}
	w.idp.drop()
	w.openStore()
	return w.start()
}

var errDead = errors.New("the process is dead")

// mortalStore commits nothing for a dead process.
type mortalStore struct {
	approval.Store
	dead *atomic.Bool
}

func (s mortalStore) Update(ctx context.Context, f func(approval.Tx) error) error {
	return s.Store.Update(ctx, func(tx approval.Tx) error {
		if s.dead.Load() {
			return errDead
		}
		if err := f(tx); err != nil {
			return err
		}
		if s.dead.Load() {
			return errDead
		}
		return nil
	})
}

func (s mortalStore) View(ctx context.Context, f func(approval.Tx) error) error {
	if s.dead.Load() {
		return errDead
	}
	return s.Store.View(ctx, f)
}

// fakeProvider does what its functions say and notes every call.
type fakeProvider struct {
	onStart  func(ctx context.Context, n int, r approval.StartRequest) approval.StartResult
	onPoll   func(ctx context.Context, n int, id string) approval.PollResult
	onVerify func(n int, answer []byte, want approval.Expectation) (approval.Evidence, error)

	mu        sync.Mutex
	epoch     int
	calls     []called
	inFlight  map[string]bool
	overlaps  []string
	discarded []string
}

type called struct {
	what string // start, poll, verify, discard
	id   string // the auth_req_id, or the hint
	at   time.Time
}

func newFakeProvider() *fakeProvider {
	return &fakeProvider{
		inFlight: map[string]bool{},
		onStart: func(_ context.Context, n int, _ approval.StartRequest) approval.StartResult {
			return started(fmt.Sprint("req-", n), time.Hour, 5*time.Second)
		},
		onPoll:   func(context.Context, int, string) approval.PollResult { return pending() },
		onVerify: func(int, []byte, approval.Expectation) (approval.Evidence, error) { return yes, nil },
	}
}

var yes = approval.Evidence{ACR: "phr", AMR: []string{"pin"}}

func started(id string, life, interval time.Duration) approval.StartResult {
	return approval.StartResult{Outcome: approval.Started, AuthReqID: id, ExpiresIn: life, Interval: interval}
}

func pending() approval.PollResult { return approval.PollResult{Outcome: approval.PollPending} }

func answered(s string) approval.PollResult {
	return approval.PollResult{Outcome: approval.PollAnswered, Answer: []byte(s)}
}

// script answers the polls one after the other, and then like the last.
func script(results ...approval.PollResult) func(context.Context, int, string) approval.PollResult {
	return func(_ context.Context, n int, _ string) approval.PollResult {
		return results[min(n, len(results))-1]
	}
}

// note records a call and returns how many of its kind there were.
func (f *fakeProvider) note(what, id string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, called{what, id, time.Now()})
	n := 0
	for _, c := range f.calls {
		if c.what == what {
			n++
		}
	}
	return n
}

// times says when the calls of a kind were made.
func (f *fakeProvider) times(what string) []time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []time.Time
	for _, c := range f.calls {
		if c.what == what {
			out = append(out, c.at)
		}
	}
	return out
}

func (f *fakeProvider) count(what string) int { return len(f.times(what)) }

// drop forgets the calls in flight: their process is gone.
func (f *fakeProvider) drop() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.epoch++
	f.inFlight = map[string]bool{}
}

func (f *fakeProvider) enter(id string) (leave func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.inFlight[id] {
		f.overlaps = append(f.overlaps, id)
	}
	f.inFlight[id] = true
	epoch := f.epoch
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if epoch == f.epoch {
			delete(f.inFlight, id)
		}
	}
}

const fakeTimeout = 40 * time.Second

func (*fakeProvider) Limits() approval.Limits                 { return approval.Limits{MaxLength: 100} }
func (*fakeProvider) Hint(identity.Principal) (string, error) { return "alice", nil }
func (*fakeProvider) Timeout() time.Duration                  { return fakeTimeout }

func (f *fakeProvider) Start(ctx context.Context, r approval.StartRequest) approval.StartResult {
	return f.onStart(ctx, f.note("start", r.Hint), r)
}

func (f *fakeProvider) Poll(ctx context.Context, id string) approval.PollResult {
	defer f.enter(id)()
	ctx, cancel := context.WithTimeout(ctx, fakeTimeout)
	defer cancel()
	return f.onPoll(ctx, f.note("poll", id), id)
}

func (f *fakeProvider) Verify(_ context.Context, answer []byte, want approval.Expectation) (approval.Evidence, error) {
	return f.onVerify(f.note("verify", want.AuthReqID), answer, want)
}

func (f *fakeProvider) Discard(_ context.Context, answer []byte) {
	f.note("discard", string(answer))
	f.mu.Lock()
	defer f.mu.Unlock()
	f.discarded = append(f.discarded, string(answer))
}

// livingProvider gets no calls from a dead process.
type livingProvider struct {
	*fakeProvider
	dead *atomic.Bool
}

func (p livingProvider) Discard(ctx context.Context, answer []byte) {
	if !p.dead.Load() {
		p.fakeProvider.Discard(ctx, answer)
	}
}

// pause sleeps in the bubble, or until ctx ends.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// gaps are the times between calls.
func gaps(ts []time.Time) []time.Duration {
	var out []time.Duration
	for i := 1; i < len(ts); i++ {
		out = append(out, ts[i].Sub(ts[i-1]))
	}
	return out
}
