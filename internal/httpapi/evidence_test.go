package httpapi_test

import (
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/writsec/writ/internal/audit"
)

func get(t *testing.T, token, path string) answer {
	t.Helper()
	return call{method: "GET", path: path, token: token}.send(t)
}

// entry is one of the log, as the API shows it.
type entry struct {
	index float64
	obj
}

// logged waits until a session has n entries in the log.
func logged(t *testing.T, session string, n int) []entry {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		a := get(t, olga(t), "/audit/entries?session="+session)
		var out []entry
		for _, e := range a.at("entries").([]any) {
			m := e.(map[string]any)
			out = append(out, entry{m["index"].(float64), m["entry"].(map[string]any)})
		}
		if len(out) >= n || time.Now().After(end) {
			return out
		}
	}
}

func kinds(es []entry) (out []string) {
	for _, e := range es {
		out = append(out, e.obj["kind"].(string))
	}
	return out
}

func TestOutcome(t *testing.T) {
	bearer := alice(t)
	session := open(t, bearer)
	a := decide(t, bearer, read(session)).decided(t, "allow", "")
	report := func(decision, bearer string, body any) answer {
		t.Helper()
		return call{method: "POST", path: "/decisions/" + decision + "/outcome", token: bearer, body: body}.send(t)
	}
	id := a.str("decision_id")
	for range 2 { // again changes nothing
		if got := report(id, bearer, obj{"outcome": "failed", "code": "http_503"}); got.status != 200 || got.str("outcome") != "failed" {
			t.Fatalf("%s", got.raw)
		}
	}
	report(id, bearer, obj{"outcome": "succeeded"}).refused(t, 409, "outcome_conflict", "-")
	deny := decide(t, bearer, obj{
		"intent": obj{"action": "payments.transfer.create"}, "resource": obj{"type": "payments.account", "id": "main"}, "session": session,
	}).decided(t, "deny", "")
	report(deny.str("decision_id"), bearer, obj{"outcome": "succeeded"}).refused(t, 409, "outcome_conflict", "-")
	report(id, bob(t), obj{"outcome": "succeeded"}).refused(t, 404, "not_found", "-")
	report("dec_"+strings.Repeat("0", 26), bearer, obj{"outcome": "succeeded"}).refused(t, 404, "not_found", "-")
	for _, tt := range []struct {
		body    any
		pointer string
	}{
		{obj{}, "/outcome"}, {obj{"outcome": "done"}, "/outcome"}, {obj{"outcome": "failed", "code": "a b"}, "/code"},
		{obj{"outcome": "failed", "code": ""}, "/code"}, {obj{"outcome": "failed", "x": 1}, "/x"},
	} {
		c := call{method: "POST", path: "/decisions/" + id + "/outcome", token: bearer, body: tt.body, invalid: true}
		c.send(t).refused(t, 400, "invalid_request", tt.pointer)
	}
	call{method: "POST", path: "/decisions/" + id + "/outcome", body: obj{"outcome": "failed"}, invalid: true}.send(t).refused(t, 401, "invalid_token", "-")
	call{
		method: "POST", path: "/decisions/" + id + "/outcome", token: bearer, body: `{"outcome":"failed","code":"` + strings.Repeat("x", 1<<17) + `"}`, loose: true,
	}.send(t).refused(t, 413, "body_too_large", "-")
	call{
		method: "POST", path: "/decisions/" + id + "/outcome", token: bearer, body: url.Values{"outcome": {"failed"}}, invalid: true,
	}.send(t).refused(t, 415, "unsupported_media_type", "-")

	// One that is released without a word is recorded as unknown, until the agent
	// says more.
	b := decide(t, bearer, read(session)).decided(t, "allow", "")
	if got := (call{method: "DELETE", path: "/leases/" + b.str("credential", "lease"), token: bearer}).send(t); got.status != 200 {
		t.Fatalf("%s", got.raw)
	}
	if got := report(b.str("decision_id"), bearer, obj{"outcome": "succeeded"}); got.str("outcome") != "succeeded" {
		t.Errorf("%s", got.raw)
	}
	var seen []string
	for _, e := range logged(t, session, 10) {
		if e.obj["kind"] == "decision.outcome" {
			d := e.obj["detail"].(map[string]any)
			seen = append(seen, fmt.Sprintf("%v %v %v %v", e.obj["decision"] == id, d["outcome"], d["by"], d["code"]))
		}
	}
	if want := []string{"true failed agent http_503", "false unknown writ <nil>", "false succeeded agent <nil>"}; !slices.Equal(seen, want) {
		t.Errorf("outcomes in the log %q, want %q", seen, want)
	}
}

// Each service that is shown a credential leaves a trace, be the credential good or
// not any more.
func TestUseIsRecorded(t *testing.T) {
	bearer := alice(t)
	session := open(t, bearer)
	a := decide(t, bearer, read(session)).decided(t, "allow", "")
	minted := a.str("credential", "secret", "token")
	for range 3 {
		if !active(t, "crm", minted) {
			t.Fatal("inactive")
		}
	}
	if active(t, "hr", minted) {
		t.Error("good for another audience")
	}
	call{method: "DELETE", path: "/leases/" + a.str("credential", "lease"), token: bearer}.send(t)
	if active(t, "crm", minted) {
		t.Error("active after release")
	}
	var seen []string
	for _, e := range logged(t, session, 7) {
		if e.obj["kind"] == "lease.used" {
			d := e.obj["detail"].(map[string]any)
			seen = append(seen, fmt.Sprintf("%v %v %v %v", d["service"], d["active"], d["count"], e.obj["lease"] == a.str("credential", "lease")))
		}
	}
	// The second and third sight are counted and follow later.
	if want := []string{"crm-api true 1 true", "crm-api false 1 true"}; !slices.Equal(seen, want) {
		t.Errorf("uses in the log %q, want %q", seen, want)
	}
}

