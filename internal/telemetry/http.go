package telemetry

import (
	"net/http"
	"strconv"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"
)

// Spans of HTTP carry what is listed here and no more. The usual middleware,
// otelhttp, is not used because it can't be told to leave out URLs, with their queries,
// and what strangers say in headers.

// StartRequest begins the span of a request to Writ, below the one that its
// traceparent names (W3C Trace Context).
func StartRequest(r *http.Request) (*http.Request, trace.Span) {
	ctx := otel.GetTextMapPropagator().Extract(r.Context(), propagation.HeaderCarrier(r.Header))
	ctx, span := tracer.Start(ctx, "HTTP", trace.WithSpanKind(trace.SpanKindServer))
	return r.WithContext(ctx), span
}

// EndRequest names the span by route and ends it. route and method are of a bounded
// set, as for metrics.
func EndRequest(span trace.Span, method, route string, status int) {
	if span.IsRecording() {
		span.SetName(method + " " + route)
		span.SetAttributes(semconv.HTTPRequestMethodKey.String(method), semconv.HTTPRoute(route),
			semconv.HTTPResponseStatusCode(status))
		if status >= http.StatusInternalServerError {
			span.SetStatus(codes.Error, "")
		}
	}
	span.End()
}

// RoundTrip makes a call to another server, in a span that ends when its headers
// are here, and passes the trace on. Of the URL only the host is noted.
func RoundTrip(t http.RoundTripper, req *http.Request) (*http.Response, error) {
	ctx, span := tracer.Start(req.Context(), req.Method, trace.WithSpanKind(trace.SpanKindClient))
	if !span.SpanContext().IsValid() { // nobody traces
		return t.RoundTrip(req)
	}
	req = req.Clone(ctx) // a RoundTripper leaves its request as it is
	otel.GetTextMapPropagator().Inject(ctx, propagation.HeaderCarrier(req.Header))
	res, err := t.RoundTrip(req)
	if span.IsRecording() {
		span.SetAttributes(called(req)...)
	}
	if err == nil {
		span.SetAttributes(semconv.HTTPResponseStatusCode(res.StatusCode))
		if res.StatusCode >= http.StatusBadRequest {
			span.SetStatus(codes.Error, "")
		}
	}
	End(span, err)
	return res, err
}

func called(req *http.Request) []attribute.KeyValue {
	out := []attribute.KeyValue{semconv.HTTPRequestMethodKey.String(req.Method), semconv.ServerAddress(req.URL.Hostname())}
	if port, err := strconv.Atoi(req.URL.Port()); err == nil {
		out = append(out, semconv.ServerPort(port))
	}
	return out
}
