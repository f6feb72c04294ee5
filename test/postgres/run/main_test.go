package main

import (
	"bufio"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/writsec/writ/test/postgres"
)

func build(t *testing.T) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "run")
	if out, err := exec.Command("go", "build", "-race", "-o", to, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return to
}

func status(t *testing.T, err error) int {
	t.Helper()
	if err == nil {
		return 0
	}
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok {
		t.Fatal(err)
	}
	return exit.ExitCode()
}

func TestRun(t *testing.T) {
	t.Parallel()
	run := build(t)
	for name, x := range map[string]struct {
		script string
		signal syscall.Signal // 0: the end of its input
		want   int
	}{
		"status":           {"read _; exit 3", 0, 3},
		"success":          {"read _; exit 0", 0, 0},
		"forwarded":        {"trap 'exit 7' TERM; while :; do sleep 0.1; done", syscall.SIGTERM, 7},
		"ended by signal":  {"while :; do sleep 0.1; done", syscall.SIGINT, 130},
		"killed by itself": {"read _; kill -9 $$", 0, 137},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := exec.Command(run, "-set", "work_mem=5MB", "--", "sh", "-c", "trap - INT; echo $"+postgres.SharedEnv+"; id -u; "+x.script)
			c.Stderr = os.Stderr
			in, err := c.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			out, err := c.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			lines := bufio.NewScanner(out)
			lines.Scan()
			dsn := lines.Text()
			lines.Scan()
			if lines.Text() != strconv.Itoa(os.Getuid()) {
				t.Errorf("the command runs as %q", lines.Text())
			}
			conn, err := pgx.Connect(t.Context(), dsn)
			if err != nil {
				t.Fatal(err)
			}
			var got string
			if err := conn.QueryRow(t.Context(), "SELECT current_setting('work_mem')").Scan(&got); err != nil || got != "5MB" {
				t.Error(got, err)
			}
			_ = conn.Close(t.Context())

			if x.signal != 0 {
				_ = c.Process.Signal(x.signal)
			} else {
				_ = in.Close()
			}
			if got := status(t, c.Wait()); got != x.want {
				t.Errorf("status %d, want %d", got, x.want)
			}
			if conn, err := pgx.Connect(t.Context(), dsn); err == nil {
				_ = conn.Close(t.Context())
				t.Error("the server lives")
			}
		})
	}
}

func TestRunWithoutServer(t *testing.T) {
	t.Parallel()
	out, err := exec.Command(build(t), "-version", "15", "--", "true").CombinedOutput()
	if status(t, err) != 1 || !strings.Contains(string(out), "too old") {
		t.Errorf("%v: %s", err, out)
	}
}

// What can do without a server is run, and told nothing of one.
func TestRunOptional(t *testing.T) {
	t.Parallel()
	c := exec.Command(build(t), "-version", "15", "-optional", "--", "sh", "-c", "echo \"<$"+postgres.SharedEnv+">\"; exit 3")
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, postgres.SharedEnv+"=") {
			c.Env = append(c.Env, v)
		}
	}
	out, err := c.CombinedOutput()
	if status(t, err) != 3 || !strings.Contains(string(out), "none here: PostgreSQL 15 is too old") || !strings.Contains(string(out), "\n<>\n") {
		t.Errorf("%v: %s", err, out)
	}
}
