package evidence

import (
	"bytes"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/writsec/writ/internal/audit"
)

var updateFormats = flag.Bool("update-formats", false, "write files of the formats anew")

// What was written once verifies for ever: only a new format may write it anew.
func TestFormatsStay(t *testing.T) {
	t.Parallel()
	if *updateFormats {
		w := newWorld(t)
		w.grow(6)
		for name, text := range map[string][]byte{
			"whole.jsonl": w.export(0, 0), "part.jsonl": w.export(2, 5), "incident.json": w.incident(Subject{Session: "ses_1"}),
			"key": []byte(w.keys()[0] + "\n"), "copies": []byte(w.head().Checkpoint + "\n"),
		} {
			if err := os.WriteFile("testdata/"+name, text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, entries := range map[string]int64{"whole.jsonl": 7, "part.jsonl": 3} {
		r := verify(t, read(t, "testdata/"+name), storedKeys(t), string(read(t, "testdata/copies")))
		wantOK(t, name, r)
		if r.To-r.From != entries {
			t.Errorf("%s: %d entries", name, r.To-r.From)
		}
	}
	r, err := VerifyIncident(bytes.NewReader(read(t, "testdata/incident.json")), storedKeys(t))
	if err != nil || len(r.Problems) > 0 || r.Entries != 1 {
		t.Errorf("%+v (%v)", r, err)
	}
}

func storedKeys(t testing.TB) []string {
	t.Helper()
	return strings.Fields(string(read(t, "testdata/key")))
}

// Whatever a file is, reading it ends without a panic; and what verifies without a
// problem is, to the byte, what was written.
func FuzzVerify(f *testing.F) {
	whole, part := read(f, "testdata/whole.jsonl"), read(f, "testdata/part.jsonl")
	keys, copies := storedKeys(f), string(read(f, "testdata/copies"))
	for _, seed := range [][]byte{whole, part, nil, []byte("{}\n"), split(whole)[0], append(bytes.Clone(part), whole...)} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, file []byte) {
		r := verify(t, file, keys, copies)
		if len(r.Problems) == 0 && !bytes.Equal(file, whole) && !bytes.Equal(file, part) {
			t.Errorf("verified %q", file)
		}
		for _, p := range r.Problems {
			if p.From >= 0 && p.To <= p.From {
				t.Errorf("the problem %q is about no entry", p)
			}
		}
	})
}

// What a checkpoint says is read back as it stands, and copies of any content are
// read without a panic.
func FuzzReadCheckpoint(f *testing.F) {
	keys, signed := storedKeys(f), string(read(f, "testdata/copies"))
	signed = strings.TrimSuffix(signed, "\n")
	head, err := audit.ReadCheckpoint(signed)
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range []string{signed, "", "a\n1\n\n\n— a b\n", signed + "\n" + signed, signed[:len(signed)-9] + signed} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		c, err := audit.ReadCheckpoint(text)
		if err == nil && (c.Size < 0 || c.Origin != text[:len(c.Origin)]) {
			t.Errorf("read %+v from %q", c, text)
		}
		if opened, err := openCheckpoint(text, keys); err == nil && (opened != c || text[:len(signed)/2] != signed[:len(signed)/2]) {
			t.Errorf("opened %+v from %q", opened, text)
		}
		all, err := readCopies(files(text), keys)
		if err != nil {
			return
		}
		for _, one := range all.list {
			if one.Origin != head.Origin {
				t.Errorf("believed %+v", one)
			}
		}
	})
}

func FuzzVerifyIncident(f *testing.F) {
	keys, checkpoint := storedKeys(f), strings.TrimSuffix(string(read(f, "testdata/copies")), "\n")
	f.Add(read(f, "testdata/incident.json"))
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, file []byte) {
		r, err := VerifyIncident(bytes.NewReader(file), keys)
		if err == nil && len(r.Problems) == 0 && r.Checkpoint != checkpoint {
			t.Errorf("verified under %q", r.Checkpoint)
		}
	})
}

func TestWriteFile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "f")
	write := func(text string, fail error) error {
		return WriteFile(path, func(w io.Writer) error {
			_, _ = io.WriteString(w, text)
			return fail
		})
	}
	for _, text := range []string{"one", "two"} {
		if err := write(text, nil); err != nil || string(read(t, path)) != text {
			t.Errorf("%s: %v", text, err)
		}
	}
	broken := errors.New("broken")
	if err := write("three", broken); !errors.Is(err, broken) || string(read(t, path)) != "two" {
		t.Errorf("a failure left %q (%v)", read(t, path), err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v (%v)", info.Mode(), err)
	}
	if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) != 1 {
		t.Errorf("left %v (%v)", left, err)
	}
	if err := WriteFile(filepath.Join(path, "below"), nil); err == nil {
		t.Error("wrote below a file")
	}
}
