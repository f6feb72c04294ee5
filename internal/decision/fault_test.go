package decision_test

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/writsec/writ/internal/decision"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/storetest"
)

// Nothing can be recorded: the target is not even asked. What ended before ends there
// all the same, and once entries can be written again everything goes on.
func TestFault10NothingIsMintedWithoutARecord(t *testing.T) {
	f, m, revoker := withTarget(t)
	ctx := context.Background()
	s := f.open()
	var ls []string
	for range 5 {
		a, err := f.mint(s)
		f.must(err)
		ls = append(ls, a.Credential.Lease)
	}
	caller := identity.Caller{Agent: identity.Principal{Ref: identity.Ref{Issuer: issuer, ID: "agent"}}}
	m.mu.Lock() // what it is asked for waits
	for _, l := range ls[:3] {
		_, err := revoker.Release(ctx, caller, l)
		f.must(err)
	}
	mend := storetest.Break(t, f.url, "audit")
	m.mu.Unlock()

	minted := m.minted.Load()
	var failed atomic.Int64
	var g sync.WaitGroup
	for range 8 {
		g.Go(func() {
			for range 5 {
				r := f.request("mint")
				r.Session = s
				if a, err := f.Decide(ctx, r); err == nil || a.Credential != nil || !fault.Is(err, fault.Unavailable) {
					t.Errorf("%+v, %v", a, err)
				}
				failed.Add(1)
			}
		})
	}
	g.Wait()
	if n := m.minted.Load() - minted; n != 0 {
		t.Errorf("%d credentials were made that nothing records", n)
	}
	for begin := time.Now(); m.count() > 2 && time.Since(begin) < 10*time.Second; {
		time.Sleep(20 * time.Millisecond)
	}
	if n := m.count(); n != 2 {
		t.Errorf("%d credentials at the target, want the two that have not ended", n)
	}
	if _, err := revoker.Release(ctx, caller, ls[3]); err == nil {
		t.Error("an end was acknowledged that nothing records")
	}
	if gone := f.gone(ls[:3]); gone != 0 {
		t.Errorf("%d ends are called seen that nothing records", gone)
	}

	mend()
	var a decision.Answer
	var err error
	for begin := time.Now(); time.Since(begin) < 10*time.Second; time.Sleep(100 * time.Millisecond) {
		if a, err = f.mint(s); err == nil {
			break
		}
	}
	if err != nil || a.Credential == nil {
		t.Errorf("after the repair: %v", err)
	}
	f.sql(`UPDATE leases SET due_at = 1 WHERE state = 'revoking'`) // the claims lapse, which takes 20 s
	for begin := time.Now(); f.gone(ls[:3]) < 3 && time.Since(begin) < 30*time.Second; {
		time.Sleep(50 * time.Millisecond)
	}
	if gone := f.gone(ls[:3]); gone != 3 {
		t.Errorf("%d of 3 ends are recorded after the repair", gone)
	}
	t.Logf("fault 10: %d requests refused, 0 minted, 3 ended at the target without a record and recorded after the repair", failed.Load())
}

// gone counts the leases whose end was seen.
func (f *fixture) gone(ids []string) (n int) {
	f.t.Helper()
	f.must(f.store.View(context.Background(), func(tx *sqlstore.Tx) error {
		n = 0
		for _, id := range ids {
			l, err := tx.Lease(context.Background(), id)
			if err != nil {
				return err
			}
			if l.State == lease.Revoked {
				n++
			}
		}
		return nil
	}))
	return n
}
