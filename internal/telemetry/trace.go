package telemetry

import (
	"context"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
)

var tracer = otel.Tracer("github.com/writsec/writ")

// Start begins a span below the one of ctx; without one it does nothing, or the loops
// that look at the store many times a second would drown the rest. Names are
// constants; nothing secret is ever an attribute.
func Start(ctx context.Context, name string) (context.Context, trace.Span) {
	if parent := trace.SpanFromContext(ctx); !parent.SpanContext().IsValid() {
		return ctx, parent
	}
	return tracer.Start(ctx, name)
}

// StartTrace begins a trace of its own, for work that no request waits for.
func StartTrace(ctx context.Context, name string) (context.Context, trace.Span) {
	return tracer.Start(ctx, name, trace.WithNewRoot())
}

// End ends a span. Of an error it notes only that there was one: its text is the
// log's.
func End(span trace.Span, err error) {
	if err != nil {
		span.SetStatus(codes.Error, "")
	}
	span.End()
}

// TraceID is the id of ctx's trace, or "" where nobody traces.
func TraceID(ctx context.Context) string {
	if c := trace.SpanContextFromContext(ctx); c.HasTraceID() {
		return c.TraceID().String()
	}
	return ""
}
