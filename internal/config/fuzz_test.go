package config

import (
	"errors"
	"os"
	"strings"
	"testing"
)

// FuzzParse: whatever the file holds, there is an answer, and every complaint
// names the file and, in their order, lines that the file has.
func FuzzParse(f *testing.F) {
	for _, name := range []string{"testdata/bad.yaml", "../../docs/config.example.yaml"} {
		data, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	for _, text := range []string{"", "a: &a [*a]\n", "? {a: b}\n: c\n", "minters: {? : , \"\": {}}\n", "a: 1\n---\nb: 2\n", "policy: {deadline: 1e9h}"} {
		f.Add([]byte(text))
	}
	lineEnds := strings.NewReplacer("\r\n", "\n", "\r", "\n", "\u0085", "\n", "\u2028", "\n", "\u2029", "\n")
	f.Fuzz(func(t *testing.T, data []byte) {
		_, err := parse("writ.yaml", data)
		if err == nil {
			return
		}
		joined, ok := err.(interface{ Unwrap() []error })
		if !ok {
			t.Fatalf("%T is no joined error", err)
		}
		lines, last := strings.Count(lineEnds.Replace(string(data)), "\n")+2, 0
		for _, err := range joined.Unwrap() {
			e, ok := errors.AsType[*Error](err)
			if !ok || e.File != "writ.yaml" || e.Text == "" || e.Line > lines {
				t.Fatalf("%#v of a file of %d lines", err, lines)
			}
			if e.Line < last {
				t.Fatal("the errors are not in the order of their lines")
			}
			last = e.Line
		}
	})
}
