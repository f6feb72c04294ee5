// Package crash breaks what the real writ binary stands on, while it is under load:
// it kills Writ and PostgreSQL at random moments, fills the disk, takes the database
// away and slows it down. Then it looks straight into the database whether all that
// was answered is true, and nothing was done twice.
package crash

import (
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/writsec/writ/internal/storetest"
)

var (
	binary string // writ
	seed   = flag.Uint64("chaos.seed", uint64(time.Now().UnixNano()), "what random moments and choices follow from; the log names it")
)

// full says whether to take the time for the long forms.
func full() bool { return os.Getenv("WRIT_CHAOS") == "full" }

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "writ-crash-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	binary = filepath.Join(dir, "writ")
	if err := build(binary); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return storetest.Main(m)
}

func build(to string, flags ...string) error {
	args := append([]string{"build"}, flags...)
	cmd := exec.Command("go", append(args, "-o", to, "../../cmd/writ")...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build writ: %w\n%s", err, out)
	}
	return nil
}

// nextPort runs below the range that systems give to those who ask for any port, so
// that nobody takes a port between its choice and its use.
var nextPort atomic.Int32

func init() { nextPort.Store(int32(14000 + os.Getpid()%500*10)) }

func freePort(t testing.TB) int {
	t.Helper()
	for range 1000 {
		port := int(nextPort.Add(1))
		if l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			_ = l.Close()
			return port
		}
	}
	t.Fatal("no free port")
	return 0
}

// within polls until check returns nil, and fails with its last error after d.
func within(t testing.TB, d time.Duration, check func() error) {
	t.Helper()
	deadline := time.Now().Add(d)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %v", d, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
