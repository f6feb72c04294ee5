package lease_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/intent"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/telemetry"
)

// target is a database of credentials.
type target struct {
	mu      sync.Mutex
	there   map[string]bool   // credentials
	tombs   map[string]bool   // unmade for good
	recalls map[string]string // shown when they were unmade
	order   []string          // in which they were unmade
	batches []int

	down bool
	stay map[string]bool // can't be unmade
	hang map[string]bool // unmaking them takes for ever
}

func newTarget() *target {
	return &target{there: map[string]bool{}, tombs: map[string]bool{}, recalls: map[string]string{}, stay: map[string]bool{}, hang: map[string]bool{}}
}

func (*target) Plan(lease.Want) (lease.Grant, *lease.Refusal) { panic("not asked here") }

func (t *target) Mint(_ context.Context, o lease.Order) (lease.Made, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.down || t.tombs[o.Lease.ID] {
		return lease.Made{}, errors.New("refused")
	}
	t.there[o.Lease.ID] = true
	return lease.Made{Secret: lease.Secret{"password": "x"}, Recall: "recall-" + o.Lease.ID}, nil
}

func (t *target) Unmake(ctx context.Context, leases []lease.Lease) ([]lease.Unmade, error) {
	t.mu.Lock()
	t.batches = append(t.batches, len(leases))
	down, hangs := t.down, false
	for _, l := range leases {
		hangs = hangs || t.hang[l.ID]
	}
	t.mu.Unlock()
	if down {
		return nil, errors.New("connection refused")
	}
	if hangs {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	time.Sleep(time.Millisecond)
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]lease.Unmade, len(leases))
	for i, l := range leases {
		t.tombs[l.ID] = true
		if t.stay[l.ID] {
			out[i].Err = errors.New("owns objects in another database")
			continue
		}
		delete(t.there, l.ID)
		t.recalls[l.ID] = l.Recall
		t.order = append(t.order, l.ID)
		out[i].Seen = map[string]any{"role": l.ID}
	}
	return out, nil
}

func (t *target) set(f func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	f()
}

func (t *target) count() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.there)
}

// outside is a grant of a credential at a target.
func outside(minter string, ttl time.Duration) lease.Grant {
	return lease.Grant{Minter: minter, Kind: "postgres", Scope: map[string]any{}, TTL: ttl, Revocability: lease.RevocableInstant, Outside: true}
}

func (w *world) intent(g lease.Grant) (l lease.Lease) {
	w.t.Helper()
	w.in(func(tx *sqlstore.Tx) error {
		l = lease.New(g, w.s.ID, w.s.EndsAt, "dec", "rev", intent.Act{User: user.Ref, Agent: agent.Ref}, "h", tx.Now())
		return lease.Begin(w.ctx, tx, l, w.s.StartedAt, lease.Limits{})
	})
	return l
}

// lent is a lease whose credential is out.
func (w *world) lent(t *target, g lease.Grant) lease.Lease {
	w.t.Helper()
	l := w.intent(g)
	made, err := t.Mint(w.ctx, lease.Order{Lease: l})
	if err != nil {
		w.t.Fatal(err)
	}
	w.in(func(tx *sqlstore.Tx) error { return lease.Activate(w.ctx, tx, l, made.Recall) })
	return l
}

func (w *world) end(l lease.Lease, reason string) {
	w.t.Helper()
	w.in(func(tx *sqlstore.Tx) error {
		_, err := lease.EndOne(w.ctx, tx, l, lease.End{Reason: reason})
		return err
	})
}

// work runs a worker until the returned stop.
func (w *world) work(targets map[string]lease.Target) (stop func()) {
	ctx, cancel := context.WithCancel(w.ctx)
	worker := &lease.Worker{
		Store: sqlstore.For[lease.WorkTx](w.store), Targets: targets, Breakers: map[string]*lease.Breaker{},
		Metrics: telemetry.NewMetrics(), Logger: quiet,
	}
	for name := range targets {
		worker.Breakers[name] = &lease.Breaker{}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = worker.Run(ctx)
	}()
	return func() { cancel(); <-done }
}

