package httpapi_test

import (
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/decision"
	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/policy"
	"github.com/writsec/writ/internal/session"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/storetest"
)

func renew(t *testing.T, token, lease string, body obj) answer {
	t.Helper()
	body = with(body, "", "")
	delete(body, "session")
	c := call{method: "POST", path: "/leases/" + lease + "/renew", token: token, body: body}
	for range 3 {
		if a := c.send(t); !a.starved() {
			return a
		}
	}
	return c.send(t)
}

func update(session string) obj {
	return with(obj{
		"intent": obj{"action": "crm.opportunity.update"}, "resource": obj{"type": "crm.opportunity", "id": "opp-42"},
	}, "session", session)
}

func lookAt(t *testing.T, token, lease string) answer {
	t.Helper()
	return call{method: "GET", path: "/leases/" + lease, token: token}.send(t)
}

func TestRenewal(t *testing.T) {
	bearer := alice(t)
	session := open(t, bearer)
	first := decide(t, bearer, read(session)).decided(t, "allow", "")
	id := first.str("credential", "lease")
	before := lookAt(t, bearer, id)
	if before.status != http.StatusOK || before.str("state") != "active" || before.str("decision_id") != first.str("decision_id") ||
		before.str("session") != session || before.str("kind") != "jwt" || before.at("ended_at") != nil || strings.Contains(string(before.raw), "eyJ") {
		t.Errorf("the lease: %s", before.raw)
	}
	time.Sleep(1100 * time.Millisecond) // tokens count in whole seconds

	again := renew(t, bearer, id, with(read(""), "", "")).decided(t, "allow", "read_opportunity")
	if again.str("credential", "lease") != id || again.str("decision_id") == first.str("decision_id") || again.str("session") != session ||
		!instant(t, again.str("credential", "expires_at")).After(instant(t, first.str("credential", "expires_at"))) {
		t.Errorf("renewed %s, of %s", again.raw, first.raw)
	}
	if after := lookAt(t, bearer, id); after.str("state") != "active" || after.str("expires_at") != again.str("credential", "expires_at") {
		t.Errorf("the lease after it: %s", after.raw)
	}
	for _, a := range []answer{first, again} {
		if !active(t, "crm", a.str("credential", "secret", "token")) {
			t.Error("a token of the lease is not active")
		}
	}
	reworded := read("")
	reworded["intent"].(obj)["purpose"] = "Once more"
	renew(t, bearer, id, reworded).decided(t, "allow", "")

	// Another act has another lease.
	other := read("")
	other["resource"].(obj)["id"] = "opp-43"
	renew(t, bearer, id, other).refused(t, 409, "not_renewable", "-")
	renew(t, bearer, id, with(read(""), "", "")).decided(t, "allow", "")
	ctx := read("")
	ctx["context"] = obj{"more": true}
	renew(t, bearer, id, ctx).refused(t, 409, "not_renewable", "-")
	renew(t, bearer, id, update("")).refused(t, 409, "not_renewable", "-")

	// It is nobody else's.
	for name, thief := range map[string]string{
		"another agent of the same user": token(t, "user=alice&agent=hr-agent"), "another user of the same agent": token(t, "user=bob&agent=sales-agent"),
		"an operator": olga(t),
	} {
		a := renew(t, thief, id, read(""))
		b := lookAt(t, thief, id)
		if a.status != http.StatusNotFound || b.status != http.StatusNotFound {
			t.Errorf("%s: %d %d", name, a.status, b.status)
		}
	}

	// What policy does not allow any more leaves the credential as it was.
	narrow := call{method: "POST", path: "/sessions/" + session + "/envelope", token: bearer, body: obj{
		"envelope": obj{"actions": []string{"crm.email.read"}, "resources": []obj{{"type": "crm.email", "id": "*"}}},
	}}.send(t)
	if narrow.status != http.StatusOK {
		t.Fatalf("narrow: %s", narrow.raw)
	}
	renew(t, bearer, id, read("")).decided(t, "deny", "outside_envelope")
	if !active(t, "crm", again.str("credential", "secret", "token")) {
		t.Error("a refused renewal ended the lease")
	}

	ended := call{method: "DELETE", path: "/leases/" + id, token: bearer}.send(t)
	if ended.str("state") != "revoked" || ended.str("end_reason") != "released" || ended.str("gone_at") != ended.str("ended_at") {
		t.Errorf("released: %s", ended.raw)
	}
	renew(t, bearer, id, read("")).refused(t, 409, "lease_ended", "-")
	for _, a := range []answer{first, again} {
		if active(t, "crm", a.str("credential", "secret", "token")) {
			t.Error("a token outlived its release")
		}
	}
	plain := call{method: "POST", path: "/leases/" + id + "/renew", token: bearer, body: `{}`, header: headers("Content-Type", "text/plain"), invalid: true}
	plain.send(t).refused(t, 415, "unsupported_media_type", "-")
}

