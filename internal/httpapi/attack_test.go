package httpapi_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/writsec/writ/internal/devidp"
)

// decisions counts what was decided so far: the log has one line for each.
func decisions() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.Count(w.log.String(), `"msg":"decision"`)
}

const goodIntent = `"intent":{"action":"crm.opportunity.read"},"resource":{"type":"crm.opportunity","id":"opp-42"}`

func TestBodiesThatAreRefused(t *testing.T) {
	deep := strings.Repeat(`{"a":`, 10_000) + "1" + strings.Repeat("}", 10_000)
	deepArray := strings.Repeat("[", 10_000) + strings.Repeat("]", 10_000)
	depth65 := strings.Repeat("[", 64) + strings.Repeat("]", 64)
	pad := func(n int) string { return "{" + goodIntent + strings.Repeat(" ", n-len(goodIntent)-2) + "}" }
	type row struct {
		name, body string
		status     int
		code, at   string
		schema     bool // a schema can say it
	}
	rows := []row{
		{"64 KiB and one", pad(64<<10 + 1), 413, "body_too_large", "-", false},
		{"1 MiB", pad(1 << 20), 413, "body_too_large", "-", false},
		{"duplicate member", `{"context":{},` + goodIntent + `,"context":{"a":1}}`, 400, "invalid_request", "/context", false},
		{"duplicate intent", `{` + goodIntent + `,"intent":{"action":"hr.employee.offboard"}}`, 400, "invalid_request", "/intent", false},
		{"nested duplicate", `{"intent":{"action":"crm.opportunity.read","action":"crm.opportunity.update"},"resource":{"type":"a","id":"b"}}`, 400, "invalid_request", "/intent/action", false},
		{"duplicate in parameters", `{"intent":{"action":"a","parameters":{"x":{"y":1,"y":2}}},"resource":{"type":"a","id":"b"}}`, 400, "invalid_request", "/intent/parameters/x/y", false},
		{"duplicate by escape", `{"context":{"amount":1,"am\u006funt":2},` + goodIntent + `}`, 400, "invalid_request", "/context/amount", false},
		{"unknown member", `{"user":"root",` + goodIntent + `}`, 400, "invalid_request", "/user", true},
		{"unknown in intent", `{"intent":{"action":"a","approved":true},"resource":{"type":"a","id":"b"}}`, 400, "invalid_request", "/intent/approved", true},
		{"unknown in resource", `{"intent":{"action":"a"},"resource":{"type":"a","id":"b","tenant":"x"}}`, 400, "invalid_request", "/resource/tenant", true},
		{"member of another case", `{"Context":{},` + goodIntent + `}`, 400, "invalid_request", "/Context", true},
		{"trailing data", `{` + goodIntent + `} {}`, 400, "invalid_request", "", false},
		{"trailing garbage", `{` + goodIntent + `}x`, 400, "invalid_request", "", false},
		{"byte order mark", "\xef\xbb\xbf{" + goodIntent + `}`, 400, "invalid_request", "", false},
		{"invalid UTF-8", "{\"context\":{\"a\":\"\xff\"}," + goodIntent + `}`, 400, "invalid_request", "/context/a", false},
		{"lone surrogate", `{"context":{"a":"\udc00"},` + goodIntent + `}`, 400, "invalid_request", "/context/a", false},
		{"NaN", `{"context":{"a":NaN},` + goodIntent + `}`, 400, "invalid_request", "/context/a", false},
		{"comment", `{/**/` + goodIntent + `}`, 400, "invalid_request", "", false},
		{"empty", ``, 400, "invalid_request", "", true},
		{"array", `[]`, 400, "invalid_request", "", true},
		{"string", `"x"`, 400, "invalid_request", "", true},
		{"null", `null`, 400, "invalid_request", "", true},
		{"2^53+1 in parameters", `{"intent":{"action":"a","parameters":{"amount":9007199254740993}},"resource":{"type":"a","id":"b"}}`, 400, "invalid_request", "/intent/parameters/amount", false},
		{"2^53+1 in properties", `{"intent":{"action":"a"},"resource":{"type":"a","id":"b","properties":{"n":[1,9007199254740993]}}}`, 400, "invalid_request", "/resource/properties/n/1", false},
		{"2^53+1 in context", `{"context":{"n":9007199254740993},` + goodIntent + `}`, 400, "invalid_request", "/context/n", false},
		{"1e400", `{"context":{"n":1e400},` + goodIntent + `}`, 400, "invalid_request", "/context/n", false},
		{"1e-400", `{"context":{"n":1e-400},` + goodIntent + `}`, 400, "invalid_request", "/context/n", false},
		{"too many digits", `{"context":{"n":0.1000000000000000055511151231257827},` + goodIntent + `}`, 400, "invalid_request", "/context/n", false},
		{"no intent", `{"resource":{"type":"a","id":"b"}}`, 400, "invalid_request", "/intent/action", true},
		{"no resource", `{"intent":{"action":"a"}}`, 400, "invalid_request", "/resource/type", true},
		{"no id", `{"intent":{"action":"a"},"resource":{"type":"a"}}`, 400, "invalid_request", "/resource/id", true},
		{"action in capitals", `{"intent":{"action":"CRM.read"},"resource":{"type":"a","id":"b"}}`, 400, "invalid_request", "/intent/action", true},
		{"action with newline", `{"intent":{"action":"crm.read\n"},"resource":{"type":"a","id":"b"}}`, 400, "invalid_request", "/intent/action", true},
		{"action of 129", `{"intent":{"action":"` + strings.Repeat("a", 129) + `"},"resource":{"type":"a","id":"b"}}`, 400, "invalid_request", "/intent/action", true},
		{"purpose of 2049", `{"intent":{"action":"a","purpose":"` + strings.Repeat("ü", 2049) + `"},"resource":{"type":"a","id":"b"}}`, 400, "invalid_request", "/intent/purpose", true},
		{"type with space", `{"intent":{"action":"a"},"resource":{"type":"a b","id":"b"}}`, 400, "invalid_request", "/resource/type", true},
		{"id of 513", `{"intent":{"action":"a"},"resource":{"type":"a","id":"` + strings.Repeat("b", 513) + `"}}`, 400, "invalid_request", "/resource/id", true},
		{"id with right-to-left override", `{"intent":{"action":"a"},"resource":{"type":"a","id":"a\u202eb"}}`, 400, "invalid_request", "/resource/id", false},
		{"id with newline", `{"intent":{"action":"a"},"resource":{"type":"a","id":"a\nb"}}`, 400, "invalid_request", "/resource/id", false},
	}
	for name, doc := range map[string]string{"object": deep, "array": deepArray, "array of 65": depth65} {
		rows = append(rows, row{"deep " + name, `{"context":{"x":` + doc + `},` + goodIntent + `}`, 400, "invalid_request", "*", false})
	}
	// Every member with every type that it hasn't.
	types := map[string]string{"string": `"x"`, "number": `1`, "boolean": `true`, "array": `[]`, "object": `{}`, "null": `null`}
	for pointer, right := range map[string]string{
		"/subject_token": "string", "/session": "string", "/approval": "string", "/context": "object", "/intent": "object", "/resource": "object",
		"/intent/action": "string", "/intent/parameters": "object", "/intent/purpose": "string",
		"/resource/type": "string", "/resource/id": "string", "/resource/properties": "object",
	} {
		for kind, value := range types {
			if kind == right {
				continue
			}
			body := obj{"intent": obj{"action": "a"}, "resource": obj{"type": "a", "id": "b"}}
			rows = append(rows, row{pointer + " as " + kind, put(body, pointer, value), 400, "invalid_request", pointer, true})
		}
	}
	for _, empty := range []string{"/subject_token", "/session", "/approval", "/intent/action", "/resource/type", "/resource/id"} {
		body := obj{"intent": obj{"action": "a"}, "resource": obj{"type": "a", "id": "b"}}
		rows = append(rows, row{empty + " empty", put(body, empty, `""`), 400, "invalid_request", empty, true})
	}
	before := decisions()
	bearer := alice(t)
	for _, tt := range rows {
		t.Run(tt.name, func(t *testing.T) {
			a := call{method: "POST", path: "/decide", token: bearer, body: tt.body, invalid: tt.schema, loose: !tt.schema}.send(t)
			if tt.at == "*" { // how deep the reader came is its own matter
				if len(a.pointers()) != 1 || !strings.HasPrefix(a.pointers()[0], "/context/x/") || len(a.pointers()[0]) > 512 {
					t.Errorf("pointers = %.200q", a.pointers())
				}
				return
			}
			a.refused(t, tt.status, tt.code, tt.at)
		})
	}
	if n := decisions(); n != before {
		t.Errorf("%d decisions came of refused bodies", n-before)
	}
	// The limits themselves hold.
	for name, body := range map[string]string{
		"64 KiB":   pad(64 << 10),
		"depth 64": `{"context":{"x":` + strings.Repeat("[", 60) + strings.Repeat("]", 60) + `},` + goodIntent + `}`,
		"2^53":     `{"context":{"n":9007199254740992,"m":-0.1,"z":null},` + goodIntent + `}`,
	} {
		t.Run(name, func(t *testing.T) { decide(t, bearer, body).decided(t, "allow", "") })
	}
}

