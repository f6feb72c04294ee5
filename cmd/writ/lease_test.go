package main

import (
	"encoding/json"
	"os/user"
	"strings"
	"testing"
	"time"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/decision"
	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/intent"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/policy"
	"github.com/writsec/writ/internal/session"
	"github.com/writsec/writ/internal/sqlstore"
)

const leaseAgents = `
agents:
  - {issuer: https://idp.example, id: crm-agent, identities: [{issuer: https://idp.example, id: crm-account}]}
`

// newLeaseBench has policies that don't load, because the kill switch needs none.
func newLeaseBench(t *testing.T) *bench {
	t.Helper()
	b := newBench(t)
	b.write("writ.yaml", benchConfig+leaseAgents)
	b.write("policies/writ.rego", "package writ\n\nbroken := {")
	b.now = time.Now()
	return b
}

// allow opens a session of a user and an agent and begins a lease in it.
func (b *bench) allow(user, agent, minter string, outside bool) (s session.Session, l lease.Lease) {
	b.t.Helper()
	ctx := b.t.Context()
	u, a := identity.Ref{Issuer: "https://idp.example", ID: user}, identity.Ref{Issuer: "https://idp.example", ID: agent}
	err := b.store.Update(ctx, func(tx *sqlstore.Tx) error {
		s = session.New(identity.Principal{Ref: u}, a, session.Spec{}, session.Settings{DefaultAge: time.Hour}, tx.Now())
		if err := session.Open(ctx, tx, s, identity.Principal{Ref: a}); err != nil {
			return err
		}
		r := decision.Record{ID: id.New(id.Decision), At: tx.Now(), Session: s.ID, User: u, Agent: a, Answer: decision.Answer{Decision: policy.Allow}}
		g := lease.Grant{Minter: minter, Kind: "jwt", Scope: map[string]any{"scopes": []string{"crm:read"}}, TTL: time.Minute, Revocability: lease.RevocableInstant, Outside: outside}
		l = lease.New(g, s.ID, s.EndsAt, r.ID, "revision-1", intent.Act{User: u, Agent: a}, "sha256:x", tx.Now())
		r.Lease = l.ID
		if err := tx.InsertDecision(ctx, r); err != nil {
			return err
		}
		return lease.Begin(ctx, tx, l, s.StartedAt, lease.Limits{})
	})
	if err != nil {
		b.t.Fatal(err)
	}
	return s, l
}

func (b *bench) lease(id string) (l lease.Lease) {
	b.t.Helper()
	err := b.store.View(b.t.Context(), func(tx *sqlstore.Tx) (err error) {
		l, err = tx.Lease(b.t.Context(), id)
		return err
	})
	if err != nil {
		b.t.Fatal(err)
	}
	return l
}

func jsonOf(t *testing.T, text string) (v map[string]any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return v
}

