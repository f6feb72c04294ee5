package idp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"
)

const (
	installTimeout = 5 * time.Minute
	startTimeout   = time.Minute
	stopTimeout    = 3 * time.Second
)

const wanted = "the OpenID provider of the tests needs Node.js 20 or newer with npm: " +
	"install them (on Debian: apt-get install nodejs npm)"

// process is one run of idp.mjs.
type process struct {
	cmd    *exec.Cmd
	stdin  io.Closer
	stderr tail
	done   chan struct{} // closed once the process is gone and waited for
}

// ready is the line that idp.mjs prints when it serves.
type ready struct {
	Issuer   string            `json:"issuer"`
	Control  string            `json:"control"`
	Resource string            `json:"resource"`
	Clients  map[string]string `json:"clients"`
}

// launch starts idp.mjs and waits for its ready line. The process outlives
// ctx.
func launch(ctx context.Context, config string) (*process, *ready, error) {
	dir, err := packageDir()
	if err != nil {
		return nil, nil, err
	}
	node, err := exec.LookPath("node")
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", wanted, err)
	}
	if err := install(ctx, dir); err != nil {
		return nil, nil, err
	}

	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	p := &process{done: make(chan struct{})}
	p.cmd = exec.Command(node, "idp.mjs")
	p.cmd.Dir = dir
	p.cmd.Env = append(os.Environ(), "IDP_CONFIG="+config, "NODE_ENV=test", "NO_COLOR=1")
	p.cmd.Stderr = &p.stderr
	// The provider ends when this pipe does, even if we are killed.
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		return nil, nil, fmt.Errorf("pipe to node: %w", err)
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, nil, fmt.Errorf("pipe from node: %w", err)
	}
	if err := p.cmd.Start(); err != nil {
		return nil, nil, fmt.Errorf("start node: %w", err)
	}

	first := make(chan []byte, 1)
	go func() {
		defer close(p.done)
		out := bufio.NewReader(stdout)
		line, _ := out.ReadBytes('\n')
		first <- line
		_, _ = io.Copy(io.Discard, out)
		_ = p.cmd.Wait() // how it ended is told by its standard error
	}()

	select {
	case line := <-first:
		var r ready
		if err := json.Unmarshal(line, &r); err != nil || r.Issuer == "" {
			p.stop()
			return nil, nil, fmt.Errorf("node did not become ready: %s", p.stderr.String())
		}
		return p, &r, nil
	case <-ctx.Done():
		p.stop()
		return nil, nil, fmt.Errorf("wait for node: %w: %s", ctx.Err(), p.stderr.String())
	}
}

// stop ends the process and waits until it is gone. It may be called twice.
func (p *process) stop() {
	_ = p.stdin.Close()
	select {
	case <-p.done:
	case <-time.After(stopTimeout):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

// tail keeps the last of what is written to it.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

const tailSize = 16 << 10

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, b...)
	if extra := len(t.buf) - tailSize; extra > 0 {
		t.buf = t.buf[extra:]
	}
	return len(b), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.buf))
}

// packageDir is the folder of this package, which holds idp.mjs.
func packageDir() (string, error) {
	holds := func(dir string) bool {
		_, err := os.Stat(filepath.Join(dir, "idp.mjs"))
		return err == nil
	}
	if _, file, _, ok := runtime.Caller(0); ok && holds(filepath.Dir(file)) {
		return filepath.Dir(file), nil
	}
	// Built with -trimpath; tests still run inside the module.
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("find test/idp: %w", err)
	}
	for {
		if idp := filepath.Join(dir, "test", "idp"); holds(idp) {
			return idp, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("find test/idp: not inside the module")
		}
		dir = parent
	}
}

// install runs npm ci unless that was done since the lockfile last changed.
// Test binaries of several packages may come here at once.
func install(ctx context.Context, dir string) error {
	if installed(dir) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, installTimeout)
	defer cancel()
	npm, err := exec.LookPath("npm")
	if err != nil {
		return fmt.Errorf("%s: %w", wanted, err)
	}
	unlock, err := lock(ctx, filepath.Join(dir, ".install.lock"))
	if err != nil {
		return fmt.Errorf("lock %s for npm ci: %w", dir, err)
	}
	defer unlock()
	if installed(dir) {
		return nil
	}
	cmd := exec.CommandContext(ctx, npm, "ci", "--ignore-scripts", "--no-progress")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("npm ci in %s: %w\n%s", dir, err, out)
	}
	return nil
}

// installed reports whether node_modules fits the lockfile. The file in it is
// the last that npm writes, so one that was interrupted does not count.
func installed(dir string) bool {
	marker, err := os.Stat(filepath.Join(dir, "node_modules", ".package-lock.json"))
	if err != nil {
		return false
	}
	locked, err := os.Stat(filepath.Join(dir, "package-lock.json"))
	return err == nil && !marker.ModTime().Before(locked.ModTime())
}
