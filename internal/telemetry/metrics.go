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

	Transactions *prometheus.HistogramVec // kind: update, view; result: ok, unavailable
	BatchSize    prometheus.Histogram     // updates that shared a commit (SQLite)
	Listening    prometheus.Gauge         // 1 while notified by other replicas (PostgreSQL)

	Sequenced   prometheus.Counter
	SequenceLag prometheus.Histogram
	LogSize     prometheus.Gauge
	Unsequenced prometheus.Gauge
	Copies      *prometheus.CounterVec // place: file, url; result: ok, failed
	CopiedSize  *prometheus.GaugeVec   // place
	CopiedAt    *prometheus.GaugeVec   // place; Unix time

	OpenApprovals prometheus.Gauge
	ActiveLeases  *prometheus.GaugeVec // minter, state: intent, active, revoking
	StuckLeases   *prometheus.GaugeVec // minter
	Orphans       *prometheus.GaugeVec // minter
	Freezes       prometheus.Gauge
	MintSeconds   *prometheus.HistogramVec // kind
	UnmakeSeconds *prometheus.HistogramVec // kind
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
		PolicyFailures: counter("writ_policy_failures_total", "Evaluations that ended in a denial because policy failed, by reason.", "reason"),
		PolicyLoads:    counter("writ_policy_loads_total", "Policy loads by result.", "result"),
		TokensRefused:  counter("writ_tokens_refused_total", "Tokens refused, by the principal they were presented for.", "principal"),
		Approvals:      counter("writ_approvals_total", "Approvals by the status they reached.", "status"),
		ProviderCalls:  counter("writ_ciba_calls_total", "Calls to CIBA providers by outcome.", "call", "outcome"),
		Leases:         counter("writ_leases_total", "Lease events by kind of credential.", "kind", "event"),
	}
	r.MustRegister(m.Requests, m.PolicySeconds)
	m.store(counter)
	m.begin()
	return m
}

// Handler serves the metrics in the Prometheus text format.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}

// store registers what the store and the log say of themselves.
func (m *Metrics) store(counter func(name, help string, labels ...string) *prometheus.CounterVec) {
	m.Transactions = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "writ_store_transaction_seconds", Help: "Transactions of the store, waiting for their turn included.",
		Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
	}, []string{"kind", "result"})
	m.BatchSize = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "writ_store_batch_size", Help: "Updates that shared one commit (SQLite).",
		Buckets: []float64{1, 2, 4, 8, 16, 32, 64},
	})
	m.SequenceLag = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "writ_audit_sequence_lag_seconds", Help: "Age of the oldest entry of a batch when it entered the log.",
		Buckets: []float64{.05, .1, .25, .5, 1, 2.5, 5, 10, 60, 600},
	})
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
	}
	gauges := func(name, help string, labels ...string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, labels)
	}
	m.Listening = gauge("writ_store_listening", "1 while this replica is notified by the others (on SQLite there are none), 0 while it polls.")
	m.Sequenced = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "writ_audit_entries_total", Help: "Entries that this replica sequenced into the log.",
	})
	m.LogSize = gauge("writ_audit_log_size", "Entries in the log.")
	m.Unsequenced = gauge("writ_audit_unsequenced", "Entries that are recorded but not in the log yet.")
	m.Copies = counter("writ_audit_copies_total", "Copies of checkpoints to a second place.", "place", "result")
	m.CopiedSize = gauges("writ_audit_copied_size", "Size of the last checkpoint that was copied.", "place")
	m.CopiedAt = gauges("writ_audit_copied_timestamp_seconds", "When the copy in the second place was last known to be up to date.", "place")
	m.OpenApprovals = gauge("writ_approvals_open", "Approvals that await an answer, on all replicas.")
	m.ActiveLeases = gauges("writ_leases", "Leases that are not gone, on all replicas.", "minter", "state")
	m.StuckLeases = gauges("writ_leases_stuck", "Leases whose end should have been seen at their target by now.", "minter")
	m.Orphans = gauges("writ_orphans", "Credentials at a target that no lease knows, as of the last survey by this replica.", "minter")
	m.Freezes = gauge("writ_freezes", "Revocations that hold back what is in their scope until they are lifted.")
	m.MintSeconds = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "writ_lease_mint_seconds", Help: "From the commit of a lease to the answer of its target.",
		Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
	}, []string{"kind"})
	m.UnmakeSeconds = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "writ_lease_unmake_seconds", Help: "From the end of a lease until it was seen to be gone at its target.",
		Buckets: []float64{.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300, 3600},
	}, []string{"kind"})
	m.registry.MustRegister(m.Transactions, m.BatchSize, m.SequenceLag, m.Listening, m.Sequenced, m.LogSize, m.Unsequenced,
		m.CopiedSize, m.CopiedAt, m.OpenApprovals, m.ActiveLeases, m.StuckLeases, m.Orphans, m.Freezes, m.MintSeconds, m.UnmakeSeconds)
}