// put returns the object's JSON with the member that the pointer names replaced.
func put(o obj, pointer, value string) string {
	names := strings.Split(pointer[1:], "/")
	at := o
	for _, n := range names[:len(names)-1] {
		at = at[n].(obj)
	}
	at[names[len(names)-1]] = raw(value)
	b, err := marshal(o)
	if err != nil {
		panic(err)
	}
	return b
}

func TestOtherBodiesThatAreRefused(t *testing.T) {
	const renewal = "/leases/lea_00000000000000000000000000/renew"
	sales, operator := alice(t), olga(t)
	long := strings.Repeat("x", 513)
	for _, tt := range []struct {
		path, body, at string
		schema         bool
	}{
		{"/sessions", `{"task":1}`, "/task", true},
		{"/sessions", `{"task":null}`, "/task", true},
		{"/sessions", `{"task":"` + strings.Repeat("x", 2049) + `"}`, "/task", true},
		{"/sessions", `{"source":"user"}`, "/source", true},
		{"/sessions", `{"user":"bob"}`, "/user", true},
		{"/sessions", `{"subject_token":""}`, "/subject_token", true},
		{"/sessions", `{"expires_in":0}`, "/expires_in", true},
		{"/sessions", `{"expires_in":-1}`, "/expires_in", true},
		{"/sessions", `{"expires_in":1.5}`, "/expires_in", true},
		{"/sessions", `{"expires_in":"60"}`, "/expires_in", true},
		{"/sessions", `{"expires_in":null}`, "/expires_in", true},
		{"/sessions", `{"expires_in":9223372036854775808}`, "/expires_in", false},
		{"/sessions", `{"expires_in":28801}`, "/expires_in", false}, // over the configured 8 h
		{"/sessions", `{"envelope":null}`, "/envelope", true},
		{"/sessions", `{"envelope":{}}`, "/envelope/actions", true},
		{"/sessions", `{"envelope":{"actions":null,"resources":[]}}`, "/envelope/actions", true},
		{"/sessions", `{"envelope":{"actions":[],"resources":[{"type":"a","id":"b"}]}}`, "/envelope/actions", true},
		{"/sessions", `{"envelope":{"actions":["a",null],"resources":[{"type":"a","id":"b"}]}}`, "/envelope/actions/1", true},
		{"/sessions", `{"envelope":{"actions":["a"],"resources":[]}}`, "/envelope/resources", true},
		{"/sessions", `{"envelope":{"actions":["a"],"resources":[{"type":"a"}]}}`, "/envelope/resources", true},
		{"/sessions", `{"envelope":{"actions":["a"],"resources":[null]}}`, "/envelope/resources/0", true},
		{"/sessions", `{"envelope":{"actions":["a"],"resources":[{"type":"a","id":"` + long + `"}]}}`, "/envelope/resources", true},
		{"/sessions", `{"envelope":{"actions":["a"],"resources":[{"type":"a","id":"b"}],"source":"user"}}`, "/envelope/source", true},
		{"/sessions", `{} {}`, "", false},
		{"/revocations", `{}`, "", true},
		{"/revocations", `{"reason":"x"}`, "", true},
		{"/revocations", `{"all":true,"session":"ses_00000000000000000000000000"}`, "", true},
		{"/revocations", `{"lease":"lea_00000000000000000000000000","session":"ses_00000000000000000000000000"}`, "", true},
		{"/revocations", `{"all":false}`, "/all", true},
		{"/revocations", `{"all":null}`, "/all", true},
		{"/revocations", `{"all":"yes"}`, "/all", true},
		{"/revocations", `{"lease":""}`, "/lease", true},
		{"/revocations", `{"session":""}`, "/session", true},
		{"/revocations", `{"user":null}`, "/user", true},
		{"/revocations", `{"user":"bob"}`, "/user", true},
		{"/revocations", `{"user":{"sub":"bob"}}`, "/user/iss", true},
		{"/revocations", `{"user":{"iss":"x"}}`, "/user/sub", true},
		{"/revocations", `{"agent":{"iss":"x","sub":""}}`, "/agent/sub", true},
		{"/revocations", `{"agent":{"iss":"x","sub":"y","kind":"z"}}`, "/agent/kind", true},
		{"/revocations", `{"all":true,"reason":"` + strings.Repeat("ü", 501) + `"}`, "/reason", true},
		{"/revocations", `{"all":true,"force":true}`, "/force", true},
		{"/revocations", `{"all":true,"all":true}`, "/all", false},
		{"/revocations", `{"minter":""}`, "/minter", true},
		{"/revocations", `{"minter":null}`, "/minter", true},
		{"/revocations", `{"minter":"` + strings.Repeat("x", 257) + `"}`, "/minter", true},
		{"/revocations", `{"minter":"a\nb"}`, "/minter", false},
		{"/revocations", `{"policy":"\u202e"}`, "/policy", false},
		{"/revocations", `{"policy":["a"]}`, "/policy", true},
		{"/revocations", `{"minter":"a","policy":"b"}`, "", true},
		{"/revocations", `{"freeze":true}`, "", true},
		{"/revocations", `{"all":true,"freeze":"yes"}`, "/freeze", true},
		{"/revocations", `{"all":true,"freeze":null}`, "/freeze", true},
		{"/revocations", `{"session":"ses_00000000000000000000000000","freeze":true}`, "/freeze", true},
		{"/revocations", `{"lease":"lea_00000000000000000000000000","freeze":true}`, "/freeze", true},
		{renewal, `{}`, "/intent/action", true},
		{renewal, `{"intent":{"action":"a"},"resource":{"type":"t","id":"i"},"session":"ses_00000000000000000000000000"}`, "/session", true},
		{renewal, `{"intent":{"action":"a"},"resource":{"type":"t","id":"i"},"approval":"apr_00000000000000000000000000"}`, "/approval", true},
		{renewal, `{"intent":{"action":"a"},"resource":{"type":"t","id":"i"},"subject_token":""}`, "/subject_token", true},
		{renewal, `{"intent":{"action":"a"},"resource":{"type":"t","id":"i"},"ttl":60}`, "/ttl", true},
		{renewal, `{"intent":{"action":"a"},"resource":{"type":"t"}}`, "/resource/id", true},
	} {
		t.Run(fmt.Sprintf("%s %.60s", tt.path, tt.body), func(t *testing.T) {
			bearer := sales
			if tt.path == "/revocations" {
				bearer = operator
			}
			call{method: "POST", path: tt.path, token: bearer, body: tt.body, invalid: tt.schema, loose: !tt.schema}.send(t).
				refused(t, 400, "invalid_request", tt.at)
		})
	}
	for _, path := range []string{"/sessions", "/revocations", renewal} {
		bearer := map[string]string{"/sessions": sales, "/revocations": operator, renewal: sales}[path]
		body := `{"task":"` + strings.Repeat("x", 64<<10) + `"}`
		call{method: "POST", path: path, token: bearer, body: body, loose: true}.send(t).refused(t, 413, "body_too_large", "-")
	}
}

