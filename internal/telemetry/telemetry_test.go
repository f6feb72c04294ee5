package telemetry_test

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/writsec/writ/internal/telemetry"
)

func TestLogLinesCarryTheRequestID(t *testing.T) {
	var out bytes.Buffer
	log := telemetry.NewLogger(&out, slog.LevelInfo)
	ctx := telemetry.WithRequestID(context.Background(), "req_1")
	log.With("a", 1).WithGroup("g").InfoContext(ctx, "one", "b", 2)
	log.DebugContext(ctx, "not shown")
	log.InfoContext(context.Background(), "two")
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 2 {
		t.Fatalf("%d lines: %s", len(lines), out.String())
	}
	if !strings.Contains(lines[0], `"request_id":"req_1"`) || strings.Contains(lines[1], "request_id") {
		t.Errorf("lines %s", lines)
	}
	for _, l := range lines {
		if !json.Valid([]byte(l)) {
			t.Errorf("not JSON: %s", l)
		}
	}
	// A stranger's text cannot forge a line.
	out.Reset()
	log.InfoContext(ctx, "x", "text", "a\n{\"level\":\"INFO\"}")
	if strings.Count(out.String(), "\n") != 1 {
		t.Errorf("forged: %s", out.String())
	}
}

func TestMetricsAreServed(t *testing.T) {
	m := telemetry.NewMetrics()
	m.Decisions.WithLabelValues("deny").Inc()
	r := httptest.NewRecorder()
	m.Handler().ServeHTTP(r, httptest.NewRequest("GET", "/metrics", nil))
	for _, want := range []string{`writ_decisions_total{effect="deny"} 1`, "go_goroutines", "process_"} {
		if !strings.Contains(r.Body.String(), want) {
			t.Errorf("no %s", want)
		}
	}
}
