package httpapi_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/httpapi"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/policy"
	"github.com/writsec/writ/internal/revocation"
	"github.com/writsec/writ/internal/session"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/storetest"
	"github.com/writsec/writ/internal/telemetry"
)

const opsIssuer = "https://ops.example"

// office is an API of its own for operators, over a real store whose log is stuck after
// its first entry.
type office struct {
	t      *testing.T
	api    http.Handler
	store  *sqlstore.Store
	url    string
	engine *policy.Engine
	signer jose.Signer
	log    *bytes.Buffer
}

// newOffice loads the policies at path; "" are none.
func newOffice(t *testing.T, path string) *office {
	t.Helper()
	o := &office{t: t, log: &bytes.Buffer{}}
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	o.must(err)
	o.signer, err = jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "k"}},
		(&jose.SignerOptions{}).WithType("at+jwt"))
	o.must(err)
	jwks, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k", Algorithm: "ES256", Use: "sig"}}})
	o.must(err)
	o.must(os.WriteFile(filepath.Join(dir, "jwks.json"), jwks, 0o600))
	log := slog.New(slog.NewJSONHandler(o.log, nil))
	o.url = "sqlite:" + filepath.Join(dir, "writ.db")
	o.store, err = sqlstore.Open(t.Context(), sqlstore.Config{URL: o.url, Root: sqlstore.RootKey{1}, Logger: log})
	o.must(err)
	t.Cleanup(func() { o.must(o.store.Close()) })
	verifier, err := identity.New(identity.Config{
		Issuers: []identity.Issuer{{
			URL: opsIssuer, Operator: true, Audience: "writ", Algorithms: []string{"ES256"}, JWKSFile: filepath.Join(dir, "jwks.json"),
			Operators: identity.Operators{Claim: "role", Value: "security"},
		}},
		Now: time.Now, SignedOut: o.store.SignedOut, Logger: log,
	})
	o.must(err)
	sequencer := audit.Sequencer{Store: sqlstore.For[audit.LogTx](o.store), Logger: log}
	o.must(audit.OpenLog(t.Context(), sequencer.Store, "writ.example"))
	_, err = sequencer.Step(t.Context()) // its last
	o.must(err)

	metrics := telemetry.NewMetrics()
	o.engine, err = policy.New(policy.Config{
		Path: path, Query: "data.writ.decision", Deadline: 500 * time.Millisecond, Metrics: metrics, Logger: log,
		Record: func(context.Context, policy.Version, error) error { return nil },
	})
	o.must(err)
	if path != "" {
		o.must(o.engine.Load(t.Context()))
	}
	o.api = httpapi.New(httpapi.Config{
		Identity: verifier, Policy: o.engine, Now: o.store.Now,
		Evidence: sqlstore.For[httpapi.EvidenceTx](o.store), Search: sqlstore.For[httpapi.SearchTx](o.store),
		Revoker: &revocation.Revoker{Store: sqlstore.For[revocation.Tx](o.store), Metrics: metrics},
		Metrics: metrics, Logger: log,
	})
	return o
}

func (o *office) must(err error) {
	o.t.Helper()
	if err != nil {
		o.t.Fatal(err)
	}
}

// token is of an operator in some groups.
func (o *office) token(groups ...string) string {
	o.t.Helper()
	return o.sign(map[string]any{"role": "security", "groups": groups})
}

func (o *office) sign(claims map[string]any) string {
	o.t.Helper()
	now := time.Now().Unix()
	all := map[string]any{
		"iss": opsIssuer, "aud": "writ", "sub": "olga", "client_id": "console", "jti": fmt.Sprint(now), "iat": now, "exp": now + 600,
	}
	for name, v := range claims {
		all[name] = v
	}
	payload, err := json.Marshal(all)
	o.must(err)
	jws, err := o.signer.Sign(payload)
	o.must(err)
	text, err := jws.CompactSerialize()
	o.must(err)
	return text
}

