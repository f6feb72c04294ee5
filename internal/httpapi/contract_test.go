package httpapi_test

import (
	"context"
	"encoding/json"
	"go/ast"
	"go/parser"
	gotoken "go/token"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/go-chi/chi/v5"
	"github.com/google/go-cmp/cmp"

	"github.com/writsec/writ/internal/dev"
	"github.com/writsec/writ/internal/httpapi"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/telemetry"
)

func TestSpecIsValidAndSoAreItsExamples(t *testing.T) {
	if err := w.spec.Validate(t.Context(), openapi3.EnableExamplesValidation()); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(w.spec.OpenAPI, "3.1.") {
		t.Errorf("openapi = %s", w.spec.OpenAPI)
	}
	// kin-openapi leaves out examples under oneOf and in components; they are few.
	for path, item := range w.spec.Paths.Map() {
		for method, op := range item.Operations() {
			for status, response := range op.Responses.Map() {
				for _, media := range response.Value.Content {
					for name, example := range media.Examples {
						err := media.Schema.Value.VisitJSON(example.Value.Value, openapi3.EnableJSONSchema2020(), openapi3.VisitAsResponse())
						if err != nil {
							t.Errorf("%s %s %s example %s: %v", method, path, status, name, err)
						}
					}
				}
			}
		}
	}
}

func TestRoutesAndSpecAreTheSame(t *testing.T) {
	var routes, spec []string
	err := chi.Walk(w.routes, func(method, route string, _ http.Handler, _ ...func(http.Handler) http.Handler) error {
		routes = append(routes, method+" "+route)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for path, item := range w.spec.Paths.Map() {
		for method := range item.Operations() {
			spec = append(spec, method+" "+path)
		}
	}
	slices.Sort(routes)
	slices.Sort(spec)
	if diff := cmp.Diff(routes, spec); diff != "" {
		t.Errorf("routes (-) and spec (+) differ:\n%s", diff)
	}
}

// codes reads the constants of type fault.Code.
func codes(t *testing.T) []string {
	t.Helper()
	file, err := parser.ParseFile(gotoken.NewFileSet(), "../fault/fault.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	ast.Inspect(file, func(n ast.Node) bool {
		v, ok := n.(*ast.ValueSpec)
		if !ok {
			return true
		}
		if typ, ok := v.Type.(*ast.Ident); ok && typ.Name == "Code" {
			s, err := strconv.Unquote(v.Values[0].(*ast.BasicLit).Value)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, s)
		}
		return true
	})
	slices.Sort(out)
	if len(out) < 10 {
		t.Fatalf("found only the codes %q", out)
	}
	return out
}

func TestEveryCodeHasItsPageAndItsPlaceInTheSpec(t *testing.T) {
	doc, err := os.ReadFile("../../docs/errors.md")
	if err != nil {
		t.Fatal(err)
	}
	var headings []string
	for _, m := range regexp.MustCompile("(?m)^## (.*)$").FindAllStringSubmatch(string(doc), -1) {
		headings = append(headings, m[1]) // a code is its own anchor: lower case and underscores
	}
	slices.Sort(headings)
	if diff := cmp.Diff(codes(t), headings); diff != "" {
		t.Errorf("codes (-) and headings of docs/errors.md (+) differ:\n%s", diff)
	}
	var enum []string
	for _, v := range w.spec.Components.Schemas["ProblemCode"].Value.Enum {
		enum = append(enum, v.(string))
	}
	slices.Sort(enum)
	if diff := cmp.Diff(codes(t), enum); diff != "" {
		t.Errorf("codes (-) and ProblemCode (+) differ:\n%s", diff)
	}
	for _, section := range strings.Split(string(doc), "\n## ")[1:] {
		code, _, _ := strings.Cut(section, "\n")
		for _, m := range regexp.MustCompile("(?s)```json\n(.*?)```").FindAllStringSubmatch(section, -1) {
			var p map[string]any
			if err := json.Unmarshal([]byte(m[1]), &p); err != nil {
				t.Errorf("example of %s: %v", code, err)
				continue
			}
			if err := w.spec.Components.Schemas["Problem"].Value.VisitJSON(any(p), openapi3.EnableJSONSchema2020()); err != nil {
				t.Errorf("example of %s: %v", code, err)
			}
			if p["code"] != code || p["type"] != httpapi.ProblemBase+code {
				t.Errorf("the example of %s is of %v", code, p["code"])
			}
		}
		if !strings.Contains(section, "```json") {
			t.Errorf("%s has no example", code)
		}
	}
}

