package telemetry_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http/httptest"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"go.yaml.in/yaml/v3"

	"github.com/writsec/writ/internal/telemetry"
)

// metric is one of Writ's, as it describes itself.
type metric struct {
	kind   string
	labels []string
	values map[string][]string // by label: those of the series that are there from the start
}

var descPattern = regexp.MustCompile(`fqName: "([^"]*)".*variableLabels: \{([^}]*)\}`)

// metrics asks every collector of Metrics.
func metrics(t *testing.T) map[string]metric {
	t.Helper()
	m := telemetry.NewMetrics()
	out := map[string]metric{}
	for f, field := range reflect.ValueOf(m).Elem().Fields() {
		if !f.IsExported() {
			continue
		}
		ch := make(chan *prometheus.Desc, 1)
		field.Interface().(prometheus.Collector).Describe(ch)
		found := descPattern.FindStringSubmatch((<-ch).String())
		if found == nil {
			t.Fatalf("%s describes itself in a new way", f.Name)
		}
		kind := "counter"
		switch f.Type.String() {
		case "*prometheus.HistogramVec", "prometheus.Histogram":
			kind = "histogram"
		case "*prometheus.GaugeVec", "prometheus.Gauge":
			kind = "gauge"
		}
		out[found[1]] = metric{kind, words(found[2]), map[string][]string{}}
	}
	r := httptest.NewRecorder()
	m.Handler().ServeHTTP(r, httptest.NewRequest("GET", "/metrics", nil))
	for _, line := range strings.Split(r.Body.String(), "\n") {
		for _, use := range uses(line) {
			base := baseName(use.name)
			for label, value := range use.matchers {
				out[base].values[label] = append(out[base].values[label], value)
			}
		}
	}
	return out
}

// words splits a list at its commas.
func words(list string) []string {
	var out []string
	for _, w := range strings.Split(list, ",") {
		if w = strings.Trim(strings.TrimSpace(w), "`"); w != "" {
			out = append(out, w)
		}
	}
	return out
}

// use is one place in an expression that selects series of Writ's.
type use struct {
	name     string
	matchers map[string]string
}

var (
	usePattern   = regexp.MustCompile(`\b(writ_[a-z_]+)(\{[^}]*\})?`)
	matchPattern = regexp.MustCompile(`([a-z_]+)(?:=~|!~|!=|=)"([^"]*)"`)
	byPattern    = regexp.MustCompile(`\b(?:by|on|ignoring|without) \(([^)]*)\)`)
)

func uses(expression string) []use {
	var out []use
	for _, found := range usePattern.FindAllStringSubmatch(expression, -1) {
		u := use{found[1], map[string]string{}}
		for _, m := range matchPattern.FindAllStringSubmatch(found[2], -1) {
			u.matchers[m[1]] = m[2]
		}
		out = append(out, u)
	}
	return out
}

// baseName is the metric that a series of a histogram belongs to.
func baseName(name string) string {
	for _, suffix := range []string{"_bucket", "_sum", "_count"} {
		name = strings.TrimSuffix(name, suffix)
	}
	return name
}

// problems holds an expression to the metrics, labels and values that exist.
func problems(all map[string]metric, expression string) (out []string) {
	problem := func(format string, args ...any) {
		out = append(out, fmt.Sprintf(format, args...)+", in "+expression)
	}
	known := []string{"job", "instance"}
	for _, u := range uses(expression) {
		m, ok := all[baseName(u.name)]
		if !ok || (m.kind == "histogram") != (baseName(u.name) != u.name) {
			problem("there is no metric %s", u.name)
			continue
		}
		labels := append([]string{"job", "instance"}, m.labels...)
		if m.kind == "histogram" {
			labels = append(labels, "le")
		}
		known = append(known, labels...)
		for label, value := range u.matchers {
			if !slices.Contains(labels, label) {
				problem("%s has no label %s", u.name, label)
			}
			for _, v := range strings.Split(value, "|") {
				if have := m.values[label]; label != "le" && len(have) > 0 && !slices.Contains(have, v) {
					problem("%s never has %s=%q", u.name, label, v)
				}
			}
		}
	}
	for _, found := range byPattern.FindAllStringSubmatch(expression, -1) {
		for _, label := range words(found[1]) {
			if !slices.Contains(known, label) {
				problem("no metric has a label %s", label)
			}
		}
	}
	return out
}