// What people have to do with is not renewed behind their backs.
func TestRenewalAsksNobody(t *testing.T) {
	bearer := alice(t)
	session := open(t, bearer)
	a := decide(t, bearer, update(session)).decided(t, "allow", "")
	decide(t, bearer, obj{"intent": obj{"action": "crm.email.read"}, "resource": obj{"type": "crm.email", "id": "m-1"}, "session": session}).decided(t, "allow", "")
	denied := renew(t, bearer, a.str("credential", "lease"), update("")).decided(t, "deny", "renewal_asks")
	if denied.at("approval") != nil {
		t.Errorf("a renewal opened a prompt: %s", denied.raw)
	}
	approval := approved(t, bearer, update(session), "opp-42")
	got := decide(t, bearer, with(update(session), "approval", approval)).decided(t, "allow", "")
	renew(t, bearer, got.str("credential", "lease"), update("")).refused(t, 409, "not_renewable", "-")
	call{method: "DELETE", path: "/sessions/" + session, token: bearer}.send(t)
	renew(t, bearer, a.str("credential", "lease"), update("")).refused(t, 409, "lease_ended", "-")
}

func revoke(t *testing.T, body obj) answer {
	t.Helper()
	a := call{method: "POST", path: "/revocations", token: olga(t), body: body}.send(t)
	if a.status != http.StatusOK {
		t.Fatalf("revoke: %s", a.raw)
	}
	return a
}

func lift(t *testing.T, revocation string) answer {
	t.Helper()
	a := call{method: "POST", path: "/revocations/" + revocation + "/lift", token: olga(t)}.send(t)
	if a.status != http.StatusOK || a.at("frozen") != false || a.str("lifted_by", "sub") != "olga" || a.str("lifted_at") == "" {
		t.Fatalf("lift: %s", a.raw)
	}
	return a
}

