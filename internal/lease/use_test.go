package lease_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/sqlstore"
)

// failing is a store that fails while told to.
type failing struct {
	lease.UseStore
	fail atomic.Bool
}

func (f *failing) Update(ctx context.Context, do func(audit.Tx) error) error {
	if f.fail.Load() {
		return errors.New("out of order")
	}
	return f.UseStore.Update(ctx, do)
}

func (w *world) uses(id string) (out []string) {
	w.t.Helper()
	w.in(func(tx *sqlstore.Tx) error {
		out = nil
		es, err := tx.Unsequenced(w.ctx, 1000)
		for _, e := range es {
			if e.Kind == audit.LeaseUsed && e.Lease == id {
				n, _ := e.Detail["count"].(json.Number)
				out = append(out, fmt.Sprintf("%v %v %v", e.Detail["service"], e.Detail["active"], n))
			}
		}
		return err
	})
	return out
}

func TestUses(t *testing.T) {
	inWorld(t, func(w *world) {
		store := &failing{UseStore: sqlstore.For[audit.Tx](w.store)}
		u := &lease.Uses{Store: store, Logger: quiet}
		ctx, stop := context.WithCancel(w.ctx)
		done := make(chan error)
		go func() { done <- u.Run(ctx) }()
		l := w.begin(time.Minute)
		see := func(service string, alive bool) error { return u.Seen(w.ctx, l, service, alive) }
		want := func(want ...string) {
			w.t.Helper()
			if d := cmp.Diff(want, w.uses(l.ID)); d != "" {
				w.t.Error(d)
			}
		}

		// What can't be recorded is not answered.
		store.fail.Store(true)
		if see("crm", true) == nil {
			t.Error("a first sight that is not recorded")
		}
		store.fail.Store(false)
		want()

		for range 4 {
			if err := see("crm", true); err != nil {
				t.Fatal(err)
			}
		}
		if err := see("other", true); err != nil {
			t.Fatal(err)
		}
		if err := see("crm", false); err != nil { // after its end
			t.Fatal(err)
		}
		want("crm true 1", "other true 1", "crm false 1")
		time.Sleep(11 * time.Second)
		synctest.Wait()
		want("crm true 1", "other true 1", "crm false 1", "crm true 3")

		// While the log can't be written they stay counted.
		_ = see("crm", true)
		store.fail.Store(true)
		time.Sleep(10 * time.Second)
		_ = see("crm", true)
		store.fail.Store(false)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		want("crm true 1", "other true 1", "crm false 1", "crm true 3", "crm true 2")

		// After a while without use, the next is a first sight again.
		time.Sleep(time.Minute)
		_ = see("other", true)
		want("crm true 1", "other true 1", "crm false 1", "crm true 3", "crm true 2", "other true 1")

		_ = see("other", true)
		stop() // a stop loses nothing
		if err := <-done; err != nil {
			t.Error(err)
		}
		_ = see("other", true)
		want("crm true 1", "other true 1", "crm false 1", "crm true 3", "crm true 2", "other true 1", "other true 1", "other true 1")
	})
}