func TestLeaseListAndShowCommands(t *testing.T) {
	t.Parallel()
	b := newLeaseBench(t)
	s, alices := b.allow("alice", "crm-agent", "crm", false)
	_, bobs := b.allow("bob", "hr-agent", "hr", true)
	for name, c := range map[string]struct {
		args []string
		want []string
	}{
		"all":            {nil, []string{bobs.ID, alices.ID}},
		"session":        {[]string{"--session", s.ID}, []string{alices.ID}},
		"decision":       {[]string{"--decision", bobs.Decision}, []string{bobs.ID}},
		"user":           {[]string{"--user", "https://idp.example#bob"}, []string{bobs.ID}},
		"another issuer": {[]string{"--user", "https://other.example#bob"}, nil},
		"agent":          {[]string{"--agent", "https://idp.example#crm-agent"}, []string{alices.ID}},
		"its account":    {[]string{"--agent", "https://idp.example#crm-account"}, []string{alices.ID}},
		"minter":         {[]string{"--minter", "hr"}, []string{bobs.ID}},
		"active":         {[]string{"--state", "active"}, []string{alices.ID}},
		"intent":         {[]string{"--state", "intent"}, []string{bobs.ID}},
		"revoked":        {[]string{"--state", "revoked"}, nil},
		"stuck":          {[]string{"--stuck"}, nil},
		"a page":         {[]string{"--limit", "1"}, []string{bobs.ID}},
		"the next":       {[]string{"--limit", "1", "--before", bobs.ID}, []string{alices.ID}},
	} {
		out := b.run(0, append([]string{"lease", "list", "--json"}, c.args...)...)
		var got []string
		for line := range strings.Lines(out) {
			got = append(got, jsonOf(t, line)["lease"].(string))
		}
		if strings.Join(got, " ") != strings.Join(c.want, " ") {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
	lines := strings.Split(strings.TrimSpace(b.run(0, "lease", "list")), "\n")
	if len(lines) != 3 {
		t.Fatalf("%q", lines)
	}
	want(t, lines[2], alices.ID+"  active  crm     alice  crm-agent")
	want(t, b.run(0, "lease", "show", alices.ID), "state        active", `scope        {"scopes":["crm:read"]}`, "user         https://idp.example#alice", "policy       revision-1")
	if v := jsonOf(t, b.run(0, "lease", "show", alices.ID, "--json")); v["state"] != "active" || v["decision_id"] != alices.Decision || v["attempts"] != 0.0 {
		t.Errorf("%v", v)
	}
	b.run(1, "lease", "show", "lea_00000000000000000000000000")
	for _, args := range [][]string{{"--user", "alice"}, {"--state", "dead"}, {"--limit", "0"}, {"--agent", "https://idp.example#"}} {
		b.run(exitUsage, append([]string{"lease", "list"}, args...)...)
	}
}

func TestLeaseRevokeCommand(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		args   func(session.Session, lease.Lease) []string
		frozen bool
		ends   bool // the session
		all    bool // also of the bystander
	}{
		"lease":   {func(_ session.Session, l lease.Lease) []string { return []string{l.ID} }, false, false, false},
		"session": {func(s session.Session, _ lease.Lease) []string { return []string{"--session", s.ID} }, false, true, false},
		"user":    {func(session.Session, lease.Lease) []string { return []string{"--user", "https://idp.example#alice"} }, false, true, false},
		"agent": {func(session.Session, lease.Lease) []string {
			return []string{"--agent", "https://idp.example#crm-agent"}
		}, false, true, false},
		"account": {func(session.Session, lease.Lease) []string {
			return []string{"--agent", "https://idp.example#crm-account", "--freeze"}
		}, true, true, false},
		"minter":    {func(session.Session, lease.Lease) []string { return []string{"--minter", "crm"} }, true, false, false},
		"policy":    {func(session.Session, lease.Lease) []string { return []string{"--policy", "revision-1", "--no-freeze"} }, false, false, true},
		"all":       {func(session.Session, lease.Lease) []string { return []string{"--all"} }, false, true, true},
		"freeze it": {func(session.Session, lease.Lease) []string { return []string{"--all", "--freeze"} }, true, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newLeaseBench(t)
			s, l := b.allow("alice", "crm-agent", "crm", false)
			_, other := b.allow("bob", "hr-agent", "hr", false)
			v := jsonOf(t, b.run(0, append([]string{"lease", "revoke", "--json", "--reason", "drill"}, c.args(s, l)...)...))
			ended := map[bool]float64{false: 1, true: 2}[c.all]
			if v["leases"] != ended || v["gone"] != ended || v["gone_at"] == nil || v["frozen"] != c.frozen || (v["sessions"] != 0.0) != c.ends {
				t.Errorf("revoked %v", v)
			}
			if got := b.lease(l.ID); got.State != lease.Revoked || got.EndReason != lease.EndOperator || got.Revocation != v["id"] {
				t.Errorf("%+v", got)
			}
			if got := b.lease(other.ID); (got.State == lease.Revoked) != c.all {
				t.Errorf("a bystander: %+v", got)
			}
			me, err := user.Current()
			if err != nil {
				t.Fatal(err)
			}
			var entry audit.Entry
			if err := b.store.View(t.Context(), func(tx *sqlstore.Tx) error {
				all, err := tx.Unsequenced(t.Context(), 1000)
				for _, e := range all {
					if e.Kind == audit.OperatorRevoked {
						entry = e
					}
				}
				return err
			}); err != nil {
				t.Fatal(err)
			}
			if entry.Operator != (identity.Ref{Issuer: "local", ID: me.Username}) || entry.Detail["reason"] != "drill" || entry.Detail["revocation"] != v["id"] {
				t.Errorf("recorded as %+v", entry)
			}
			rev := v["id"].(string)
			if !c.frozen {
				want(t, b.run(1, "lease", "lift", rev), "holds nothing back")
				return
			}
			want(t, b.run(0, "lease", "lift", rev), rev+" was lifted at ")
			if v := jsonOf(t, b.run(0, "lease", "lift", "--json", rev)); v["frozen"] != false || v["lifted_at"] == nil {
				t.Errorf("lifted %v", v)
			}
		})
	}
}

