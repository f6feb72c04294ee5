package policy_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/open-policy-agent/opa/v1/bundle"
	"go.uber.org/goleak"

	"github.com/writsec/writ/bundles"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/intent"
	"github.com/writsec/writ/internal/policy"
	"github.com/writsec/writ/internal/telemetry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// repository is the policies as they are shipped.
const repository = "../../policies"

// recorder is what an engine reported.
type recorder struct {
	mu      sync.Mutex
	loads   []policy.Version
	refused []error
	fail    error
}

func (r *recorder) record(_ context.Context, v policy.Version, refused error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if refused != nil {
		r.refused = append(r.refused, refused)
	} else {
		r.loads = append(r.loads, v)
	}
	return r.fail
}

func newEngine(t *testing.T, path string, change func(*policy.Config)) (*policy.Engine, *recorder) {
	t.Helper()
	r := &recorder{}
	cfg := policy.Config{
		Path: path, Query: "data.writ.decision", Deadline: 2 * time.Second, Record: r.record,
		Metrics: telemetry.NewMetrics(), Logger: slog.New(slog.DiscardHandler),
	}
	if change != nil {
		change(&cfg)
	}
	e, err := policy.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return e, r
}

// rego writes a policy directory of one file.
func rego(t *testing.T, text string) string {
	t.Helper()
	dir := t.TempDir()
	write(t, dir, "writ.rego", text)
	return dir
}

