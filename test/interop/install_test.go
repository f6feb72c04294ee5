package interop_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

const installTimeout = 5 * time.Minute

// nodeReady installs jose unless that was done since the lockfile last changed, and
// returns node. It fails where node is missing: a test that skips itself proves nothing.
func nodeReady(t *testing.T) string {
	t.Helper()
	const wanted = "this test needs Node.js 20 or newer with npm (on Debian: apt-get install nodejs npm): %v"
	node, err := exec.LookPath("node")
	if err != nil {
		t.Fatalf(wanted, err)
	}
	if kept("package-lock.json", "node_modules/.locked") {
		return node
	}
	npm, err := exec.LookPath("npm")
	if err != nil {
		t.Fatalf(wanted, err)
	}
	install(t, npm, "ci", "--ignore-scripts", "--no-progress")
	keep(t, "package-lock.json", "node_modules/.locked")
	return node
}

// pythonReady installs PyJWT into a virtual environment of this folder and returns its
// python.
func pythonReady(t *testing.T) string {
	t.Helper()
	python := filepath.Join(".venv", "bin", "python")
	if kept("requirements.txt", ".venv/.locked") {
		return python
	}
	system, err := exec.LookPath("python3")
	if err != nil {
		t.Fatalf("this test needs Python 3.9 or newer with venv (on Debian: apt-get install python3-venv): %v", err)
	}
	install(t, system, "-m", "venv", "--clear", ".venv")
	install(t, python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes", "--only-binary", ":all:",
		"-r", "requirements.txt")
	keep(t, "requirements.txt", ".venv/.locked")
	return python
}

func install(t *testing.T, command string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), installTimeout)
	defer cancel()
	if out, err := exec.CommandContext(ctx, command, args...).CombinedOutput(); err != nil {
		hint := ""
		if bytes.Contains(out, []byte("ensurepip")) {
			hint = " (on Debian: apt-get install python3-venv)"
		}
		t.Fatalf("%s %s: %v%s\n%s", command, args, err, hint, out)
	}
}

// kept reports whether what a lockfile says is installed: a copy of it is the last that
// is written.
func kept(lock, marker string) bool {
	want, err := os.ReadFile(lock)
	if err != nil {
		return false
	}
	got, err := os.ReadFile(marker)
	return err == nil && bytes.Equal(want, got)
}

func keep(t *testing.T, lock, marker string) {
	t.Helper()
	text, err := os.ReadFile(lock)
	if err == nil {
		err = os.WriteFile(marker, text, 0o600)
	}
	if err != nil {
		t.Fatal(fmt.Errorf("mark what is installed: %w", err))
	}
}