func TestHeadersThatAreRefused(t *testing.T) {
	bearer := alice(t)
	auth := "Bearer " + bearer
	before := decisions()
	for _, tt := range []struct {
		name   string
		header http.Header
		status int
		code   string
		at     string
		schema bool
	}{
		{"no Content-Type", headers("Authorization", auth, "Content-Type", ""), 415, "unsupported_media_type", "-", true},
		{"text/plain", headers("Authorization", auth, "Content-Type", "text/plain"), 415, "unsupported_media_type", "-", true},
		{"a form", headers("Authorization", auth, "Content-Type", "application/x-www-form-urlencoded"), 415, "unsupported_media_type", "-", true},
		{"problem+json", headers("Authorization", auth, "Content-Type", "application/problem+json"), 415, "unsupported_media_type", "-", true},
		{"malformed Content-Type", headers("Authorization", auth, "Content-Type", "application/json; ="), 415, "unsupported_media_type", "-", false},
		{"UTF-16", headers("Authorization", auth, "Content-Type", "application/json; charset=utf-16"), 415, "unsupported_media_type", "-", false},
		{"two Content-Types", headers("Authorization", auth, "Content-Type", "application/json", "Content-Type", "text/plain"), 415, "unsupported_media_type", "-", false},
		{"gzip", headers("Authorization", auth, "Content-Type", "application/json", "Content-Encoding", "gzip"), 415, "unsupported_media_type", "-", false},
		{"no Authorization", http.Header{}, 401, "invalid_token", "-", true},
		{"two Authorizations", headers("Authorization", auth, "Authorization", auth), 401, "invalid_token", "-", true},
		{"Basic", headers("Authorization", "Basic YWxpY2U6YWxpY2U="), 401, "invalid_token", "-", true},
		{"Digest", headers("Authorization", "Digest username=alice"), 401, "invalid_token", "-", true},
		{"the token alone", headers("Authorization", bearer), 401, "invalid_token", "-", true},
		{"Bearer alone", headers("Authorization", "Bearer"), 401, "invalid_token", "-", true},
		{"Bearer and a space", headers("Authorization", "Bearer "), 401, "invalid_token", "-", true},
		{"two tokens", headers("Authorization", auth+", "+auth), 401, "invalid_token", "-", false},
		{"DPoP without proof", headers("Authorization", "DPoP "+bearer), 401, "invalid_token", "-", false},
		{"empty key", headers("Authorization", auth, "Idempotency-Key", ""), 400, "invalid_request", "Idempotency-Key", true},
		{"two keys", headers("Authorization", auth, "Idempotency-Key", "a", "Idempotency-Key", "b"), 400, "invalid_request", "Idempotency-Key", false},
		{"key of 256", headers("Authorization", auth, "Idempotency-Key", strings.Repeat("k", 256)), 400, "invalid_request", "Idempotency-Key", true},
		{"key with space", headers("Authorization", auth, "Idempotency-Key", "a b"), 400, "invalid_request", "Idempotency-Key", true},
		{"key not ASCII", headers("Authorization", auth, "Idempotency-Key", "schlüssel"), 400, "invalid_request", "Idempotency-Key", true},
		{"wait without value", headers("Authorization", auth, "Prefer", "wait"), 400, "invalid_request", "Prefer", true},
		{"empty wait", headers("Authorization", auth, "Prefer", "wait="), 400, "invalid_request", "Prefer", true},
		{"wait=soon", headers("Authorization", auth, "Prefer", "wait=soon"), 400, "invalid_request", "Prefer", true},
		{"wait=-1", headers("Authorization", auth, "Prefer", "wait=-1"), 400, "invalid_request", "Prefer", true},
		{"wait=1.5", headers("Authorization", auth, "Prefer", "wait=1.5"), 400, "invalid_request", "Prefer", false},
		{"wait, second", headers("Authorization", auth, "Prefer", "respond-async, WAIT = x"), 400, "invalid_request", "Prefer", false},
		{"wait over 31 bits", headers("Authorization", auth, "Prefer", "wait=99999999999999999999"), 400, "invalid_request", "Prefer", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := call{method: "POST", path: "/decide", header: tt.header, body: "{" + goodIntent + "}", invalid: tt.schema, loose: !tt.schema}.send(t)
			a.refused(t, tt.status, tt.code, tt.at)
			if got := a.header.Get("WWW-Authenticate"); tt.status == 401 && strings.Contains(got, "error=") != (len(tt.header) > 0) {
				t.Errorf("WWW-Authenticate = %q", got)
			}
		})
	}
	if n := decisions(); n != before {
		t.Errorf("%d decisions came of refused headers", n-before)
	}
	for name, h := range map[string]http.Header{
		"charset":          headers("Authorization", auth, "Content-Type", "application/json; charset=UTF-8"),
		"scheme in lower":  headers("Authorization", "bearer "+bearer),
		"other preference": headers("Authorization", auth, "Prefer", "respond-async, handling=lenient"),
		"wait":             headers("Authorization", auth, "Prefer", `wait="1"; x=y, respond-async`),
		"wait=0":           headers("Authorization", auth, "Prefer", `wait=0`),
		"key of 255":       headers("Authorization", auth, "Idempotency-Key", strings.Repeat("k", 255)),
	} {
		t.Run(name, func(t *testing.T) {
			call{method: "POST", path: "/decide", header: h, body: "{" + goodIntent + "}"}.send(t).decided(t, "allow", "")
		})
	}
}

