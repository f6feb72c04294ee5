package httpapi_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/go-chi/chi/v5"
	"go.uber.org/goleak"

	"github.com/writsec/writ/internal/dev"
	"github.com/writsec/writ/internal/devidp"
	"github.com/writsec/writ/internal/httpapi"
	"github.com/writsec/writ/internal/telemetry"
)

// w is the real thing, one for all tests: store, policies, provider, engine and
// listeners. Tests share it, so they don't run in parallel.
var w *world

// idpKey is the provider's, so that tests can sign what it does not.
var idpKey, _ = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)

type world struct {
	m      *testing.M
	dev    *dev.Dev
	dir    string // of its data
	spec   *openapi3.T
	routes chi.Routes
	client *http.Client
	traces *collector

	mu      sync.Mutex
	log     bytes.Buffer
	secrets map[string]string       // what must never be logged, and what it is
	seen    map[string]map[int]bool // by operation
}

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(&world{m: m})
}

// Run implements goleak.TestingM: the leak check comes after everything stopped.
func (x *world) Run() int {
	code, err := x.run()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

func (x *world) run() (code int, err error) {
	w = x
	x.secrets, x.seen = map[string]string{}, map[string]map[int]bool{}
	dir, err := os.MkdirTemp("", "httpapi")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	x.dir = dir
	if x.spec, err = openapi3.NewLoader().LoadFromData(httpapi.OpenAPI); err != nil {
		return 1, err
	}
	x.routes = httpapi.New(httpapi.Config{})
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	x.traces = newCollector()
	defer x.traces.Close()
	stopTracing, err := telemetry.Setup(ctx, telemetry.NewLogger(x, slog.LevelDebug))
	if err != nil {
		return 1, err
	}
	x.dev, err = dev.New(ctx, dev.Config{
		Dir: dir, Policies: "../../policies", Listen: "127.0.0.1:0", OpsListen: "127.0.0.1:0", IDPListen: "127.0.0.1:0", IDPKey: idpKey,
		Logger: telemetry.NewLogger(x, slog.LevelDebug),
	})
	if err != nil {
		return 1, err
	}
	for _, s := range x.dev.Services {
		x.secrets[s.Secret] = "secret of service " + s.ID
		x.secrets[url.QueryEscape(s.Secret)] = "escaped secret of service " + s.ID
	}
	done := make(chan error, 1)
	go func() { done <- x.dev.Run(ctx) }()
	x.client = &http.Client{Transport: &http.Transport{}, Timeout: 30 * time.Second}
	code = x.m.Run()
	series, err := x.series()
	x.client.CloseIdleConnections()
	stop()
	if err != nil {
		return 1, err
	}
	if err := <-done; err != nil {
		return 1, err
	}
	stopTracing()
	if code == 0 && flag.Lookup("test.run").Value.String() == "" {
		err = x.coverage()
	}
	if err == nil {
		err = x.leaks()
	}
	if err == nil {
		err = x.traces.strange(x.secrets)
	}
	if err == nil {
		err = unbounded(series)
	}
	if err != nil {
		code = 1
	}
	return code, err
}

// Write takes the log.
func (x *world) Write(p []byte) (int, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.log.Write(p)
}

func (x *world) secret(value, what string) {
	if len(value) < 12 { // too short to be a finding
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.secrets[value] = what
}

// leaks looks for secrets in all that was logged.
func (x *world) leaks() error {
	log := x.log.String()
	if x.secrets == nil || !strings.Contains(log, `"msg":"decision"`) && flag.Lookup("test.run").Value.String() == "" {
		return fmt.Errorf("the log is not the one that was meant")
	}
	for value, what := range x.secrets {
		if i := strings.Index(log, value); i >= 0 {
			return fmt.Errorf("the log holds %s: …%s", what, log[max(0, i-300):min(len(log), i+40)])
		}
	}
	for _, line := range strings.Split(strings.TrimSpace(log), "\n") {
		if !json.Valid([]byte(line)) {
			return fmt.Errorf("not a log line: %q", line)
		}
	}
	return nil
}

// coverage says which operation never succeeded before the eyes of the spec.
func (x *world) coverage() error {
	var missing []string
	for path, item := range x.spec.Paths.Map() {
		for method, op := range item.Operations() {
			for status := range op.Responses.Map() {
				var code int
				_, _ = fmt.Sscan(status, &code)
				// What a test can't bring about without breaking something is not asked for.
				if code < 500 && code != http.StatusTooManyRequests && !x.seen[op.OperationID][code] {
					missing = append(missing, fmt.Sprintf("%s %s: %s", method, path, status))
				}
			}
		}
	}
	if len(missing) > 0 {
		slices.Sort(missing)
		return fmt.Errorf("declared but never seen:\n  %s", strings.Join(missing, "\n  "))
	}
	return nil
}

// call is one request as a test writes it.
type call struct {
	method, path string
	token        string // bearer
	header       http.Header
	body         any // string or []byte as it is; url.Values a form; anything else JSON
	// invalid: the spec must refuse this request, too. Otherwise it must accept it.
	invalid bool
	// loose: this request is wrong in a way that no schema can say.
	loose bool
}

type answer struct {
	status int
	header http.Header
	raw    []byte
	body   map[string]any
}

func (c call) request(t *testing.T) *http.Request {
	t.Helper()
	var body []byte
	contentType := ""
	switch b := c.body.(type) {
	case nil:
	case string:
		body, contentType = []byte(b), "application/json"
	case []byte:
		body, contentType = b, "application/json"
	case url.Values:
		body, contentType = []byte(b.Encode()), "application/x-www-form-urlencoded"
	default:
		var err error
		if body, err = json.Marshal(b); err != nil {
			t.Fatal(err)
		}
		contentType = "application/json"
	}
	r, err := http.NewRequestWithContext(t.Context(), c.method, w.dev.URL+c.path, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if contentType != "" {
		r.Header.Set("Content-Type", contentType)
	}
	if c.token != "" {
		r.Header.Set("Authorization", "Bearer "+c.token)
	}
	for name, values := range c.header {
		r.Header[http.CanonicalHeaderKey(name)] = values
	}
	for _, h := range r.Header.Values("Authorization") {
		_, token, _ := strings.Cut(h, " ")
		w.secret(token, "a token of an Authorization header")
	}
	return r
}

// send holds the request, the response and their agreement to the spec.
func (c call) send(t *testing.T) answer {
	t.Helper()
	r := c.request(t)
	in := w.find(t, r)
	if in != nil && !c.loose {
		err := openapi3filter.ValidateRequest(r.Context(), in)
		if !c.invalid && err != nil {
			t.Fatalf("the spec refuses %s %s: %v", c.method, c.path, err)
		}
		if c.invalid && err == nil {
			t.Errorf("the spec accepts %s %s %v %.200v", c.method, c.path, c.header, c.body)
		}
		r = c.request(t)
	}
	res, err := w.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	a := answer{status: res.StatusCode, header: res.Header}
	if a.raw, err = io.ReadAll(res.Body); err != nil {
		t.Fatal(err)
	}
	if strings.HasSuffix(a.header.Get("Content-Type"), "json") {
		if err := json.Unmarshal(a.raw, &a.body); err != nil {
			t.Fatalf("%s: %v", a.raw, err)
		}
	}
	if credential, ok := a.body["credential"].(map[string]any); ok {
		w.secret(credential["secret"].(map[string]any)["token"].(string), "a minted token")
	}
	if in != nil {
		w.check(t, in, a)
	}
	if a.status >= 400 {
		w.checkProblem(t, a)
	}
	if (c.invalid || c.loose) && a.status < 400 {
		t.Errorf("%s %s was accepted: %s", c.method, c.path, a.raw)
	}
	return a
}

// find returns what the spec knows of a request, nil where it has no operation.
func (x *world) find(t *testing.T, r *http.Request) *openapi3filter.RequestValidationInput {
	t.Helper()
	rctx := chi.NewRouteContext()
	if !x.routes.Match(rctx, r.Method, r.URL.Path) {
		return nil
	}
	pattern := rctx.RoutePattern()
	item := x.spec.Paths.Find(pattern)
	if item == nil || item.GetOperation(r.Method) == nil {
		t.Fatalf("%s %s is not in the spec", r.Method, pattern)
	}
	params := map[string]string{}
	for i, key := range rctx.URLParams.Keys {
		params[key] = rctx.URLParams.Values[i]
	}
	return &openapi3filter.RequestValidationInput{
		Request: r, PathParams: params,
		Route:   &routers.Route{Spec: x.spec, Path: pattern, PathItem: item, Method: r.Method, Operation: item.GetOperation(r.Method)},
		Options: &openapi3filter.Options{AuthenticationFunc: authenticated, RejectWhenRequestBodyNotSpecified: true},
	}
}

// authenticated holds a request to the form of a security scheme.
func authenticated(_ context.Context, in *openapi3filter.AuthenticationInput) error {
	headers := in.RequestValidationInput.Request.Header.Values("Authorization")
	if len(headers) != 1 {
		return fmt.Errorf("%d Authorization headers", len(headers))
	}
	scheme, rest, _ := strings.Cut(headers[0], " ")
	bound := in.SecurityScheme.Scheme == "bearer" && scheme == "DPoP" // as its description says
	if !strings.EqualFold(scheme, in.SecurityScheme.Scheme) && !bound || rest == "" {
		return fmt.Errorf("not a %s authorization", in.SecurityScheme.Scheme)
	}
	return nil
}

// everywhere are headers that net/http sets by itself, and that of every answer to the
// scheme DPoP.
var everywhere = []string{"Date", "Content-Length", "Content-Type", "Dpop-Nonce"}

// check holds a response to the spec: status, body and headers declared.
func (x *world) check(t *testing.T, in *openapi3filter.RequestValidationInput, a answer) {
	t.Helper()
	op := in.Route.Operation
	err := openapi3filter.ValidateResponse(t.Context(), &openapi3filter.ResponseValidationInput{
		RequestValidationInput: in, Status: a.status, Header: a.header, Body: io.NopCloser(bytes.NewReader(a.raw)),
		Options: &openapi3filter.Options{IncludeResponseStatus: true},
	})
	if err != nil {
		t.Fatalf("%s %s answers %d against the spec: %v\n%s", in.Request.Method, in.Request.URL.Path, a.status, err, a.raw)
	}
	declared := op.Responses.Status(a.status).Value
	for name := range a.header {
		known := slices.Contains(everywhere, name)
		for h := range declared.Headers {
			known = known || http.CanonicalHeaderKey(h) == name
		}
		if !known {
			t.Errorf("%s answers %d with the undeclared header %s", op.OperationID, a.status, name)
		}
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.seen[op.OperationID] == nil {
		x.seen[op.OperationID] = map[int]bool{}
	}
	x.seen[op.OperationID][a.status] = true
}

// checkProblem holds every error, of an operation or of none, to what the type and
// the headers promise.
func (x *world) checkProblem(t *testing.T, a answer) {
	t.Helper()
	if got := a.header.Get("Content-Type"); got != "application/problem+json" {
		t.Errorf("an error is %q: %s", got, a.raw)
	}
	if err := x.spec.Components.Schemas["Problem"].Value.VisitJSON(any(a.body), openapi3.EnableJSONSchema2020()); err != nil {
		t.Errorf("not a problem: %v\n%s", err, a.raw)
	}
	if want := httpapi.ProblemBase + a.str("code"); a.str("type") != want {
		t.Errorf("type = %q, want %q", a.str("type"), want)
	}
	if a.body["status"] != float64(a.status) {
		t.Errorf("status in the body = %v, on the wire %d", a.body["status"], a.status)
	}
	if got := a.header.Get("X-Request-ID"); got == "" || got != a.str("request_id") {
		t.Errorf("X-Request-ID = %q, request_id %q", got, a.str("request_id"))
	}
	if a.header.Get("Cache-Control") != "no-store" {
		t.Errorf("a problem may be cached: %v", a.header)
	}
}

// at follows a path of members; nil where there is none.
func (a answer) at(path ...string) any {
	var v any = a.body
	for _, name := range path {
		m, _ := v.(map[string]any)
		v = m[name]
	}
	return v
}

func (a answer) str(path ...string) string {
	s, _ := a.at(path...).(string)
	return s
}

func (a answer) pointers() []string {
	var out []string
	list, _ := a.body["errors"].([]any)
	for _, e := range list {
		out = append(out, e.(map[string]any)["pointer"].(string))
	}
	return out
}

func (a answer) reason() string {
	list, _ := a.body["reasons"].([]any)
	if len(list) == 0 {
		return ""
	}
	return list[0].(map[string]any)["code"].(string)
}

// refused wants a problem with one pointer ("-" for none).
func (a answer) refused(t *testing.T, status int, code, pointer string) {
	t.Helper()
	want := []string{pointer}
	if pointer == "-" {
		want = nil
	}
	if a.status != status || a.str("code") != code || !slices.Equal(a.pointers(), want) {
		t.Errorf("got %d %s at %q, want %d %s at %q\n%s", a.status, a.str("code"), a.pointers(), status, code, want, a.raw)
	}
}

// decided wants a decision and, of a deny, its first reason.
func (a answer) decided(t *testing.T, effect, reason string) answer {
	t.Helper()
	if a.status != http.StatusOK || a.str("decision") != effect || (reason != "" && a.reason() != reason) {
		t.Fatalf("got %d %s, want %s (%s)", a.status, a.raw, effect, reason)
	}
	if (a.at("credential") != nil) != (effect == "allow") {
		t.Fatalf("%s with the wrong credential: %s", effect, a.raw)
	}
	return a
}

// token gets one of the provider, by its route for command lines.
func token(t *testing.T, query string) string {
	t.Helper()
	return tokenOf(t, w.dev.IDP, query)
}

func tokenOf(t *testing.T, idp *devidp.Provider, query string) string {
	t.Helper()
	res, err := w.client.Get(idp.Issuer() + "/dev/token?" + query)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("token: %s %v", b, err)
	}
	w.secret(string(b), "a token of the provider")
	return string(b)
}

func alice(t *testing.T) string { return token(t, "user=alice&agent=sales-agent") }
func bob(t *testing.T) string   { return token(t, "user=bob&agent=hr-agent") }
func olga(t *testing.T) string  { return token(t, "user=olga&agent=ops-console") }

// obj is a JSON object.
type obj = map[string]any

func read(session string) obj {
	return with(obj{
		"intent":   obj{"action": "crm.opportunity.read", "parameters": obj{"quarter": "Q3"}},
		"resource": obj{"type": "crm.opportunity", "id": "opp-42"},
	}, "session", session)
}

func offboard(session, employee string) obj {
	return with(obj{
		"intent":   obj{"action": "hr.employee.offboard", "parameters": obj{"last_day": "2026-12-31"}, "purpose": "Leaves"},
		"resource": obj{"type": "hr.employee", "id": employee},
		"context":  obj{"ticket": "HR-7"},
	}, "session", session)
}

// with returns a copy with one more member, unless it is empty.
func with(o obj, name, value string) obj {
	o = maps.Clone(o)
	if value != "" {
		o[name] = value
	}
	return o
}

func decide(t *testing.T, token string, body any, header ...string) answer {
	t.Helper()
	c := call{method: "POST", path: "/decide", token: token, body: body, header: headers(header...)}
	for range 3 {
		if a := c.send(t); !a.starved() {
			return a
		}
	}
	return c.send(t)
}

// starved holds where this machine was too busy to evaluate within the deadline of
// 100 ms. The deny is right, but not what a test asked about.
func (a answer) starved() bool { return a.reason() == "policy_timeout" }

func headers(pairs ...string) http.Header {
	h := http.Header{}
	for i := 0; i < len(pairs); i += 2 {
		h.Add(pairs[i], pairs[i+1])
	}
	return h
}

func open(t *testing.T, token string) string {
	t.Helper()
	a := call{method: "POST", path: "/sessions", token: token, body: obj{}}.send(t)
	if a.status != http.StatusCreated {
		t.Fatalf("open: %s", a.raw)
	}
	return a.str("session")
}

// active asks at introspection, as the service of the domain.
func active(t *testing.T, domain, token string) bool {
	t.Helper()
	s := w.dev.Services[domain]
	a := call{method: "POST", path: "/introspect", body: url.Values{
		"token": {token}, "client_id": {s.ID}, "client_secret": {s.Secret},
	}}.send(t)
	if a.status != http.StatusOK {
		t.Fatalf("introspect: %s", a.raw)
	}
	return a.at("active").(bool)
}

// onPhone answers the pending prompt whose message holds the text.
func onPhone(t *testing.T, text string, approve bool) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		for _, p := range w.dev.IDP.Prompts() {
			if p.Status == devidp.Pending && strings.Contains(p.Message, text) {
				if err := w.dev.IDP.Answer(p.ID, approve); err != nil {
					t.Error(err)
				}
				return
			}
		}
	}
	t.Errorf("no prompt about %q came", text)
}

// prompts counts what was ever shown about the text.
func prompts(text string) int {
	n := 0
	for _, p := range w.dev.IDP.Prompts() {
		if strings.Contains(p.Message, text) {
			n++
		}
	}
	return n
}

// approved asks, approves on the phone and waits until the approval can be used.
func approved(t *testing.T, token string, body obj, text string) (approval string) {
	t.Helper()
	ask := decide(t, token, body).decided(t, "require_ciba", "")
	onPhone(t, text, true)
	id := ask.str("approval", "id")
	got := call{method: "GET", path: "/approvals/" + id + "?wait=10s", token: token}.send(t)
	if got.str("status") != "approved" {
		t.Fatalf("approval: %s", got.raw)
	}
	return id
}

// raw is JSON text that is put into an object as it is.
type raw string

// MarshalJSON implements json.Marshaler.
func (r raw) MarshalJSON() ([]byte, error) { return []byte(r), nil }

func marshal(v any) (string, error) {
	b, err := json.Marshal(v)
	return string(b), err
}
