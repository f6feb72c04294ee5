package sqlstore

import (
	"slices"
	"testing"
	"time"

	"github.com/writsec/writ/internal/decision"
	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/policy"
	"github.com/writsec/writ/internal/revocation"
)

func TestSearchLeases(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		sessions := f.sessions()
		rev := id.New(id.Revocation)
		long := noon.Add(-time.Hour)
		var all, decisions []string
		for _, l := range []lease.Lease{
			{Session: sessions[0], User: alice, Agent: bot, State: lease.Active, Grant: lease.Grant{Minter: "crm"}},
			{Session: sessions[0], User: alice, Agent: bot, State: lease.Revoked, Grant: lease.Grant{Minter: "crm"}, EndedAt: noon, GoneAt: noon, Revocation: rev},
			{Session: sessions[2], User: other, Agent: bot, State: lease.Intent, Grant: lease.Grant{Minter: "db", Outside: true}},
			// It failed once; it was not tried yet; it waits for its time; it ended just now.
			{Session: sessions[3], User: alice, Agent: other, State: lease.Revoking, Grant: lease.Grant{Minter: "db", Outside: true}, EndedAt: long, DueAt: noon.Add(time.Hour), Attempts: 1, Revocation: rev},
			{Session: sessions[3], User: alice, Agent: other, State: lease.Revoking, Grant: lease.Grant{Minter: "db", Outside: true}, EndedAt: long, DueAt: long},
			{Session: sessions[4], User: hostis, Agent: bot, State: lease.Revoking, Grant: lease.Grant{Minter: "x", Revocability: lease.RevocableExpiry}, EndedAt: long, DueAt: noon.Add(time.Hour)},
			{Session: sessions[4], User: hostis, Agent: bot, State: lease.Revoking, Grant: lease.Grant{Minter: "db", Outside: true}, EndedAt: noon, DueAt: noon, Attempts: 1},
		} {
			l.ID, l.Decision, l.CreatedAt, l.ExpiresAt = id.New(id.Lease), id.New(id.Decision), long, noon.Add(time.Hour)
			f.in(func(tx *Tx) error {
				r := decision.Record{ID: l.Decision, At: noon, Session: l.Session, User: l.User, Agent: l.Agent, Answer: decision.Answer{Decision: policy.Allow}}
				if err := tx.InsertDecision(f.ctx, r); err != nil {
					return err
				}
				return tx.InsertLease(f.ctx, l)
			})
			all, decisions = append(all, l.ID), append(decisions, l.Decision)
		}
		for _, x := range []struct {
			name string
			q    lease.Query
			want []int
		}{
			{"all, newest first", lease.Query{}, []int{6, 5, 4, 3, 2, 1, 0}},
			{"a session", lease.Query{Session: sessions[0]}, []int{1, 0}},
			{"a decision", lease.Query{Decision: decisions[2]}, []int{2}},
			{"a minter", lease.Query{Minter: "db"}, []int{6, 4, 3, 2}},
			{"a revocation", lease.Query{Revocation: rev}, []int{3, 1}},
			{"a user", lease.Query{User: alice}, []int{4, 3, 1, 0}},
			{"of that issuer only", lease.Query{User: other}, []int{2}},
			{"quotes are letters", lease.Query{User: hostis}, []int{6, 5}},
			{"an agent", lease.Query{Agent: other}, []int{4, 3}},
			{"a state", lease.Query{State: lease.Revoking}, []int{6, 5, 4, 3}},
			{"stuck", lease.Query{Stuck: true}, []int{4, 3}},
			{"stuck, of a revocation", lease.Query{Stuck: true, Revocation: rev}, []int{3}},
			{"before", lease.Query{Before: all[2]}, []int{1, 0}},
			{"a page", lease.Query{Limit: 2}, []int{6, 5}},
			{"nothing", lease.Query{Minter: "' OR '1'='1"}, nil},
		} {
			if x.q.Limit == 0 {
				x.q.Limit = 100
			}
			var got []string
			for _, l := range must(f, func(tx *Tx) ([]lease.Lease, error) { return tx.Leases(f.ctx, x.q) }) {
				got = append(got, l.ID)
				if stuck := !l.StuckSince(noon).IsZero(); x.q.Stuck && !stuck {
					t.Errorf("%s: the store says that %+v is stuck, the lease does not", x.name, l)
				}
			}
			if got := places(all, got); !slices.Equal(got, x.want) {
				t.Errorf("%s: %v, want %v", x.name, got, x.want)
			}
		}
	})
}

func TestSearchRevocationsAndOrphans(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		var all []string
		for i, frozen := range []bool{false, true, true} {
			v := revocation.Revocation{
				ID: id.New(id.Revocation), At: noon, Scope: revocation.Scope{Kind: revocation.OfUser, Issuer: alice.Issuer, Value: alice.ID},
				Operator: identity.Ref{Issuer: "local", ID: "root"}, Reason: "' --", Frozen: frozen,
			}
			f.in(func(tx *Tx) error {
				if err := tx.InsertRevocation(f.ctx, v); err != nil || i != 1 {
					return err
				}
				v.Frozen, v.EndedAt, v.LiftedAt, v.LiftedBy = false, noon, noon, bot
				return tx.UpdateRevocation(f.ctx, v)
			})
			all = append(all, v.ID)
		}
		for _, x := range []struct {
			name string
			q    revocation.Query
			want []int
		}{
			{"all", revocation.Query{Limit: 10}, []int{2, 1, 0}},
			{"frozen", revocation.Query{Frozen: true, Limit: 10}, []int{2}},
			{"a page", revocation.Query{Limit: 1}, []int{2}},
			{"the next", revocation.Query{Limit: 1, Before: all[2]}, []int{1}},
		} {
			var got []string
			for _, v := range must(f, func(tx *Tx) ([]revocation.Revocation, error) { return tx.Revocations(f.ctx, x.q) }) {
				got = append(got, v.ID)
				if v.Reason != "' --" || v.Scope.Value != alice.ID {
					t.Errorf("%+v", v)
				}
			}
			if got := places(all, got); !slices.Equal(got, x.want) {
				t.Errorf("%s: %v, want %v", x.name, got, x.want)
			}
		}
		f.in(func(tx *Tx) error {
			for _, o := range []lease.Orphan{{Minter: "db", Name: "b", SeenAt: noon}, {Minter: "db", Name: "a", SeenAt: noon}, {Minter: "aa", Name: "z", SeenAt: noon}} {
				if err := tx.PutOrphan(f.ctx, o); err != nil {
					return err
				}
			}
			return nil
		})
		for minter, want := range map[string]string{"": "zab", "db": "ab", "none": ""} {
			got := ""
			for _, o := range must(f, func(tx *Tx) ([]lease.Orphan, error) { return tx.Orphans(f.ctx, minter) }) {
				got += o.Name
			}
			if got != want {
				t.Errorf("orphans of %q: %q, want %q", minter, got, want)
			}
		}
	})
}
