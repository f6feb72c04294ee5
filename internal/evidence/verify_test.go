package evidence

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/writsec/writ/internal/audit"
)

func files(texts ...string) (out []io.Reader) {
	for _, t := range texts {
		out = append(out, strings.NewReader(t))
	}
	return out
}

func TestVerifyRanges(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	empty := w.verify(w.export(-1, 0))
	wantOK(t, "an empty log", empty)
	if empty.To != 0 || empty.Checkpoint.Size != 0 {
		t.Errorf("an empty log: %+v", empty)
	}
	var copies strings.Builder
	total := int64(0)
	for _, n := range []int{1, 1, 5, 250, 300, 40} { // over the edges of tiles
		w.grow(n)
		head := w.head()
		total = head.Size
		copies.WriteString(head.Checkpoint + "\n")
		for _, from := range []int64{0, 1, 2, 3, 7, 255, 256, 257, total - 1} {
			for _, to := range []int64{1, 2, 8, 100, 256, 257, 512, total - 1, total} {
				if from >= to || to > total {
					continue
				}
				r := w.verify(w.export(from, to), copies.String())
				wantOK(t, fmt.Sprintf("%d to %d of %d", from, to, total), r)
				if r.From != from || r.To != to || r.Checkpoint.Size != total || r.First.IsZero() || r.Last.Before(r.First) {
					t.Fatalf("%d to %d of %d: %+v", from, to, total, r)
				}
			}
		}
	}
	r := w.verify(w.export(-1, 0), copies.String())
	if r.Copies != 6 || r.Covered != total || r.To != total || len(r.Notes) != 0 || r.Root != r.Checkpoint.Root {
		t.Errorf("%+v", r)
	}
	for name, span := range map[string][2]int64{"beyond": {0, total + 1}, "nothing": {5, 5}, "backwards": {7, 5}, "after the end": {total, 0}} {
		if _, err := Export(t.Context(), w.store(), io.Discard, span[0], span[1], nil); err == nil {
			t.Errorf("%s was exported", name)
		}
	}
}

func TestVerifyWantsKeys(t *testing.T) {
	t.Parallel()
	w, stranger := newWorld(t), newWorld(t)
	w.grow(3)
	export := w.export(-1, 0)
	if _, err := Verify(bytes.NewReader(export), Options{}); err == nil {
		t.Error("verified without a key")
	}
	for _, key := range []string{"", "x", w.keys()[0] + "=", strings.ToUpper(w.keys()[0])} {
		if _, err := Verify(bytes.NewReader(export), Options{Verifiers: []string{key}}); err == nil {
			t.Errorf("verified by the key %q", key)
		}
	}
	wantProblem(t, "another's key", verify(t, export, stranger.keys()), -1, 0)
	wantOK(t, "one of two keys", verify(t, export, append(stranger.keys(), w.keys()...)))
}

// Every byte of an export is proven: whichever is flipped, it is reported, with the
// entry that it is in.
func TestEveryFlipIsReported(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.grow(20)
	keys := w.keys()
	for name, export := range map[string][]byte{"whole": w.export(0, 0), "part": w.export(3, 20)} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			at := int64(-1) // the entry that the byte is in
			first := map[string]int64{"whole": 0, "part": 3}[name]
			for i, b := range export {
				bits := []int{0, 1, 2, 3, 4, 5, 6, 7}
				if at >= 0 { // of each byte one, often the one between lower and upper case
					bits = []int{[]int{i % 8, 5}[i%2]}
				}
				for _, bit := range bits {
					changed := bytes.Clone(export)
					changed[i] ^= 1 << bit
					r := verify(t, changed, keys)
					what := fmt.Sprintf("byte %d (%q), bit %d", i, b, bit)
					if at < 0 {
						if len(r.Problems) == 0 {
							t.Fatalf("%s: verified", what)
						}
						continue
					}
					wantProblem(t, what, r, at, at+1)
					if t.Failed() {
						return
					}
				}
				if b == '\n' {
					at = max(at+1, first)
				}
			}
		})
	}
}

func TestEveryLineIsReported(t *testing.T) {
	t.Parallel()
	w, stranger := newWorld(t), newWorld(t)
	w.grow(24)
	stranger.add(audit.Entry{Kind: audit.SessionOpened})
	stranger.grow(24)
	whole := split(w.export(0, 0))
	foreign := split(stranger.export(0, 0))
	header, body := whole[0], whole[1:len(whole)-1]
	join := func(lines ...[]byte) []byte { return slices.Concat(append([][]byte{header}, lines...)...) }
	wantOK(t, "as it was", w.verify(join(body...)))
	for i := range body {
		k := int64(i)
		report := w.verify(join(slices.Delete(slices.Clone(body), i, i+1)...))
		wantProblem(t, fmt.Sprint("removed ", i), report, k, k+1)
		wantProblem(t, fmt.Sprint("cut off before ", i), w.verify(join(body[:i]...)), k, int64(len(body)))
		for at := range len(body) + 1 {
			if at == i || at == i+1 { // repeated
				wantProblem(t, fmt.Sprint("repeated ", i), w.verify(join(slices.Insert(slices.Clone(body), at, body[i])...)), k, k+1)
				continue
			}
			r := w.verify(join(slices.Insert(slices.Clone(body), at, body[i])...))
			wantProblem(t, fmt.Sprintf("%d inserted at %d", i, at), r, k, k+1)
		}
		if i > 0 {
			swapped := slices.Clone(body)
			swapped[i-1], swapped[i] = swapped[i], swapped[i-1]
			wantProblem(t, fmt.Sprintf("%d and %d swapped", i-1, i), w.verify(join(swapped...)), k-1, k+1)
		}
		// A line of another log, with its own hash.
		wantProblem(t, fmt.Sprint("replaced ", i), w.verify(join(slices.Replace(slices.Clone(body), i, i+1, foreign[1+i])...)), 0, int64(len(body)))
		for name, line := range map[string]string{"empty": "\n", "space": " \n", "object": "{}\n", "text": "hello\n"} {
			r := w.verify(join(slices.Insert(slices.Clone(body), i, []byte(line))...))
			wantProblem(t, fmt.Sprintf("%s before %d", name, i), r, k, k+1)
		}
	}
	all := join(body...)
	for i := range all { // cut off anywhere
		if r := w.verify(all[:i]); len(r.Problems) == 0 {
			t.Fatalf("verified the first %d bytes", i)
		}
	}
	for name, more := range map[string]string{"a line": "\n", "a byte": "x", "a header": string(header), "an entry": string(body[3])} {
		if r := w.verify(append(bytes.Clone(all), more...)); len(r.Problems) == 0 {
			t.Errorf("verified with %s more", name)
		}
	}
	if r := w.verify(bytes.Repeat([]byte("{"), maxLine+1)); len(r.Problems) != 1 || r.Problems[0].From != -1 {
		t.Errorf("an endless line: %q", r.Problems)
	}
	long := append(bytes.Clone(all), bytes.Repeat([]byte("{"), maxLine+1)...)
	wantProblem(t, "an endless last line", w.verify(long), int64(len(body)), int64(len(body))+1)
}
