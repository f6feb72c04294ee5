package httpapi_test

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/writsec/writ/internal/approval"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/policy"
	"github.com/writsec/writ/internal/telemetry"
)

// series asks Writ for its metrics.
func (x *world) series() ([]string, error) {
	res, err := x.client.Get("http://" + x.dev.Server.OpsAddr().String() + "/metrics")
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return seriesOf(string(b)), err
}

// seriesOf returns Writ's own series, without their values.
func seriesOf(text string) []string {
	var out []string
	for _, line := range strings.Split(text, "\n") {
		if i := strings.LastIndex(line, " "); i > 0 && strings.HasPrefix(line, "writ_") {
			out = append(out, line[:i])
		}
	}
	return out
}

func atStart() []string {
	r := httptest.NewRecorder()
	telemetry.NewMetrics().Handler().ServeHTTP(r, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	return seriesOf(r.Body.String())
}

var requestSeries = regexp.MustCompile(
	`^writ_http_request_duration_seconds_(?:bucket|sum|count)\{method="(?:GET|POST|DELETE|other)",route="([^"]*)",status="[2-5]\d\d"`)

// minterSeries are gauges by minter, whose names are those of the configuration.
var minterSeries = regexp.MustCompile(`^writ_(?:leases|leases_stuck|orphans)\{minter="(?:crm|hr|payments)"(?:,state="(?:intent|active|revoking)")?\}$`)

// unbounded looks, after all tests, for label values that were not foreseen: all
// series are there from the start, but those of requests, whose routes are known, and of
// minters.
func unbounded(series []string) error {
	known, routes := atStart(), w.patterns()
	for _, s := range series {
		if found := requestSeries.FindStringSubmatch(s); found != nil && slices.Contains(routes, found[1]) || minterSeries.MatchString(s) {
			continue
		}
		if !slices.Contains(known, s) {
			return fmt.Errorf("a series that was not there at the start: %s", s)
		}
	}
	return nil
}

// What the packages count is there from the start, under the same names.
func TestSeriesBeginAtZero(t *testing.T) {
	series := atStart()
	want := []string{}
	for _, e := range []policy.Effect{policy.Allow, policy.Deny, policy.RequireCIBA} {
		want = append(want, fmt.Sprintf(`writ_decisions_total{effect="%s"}`, e))
	}
	for _, r := range []string{policy.ReasonUndefined, policy.ReasonError, policy.ReasonTimeout, policy.ReasonInvalidOutput,
		policy.AdminUndefined, policy.AdminError, policy.AdminTimeout, policy.AdminInvalidOutput} {
		want = append(want, fmt.Sprintf(`writ_policy_failures_total{reason="%s"}`, r))
	}
	for _, s := range []approval.State{
		approval.Approved, approval.Consumed, approval.Denied, approval.Expired, approval.Failed, approval.Cancelled,
		approval.StartUnknown, approval.OutcomeLost,
	} {
		want = append(want, fmt.Sprintf(`writ_approvals_total{status="%s"}`, s))
	}
	for _, e := range []string{lease.EndReissued, lease.EndMintFailed} {
		want = append(want, fmt.Sprintf(`writ_leases_total{event="%s",kind="jwt"}`, e))
	}
	for _, s := range want {
		if !slices.Contains(series, s) {
			t.Errorf("no %s", s)
		}
	}
}