func TestFreezes(t *testing.T) {
	ref := func(sub string) obj { return obj{"iss": w.dev.IDP.Issuer(), "sub": sub} }
	revision := decide(t, alice(t), read("")).str("policy", "revision")
	for _, tt := range []struct {
		name     string
		body     obj
		bystands bool // payments, of another user, agent and minter, go on
	}{
		{"user", obj{"user": ref("alice"), "freeze": true}, true},
		{"agent", obj{"agent": ref("sales-agent"), "freeze": true}, true},
		{"minter", obj{"minter": "crm"}, true},
		{"policy", obj{"policy": revision}, false},
		{"all", obj{"all": true, "freeze": true}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bearer := alice(t)
			session := open(t, bearer)
			a := decide(t, bearer, read(session)).decided(t, "allow", "")
			id, secret := a.str("credential", "lease"), a.str("credential", "secret", "token")
			v := revoke(t, tt.body)
			rev := v.str("id")
			defer call{method: "POST", path: "/revocations/" + rev + "/lift", token: olga(t)}.send(t)
			if v.at("frozen") != true || v.str("gone_at") == "" || v.at("leases").(float64) < 1 || v.at("leases") != v.at("gone") {
				t.Errorf("revoked: %s", v.raw)
			}
			if active(t, "crm", secret) {
				t.Error("a frozen credential is active")
			}
			if got := lookAt(t, bearer, id); got.str("state") != "revoked" || got.str("end_reason") != "operator" {
				t.Errorf("its lease: %s", got.raw)
			}
			renew(t, bearer, id, read("")).refused(t, 409, "lease_ended", "-")
			for range 2 { // in a new session, again and again
				decide(t, bearer, read("")).decided(t, "deny", "halted")
			}
			if ask := decide(t, bob(t), offboard("", "e-frozen-"+tt.name)); (ask.str("decision") == "require_ciba") != tt.bystands {
				t.Errorf("a bystander: %s", ask.raw)
			}
			if n := prompts("e-frozen-" + tt.name); !tt.bystands && n > 0 {
				t.Errorf("%d prompts of what is frozen", n)
			}

			lift(t, rev)
			lift(t, rev) // once more changes nothing
			decide(t, bearer, read("")).decided(t, "allow", "")
			if active(t, "crm", secret) || lookAt(t, bearer, id).str("state") != "revoked" {
				t.Error("lifting revived a credential")
			}
		})
	}
	// Two freezes: each holds by itself.
	one, two := revoke(t, obj{"minter": "crm"}), revoke(t, obj{"user": ref("alice"), "freeze": true})
	lift(t, one.str("id"))
	decide(t, alice(t), read("")).decided(t, "deny", "halted")
	lift(t, two.str("id"))
	decide(t, alice(t), read("")).decided(t, "allow", "")

	// Not frozen: who asks again gets it again.
	for _, body := range []obj{{"minter": "crm", "freeze": false}, {"policy": revision, "freeze": false}} {
		bearer := alice(t)
		session := open(t, bearer)
		a := decide(t, bearer, read(session)).decided(t, "allow", "")
		v := revoke(t, body)
		if active(t, "crm", a.str("credential", "secret", "token")) || v.at("frozen") != false || v.at("sessions") != 0.0 {
			t.Errorf("revoked: %s", v.raw)
		}
		decide(t, bearer, read(session)).decided(t, "allow", "")
		call{method: "POST", path: "/revocations/" + v.str("id") + "/lift", token: olga(t)}.send(t).refused(t, 404, "not_found", "-")
	}
	revoke(t, obj{"minter": "none-of-that-name", "freeze": false})
	decide(t, alice(t), read("")).decided(t, "allow", "")
}