func write(t *testing.T, dir, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func crmRead() policy.Input {
	return policy.Input{
		User:     identity.Principal{Ref: identity.Ref{Issuer: "https://idp.example", ID: "alice"}, Claims: map[string]any{"groups": []any{"sales"}}},
		Agent:    identity.Principal{Ref: identity.Ref{Issuer: "https://idp.example", ID: "sales-agent"}},
		Session:  policy.SessionFacts{ID: "ses_1", StartedAt: time.Now()},
		Intent:   intent.Intent{Action: "crm.opportunity.read"},
		Resource: intent.Resource{Type: "crm.opportunity", ID: "opp-42"},
		Time:     time.Now(), IP: "127.0.0.1",
	}
}

func decide(t *testing.T, e *policy.Engine, in policy.Input) policy.Result {
	t.Helper()
	r, err := e.Decide(context.Background(), in)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestShippedPolicies(t *testing.T) {
	e, rec := newEngine(t, repository, nil)
	if _, err := e.Decide(context.Background(), crmRead()); !fault.Is(err, fault.NotReady) {
		t.Fatalf("before the first load: %v, want not_ready", err)
	}
	if err := e.Load(context.Background()); err != nil {
		t.Fatal(err)
	}
	r := decide(t, e, crmRead())
	if r.Effect != policy.Allow || r.Credential == nil || r.Credential.Minter != "crm" {
		t.Errorf("crm read: %+v", r)
	}
	if r.Policy != rec.loads[0] || r.Policy.Digest == "" {
		t.Errorf("the result names policy %v, recorded was %v", r.Policy, rec.loads)
	}
	other := crmRead()
	other.Intent.Action = "payments.transfer.create"
	if r := decide(t, e, other); r.Effect != policy.Deny || r.Credential != nil {
		t.Errorf("payments by sales: %+v", r)
	}
}

// The embedded sample is the same policy as the folder, test files included.
func TestSampleBundleDecidesAlike(t *testing.T) {
	path := filepath.Join(t.TempDir(), "writ.tar.gz")
	if err := os.WriteFile(path, bundles.Sample, 0o600); err != nil {
		t.Fatal(err)
	}
	e, _ := newEngine(t, path, nil)
	if err := e.Load(context.Background()); err != nil {
		t.Fatal(err)
	}
	if r := decide(t, e, crmRead()); r.Effect != policy.Allow {
		t.Errorf("crm read: %+v", r)
	}
}

const allowAll = `package writ
decision := {"effect": "allow", "reasons": [{"code": "ok", "message": "ok"}]}
`

func TestFailuresDeny(t *testing.T) {
	for _, tt := range []struct{ name, rego, code string }{
		{"undefined", "package writ\ndecision := 1 if input.nothing", policy.ReasonUndefined},
		{"other package", "package other\ndecision := 1", policy.ReasonUndefined},
		{"runtime error", `package writ
decision := {"effect": "allow", "reasons": [{"code": "ok", "message": sprintf("%v", [to_number(input.intent.action)])}]}`, policy.ReasonError},
		{"conflict", `package writ
decision := {"effect": "allow"} if input.user
decision := {"effect": "deny"} if input.agent`, policy.ReasonError},
		{"endless", `package writ
decision := {"effect": "allow", "reasons": [{"code": "ok", "message": "ok"}]} if {
	count([1 | some i in numbers.range(1, 3000); some j in numbers.range(1, 3000); i * j == -1]) == 0
}`, policy.ReasonTimeout},
		{"not an object", "package writ\ndecision := true", policy.ReasonInvalidOutput},
		{"unknown effect", `package writ
decision := {"effect": "maybe", "reasons": [{"code": "ok", "message": "ok"}]}`, policy.ReasonInvalidOutput},
		{"no reasons", `package writ
decision := {"effect": "allow", "reasons": []}`, policy.ReasonInvalidOutput},
		{"unknown member", `package writ
decision := {"effect": "allow", "reasons": [{"code": "ok", "message": "ok"}], "credentials": {}}`, policy.ReasonInvalidOutput},
		{"ask without approval", `package writ
decision := {"effect": "require_ciba", "reasons": [{"code": "ok", "message": "ok"}]}`, policy.ReasonInvalidOutput},
		{"counters of a deny", `package writ
decision := {"effect": "deny", "reasons": [{"code": "no", "message": "no"}], "counters": {"paid": 1}}`, policy.ReasonInvalidOutput},
		{"counters of an ask", `package writ
decision := {"effect": "require_ciba", "reasons": [{"code": "ask", "message": "ask"}], "counters": {"paid": 1},
	"approval": [{"code": "ask", "message": "ask", "approver": "user"}]}`, policy.ReasonInvalidOutput},
		{"negative counter", `package writ
decision := {"effect": "allow", "reasons": [{"code": "ok", "message": "ok"}], "counters": {"paid": -1}}`, policy.ReasonInvalidOutput},
		{"ttl not a duration", `package writ
decision := {"effect": "allow", "reasons": [{"code": "ok", "message": "ok"}], "credential": {"minter": "m", "ttl": "soon", "scope": {}}}`, policy.ReasonInvalidOutput},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			e, _ := newEngine(t, rego(t, tt.rego), func(c *policy.Config) { c.Deadline = 100 * time.Millisecond })
			if err := e.Load(context.Background()); err != nil {
				t.Fatal(err)
			}
			r := decide(t, e, crmRead())
			if r.Effect != policy.Deny || len(r.Reasons) != 1 || r.Reasons[0].Code != tt.code {
				t.Errorf("got %s %v, want deny %s", r.Effect, r.Reasons, tt.code)
			}
			if r.Credential != nil || r.Policy.Digest == "" {
				t.Errorf("a failed evaluation must grant nothing and name its policy: %+v", r)
			}
		})
	}
}

func TestGatesRefuse(t *testing.T) {
	for _, tt := range []struct{ name, rego, want string }{
		{"http.send", allowAll + `x := http.send({"method": "get", "url": "http://127.0.0.1"})`, "http.send"},
		{"opa.runtime", allowAll + `x := opa.runtime().env`, "opa.runtime"},
		{"syntax", "package writ\ndecision := {", "writ.rego"},
		{"strict: unused import", "package writ\nimport data.foo\ndecision := 1", "unused"},
		{"type check against the schema", `# METADATA
# schemas:
#   - input: schema.input
package writ
decision := 1 if input.session.lables`, "lables"},
		{"own test fails", allowAll + "\ntest_it if decision.effect == \"deny\"", "test_it"},
		{"no Rego", "", "holds no Rego"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			if tt.rego != "" {
				write(t, dir, "writ.rego", tt.rego)
			}
			e, rec := newEngine(t, dir, nil)
			err := e.Load(context.Background())
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("Load = %v, want an error with %q", err, tt.want)
			}
			if e.Ready() || len(rec.loads) != 0 || len(rec.refused) != 1 {
				t.Errorf("refused policies are in force, or unrecorded: %+v", rec)
			}
		})
	}
}

