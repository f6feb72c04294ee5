package lease_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/intent"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/session"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/telemetry"
)

// sim is one history of leases at one target: agents that are killed at any point,
// workers that are killed at any point, a target that fails in every way.
type sim struct {
	t       *rapid.T
	ctx     context.Context
	now     *time.Time
	store   *sqlstore.Store
	session session.Session
	db      *simTarget
	worker  *lease.Worker
	leases  []*simLease
}

// simLease is a lease, and how far its agent's request came.
type simLease struct {
	lease.Lease
	minted, killed, delivered bool
}

// simTarget has tombstones, as the contract of lease.Target wants.
type simTarget struct {
	there, tombs map[string]bool
	fault        string // of the next call
}

func (*simTarget) Plan(lease.Want) (lease.Grant, *lease.Refusal) { panic("not asked here") }

func (s *simTarget) Mint(_ context.Context, o lease.Order) (lease.Made, error) {
	fault := s.fault
	s.fault = ""
	if s.tombs[o.Lease.ID] || fault == "down" {
		return lease.Made{}, errors.New("refused")
	}
	s.there[o.Lease.ID] = true
	if fault == "lost" {
		return lease.Made{}, errors.New("the answer was lost")
	}
	return lease.Made{Recall: "r"}, nil
}

func (s *simTarget) Unmake(_ context.Context, leases []lease.Lease) ([]lease.Unmade, error) {
	fault := s.fault
	s.fault = ""
	if fault == "down" {
		return nil, errors.New("down")
	}
	out := make([]lease.Unmade, len(leases))
	for i, l := range leases {
		s.tombs[l.ID] = true
		if fault == "one stays" && i == 0 {
			out[i].Err = errors.New("stays")
			continue
		}
		delete(s.there, l.ID)
	}
	if fault == "lost" {
		return nil, errors.New("the answer was lost")
	}
	return out, nil
}

func (s *sim) in(f func(*sqlstore.Tx) error) error { return s.store.Update(s.ctx, f) }

func (s *sim) must(err error) {
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *sim) pick() *simLease {
	if len(s.leases) == 0 {
		s.t.Skip("no lease yet")
	}
	return s.leases[rapid.IntRange(max(0, len(s.leases)-6), len(s.leases)-1).Draw(s.t, "lease")]
}

func (s *sim) begin(*rapid.T) {
	g := outside("db", 30*time.Second)
	l := &simLease{}
	s.must(s.in(func(tx *sqlstore.Tx) error {
		l.Lease = lease.New(g, s.session.ID, s.session.EndsAt, "dec", "rev", intent.Act{User: user.Ref, Agent: agent.Ref}, "h", tx.Now())
		return lease.Begin(s.ctx, tx, l.Lease, s.session.StartedAt, lease.Limits{})
	}))
	s.leases = append(s.leases, l)
}

// mint is the request's call of the target, perhaps long after it should have been.
func (s *sim) mint(t *rapid.T) {
	l := s.pick()
	if l.minted || l.killed {
		t.Skip("not now")
	}
	_, err := s.db.Mint(s.ctx, lease.Order{Lease: l.Lease})
	if l.minted = err == nil; !l.minted {
		l.killed = true
		s.must(s.in(func(tx *sqlstore.Tx) error { return lease.Fail(s.ctx, tx, l.Lease) }))
	}
}

func (s *sim) activate(t *rapid.T) {
	l := s.pick()
	if !l.minted || l.killed || l.delivered {
		t.Skip("not now")
	}
	err := s.in(func(tx *sqlstore.Tx) error { return lease.Activate(s.ctx, tx, l.Lease, "recall") })
	switch {
	case err == nil:
		l.delivered = true
	case errors.Is(err, lease.ErrStale):
		l.killed = true
		s.must(s.in(func(tx *sqlstore.Tx) error {
			return errors.Join(lease.Fail(s.ctx, tx, l.Lease), lease.Recalled(s.ctx, tx, l.Lease, "recall"))
		}))
	default:
		s.must(err)
	}
}

// kill is a SIGKILL of who was making it.
func (s *sim) kill(*rapid.T) { s.pick().killed = true }

func (s *sim) release(*rapid.T) {
	l := s.pick()
	s.must(s.in(func(tx *sqlstore.Tx) error {
		_, err := lease.EndOne(s.ctx, tx, l.Lease, lease.End{Reason: lease.EndReleased})
		return err
	}))
}

func (s *sim) expire(*rapid.T) {
	s.must(s.in(func(tx *sqlstore.Tx) error {
		_, err := lease.EndAll(s.ctx, tx, lease.Selection{Due: true}, lease.End{Reason: lease.EndExpired})
		if err != nil {
			return err
		}
		_, err = lease.EndAll(s.ctx, tx, lease.Selection{Overdue: true}, lease.End{Reason: lease.EndMintFailed})
		return err
	}))
}

