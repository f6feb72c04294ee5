package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/writsec/writ/test/postgres"
)

// bare is the environment without a PostgreSQL for the demo.
func bare() []string {
	return slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "WRIT_POSTGRES=") })
}

func demo(t *testing.T, env ...string) string {
	t.Helper()
	cmd := exec.Command(binary, "demo")
	cmd.Env = append(bare(), env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil || errs.Len() > 0 {
		t.Fatalf("%v: %s\n%s", err, &errs, &out)
	}
	return out.String()
}

// Neither is this parallel, nor the next: the policies' tests keep all cores busy at each
// start, and the demo has its deadlines.
func TestDemoWithoutPostgres(t *testing.T) {
	out := demo(t)
	for _, want := range []string{
		"Not played, for want of a PostgreSQL: credentials for databases. `make demo` brings one; or: writ demo --postgres URL\n",
		"introspection says inactive, ", "and from now on deny: An operator has stopped", "(i) … and lets alice on again\n    ok ", "\n— 127.0.0.1:",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
	if n := strings.Count(out, "\n    ok "); n != 9 {
		t.Errorf("%d scenes played, want 9:\n%s", n, out)
	}
}

// catalog lists the databases of a server and the roles that are not PostgreSQL's own.
func catalog(t *testing.T, dsn string) []string {
	t.Helper()
	return strings.Split(queryAt[string](t, dsn, `SELECT string_agg(n, ' ' ORDER BY n) FROM (
		SELECT 'database ' || datname FROM pg_database UNION ALL SELECT 'role ' || rolname FROM pg_roles WHERE rolname !~ '^pg_') x(n)`), " ")
}

func queryAt[T any](t *testing.T, dsn, query string) (v T) {
	t.Helper()
	c, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close(context.Background()) }()
	if err := c.QueryRow(t.Context(), query).Scan(&v); err != nil {
		t.Fatal(err)
	}
	return v
}

// TestDemoDatabase has a server of its own, so that what is left there can be seen.
func TestDemoDatabase(t *testing.T) {
	server, err := postgres.Start(t.Context(), postgres.Options{Settings: map[string]string{"fsync": "off"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	dsn := server.DSN("postgres")
	before := catalog(t, dsn)

	t.Run("demo", func(t *testing.T) {
		out := demo(t, "WRIT_POSTGRES="+dsn)
		for _, want := range []string{
			"2 of 3 rows: what is not acme's is not there for it\n",
			"PostgreSQL itself refuses: ERROR: permission denied for table opportunities (SQLSTATE 42501)\n",
			"and from now on deny: An operator has stopped", "allow: The records of one tenant may be queried, in a new session\n",
		} {
			if !strings.Contains(out, want) {
				t.Errorf("no %q in:\n%s", want, out)
			}
		}
		ends := regexp.MustCompile(`FATAL: terminating connection .* \(SQLSTATE 57P01\); the role is gone, \d+(\.\d+)?m?s after the call\n`)
		if n := len(ends.FindAllString(out, -1)); n != 2 {
			t.Errorf("%d connections ended, want 2:\n%s", n, out)
		}
		if n := strings.Count(out, "\n    ok "); n != 12 || strings.Contains(out, "Not played") {
			t.Errorf("%d scenes played, want 12:\n%s", n, out)
		}
		if after := catalog(t, dsn); !slices.Equal(before, after) {
			t.Errorf("the demo left %v, want %v", after, before)
		}
	})

	t.Run("interrupted", func(t *testing.T) {
		cmd := exec.Command(binary, "demo", "--postgres", dsn)
		var out buffer
		cmd.Stdout, cmd.Stderr, cmd.Env = &out, &out, bare()
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill() })
		within(t, 30*time.Second, func() error { // before the story begins
			if slices.Equal(before, catalog(t, dsn)) {
				return fmt.Errorf("it has made nothing: %s", &out)
			}
			return nil
		})
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err == nil {
			t.Errorf("an interrupted demo ends with 0:\n%s", &out)
		}
		if after := catalog(t, dsn); !slices.Equal(before, after) {
			t.Errorf("the demo left %v, want %v", after, before)
		}
	})

	t.Run("dev", func(t *testing.T) {
		dir := t.TempDir()
		first := devDatabase(t, dir, dsn)
		if second := devDatabase(t, dir, dsn); second != first {
			t.Errorf("the second start worked on %s, the first on %s", second, first)
		}
		// The account that the first start prepared can also be given.
		account := strings.Replace(strings.TrimSuffix(dsn, "/postgres?sslmode=disable"), "postgres@", first+"_minter@", 1) + "/" + first + "?sslmode=disable"
		if given := devDatabase(t, t.TempDir(), account); given != first {
			t.Errorf("%s was given, and it worked on %s", first, given)
		}
	})

	t.Run("no secret in errors", func(t *testing.T) {
		for url, want := range map[string]string{
			"host=127.0.0.1 password=hunter2":         "expected postgres://",
			"postgres://u:hunter2@127.0.0.1:1/x":      "connect to PostgreSQL",
			"postgres://u:hunter2@127.0.0.1:port/x":   "expected postgres://",
			"mysql://u:hunter2@127.0.0.1/x":           "expected postgres://",
			"postgres:///x?password=hunter2":          "expected postgres://",
			"postgres://u:hunter2@127.0.0.1:1/x?a=%1": "connect to PostgreSQL",
		} {
			code, _, stderr := command(t, "demo", "--postgres", url)
			if code != 1 || !strings.Contains(stderr, want) || strings.Contains(stderr, "hunter2") {
				t.Errorf("%s: %d, %s", url, code, stderr)
			}
		}
	})
}

// devDatabase runs writ dev, pastes its line for the database, uses what comes, and
// returns the name of the database.
func devDatabase(t *testing.T, dir, dsn string) string {
	t.Helper()
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Fatal(err)
	}
	var out buffer
	cmd := exec.Command(binary, "dev", "-q", "--port", fmt.Sprint(freePorts(t, 3)), "--dir", filepath.Join(dir, "data"),
		"--policies", untested(t), "--postgres", dsn)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("writ dev ended with %v:\n%s", err, &out)
		}
	}()
	var line string
	within(t, 60*time.Second, func() error {
		for l := range strings.Lines(out.String()) {
			if strings.HasPrefix(l, "curl ") && strings.Contains(l, "crm.database.query") && strings.HasSuffix(l, "\n") {
				line = l
				return nil
			}
		}
		return fmt.Errorf("no line for the database: %s", &out)
	})
	var a struct {
		Decision   string
		Credential struct{ Secret map[string]string }
	}
	within(t, 20*time.Second, func() error { // it is printed a moment before Writ listens
		text, err := exec.Command(bash, "-c", line).Output()
		if err != nil {
			return err
		}
		return json.Unmarshal(text, &a)
	})
	if a.Decision != allow {
		t.Fatalf("%+v\n%s", a, &out)
	}
	secret := a.Credential.Secret
	if n := queryAt[int](t, secret["dsn"], `SELECT count(*)::int FROM opportunities`); n != 2 {
		t.Errorf("the credential sees %d rows, want 2", n)
	}
	return secret["database"]
}

// untested is a copy of the policies without their tests, so that a start takes no time.
func untested(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS("../../policies")); err != nil {
		t.Fatal(err)
	}
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, "_test.rego") {
			err = os.Remove(path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return dir
}
