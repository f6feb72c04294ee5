// Package e2e drives the real writ binary over HTTP, against a real OpenID
// provider, and looks at nothing but what users, services and operators can see.
package e2e

import (
	"context"
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
	"github.com/writsec/writ/test/idp"
)

var (
	binary string   // writ, built with the race detector
	shared *idp.IdP // for tests that don't disturb it
)

func TestMain(m *testing.M) {
	flag.Parse()
	// The tests wait far more than they compute.
	parallel := flag.Lookup("test.parallel")
	if parallel.Value.String() == parallel.DefValue {
		_ = flag.Set("test.parallel", "8")
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "writ-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	binary = filepath.Join(dir, "writ")
	if out, err := exec.Command("go", "build", "-race", "-o", binary, "../../cmd/writ").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build writ: %v\n%s", err, out)
		return 1
	}
	if shared, err = idp.New(context.Background(), idp.Config{
		Users: map[string]idp.User{
			"dave": {Groups: []string{"hr"}},
			"olga": {Groups: []string{"writ-operators"}},
		},
		Clients: map[string]string{opsConsole: "test-only"},
	}); err != nil {
		fmt.Fprintln(os.Stderr, "start the OpenID provider:", err)
		return 1
	}
	defer shared.Close()
	return storetest.Main(m)
}

// opsConsole is the client that operators use at the shared provider.
const opsConsole = "ops-console"

// nextPort runs below the range that systems give to those who ask for any port, so
// that nobody takes a port between its choice and its use.
var nextPort atomic.Int32

func init() { nextPort.Store(int32(20000 + os.Getpid()%1000*10)) }

// freePorts returns the first of n ports in a row that nobody listens on.
func freePorts(t testing.TB, n int) int {
	t.Helper()
	for range 1000 {
		first := int(nextPort.Add(int32(n))) - n
		free := true
		for port := first; port < first+n && free; port++ {
			l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
			if err != nil {
				free = false
				continue
			}
			_ = l.Close()
		}
		if free {
			return first
		}
	}
	t.Fatal("no free ports")
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
		time.Sleep(25 * time.Millisecond)
	}
}
