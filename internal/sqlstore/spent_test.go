package sqlstore

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/writsec/writ/internal/dpop"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/storetest"
)

var _ dpop.Store = (*Store)(nil)

func (f *fixture) wantSpend(use string, expires time.Time, want bool) {
	f.t.Helper()
	if fresh, err := f.Spend(f.ctx, use, expires); err != nil || fresh != want {
		f.t.Errorf("Spend(%s) = %v %v, want %v", use, fresh, err, want)
	}
}

func (f *fixture) forgetSpent(limit int) (n int64) {
	f.t.Helper()
	f.in(func(tx *Tx) (err error) {
		n, err = tx.ForgetSpent(f.ctx, limit)
		return err
	})
	return n
}

func TestSpend(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		soon := noon.Add(time.Minute)
		f.wantSpend("dpop a", soon, true)
		f.wantSpend("dpop a", soon, false)
		f.wantSpend("dpop a", soon.Add(time.Hour), false) // a later end is no other use
		f.wantSpend("dpop b", soon, true)
		f.wantSpend("set a", soon, true) // kinds don't meet
		f.wantSpend("dpop c", noon, false)
		f.wantSpend("dpop c", noon.Add(-time.Hour), false)
		f.wantSpend("dpop c", soon, true) // what was over has left no trace
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		f.reopen()
		f.wantSpend("dpop a", soon, false)
	})
}

// The end is by the store's clock, and exact: spent until then, refused after it
// whether forgotten or not.
func TestSpentIsForgottenAtItsEnd(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		ends := noon.Add(time.Minute)
		for i := range 5 {
			f.wantSpend(fmt.Sprint("dpop ", i), ends, true)
		}
		f.wantSpend("dpop long", ends.Add(time.Hour), true)
		if n := f.forgetSpent(10); n != 0 {
			t.Errorf("forgot %d before the time", n)
		}
		f.clock.Add(time.Minute - time.Microsecond)
		if n := f.forgetSpent(10); n != 0 {
			t.Errorf("forgot %d before the time", n)
		}
		f.wantSpend("dpop 0", ends, false)
		f.clock.Add(time.Microsecond)
		f.wantSpend("dpop 0", ends, false)
		for _, want := range []int64{3, 2, 0} {
			if n := f.forgetSpent(3); n != want {
				t.Errorf("forgot %d, want %d", n, want)
			}
		}
		f.wantSpend("dpop 0", ends, false) // forgotten, and over all the same
		f.wantSpend("dpop long", ends.Add(time.Hour), false)
	})
}

// Exactly one of many spends at once is told that it is the first, also between
// replicas.
func TestSpendInParallel(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		replicas := []*Store{f.Store}
		if f.path == "" {
			other, err := Open(f.ctx, f.config())
			if err != nil {
				t.Fatal(err)
			}
			defer other.Close()
			replicas = append(replicas, other)
		}
		for round := range 5 {
			var fresh atomic.Int32
			var wg sync.WaitGroup
			start := make(chan struct{})
			for i := range 64 {
				wg.Go(func() {
					<-start
					ok, err := replicas[i%len(replicas)].Spend(f.ctx, fmt.Sprint("dpop ", round), noon.Add(time.Minute))
					if err != nil {
						t.Error(err)
					}
					if ok {
						fresh.Add(1)
					}
				})
			}
			close(start)
			wg.Wait()
			if n := fresh.Load(); n != 1 {
				t.Errorf("round %d: %d were told that they are the first", round, n)
			}
		}
	})
}

// What could not be committed is not fresh, and not spent.
func TestSpendFails(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		ends := noon.Add(time.Minute)
		// PostgreSQL finds out with the commit, after the row was counted.
		broken := `CREATE TRIGGER broken AFTER INSERT ON spent BEGIN SELECT RAISE(FAIL, 'disk full'); END`
		mend := `DROP TRIGGER broken`
		if f.path == "" {
			storetest.Exec(t, f.url, `CREATE FUNCTION broken() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'disk full'; END $$`)
			broken = `CREATE CONSTRAINT TRIGGER broken AFTER INSERT ON spent DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION broken()`
			mend = `DROP TRIGGER broken ON spent`
		}
		storetest.Exec(t, f.url, broken)
		if fresh, err := f.Spend(f.ctx, "dpop a", ends); fresh || !fault.Is(err, fault.Unavailable) {
			t.Errorf("Spend = %v %v", fresh, err)
		}
		storetest.Exec(t, f.url, mend)
		f.wantSpend("dpop a", ends, true)

		gone, cancel := context.WithCancel(f.ctx)
		cancel()
		if fresh, err := f.Spend(gone, "dpop b", ends); fresh || err == nil {
			t.Errorf("for a caller that left: %v %v", fresh, err)
		}
		f.wantSpend("dpop b", ends, true)
	})
}
