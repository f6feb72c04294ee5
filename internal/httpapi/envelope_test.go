package httpapi_test

import (
	"net/http"
	"slices"
	"strings"
	"testing"
)

// patterns is an envelope of some actions on opportunities with some ids.
func patterns(actions []string, ids ...string) obj {
	var resources []obj
	for _, id := range ids {
		resources = append(resources, obj{"type": "crm.opportunity", "id": id})
	}
	return obj{"actions": actions, "resources": resources}
}

func change(t *testing.T, token, session string, body obj, header ...string) answer {
	t.Helper()
	c := call{method: "POST", path: "/sessions/" + session + "/envelope", token: token, body: body, header: headers(header...)}
	for range 3 {
		a := c.send(t)
		if list, _ := a.at("decision", "reasons").([]any); len(list) == 0 || list[0].(map[string]any)["code"] != "policy_timeout" {
			return a
		}
	}
	return c.send(t)
}

// changed wants a change that nothing was decided of.
func (a answer) changed(t *testing.T, source string, actions ...any) {
	t.Helper()
	got, _ := a.at("session", "envelope", "actions").([]any)
	if a.status != http.StatusOK || a.at("decision") != nil || a.str("session", "envelope", "source") != source || !slices.Equal(got, actions) {
		t.Fatalf("got %d %s, want %v by %s", a.status, a.raw, actions, source)
	}
}

// ruled wants a decision and the source of the envelope after it.
func (a answer) ruled(t *testing.T, effect, reason, source string) answer {
	t.Helper()
	list, _ := a.at("decision", "reasons").([]any)
	if a.status != http.StatusOK || a.str("decision", "decision") != effect || len(list) == 0 || list[0].(map[string]any)["code"] != reason ||
		a.at("decision", "credential") != nil || a.str("session", "envelope", "source") != source {
		t.Fatalf("got %d %s, want %s %s with an envelope by %s", a.status, a.raw, effect, reason, source)
	}
	return a
}

func openWith(t *testing.T, token string, envelope obj) string {
	t.Helper()
	a := call{method: "POST", path: "/sessions", token: token, body: obj{"envelope": envelope}}.send(t)
	if a.status != http.StatusCreated {
		t.Fatalf("open: %s", a.raw)
	}
	return a.str("session")
}

func TestEnvelopeNarrowsAtOnce(t *testing.T) {
	bearer := alice(t)
	session := open(t, bearer)
	change(t, bearer, session, obj{"envelope": patterns([]string{"crm.opportunity.*"}, "**")}).changed(t, "agent", "crm.opportunity.*")
	change(t, bearer, session, obj{"envelope": patterns([]string{"crm.opportunity.read"}, "opp-42")}).changed(t, "agent", "crm.opportunity.read")
	decide(t, bearer, read(session)).decided(t, "allow", "")
	update := read(session)
	update["intent"].(obj)["action"] = "crm.opportunity.update"
	decide(t, bearer, update).decided(t, "deny", "outside_envelope")
	limited := patterns([]string{"crm.opportunity.read"}, "opp-42")
	limited["limits"] = obj{"paid_EUR": 100}
	a := change(t, bearer, session, obj{"envelope": limited})
	a.changed(t, "agent", "crm.opportunity.read")
	if a.at("session", "envelope", "limits", "paid_EUR") != 100.0 {
		t.Errorf("%s", a.raw)
	}
}

