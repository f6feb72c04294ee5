package audit_test

import (
	"strings"
	"testing"

	"github.com/writsec/writ/internal/audit"
)

// What reads as a checkpoint is written the same way again, or it could be read in
// two ways.
func FuzzReadCheckpoint(f *testing.F) {
	f.Add("writ.example/audit/1\n7\nYgr64p5YGdnietS9Ih2FdP+SEhHu7noZggC8ZqQNu9w=\n\n— writ.example/audit/1 Rep2\n")
	f.Add("a\n0\n\n\n")
	f.Add("a\n+7\nYgr64p5YGdnietS9Ih2FdP+SEhHu7noZggC8ZqQNu9w=\n\n— x\n")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := audit.ReadCheckpoint(text)
		if err != nil {
			return
		}
		if c.Size < 0 || !strings.HasPrefix(text, c.Origin+"\n") {
			t.Errorf("%q is read as %+v", text, c)
		}
		_, _ = audit.OpenCheckpoint(text)
	})
}

func FuzzParseRecord(f *testing.F) {
	f.Add([]byte(`{"at":"2026-11-25T12:00:00.120000Z","kind":"decision.allow","v":1,"detail":{"n":1e400}}`))
	f.Add([]byte(`{"at":"2026-11-25T12:00:00.120000Z","kind":"x","v":1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := audit.ParseRecord(data)
		if err != nil {
			return
		}
		first, err := e.Record()
		if err != nil {
			return
		}
		again, err := audit.ParseRecord(first)
		if err != nil {
			t.Fatalf("%s: %v", first, err)
		}
		if second, err := again.Record(); err != nil || string(second) != string(first) {
			t.Errorf("%s, then %s (%v)", first, second, err)
		}
	})
}