func TestRevocationIsProven(t *testing.T) {
	bearer, operator := alice(t), olga(t)
	session := open(t, bearer)
	var ids []string
	for range 3 {
		ids = append(ids, decide(t, bearer, read(session)).decided(t, "allow", "").str("credential", "lease"))
	}
	v := revoke(t, obj{"session": session, "reason": "it <begs>"})
	rev := v.str("id")
	if v.str("scope", "kind") != "session" || v.str("scope", "id") != session || v.str("operator", "sub") != "olga" || v.str("reason") != "it <begs>" ||
		v.at("leases") != 3.0 || v.at("gone") != 3.0 || v.at("sessions") != 1.0 || v.at("frozen") != false {
		t.Errorf("revoked: %s", v.raw)
	}
	var seen []string
	for cursor := ""; ; {
		p := get(t, operator, "/revocations/"+rev+"?limit=2"+cursor)
		if p.status != http.StatusOK || p.at("leases") != 3.0 || p.at("gone") != 3.0 || p.str("gone_at") == "" {
			t.Fatalf("proof: %s", p.raw)
		}
		for _, row := range p.at("ended_leases").([]any) {
			l := row.(map[string]any)
			if l["state"] != "revoked" || l["minter"] != "crm" || l["ended_at"] == nil || l["gone_at"] == nil {
				t.Errorf("%v", l)
			}
		}
		seen = append(seen, found(p, "ended_leases", "lease")...)
		if p.str("next") == "" || len(seen) > 4 {
			break
		}
		cursor = "&cursor=" + p.str("next")
	}
	slices.Reverse(seen)
	if !slices.Equal(seen, ids) {
		t.Errorf("proven of %q, want %q", seen, ids)
	}

	frozen := revoke(t, obj{"minter": "nothing"})
	if list := found(get(t, operator, "/revocations?limit=2"), "revocations", "id"); !slices.Equal(list, []string{frozen.str("id"), rev}) {
		t.Errorf("the latest are %q", list)
	}
	if list := found(get(t, operator, "/revocations?limit=1&cursor="+frozen.str("id")), "revocations", "id"); !slices.Equal(list, []string{rev}) {
		t.Errorf("the page after is %q", list)
	}
	if list := found(get(t, operator, "/revocations?frozen=true"), "revocations", "id"); !slices.Equal(list, []string{frozen.str("id")}) {
		t.Errorf("frozen are %q", list)
	}
	lift(t, frozen.str("id"))
	if list := found(get(t, operator, "/revocations?frozen=true"), "revocations", "id"); len(list) != 0 {
		t.Errorf("frozen are %q", list)
	}
	for _, path := range []string{"/revocations/rev_00000000000000000000000000", "/revocations/rev_00000000000000000000000000/lift"} {
		method := map[bool]string{true: "POST", false: "GET"}[strings.HasSuffix(path, "lift")]
		call{method: method, path: path, token: operator}.send(t).refused(t, 404, "not_found", "-")
		call{method: method, path: strings.Replace(path, "rev_0", "rev_%ff", 1), token: operator, invalid: true}.send(t).refused(t, 404, "not_found", "-")
		call{method: method, path: path + "?x=1", token: operator, loose: true}.send(t).refused(t, 400, "invalid_request", "x")
		call{method: method, path: path, token: bearer}.send(t).refused(t, 403, "forbidden", "-")
	}
}

func TestSearchLeases(t *testing.T) {
	bearer, operator := alice(t), olga(t)
	session := open(t, bearer)
	first := decide(t, bearer, read(session)).decided(t, "allow", "")
	second := decide(t, bearer, update(session)).decided(t, "allow", "")
	one, two := first.str("credential", "lease"), second.str("credential", "lease")
	v := revoke(t, obj{"lease": one})
	page := get(t, operator, "/leases?session="+session)
	if got := found(page, "leases", "lease"); !slices.Equal(got, []string{two, one}) {
		t.Fatalf("the session's: %s", page.raw)
	}
	l := page.at("leases").([]any)[1].(map[string]any)
	if l["state"] != "revoked" || l["end_reason"] != "operator" || l["revocation"] != v.str("id") || l["gone_at"] == nil || l["minter"] != "crm" ||
		l["policy_revision"] != first.str("policy", "revision") || l["attempts"] != 0.0 || l["stuck_since"] != nil || l["decision_id"] != first.str("decision_id") {
		t.Errorf("%v", l)
	}
	for _, never := range []string{first.str("credential", "secret", "token"), "crm:read", "recall"} {
		if strings.Contains(string(page.raw), never) {
			t.Errorf("a search shows %q: %s", never, page.raw)
		}
	}
	who := url.Values{"user_iss": {w.dev.IDP.Issuer()}, "user_sub": {"alice"}, "agent_iss": {w.dev.IDP.Issuer()}, "agent_sub": {"sales-agent"}}.Encode()
	for query, want := range map[string][]string{
		"state=active&session=" + session:                                     {two},
		"state=revoked&session=" + session:                                    {one},
		"state=revoking&session=" + session:                                   nil,
		"state=intent&minter=crm":                                             nil,
		"stuck=true":                                                          nil,
		"minter=hr&session=" + session:                                        nil,
		"decision=" + second.str("decision_id"):                               {two},
		"revocation=" + v.str("id"):                                           {one},
		"limit=1&session=" + session:                                          {two},
		"limit=1&session=" + session + "&cursor=" + two:                       {one},
		"session=" + session + "&minter=crm&" + who:                           {two, one},
		"session=" + session + "&user_iss=https://x.example&user_sub=alice":   nil,
		"session=" + session + "&agent_iss=https://x.example&agent_sub=alice": nil,
	} {
		if a := get(t, operator, "/leases?"+query); a.status != 200 || !slices.Equal(found(a, "leases", "lease"), want) {
			t.Errorf("%s: %s", query, a.raw)
		}
	}
	if a := get(t, operator, "/orphans"); a.status != 200 || a.at("more") != false || len(a.at("orphans").([]any)) != 0 {
		t.Errorf("orphans: %s", a.raw)
	}
}

