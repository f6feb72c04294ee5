package postgres_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/goleak"

	"github.com/writsec/writ/test/postgres"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func start(t *testing.T, o postgres.Options) *postgres.Server {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	s, err := postgres.Start(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, s) })
	return s
}

func stop(t *testing.T, s *postgres.Server) {
	t.Helper()
	if err := s.Stop(); err != nil {
		t.Error(err)
	}
}

func restart(t *testing.T, s *postgres.Server) {
	t.Helper()
	if err := s.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func query(t *testing.T, dsn string, text string) (out string) {
	t.Helper()
	c, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close(context.Background()) }()
	if err := c.QueryRow(t.Context(), text).Scan(&out); err != nil && !errors.Is(err, pgx.ErrNoRows) {
		t.Fatal(err)
	}
	return out
}

func refused(t *testing.T, dsn string) {
	t.Helper()
	if c, err := pgx.Connect(t.Context(), dsn); err == nil {
		_ = c.Close(t.Context())
		t.Error("the server lives")
	}
}

// pids are the server's processes of which it tells, and the postmaster first.
func pids(t *testing.T, dsn string) (all []int) {
	t.Helper()
	list := query(t, dsn, `SELECT split_part(pg_read_file('postmaster.pid'), E'\n', 1) || ' ' || string_agg(pid::text, ' ') FROM pg_stat_activity`)
	for _, f := range strings.Fields(list) {
		pid, err := strconv.Atoi(f)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, pid)
	}
	if len(all) < 5 {
		t.Fatalf("only these processes: %v", all)
	}
	return all
}

func gone(t *testing.T, pids []int) {
	t.Helper()
	for _, pid := range pids {
		if postgres.Alive(pid) {
			t.Errorf("process %d of %v is left", pid, pids)
		}
	}
}

// folder is one that the server's user may enter, which t.TempDir is not.
func folder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "writ-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestServer(t *testing.T) {
	t.Parallel()
	s := start(t, postgres.Options{Settings: map[string]string{"work_mem": "5MB", "search_path": `"it's", public`}})
	dsn := s.DSN("postgres")
	for setting, want := range map[string]string{
		"work_mem": "5MB", "search_path": `"it's", public`, "fsync": "on", "TimeZone": "UTC", "server_encoding": "UTF8",
		"lc_collate": "C", "listen_addresses": "127.0.0.1", "port": strconv.Itoa(s.Port()),
	} {
		if setting == "lc_collate" { // no setting since 16
			if got := query(t, dsn, "SELECT datcollate FROM pg_database WHERE datname = 'postgres'"); got != want {
				t.Errorf("collation %q", got)
			}
			continue
		}
		if got := query(t, dsn, "SELECT current_setting('"+setting+"')"); got != want {
			t.Errorf("%s is %q, want %q", setting, got, want)
		}
	}
	if v := query(t, dsn, "SELECT current_setting('server_version_num')"); v < "160000" {
		t.Errorf("version %s", v)
	}
	if _, err := os.Stat(filepath.Join(s.Bin(), "initdb")); err != nil {
		t.Error(err)
	}
	dir := query(t, dsn, "SELECT current_setting('data_directory')")
	query(t, dsn, "CREATE TABLE t AS SELECT 'kept' AS v")

	before := pids(t, dsn)
	s.Kill()
	gone(t, before)
	refused(t, dsn)
	s.Kill() // no matter
	restart(t, s)
	if got := query(t, dsn, "SELECT v FROM t"); got != "kept" {
		t.Errorf("after a kill: %q", got)
	}
	if err := s.Restart(t.Context()); err == nil {
		t.Error("started twice")
	}

	before = pids(t, dsn)
	stop(t, s)
	gone(t, before)
	stop(t, s)
	if _, err := os.Stat(filepath.Dir(dir)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the folder stayed: %v", err)
	}
	if err := s.Restart(t.Context()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("restart without data: %v", err)
	}
}

