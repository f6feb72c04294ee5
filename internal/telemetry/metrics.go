package telemetry

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Metrics are Writ's own, on a registry of their own. Every label takes a
// bounded set of values. docs/operations.md describes each.
type Metrics struct {
	registry *prometheus.Registry

	Requests       *prometheus.HistogramVec // route, method, status
	Decisions      *prometheus.CounterVec   // effect
	PolicyFailures *prometheus.CounterVec   // reason: the policy_* codes
	PolicySeconds  prometheus.Histogram
	PolicyLoads    *prometheus.CounterVec // result: activated, refused
	TokensRefused  *prometheus.CounterVec // principal
	Approvals      *prometheus.CounterVec // status an approval reached
	ProviderCalls  *prometheus.CounterVec // call: start, poll; outcome
	Leases         *prometheus.CounterVec // kind, event: minted, released, expired, …
}

// NewMetrics registers everything.
func NewMetrics() *Metrics {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
		r.MustRegister(c)
		return c
	}
	m := &Metrics{
		registry: r,
		Requests: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "writ_http_request_duration_seconds", Help: "HTTP requests by route pattern.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 5, 30, 120},
		}, []string{"route", "method", "status"}),
		PolicySeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "writ_policy_evaluation_seconds", Help: "Evaluations of the decision document.",
			Buckets: []float64{.00005, .0001, .00025, .0005, .001, .0025, .005, .01, .05, .1, .5},
		}),
		Decisions:      counter("writ_decisions_total", "Decisions by effect.", "effect"),
		PolicyFailures: counter("writ_policy_failures_total", "Evaluations that ended in a deny because policy failed, by reason.", "reason"),
		PolicyLoads:    counter("writ_policy_loads_total", "Policy loads by result.", "result"),
		TokensRefused:  counter("writ_tokens_refused_total", "Tokens refused, by the principal they were presented for.", "principal"),
		Approvals:      counter("writ_approvals_total", "Approvals by the status they reached.", "status"),
		ProviderCalls:  counter("writ_ciba_calls_total", "Calls to CIBA providers by outcome.", "call", "outcome"),
		Leases:         counter("writ_leases_total", "Lease events by kind of credential.", "kind", "event"),
	}
	r.MustRegister(m.Requests, m.PolicySeconds)
	return m
}

// Handler serves the metrics in the Prometheus text format.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}