func (s *sim) work(t *rapid.T) {
	s.db.fault = rapid.SampledFrom([]string{"", "", "down", "lost", "one stays"}).Draw(t, "fault")
	_, err := s.worker.Step(s.ctx, "db")
	if err != nil && s.db.fault != "" {
		s.must(err)
	}
	s.db.fault = ""
}

// workAndDie claims, perhaps unmakes, and is killed before it could tell.
func (s *sim) workAndDie(t *rapid.T) {
	var leases []lease.Lease
	s.must(s.in(func(tx *sqlstore.Tx) (err error) {
		leases, err = tx.ClaimLeases(s.ctx, "db", fmt.Sprint("dead ", s.now.UnixNano(), len(s.leases)), 20*time.Second, false, 3)
		return err
	}))
	if rapid.Bool().Draw(t, "unmade") {
		_, err := s.db.Unmake(s.ctx, leases)
		s.must(err)
	}
}

func (s *sim) wait(t *rapid.T) {
	*s.now = s.now.Add(time.Duration(rapid.IntRange(1, 15_000).Draw(t, "ms")) * time.Millisecond)
}

// check holds at any moment.
func (s *sim) check(*rapid.T) {
	now := map[string]lease.State{}
	s.must(s.store.View(s.ctx, func(tx *sqlstore.Tx) error {
		ls, err := tx.Leases(s.ctx, lease.Query{Session: s.session.ID, Limit: 1000})
		for _, l := range ls {
			now[l.ID] = l.State
		}
		return err
	}))
	for _, l := range s.leases {
		l.State = now[l.ID]
		switch {
		case l.State == lease.Revoked && s.db.there[l.ID]:
			s.t.Fatalf("%s is revoked by the record, and is there", l.ID)
		case l.State == lease.Active && !l.delivered:
			s.t.Fatalf("%s is active, and nobody was told", l.ID)
		}
	}
}

// A crash anywhere, a fault anywhere: in the end nothing is left, each end was entered
// once, and nothing was called gone that was there.
func TestEveryHistoryEnds(t *testing.T) {
	t.Parallel()
	if os.Getenv("WRIT_CHAOS") != "full" {
		if err := flag.Set("rapid.checks", "20"); err != nil {
			t.Fatal(err)
		}
	}
	now := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	store, err := sqlstore.Open(t.Context(), sqlstore.Config{
		URL: "sqlite:" + filepath.Join(t.TempDir(), "writ.db"), Relaxed: true, Now: func() time.Time { return now }, Logger: quiet,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = store.Close() }()
	var all []string
	rapid.Check(t, func(t *rapid.T) { // one after the other, in one store
		s := &sim{t: t, ctx: context.Background(), now: &now, store: store, db: &simTarget{there: map[string]bool{}, tombs: map[string]bool{}}}
		s.worker = &lease.Worker{
			Store: sqlstore.For[lease.WorkTx](s.store), Targets: map[string]lease.Target{"db": s.db}, Breakers: map[string]*lease.Breaker{},
			Metrics: telemetry.NewMetrics(), Logger: quiet,
		}
		s.must(s.in(func(tx *sqlstore.Tx) error {
			s.session = session.New(user, agent.Ref, session.Spec{}, session.Settings{DefaultAge: 12 * time.Hour}, tx.Now())
			return session.Open(s.ctx, tx, s.session, identity.Principal{})
		}))
		t.Repeat(map[string]func(*rapid.T){
			"begin": s.begin, "mint": s.mint, "activate": s.activate, "kill": s.kill, "release": s.release, "expire": s.expire,
			"work": s.work, "work and die": s.workAndDie, "wait": s.wait, "": s.check,
		})
		for range 40 { // all is well from now on
			*s.now = s.now.Add(5 * time.Minute)
			s.expire(t)
			_, err := s.worker.Step(s.ctx, "db")
			s.must(err)
		}
		s.check(t)
		for _, l := range s.leases {
			if l.State != lease.Revoked {
				t.Errorf("%s is %s in the end", l.ID, l.State)
			}
		}
		if len(s.db.there) > 0 {
			t.Errorf("left at the target: %v", s.db.there)
		}
		for _, l := range s.leases {
			all = append(all, l.ID)
		}
	})
	ends := map[string]int{}
	err = store.View(t.Context(), func(tx *sqlstore.Tx) error {
		es, err := tx.Unsequenced(t.Context(), 10_000_000)
		for _, e := range es {
			if e.Kind == audit.LeaseRevoking {
				ends[e.Lease]++
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range all {
		if ends[id] != 1 {
			t.Errorf("%s has %d entries of its end", id, ends[id])
		}
	}
}
