package httpapi_test

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/writsec/writ/internal/decision"
	"github.com/writsec/writ/internal/dev"
	"github.com/writsec/writ/internal/httpapi"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/telemetry"
)

// collector is an OTLP/HTTP receiver that keeps all spans it gets.
type collector struct {
	*httptest.Server

	mu       sync.Mutex
	spans    []*tracepb.Span
	resource []*commonpb.KeyValue
	raw      []byte // all that came, as it came
}

// newCollector starts one and points the exporter there, by the standard variables.
func newCollector() *collector {
	c := &collector{}
	c.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		var in collectorpb.ExportTraceServiceRequest
		if err != nil || r.URL.Path != "/v1/traces" || proto.Unmarshal(body, &in) != nil {
			http.Error(w, "not OTLP", http.StatusBadRequest)
			return
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.raw = append(c.raw, body...)
		for _, rs := range in.ResourceSpans {
			c.resource = rs.Resource.Attributes
			for _, ss := range rs.ScopeSpans {
				c.spans = append(c.spans, ss.Spans...)
			}
		}
	}))
	for name, value := range map[string]string{
		"OTEL_EXPORTER_OTLP_ENDPOINT": c.URL, "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
		"OTEL_BSP_SCHEDULE_DELAY": "50", "OTEL_BSP_MAX_QUEUE_SIZE": "100000",
	} {
		_ = os.Setenv(name, value)
	}
	return c
}

// of returns the spans of a trace.
func (c *collector) of(trace string) []*tracepb.Span {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []*tracepb.Span
	for _, s := range c.spans {
		if hex.EncodeToString(s.TraceId) == trace {
			out = append(out, s)
		}
	}
	slices.SortFunc(out, func(a, b *tracepb.Span) int { return int(a.StartTimeUnixNano) - int(b.StartTimeUnixNano) })
	return out
}

// tree writes spans one a line, each below its parent and in the order they began.
func tree(spans []*tracepb.Span, parent []byte, indent string) string {
	out := ""
	for _, s := range spans {
		if string(s.ParentSpanId) == string(parent) {
			out += indent + s.Name + "\n" + tree(spans, s.SpanId, indent+"  ")
		}
	}
	return out
}

const callerSpan = "00f067aa0ba902b7"

// wantTree waits for the spans below the caller's.
func wantTree(t *testing.T, trace, want string) {
	t.Helper()
	parent, _ := hex.DecodeString(callerSpan)
	got := ""
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if got = tree(w.traces.of(trace), parent, ""); got == want {
			return
		}
	}
	t.Errorf("the trace is\n%swant\n%s", got, want)
}

// newTrace makes an id of a trace.
func newTrace() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b)
	return hex.EncodeToString(b)
}

// traced is the header of a caller who traces.
func traced(trace string) http.Header {
	return headers("Traceparent", "00-"+trace+"-"+callerSpan+"-01")
}