func TestEnvelopeWidensByItsUser(t *testing.T) {
	bearer := alice(t)
	session := openWith(t, bearer, patterns([]string{"crm.opportunity.read"}, "opp-w1"))
	wide := obj{"envelope": patterns([]string{"crm.opportunity.read", "crm.opportunity.update"}, "opp-w1", "opp-w2")}
	asked := change(t, bearer, session, wide).ruled(t, "require_ciba", "confirm_envelope", "agent")
	id := asked.str("decision", "approval", "id")
	onPhone(t, "on crm.opportunity opp-w1, crm.opportunity opp-w2", true)
	if got := (call{method: "GET", path: "/approvals/" + id + "?wait=10s", token: bearer}).send(t); got.str("status") != "approved" {
		t.Fatalf("approval: %s", got.raw)
	}
	update := read(session)
	update["intent"].(obj)["action"] = "crm.opportunity.update"
	update["resource"].(obj)["id"] = "opp-w2"
	decide(t, bearer, update).decided(t, "deny", "outside_envelope") // a yes alone changes nothing
	change(t, bearer, session, obj{"envelope": wide["envelope"], "approval": id}).ruled(t, "allow", "widen_envelope", "user")
	decide(t, bearer, update).decided(t, "allow", "")
	// Grants and ceiling hold as before.
	hr := offboard(session, "e-1")
	hr["approval"] = nil
	delete(hr, "approval")
	decide(t, bearer, hr).decided(t, "deny", "not_granted")
	// Again, it is what it is, and nothing is decided; the approval is used up.
	change(t, bearer, session, obj{"envelope": wide["envelope"], "approval": id}).changed(t, "user", "crm.opportunity.read", "crm.opportunity.update")
	got := call{method: "GET", path: "/sessions/" + session, token: bearer}.send(t)
	if got.str("envelope", "source") != "user" || got.str("idle_at") == "" || got.at("labels") == nil || got.at("counters") == nil {
		t.Errorf("session: %s", got.raw)
	}
}

func TestEnvelopeWaits(t *testing.T) {
	bearer := alice(t)
	session := openWith(t, bearer, patterns([]string{"crm.opportunity.read"}, "opp-h1"))
	go onPhone(t, "opp-h2", true)
	a := change(t, bearer, session, obj{"envelope": patterns([]string{"crm.opportunity.read"}, "opp-h1", "opp-h2")}, "Prefer", "wait=20")
	a.ruled(t, "allow", "widen_envelope", "user")
	if a.header.Get("Preference-Applied") != "wait=20" {
		t.Errorf("%v", a.header)
	}
	// Now only what is new is asked about.
	go onPhone(t, "Widen the session: on crm.opportunity opp-h3 (code", false)
	change(t, bearer, session, obj{"envelope": patterns([]string{"crm.opportunity.read"}, "opp-h1", "opp-h2", "opp-h3")}, "Prefer", "wait=20").
		ruled(t, "deny", "approval_denied", "user")
}

