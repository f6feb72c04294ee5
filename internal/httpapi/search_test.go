package httpapi_test

import (
	"net/url"
	"slices"
	"strings"
	"testing"
)

// found lists one member of each row of a page.
func found(a answer, list, member string) (out []string) {
	rows, _ := a.at(list).([]any)
	for _, r := range rows {
		s, _ := r.(map[string]any)[member].(string)
		out = append(out, s)
	}
	return out
}

func TestSearch(t *testing.T) {
	bearer, operator := alice(t), olga(t)
	s1 := call{method: "POST", path: "/sessions", token: bearer, body: obj{
		"task": "Look", "envelope": obj{"actions": []string{"crm.**"}, "resources": []obj{{"type": "crm.opportunity", "id": "*"}}},
	}}.send(t).str("session")
	s2 := open(t, bearer)
	theirs := open(t, bob(t))
	allow := decide(t, bearer, read(s1)).decided(t, "allow", "")
	deny := decide(t, bearer, obj{
		"intent": obj{"action": "payments.transfer.create"}, "resource": obj{"type": "payments.account", "id": "main"}, "session": s1,
	}).decided(t, "deny", "")
	call{method: "DELETE", path: "/sessions/" + s1, token: bearer}.send(t)

	who := url.Values{"user_iss": {w.dev.IDP.Issuer()}, "user_sub": {"alice"}, "agent_iss": {w.dev.IDP.Issuer()}, "agent_sub": {"sales-agent"}}.Encode()
	page := get(t, operator, "/sessions?limit=100&"+who)
	ids := found(page, "sessions", "session")
	if i, j := slices.Index(ids, s2), slices.Index(ids, s1); i < 0 || j < i || slices.Contains(ids, theirs) {
		t.Errorf("alice's sessions: %q", ids)
	}
	if ids := found(get(t, operator, "/sessions?state=active&limit=100&"+who), "sessions", "session"); !slices.Contains(ids, s2) || slices.Contains(ids, s1) {
		t.Errorf("alice's active sessions: %q", ids)
	}
	page = get(t, operator, "/sessions?state=ended&limit=100&"+who)
	for _, row := range page.at("sessions").([]any) {
		s := row.(map[string]any)
		if s["session"] == s1 && (s["status"] != "ended" || s["end_reason"] != "ended by the agent" || s["ended_at"] == nil ||
			s["task"].(map[string]any)["text"] != "Look" || s["envelope"] == nil || s["labels"] == nil || s["counters"] == nil) {
			t.Errorf("%v", s)
		}
	}
	if strings.Contains(string(page.raw), "groups") || strings.Contains(string(page.raw), "claims") {
		t.Errorf("a search shows the user's claims: %s", page.raw)
	}

	page = get(t, operator, "/decisions?session="+s1)
	if got := found(page, "decisions", "decision_id"); !slices.Equal(got, []string{deny.str("decision_id"), allow.str("decision_id")}) {
		t.Errorf("the session's decisions: %q", got)
	}
	d := page.at("decisions").([]any)[1].(map[string]any)
	if d["decision"] != "allow" || d["lease"] != allow.str("credential", "lease") || d["outcome_by"] != "writ" || d["reason_codes"].([]any)[0] != "read_opportunity" {
		t.Errorf("%v", d)
	}
	for _, never := range []string{allow.str("credential", "secret", "token"), "message", "Opportunities"} {
		if strings.Contains(string(page.raw), never) {
			t.Errorf("a search shows %q: %s", never, page.raw)
		}
	}
	if got := found(get(t, operator, "/decisions?effect=deny&session="+s1), "decisions", "decision_id"); !slices.Equal(got, []string{deny.str("decision_id")}) {
		t.Errorf("the session's denies: %q", got)
	}

	// Page by page, to the end.
	var paged []string
	for cursor := ""; ; {
		a := get(t, operator, "/decisions?limit=1&session="+s1+cursor)
		paged = append(paged, found(a, "decisions", "decision_id")...)
		next := a.str("next")
		if next == "" || len(paged) > 3 {
			break
		}
		cursor = "&cursor=" + next
	}
	if !slices.Equal(paged, []string{deny.str("decision_id"), allow.str("decision_id")}) {
		t.Errorf("page by page: %q", paged)
	}
}

func TestPolicyStatus(t *testing.T) {
	a := get(t, olga(t), "/policy")
	decided := decide(t, alice(t), read(""))
	if a.status != 200 || a.str("revision") != decided.str("policy", "revision") || a.str("digest") != decided.str("policy", "digest") || a.at("refused") != nil {
		t.Errorf("%s, decided by %v", a.raw, decided.at("policy"))
	}
}

func TestSearchIsForOperators(t *testing.T) {
	for _, path := range []string{"/sessions", "/decisions", "/policy"} {
		call{method: "GET", path: path, invalid: true}.send(t).refused(t, 401, "invalid_token", "-")
		for _, agent := range []string{alice(t), bob(t), token(t, "user=olga&agent=sales-agent")} { // even one that acts for an operator
			get(t, agent, path).refused(t, 403, "forbidden", "-")
		}
	}
	operator := olga(t)
	for _, tt := range []struct{ path, pointer string }{
		{"/sessions?limit=101", "limit"}, {"/sessions?cursor=ses_x", "cursor"}, {"/sessions?state=dead", "state"},
		{"/decisions?limit=0", "limit"}, {"/decisions?session=x", "session"}, {"/decisions?effect=maybe", "effect"},
	} {
		call{method: "GET", path: tt.path, token: operator, invalid: true}.send(t).refused(t, 400, "invalid_request", tt.pointer)
	}
}
