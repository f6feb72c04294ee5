package crash

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/writsec/writ/client"
	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/test/postgres"
)

// trouble is something that happens to the store while 200 clients use it.
type trouble struct {
	begin, end func()
	lasts      time.Duration
	// bound is the longest that any call may take, meanwhile and before and after.
	bound time.Duration
}

const (
	faultClients = 200
	// notices is how long Writ may take to see that its store is in trouble, and how
	// long to work again afterwards.
	notices  = 5 * time.Second
	recovers = 10 * time.Second
	// mostMemory is what the process may hold, with 200 clients and the store away.
	mostMemory = 256 << 20
)

// endure lets clients use the one replica of a site through some trouble, and looks
// at everything that they and its operators see.
func endure(s *site, x trouble) {
	t, r := s.t, s.replicas[0]
	r.tolerates = true
	s.start()
	pid := r.pid()
	rng := rand.New(rand.NewPCG(*seed, 0))
	l := newLoad(s)
	l.http.Timeout, l.patience, l.obeys = x.bound, x.lasts+3*x.bound+time.Minute, true
	l.start(faultClients, func() *rand.Rand { return source(rng) })
	progress := func(what string, d time.Duration) (took time.Duration) {
		began, before := time.Now(), l.count()
		within(t, d, func() error {
			if l.count() == before {
				return fmt.Errorf("no decision %s", what)
			}
			return r.ready()
		})
		return time.Since(began)
	}
	progress("before the fault", recovers)
	time.Sleep(time.Second)
	before := rss(r.pid())

	var watch sync.WaitGroup
	ctx, cease := context.WithCancel(t.Context())
	most := before
	watch.Go(func() {
		for ctx.Err() == nil {
			if status, body, err := r.probe("/livez", 5*time.Second); err != nil || status != http.StatusOK {
				t.Errorf("livez: %d %q %v", status, body, err)
			}
			most = max(most, rss(r.pid()))
			time.Sleep(100 * time.Millisecond)
		}
	})
	x.begin()
	began := time.Now()
	noticed, wrong := time.Duration(0), 0 // until readyz says so; answers of it after that
	for time.Since(began) < x.lasts {
		status, body, err := r.probe("/readyz", 5*time.Second)
		switch unready := err == nil && status == http.StatusServiceUnavailable; {
		case unready && noticed == 0:
			noticed = time.Since(began)
		case !unready && (noticed > 0 || time.Since(began) > notices):
			if wrong++; wrong == 1 {
				t.Errorf("%v into the fault, readyz: %d %q %v; refused %v", time.Since(began), status, body, err, l.refused())
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	refused := l.refused()
	x.end()
	took := progress("after the fault", recovers)
	time.Sleep(time.Second)
	cease()
	watch.Wait()
	l.stop()
	if r.pid() != pid || !r.running() {
		t.Error("it did not get by without a restart")
	}
	r.stop()
	s.settle()
	f := s.verify(l)
	s.clean(l, f)
	if refused["unavailable"] == 0 || l.broken > 0 {
		t.Errorf("refused %v; %d calls without an answer within %v: %v", refused, l.broken, x.bound, l.breaks)
	}
	if most > mostMemory {
		t.Errorf("the process held %d MiB", most>>20)
	}
	t.Logf("unready after %v (0 never); refused %v, the slowest answer of all took %v; memory %d MiB, before %d MiB; decided again %v after the fault; %d decisions",
		noticed.Round(time.Millisecond), refused, l.slowest().Round(time.Millisecond), most>>20, before>>20, took.Round(time.Millisecond), len(l.decisions))
}

func startPostgres(t *testing.T) *postgres.Server {
	t.Helper()
	server, err := postgres.Start(t.Context(), postgres.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	return server
}

func TestFaultPostgresGone(t *testing.T) {
	server := startPostgres(t)
	lasts := 5 * time.Second
	if full() {
		lasts = 2 * time.Minute
	}
	endure(newSite(t, server.DSN("postgres"), 1), trouble{
		begin: server.Kill,
		end: func() {
			if err := server.Restart(t.Context()); err != nil {
				t.Error(err)
			}
		},
		lasts: lasts, bound: 5 * time.Second,
	})
}

// behind is a site whose PostgreSQL is behind a proxy.
func behind(t *testing.T) (*site, *proxy) {
	t.Helper()
	server := startPostgres(t)
	p := newProxy(t, fmt.Sprintf("127.0.0.1:%d", server.Port()))
	u, err := url.Parse(server.DSN("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	u.Host = p.Addr().String()
	return newSite(t, u.String(), 1), p
}

// A statement takes a second.
func TestFaultPostgresSlow(t *testing.T) {
	t.Parallel() // mostly waits
	s, p := behind(t)
	endure(s, trouble{
		begin: func() { p.delay.Store(int64(time.Second)) },
		end:   func() { p.delay.Store(0) },
		lasts: 15 * time.Second, bound: 20 * time.Second,
	})
}

// Packets vanish, and no connection ends.
func TestFaultPostgresBlackHole(t *testing.T) {
	t.Parallel() // mostly waits
	s, p := behind(t)
	endure(s, trouble{
		begin: func() { p.swallow(true) },
		end:   func() { p.swallow(false) },
		lasts: 15 * time.Second, bound: 20 * time.Second,
	})
}

// The same when nobody asked anything at the time: what is first sent into the hole is
// the beginning of a transaction, on every connection of the pool.
func TestFaultPostgresBlackHoleWhileIdle(t *testing.T) {
	t.Parallel() // mostly waits
	const connections, bound = 16, 20 * time.Second
	s, p := behind(t)
	r := s.replicas[0]
	r.tolerates = true
	s.start()
	l := newLoad(s)
	l.http.Timeout, l.patience, l.obeys = bound, 3*bound, true
	everyone := func(each func(c *loadClient)) {
		var all sync.WaitGroup
		for i := range connections {
			c := &loadClient{load: l, rng: rand.New(rand.NewPCG(*seed, uint64(i))), token: s.is.token("user", "agent")}
			all.Go(func() { each(c) })
		}
		all.Wait()
	}
	everyone(func(c *loadClient) { c.work() })
	time.Sleep(500 * time.Millisecond)
	p.swallow(true)
	everyone(func(c *loadClient) { // once, without patience
		began := time.Now()
		_, err := c.on(r).OpenSession(t.Context(), client.SessionRequest{})
		p, refused := errors.AsType[*client.Error](err)
		if took := time.Since(began); !refused || p.Status != http.StatusServiceUnavailable || p.RetryAfter == 0 {
			t.Errorf("after %v: %v", took, err)
		}
	})
	if r.ready() == nil {
		t.Error("it is ready")
	}
	p.swallow(false)
	within(t, recovers, r.ready)
	began := time.Now()
	everyone(func(c *loadClient) { c.work() })
	t.Logf("the slowest answer took %v; everything after the hole %v", l.slowest(), time.Since(began))
	s.sequenced(30 * time.Second) // its own work goes on too
	r.stop()
	s.settle()
	s.clean(l, s.verify(l))
}

// afterwards runs a shell command after the test, and also if this process ends
// before: what it undoes would outlive us.
func afterwards(t *testing.T, command string) {
	t.Helper()
	cmd := exec.Command("sh", "-c", "cat >/dev/null; "+command)
	ours, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = ours.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s: %v", command, err)
		}
	})
}

func TestFaultDiskFull(t *testing.T) {
	s := newSite(t, "", 1)
	data := filepath.Join(s.dir, "data")
	if err := os.Mkdir(data, 0o700); err != nil {
		t.Fatal(err)
	}
	r := s.replicas[0]
	x := trouble{lasts: 5 * time.Second, bound: 5 * time.Second}
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=32m", "writ-test", data).CombinedOutput(); err == nil {
		afterwards(t, "umount -l '"+data+"'")
		ballast := filepath.Join(data, "ballast")
		x.begin = func() { fill(t, ballast) }
		x.end = func() { _ = os.Remove(ballast) }
	} else {
		t.Logf("no tmpfs (%v: %s); files that can't grow stand in for it", err, out)
		x.begin = func() { limitFiles(t, r.pid(), size(t, filepath.Join(data, "writ.db-wal"))+64<<10) }
		x.end = func() { limitFiles(t, r.pid(), unlimited) }
	}
	endure(s, x)
}

// fill writes a file until the disk is full.
func fill(t *testing.T, name string) {
	t.Helper()
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for block := make([]byte, 64<<10); err == nil; {
		_, err = f.Write(block)
	}
}

func size(t *testing.T, name string) uint64 {
	t.Helper()
	info, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	return uint64(info.Size())
}

// immutable returns what makes files unwritable, for root and for descriptors that
// are open already, and what undoes it; ok is false where the system can't.
func immutable(t *testing.T, path string) (lock, unlock func(), ok bool) {
	if out, err := exec.Command("chattr", "+i", path).CombinedOutput(); err != nil {
		t.Logf("no chattr (%v: %s); a limit on the process stands in for it", err, out)
		return nil, nil, false
	}
	afterwards(t, "chattr -R -i '"+path+"'")
	chattr := func(flag string) func() {
		return func() {
			if out, err := exec.Command("chattr", "-R", flag, path).CombinedOutput(); err != nil {
				t.Errorf("chattr: %v: %s", err, out)
			}
		}
	}
	chattr("-i")()
	return chattr("+i"), chattr("-i"), true
}

// The files of the database, and their folder, can't be written any more.
func TestFaultReadOnly(t *testing.T) {
	s := newSite(t, "", 1)
	data, r := filepath.Join(s.dir, "data"), s.replicas[0]
	if err := os.Mkdir(data, 0o700); err != nil {
		t.Fatal(err)
	}
	x := trouble{lasts: 5 * time.Second, bound: 5 * time.Second}
	var ok bool
	if x.begin, x.end, ok = immutable(t, data); !ok {
		x.begin = func() { limitFiles(t, r.pid(), 0) }
		x.end = func() { limitFiles(t, r.pid(), unlimited) }
	}
	endure(s, x)
}

// The same for a store that nobody reads at the time: it has no file open then that
// was opened before, and SQLite opens to read what it can't open to write.
func TestFaultReadOnlyStore(t *testing.T) {
	ctx, data := t.Context(), filepath.Join(t.TempDir(), "data")
	store, err := sqlstore.Open(ctx, sqlstore.Config{
		URL: "sqlite:" + filepath.Join(data, "writ.db"), Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	write := func() error {
		return store.Update(ctx, func(tx *sqlstore.Tx) error { return tx.AppendAudit(ctx, audit.Entry{Kind: audit.LogPruned}) })
	}
	if err := write(); err != nil {
		t.Fatal(err)
	}
	if lock, unlock, ok := immutable(t, data); ok {
		lock()
		// Its index is in memory that the kernel maps; that the race detector, unlike
		// SQLite, does not survive a refused write there says nothing.
		if out, err := exec.Command("chattr", "-i", filepath.Join(data, "writ.db-shm")).CombinedOutput(); err != nil {
			t.Errorf("chattr: %v: %s", err, out)
		}
		for range 3 {
			if err := write(); !fault.Is(err, fault.Unavailable) {
				t.Errorf("read-only: %v", err)
			}
		}
		unlock()
	}
	if err := write(); err != nil {
		t.Errorf("after that: %v", err)
	}
}

// Started on files that it may not write, Writ says so and ends.
func TestFaultReadOnlyAtStart(t *testing.T) {
	for name, what := range map[string]string{"file": "writ.db", "folder": ""} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, "", 1)
			r := s.replicas[0]
			s.start()
			r.stop()
			lock, unlock, ok := immutable(t, filepath.Join(s.dir, "data", what))
			if !ok {
				lock = func() {
					s.write("limited", "#!/bin/sh\nulimit -f 0\nexec "+binary+` "$@"`)
					r.binary = filepath.Join(s.dir, "limited")
					_ = os.Chmod(r.binary, 0o700)
				}
				unlock = func() { r.binary = binary }
			}
			lock()
			r.launch()
			select {
			case <-r.ended():
			case <-time.After(20 * time.Second):
				t.Error("it did not end")
			}
			unlock()
			said := strings.TrimSpace(strings.Join(r.out.lines("writ: "), ""))
			if r.kill(); r.cmd.ProcessState.ExitCode() != 1 || !strings.Contains(said, "store") {
				t.Errorf("ended with %d: %s", r.cmd.ProcessState.ExitCode(), said)
			}
			t.Log(said)
			s.settle()
			s.clean(newLoad(s), s.verify(newLoad(s)))
		})
	}
}