func TestPublicDocuments(t *testing.T) {
	keys := call{method: "GET", path: "/.well-known/jwks.json"}.send(t)
	if keys.status != http.StatusOK || strings.Contains(string(keys.raw), `"d"`) {
		t.Errorf("jwks: %s", keys.raw)
	}
	meta := call{method: "GET", path: "/.well-known/oauth-authorization-server"}.send(t)
	if meta.str("issuer") != w.dev.URL {
		t.Errorf("metadata: %s", meta.raw)
	}
	openID := call{method: "GET", path: "/.well-known/openid-configuration"}.send(t)
	if openID.str("issuer") != w.dev.URL || openID.str("jwks_uri") != meta.str("jwks_uri") {
		t.Errorf("OpenID metadata: %s", openID.raw)
	}
	if doc := (call{method: "GET", path: "/openapi.yaml"}).send(t); string(doc.raw) != string(httpapi.OpenAPI) {
		t.Error("another document is served")
	}
}

// The parts of the API behind the handlers are missing here, so that they panic.
func TestPanicIsAProblemAndNoLeak(t *testing.T) {
	var log strings.Builder
	h := httpapi.New(httpapi.Config{Metrics: telemetry.NewMetrics(), Logger: telemetry.NewLogger(&log, slog.LevelDebug)})
	for range 3 { // and the slot of the request is given back
		r := httptest.NewRequestWithContext(t.Context(), "GET", "/.well-known/jwks.json", nil)
		r.Header.Set("Authorization", "Bearer the-token-of-a-caller")
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, r)
		a := answer{status: rec.Code, header: rec.Header(), raw: rec.Body.Bytes()}
		if err := json.Unmarshal(a.raw, &a.body); err != nil {
			t.Fatal(err)
		}
		a.refused(t, 500, "internal", "-")
		w.checkProblem(t, a)
		if strings.Contains(string(a.raw), "nil pointer") || strings.Contains(string(a.raw), "goroutine") {
			t.Errorf("the answer says too much: %s", a.raw)
		}
	}
	if !strings.Contains(log.String(), `"msg":"panic"`) || strings.Contains(log.String(), "the-token-of-a-caller") {
		t.Errorf("log: %s", log.String())
	}
}

func TestClientThatLeavesIsNoServerError(t *testing.T) {
	ask := decide(t, bob(t), offboard("", "e-leaves")).decided(t, "require_ciba", "")
	ctx, cancel := context.WithCancel(t.Context())
	r, err := http.NewRequestWithContext(ctx, "GET", w.dev.URL+"/approvals/"+ask.str("approval", "id")+"?wait=20s", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+bob(t))
	r.Header.Set("X-Request-ID", "the-one-who-left")
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		if res, err := w.client.Do(r); err == nil {
			_, _ = io.Copy(io.Discard, res.Body)
			res.Body.Close()
		}
	}()
	onPhone(t, "e-leaves", false) // by now it is held
	cancel()
	<-gone
	call{method: "DELETE", path: "/approvals/" + ask.str("approval", "id"), token: bob(t)}.send(t)
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, line := range strings.Split(w.log.String(), "\n") {
		if strings.Contains(line, "the-one-who-left") && strings.Contains(line, `"level":"ERROR"`) {
			t.Errorf("logged as an error of ours: %s", line)
		}
	}
}