func (w *world) wantState(id string, want lease.State) lease.Lease {
	w.t.Helper()
	l := w.get(id)
	if l.State != want {
		w.t.Errorf("lease is %s, want %s (%s)", l.State, want, l.LastError)
	}
	return l
}

func TestALeaseIsGoneOnlyOnceThatWasSeen(t *testing.T) {
	inWorld(t, func(w *world) {
		db := newTarget()
		stop := w.work(map[string]lease.Target{"db": db})
		defer stop()
		l := w.intent(outside("db", time.Minute))
		if l = w.get(l.ID); l.State != lease.Intent || l.Alive(time.Now()) {
			t.Errorf("begins as %s", l.State)
		}
		made, err := db.Mint(w.ctx, lease.Order{Lease: l})
		if err != nil {
			t.Fatal(err)
		}
		w.in(func(tx *sqlstore.Tx) error { return lease.Activate(w.ctx, tx, l, made.Recall) })
		if l = w.get(l.ID); !l.Alive(time.Now()) || l.Recall != "" {
			t.Errorf("%+v", l)
		}
		db.set(func() { db.stay[l.ID] = true })
		w.end(l, lease.EndReleased)
		time.Sleep(100 * time.Millisecond)
		if l = w.wantState(l.ID, lease.Revoking); l.Attempts != 1 || l.LastError == "" || !l.GoneAt.IsZero() || !l.StuckSince(time.Now()).IsZero() {
			t.Errorf("%+v", l)
		}
		time.Sleep(10 * time.Minute)
		if l = w.wantState(l.ID, lease.Revoking); l.Attempts < 6 || l.StuckSince(time.Now()).IsZero() {
			t.Errorf("after ten minutes: %d attempts, stuck since %v", l.Attempts, l.StuckSince(time.Now()))
		}
		db.set(func() { db.stay[l.ID] = false })
		time.Sleep(8 * time.Minute) // the longest pause
		if l = w.wantState(l.ID, lease.Revoked); l.GoneAt.IsZero() || l.LastError != "" {
			t.Errorf("%+v", l)
		}
		if db.recalls[l.ID] != "recall-"+l.ID {
			t.Errorf("unmade with %q", db.recalls[l.ID])
		}
		want := []string{"lease.intent <nil>", "lease.active <nil>", "lease.revoking released", "lease.revoked released"}
		if d := cmp.Diff(want, w.entries(l.ID)); d != "" {
			t.Error(d)
		}
	})
}

// A worker is killed between the claim and the end; another takes over in time.
func TestAKilledWorkersClaimLapses(t *testing.T) {
	inWorld(t, func(w *world) {
		db := newTarget()
		l := w.lent(db, outside("db", time.Minute))
		w.end(l, lease.EndReleased)
		w.in(func(tx *sqlstore.Tx) error { // killed after this
			ls, err := tx.ClaimLeases(w.ctx, "db", "of the dead", 20*time.Second, false, 10)
			if len(ls) != 1 {
				t.Errorf("claimed %d", len(ls))
			}
			return err
		})
		stop := w.work(map[string]lease.Target{"db": db})
		defer stop()
		time.Sleep(10 * time.Second)
		w.wantState(l.ID, lease.Revoking)
		time.Sleep(12 * time.Second)
		w.wantState(l.ID, lease.Revoked)
		// What the dead one still has to say comes too late.
		w.in(func(tx *sqlstore.Tx) error {
			gone, err := tx.GoneLeases(w.ctx, "of the dead", []string{l.ID})
			if len(gone) != 0 {
				t.Error("gone twice")
			}
			return errors.Join(err, tx.PostponeLease(w.ctx, "of the dead", l.ID, time.Now(), "late"))
		})
		if l = w.wantState(l.ID, lease.Revoked); l.LastError != "" {
			t.Errorf("%+v", l)
		}
	})
}

// outage is two hours in the long form (WRIT_CHAOS=full).
func outage() time.Duration {
	if os.Getenv("WRIT_CHAOS") == "full" {
		return 2 * time.Hour
	}
	return 3 * time.Minute
}

