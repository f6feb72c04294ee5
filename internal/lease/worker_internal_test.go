package lease

import (
	"errors"
	"strings"
	"testing"
	"unicode/utf8"
)

// PostgreSQL takes neither NUL nor broken UTF-8, and terminals take orders.
func TestFailuresAreKeptAsPlainText(t *testing.T) {
	for _, tt := range []struct{ err, want string }{
		{"connection refused", "connection refused"},
		{strings.Repeat("x", 299) + "ü", strings.Repeat("x", 299)},
		{"a\x00b\xffc\nd\x1b[2J", "a bc d [2J"},
		{strings.Repeat("y", 1000), strings.Repeat("y", maxFailure)},
	} {
		if got := clipped(errors.New(tt.err)); got != tt.want || !utf8.ValidString(got) {
			t.Errorf("%q is kept as %q, want %q", tt.err, got, tt.want)
		}
	}
}
