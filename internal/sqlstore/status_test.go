package sqlstore

import (
	"slices"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/revocation"
)

func TestStatusPlaces(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		s := f.session()
		enter := func(place int64, lease string, until time.Time) {
			t.Helper()
			if ok, err := f.PutStatus(f.ctx, place, lease, until); err != nil || !ok {
				t.Fatal(ok, err)
			}
		}
		places := func(from, to int64) []int64 {
			t.Helper()
			out, err := f.BadStatus(f.ctx, from, to)
			if err != nil {
				t.Fatal(err)
			}
			slices.Sort(out)
			return out
		}
		if first, next, err := f.StatusPlaces(f.ctx); first != 0 || next != 0 || err != nil {
			t.Errorf("before anything: %d to %d, %v", first, next, err)
		}
		if n, err := f.ReserveStatus(f.ctx, 10); n != 0 || err != nil {
			t.Fatal(n, err)
		}
		if n, err := f.ReserveStatus(f.ctx, 5); n != 10 || err != nil {
			t.Fatal(n, err)
		}
		until := noon.Add(time.Hour)
		alive, revoked, over := f.lease(s, until), f.lease(s, until), f.lease(s, until)
		enter(2, alive.ID, until)
		enter(3, revoked.ID, until)
		enter(4, over.ID, noon.Add(time.Minute))
		enter(11, id.New(id.Lease), until) // no such lease: it was forgotten, or lost with a commit
		enter(12, revoked.ID, until)
		if ok, err := f.PutStatus(f.ctx, 3, alive.ID, until); ok || err != nil {
			t.Errorf("a place was given twice (%v)", err)
		}
		same(t, []int64{11}, places(0, 15))
		f.in(func(tx *Tx) error {
			for _, l := range []lease.Lease{revoked, over} {
				if _, err := lease.EndOne(f.ctx, tx, l, lease.End{Reason: lease.EndOperator}); err != nil {
					return err
				}
			}
			return nil
		})
		same(t, []int64{3, 4, 11, 12}, places(0, 15))
		same(t, []int64{3, 4}, places(3, 11))
		f.clock.Add(time.Minute)
		same(t, []int64{3, 11, 12}, places(0, 15))
		if first, next, err := f.StatusPlaces(f.ctx); first != 2 || next != 15 || err != nil {
			t.Errorf("%d to %d, %v", first, next, err)
		}
		// What the kill switch has stopped is bad before it is ended.
		f.in(func(tx *Tx) error {
			return tx.InsertRevocation(f.ctx, revocation.Revocation{
				ID: id.New(id.Revocation), At: f.Now(), Scope: revocation.Scope{Kind: revocation.OfSession, Value: s.ID},
			})
		})
		same(t, []int64{2, 3, 11, 12}, places(0, 15))
		f.clock.Add(time.Hour)
		if n, err := f.ReserveStatus(f.ctx, 1); n != 15 || err != nil {
			t.Fatal(n, err)
		}
		if first, next, err := f.StatusPlaces(f.ctx); first != 16 || next != 16 || err != nil {
			t.Errorf("what is over is kept: %d to %d, %v", first, next, err)
		}
	})
}

// Replicas never get the same places, however they hurry.
func TestStatusPlacesAreTakenOnce(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		other, err := f.second(nil)
		if err != nil {
			t.Fatal(err)
		}
		got := make(chan int64, 40)
		var g errgroup.Group
		for i := range 40 {
			g.Go(func() error {
				first, err := []*Store{f.Store, other}[i%2].ReserveStatus(f.ctx, 7)
				got <- first
				return err
			})
		}
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
		close(got)
		var all []int64
		for n := range got {
			all = append(all, n)
		}
		slices.Sort(all)
		for i, n := range all {
			if n != int64(i)*7 {
				t.Fatalf("block %d begins at %d", i, n)
			}
		}
	})
}