func TestEnvelopeRefusals(t *testing.T) {
	bearer := alice(t)
	session := openWith(t, bearer, patterns([]string{"crm.opportunity.read"}, "opp-r1"))
	path := "/sessions/" + session + "/envelope"
	valid := obj{"envelope": patterns([]string{"crm.opportunity.read"}, "opp-r1")}
	for _, tt := range []struct {
		name, body, at string
	}{
		{"no envelope", `{}`, "/envelope"},
		{"null", `{"envelope":null}`, "/envelope"},
		{"no actions", `{"envelope":{"actions":[],"resources":[{"type":"a","id":"b"}]}}`, "/envelope/actions"},
		{"no resources", `{"envelope":{"actions":["a"],"resources":[]}}`, "/envelope/resources"},
		{"a source", `{"envelope":{"actions":["a"],"resources":[{"type":"a","id":"b"}],"source":"user"}}`, "/envelope/source"},
		{"twice", `{"envelope":{"actions":["a"],"resources":[{"type":"a","id":"b"}]},"envelope":{"actions":["**"],"resources":[{"type":"a","id":"b"}]}}`, "/envelope"},
		{"a negative limit", `{"envelope":{"actions":["a"],"resources":[{"type":"a","id":"b"}],"limits":{"n":-1}}}`, "/envelope/limits"},
		{"a broken limit", `{"envelope":{"actions":["a"],"resources":[{"type":"a","id":"b"}],"limits":{"n":0.5}}}`, "/envelope/limits/n"},
		{"a limit over what is exact", `{"envelope":{"actions":["a"],"resources":[{"type":"a","id":"b"}],"limits":{"n":9007199254740992}}}`, "/envelope/limits"},
		{"a limit's name", `{"envelope":{"actions":["a"],"resources":[{"type":"a","id":"b"}],"limits":{"a b":1}}}`, "/envelope/limits"},
		{"an empty approval", `{"envelope":{"actions":["a"],"resources":[{"type":"a","id":"b"}]},"approval":""}`, "/approval"},
		{"an empty subject_token", `{"envelope":{"actions":["a"],"resources":[{"type":"a","id":"b"}]},"subject_token":""}`, "/subject_token"},
		{"an action", `{"envelope":{"actions":["a"],"resources":[{"type":"a","id":"b"}]},"intent":{"action":"x"}}`, "/intent"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			call{method: "POST", path: path, token: bearer, body: tt.body, invalid: tt.name != "twice", loose: tt.name == "twice"}.send(t).
				refused(t, 400, "invalid_request", tt.at)
		})
	}
	call{method: "POST", path: path, token: bearer, body: valid, header: headers("Prefer", "wait=x"), loose: true}.send(t).refused(t, 400, "invalid_request", "Prefer")
	call{method: "POST", path: path, body: valid, invalid: true}.send(t).refused(t, 401, "invalid_token", "-")
	call{method: "POST", path: path, token: "x.y.z", body: valid}.send(t).refused(t, 401, "invalid_token", "-")
	call{method: "POST", path: path, token: bearer, body: `{"x":"` + strings.Repeat("x", 64<<10) + `"}`, invalid: true}.send(t).refused(t, 413, "body_too_large", "-")
	call{method: "POST", path: path, token: bearer, body: `{}`, header: headers("Content-Type", "text/plain"), invalid: true}.send(t).
		refused(t, 415, "unsupported_media_type", "-")
	for name, other := range map[string]string{
		"another agent": token(t, "user=alice&agent=hr-agent"), "another user": token(t, "user=bob&agent=sales-agent"),
	} {
		t.Run(name, func(t *testing.T) { change(t, other, session, valid).refused(t, 404, "not_found", "-") })
	}
	change(t, bearer, "ses_00000000000000000000000000", valid).refused(t, 404, "not_found", "-")
	// An approval of another act, or of nobody's, is none.
	wide := obj{"envelope": patterns([]string{"crm.opportunity.read"}, "opp-r1", "opp-r2"), "approval": "apr_00000000000000000000000000"}
	change(t, bearer, session, wide).refused(t, 404, "not_found", "-")
	for _, unreadable := range []string{"opp r", "opp,x", "{a,b}", "\u043epp-1", "opp\u202e"} {
		change(t, bearer, session, obj{"envelope": patterns([]string{"crm.opportunity.read"}, unreadable)}).ruled(t, "deny", "envelope_unreadable", "agent")
	}
	var long []string
	for range 20 {
		long = append(long, "opp-"+strings.Repeat("x", len(long)+1))
	}
	change(t, bearer, session, obj{"envelope": patterns([]string{"crm.opportunity.read"}, long...)}).ruled(t, "deny", "envelope_too_long", "agent")
	// It fits policy's bound, but not the provider's with what must stand beside it.
	change(t, bearer, session, obj{"envelope": patterns([]string{"crm.opportunity.read"}, long[:6]...)}).ruled(t, "deny", "approval_display", "agent")

	// The reserved action has no other way in.
	body := obj{
		"session": session, "intent": obj{"action": "writ.envelope.widen", "parameters": patterns([]string{"**"}, "**")},
		"resource": obj{"type": "writ.session", "id": session},
	}
	call{method: "POST", path: "/decide", token: bearer, body: body}.send(t).refused(t, 400, "invalid_request", "/intent/action")

	call{method: "DELETE", path: "/sessions/" + session, token: bearer}.send(t)
	change(t, bearer, session, valid).refused(t, 409, "session_ended", "-")
}
