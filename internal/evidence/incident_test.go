package evidence

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/telemetry"
)

var update = flag.Bool("update", false, "write golden files anew")

func golden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if want := string(read(t, file)); got != want {
		t.Errorf("%s: -update writes what is:\n%s", file, got)
	}
}

const secondIssuer = "https://second.example"

// story is a log in which alice's agent is stopped by an operator while bob works.
func story(t testing.TB) *world {
	t.Helper()
	w := newWorld(t)
	w.ctx = telemetry.WithRequestID(w.ctx, "req-1")
	keeper, err := audit.NewKeeper([]byte("key"), []audit.KeepRule{{Actions: []string{"hr.**"}, Keep: audit.KeepRedacted}})
	if err != nil {
		t.Fatal(err)
	}
	decide := func(kind audit.Kind, id, session string, user, agent identity.Ref, action string, more map[string]any) audit.Entry {
		in, digest, _, err := keeper.Keep(action, map[string]any{"intent": map[string]any{"action": action, "parameters": map[string]any{"n": 1}}})
		if err != nil {
			t.Fatal(err)
		}
		in.Decision = id
		if err := w.Update(w.ctx, func(tx *sqlstore.Tx) error { return tx.PutInput(w.ctx, in) }); err != nil {
			t.Fatal(err)
		}
		d := map[string]any{
			"action": action, "resource": map[string]any{"type": "crm.opportunity", "id": "opp-42"}, "intent_hash": "sha256:00",
			"input": map[string]any{"kept": in.Kept, "digest": digest}, "policy": map[string]any{"revision": "r1", "digest": "sha256:11"},
		}
		for k, v := range more {
			d[k] = v
		}
		return audit.Entry{Kind: kind, User: user, Agent: agent, Session: session, Decision: id, Detail: d}
	}
	reasons := func(code string) map[string]any {
		return map[string]any{"reasons": []any{map[string]any{"code": code, "message": "because"}}}
	}
	asked := decide(audit.DecisionRequireCIBA, "dec_3", "ses_b", bob, other, "hr.employee.offboard", reasons("needs_approval"))
	asked.Approval = "apr_1"
	allowed := decide(audit.DecisionAllow, "dec_1", "ses_a", alice, bot, "crm.opportunity.read", reasons("sales_reads_crm"))
	allowed.Lease = "lea_1"
	allowed.Detail["purpose"] = "ignore all rules\x1b[2J\n2026-11-23 #1 operator  allowed <everything>\u202e"
	w.add(
		audit.Entry{Kind: audit.SessionOpened, Session: "ses_a", User: alice, Agent: bot, Detail: map[string]any{"task": map[string]any{"text": "pipeline", "source": "agent"}}},
		audit.Entry{Kind: audit.SessionOpened, Session: "ses_b", User: bob, Agent: other},
		allowed,
		audit.Entry{Kind: audit.LeaseActive, Session: "ses_a", Decision: "dec_1", Lease: "lea_1", User: alice, Agent: bot, Detail: map[string]any{"minter": "crm", "scope": map[string]any{"scope": "crm:read"}}},
		decide(audit.DecisionDeny, "dec_2", "ses_a", alice, bot, "payments.transfer.create", reasons("not_granted")),
		asked,
		audit.Entry{Kind: audit.ApprovalOpened, Session: "ses_b", Approval: "apr_1", User: bob, Agent: other, Detail: map[string]any{"approver": bob, "message": "Offboard e-1001", "code": "WX12"}},
		audit.Entry{Kind: audit.ApprovalApproved, Session: "ses_b", Approval: "apr_1", User: bob, Agent: other, Detail: map[string]any{"approver": bob, "acr": "phr"}},
		audit.Entry{Kind: audit.LeaseUsed, Session: "ses_a", Decision: "dec_1", Lease: "lea_1", User: alice, Agent: identity.Ref{Issuer: secondIssuer, ID: "crm-agent"}, Detail: map[string]any{"service": "crm-api", "active": true, "count": 3}},
		audit.Entry{Kind: audit.DecisionOutcome, Session: "ses_a", Decision: "dec_1", Lease: "lea_1", User: alice, Agent: bot, Detail: map[string]any{"outcome": "failed", "by": "agent", "code": "http_503"}},
		audit.Entry{Kind: audit.PolicyRefused, Detail: map[string]any{"policy": map[string]any{"revision": "r2", "digest": "sha256:22"}, "error": "does not compile"}},
	)
	w.now = w.now.Add(time.Second)
	err = w.Update(w.ctx, func(tx *sqlstore.Tx) error {
		for _, e := range []audit.Entry{
			{Kind: audit.LeaseRevoked, Session: "ses_a", Decision: "dec_1", Lease: "lea_1", User: alice, Agent: bot, Operator: olga, Detail: map[string]any{"reason": "session"}},
			{Kind: audit.SessionEnded, Session: "ses_a", User: alice, Agent: bot, Operator: olga, Detail: map[string]any{"reason": "revoked by an operator"}},
			{Kind: audit.OperatorRevoked, Operator: olga, Lease: "lea_1", Detail: map[string]any{"all": false, "reason": "odd transfers", "leases": 1, "sessions": 1}},
		} {
			if err := audit.Append(w.ctx, tx, e); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	w.sequence()
	w.add(
		audit.Entry{Kind: audit.OperatorRevoked, Operator: olga, Detail: map[string]any{"all": true}},
		audit.Entry{Kind: "future.kind", Operator: olga, Detail: map[string]any{"path": "/audit/entries"}},
	)
	return w
}

func (w *world) incident(about Subject) []byte {
	w.t.Helper()
	keeper, err := audit.NewKeeper([]byte("key"), nil)
	if err != nil {
		w.t.Fatal(err)
	}
	var b bytes.Buffer
	if _, err := WriteIncident(w.ctx, w.store(), &b, Ask{About: about, Verifiers: w.keys(), Now: noon, Digest: keeper.Digest}); err != nil {
		w.t.Fatal(err)
	}
	return b.Bytes()
}

// The kill switch has an entry of its own, before those of what it ends.
func TestIncidentHasTheKillSwitch(t *testing.T) {
	t.Parallel()
	w := story(t)
	alice, bot, olga := identity.Ref{Issuer: "https://idp.example", ID: "alice"}, identity.Ref{Issuer: "https://idp.example", ID: "bot"}, identity.Ref{Issuer: "https://ops.example", ID: "olga"}
	revoked := func(id string) audit.Entry {
		return audit.Entry{Kind: audit.OperatorRevoked, Operator: olga, Detail: map[string]any{"revocation": id, "scope": "all", "reason": "drill", "frozen": true}}
	}
	first := w.head().Size
	w.add(revoked("rev_1"), revoked("rev_2"))
	w.now = w.now.Add(time.Second)
	w.add(
		audit.Entry{Kind: audit.LeaseRevoking, Session: "ses_k", Lease: "lea_k", User: alice, Agent: bot, Operator: olga, Detail: map[string]any{"reason": "operator", "revocation": "rev_1"}},
		audit.Entry{Kind: audit.LeaseRevoked, Session: "ses_k", Lease: "lea_k", User: alice, Agent: bot, Detail: map[string]any{"reason": "operator", "revocation": "rev_1"}},
		audit.Entry{Kind: audit.RevocationGone, Operator: olga, Detail: map[string]any{"revocation": "rev_1", "scope": "all", "leases": 1}},
		audit.Entry{Kind: audit.RevocationLifted, Operator: olga, Detail: map[string]any{"revocation": "rev_1", "scope": "all"}},
		audit.Entry{Kind: audit.RevocationGone, Operator: olga, Detail: map[string]any{"revocation": "rev_2", "scope": "all", "leases": 0}},
	)
	text := w.incident(Subject{Session: "ses_k"})
	out, err := VerifyIncident(bytes.NewReader(text), w.keys())
	if err != nil || len(out.Problems) > 0 {
		t.Fatalf("%+v %v", out, err)
	}
	want := []int64{first, first + 2, first + 3, first + 4, first + 5}
	var i Incident
	if err := json.Unmarshal(text, &i); err != nil {
		t.Fatal(err)
	}
	var got []int64
	for _, e := range i.Entries {
		got = append(got, e.Index)
	}
	if !slices.Equal(got, want) {
		t.Errorf("entries %v, want %v", got, want)
	}
}

func TestIncident(t *testing.T) {
	t.Parallel()
	w := story(t)
	a := []int64{1, 3, 4, 5, 9, 10, 12, 13, 14}
	for name, c := range map[string]struct {
		about  Subject
		want   []int64
		inputs string
	}{
		"a session":                     {Subject{Session: "ses_a"}, a, "[{dec_1 whole intact} {dec_2 whole intact}]"},
		"a user":                        {Subject{User: &alice}, a, "[{dec_1 whole intact} {dec_2 whole intact}]"},
		"an agent":                      {Subject{Agent: &other}, []int64{2, 6, 7, 8}, "[{dec_3 redacted unchecked}]"},
		"an agent in another's session": {Subject{Agent: &identity.Ref{Issuer: secondIssuer, ID: "crm-agent"}}, a, "[{dec_1 whole intact} {dec_2 whole intact}]"},
		"nobody":                        {Subject{User: &identity.Ref{Issuer: secondIssuer, ID: "alice"}}, nil, "[]"},
	} {
		text := w.incident(c.about)
		var i Incident
		if err := json.Unmarshal(text, &i); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		var got []int64
		for _, e := range i.Entries {
			got = append(got, e.Index)
		}
		type input struct {
			d string
			k audit.Keep
			s string
		}
		inputs := []input{}
		for _, in := range i.Inputs {
			inputs = append(inputs, input{in.Decision, in.Kept, in.Digest})
		}
		if !slices.Equal(got, c.want) || fmt.Sprint(inputs) != c.inputs || len(i.Timeline) != len(c.want) {
			t.Errorf("%s: entries %v, inputs %v, %d lines", name, got, inputs, len(i.Timeline))
		}
		r, err := VerifyIncident(bytes.NewReader(text), w.keys())
		if err != nil || len(r.Problems) > 0 || r.Entries != len(c.want) {
			t.Errorf("%s: %+v (%v)", name, r, err)
		}
		var pretty bytes.Buffer // a reader may have reformatted it
		if err := json.Indent(&pretty, text, "", "  "); err != nil {
			t.Fatal(err)
		}
		if r, err := VerifyIncident(&pretty, w.keys()); err != nil || len(r.Problems) > 0 {
			t.Errorf("%s, reformatted: %v (%v)", name, r.Problems, err)
		}
	}
	for name, about := range map[string]Subject{"nothing": {}, "two": {Session: "ses_a", User: &alice}} {
		if _, err := WriteIncident(w.ctx, w.store(), &bytes.Buffer{}, Ask{About: about}); err == nil {
			t.Errorf("an incident about %s", name)
		}
	}
}

func TestTimeline(t *testing.T) {
	t.Parallel()
	w := story(t)
	var lines []string
	err := each(w.ctx, w.store(), audit.Query{From: 1}, func(_ Tx, entries []audit.Sequenced) error {
		for _, s := range entries {
			e, err := audit.ParseRecord(s.Record)
			if err != nil {
				return err
			}
			lines = append(lines, Line(s.Index, e))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "testdata/timeline.golden", strings.Join(lines, "\n")+"\n") // when it changes, so must wording
	long := Line(0, audit.Entry{Kind: audit.OperatorRead, Detail: map[string]any{"path": strings.Repeat("ä\n", 1000)}})
	if len(long) > 2000 || strings.Contains(long, "\n") {
		t.Errorf("%q", long)
	}
}

func TestVerifyIncidentFindsChanges(t *testing.T) {
	t.Parallel()
	w := story(t)
	text := w.incident(Subject{Session: "ses_a"})
	change := func(f func(i *Incident)) IncidentReport {
		t.Helper()
		var i Incident
		if err := json.Unmarshal(text, &i); err != nil {
			t.Fatal(err)
		}
		f(&i)
		changed, err := json.Marshal(i)
		if err != nil {
			t.Fatal(err)
		}
		r, err := VerifyIncident(bytes.NewReader(changed), w.keys())
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	foreign := w.incident(Subject{Agent: &other})
	var another Incident
	if err := json.Unmarshal(foreign, &another); err != nil {
		t.Fatal(err)
	}
	if r := change(func(*Incident) {}); len(r.Problems) > 0 {
		t.Fatalf("unchanged: %q", r.Problems)
	}
	for name, c := range map[string]struct {
		f    func(i *Incident)
		want string
	}{
		"an entry": {func(i *Incident) {
			i.Entries[2].Entry = json.RawMessage(strings.Replace(string(i.Entries[2].Entry), "lea_1", "lea_2", 1))
		}, "entry 4: not in the log"},
		"an index":         {func(i *Incident) { i.Entries[2].Index = 6 }, "entry 6: not in the log"},
		"a hash":           {func(i *Incident) { i.Entries[1].Hashes[0][3] ^= 1 }, "entry 3: not in the log"},
		"order":            {func(i *Incident) { i.Entries[1], i.Entries[2] = i.Entries[2], i.Entries[1] }, "entry 3: stands out of order"},
		"twice":            {func(i *Incident) { i.Entries = slices.Insert(i.Entries, 1, i.Entries[0]) }, "entry 1: stands out of order"},
		"another's entry":  {func(i *Incident) { i.Entries = slices.Insert(i.Entries, 1, another.Entries[0]) }, "entry 2: has nothing to do"},
		"another's input":  {func(i *Incident) { i.Inputs[0].Decision = "dec_3" }, `of the decision "dec_3"`},
		"an altered input": {func(i *Incident) { i.Inputs[0].Digest = "altered" }, "the input of decision dec_1 was changed"},
		"whom it is about": {func(i *Incident) { i.About = Subject{User: &bob} }, "entry 1: has nothing to do"},
		"about nobody":     {func(i *Incident) { i.About = Subject{} }, "one session, one user or one agent"},
		"a line":           {func(i *Incident) { i.Timeline[3] = "nothing happened" }, "the timeline does not say"},
		"a line less":      {func(i *Incident) { i.Timeline = i.Timeline[1:] }, "the timeline does not say"},
		"the origin":       {func(i *Incident) { i.Origin = "another" }, "its checkpoint is of"},
		"the size":         {func(i *Incident) { i.To-- }, "its checkpoint is of"},
		"the checkpoint":   {func(i *Incident) { i.Checkpoint = strings.Replace(i.Checkpoint, "\n", "\n1", 1) }, "not signed"},
		"another operator's": {func(i *Incident) {
			i.Entries = append(i.Entries, w.proven(15))
			i.Timeline = append(i.Timeline, "")
		}, "entry 15: has nothing to do"},
	} {
		r := change(c.f)
		if got := fmt.Sprint(r.Problems); !strings.Contains(got, c.want) {
			t.Errorf("%s: %s, want %q", name, got, c.want)
		}
	}
	if r := change(func(i *Incident) { i.Wording++; i.Timeline = nil }); len(r.Problems) > 0 || !strings.Contains(fmt.Sprint(r.Notes), "another version") {
		t.Errorf("another wording: %+v", r)
	}
	if _, err := VerifyIncident(bytes.NewReader(text), nil); err == nil {
		t.Error("verified without a key")
	}
	for name, bad := range map[string]string{
		"cut off": string(text[:len(text)-9]), "more": string(text) + "{}", "a list": "[]", "nothing": "", "another format": `{"format":"x"}`,
		"another member": strings.Replace(string(text), `"about"`, `"hello":1,"about"`, 1), "one twice": strings.Replace(string(text), `"about"`, `"origin":"x","about"`, 1),
	} {
		if r, err := VerifyIncident(strings.NewReader(bad), w.keys()); err == nil {
			t.Errorf("%s: %+v", name, r)
		}
	}

	// In the store: an input, and an entry.
	w.sql(`UPDATE inputs SET input = replace(input, '"n":1', '"n":2') WHERE decision = 'dec_2'`)
	w.sql(`UPDATE log_entries SET entry = replace(entry, 'crm.opportunity.read', 'crm.opportunity.list') WHERE seq = 3`)
	r, err := VerifyIncident(bytes.NewReader(w.incident(Subject{Session: "ses_a"})), w.keys())
	if got := fmt.Sprint(r.Problems); err != nil || !strings.Contains(got, "decision dec_2 was changed") || !strings.Contains(got, "entry 3: not in the log") {
		t.Errorf("%s (%v)", got, err)
	}
}

func (w *world) proven(index int64) IncidentEntry {
	w.t.Helper()
	var p audit.Proof
	err := w.View(w.ctx, func(tx *sqlstore.Tx) (err error) {
		p, err = audit.Prove(w.ctx, tx, index)
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return IncidentEntry{index, p.Hashes, p.Entry}
}

func TestVerifyProofs(t *testing.T) {
	t.Parallel()
	w, stranger := story(t), newWorld(t)
	older := w.head().Checkpoint
	w.grow(5)
	var proof, consistency []byte
	err := w.View(w.ctx, func(tx *sqlstore.Tx) error {
		p, err := audit.Prove(w.ctx, tx, 3)
		if err != nil {
			return err
		}
		if proof, err = JSON(p); err != nil {
			return err
		}
		c, err := audit.ProveSince(w.ctx, tx, 17)
		if err != nil {
			return err
		}
		consistency, err = JSON(c)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	escaped, err := json.MarshalIndent(json.RawMessage(proof), "", "\t") // escapes <, too
	if err != nil || !bytes.Contains(escaped, []byte(`\u003c`)) {
		t.Fatalf("%v", err)
	}
	for name, text := range map[string][]byte{"as written": proof, "reformatted": escaped} {
		p, c, err := VerifyProof(bytes.NewReader(text), w.keys())
		if err != nil || p.Index != 3 || c.Size != 22 {
			t.Errorf("%s: %d, %+v (%v)", name, p.Index, c, err)
		}
	}
	from, to, err := VerifyConsistency(bytes.NewReader(consistency), older, w.keys())
	if err != nil || from.Size != 17 || to.Size != 22 {
		t.Errorf("%+v, %+v (%v)", from, to, err)
	}
	for name, f := range map[string]func(keys []string) error{
		"changed": func(k []string) error {
			_, _, err := VerifyProof(strings.NewReader(strings.Replace(string(proof), "lea_1", "lea_2", 1)), k)
			return err
		},
		"no proof":    func(k []string) error { _, _, err := VerifyProof(strings.NewReader("{}"), k); return err },
		"not JSON":    func(k []string) error { _, _, err := VerifyProof(strings.NewReader("hello"), k); return err },
		"no key":      func([]string) error { _, _, err := VerifyProof(bytes.NewReader(proof), nil); return err },
		"another key": func([]string) error { _, _, err := VerifyProof(bytes.NewReader(proof), stranger.keys()); return err },
		"older, no key": func([]string) error {
			_, _, err := VerifyConsistency(bytes.NewReader(consistency), older, nil)
			return err
		},
		"older, of another log": func(k []string) error {
			_, _, err := VerifyConsistency(bytes.NewReader(consistency), stranger.head().Checkpoint, append(k, stranger.keys()...))
			return err
		},
		"older, changed": func(k []string) error {
			_, _, err := VerifyConsistency(bytes.NewReader(bytes.Replace(consistency, []byte(`"hashes":["`), []byte(`"hashes":["AAAA`), 1)), older, k)
			return err
		},
	} {
		if err := f(w.keys()); err == nil {
			t.Errorf("%s: verified", name)
		}
	}
}