func checkExpression(t *testing.T, all map[string]metric, expression string) {
	t.Helper()
	for _, p := range problems(all, expression) {
		t.Error(p)
	}
}

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile("../../docs/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// The table in docs/operations.md has every metric, its type and labels, and says
// what they mean, value by value.
func TestMetricsAreDocumented(t *testing.T) {
	all := metrics(t)
	rows := regexp.MustCompile("(?m)^\\| `(writ_[a-z_]+)` \\| (\\w+) \\| ([^|]*) \\| ([^|]+) \\| ([^|]+) \\|$").
		FindAllStringSubmatch(read(t, "operations.md"), -1)
	seen := map[string]bool{}
	for _, row := range rows {
		m, ok := all[row[1]]
		if !ok || seen[row[1]] {
			t.Errorf("%s is documented, but does not exist or twice", row[1])
			continue
		}
		seen[row[1]] = true
		if m.kind != row[2] || !slices.Equal(m.labels, words(row[3])) {
			t.Errorf("%s is a %s with the labels %v; documented as %s with %s", row[1], m.kind, m.labels, row[2], row[3])
		}
		for label, values := range m.values {
			for _, v := range values {
				if label != "le" && !strings.Contains(row[4]+row[3], "`"+v+"`") && label != "kind" {
					t.Errorf("%s: the value %s of %s is not documented", row[1], v, label)
				}
			}
		}
	}
	for name := range all {
		if !seen[name] {
			t.Errorf("%s is not documented in docs/operations.md", name)
		}
	}
}

func TestTheDashboardShowsWhatExists(t *testing.T) {
	var dashboard struct {
		SchemaVersion int
		Templating    struct {
			List []struct{ Name, Type, Definition string }
		}
		Panels []struct {
			ID         int
			Type       string
			Title      string
			Datasource struct{ UID string }
			Targets    []struct {
				Expr       string
				Datasource struct{ UID string }
			}
		}
	}
	if err := json.Unmarshal([]byte(read(t, "observability/writ-dashboard.json")), &dashboard); err != nil {
		t.Fatal(err)
	}
	all := metrics(t)
	shown := map[string]bool{}
	ids := map[int]bool{}
	if dashboard.SchemaVersion < 39 || dashboard.Templating.List[0].Type != "datasource" {
		t.Error("not a dashboard with a data source to choose")
	}
	for _, p := range dashboard.Panels {
		if ids[p.ID] {
			t.Errorf("two panels have the id %d", p.ID)
		}
		ids[p.ID] = true
		if p.Type != "row" && (len(p.Targets) == 0 || p.Datasource.UID != "${datasource}") {
			t.Errorf("panel %s shows nothing, or not of the chosen data source", p.Title)
		}
		for _, target := range p.Targets {
			if target.Datasource.UID != "${datasource}" {
				t.Errorf("panel %s asks a data source of its own", p.Title)
			}
			checkExpression(t, all, target.Expr)
			for _, u := range uses(target.Expr) {
				shown[baseName(u.name)] = true
			}
		}
	}
	for _, v := range dashboard.Templating.List {
		checkExpression(t, all, v.Definition)
	}
	for name := range all {
		if !shown[name] {
			t.Errorf("no panel shows %s", name)
		}
	}
}

func TestAlertsNameWhatExists(t *testing.T) {
	var rules struct {
		Groups []struct {
			Rules []struct {
				Alert, Expr         string
				Labels, Annotations map[string]string
			}
		}
	}
	var tests struct {
		Tests []struct {
			Cases []struct {
				Name string `yaml:"alertname"`
				Want []any  `yaml:"exp_alerts"`
			} `yaml:"alert_rule_test"`
		}
	}
	for name, into := range map[string]any{"alerts.yaml": &rules, "alerts_test.yaml": &tests} {
		if err := yaml.Unmarshal([]byte(read(t, "observability/"+name)), into); err != nil {
			t.Fatal(err)
		}
	}
	fires, silent := map[string]bool{}, map[string]bool{}
	for _, test := range tests.Tests {
		for _, c := range test.Cases {
			if len(c.Want) > 0 {
				fires[c.Name] = true
			} else {
				silent[c.Name] = true
			}
		}
	}
	runbook := map[string]bool{}
	for _, heading := range regexp.MustCompile(`(?m)^### (\w+)$`).FindAllStringSubmatch(read(t, "observability/README.md"), -1) {
		runbook["https://github.com/writsec/writ/blob/main/docs/observability/README.md#"+strings.ToLower(heading[1])] = true
	}
	all := metrics(t)
	alerts := 0
	for _, r := range rules.Groups[0].Rules {
		alerts++
		checkExpression(t, all, r.Expr)
		if !fires[r.Alert] || !silent[r.Alert] {
			t.Errorf("%s is not tested both ways", r.Alert)
		}
		if url := r.Annotations["runbook_url"]; !runbook[url] {
			t.Errorf("%s links to %q, which is not there", r.Alert, url)
		}
		if r.Annotations["summary"] == "" || r.Annotations["description"] == "" || r.Labels["severity"] == "" {
			t.Errorf("%s says too little", r.Alert)
		}
	}
	if alerts == 0 || alerts != len(runbook) {
		t.Errorf("%d alerts, %d runbooks: %v", alerts, len(runbook), slices.Sorted(maps.Keys(runbook)))
	}
}

// The checks above see what is wrong.
func TestExpressionsAreChecked(t *testing.T) {
	all := metrics(t)
	for _, bad := range []string{
		`writ_decision_total`, `writ_decisions_total{efect="deny"}`, `writ_decisions_total{effect="denied"}`,
		`sum by (effects) (writ_decisions_total)`, `writ_store_batch_size`, `writ_log_size_bucket`,
		`writ_ciba_calls_total{outcome=~"unreachable|gone"}`,
	} {
		if len(problems(all, bad)) == 0 {
			t.Errorf("accepted: %s", bad)
		}
	}
}