// send holds what comes back to the spec.
func (o *office) send(method, path, token, body string) answer {
	o.t.Helper()
	r := httptest.NewRequestWithContext(o.t.Context(), method, path, strings.NewReader(body))
	r.Header.Set("Authorization", "Bearer "+token)
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	rec := httptest.NewRecorder()
	o.api.ServeHTTP(rec, r)
	a := answer{status: rec.Code, header: rec.Header(), raw: rec.Body.Bytes()}
	if strings.HasSuffix(a.header.Get("Content-Type"), "json") {
		o.must(json.Unmarshal(a.raw, &a.body))
	}
	if in := w.find(o.t, r); in != nil {
		w.check(o.t, in, a)
	}
	if a.status >= 400 {
		w.checkProblem(o.t, a)
	}
	return a
}

func (o *office) get(path string, groups ...string) answer {
	o.t.Helper()
	return o.send("GET", path, o.token(groups...), "")
}

// uses are the entries of operators so far.
func (o *office) uses() (out []audit.Entry) {
	o.t.Helper()
	o.must(o.store.View(o.t.Context(), func(tx *sqlstore.Tx) error {
		all, err := tx.Unsequenced(o.t.Context(), 100_000)
		for _, e := range all {
			if strings.HasPrefix(string(e.Kind), "operator.") {
				out = append(out, e)
			}
		}
		return err
	}))
	return out
}

// codes are of the reasons of an entry.
func codesOf(e audit.Entry) (out []string) {
	list, _ := e.Detail["reasons"].([]any)
	for _, r := range list {
		out = append(out, r.(map[string]any)["code"].(string))
	}
	return out
}

func regoDir(t *testing.T, text string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "writ.rego"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// reads are all routes that show operators something, with a path that fits.
var reads = map[string]string{
	"audit.checkpoint.read": "/audit/checkpoint",
	"audit.entries.read":    "/audit/entries?limit=5&kind=decision.deny",
	"audit.proof.read":      "/audit/proof?from=1",
	"sessions.read":         "/sessions?state=active",
	"decisions.read":        "/decisions?effect=deny",
	"policy.read":           "/policy",
	"leases.read":           "/leases?state=revoking",
	"revocations.read":      "/revocations?frozen=true",
}

const shipped = "../../policies"

// The kill switch works whatever policy does, and nothing else does then.
func TestOperatorsUnderBrokenPolicies(t *testing.T) {
	const decision = "package writ\ndecision := {\"effect\": \"deny\", \"reasons\": [{\"code\": \"no\", \"message\": \"no\"}]}\n"
	for _, tt := range []struct{ name, rego, code string }{
		{"none loaded", "", policy.AdminNotLoaded},
		{"says nothing of operators", decision, policy.AdminUndefined},
		{"undefined", decision + `admin := {"allow": true, "reasons": []} if input.nothing`, policy.AdminUndefined},
		{"runtime error", decision + `admin := {"allow": true, "reasons": [{"code": "ok", "message": sprintf("%v", [to_number(input.action)])}]}`, policy.AdminError},
		{"conflict", decision + "admin := {\"allow\": true} if input.operator\nadmin := {\"allow\": false} if input.env", policy.AdminError},
		{"endless", decision + `admin := {"allow": true, "reasons": [{"code": "ok", "message": "ok"}]} if {
	count([1 | some i in numbers.range(1, 30000); some j in numbers.range(1, 30000); i * j == -1]) == 0
}`, policy.AdminTimeout},
		{"true", decision + `admin := true`, policy.AdminInvalidOutput},
		{"a decision", decision + `admin := {"effect": "allow", "reasons": [{"code": "ok", "message": "ok"}]}`, policy.AdminInvalidOutput},
		{"allow as a word", decision + `admin := {"allow": "true", "reasons": [{"code": "ok", "message": "ok"}]}`, policy.AdminInvalidOutput},
		{"no reasons", decision + `admin := {"allow": true, "reasons": []}`, policy.AdminInvalidOutput},
		{"one member more", decision + `admin := {"allow": true, "reasons": [{"code": "ok", "message": "ok"}], "only": []}`, policy.AdminInvalidOutput},
		{"says no", decision + `admin := {"allow": false, "reasons": [{"code": "no", "message": "not on a Monday"}]}`, "no"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := ""
			if tt.rego != "" {
				path = regoDir(t, tt.rego)
			}
			o := newOffice(t, path)
			for action, url := range reads {
				if tt.code == policy.AdminTimeout && action != "policy.read" {
					continue // each takes its time
				}
				before := len(o.uses())
				a := o.get(url, "writ-operators")
				a.refused(t, 403, "forbidden", "-")
				if tt.code == "no" && a.str("detail") != "not on a Monday" {
					t.Errorf("detail %q, want what policy says", a.str("detail"))
				}
				uses := o.uses()[before:]
				if len(uses) != 1 || uses[0].Kind != audit.OperatorRefused || !slices.Equal(codesOf(uses[0]), []string{tt.code}) {
					t.Errorf("%s is recorded as %+v, want %s", action, uses, tt.code)
				}
			}
			for _, token := range []string{o.token("writ-operators"), o.token()} { // a group is policy's business
				if a := o.send("POST", "/revocations", token, `{"all": true}`); a.status != 200 {
					t.Errorf("the kill switch: %s", a.raw)
				}
			}
		})
	}
}