func TestTestFilesDoNotDecide(t *testing.T) {
	dir := rego(t, `package writ
default decision := {"effect": "deny", "reasons": [{"code": "no", "message": "no"}]}
`)
	write(t, dir, "sneaky_test.rego", `package writ
decision := {"effect": "allow", "reasons": [{"code": "ok", "message": "ok"}]} if input.user
`)
	e, _ := newEngine(t, dir, nil)
	if err := e.Load(context.Background()); err != nil {
		t.Fatal(err)
	}
	if r := decide(t, e, crmRead()); r.Effect != policy.Deny {
		t.Errorf("a rule in a test file decided: %+v", r)
	}
}

// What cannot be recorded is not put in force.
func TestLoadNeedsItsRecord(t *testing.T) {
	e, rec := newEngine(t, rego(t, allowAll), nil)
	rec.fail = errors.New("disk full")
	if err := e.Load(context.Background()); !errors.Is(err, rec.fail) {
		t.Fatalf("Load = %v, want %v", err, rec.fail)
	}
	if e.Ready() {
		t.Error("unrecorded policies are in force")
	}
}

func TestReload(t *testing.T) {
	dir := rego(t, allowAll)
	e, rec := newEngine(t, dir, func(c *policy.Config) { c.Reload = 5 * time.Millisecond })
	if err := e.Load(context.Background()); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- e.Run(ctx) }()
	defer func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	eventually := func(what string, ok func() bool) {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("never: " + what)
			}
		}
	}
	first := e.Version()

	write(t, dir, "writ.rego", "package writ\ndecision := {")
	eventually("the broken policy is refused", func() bool {
		rec.mu.Lock()
		defer rec.mu.Unlock()
		return len(rec.refused) > 0
	})
	if r := decide(t, e, crmRead()); r.Effect != policy.Allow || r.Policy != first {
		t.Fatalf("after a broken reload: %+v, want the old policy", r)
	}

	write(t, dir, "writ.rego", strings.ReplaceAll(allowAll, "allow", "deny"))
	eventually("the mended policy decides", func() bool { return decide(t, e, crmRead()).Effect == policy.Deny })
	if e.Version() == first {
		t.Error("the version did not change with the policy")
	}
}

func TestSignature(t *testing.T) {
	key := bundle.NewVerificationConfig(map[string]*bundle.KeyConfig{}, "writ", "", nil)
	dir, _ := newEngine(t, repository, func(c *policy.Config) { c.Verification = key })
	if err := dir.Load(context.Background()); err == nil || !strings.Contains(err.Error(), "signature") {
		t.Errorf("a directory under policy.signature: %v, want refused", err)
	}
	path := filepath.Join(t.TempDir(), "writ.tar.gz")
	if err := os.WriteFile(path, bundles.Sample, 0o600); err != nil {
		t.Fatal(err)
	}
	unsigned, _ := newEngine(t, path, func(c *policy.Config) { c.Verification = key })
	if err := unsigned.Load(context.Background()); err == nil {
		t.Error("an unsigned bundle passed")
	}
}

// echo answers with the input that the policy saw.
const echo = `package writ
decision := {"effect": "deny", "reasons": [{"code": "echo", "message": "echo"}], "advice": {"input": input, "now": time.now_ns()}}
`