// What is pinned works; local ones of these versions do as well.
func TestVersions(t *testing.T) {
	t.Parallel()
	for _, version := range []int{16, 17, 18} {
		s := start(t, postgres.Options{Version: version})
		if got := query(t, s.DSN("postgres"), "SELECT current_setting('server_version_num')"); !strings.HasPrefix(got, strconv.Itoa(version)) {
			t.Errorf("asked for %d, got %s", version, got)
		}
		stop(t, s)
	}
}

// A folder of the caller's is kept, and may be used again with other settings.
func TestDir(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(folder(t), "deep", "er")
	var log bytes.Buffer
	s := start(t, postgres.Options{Dir: dir, Log: &log, Settings: map[string]string{"work_mem": "5MB", "log_min_messages": "log"}})
	query(t, s.DSN("postgres"), "CREATE TABLE t AS SELECT 'kept' AS v")
	stop(t, s)
	if !strings.Contains(log.String(), "ready to accept connections") || !strings.Contains(s.Log(), "shut down") {
		t.Errorf("Options.Log got %q, Log says %q", log.String(), s.Log())
	}
	restart(t, s)
	if got := query(t, s.DSN("postgres"), "SELECT v FROM t"); got != "kept" {
		t.Errorf("after a stop: %q", got)
	}
	stop(t, s)

	s = start(t, postgres.Options{Dir: dir, Settings: map[string]string{"log_min_messages": "log"}})
	if got := query(t, s.DSN("postgres"), "SELECT v FROM t"); got != "kept" {
		t.Errorf("after a start in the same folder: %q", got)
	}
	if got := query(t, s.DSN("postgres"), "SELECT current_setting('work_mem')"); got != "4MB" {
		t.Errorf("work_mem is still %s", got)
	}
	if text, err := os.ReadFile(filepath.Join(dir, "log")); !strings.Contains(string(text), "ready to accept connections") {
		t.Errorf("log file: %q, %v", text, err)
	}
	if _, err := postgres.Start(t.Context(), postgres.Options{Dir: dir}); err == nil || !strings.Contains(err.Error(), "postmaster.pid") {
		t.Errorf("two servers in one folder: %v", err)
	}
}

// A server may end by itself, as it does when the disk is full.
func TestRestartOfOneThatEnded(t *testing.T) {
	t.Parallel()
	s := start(t, postgres.Options{})
	all := pids(t, s.DSN("postgres"))
	if err := syscall.Kill(all[0], syscall.SIGQUIT); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); postgres.Alive(all[0]) && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
	time.Sleep(100 * time.Millisecond) // until it is noticed
	restart(t, s)
	query(t, s.DSN("postgres"), "SELECT 'works'")
}

// Whoever else answers at the port is not taken for the server.
func TestPortTaken(t *testing.T) {
	t.Parallel()
	s := start(t, postgres.Options{})
	s.Kill()
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", s.Port()))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("R\x00\x00\x00\x08\x00\x00\x00\x00")) // AuthenticationOk
			_ = c.Close()
		}
	}()
	if err := s.Restart(t.Context()); err == nil || !strings.Contains(err.Error(), "Address already in use") {
		t.Error(err)
	}
	_ = l.Close()
	restart(t, s)
}

// A temporary folder that is ours alone is closed to the server's user.
func TestClosedTemporaryFolder(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	start(t, postgres.Options{})
}

func TestBadSetting(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(folder(t), "x")
	_, err := postgres.Start(t.Context(), postgres.Options{Dir: dir, Settings: map[string]string{"no_such": "1"}})
	if err == nil || !strings.Contains(err.Error(), `unrecognized configuration parameter "no_such"`) {
		t.Error(err)
	}
}