func TestLeaseSearchIsForOperators(t *testing.T) {
	for _, path := range []string{"/leases", "/orphans", "/revocations", "/revocations/rev_00000000000000000000000000"} {
		call{method: "GET", path: path, invalid: true}.send(t).refused(t, 401, "invalid_token", "-")
		for _, agent := range []string{alice(t), token(t, "user=olga&agent=sales-agent")} {
			get(t, agent, path).refused(t, 403, "forbidden", "-")
		}
	}
	operator := olga(t)
	for _, tt := range []struct{ path, pointer string }{
		{"/leases?limit=101", "limit"}, {"/leases?cursor=ses_00000000000000000000000000", "cursor"}, {"/leases?state=stuck", "state"},
		{"/leases?stuck=false", "stuck"}, {"/leases?revocation=x", "revocation"}, {"/leases?minter=", "minter"},
		{"/orphans?minter=", "minter"}, {"/revocations?frozen=false", "frozen"}, {"/revocations?cursor=lea_00000000000000000000000000", "cursor"},
		{"/revocations/rev_00000000000000000000000000?limit=0", "limit"},
	} {
		call{method: "GET", path: tt.path, token: operator, invalid: true}.send(t).refused(t, 400, "invalid_request", tt.pointer)
	}
}

// Opening a door needs policy, which shutting it does not.
func TestLiftingNeedsPolicy(t *testing.T) {
	const decision = "package writ\ndecision := {\"effect\": \"deny\", \"reasons\": [{\"code\": \"no\", \"message\": \"no\"}]}\n"
	o := newOffice(t, regoDir(t, decision+`admin := {"allow": false, "reasons": [{"code": "no", "message": "not on a Monday"}]}`))
	for _, body := range []string{`{"all":true,"freeze":true}`, `{"minter":"crm"}`, `{"policy":"p"}`, `{"user":{"iss":"i","sub":"s"},"freeze":true}`, `{"agent":{"iss":"i","sub":"s"},"freeze":true}`} {
		a := o.send("POST", "/revocations", o.token(), body)
		if a.status != 200 || a.at("frozen") != true {
			t.Fatalf("%s: %s", body, a.raw)
		}
		before := len(o.uses())
		o.send("POST", "/revocations/"+a.str("id")+"/lift", o.token("writ-operators"), "").refused(t, 403, "forbidden", "-")
		if uses := o.uses()[before:]; len(uses) != 1 || uses[0].Kind != audit.OperatorRefused || uses[0].Detail["revocation"] != a.str("id") ||
			uses[0].Detail["action"] != "revocations.lift" || uses[0].Detail["path"] != "/revocations/{id}/lift" {
			t.Errorf("recorded as %+v", uses)
		}
	}
	lax := newOffice(t, shipped)
	rev := lax.send("POST", "/revocations", lax.token(), `{"all":true,"freeze":true}`).str("id")
	lax.send("POST", "/revocations/"+rev+"/lift", lax.token("writ-auditors"), "").refused(t, 403, "forbidden", "-")
	mend := storetest.Break(t, lax.url, "audit")
	lax.send("POST", "/revocations/"+rev+"/lift", lax.token("writ-operators"), "").refused(t, 503, "unavailable", "-")
	mend()
	if a := lax.get("/revocations/"+rev, "writ-operators"); a.at("frozen") != true {
		t.Errorf("lifted without a record: %s", a.raw)
	}
	if a := lax.send("POST", "/revocations/"+rev+"/lift", lax.token("writ-operators"), ""); a.status != 200 || a.at("frozen") != false {
		t.Errorf("lift: %s", a.raw)
	}
}