func TestInput(t *testing.T) {
	e, _ := newEngine(t, rego(t, echo), nil)
	if err := e.Load(context.Background()); err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 11, 23, 1, 2, 3, 0, time.UTC)
	in := crmRead()
	in.Time, in.Session.StartedAt = at, at.Add(-time.Minute)
	in.Intent.Parameters = map[string]any{"amount": json.Number("19.99"), "big": json.Number("9007199254740992")}
	in.Session.Labels, in.Session.Counters = []string{"seen"}, map[string]int64{"paid": 1 << 60}

	advice := decide(t, e, in).Advice
	if got := fmt.Sprint(advice["now"]); got != fmt.Sprint(at.UnixNano()) && got != fmt.Sprintf("%v", float64(at.UnixNano())) {
		t.Errorf("time.now_ns() = %v, want the store's time", got)
	}
	text, err := json.Marshal(advice["input"])
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	if err := d.Decode(&got); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"user", "agent", "session", "intent", "resource", "context", "env"} {
		if _, ok := got[name].(map[string]any); !ok {
			t.Errorf("input.%s is %v, want an object", name, got[name])
		}
	}
	if _, ok := got["approvals"]; ok {
		t.Error("input.approvals is there without a continuation")
	}
	session := got["session"].(map[string]any)
	for _, optional := range []string{"task", "envelope"} {
		if _, ok := session[optional]; ok {
			t.Errorf("input.session.%s is there though nobody declared one", optional)
		}
	}

	in.Approvals = []policy.Approval{{Approver: "user", ACR: "phr", AMR: []string{"swk"}, AuthTime: at}}
	got = decide(t, e, in).Advice["input"].(map[string]any)
	want := map[string]any{"approver": "user", "acr": "phr", "amr": []any{"swk"}, "auth_time": "2026-11-23T01:02:03Z"}
	if a, _ := json.Marshal(got["approvals"]); string(a) != mustJSON(t, []any{want}) {
		t.Errorf("input.approvals = %s, want %s", a, mustJSON(t, []any{want}))
	}
}