// One target is down for two hours while a thousand of its leases expire; another's
// leases end as ever, and once it is back all are gone within a minute.
func TestFault04OneTargetDown(t *testing.T) {
	inWorld(t, func(w *world) {
		leases := 300
		if outage() > time.Hour {
			leases = 1000
		}
		ill, well := newTarget(), newTarget()
		stop := w.work(map[string]lease.Target{"ill": ill, "well": well})
		defer stop()
		for range leases {
			w.lent(ill, outside("ill", time.Minute))
		}
		ill.set(func() { ill.down = true })
		time.Sleep(time.Minute)
		w.expire()
		begin := time.Now()
		for time.Since(begin) < outage() {
			l := w.lent(well, outside("well", time.Minute))
			w.end(l, lease.EndReleased)
			time.Sleep(time.Second)
			if l = w.wantState(l.ID, lease.Revoked); l.GoneAt.Sub(l.EndedAt) > time.Second {
				t.Fatalf("the other target's lease took %v", l.GoneAt.Sub(l.EndedAt))
			}
			time.Sleep(outage() / 10)
		}
		if n := ill.count(); n != leases {
			t.Fatalf("%d there", n)
		}
		w.in(func(tx *sqlstore.Tx) error { // it is an alarm, and says why
			ls, err := tx.Leases(w.ctx, lease.Query{Minter: "ill", Stuck: true, Limit: 2000})
			load, loadErr := tx.Load(w.ctx)
			if len(ls) != leases || load.Leases[0].Stuck != leases {
				t.Errorf("%d are stuck, %+v", len(ls), load.Leases)
			}
			known := 0
			for _, l := range ls {
				if l.LastError != "" && !l.StuckSince(time.Now()).IsZero() {
					known++
				}
			}
			if known < 100 {
				t.Errorf("of %d the failure is known", known)
			}
			return errors.Join(err, loadErr)
		})
		ill.set(func() { ill.down = false })
		back := time.Now()
		for ill.count() > 0 && time.Since(back) < 5*time.Minute {
			time.Sleep(time.Second)
		}
		if took := time.Since(back); took > time.Minute {
			t.Errorf("took %v after the target was back", took)
		}
		synctest.Wait()
		time.Sleep(time.Second)
		w.in(func(tx *sqlstore.Tx) error {
			left, err := tx.Leases(w.ctx, lease.Query{State: lease.Revoking, Limit: 10})
			if len(left) > 0 {
				t.Errorf("%d or more are not gone by the record", len(left))
			}
			return err
		})
	})
}

func (w *world) expire() {
	w.t.Helper()
	w.in(func(tx *sqlstore.Tx) error {
		_, err := lease.EndAll(w.ctx, tx, lease.Selection{Due: true}, lease.End{Reason: lease.EndExpired})
		return err
	})
}

// What an operator kills goes before what agents gave back, and that before what
// expired.
func TestTheMostUrgentGoesFirst(t *testing.T) {
	inWorld(t, func(w *world) {
		db := newTarget()
		var ids []string
		for i := range 600 {
			l := w.lent(db, outside("db", time.Minute))
			ids = append(ids, l.ID)
			switch {
			case i < 300:
				w.end(l, lease.EndExpired)
			case i < 500:
				w.end(l, lease.EndReleased)
			default:
				w.end(l, lease.EndOperator)
			}
		}
		stop := w.work(map[string]lease.Target{"db": db})
		time.Sleep(time.Minute)
		stop()
		rank := func(id string) int {
			i := slices.Index(ids, id)
			return map[bool]int{true: 0, false: 1}[i >= 500] + map[bool]int{true: 1, false: 0}[i < 300]
		}
		// Two hands work at a time, so that neighbouring batches can change places.
		for i := 200; i < len(db.order); i++ {
			if rank(db.order[i-200]) > rank(db.order[i]) {
				t.Fatalf("%d came before %d", rank(db.order[i-200]), rank(db.order[i]))
			}
		}
		if len(db.order) != 600 {
			t.Errorf("%d unmade", len(db.order))
		}
	})
}

