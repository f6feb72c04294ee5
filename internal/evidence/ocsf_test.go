package evidence

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/writsec/writ/internal/audit"
)

func TestOCSF(t *testing.T) {
	t.Parallel()
	w := story(t)
	var b bytes.Buffer
	n, err := ExportOCSF(w.ctx, w.store(), &b, audit.Query{From: -1}, "v0")
	if err != nil || n != 17 {
		t.Fatalf("%d events (%v)", n, err)
	}
	origin := w.head().Origin
	var fixed []string
	for i, line := range strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n") {
		var e map[string]any
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{ // what OCSF 1.3.0 requires
			"activity_id", "actor", "api", "category_uid", "class_uid", "metadata", "severity_id", "src_endpoint", "time", "type_uid",
		} {
			if e[name] == nil {
				t.Errorf("event %d has no %s", i, name)
			}
		}
		if e["type_uid"] != e["class_uid"].(float64)*100+e["activity_id"].(float64) {
			t.Errorf("event %d has the type %v", i, e["type_uid"])
		}
		if i > 0 { // the first has a random key
			fixed = append(fixed, strings.ReplaceAll(line, origin, "ORIGIN"))
		}
	}
	golden(t, "testdata/ocsf.golden", strings.Join(fixed, "\n")+"\n")

	b.Reset()
	if n, err := ExportOCSF(w.ctx, w.store(), &b, audit.Query{From: 2, To: 7, Session: "ses_b"}, "v0"); err != nil || n != 2 {
		t.Errorf("%d events of a session (%v)", n, err)
	}
	w.sql(`UPDATE log_entries SET entry = replace(entry, 'dec_2', 'dec_9') WHERE seq = 5`)
	if n, err := ExportOCSF(w.ctx, w.store(), &b, audit.Query{}, "v0"); err == nil || !strings.Contains(err.Error(), "entry 5 was changed") || n != 5 {
		t.Errorf("%d events of a changed log (%v)", n, err)
	}
}

// Every kind has its place in the mapping and a phrase of its own.
func TestEveryKindIsMapped(t *testing.T) {
	t.Parallel()
	for kind, m := range ocsfKinds {
		if phrases[kind] == "" || activities[m.activity] == "" || severities[m.severity] == "" || statuses[m.status] == "" {
			t.Errorf("%s: %+v, %q", kind, m, phrases[kind])
		}
	}
	for kind := range phrases {
		if _, ok := ocsfKinds[kind]; !ok {
			t.Errorf("%s has no mapping", kind)
		}
	}
}
