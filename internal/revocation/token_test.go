package revocation_test

import (
	"testing"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/revocation"
	"github.com/writsec/writ/internal/sqlstore"
)

func TestServiceRevokesOneToken(t *testing.T) {
	w := newWorld(t)
	revoke := func(lease string) {
		t.Helper()
		if err := w.revoker.RevokeToken(t.Context(), "crm-api", lease); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		revoke(w.leaseOf["alice-x"])
	}
	revoke("lea_unknown")
	if _, err := w.revoke(t.Context(), revocation.Scope{Kind: revocation.OfLease, Value: w.leaseOf["bob-x"]}, ""); err != nil {
		t.Fatal(err)
	}
	revoke(w.leaseOf["bob-x"]) // ended by another
	var services, ends []string
	err := w.View(t.Context(), func(tx *sqlstore.Tx) error {
		l, err := tx.Lease(t.Context(), w.leaseOf["alice-x"])
		if err != nil || l.EndReason != "revoked_by_service" {
			t.Errorf("%+v, %v", l, err)
		}
		es, err := tx.Unsequenced(t.Context(), 100)
		for _, e := range es {
			switch e.Kind {
			case audit.ServiceRevoked:
				services = append(services, e.Lease+" "+e.Detail["service"].(string))
				if e.User != alice.Ref || e.Agent != x.Ref || e.Operator != (identity.Ref{}) {
					t.Errorf("%+v", e)
				}
			case audit.LeaseRevoked:
				ends = append(ends, e.Lease)
			}
		}
		return err
	})
	if err != nil || len(services) != 1 || services[0] != w.leaseOf["alice-x"]+" crm-api" || len(ends) != 2 {
		t.Errorf("recorded %q and the ends of %q (%v)", services, ends, err)
	}
	if got := w.metric(`writ_leases_total{event="revoked_by_service",kind="jwt"}`); got != "1" {
		t.Errorf("counted %s times", got)
	}
	live := w.alive()
	if len(live) != len(all("alice-x", "alice-y", "bob-x"))-2 {
		t.Errorf("what lives is %q", live)
	}
}
