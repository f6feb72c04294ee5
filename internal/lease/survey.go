package lease

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/writsec/writ/internal/audit"
)

// SurveyTx is what surveys need of a transaction.
type SurveyTx interface {
	audit.Tx
	Now() time.Time
	// Spend uses up what is good once only; fresh says that nobody has before.
	Spend(ctx context.Context, use string, expires time.Time) (fresh bool, err error)
	// KnownLeases returns those of the ids that are leases and were not gone at a time.
	KnownLeases(ctx context.Context, ids []string, at time.Time) (map[string]Lease, error)
	// Orphans lists what was found at a minter's target that no lease knows.
	Orphans(ctx context.Context, minter string) ([]Orphan, error)
	PutOrphan(ctx context.Context, o Orphan) error
	DropOrphan(ctx context.Context, minter, name string) error
}

// Orphan is a credential at a target that no lease knows: after a restore from backup,
// or made by hand under a name that is Writ's to give.
type Orphan struct {
	Minter     string
	Name       string
	SeenAt     time.Time // first
	DisarmedAt time.Time // zero until then
}

// SurveyStore runs transactions.
type SurveyStore interface {
	Update(ctx context.Context, f func(SurveyTx) error) error
}

// Surveys looks at targets from time to time: whoever uses a credential there is
// recorded, and what no lease knows is disarmed.
type Surveys struct {
	Store   SurveyStore
	Targets map[string]Surveyor
	// Every is how often each target is looked at, by one of the replicas; Grace is how
	// long an orphan is left alone, in case its lease is about to be known.
	Every, Grace time.Duration
	Logger       *slog.Logger
}

const surveyTime = 10 * time.Second

// Run works until ctx ends.
func (s *Surveys) Run(ctx context.Context) error {
	var g sync.WaitGroup
	for name, target := range s.Targets {
		g.Go(func() {
			for pause(ctx, s.Every, nil) {
				if err := s.step(ctx, name, target); err != nil && ctx.Err() == nil {
					s.Logger.ErrorContext(ctx, "survey a target", "minter", name, "error", err)
				}
			}
		})
	}
	g.Wait()
	return nil
}

// step looks at one target, unless another replica does.
func (s *Surveys) step(ctx context.Context, name string, target Surveyor) error {
	var mine bool
	err := s.Store.Update(ctx, func(tx SurveyTx) (err error) {
		turn := tx.Now().UnixNano() / int64(s.Every)
		mine, err = tx.Spend(ctx, "survey:"+name+":"+strconv.FormatInt(turn, 10), tx.Now().Add(2*s.Every))
		return err
	})
	if err != nil || !mine {
		return err
	}
	bound, cancel := context.WithTimeout(ctx, surveyTime)
	defer cancel()
	found, err := target.Survey(bound)
	if err != nil {
		return fmt.Errorf("survey: %w", err)
	}
	overdue, err := s.record(ctx, name, found)
	if err != nil || len(overdue) == 0 {
		return err
	}
	if err := target.Disarm(bound, overdue); err != nil {
		return fmt.Errorf("disarm orphans: %w", err)
	}
	return s.disarmed(ctx, name, overdue)
}

// record enters what a survey found, and returns the orphans whose time is over.
func (s *Surveys) record(ctx context.Context, minter string, found []Sighting) (overdue []string, err error) {
	var ids []string
	for _, f := range found {
		ids = append(ids, f.Lease)
	}
	err = s.Store.Update(ctx, func(tx SurveyTx) error {
		overdue = nil
		known, err := tx.KnownLeases(ctx, ids, tx.Now().Add(-2*surveyTime))
		if err != nil {
			return err
		}
		before, err := orphansByName(ctx, tx, minter)
		if err != nil {
			return err
		}
		for _, f := range found {
			if l, ok := known[f.Lease]; ok {
				if l.Minter != minter { // of another minter at the same server, who looks too
					continue
				}
				if err := sawUses(ctx, tx, l, f); err != nil {
					return err
				}
				continue
			}
			o, ok := before[f.Name]
			delete(before, f.Name)
			switch {
			case !ok:
				o = Orphan{Minter: minter, Name: f.Name, SeenAt: tx.Now()}
				if err := tx.PutOrphan(ctx, o); err != nil {
					return err
				}
				s.Logger.WarnContext(ctx, "a credential that no lease knows", "minter", minter, "name", f.Name)
				if err := o.record(ctx, tx, audit.OrphanFound, map[string]any{"armed": f.Armed, "connections": len(f.Uses)}); err != nil {
					return err
				}
			case (f.Armed || len(f.Uses) > 0) && tx.Now().Sub(o.SeenAt) >= s.Grace:
				overdue = append(overdue, f.Name)
			}
		}
		for name, o := range before { // not there any more
			if err := errors.Join(tx.DropOrphan(ctx, minter, name), o.record(ctx, tx, audit.OrphanGone, nil)); err != nil {
				return err
			}
		}
		return nil
	})
	return overdue, err
}

func orphansByName(ctx context.Context, tx SurveyTx, minter string) (map[string]Orphan, error) {
	list, err := tx.Orphans(ctx, minter)
	out := map[string]Orphan{}
	for _, o := range list {
		out[o.Name] = o
	}
	return out, err
}

// sawUses records each connection once, whichever replica saw it.
func sawUses(ctx context.Context, tx SurveyTx, l Lease, f Sighting) error {
	for _, c := range f.Uses {
		fresh, err := tx.Spend(ctx, "connection:"+l.ID+":"+c.ID, l.ExpiresAt.Add(24*time.Hour))
		if err != nil {
			return err
		}
		if !fresh {
			continue
		}
		detail := map[string]any{"minter": l.Minter, "name": f.Name, "since": c.Since}
		if c.From != "" {
			detail["from"] = c.From
		}
		if err := record(ctx, tx, audit.LeaseUsed, l, detail); err != nil {
			return err
		}
	}
	return nil
}

func (s *Surveys) disarmed(ctx context.Context, minter string, names []string) error {
	return s.Store.Update(ctx, func(tx SurveyTx) error {
		orphans, err := tx.Orphans(ctx, minter)
		if err != nil {
			return err
		}
		for _, o := range orphans {
			if !slices.Contains(names, o.Name) {
				continue
			}
			o.DisarmedAt = tx.Now()
			if err := errors.Join(tx.PutOrphan(ctx, o), o.record(ctx, tx, audit.OrphanDisarmed, nil)); err != nil {
				return err
			}
		}
		return nil
	})
}

func (o Orphan) record(ctx context.Context, tx audit.Tx, kind audit.Kind, more map[string]any) error {
	detail := map[string]any{"minter": o.Minter, "name": o.Name}
	for k, v := range more {
		detail[k] = v
	}
	return audit.Append(ctx, tx, audit.Entry{Kind: kind, Detail: detail})
}