// stuckLease is of a target that can't be reached.
func stuckLease(t *testing.T, o *office) string {
	t.Helper()
	now, user, agent := time.Now(), identity.Ref{Issuer: opsIssuer, ID: "alice"}, identity.Ref{Issuer: opsIssuer, ID: "bot"}
	within := session.New(identity.Principal{Ref: user}, agent, session.Spec{}, session.Settings{DefaultAge: time.Hour}, now)
	allow := decision.Record{ID: id.New(id.Decision), At: now, Session: within.ID, User: user, Agent: agent, Answer: decision.Answer{Decision: policy.Allow}}
	l := lease.Lease{
		ID: id.New(id.Lease), State: lease.Revoking, Session: within.ID, Decision: allow.ID, IntentHash: "sha256:" + strings.Repeat("0", 64),
		User: user, Agent: agent, Policy: "p1", CreatedAt: now.Add(-2 * time.Minute), ExpiresAt: now.Add(time.Hour), EndedAt: now.Add(-time.Minute),
		EndReason: lease.EndReleased, DueAt: now.Add(time.Minute), Attempts: 7, LastError: "dial: connection refused",
		Grant: lease.Grant{Minter: "db", Kind: "postgres", Revocability: lease.RevocableInstant, Precision: lease.PrecisionCoarse, Outside: true},
	}
	o.must(o.store.Update(t.Context(), func(tx *sqlstore.Tx) error {
		return errors.Join(
			tx.InsertSession(t.Context(), within), tx.InsertDecision(t.Context(), allow), tx.InsertLease(t.Context(), l),
			tx.PutOrphan(t.Context(), lease.Orphan{Minter: "db", Name: "writ_a", SeenAt: now}),
			tx.PutOrphan(t.Context(), lease.Orphan{Minter: "db", Name: "writ_b", SeenAt: now}),
		)
	}))
	return l.ID
}

func TestStuckLeasesAndOrphansAreShown(t *testing.T) {
	o := newOffice(t, shipped)
	stuck := stuckLease(t, o)
	a := o.get("/leases?stuck=true", "writ-operators")
	if got := found(a, "leases", "lease"); !slices.Equal(got, []string{stuck}) {
		t.Fatalf("stuck: %s", a.raw)
	}
	l := a.at("leases").([]any)[0].(map[string]any)
	if l["stuck_since"] == nil || l["attempts"] != 7.0 || l["last_error"] != "dial: connection refused" || l["state"] != "revoking" || l["gone_at"] != nil {
		t.Errorf("%v", l)
	}
	for path, want := range map[string]int{"/orphans": 2, "/orphans?minter=db": 2, "/orphans?minter=crm": 0} {
		if a := o.get(path, "writ-operators"); a.status != 200 || len(a.at("orphans").([]any)) != want {
			t.Errorf("%s: %s", path, a.raw)
		}
	}
	o.get("/orphans", "writ-auditors").refused(t, 403, "forbidden", "-")

	// What had ended before, and is not gone, is part of it.
	v := o.send("POST", "/revocations", o.token(), `{"all":true}`)
	if v.at("leases") != 1.0 || v.at("gone") != 0.0 || v.at("gone_at") != nil {
		t.Errorf("%s", v.raw)
	}
}
