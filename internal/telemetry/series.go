package telemetry

// begin makes the series that alerts watch, at 0. Prometheus sees no increase where
// a series begins with its first event. The tests hold these values to the code that
// counts.
func (m *Metrics) begin() {
	for _, effect := range []string{"allow", "deny", "require_ciba"} {
		m.Decisions.WithLabelValues(effect)
	}
	for _, reason := range []string{
		"policy_undefined", "policy_error", "policy_timeout", "policy_invalid_output",
		"admin_undefined", "admin_error", "admin_timeout", "admin_invalid_output",
	} {
		m.PolicyFailures.WithLabelValues(reason)
	}
	for _, result := range []string{"activated", "refused"} {
		m.PolicyLoads.WithLabelValues(result)
	}
	for _, principal := range []string{"agent", "operator", "service", "logout", "signal"} {
		m.TokensRefused.WithLabelValues(principal)
	}
	for _, status := range []string{
		"approved", "consumed", "denied", "expired", "failed", "cancelled", "start_unknown", "outcome_lost",
	} {
		m.Approvals.WithLabelValues(status)
	}
	for _, outcome := range []string{"started", "refused", "later", "unclear"} {
		m.ProviderCalls.WithLabelValues("start", outcome)
	}
	for _, outcome := range []string{
		"pending", "slow_down", "answered", "denied", "expired", "unknown", "failed", "unreachable",
	} {
		m.ProviderCalls.WithLabelValues("poll", outcome)
	}
	for _, kind := range []string{"jwt", "postgres", "oauth"} {
		for _, event := range []string{
			"minted", "mint_failed", "reissued", "renewed", "released", "expired", "session_ended", "operator", "revoked_by_service", "gone", "unmake_failed",
		} {
			m.Leases.WithLabelValues(kind, event)
		}
	}
	for _, kind := range []string{"update", "view"} {
		for _, result := range []string{"ok", "unavailable"} {
			m.Transactions.WithLabelValues(kind, result)
		}
	}
	for _, place := range []string{"file", "url"} {
		for _, result := range []string{"ok", "failed"} {
			m.Copies.WithLabelValues(place, result)
		}
	}
}
