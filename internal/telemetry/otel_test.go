package telemetry_test

import (
	"bytes"
	"context"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/trace"

	"github.com/writsec/writ/internal/telemetry"
)

// environ sets OpenTelemetry's variables, and no others.
func environ(t *testing.T, pairs ...string) {
	t.Helper()
	for _, name := range []string{
		"OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
		"OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES",
	} {
		t.Setenv(name, "")
	}
	for i := 0; i < len(pairs); i += 2 {
		t.Setenv(pairs[i], pairs[i+1])
	}
}

func TestTracingIsOffUnlessAskedFor(t *testing.T) {
	before := otel.GetTracerProvider()
	for name, env := range map[string][]string{
		"nothing set": nil,
		"only a name": {"OTEL_SERVICE_NAME", "x"},
		"none":        {"OTEL_TRACES_EXPORTER", "none", "OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1"},
		"disabled":    {"OTEL_SDK_DISABLED", "true", "OTEL_TRACES_EXPORTER", "jaeger"},
	} {
		t.Run(name, func(t *testing.T) {
			environ(t, env...)
			stop, err := telemetry.Setup(t.Context(), slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			stop()
			if otel.GetTracerProvider() != before || len(otel.GetTextMapPropagator().Fields()) > 0 {
				t.Error("tracing is on")
			}
			ctx, span := telemetry.StartTrace(t.Context(), "x")
			if span.IsRecording() || telemetry.TraceID(ctx) != "" {
				t.Error("a span is recorded")
			}
		})
	}
}

func TestTracingRefusesWhatItCannotRead(t *testing.T) {
	const key = "a-key-of-the-collector"
	for name, env := range map[string][]string{
		"exporter":   {"OTEL_TRACES_EXPORTER", "jaeger"},
		"protocol":   {"OTEL_TRACES_EXPORTER", "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL", "smoke"},
		"endpoint":   {"OTEL_EXPORTER_OTLP_ENDPOINT", "://" + key},
		"no scheme":  {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "localhost:4318"},
		"attributes": {"OTEL_TRACES_EXPORTER", "console", "OTEL_RESOURCE_ATTRIBUTES", "nothing"},
	} {
		t.Run(name, func(t *testing.T) {
			environ(t, env...)
			stop, err := telemetry.Setup(t.Context(), slog.New(slog.DiscardHandler))
			stop()
			if err == nil || !strings.Contains(err.Error(), "OTEL_") || strings.Contains(err.Error(), key) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// The SDK repeats what it can't read of the environment; the log must not.
func TestTheLogKeepsKeysToTheCollector(t *testing.T) {
	const key = "a-key-of-the-collector"
	environ(t, "OTEL_TRACES_EXPORTER", "none", "OTEL_EXPORTER_OTLP_HEADERS", key)
	var out bytes.Buffer
	if _, err := telemetry.Setup(t.Context(), telemetry.NewLogger(&out, slog.LevelDebug)); err != nil {
		t.Fatal(err)
	}
	if _, err := otlptracehttp.New(t.Context()); err != nil {
		t.Fatal(err)
	}
	if log := out.String(); !strings.Contains(log, "tracing: parse headers") || strings.Contains(log, key) {
		t.Errorf("log: %s", log)
	}
}

func TestLogLinesCarryTheTraceID(t *testing.T) {
	var out bytes.Buffer
	ctx := trace.ContextWithSpanContext(context.Background(), trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2},
	}))
	telemetry.NewLogger(&out, slog.LevelInfo).InfoContext(ctx, "one")
	if !strings.Contains(out.String(), `"trace_id":"01000000000000000000000000000000"`) {
		t.Errorf("line %s", out.String())
	}
}

// BenchmarkRequestOff is what the span of a request costs where nobody traces.
func BenchmarkRequestOff(b *testing.B) {
	r := httptest.NewRequest(http.MethodPost, "/decide", nil)
	b.ReportAllocs()
	for b.Loop() {
		_, span := telemetry.StartRequest(r)
		telemetry.EndRequest(span, http.MethodPost, "/decide", http.StatusOK)
	}
}

// BenchmarkSpanOff is what a span costs where nobody traces.
func BenchmarkSpanOff(b *testing.B) {
	ctx := telemetry.WithRequestID(context.Background(), "req_1")
	b.ReportAllocs()
	for b.Loop() {
		_, span := telemetry.Start(ctx, "x")
		telemetry.End(span, nil)
	}
}
