package postgres_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/writsec/writ/test/postgres"
)

func start(t *testing.T, o postgres.Options) *postgres.Server {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	s, err := postgres.Start(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func query(t *testing.T, s *postgres.Server, text string) (out string) {
	t.Helper()
	c, err := pgx.Connect(t.Context(), s.DSN("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close(context.Background()) }()
	if err := c.QueryRow(t.Context(), text).Scan(&out); err != nil && !errors.Is(err, pgx.ErrNoRows) {
		t.Fatal(err)
	}
	return out
}

func TestServer(t *testing.T) {
	t.Parallel()
	s := start(t, postgres.Options{Settings: map[string]string{"work_mem": "5MB"}})
	for setting, want := range map[string]string{"work_mem": "5MB", "fsync": "on", "TimeZone": "UTC", "server_encoding": "UTF8"} {
		if got := query(t, s, "SELECT current_setting('"+setting+"')"); got != want {
			t.Errorf("%s is %q, want %q", setting, got, want)
		}
	}
	if v := query(t, s, "SELECT current_setting('server_version_num')"); v < "160000" {
		t.Errorf("version %s", v)
	}
	dir := query(t, s, "SELECT current_setting('data_directory')")
	query(t, s, "CREATE TABLE t AS SELECT 'kept' AS v")

	s.Kill()
	if _, err := pgx.Connect(t.Context(), s.DSN("postgres")); err == nil {
		t.Fatal("it lives")
	}
	if err := s.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := query(t, s, "SELECT v FROM t"); got != "kept" {
		t.Errorf("after a kill: %q", got)
	}
	if err := s.Restart(t.Context()); err == nil {
		t.Error("started twice")
	}
	for range 2 {
		if err := s.Stop(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(filepath.Dir(dir)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the folder stayed: %v", err)
	}
}

func TestTooOld(t *testing.T) {
	t.Parallel()
	_, err := postgres.Start(t.Context(), postgres.Options{Version: 15})
	if err == nil || !strings.Contains(err.Error(), "too old") {
		t.Error(err)
	}
}

// What is named must be good; nothing else is taken in its place.
func TestNamedFolder(t *testing.T) {
	t.Setenv(postgres.BinEnv, t.TempDir())
	_, err := postgres.Start(t.Context(), postgres.Options{})
	if err == nil || !strings.Contains(err.Error(), postgres.BinEnv) {
		t.Error(err)
	}
}

// A server dies with the process that started it, however that ends.
func TestNoServerOutlivesItsOwner(t *testing.T) {
	if os.Getenv("OWNER") != "" {
		s := start(t, postgres.Options{})
		pid := query(t, s, "SELECT pg_read_file('postmaster.pid', 0, 20)")
		pid, _, _ = strings.Cut(pid, "\n")
		if err := os.WriteFile(os.Getenv("OWNER"), []byte(pid+" "+filepath.Dir(query(t, s, "SELECT current_setting('data_directory')"))), 0o600); err != nil {
			t.Fatal(err)
		}
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}
	note := filepath.Join(t.TempDir(), "pid")
	c := exec.Command(os.Args[0], "-test.run", "^TestNoServerOutlivesItsOwner$")
	c.Env = append(os.Environ(), "OWNER="+note)
	if out, err := c.CombinedOutput(); err == nil {
		t.Fatalf("the owner was not killed: %s", out)
	}
	text, err := os.ReadFile(note)
	if err != nil {
		t.Fatal(err)
	}
	pid, dir, _ := strings.Cut(string(text), " ")
	t.Cleanup(func() { _ = os.RemoveAll(dir) }) // nobody was left to remove it
	for range 500 {
		if _, err := os.Stat("/proc/" + pid); errors.Is(err, os.ErrNotExist) {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Errorf("server %s outlives its owner", pid)
}