func TestLoadSaysThatOperatorsAreForgotten(t *testing.T) {
	const warning = "policies say nothing of operators"
	if o := newOffice(t, regoDir(t, "package writ\ndecision := 1\n")); !strings.Contains(o.log.String(), warning) {
		t.Errorf("no warning: %s", o.log)
	}
	if o := newOffice(t, shipped); strings.Contains(o.log.String(), warning) {
		t.Errorf("a warning without cause: %s", o.log)
	}
}

func TestOperatorGroups(t *testing.T) {
	o := newOffice(t, shipped)
	for action, url := range reads {
		if a := o.get(url, "x", "writ-operators"); a.status != 200 {
			t.Errorf("operators may not %s: %s", action, a.raw)
		}
		a := o.get(url, "writ-auditors")
		if strings.HasPrefix(action, "audit.") != (a.status == 200) {
			t.Errorf("%s by an auditor: %s", action, a.raw)
		}
		a = o.get(url)
		a.refused(t, 403, "forbidden", "-")
		if a.str("detail") != "None of your groups may do this" {
			t.Errorf("detail %q", a.str("detail"))
		}
	}
	// The group is of no use without the claim that the configuration wants, and nobody
	// who is no operator leaves anything in the log.
	before := len(o.uses())
	for name, claims := range map[string]map[string]any{
		"without it": {"groups": []string{"writ-operators"}}, "another": {"role": "sales", "groups": []string{"writ-operators"}},
		"an agent acts": {"role": "security", "groups": []string{"writ-operators"}, "act": map[string]any{"sub": "bot"}},
	} {
		for _, url := range reads {
			a := o.send("GET", url, o.sign(claims), "")
			a.refused(t, 403, "forbidden", "-")
			if a.str("detail") != "this needs an operator" {
				t.Errorf("%s: %q", name, a.str("detail"))
			}
		}
	}
	if got := len(o.uses()); got != before {
		t.Errorf("%d entries by strangers", got-before)
	}
}

