package crash

import (
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// proxy is a bad network in front of a server.
type proxy struct {
	net.Listener
	target string
	delay  atomic.Int64 // of each packet to the server
	lost   atomic.Int64 // counts up with each black hole

	mu    sync.Mutex
	conns map[net.Conn]struct{}
}

func newProxy(t testing.TB, target string) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{Listener: l, target: target, conns: map[net.Conn]struct{}{}}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() { p.serve(c) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		p.mu.Lock()
		for c := range p.conns {
			_ = c.Close()
		}
		p.mu.Unlock()
		running.Wait()
	})
	return p
}

// swallow makes a black hole of the network, or mends it. Connections of meanwhile and
// of before stay lost, and nobody tells either end.
func (p *proxy) swallow(on bool) {
	if on == (p.lost.Load()%2 == 0) {
		p.lost.Add(1)
	}
}

func (p *proxy) serve(client net.Conn) {
	defer p.track(client)()
	server, err := net.Dial("tcp", p.target)
	if err != nil {
		return
	}
	defer p.track(server)()
	hole := p.lost.Load()
	back := make(chan struct{})
	go func() {
		defer close(back)
		p.pump(client, server, hole, false)
	}()
	p.pump(server, client, hole, true)
	<-back
}

func (p *proxy) track(c net.Conn) (end func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conns[c] = struct{}{}
	return func() {
		_ = c.Close()
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.conns, c)
	}
}

// pump carries packets until an end closes. hole is how often the network had
// changed when the connection was made: odd, or since outdated, it is lost.
func (p *proxy) pump(to, from net.Conn, hole int64, slow bool) {
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 && slow {
			time.Sleep(time.Duration(p.delay.Load()))
		}
		if n > 0 && hole%2 == 0 && p.lost.Load() == hole {
			if _, err := to.Write(buf[:n]); err != nil {
				_ = from.Close()
				return
			}
		}
		if err != nil {
			_ = to.Close()
			return
		}
	}
}