func TestADecisionIsTraced(t *testing.T) {
	trace := newTrace()
	session := open(t, alice(t))
	call{method: "POST", path: "/decide", token: alice(t), body: read(session), header: traced(trace)}.send(t)
	wantTree(t, trace, `POST /decide
  identity verify
  store view
  policy evaluate
  store update
`)
	for _, s := range w.traces.of(trace) {
		if kind := s.Kind; (kind == tracepb.Span_SPAN_KIND_SERVER) != (s.Name == "POST /decide") {
			t.Errorf("%s is of kind %s", s.Name, kind)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if !strings.Contains(w.log.String(), `"trace_id":"`+trace+`"`) {
		t.Error("no log line names the trace")
	}
}

// A prompt outlives its request, so each step of it is a trace of its own.
func TestAnApprovalIsTraced(t *testing.T) {
	approved(t, bob(t), offboard(open(t, bob(t)), "e-traced"), "e-traced")
	for _, step := range []string{"approval requesting", "approval pending"} {
		if !w.traces.has(step, "  POST\n  store update\n") {
			t.Errorf("no trace of %s with the call to the provider and what was recorded of it", step)
		}
	}
}

// has waits for a trace below the span root that holds these spans.
func (c *collector) has(root, part string) bool {
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		c.mu.Lock()
		spans := slices.Clone(c.spans)
		c.mu.Unlock()
		for _, s := range spans {
			if s.Name == root && strings.Contains(tree(c.of(hex.EncodeToString(s.TraceId)), nil, ""), part) {
				return true
			}
		}
	}
	return false
}

// A token whose key is not known has Writ ask its issuer. This handler has a verifier
// of its own, which has not done so yet.
func TestCallsToTheIssuerAreTraced(t *testing.T) {
	trace := newTrace()
	log, httpClient := slog.New(slog.DiscardHandler), identity.NewHTTPClient(5*time.Second)
	defer httpClient.CloseIdleConnections()
	v, err := identity.New(identity.Config{
		Issuers: []identity.Issuer{{URL: w.dev.IDP.Issuer(), Agent: true, Audience: dev.Audience, Algorithms: []string{"ES256"}}},
		HTTP:    httpClient, Now: time.Now, Logger: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(httpapi.New(httpapi.Config{
		Identity: v, Decider: decision.New(decision.Config{Identity: v}), Metrics: telemetry.NewMetrics(), Logger: log,
	}))
	defer server.Close()
	part := base64.RawURLEncoding.EncodeToString
	token := part([]byte(`{"alg":"ES256","typ":"at+jwt","kid":"nobody's"}`)) + "." +
		part(fmt.Appendf(nil, `{"iss":%q,"sub":"alice","client_id":"sales-agent","aud":%q,"jti":"1","iat":%d,"exp":%d}`,
			w.dev.IDP.Issuer(), dev.Audience, time.Now().Unix(), time.Now().Unix()+60)) + "." + part(make([]byte, 64))
	w.secret(token, "a forged token")
	r := call{method: "POST", path: "/decide", token: token, body: read(""), header: traced(trace)}.request(t)
	r.URL.Host = strings.TrimPrefix(server.URL, "http://")
	res, err := w.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusUnauthorized {
		t.Errorf("status %d", res.StatusCode)
	}
	wantTree(t, trace, `POST /decide
  identity verify
    GET
    GET
`)
}

func TestNoPathBecomesASpan(t *testing.T) {
	for _, c := range []struct{ method, path, want string }{
		{"GET", "/a-path-of-a-stranger?token=a-query-of-a-stranger", "GET none"},
		{"BREW", "/decide", "other none"},
		{"DELETE", "/decide", "DELETE none"},
		{"GET", "/approvals/apr_of-a-stranger?wait=1s", "GET /approvals/{id}"},
	} {
		trace := newTrace()
		r, err := http.NewRequestWithContext(t.Context(), c.method, w.dev.URL+c.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header = traced(trace)
		res, err := w.client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		wantTree(t, trace, c.want+"\n")
	}
}

func TestOutgoingCallsCarryTheTraceAndNoURL(t *testing.T) {
	got := make(chan http.Header, 1)
	other := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { got <- r.Header }))
	defer other.Close()
	client := identity.NewHTTPClient(5 * time.Second)
	defer client.CloseIdleConnections()
	ctx, span := telemetry.StartTrace(t.Context(), "approval pending")
	r, err := http.NewRequestWithContext(ctx, "GET", other.URL+"/a-path-of-a-place?key=a-query-of-a-place", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.SetBasicAuth("writ", "a-password-of-a-place")
	res, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	telemetry.End(span, nil)
	if parent := (<-got).Get("Traceparent"); !strings.HasPrefix(parent, "00-"+telemetry.TraceID(ctx)+"-") {
		t.Errorf("traceparent %q", parent)
	}
	if r.Header.Get("Traceparent") != "" {
		t.Error("the request of the caller was changed")
	}
}

// spanNames are those that are not of a request to Writ.
var spanNames = []string{
	"identity verify", "policy evaluate", "store update", "store view", "GET", "POST",
	"approval requesting", "approval pending", "approval redeemed",
}

// patterns are those of all routes, and what stands for no route.
func (x *world) patterns() []string {
	out := []string{"none"}
	_ = chi.Walk(x.routes, func(_, route string, _ http.Handler, _ ...func(http.Handler) http.Handler) error {
		out = append(out, route)
		return nil
	})
	return out
}

// strange looks in all that was traced in all tests for what should not be there.
// Names and attributes are held to what is known, so that nothing unforeseen passes.
func (c *collector) strange(secrets map[string]string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for value, what := range secrets {
		if strings.Contains(string(c.raw), value) {
			return fmt.Errorf("a span holds %s", what)
		}
	}
	routes := w.patterns()
	methods := []string{"GET", "POST", "DELETE", "other"}
	names := slices.Clone(spanNames)
	for _, m := range methods {
		for _, r := range routes {
			names = append(names, m+" "+r)
		}
	}
	for _, s := range c.spans {
		if !slices.Contains(names, s.Name) || len(s.Events) > 0 || len(s.Links) > 0 || s.Status.GetMessage() != "" {
			return fmt.Errorf("strange span %v", s)
		}
		for _, a := range s.Attributes {
			text := a.Value.GetStringValue()
			ok := false
			switch a.Key {
			case "http.route":
				ok = slices.Contains(routes, text)
			case "http.request.method":
				ok = slices.Contains(methods, text)
			case "http.response.status_code", "server.port":
				_, ok = a.Value.Value.(*commonpb.AnyValue_IntValue)
			case "server.address":
				ok = text == "127.0.0.1"
			}
			if !ok {
				return fmt.Errorf("span %s has the strange attribute %v", s.Name, a)
			}
		}
	}
	for _, a := range c.resource {
		switch a.Key {
		case "service.name", "service.version", "host.name", "deployment.environment.name",
			"telemetry.sdk.name", "telemetry.sdk.language", "telemetry.sdk.version":
		default:
			return fmt.Errorf("strange resource attribute %v", a)
		}
	}
	return nil
}
