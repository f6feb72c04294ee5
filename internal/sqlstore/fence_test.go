package sqlstore

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/writsec/writ/internal/approval"
	"github.com/writsec/writ/internal/id"
)

// Claims and fences as a state machine: workers take due prompts for a while, some
// die, some come back late. Nobody holds what another holds, and a late writer
// changes nothing.
func TestClaimsAndFences(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		s := f.session()
		const claimTime = 30 * time.Second
		type claim struct {
			held  approval.Approval // as it was claimed
			until time.Time
		}
		rapid.Check(t, func(rt *rapid.T) {
			now := func() time.Time { return f.clock.Now() }
			due := map[string]time.Time{} // of what is open
			versions := map[string]int64{}
			claims := map[int]claim{}
			n := 0
			rt.Repeat(map[string]func(*rapid.T){
				"open": func(rt *rapid.T) {
					n++
					a := approval.Approval{
						ID: id.New(id.Approval), Version: 1, State: approval.Pending, Session: s.ID, User: alice, Agent: bot,
						IntentHash: fmt.Sprint(id.New(id.Request), n), Approver: "user", ApproverRef: alice, CreatedAt: now(), ExpiresAt: now().Add(24 * time.Hour),
						DueAt: now().Add(time.Duration(rapid.IntRange(-5, 60).Draw(rt, "due")) * time.Second),
					}
					f.in(func(tx *Tx) error { return tx.InsertApproval(f.ctx, a) })
					due[a.ID], versions[a.ID] = a.DueAt, 1
				},
				"claim": func(rt *rapid.T) {
					worker := rapid.IntRange(0, 3).Draw(rt, "worker")
					var a approval.Approval
					var found bool
					f.in(func(tx *Tx) (err error) {
						if a, found, err = tx.DueApproval(f.ctx); err != nil || !found {
							return err
						}
						a.DueAt = tx.Now().Add(claimTime)
						return tx.UpdateApproval(f.ctx, &a)
					})
					oldest := ""
					for id, at := range due {
						if !at.After(now()) && (oldest == "" || at.Before(due[oldest])) {
							oldest = id
						}
					}
					if found != (oldest != "") {
						rt.Fatalf("found %v, but %q is due", found, oldest)
					}
					if !found {
						return
					}
					at, known := due[a.ID]
					if !known || !at.Equal(due[oldest]) {
						rt.Fatalf("claimed what is due %v, not what is due %v", at, due[oldest])
					}
					for other, c := range claims {
						if c.held.ID == a.ID && now().Before(c.until) {
							rt.Fatalf("%d holds it still", other)
						}
					}
					due[a.ID], versions[a.ID] = a.DueAt, a.Version
					claims[worker] = claim{a, a.DueAt} // what it held before, it forgot: it died
				},
				"finish": func(rt *rapid.T) {
					worker := rapid.IntRange(0, 3).Draw(rt, "worker")
					c, holds := claims[worker]
					if !holds {
						rt.Skip()
					}
					delete(claims, worker)
					a := c.held
					end := rapid.Bool().Draw(rt, "end")
					if end {
						a.State = approval.Denied
					} else {
						a.DueAt = now().Add(5 * time.Second)
					}
					err := f.Update(f.ctx, func(tx *Tx) error { return tx.UpdateApproval(f.ctx, &a) })
					if late := versions[a.ID] != c.held.Version; late != errors.Is(err, approval.ErrStale) || !late && err != nil {
						rt.Fatalf("late %v: %v", late, err)
					}
					if err != nil {
						return
					}
					versions[a.ID] = a.Version
					if end {
						delete(due, a.ID)
					} else {
						due[a.ID] = a.DueAt
					}
				},
				"time": func(rt *rapid.T) {
					f.clock.Add(time.Duration(rapid.IntRange(1, 45).Draw(rt, "seconds")) * time.Second)
				},
			})
			f.in(func(tx *Tx) error { // the next run begins anew
				_, err := tx.exec(f.ctx, "clear", `DELETE FROM approvals`)
				return err
			})
		})
	})
}