func TestIntrospectionForms(t *testing.T) {
	s := w.dev.Services["crm"]
	a := decide(t, alice(t), read("")).decided(t, "allow", "")
	minted := a.str("credential", "secret", "token")
	basic := func(id, secret string) http.Header {
		r := &http.Request{Header: http.Header{}}
		r.SetBasicAuth(url.QueryEscape(id), url.QueryEscape(secret))
		return r.Header
	}
	ok := call{method: "POST", path: "/introspect", header: basic(s.ID, s.Secret), body: url.Values{"token": {minted}}}.send(t)
	if ok.at("active") != true || ok.str("jti") != a.str("credential", "lease") || ok.str("aud") != s.Audience {
		t.Errorf("introspection: %s", ok.raw)
	}
	form := func(pairs ...string) url.Values {
		v := url.Values{}
		for i := 0; i < len(pairs); i += 2 {
			v.Add(pairs[i], pairs[i+1])
		}
		return v
	}
	for _, tt := range []struct {
		name   string
		header http.Header
		form   url.Values
		status int
		code   string
		at     string
	}{
		{"no credentials", nil, form("token", minted), 401, "invalid_client", "-"},
		{"wrong secret", basic(s.ID, "wrong"), form("token", minted), 401, "invalid_client", "-"},
		{"empty secret", basic(s.ID, ""), form("token", minted), 401, "invalid_client", "-"},
		{"unknown id", basic("nobody", s.Secret), form("token", minted), 401, "invalid_client", "-"},
		{"another's secret", basic(s.ID, w.dev.Services["hr"].Secret), form("token", minted), 401, "invalid_client", "-"},
		{"wrong secret in form", nil, form("token", minted, "client_id", s.ID, "client_secret", "x"), 401, "invalid_client", "-"},
		{"secret twice", nil, form("token", minted, "client_id", s.ID, "client_secret", s.Secret, "client_secret", "x"), 401, "invalid_client", "-"},
		{"both ways", basic(s.ID, s.Secret), form("token", minted, "client_id", s.ID, "client_secret", s.Secret), 401, "invalid_client", "-"},
		{"two clients", basic(s.ID, s.Secret), form("token", minted, "client_id", "hr-api"), 401, "invalid_client", "-"},
		{"bearer beside form", headers("Authorization", "Bearer "+minted), form("token", minted, "client_id", s.ID, "client_secret", s.Secret), 401, "invalid_client", "-"},
		{"no token", basic(s.ID, s.Secret), form("token_type_hint", "access_token"), 400, "invalid_request", "token"},
		{"two tokens", basic(s.ID, s.Secret), form("token", minted, "token", "x"), 400, "invalid_request", "token"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			call{method: "POST", path: "/introspect", header: tt.header, body: tt.form, loose: true}.send(t).
				refused(t, tt.status, tt.code, tt.at)
		})
	}
	own := func(client string) string { return serviceToken(t, obj{"sub": client, "client_id": client}) }
	token := func(token string) http.Header { return headers("Authorization", "Bearer "+token) }
	byToken := call{method: "POST", path: "/introspect", header: token(own(dev.Gateway)), body: form("token", minted)}.send(t)
	if byToken.at("active") != true {
		t.Errorf("by a token of its own: %s", byToken.raw)
	}
	for name, c := range map[string]struct {
		header http.Header
		form   url.Values
	}{
		"another client's":       {token(own("hr-agent")), form("token", minted)},
		"a user's through it":    {token(serviceToken(t, obj{"sub": "alice", "client_id": dev.Gateway})), form("token", minted)},
		"on behalf of":           {token(serviceToken(t, obj{"sub": dev.Gateway, "client_id": dev.Gateway, "act": obj{"sub": "x"}})), form("token", minted)},
		"an operator's":          {token(olga(t)), form("token", minted)},
		"what is introspected":   {token(minted), form("token", minted)},
		"beside a client id":     {token(own(dev.Gateway)), form("token", minted, "client_id", dev.Gateway)},
		"nothing":                {token(""), form("token", minted)},
		"its name and no secret": {basic(dev.Gateway, ""), form("token", minted)},
		"its name in the form":   {nil, form("token", minted, "client_id", dev.Gateway, "client_secret", "")},
	} {
		t.Run("service token/"+name, func(t *testing.T) {
			call{method: "POST", path: "/introspect", header: c.header, body: c.form, loose: true}.send(t).
				refused(t, 401, "invalid_client", "-")
		})
	}
	for name, value := range map[string]string{
		"garbage": "garbage", "the agent's own token": alice(t), "signature cut": minted[:len(minted)-4],
		"alg none": "eyJhbGciOiJub25lIn0.e30.", "long": strings.Repeat("a.", 20_000),
	} {
		if active(t, "crm", value) {
			t.Errorf("%s is active", name)
		}
	}
	if active(t, "hr", minted) || active(t, "payments", minted) {
		t.Error("another audience's service sees the token")
	}
	for name, a := range map[string]answer{
		"JSON":      call{method: "POST", path: "/introspect", header: basic(s.ID, s.Secret), body: obj{"token": minted}, invalid: true}.send(t),
		"no body":   call{method: "POST", path: "/introspect", header: basic(s.ID, s.Secret), invalid: true}.send(t),
		"multipart": call{method: "POST", path: "/introspect", body: "--x--", header: headers("Content-Type", "multipart/form-data; boundary=x"), invalid: true}.send(t),
	} {
		if a.status != http.StatusUnsupportedMediaType {
			t.Errorf("%s: %s", name, a.raw)
		}
	}
	call{method: "POST", path: "/introspect", body: url.Values{"token": {strings.Repeat("x", 64<<10)}}}.send(t).refused(t, 413, "body_too_large", "-")
}