func TestEvidence(t *testing.T) {
	bearer := alice(t)
	session := open(t, bearer)
	decide(t, bearer, read(session)).decided(t, "allow", "")
	es := logged(t, session, 3)
	if want := []string{"session.opened", "lease.active", "decision.allow"}; !slices.Equal(kinds(es), want) {
		t.Fatalf("entries %q, want %q", kinds(es), want)
	}
	d := es[2].obj["detail"].(map[string]any)
	input := d["input"].(map[string]any)
	if input["kept"] != "whole" || !strings.HasPrefix(input["digest"].(string), "hmac-sha256:") || es[2].obj["request"] == "" {
		t.Errorf("entry %v", es[2])
	}

	operator := olga(t)
	old := get(t, operator, "/audit/checkpoint")
	if old.status != 200 || old.header.Get("Content-Type") != "text/plain; charset=utf-8" {
		t.Fatalf("%d %s", old.status, old.raw)
	}
	head, err := audit.ReadCheckpoint(string(old.raw))
	if err != nil || head.Size == 0 {
		t.Fatal(head, err)
	}
	var opened obj
	for _, e := range get(t, operator, "/audit/entries?kind=log.opened").at("entries").([]any) {
		opened = e.(map[string]any)["entry"].(map[string]any)
	}
	vkey := opened["detail"].(map[string]any)["verifier"].(string)

	// The proof of an entry holds by itself, and only for what was hashed.
	var p audit.Proof
	a := get(t, operator, fmt.Sprintf("/audit/proof?index=%v", es[2].index))
	if err := json.Unmarshal(a.raw, &p); err != nil {
		t.Fatal(err)
	}
	if c, err := p.Verify(vkey); err != nil || c.Origin != head.Origin {
		t.Errorf("proof: %v %v", c, err)
	}
	p.Entry = []byte(strings.Replace(string(p.Entry), "decision.allow", "decision.deny", 1))
	if _, err := p.Verify(vkey); err == nil {
		t.Error("another entry is proved too")
	}

	// The reads themselves were entered, so the log has grown.
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if c, err := audit.ReadCheckpoint(string(get(t, operator, "/audit/checkpoint").raw)); err == nil && c.Size > head.Size {
			break
		}
	}
	var grown audit.Consistency
	if err := json.Unmarshal(get(t, operator, fmt.Sprintf("/audit/proof?from=%d", head.Size)).raw, &grown); err != nil {
		t.Fatal(err)
	}
	if err := grown.Verify(string(old.raw), vkey); err != nil {
		t.Error(err)
	}
	reads := get(t, operator, "/audit/entries?kind=operator.read&limit=1")
	if list := reads.at("entries").([]any); len(list) != 1 || reads.at("next") == nil {
		t.Errorf("reads by operators: %s", reads.raw)
	}
	// The next page goes on where this one ended.
	next := get(t, operator, fmt.Sprintf("/audit/entries?kind=operator.read&limit=1&from=%v", reads.at("next")))
	if list := next.at("entries").([]any); len(list) != 1 || fmt.Sprint(list[0]) == fmt.Sprint(reads.at("entries").([]any)[0]) {
		t.Errorf("the next page: %s", next.raw)
	}
	iss := url.QueryEscape(w.dev.IDP.Issuer())
	for _, e := range get(t, operator, "/audit/entries?user_iss="+iss+"&user_sub=alice&agent_iss="+iss+"&agent_sub=sales-agent&limit=1000").at("entries").([]any) {
		if u := e.(map[string]any)["entry"].(map[string]any)["user"].(map[string]any); u["sub"] != "alice" {
			t.Errorf("another user's entry: %v", e)
		}
	}
}

func TestEvidenceIsForOperators(t *testing.T) {
	for _, path := range []string{"/audit/checkpoint", "/audit/entries", "/audit/proof?index=0"} {
		call{method: "GET", path: path, invalid: true}.send(t).refused(t, 401, "invalid_token", "-")
		get(t, alice(t), path).refused(t, 403, "forbidden", "-")
	}
	operator := olga(t)
	for _, tt := range []struct {
		path, pointer string
		loose         bool
	}{
		{"/audit/entries?from=-1", "from", false}, {"/audit/entries?from=x", "from", false}, {"/audit/entries?limit=1001", "limit", false}, {"/audit/entries?limit=0", "limit", false},
		{"/audit/entries?kind=", "kind", false}, {"/audit/entries?kind=a&kind=b", "kind", true}, {"/audit/entries?x=1", "x", true},
		{"/audit/entries?user_sub=a", "user_iss", true}, {"/audit/proof", "index", true}, {"/audit/proof?index=0&from=1", "index", true},
		{"/audit/proof?index=x", "index", false}, {"/audit/proof?from=0", "from", true}, {"/audit/proof?from=4611686018427387904", "from", true},
	} {
		call{method: "GET", path: tt.path, token: operator, invalid: !tt.loose, loose: tt.loose}.send(t).refused(t, 400, "invalid_request", tt.pointer)
	}
	call{method: "GET", path: "/audit/entries?%zz", token: operator, loose: true}.send(t).refused(t, 400, "invalid_request", "-")
	get(t, operator, "/audit/proof?index=4611686018427387904").refused(t, 404, "not_found", "-")
}