// One that makes the target hang must not keep the others.
func TestOneThatHangsDoesNotHoldTheOthers(t *testing.T) {
	inWorld(t, func(w *world) {
		db := newTarget()
		var all []lease.Lease
		for range 150 {
			all = append(all, w.lent(db, outside("db", time.Minute)))
		}
		db.hang[all[70].ID] = true
		for _, l := range all {
			w.end(l, lease.EndReleased)
		}
		stop := w.work(map[string]lease.Target{"db": db})
		defer stop()
		time.Sleep(5 * time.Minute)
		for i, l := range all {
			if i != 70 {
				w.wantState(l.ID, lease.Revoked)
			}
		}
		if l := w.wantState(all[70].ID, lease.Revoking); l.Attempts == 0 {
			t.Error("the one that hangs is not known by its failures")
		}
	})
}

// The agent's minter stalls; what it makes after the deadline is refused by the target,
// or unmade once it is known.
func TestALateMintIsUnmade(t *testing.T) {
	inWorld(t, func(w *world) {
		db := newTarget()
		stop := w.work(map[string]lease.Target{"db": db})
		defer stop()
		l := w.intent(outside("db", time.Minute))
		time.Sleep(11 * time.Second)
		w.in(func(tx *sqlstore.Tx) error {
			_, err := lease.EndAll(w.ctx, tx, lease.Selection{Overdue: true}, lease.End{Reason: lease.EndMintFailed})
			return err
		})
		time.Sleep(time.Second)
		w.wantState(l.ID, lease.Revoked)
		if _, err := db.Mint(w.ctx, lease.Order{Lease: l}); err == nil {
			t.Error("the target made it though it was unmade")
		}
		db.set(func() { db.there[l.ID] = true }) // a target without tombstones did
		err := w.store.Update(w.ctx, func(tx *sqlstore.Tx) error { return lease.Activate(w.ctx, tx, l, "late") })
		if !errors.Is(err, lease.ErrStale) {
			t.Errorf("activated: %v", err)
		}
		w.in(func(tx *sqlstore.Tx) error { return lease.Recalled(w.ctx, tx, l, "late") })
		time.Sleep(time.Second)
		w.wantState(l.ID, lease.Revoked)
		if db.count() != 0 || db.recalls[l.ID] != "late" {
			t.Errorf("%d there, unmade with %q", db.count(), db.recalls[l.ID])
		}
	})
}

// Where nothing can be revoked, nothing is called revoked before its time.
func TestWhatCannotBeRevokedEndsWithItsTime(t *testing.T) {
	inWorld(t, func(w *world) {
		saas := newTarget()
		stop := w.work(map[string]lease.Target{"saas": saas})
		defer stop()
		g := outside("saas", time.Minute)
		g.Revocability = lease.RevocableExpiry
		there := w.lent(saas, g)
		token := w.begin(time.Minute) // a jwt whose audience does not ask
		w.in(func(tx *sqlstore.Tx) error {
			l := lease.New(lease.Grant{Minter: "crm", Kind: "jwt", TTL: time.Minute, Revocability: lease.RevocableExpiry}, w.s.ID, w.s.EndsAt, "dec", "rev",
				intent.Act{User: user.Ref, Agent: agent.Ref}, "h", tx.Now())
			token = l
			return lease.Begin(w.ctx, tx, l, w.s.StartedAt, lease.Limits{})
		})
		for _, l := range []lease.Lease{there, token} {
			w.end(l, lease.EndReleased)
		}
		time.Sleep(40 * time.Second)
		if saas.count() != 0 {
			t.Error("it was not even tried")
		}
		for _, l := range []lease.Lease{there, token} {
			if got := w.wantState(l.ID, lease.Revoking); got.Alive(time.Now()) || !got.StuckSince(time.Now()).IsZero() || got.Attempts != 0 {
				t.Errorf("%+v", got)
			}
		}
		time.Sleep(25 * time.Second)
		for _, l := range []lease.Lease{there, token} {
			w.wantState(l.ID, lease.Revoked)
		}
	})
}