func mustJSON(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestDecideHonoursItsContext(t *testing.T) {
	e, _ := newEngine(t, rego(t, allowAll), nil)
	if err := e.Load(context.Background()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if r, err := e.Decide(ctx, crmRead()); err == nil && r.Effect != policy.Deny {
		t.Errorf("with a cancelled context: %+v, want an error or a deny", r)
	}
}

func BenchmarkDecide(b *testing.B) {
	e, err := policy.New(policy.Config{
		Path: repository, Query: "data.writ.decision", Deadline: 2 * time.Second,
		Record:  func(context.Context, policy.Version, error) error { return nil },
		Metrics: telemetry.NewMetrics(), Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		b.Fatal(err)
	}
	if err := e.Load(context.Background()); err != nil {
		b.Fatal(err)
	}
	in := crmRead()
	for b.Loop() {
		if r, err := e.Decide(context.Background(), in); err != nil || r.Effect != policy.Allow {
			b.Fatal(r, err)
		}
	}
}

func adminAsks(action string) policy.AdminInput {
	return policy.AdminInput{
		Operator: identity.Principal{Ref: identity.Ref{Issuer: "https://idp.example", ID: "olga"}, Claims: map[string]any{"groups": []any{"writ-auditors"}}},
		Action:   action, Time: time.Now(), IP: "127.0.0.1",
	}
}

func TestAdmin(t *testing.T) {
	e, _ := newEngine(t, repository, nil)
	r, err := e.Admin(context.Background(), adminAsks("audit.entries.read"))
	if err != nil || r.Allow || len(r.Reasons) != 1 || r.Reasons[0].Code != policy.AdminNotLoaded {
		t.Fatalf("before the first load: %+v %v", r, err)
	}
	if st := e.Status(); st.Digest != "" || !st.ActivatedAt.IsZero() || st.Refused != nil {
		t.Errorf("before the first load: %+v", st)
	}
	if err := e.Load(context.Background()); err != nil {
		t.Fatal(err)
	}
	for action, want := range map[string]bool{"audit.entries.read": true, "sessions.read": false, "": false, "audit.**": true} {
		r, err := e.Admin(context.Background(), adminAsks(action))
		if err != nil || r.Allow != want || len(r.Reasons) == 0 || r.Policy != e.Version() {
			t.Errorf("%q by an auditor: %+v %v, want %v", action, r, err, want)
		}
	}
	if st := e.Status(); st.Version != e.Version() || time.Since(st.ActivatedAt) > time.Minute {
		t.Errorf("%+v", st)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if r, err := e.Admin(ctx, adminAsks("audit.entries.read")); err == nil || r.Allow {
		t.Errorf("with a cancelled context: %+v %v", r, err)
	}
}

// Each question has failures of its own, and a query of its own.
func TestAdminFailuresAreCountedApart(t *testing.T) {
	m := telemetry.NewMetrics()
	e, _ := newEngine(t, rego(t, allowAll+`
ops := {"allow": true, "reasons": [{"code": "ok", "message": "ok"}]} if input.action == "a"
ops := {"allow": true} if input.action == "b"
ops := x if {
	input.action == "c"
	x := to_number("c")
}
`), func(c *policy.Config) { c.AdminQuery, c.Metrics = "data.writ.ops", m })
	if err := e.Load(context.Background()); err != nil {
		t.Fatal(err)
	}
	for action, want := range map[string]string{"a": "ok", "b": policy.AdminInvalidOutput, "c": policy.AdminError, "d": policy.AdminUndefined} {
		r, err := e.Admin(context.Background(), adminAsks(action))
		if err != nil || r.Allow != (action == "a") || r.Reasons[0].Code != want {
			t.Errorf("%s: %+v %v, want %s", action, r, err, want)
		}
	}
	rec := httptest.NewRecorder()
	m.Handler().ServeHTTP(rec, httptest.NewRequestWithContext(t.Context(), "GET", "/metrics", nil))
	for code, want := range map[string]int{
		policy.AdminInvalidOutput: 1, policy.AdminError: 1, policy.AdminUndefined: 1, policy.AdminTimeout: 0, policy.ReasonError: 0, policy.ReasonUndefined: 0,
	} {
		if line := fmt.Sprintf("writ_policy_failures_total{reason=%q} %d\n", code, want); !strings.Contains(rec.Body.String(), line) {
			t.Errorf("no %s", line)
		}
	}
}

// The window is written as people write it.
func TestRecentInTheInput(t *testing.T) {
	t.Parallel()
	for window, want := range map[time.Duration]string{
		24 * time.Hour: "24h", 90 * time.Minute: "1h30m", time.Minute: "1m", 90 * time.Second: "1m30s", 10 * time.Second: "10s", time.Hour + time.Second: "1h0m1s",
	} {
		in := policy.Input{Recent: policy.RecentFacts{Window: window, Labels: []string{"a"}, Counters: map[string]int64{"n": 1 << 60}}}
		got := in.Document()["recent"]
		if d := cmp.Diff(map[string]any{"window": want, "labels": []any{"a"}, "counters": map[string]any{"n": json.Number("1152921504606846976")}}, got); d != "" {
			t.Errorf("%v (-want +got):\n%s", window, d)
		}
	}
}

// What was kept before there was a window is decided again as what it was: a request
// with nothing left on its pair.
func TestReplayOfAnInputWithoutRecent(t *testing.T) {
	t.Parallel()
	e, _ := newEngine(t, repository, nil)
	if err := e.Load(t.Context()); err != nil {
		t.Fatal(err)
	}
	in := crmRead()
	in.Time = time.Now()
	doc := in.Document()
	delete(doc, "recent")
	kept, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	if r, err := e.Replay(t.Context(), kept); err != nil || r.Effect != policy.Allow {
		t.Errorf("got %+v, %v; want allow", r, err)
	}
}