func TestTooOld(t *testing.T) {
	_, err := postgres.Start(t.Context(), postgres.Options{Version: 15})
	if err == nil || !strings.Contains(err.Error(), "too old") {
		t.Error(err)
	}
	// The binary is asked, not its folder's name.
	dir := filepath.Join(folder(t), "18", "bin")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"initdb", "postgres"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\necho '"+name+" (PostgreSQL) 15.18'\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv(postgres.BinEnv, dir)
	_, err = postgres.Start(t.Context(), postgres.Options{})
	if err == nil || !strings.Contains(err.Error(), "PostgreSQL 15, expected 16 or later") {
		t.Error(err)
	}
	// Nobody names it, so it is passed over.
	t.Setenv(postgres.BinEnv, "")
	t.Setenv("PATH", dir+string(filepath.ListSeparator)+os.Getenv("PATH"))
	if s := start(t, postgres.Options{}); s.Bin() == dir {
		t.Error("took the old one")
	}
}

func TestVersionThatIsNotPinned(t *testing.T) {
	t.Parallel()
	_, err := postgres.Start(t.Context(), postgres.Options{Version: 99})
	if err == nil || !strings.Contains(err.Error(), "none are pinned") {
		t.Error(err)
	}
}

// What is named must be good; nothing else is taken in its place.
func TestNamedFolder(t *testing.T) {
	s := start(t, postgres.Options{})
	t.Setenv(postgres.BinEnv, t.TempDir())
	_, err := postgres.Start(t.Context(), postgres.Options{})
	if err == nil || !strings.Contains(err.Error(), postgres.BinEnv) {
		t.Error(err)
	}
	t.Setenv(postgres.BinEnv, s.Bin())
	if other := start(t, postgres.Options{}); other.Bin() != s.Bin() {
		t.Errorf("took %s", other.Bin())
	}
}

func TestShared(t *testing.T) {
	t.Setenv(postgres.SharedEnv, "postgres://given")
	if dsn, stop, err := postgres.Shared(t.Context()); dsn != "postgres://given" || err != nil || stop() != nil {
		t.Error(dsn, err)
	}
	t.Setenv(postgres.SharedEnv, "")
	one, end, err := postgres.Shared(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	two, _, err := postgres.Shared(t.Context())
	if one != two || err != nil {
		t.Error(one, two, err)
	}
	query(t, one, "SELECT 'works'")
	if err := end(); err != nil {
		t.Error(err)
	}
	refused(t, one)
	if err := end(); err != nil {
		t.Error(err)
	}
	// Whoever asks later gets one that works.
	three, end, err := postgres.Shared(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	query(t, three, "SELECT 'works'")
	if err := end(); err != nil {
		t.Error(err)
	}
}

// A server dies with the process that started it, however that ends.
func TestNoServerOutlivesItsOwner(t *testing.T) {
	if os.Getenv("OWNER") != "" {
		s := start(t, postgres.Options{})
		dir := query(t, s.DSN("postgres"), "SELECT current_setting('data_directory')")
		note := fmt.Sprint(filepath.Dir(dir), pids(t, s.DSN("postgres")))
		if err := os.WriteFile(os.Getenv("OWNER"), []byte(note), 0o600); err != nil {
			t.Fatal(err)
		}
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}
	note := filepath.Join(t.TempDir(), "pids")
	c := exec.Command(os.Args[0], "-test.run", "^TestNoServerOutlivesItsOwner$")
	c.Env = append(os.Environ(), "OWNER="+note)
	if out, err := c.CombinedOutput(); err == nil {
		t.Fatalf("the owner was not killed: %s", out)
	}
	text, err := os.ReadFile(note)
	if err != nil {
		t.Fatal(err)
	}
	dir, list, _ := strings.Cut(string(text), "[")
	t.Cleanup(func() { _ = os.RemoveAll(strings.TrimSpace(dir)) }) // nobody was left to remove it
	var all []int
	for _, f := range strings.Fields(strings.TrimSuffix(list, "]")) {
		pid, err := strconv.Atoi(f)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, pid)
	}
	if len(all) < 5 {
		t.Fatalf("the owner noted %q", text)
	}
	began := time.Now()
	for _, pid := range all {
		for postgres.Alive(pid) && time.Since(began) < 10*time.Second {
			time.Sleep(10 * time.Millisecond)
		}
	}
	gone(t, all)
	t.Logf("gone after %v", time.Since(began).Round(time.Millisecond))
}
