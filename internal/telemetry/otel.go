package telemetry

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/go-logr/logr"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/exporters/stdout/stdouttrace"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
)

// flushTimeout bounds how long an exit waits for a collector.
const flushTimeout = 5 * time.Second

// Setup starts tracing where OpenTelemetry's environment variables ask for it, and
// does nothing otherwise. stop sends what is left, once no more spans begin.
func Setup(ctx context.Context, log *slog.Logger) (stop func(), err error) {
	otel.SetLogger(logr.FromSlogHandler(reticent{log.Handler()})) // first: the exporters log already
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { log.Warn("tracing", "error", err) }))
	exporters, err := newExporters(ctx)
	if err != nil || len(exporters) == 0 {
		return func() {}, err
	}
	about, err := newResource(ctx)
	if err != nil {
		return func() {}, err
	}
	options := []sdktrace.TracerProviderOption{sdktrace.WithResource(about)}
	for _, e := range exporters {
		options = append(options, sdktrace.WithBatcher(e))
	}
	provider := sdktrace.NewTracerProvider(options...) // reads OTEL_TRACES_SAMPLER, OTEL_BSP_* and limits
	otel.SetTracerProvider(provider)
	// Baggage is left alone: a stranger's would go on to the identity providers.
	otel.SetTextMapPropagator(propagation.TraceContext{})
	return func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTimeout)
		defer cancel()
		if err := provider.Shutdown(ctx); err != nil {
			log.WarnContext(ctx, "send the last traces", "error", err)
		}
	}, nil
}

// newExporters makes what OTEL_TRACES_EXPORTER lists. Where it is not set, that is
// otlp if an endpoint is; the standard's own default would have every Writ look for
// a collector.
func newExporters(ctx context.Context) ([]sdktrace.SpanExporter, error) {
	if strings.EqualFold(os.Getenv("OTEL_SDK_DISABLED"), "true") {
		return nil, nil
	}
	names := os.Getenv("OTEL_TRACES_EXPORTER")
	for _, name := range []string{"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"} {
		v := os.Getenv(name)
		if v == "" {
			continue
		}
		// The exporters take what they can't read for localhost. The value is not
		// repeated: some put a key into it.
		if u, err := url.Parse(v); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return nil, fmt.Errorf("%s must be a URL such as http://localhost:4318", name)
		}
		names = cmp.Or(names, "otlp")
	}
	if names == "" {
		return nil, nil
	}
	var out []sdktrace.SpanExporter
	for _, name := range strings.Split(names, ",") {
		var e sdktrace.SpanExporter
		var err error
		switch strings.TrimSpace(name) {
		case "none":
			continue
		case "otlp":
			e, err = newOTLP(ctx)
		case "console":
			e, err = stdouttrace.New(stdouttrace.WithWriter(os.Stderr))
		default:
			err = errors.New("must list otlp, console or none")
		}
		if err != nil {
			return nil, fmt.Errorf("OTEL_TRACES_EXPORTER: %w", err)
		}
		out = append(out, e)
	}
	return out, nil
}

func newOTLP(ctx context.Context) (sdktrace.SpanExporter, error) {
	switch cmp.Or(os.Getenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"), os.Getenv("OTEL_EXPORTER_OTLP_PROTOCOL"), "http/protobuf") {
	case "http/protobuf":
		return otlptracehttp.New(ctx)
	case "grpc":
		return otlptracegrpc.New(ctx)
	}
	return nil, errors.New("OTEL_EXPORTER_OTLP_PROTOCOL must be http/protobuf or grpc")
}

// newResource says who traces: OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES, else
// writ on this host.
func newResource(ctx context.Context) (*resource.Resource, error) {
	version := "devel"
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		version = info.Main.Version
	}
	r, err := resource.New(ctx, resource.WithHost(), resource.WithTelemetrySDK(),
		resource.WithAttributes(semconv.ServiceName("writ"), semconv.ServiceVersion(version)), resource.WithFromEnv())
	if err != nil {
		return nil, fmt.Errorf("read OTEL_RESOURCE_ATTRIBUTES: %w", err)
	}
	return r, nil
}

// reticent keeps the message and the error of what the SDK logs of itself. The rest
// repeats what is in the environment, keys to the collector included.
type reticent struct{ slog.Handler }

// Handle implements slog.Handler.
func (h reticent) Handle(ctx context.Context, r slog.Record) error {
	short := slog.NewRecord(r.Time, r.Level, "tracing: "+r.Message, r.PC)
	r.Attrs(func(a slog.Attr) bool {
		if a.Key == "err" {
			short.AddAttrs(a)
		}
		return true
	})
	return h.Handler.Handle(ctx, short)
}