// What is asked, by whom and with what end is in the log, once for each request.
func TestEveryUseIsRecorded(t *testing.T) {
	o := newOffice(t, shipped)
	for action, path := range reads {
		for _, c := range []struct {
			path   string
			groups []string
			status int
			kind   audit.Kind
			codes  []string
		}{
			{path, []string{"writ-operators"}, 200, audit.OperatorRead, nil},
			{path, nil, 403, audit.OperatorRefused, []string{"not_permitted"}},
			{path + map[bool]string{true: "&", false: "?"}[strings.Contains(path, "?")] + "token=eyJ-not-for-the-log", []string{"writ-operators"}, 400, audit.OperatorRefused, []string{"invalid_request"}},
		} {
			before := len(o.uses())
			if a := o.get(c.path, c.groups...); a.status != c.status {
				t.Fatalf("%s: %s", c.path, a.raw)
			}
			uses := o.uses()[before:]
			if len(uses) != 1 {
				t.Fatalf("%s: %d entries", c.path, len(uses))
			}
			e := uses[0]
			place, query, _ := strings.Cut(path, "?")
			if c.status == 400 {
				query = ""
			}
			values, _ := url.ParseQuery(query)
			recorded, _ := e.Detail["query"].(string)
			if e.Kind != c.kind || e.Operator != (identity.Ref{Issuer: opsIssuer, ID: "olga"}) || e.RequestID == "" ||
				e.Detail["action"] != action || e.Detail["path"] != place || recorded != values.Encode() || !slices.Equal(codesOf(e), c.codes) {
				t.Errorf("%s: %+v", c.path, e)
			}
			if record, err := e.Record(); err != nil || bytes.Contains(record, []byte("eyJ")) {
				t.Errorf("%s %v", record, err)
			}
			if (e.Detail["policy"] != nil) != (c.status != 400) {
				t.Errorf("%s: policy %v", c.path, e.Detail["policy"])
			}
		}
	}
}

// What can't be recorded is not shown, nor is it said whether it would have been.
func TestNoRecordNoAnswer(t *testing.T) {
	o := newOffice(t, shipped)
	mend := storetest.Break(t, o.url, "audit")
	for _, path := range reads {
		for _, groups := range [][]string{{"writ-operators"}, nil} {
			o.get(path, groups...).refused(t, 503, "unavailable", "-")
		}
		o.send("GET", path+map[bool]string{true: "&", false: "?"}[strings.Contains(path, "?")]+"x=1", o.token(), "").refused(t, 503, "unavailable", "-")
	}
	mend()
	for _, path := range reads {
		if a := o.get(path, "writ-operators"); a.status != 200 { // and nothing is sequenced, as where the log is stuck
			t.Errorf("%s: %s", path, a.raw)
		}
	}
}

// Policy can tie what is seen to what is asked for.
func TestPolicySeesWhatIsAsked(t *testing.T) {
	o := newOffice(t, regoDir(t, `# METADATA
# schemas:
#   - input: schema.admin_input
package writ.admin

default allow := false

allow if {
	input.action == "audit.entries.read"
	input.resource.user.iss == "https://idp.example"
	input.resource.user.sub == "alice"
}

reasons := [{"code": "echo", "message": substring(json.marshal([input.resource, input.operator.id, input.env.ip]), 0, 250)}]
`))
	if a := o.get("/audit/entries?user_iss=https://idp.example&user_sub=alice"); a.status != 200 {
		t.Errorf("alice's entries: %s", a.raw)
	}
	for path, want := range map[string]string{
		"/audit/entries": `{"limit":100}`,
		"/audit/entries?user_iss=https://idp.example&user_sub=bob&from=7": `{"from":7,"limit":100,"user":{"iss":"https://idp.example","sub":"bob"}}`,
		"/audit/entries?session=ses_1&decision=dec_1&kind=k&limit=3":      `{"decision":"dec_1","kind":"k","limit":3,"session":"ses_1"}`,
		"/audit/proof?index=3":    `{"index":3}`,
		"/audit/proof?from=3":     `{"from":3}`,
		"/audit/checkpoint":       `{}`,
		"/sessions?state=ended":   `{"limit":50,"state":"ended"}`,
		"/decisions?effect=allow": `{"effect":"allow","limit":50}`,
		"/leases?stuck=true&minter=db&state=revoking&session=ses_00000000000000000000000000": `{"limit":50,"minter":"db","session":"ses_00000000000000000000000000","state":"revoking","stuck":"true"}`,
		"/orphans?minter=db":                          `{"minter":"db"}`,
		"/revocations?frozen=true":                    `{"frozen":"true","limit":50}`,
		"/revocations/rev_00000000000000000000000000": `{"limit":50,"revocation":"rev_00000000000000000000000000"}`,
		"/sessions?agent_iss=i&agent_sub=s&cursor=ses_00000000000000000000000000": `{"agent":{"iss":"i","sub":"s"},"cursor":"ses_00000000000000000000000000","limit":50}`,
	} {
		a := o.get(path)
		a.refused(t, 403, "forbidden", "-")
		if got := a.str("detail"); got != `[`+want+`,"olga","192.0.2.1"]` {
			t.Errorf("%s: policy sees %s, want %s", path, got, want)
		}
	}
}

