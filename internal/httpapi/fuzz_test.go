package httpapi

import (
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/session"
	"github.com/writsec/writ/internal/strictjson"
)

// FuzzSessionRequest: whatever the body of POST /sessions holds, it is refused as
// invalid, or is one of two things, within its limits.
func FuzzSessionRequest(f *testing.F) {
	for _, seed := range []string{
		`{}`, `null`, `[]`, `{"task":"t","expires_in":3600}`, `{"expires_in":0}`, `{"expires_in":1e400}`, `{"expires_in":9223372036854775807}`,
		`{"envelope":{"actions":["a.*"],"resources":[{"type":"t","id":"**"}]}}`, `{"envelope":{}}`, `{"envelope":null}`,
		`{"redirect_uri":"https://crm.example/done","state":"s"}`, `{"redirect_uri":""}`, `{"state":"\u0000"}`,
		`{"sign_in":{"id":"sin_06h0d83c8lsb5adgo4nu9nibgk","code":"7K3QM-9XWTA"}}`, `{"sign_in":{}}`, `{"sign_in":null}`,
		`{"sign_in":{"id":"x"},"task":""}`, `{"sign_in":{"id":"x"},"subject_token":"a.b.c"}`, `{"sign_in":{"id":"x"},"sign_in":{}}`,
		`{"task":"\u202e\ud800"}`, `{"Task":"t"}`,
	} {
		f.Add([]byte(seed))
	}
	a := &API{Config: Config{Sessions: &session.Manager{Settings: session.Settings{DefaultAge: time.Hour, MaxAge: 8 * time.Hour}}}}
	f.Fuzz(func(t *testing.T, body []byte) {
		var b sessionBody
		err := strictjson.Decode(body, &b)
		var q sessionRequest
		if err == nil {
			q, err = a.sessionRequest(b)
		}
		if err != nil {
			if !fault.Is(err, fault.InvalidRequest) {
				t.Fatalf("%q: %v", body, err)
			}
			return
		}
		if b.SignIn != nil && (q.subject != "" || q.spec.Task != "" || q.spec.Envelope != nil || q.spec.Age != 0 || q.redirectURI != "" || q.state != "") {
			t.Fatalf("%q completes a sign-in and says more", body)
		}
		if q.spec.Age < 0 || q.spec.Age > 8*time.Hour {
			t.Fatalf("%q asks for %v", body, q.spec.Age)
		}
	})
}

// FuzzVisible: what is shown has no character that deceives, and plain text is as it was.
func FuzzVisible(f *testing.F) {
	for _, seed := range []string{"", "plain text\nwith lines", "\u202egnp.exe", "a\x00b\xff", "עברית", "\u3164\ufe0f\u200d", "\r\n\t\u2028"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		out := visible(s)
		for _, r := range out {
			if r != '\n' && (!unicode.IsPrint(r) || unicode.Is(unicode.Cf, r)) {
				t.Fatalf("%U of %q is shown as it is", r, s)
			}
		}
		if strings.Trim(s, "abcdefghijklmnopqrstuvwxyz \n.") == "" && out != s {
			t.Fatalf("%q became %q", s, out)
		}
	})
}

func TestWords(t *testing.T) {
	t.Parallel()
	for p, want := range map[string]words{
		"**":                {Before: "every action there is"},
		"*":                 {Before: "whatever matches", Pattern: "*"},
		"crm.**":            {"any action under", "crm", ", at any depth"},
		"crm.opportunity.*": {"any action directly under", "crm.opportunity", ""},
		"crm.*.read":        {"whatever matches", "crm.*.read", ""},
		"crm.*.**":          {"whatever matches", "crm.*.**", ""},
		"crm.opportunity":   {Pattern: "crm.opportunity"},
		"crm.[!a]":          {"whatever matches", "crm.[!a]", ""},
		`crm.\*`:            {"whatever matches", `crm.\*`, ""},
		"crm**":             {"whatever matches", "crm**", ""},
	} {
		if got := actionWords(p); got != want {
			t.Errorf("%s: %+v, want %+v", p, got, want)
		}
	}
	for d, want := range map[time.Duration]string{
		time.Hour: "1 hour", 8 * time.Hour: "8 hours", 90 * time.Minute: "1 hour 30 minutes", time.Second: "1 second", 0: "1 second", 61 * time.Second: "1 minute 1 second",
	} {
		if got := span(d); got != want {
			t.Errorf("%v: %s, want %s", d, got, want)
		}
	}
}