func TestLeaseRevokeCommandSaysWhatIsLeft(t *testing.T) {
	t.Parallel()
	b := newLeaseBench(t)
	_, l := b.allow("alice", "crm-agent", "db", true)
	out := b.run(0, "lease", "revoke", "--minter", "db")
	want(t, out, "in force since", "Ended 0 sessions and 1 leases, of which 0 were seen to be gone.", "Not gone yet: 1.", "writ lease lift rev_")
	if got := b.lease(l.ID); got.State != lease.Revoking {
		t.Errorf("%+v", got)
	}
	want(t, b.run(0, "lease", "list"), l.ID+"  revoking")
}

func TestLeaseRevokeCommandIsStrict(t *testing.T) {
	t.Parallel()
	b := newLeaseBench(t)
	_, l := b.allow("alice", "crm-agent", "crm", false)
	for _, args := range [][]string{
		{}, {"--freeze"}, {"--all", "--minter", "crm"}, {l.ID, "--all"}, {"lea_x"}, {"ses_00000000000000000000000000"}, {l.ID, "--freeze"},
		{"--session", "ses_00000000000000000000000000", "--freeze"}, {"--user", "alice"}, {"--user", "https://idp.example", "alice"},
		{"--all", "--reason", strings.Repeat("ü", 501)},
	} {
		b.run(exitUsage, append([]string{"lease", "revoke"}, args...)...)
	}
	b.run(1, "lease", "revoke", "lea_00000000000000000000000000")
	b.run(1, "lease", "revoke", "--session", "ses_00000000000000000000000000")
	b.run(1, "lease", "lift", "rev_00000000000000000000000000")
	if got := b.lease(l.ID); got.State != lease.Active {
		t.Errorf("a refused command revoked: %+v", got)
	}
}

// An operator has moved bad policies away, and a mount with secrets is gone.
func TestLeaseRevokeCommandNeedsTheStoreAlone(t *testing.T) {
	t.Parallel()
	b := newLeaseBench(t)
	_, l := b.allow("alice", "crm-agent", "db", true)
	b.write("writ.yaml", strings.Replace(benchConfig, "policies", "nowhere", 1)+leaseAgents+
		"nonsense: true\nservices: [{id: crm-api, secret_file: nowhere, audience: urn:x}]\n")
	if out := b.run(0, "lease", "revoke", "--all"); b.lease(l.ID).State != lease.Revoking {
		t.Error(out)
	}
	b.run(1, "lease", "revoke", "--minter", "dbb") // a typo must not look like a success
	b.write("writ.yaml", strings.Replace(benchConfig, "store:", "stor:", 1))
	b.run(1, "lease", "revoke", "--all")
}

func TestLeaseAbandonCommand(t *testing.T) {
	t.Parallel()
	b := newLeaseBench(t)
	_, l := b.allow("alice", "crm-agent", "db", true)
	b.run(1, "lease", "abandon", l.ID, "--reason", "x") // it has not ended
	b.run(0, "lease", "revoke", l.ID)
	b.run(2, "lease", "abandon", l.ID) // without a reason
	want(t, b.run(0, "lease", "abandon", l.ID, "--reason", "the database was deleted"), "is taken for gone")
	if got := b.lease(l.ID); got.State != lease.Revoked || got.GoneAt.IsZero() {
		t.Errorf("%+v", got)
	}
	b.run(1, "lease", "abandon", l.ID, "--reason", "again")
}