func TestQuotas(t *testing.T) {
	inWorld(t, func(w *world) {
		limits := lease.Limits{PerSession: 5, PerMinter: map[string]int{"db": 3}}
		begin := func(minter string) (l lease.Lease, err error) {
			err = w.store.Update(w.ctx, func(tx *sqlstore.Tx) error {
				l = lease.New(outside(minter, time.Minute), w.s.ID, w.s.EndsAt, "dec", "rev", intent.Act{User: user.Ref, Agent: agent.Ref}, "h", tx.Now())
				return lease.Begin(w.ctx, tx, l, w.s.StartedAt, limits)
			})
			return l, err
		}
		var held []lease.Lease
		for range 3 {
			l, err := begin("db")
			if err != nil {
				t.Fatal(err)
			}
			held = append(held, l)
		}
		if _, err := begin("db"); err == nil {
			t.Error("a fourth of the minter's")
		}
		w.end(held[0], lease.EndReleased)
		if _, err := begin("db"); err == nil {
			t.Error("its target still has the first")
		}
		for range 3 {
			if _, err := begin("other"); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := begin("other"); err == nil {
			t.Error("a sixth of the session's")
		}
	})
}

// surveyed is a target that can be looked at.
type surveyed struct {
	*target
	found    []lease.Sighting
	disarmed []string
}

func (s *surveyed) Survey(context.Context) ([]lease.Sighting, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.found), nil
}

func (s *surveyed) Disarm(_ context.Context, names []string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.disarmed = append(s.disarmed, names...)
	for i := range s.found {
		if slices.Contains(names, s.found[i].Name) {
			s.found[i].Armed, s.found[i].Uses = false, nil
		}
	}
	return nil
}

func TestSurveys(t *testing.T) {
	inWorld(t, func(w *world) {
		db := &surveyed{target: newTarget()}
		l := w.lent(db.target, outside("db", time.Hour))
		gone := w.lent(db.target, outside("db", time.Hour))
		other := w.lent(newTarget(), outside("db2", time.Hour))
		w.end(gone, lease.EndReleased)
		stop := w.work(map[string]lease.Target{"db": db.target})
		time.Sleep(time.Second)
		stop()
		w.wantState(gone.ID, lease.Revoked)
		use := lease.Connection{ID: "17", Since: time.Now(), From: "10.0.0.1"}
		db.found = []lease.Sighting{
			{Name: "writ_" + l.ID, Lease: l.ID, Armed: true, Uses: []lease.Connection{use}},
			{Name: "writ_" + gone.ID, Lease: gone.ID, Armed: true},
			{Name: "writ_by_hand", Armed: true},
			{Name: "writ_" + other.ID, Lease: other.ID, Armed: true}, // of another minter at the same server
		}
		ctx, cancel := context.WithCancel(w.ctx)
		var g sync.WaitGroup
		for range 2 { // replicas
			s := &lease.Surveys{
				Store: sqlstore.For[lease.SurveyTx](w.store), Targets: map[string]lease.Surveyor{"db": db},
				Every: 15 * time.Second, Grace: 2 * time.Minute, Logger: quiet,
			}
			g.Go(func() { _ = s.Run(ctx) })
		}
		time.Sleep(110 * time.Second)
		db.set(func() {
			if len(db.disarmed) != 0 {
				t.Errorf("disarmed within the time of grace: %v", db.disarmed)
			}
		})
		time.Sleep(time.Minute)
		db.set(func() {
			slices.Sort(db.disarmed)
			if d := cmp.Diff([]string{"writ_by_hand", "writ_" + gone.ID}, db.disarmed); d != "" {
				t.Error(d)
			}
			db.found = db.found[:1]
		})
		time.Sleep(time.Minute)
		cancel()
		g.Wait()
		var kinds []string
		w.in(func(tx *sqlstore.Tx) error {
			kinds = nil
			es, err := tx.Unsequenced(w.ctx, 1000)
			for _, e := range es {
				switch e.Kind {
				case audit.LeaseUsed:
					kinds = append(kinds, fmt.Sprint(e.Kind, " ", e.Lease == l.ID, " ", e.Detail["from"]))
				case audit.OrphanFound, audit.OrphanDisarmed, audit.OrphanGone:
					kinds = append(kinds, string(e.Kind))
				}
			}
			return err
		})
		slices.Sort(kinds)
		want := []string{"lease.used true 10.0.0.1", "orphan.disarmed", "orphan.disarmed", "orphan.found", "orphan.found", "orphan.gone", "orphan.gone"}
		if d := cmp.Diff(want, kinds); d != "" {
			t.Error(d)
		}
	})
}