// Odd values reach neither SQL nor policy nor the log as more than letters.
func TestOddParameters(t *testing.T) {
	o := newOffice(t, shipped)
	long := strings.Repeat("x", 1025)
	for _, tt := range []struct{ path, pointer string }{
		{"/sessions?cursor=x", "cursor"}, {"/sessions?cursor=dec_00000000000000000000000000", "cursor"},
		{"/sessions?cursor=ses_0000000000000000000000000'", "cursor"}, {"/sessions?cursor=SES_00000000000000000000000000", "cursor"},
		{"/sessions?cursor=", "cursor"}, {"/sessions?cursor=ses_00000000000000000000000000&cursor=ses_00000000000000000000000000", "cursor"},
		{"/decisions?cursor=ses_00000000000000000000000000", "cursor"}, {"/decisions?session=ses_x", "session"}, {"/decisions?session=" + long, "session"},
		{"/decisions?effect=ALLOW", "effect"}, {"/decisions?effect=", "effect"}, {"/sessions?state=dead", "state"},
		{"/sessions?limit=0", "limit"}, {"/sessions?limit=101", "limit"}, {"/decisions?limit=-1", "limit"}, {"/decisions?limit=1e2", "limit"},
		{"/decisions?limit=99999999999999999999", "limit"},
		{"/sessions?user_sub=a", "user_iss"}, {"/sessions?agent_iss=a", "agent_iss"}, {"/sessions?user_iss=a&user_sub=" + long, "user_sub"},
		{"/sessions?user_iss=a&user_sub=%00", "user_sub"}, {"/sessions?user_iss=a&user_sub=%ff%fe", "user_sub"},
		{"/sessions?user_iss=a&user_sub=a%0Ab", "user_sub"}, {"/sessions?user_iss=%E2%80%AE&user_sub=a", "user_iss"},
		{"/audit/entries?session=%00", "session"}, {"/audit/entries?kind=%ff", "kind"}, {"/policy?x=1", "x"}, {"/audit/checkpoint?from=1", "from"},
		{"/sessions?session=ses_00000000000000000000000000", "session"},
	} {
		o.get(tt.path, "writ-operators").refused(t, 400, "invalid_request", tt.pointer)
	}
	o.get("/sessions?%zz", "writ-operators").refused(t, 400, "invalid_request", "-")
	o.get("/sessions?a=1;b=2", "writ-operators").refused(t, 400, "invalid_request", "-")
	for _, sub := range []string{`' OR 1=1 --`, `%`, `_`, `"}],"x":[{"`, `é\u0000`, "🦊", `${x}`, "</script>"} {
		for _, path := range []string{"/sessions", "/decisions", "/audit/entries"} {
			before := len(o.uses())
			query := url.Values{"user_iss": {"https://idp.example"}, "user_sub": {sub}}.Encode()
			a := o.get(path+"?"+query, "writ-operators")
			list, _ := a.at(strings.TrimPrefix(strings.TrimPrefix(path, "/audit"), "/")).([]any)
			if a.status != 200 || len(list) != 0 {
				t.Errorf("%s of %q: %s", path, sub, a.raw)
			}
			if uses := o.uses()[before:]; len(uses) != 1 || uses[0].Detail["query"] != query {
				t.Errorf("%s of %q is recorded as %+v", path, sub, uses)
			}
		}
	}
}

