package crash

import (
	"bytes"
	bigendian "encoding/binary"
	"net"
	"strings"
	"sync"
	"testing"
)

// tap listens to what one process says to PostgreSQL, and can end that process at an
// exact point of it. The connection is in the clear.
type tap struct {
	net.Listener
	target string

	mu    sync.Mutex
	armed *trap
}

// trap goes off when a statement is run that contains first and then, on the same
// connection, one that contains then ("" for none). Before: it never reaches the server.
// Otherwise its effect is there, and the answer never comes back.
type trap struct {
	first, then string
	before      bool
	spring      func()
	done        chan struct{}
}

func newTap(t testing.TB, target string) *tap {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &tap{Listener: l, target: target}
	var running sync.WaitGroup
	var mu sync.Mutex
	conns := []net.Conn{}
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s, err := net.Dial("tcp", target)
			if err != nil {
				_ = c.Close()
				continue
			}
			mu.Lock()
			conns = append(conns, c, s)
			mu.Unlock()
			running.Go(func() { p.serve(c, s) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for _, c := range conns {
			_ = c.Close()
		}
		mu.Unlock()
		running.Wait()
	})
	return p
}

// arm sets a trap. It goes off once.
func (p *tap) arm(t *trap) {
	p.mu.Lock()
	defer p.mu.Unlock()
	t.done = make(chan struct{})
	p.armed = t
}

func (p *tap) disarm() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.armed = nil
}

// spring ends the process, if the trap is still armed.
func (p *tap) spring(t *trap) {
	p.mu.Lock()
	mine := p.armed == t
	if mine {
		p.armed = nil
	}
	p.mu.Unlock()
	if mine {
		t.spring()
		close(t.done)
	}
}

// ear follows one connection.
type ear struct {
	tap     *tap
	startup bool
	rest    []byte            // of a message that has not come whole
	texts   map[string]string // of prepared statements
	first   *trap             // whose first statement was run here

	mu   sync.Mutex
	wait *trap // whose statement was run here: it goes off with the answer
}

func (p *tap) serve(client, server net.Conn) {
	e := &ear{tap: p, startup: true, texts: map[string]string{}}
	back := make(chan struct{})
	go func() {
		defer close(back)
		defer client.Close()
		buf := make([]byte, 64<<10)
		for {
			n, err := server.Read(buf)
			if n > 0 && e.answered(buf[:n]) {
				return
			}
			if n > 0 {
				if _, err := client.Write(buf[:n]); err != nil {
					break
				}
			}
			if err != nil {
				return
			}
		}
	}()
	buf := make([]byte, 64<<10)
	for {
		n, err := client.Read(buf)
		if n > 0 {
			if e.hear(buf[:n]) {
				break
			}
			if _, err := server.Write(buf[:n]); err != nil {
				break
			}
		}
		if err != nil {
			break
		}
	}
	_ = server.Close()
	<-back
}

// hear follows what the client says. It reports that a trap went off.
func (e *ear) hear(b []byte) bool {
	e.rest = append(e.rest, b...)
	for {
		kind := byte(0)
		head := 0
		if !e.startup {
			if len(e.rest) < 1 {
				return false
			}
			kind, head = e.rest[0], 1
		}
		if len(e.rest) < head+4 {
			return false
		}
		n := head + int(bigendian.BigEndian.Uint32(e.rest[head:]))
		if len(e.rest) < n {
			return false
		}
		body := e.rest[head+4 : n]
		e.rest = e.rest[n:]
		e.startup = false
		if text, ok := e.run(kind, body); ok && e.statement(text) {
			return true
		}
	}
}

// run returns the text of the statement that a message runs.
func (e *ear) run(kind byte, body []byte) (string, bool) {
	switch kind {
	case 'P':
		name, rest, _ := bytes.Cut(body, []byte{0})
		text, _, _ := bytes.Cut(rest, []byte{0})
		e.texts[string(name)] = string(text)
	case 'B':
		_, rest, _ := bytes.Cut(body, []byte{0})
		name, _, _ := bytes.Cut(rest, []byte{0})
		return e.texts[string(name)], true
	case 'Q':
		return string(bytes.TrimRight(body, "\x00")), true
	}
	return "", false
}

func (e *ear) statement(text string) bool {
	e.tap.mu.Lock()
	t := e.tap.armed
	e.tap.mu.Unlock()
	if t == nil {
		return false
	}
	if e.first != t || t.then == "" {
		if !strings.Contains(text, t.first) {
			return false
		}
		e.first = t
		if t.then != "" {
			return false
		}
	} else if !strings.Contains(text, t.then) {
		return false
	}
	if t.before {
		e.tap.spring(t)
		return true
	}
	e.mu.Lock()
	e.wait = t
	e.mu.Unlock()
	return false
}

// answered reports that a trap went off with what the server said: it is ready for more
// (ReadyForQuery), so whatever was asked is done.
func (e *ear) answered(b []byte) bool {
	e.mu.Lock()
	t := e.wait
	e.mu.Unlock()
	if t == nil || len(b) < 6 || b[len(b)-6] != 'Z' {
		return false
	}
	e.tap.spring(t)
	return true
}
