package postgres

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"time"
)

// process is one run of the server.
type process struct {
	cmd  *exec.Cmd
	log  *tail
	done chan struct{} // closed once it is gone and waited for
}

// launch starts a server that ends with this process, however that ends. Its log goes
// to out, which is closed at its end.
func launch(cmd *exec.Cmd, out io.WriteCloser) (*process, error) {
	p := &process{cmd: cmd, log: &tail{next: out}, done: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = p.log, p.log
	// Wait lasts until all that write to the log are gone, which are the server's own
	// processes. What they run in turn, as COPY TO PROGRAM does, may last longer.
	cmd.WaitDelay = stopTimeout
	tieToUs(cmd)
	started := make(chan error)
	go func() {
		// The tie is to the thread that started it, which therefore must live on.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			untie := watch(cmd.Process.Pid)
			_ = cmd.Wait() // how it ended is told by its log
			untie()
		}
		_ = out.Close()
		close(p.done)
	}()
	return p, <-started
}

// runs reports whether the process is there; a nil one is not.
func (p *process) runs() bool {
	if p == nil {
		return false
	}
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// stop is a fast shutdown: sessions are ended, data is flushed.
func (p *process) stop() error {
	_ = p.cmd.Process.Signal(os.Interrupt)
	select {
	case <-p.done:
		return nil
	case <-time.After(stopTimeout):
		p.kill()
		return fmt.Errorf("it took more than %v and was killed: %s", stopTimeout, p.log.String())
	}
}

// kill halts the postmaster first, so that it starts nothing new and reaps nothing,
// which would let another process have one of the numbers.
func (p *process) kill() {
	_ = p.cmd.Process.Signal(syscall.SIGSTOP)
	children := childrenOf(p.cmd.Process.Pid)
	for _, pid := range children {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	_ = p.cmd.Process.Kill()
	<-p.done
	for _, pid := range children {
		for alive(pid) {
			time.Sleep(5 * time.Millisecond)
		}
	}
}

// lasting is a writer that others still need.
type lasting struct{ io.Writer }

func (lasting) Close() error { return nil }

// tail keeps the last of what is written to it, and passes all on.
type tail struct {
	next io.Writer

	mu  sync.Mutex
	buf []byte
}

const tailSize = 16 << 10

// Write implements io.Writer. It never fails, or the server would lose its log when
// the disk is full.
func (t *tail) Write(p []byte) (int, error) {
	_, _ = t.next.Write(p)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if n := len(t.buf) - tailSize; n > 0 {
		t.buf = append([]byte(nil), t.buf[n:]...)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.buf)
}