// A cursor holds nothing but a place: filters and policy are those of its own request.
func TestCursorIsNoAuthority(t *testing.T) {
	o := newOffice(t, shipped)
	owner := func(name string) (s session.Session) {
		s = session.New(identity.Principal{Ref: identity.Ref{Issuer: opsIssuer, ID: name}}, identity.Ref{Issuer: opsIssuer, ID: "bot"},
			session.Spec{}, session.Settings{DefaultAge: time.Hour}, time.Now())
		o.must(o.store.Update(t.Context(), func(tx *sqlstore.Tx) error { return tx.InsertSession(t.Context(), s) }))
		return s
	}
	mine, theirs := owner("alice"), owner("bob")
	a := o.get("/sessions?user_iss="+opsIssuer+"&user_sub=alice&cursor="+theirs.ID, "writ-operators")
	if list := a.at("sessions").([]any); len(list) != 1 || list[0].(map[string]any)["session"] != mine.ID {
		t.Errorf("another's cursor: %s", a.raw)
	}
	o.get("/sessions?cursor="+theirs.ID, "writ-auditors").refused(t, 403, "forbidden", "-")
}

// A search that fails in the store is no empty page.
func TestSearchWithoutStore(t *testing.T) {
	o := newOffice(t, shipped)
	storetest.Exec(t, o.url, `ALTER TABLE decisions RENAME TO gone`)
	o.get("/decisions", "writ-operators").refused(t, 503, "unavailable", "-")
}

// Many evaluations at a time are no way past policy.
func TestOperatorsWaitTheirTurn(t *testing.T) {
	o := newOffice(t, shipped)
	var wg sync.WaitGroup
	statuses := make([]int, 32)
	for i := range statuses {
		wg.Go(func() {
			r := httptest.NewRequestWithContext(t.Context(), "GET", "/policy", http.NoBody)
			r.Header.Set("Authorization", "Bearer "+o.token())
			rec := httptest.NewRecorder()
			o.api.ServeHTTP(rec, r)
			_, _ = io.Copy(io.Discard, rec.Body)
			statuses[i] = rec.Code
		})
	}
	wg.Wait()
	for _, s := range statuses {
		if s != http.StatusForbidden && s != http.StatusTooManyRequests {
			t.Errorf("status %d", s)
		}
	}
}

// What lies at policy.path but is refused can be read, and is forgotten once mended.
func TestPolicyStatusTellsOfARefusal(t *testing.T) {
	const fine = "package writ\nadmin := {\"allow\": true, \"reasons\": [{\"code\": \"ok\", \"message\": \"ok\"}]}\n"
	dir := regoDir(t, fine)
	o := newOffice(t, dir)
	first := o.get("/policy")
	if first.status != 200 || first.at("refused") != nil || first.str("activated_at") == "" {
		t.Fatalf("%s", first.raw)
	}
	write := func(text string) error {
		o.must(os.WriteFile(filepath.Join(dir, "writ.rego"), []byte(text), 0o600))
		return o.engine.Load(t.Context())
	}
	if write(fine+"broken := {") == nil {
		t.Fatal("broken policies were taken")
	}
	a := o.get("/policy")
	if a.str("digest") != first.str("digest") || a.str("activated_at") != first.str("activated_at") ||
		!strings.Contains(a.str("refused", "error"), "writ.rego") || a.str("refused", "at") == "" {
		t.Errorf("after a refusal: %s", a.raw)
	}
	o.must(write(fine))
	if a := o.get("/policy"); a.at("refused") != nil || a.str("activated_at") != first.str("activated_at") {
		t.Errorf("after the old ones came back: %s", a.raw)
	}
	o.must(write(fine + "more := 1\n"))
	if a := o.get("/policy"); a.at("refused") != nil || a.str("digest") == first.str("digest") {
		t.Errorf("after new ones: %s", a.raw)
	}
}