// /v1/decide has no handler of its own, but a caller of it is owed the same.
func TestV1Decide(t *testing.T) {
	c := call{method: "POST", path: "/v1/decide", token: alice(t), body: read("")}
	c.send(t).decided(t, "allow", "read_opportunity")
	for _, tt := range []struct {
		status int
		code   string
		at     string
		body   any
		header http.Header
		valid  bool
	}{
		{400, "invalid_request", "/intent", `{"intent":1,"resource":{"type":"a","id":"b"}}`, nil, false},
		{401, "invalid_token", "-", read(""), headers("Authorization", "Basic YTpi"), false},
		{404, "not_found", "-", read("ses_00000000000000000000000000"), nil, true},
		{413, "body_too_large", "-", `{"context":"` + strings.Repeat("x", 64<<10) + `"}`, nil, false},
		{415, "unsupported_media_type", "-", read(""), headers("Content-Type", "text/plain"), false},
	} {
		bad := c
		bad.body, bad.header, bad.invalid = tt.body, tt.header, !tt.valid
		bad.send(t).refused(t, tt.status, tt.code, tt.at)
	}
}

func TestFullHouseKeepsTheKillSwitch(t *testing.T) {
	verifier, err := identity.New(identity.Config{Now: time.Now, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	h := httpapi.New(httpapi.Config{Identity: verifier, Metrics: telemetry.NewMetrics(), Logger: slog.New(slog.DiscardHandler)})
	post := func(path string, body io.Reader) *httptest.ResponseRecorder {
		r := httptest.NewRequestWithContext(t.Context(), "POST", path, body)
		r.Header.Set("Authorization", "Bearer x")
		r.Header.Set("Content-Type", "application/json")
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, r)
		return rec
	}
	const limit = 4096
	var wg sync.WaitGroup
	var bodies []*io.PipeWriter
	for range limit {
		body, w := io.Pipe()
		bodies = append(bodies, w)
		wg.Go(func() { post("/sessions", body) })
	}
	for _, b := range bodies {
		_, _ = b.Write([]byte(" ")) // returns once the handler reads
	}
	full := post("/sessions", strings.NewReader("{}"))
	if full.Code != http.StatusTooManyRequests || full.Header().Get("Retry-After") != "1" || full.Header().Get("Cache-Control") != "no-store" {
		t.Errorf("full: %d %v", full.Code, full.Header())
	}
	if rec := post("/revocations", strings.NewReader("{}")); rec.Code != http.StatusUnauthorized {
		t.Errorf("the kill switch answers %d", rec.Code)
	}
	for _, b := range bodies {
		_ = b.Close()
	}
	wg.Wait()
	if rec := post("/sessions", strings.NewReader("{}")); rec.Code != http.StatusUnauthorized {
		t.Errorf("after the rush: %d", rec.Code)
	}
}