func TestWaitParameterThatIsRefused(t *testing.T) {
	ask := decide(t, bob(t), offboard("", "e-wait-parameter")).decided(t, "require_ciba", "")
	path := "/approvals/" + ask.str("approval", "id")
	defer call{method: "DELETE", path: path, token: bob(t)}.send(t)
	for _, q := range []string{"wait=soon", "wait=-1s", "wait=1y", "wait=1s1", "wait=s"} {
		call{method: "GET", path: path + "?" + q, token: bob(t), invalid: true}.send(t).refused(t, 400, "invalid_request", "wait")
	}
	for _, q := range []string{"wait=", "wait=1s&wait=2s", "wait=99999999999999h", "wait=%zz"} {
		call{method: "GET", path: path + "?" + q, token: bob(t), loose: true}.send(t).refused(t, 400, "invalid_request", "wait")
	}
	for _, q := range []string{"", "?wait=0", "?wait=0s", "?wait=10ms", "?wait=0m0.01s", "?other=1"} {
		if a := (call{method: "GET", path: path + q, token: bob(t)}).send(t); a.str("status") != "pending" {
			t.Errorf("%s: %s", q, a.raw)
		}
	}
}

func TestTokensThatAreRefused(t *testing.T) {
	stranger, err := devidp.New(devidp.Config{Audience: "urn:writ:dev"})
	if err != nil {
		t.Fatal(err)
	}
	elsewhere, err := devidp.New(devidp.Config{Audience: "urn:another:service"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 2)
	for _, idp := range []*devidp.Provider{stranger, elsewhere} {
		go func() { done <- idp.Run(ctx) }()
	}
	defer func() {
		w.client.CloseIdleConnections()
		stop()
		for range 2 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	}()
	good := alice(t)
	expired := token(t, "user=alice&agent=sales-agent&ttl=1s")
	agent := token(t, "kind=agent&agent=sales-agent")
	flip := func(s string) string { // one bit of the signature
		i := len(s) - 20
		c := byte('A')
		if s[i] == c {
			c = 'B'
		}
		return s[:i] + string(c) + s[i+1:]
	}
	parts := strings.Split(good, ".")
	time.Sleep(1100 * time.Millisecond)
	before := decisions()
	for name, bearer := range map[string]string{
		"garbage":              "garbage",
		"expired":              expired,
		"of an unknown issuer": tokenOf(t, stranger, "user=alice&agent=sales-agent"),
		"for another audience": tokenOf(t, elsewhere, "user=alice&agent=sales-agent"),
		"an ID token":          token(t, "kind=id&user=alice&agent=sales-agent"),
		"signature changed":    flip(good),
		"signature cut":        parts[0] + "." + parts[1] + ".",
		"payload of another":   parts[0] + "." + strings.Split(bob(t), ".")[1] + "." + parts[2],
		"alg none":             "eyJhbGciOiJub25lIiwidHlwIjoiYXQrand0In0." + parts[1] + ".",
		"longer than 16 KiB":   good + strings.Repeat("A", 16<<10),
		"agent without user":   agent,
		"a minted credential":  decide(t, good, read("")).decided(t, "allow", "").str("credential", "secret", "token"),
		"four parts":           good + ".x",
	} {
		if name == "a minted credential" {
			before++ // the decision that minted it
		}
		t.Run(name, func(t *testing.T) {
			a := call{method: "POST", path: "/decide", token: bearer, body: read(""), loose: true}.send(t)
			a.refused(t, 401, "invalid_token", "-")
			if strings.Contains(string(a.raw), bearer) {
				t.Error("the token is repeated")
			}
			if name != "agent without user" { // which is a good token
				for _, c := range []call{
					{method: "POST", path: "/sessions", body: obj{}}, {method: "GET", path: "/sessions/ses_00000000000000000000000000"},
					{method: "DELETE", path: "/sessions/ses_00000000000000000000000000"}, {method: "GET", path: "/approvals/apr_00000000000000000000000000"},
					{method: "DELETE", path: "/approvals/apr_00000000000000000000000000"}, {method: "DELETE", path: "/leases/lea_00000000000000000000000000"},
					{method: "GET", path: "/leases/lea_00000000000000000000000000"},
					{method: "POST", path: "/leases/lea_00000000000000000000000000/renew", body: read("")},
					{method: "POST", path: "/revocations", body: obj{"all": true}},
					{method: "POST", path: "/revocations/rev_00000000000000000000000000/lift"},
				} {
					c.token = bearer
					c.send(t).refused(t, 401, "invalid_token", "-")
				}
			}
		})
	}
	// The agent's own token with a user's.
	for name, subject := range map[string]string{
		"garbage": "garbage", "another agent's": token(t, "user=alice&agent=hr-agent"), "the agent's own": agent,
		"expired": expired, "an ID token of no known client": token(t, "kind=id&user=alice&agent=sales-agent"),
		"unknown issuer": tokenOf(t, stranger, "user=alice&agent=sales-agent"),
	} {
		t.Run("subject "+name, func(t *testing.T) {
			call{method: "POST", path: "/decide", token: agent, body: with(read(""), "subject_token", subject)}.send(t).refused(t, 401, "invalid_token", "-")
			call{method: "POST", path: "/sessions", token: agent, body: obj{"subject_token": subject}}.send(t).refused(t, 401, "invalid_token", "-")
		})
	}
	call{method: "POST", path: "/decide", token: good, body: with(read(""), "subject_token", good)}.send(t).refused(t, 401, "invalid_token", "-")
	if n := decisions(); n != before {
		t.Errorf("%d decisions came of refused tokens", n-before)
	}
	// And the good ones are good.
	decide(t, agent, with(read(""), "subject_token", good)).decided(t, "allow", "")
	a := call{method: "POST", path: "/sessions", token: agent, body: obj{"subject_token": good}}.send(t)
	decide(t, agent, read(a.str("session"))).decided(t, "allow", "") // the user is bound to the session
}

func TestWhatIsAnothersIsNotFound(t *testing.T) {
	mine := alice(t)
	session := open(t, mine)
	lease := decide(t, mine, read(session)).decided(t, "allow", "")
	leaseID, secret := lease.str("credential", "lease"), lease.str("credential", "secret", "token")
	mark := obj{"intent": obj{"action": "crm.email.read"}, "resource": obj{"type": "crm.email", "id": "m-1"}, "session": session}
	decide(t, mine, mark).decided(t, "allow", "")
	update := obj{"intent": obj{"action": "crm.opportunity.update"}, "resource": obj{"type": "crm.opportunity", "id": "opp-others"}, "session": session}
	ask := decide(t, mine, update).decided(t, "require_ciba", "")
	approval := ask.str("approval", "id")
	for name, thief := range map[string]string{
		"another agent of the same user": token(t, "user=alice&agent=hr-agent"),
		"another user of the same agent": token(t, "user=bob&agent=sales-agent"),
		"another pair":                   bob(t),
		"another agent alone":            token(t, "kind=agent&agent=hr-agent"),
		"an operator":                    olga(t),
	} {
		t.Run(name, func(t *testing.T) {
			for _, c := range []call{
				{method: "GET", path: "/sessions/" + session},
				{method: "DELETE", path: "/sessions/" + session},
				{method: "GET", path: "/approvals/" + approval},
				{method: "GET", path: "/approvals/" + approval + "?wait=1s"},
				{method: "DELETE", path: "/approvals/" + approval},
				{method: "DELETE", path: "/leases/" + leaseID},
				{method: "POST", path: "/decide", body: read(session)},
				{method: "POST", path: "/decide", body: with(update, "approval", approval)},
			} {
				c.token = thief
				c.send(t).refused(t, 404, "not_found", "-")
			}
		})
	}
	// Nothing happened to any of it.
	if got := (call{method: "GET", path: "/sessions/" + session, token: mine}).send(t); got.str("status") != "active" {
		t.Errorf("session: %s", got.raw)
	}
	if got := (call{method: "GET", path: "/approvals/" + approval, token: mine}).send(t); got.str("status") != "pending" {
		t.Errorf("approval: %s", got.raw)
	}
	if !active(t, "crm", secret) {
		t.Error("the lease is gone")
	}
	// An approval of another session of mine is none of this session.
	call{method: "POST", path: "/decide", token: mine, body: with(with(update, "session", open(t, mine)), "approval", approval)}.send(t).
		refused(t, 404, "not_found", "-")
	call{method: "DELETE", path: "/approvals/" + approval, token: mine}.send(t)
}

func TestUnknownIDs(t *testing.T) {
	bearer := alice(t)
	for _, id := range []string{"00000000000000000000000000", "0000000000000000000000000z", "short", "%00", "..%2f..%2fetc", "'%20OR%201=1", strings.Repeat("a", 4000)} {
		valid := id == "00000000000000000000000000"
		for _, c := range []call{
			{method: "GET", path: "/sessions/ses_" + id}, {method: "DELETE", path: "/sessions/ses_" + id},
			{method: "GET", path: "/approvals/apr_" + id}, {method: "DELETE", path: "/approvals/apr_" + id},
			{method: "GET", path: "/leases/lea_" + id}, {method: "DELETE", path: "/leases/lea_" + id},
			{method: "POST", path: "/leases/lea_" + id + "/renew", body: read("")},
		} {
			c.token, c.invalid = bearer, !valid
			c.send(t).refused(t, 404, "not_found", "-")
		}
	}
	for _, body := range []obj{{"lease": "lea_00000000000000000000000000"}, {"session": "ses_00000000000000000000000000"}} {
		call{method: "POST", path: "/revocations", token: olga(t), body: body}.send(t).refused(t, 404, "not_found", "-")
	}
	decide(t, bearer, read("ses_00000000000000000000000000")).refused(t, 404, "not_found", "-")
	decide(t, bearer, with(read(""), "approval", "apr_00000000000000000000000000")).refused(t, 404, "not_found", "-")
}

func TestRoutesAndMethodsThatAreNot(t *testing.T) {
	for _, tt := range []struct {
		method, path string
		status       int
		code, allow  string
	}{
		{"GET", "/decide", 405, "method_not_allowed", "POST"},
		{"PUT", "/decide", 405, "method_not_allowed", "POST"},
		{"OPTIONS", "/v1/decide", 405, "method_not_allowed", "POST"},
		{"POST", "/approvals/apr_00000000000000000000000000", 405, "method_not_allowed", "GET, DELETE"},
		{"PATCH", "/sessions/ses_00000000000000000000000000", 405, "method_not_allowed", "GET, DELETE"},
		{"PATCH", "/leases/lea_00000000000000000000000000", 405, "method_not_allowed", "GET, DELETE"},
		{"GET", "/leases/lea_00000000000000000000000000/renew", 405, "method_not_allowed", "POST"},
		{"DELETE", "/revocations/rev_00000000000000000000000000", 405, "method_not_allowed", "GET"},
		{"GET", "/introspect", 405, "method_not_allowed", "POST"},
		{"DELETE", "/.well-known/jwks.json", 405, "method_not_allowed", "GET"},
		{"GET", "/", 404, "not_found", ""},
		{"POST", "/decide/", 404, "not_found", ""},
		{"POST", "//decide", 404, "not_found", ""},
		{"POST", "/v2/decide", 404, "not_found", ""},
		{"POST", "/DECIDE", 404, "not_found", ""},
		{"GET", "/metrics", 404, "not_found", ""},
		{"GET", "/readyz", 404, "not_found", ""},
		{"GET", "/sessions/ses_a/b", 404, "not_found", ""},
		{"GET", "/debug/pprof/", 404, "not_found", ""},
	} {
		t.Run(tt.method+" "+tt.path, func(t *testing.T) {
			a := call{method: tt.method, path: tt.path, token: "x"}.send(t)
			a.refused(t, tt.status, tt.code, "-")
			if a.header.Get("Allow") != tt.allow {
				t.Errorf("Allow = %q, want %q", a.header.Get("Allow"), tt.allow)
			}
		})
	}
}

func TestRequestID(t *testing.T) {
	for _, tt := range []struct {
		name, sent string
		kept       bool
	}{
		{"own", "pipeline-summary.17_A", true},
		{"of 64", strings.Repeat("x", 64), true},
		{"of 65", strings.Repeat("x", 65), false},
		{"oversize", strings.Repeat("x", 30_000), false},
		{"empty", "", false},
		{"with space", "a b", false},
		{"forging a member", `x","level":"ERROR","msg":"forged`, false},
		{"with tab", "a\tb", false},
		{"markup", "<script>", false},
		{"not ASCII", "größe", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := call{method: "GET", path: "/nowhere", header: headers("X-Request-ID", tt.sent)}.send(t)
			got := a.header.Get("X-Request-ID")
			if (got == tt.sent) != tt.kept || !tt.kept && !strings.HasPrefix(got, "req_") {
				t.Errorf("X-Request-ID = %q", got)
			}
		})
	}
	// What a client library won't send: a newline in the header, by a folded line
	// and bare.
	addr, err := url.Parse(w.dev.URL)
	if err != nil {
		t.Fatal(err)
	}
	for _, value := range []string{"a\r\n {\"msg\":\"forged line\"}", "a\n{\"msg\":\"forged line\"}", "a\x00b", "a\rb"} {
		c, err := net.Dial("tcp", addr.Host)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := fmt.Fprintf(c, "GET /nowhere HTTP/1.1\r\nHost: x\r\nX-Request-ID: %s\r\nConnection: close\r\n\r\n", value); err != nil {
			t.Fatal(err)
		}
		res, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := res.Header.Get("X-Request-ID"); res.StatusCode < 400 || got != "" && !strings.HasPrefix(got, "req_") {
			t.Errorf("%q: %d, X-Request-ID %q", value, res.StatusCode, got)
		}
		res.Body.Close()
		c.Close()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if strings.Contains(w.log.String(), "\n{\"msg\":\"forged line") || bytes.Contains(w.log.Bytes(), []byte(`"msg":"forged"`)) {
		t.Error("a log line was forged")
	}
}
