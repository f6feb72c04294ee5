package identity

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/jws"
)

// idp is an issuer in memory, so that bubbles (testing/synctest) rule its time.
type idp struct {
	issuer string

	mu      sync.Mutex
	keys    []byte
	delay   time.Duration // before each answer
	down    bool
	fetches []time.Time // of the key set
}

func newIDP(issuer string, members ...map[string]any) *idp {
	return &idp{issuer: issuer, keys: jwks(members...)}
}

func (p *idp) set(f func(*idp)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f(p)
}

// fetched returns when the key set was asked for.
func (p *idp) fetched() []time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.fetches)
}

func (p *idp) RoundTrip(req *http.Request) (*http.Response, error) {
	p.mu.Lock()
	body, delay, down := p.keys, p.delay, p.down
	if strings.HasSuffix(req.URL.Path, "/.well-known/openid-configuration") {
		body, delay = must(json.Marshal(map[string]string{"issuer": p.issuer, "jwks_uri": p.issuer + "/keys"})), 0
	} else {
		p.fetches = append(p.fetches, time.Now())
	}
	p.mu.Unlock()
	select {
	case <-req.Context().Done():
		return nil, req.Context().Err()
	case <-time.After(delay):
	}
	if down {
		return nil, errors.New("connection refused")
	}
	return &http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(bytes.NewReader(body)), Request: req}, nil
}

// idps sends each request to the issuer of its host.
type idps map[string]*idp

func (m idps) RoundTrip(req *http.Request) (*http.Response, error) {
	return m["https://"+req.URL.Host].RoundTrip(req)
}

func inBubble(t *testing.T, providers ...*idp) *Verifier {
	t.Helper()
	m := idps{}
	cfg := Config{Now: time.Now, Logger: slog.New(slog.DiscardHandler), HTTP: &http.Client{Transport: m}}
	for _, p := range providers {
		m[p.issuer] = p
		cfg.Issuers = append(cfg.Issuers, Issuer{
			URL: p.issuer, User: true, Agent: true, Audience: audience, Algorithms: []string{"ES256", "RS256"},
		})
	}
	v, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// running starts Run and stops it when the test is over.
func running(t *testing.T, v *Verifier) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- v.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run = %v", err)
		}
	})
}

// fresh is a token that the bubble's clock finds good.
func fresh(edits ...edit) string {
	t := time.Now()
	return forge(append([]edit{claim("iat", t.Unix()), claim("exp", t.Add(time.Hour).Unix())}, edits...)...)
}

func good(t *testing.T, v *Verifier, token string) {
	t.Helper()
	if _, err := callerOf(v, t.Context(), token, ""); err != nil {
		t.Errorf("a good token is refused: %v", err)
	}
}

func bad(t *testing.T, v *Verifier, token, want string) {
	t.Helper()
	_, err := callerOf(v, t.Context(), token, "")
	checkRefusal(t, err, "the bearer token "+want, token)
}

var unavailable = ErrKeysUnavailable.Error()

// TestNegative07Flood: a stranger's tokens cause at most one fetch in 30 s.
func TestNegative07Flood(t *testing.T) {
	k := keys()
	flood := func(t *testing.T, v *Verifier, token func(i int) string) {
		for i := range 1000 {
			bad(t, v, token(i), noKey)
		}
	}
	floods := map[string]func(iss string) func(int) string{
		"random kids": func(iss string) func(int) string {
			return func(i int) string { return fresh(of(iss, es256(fmt.Sprint("kid-", i, rand.Text()), k.ecB))) }
		},
		"bad signatures under a known kid": func(iss string) func(int) string {
			return func(int) string { return fresh(of(iss, es256("ec", k.ecB))) }
		},
		"bad signatures without kid": func(iss string) func(int) string {
			return func(int) string { return fresh(of(iss, es256("", k.ecB))) }
		},
	}
	for name, tokens := range floods {
		t.Run(name+", over HTTP", func(t *testing.T) {
			srv := newServer(t, nil)
			v := srv.verifier(t, NewHTTPClient(time.Second))
			good(t, v, fresh(of(srv.URL, es256("ec", k.ec)))) // the one fetch that a token may cause
			flood(t, v, tokens(srv.URL))
			if n := srv.fetches.Load(); n != 1 {
				t.Errorf("%d fetches, want 1", n)
			}
			good(t, v, fresh(of(srv.URL, es256("ec", k.ec))))
		})
	}
	t.Run("random kids for ten minutes", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			p := newIDP(issA, jwk(k.ec, "ec", nil))
			v := inBubble(t, p)
			for i := range 2000 {
				bad(t, v, fresh(by(es256(fmt.Sprint("kid-", i), k.ecB))), noKey)
				time.Sleep(300 * time.Millisecond)
			}
			fetches := p.fetched()
			if n := len(fetches); n != 20 {
				t.Errorf("%d fetches in ten minutes, want 20", n)
			}
			for i, at := range fetches[1:] {
				if gap := at.Sub(fetches[i]); gap < fetchInterval {
					t.Errorf("fetch %d came %v after the one before", i+1, gap)
				}
			}
		})
	})
	t.Run("at once", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			p := newIDP(issA, jwk(k.ec, "ec", nil))
			p.delay = time.Second
			v := inBubble(t, p)
			var wg sync.WaitGroup
			for i := range 200 {
				token := fresh(by(es256(fmt.Sprint("kid-", i), k.ecB)))
				wg.Go(func() { bad(t, v, token, noKey) })
			}
			wg.Wait()
			if n := len(p.fetched()); n != 1 {
				t.Errorf("%d fetches, want 1", n)
			}
		})
	})
}

// TestNegative08Hang: cached keys verify at once, an unknown key is answered
// within the timeout, and all is well again afterwards.
func TestNegative08Hang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := keys()
		p := newIDP(issA, jwk(k.ec, "ec", nil))
		v := inBubble(t, p)
		good(t, v, fresh())
		time.Sleep(fetchInterval)

		p.set(func(p *idp) { p.delay = 24 * time.Hour })
		newcomer := es256("new", k.ecB)
		start := time.Now()
		waiting := make(chan error)
		go func() {
			_, err := callerOf(v, t.Context(), fresh(by(newcomer)), "")
			waiting <- err
		}()
		synctest.Wait() // the fetch hangs
		good(t, v, fresh())
		bad(t, v, fresh(by(es256("ec", k.ecB))), noKey)
		if took := time.Since(start); took != 0 {
			t.Errorf("a known kid waited %v for the fetch", took)
		}
		checkRefusal(t, <-waiting, "the bearer token "+unavailable)
		if took := time.Since(start); took != fetchTimeout {
			t.Errorf("an unknown kid took %v, want %v", took, fetchTimeout)
		}
		// No second hung fetch within the interval.
		start = time.Now()
		bad(t, v, fresh(by(newcomer)), noKey)
		if took := time.Since(start); took != 0 {
			t.Errorf("the second unknown kid took %v", took)
		}

		p.set(func(p *idp) { p.delay, p.keys = 0, jwks(jwk(k.ec, "ec", nil), jwk(k.ecB, "new", nil)) })
		time.Sleep(fetchInterval)
		good(t, v, fresh(by(newcomer)))
		good(t, v, fresh())
	})
}

// TestNegative08HoldsUpNoOther: each issuer has a set of its own.
func TestNegative08HoldsUpNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := keys()
		hung, fine := newIDP(issA, jwk(k.ec, "ec", nil)), newIDP(issB, jwk(k.ecB, "ec", nil))
		hung.delay = 24 * time.Hour
		v := inBubble(t, hung, fine)
		running(t, v)
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() { bad(t, v, fresh(), unavailable) })
		}
		synctest.Wait()
		start := time.Now()
		good(t, v, fresh(of(issB, es256("ec", k.ecB))))
		bad(t, v, fresh(of(issB, es256("x", k.ec))), noKey)
		if took := time.Since(start); took != 0 {
			t.Errorf("the other issuer took %v", took)
		}
		wg.Wait()
	})
}

// TestCancelledCaller: who gives up gets his answer, and spoils nothing.
func TestCancelledCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newIDP(issA, jwk(keys().ec, "ec", nil))
		p.delay = 2 * time.Second
		v := inBubble(t, p)
		token := fresh()
		var wg sync.WaitGroup
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			start := time.Now()
			_, err := callerOf(v, ctx, token, "")
			checkRefusal(t, err, "the bearer token "+unavailable)
			if took := time.Since(start); took != time.Second {
				t.Errorf("the cancelled caller got his answer after %v", took)
			}
		})
		synctest.Wait()
		time.Sleep(500 * time.Millisecond)
		good(t, v, token) // joins, and outlasts the first
		wg.Wait()
		if n := len(p.fetched()); n != 1 {
			t.Errorf("%d fetches, want the one that both waited for", n)
		}

		// A caller that comes cancelled still starts the fetch for the next one.
		p2 := newIDP(issA, jwk(keys().ec, "ec", nil))
		v = inBubble(t, p2)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := callerOf(v, ctx, token, ""); err == nil {
			t.Log("the fetch was quicker than the cancellation")
		}
		synctest.Wait()
		good(t, v, token)
	})
}

// TestRotation: a new key works at once, a removed one no longer after a refresh.
func TestRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := keys()
		p := newIDP(issA, jwk(k.ec, "ec", nil))
		v := inBubble(t, p)
		running(t, v)
		synctest.Wait()
		good(t, v, fresh())

		time.Sleep(time.Minute)
		p.set(func(p *idp) { p.keys = jwks(jwk(k.ec, "ec", nil), jwk(k.ecB, "ec2", nil)) })
		var wg sync.WaitGroup
		p.set(func(p *idp) { p.delay = time.Second })
		for range 20 { // a busy agent turns up with the new key
			wg.Go(func() { good(t, v, fresh(by(es256("ec2", k.ecB)))) })
		}
		wg.Wait()
		good(t, v, fresh())

		p.set(func(p *idp) { p.keys = jwks(jwk(k.ecB, "ec2", nil)) })
		time.Sleep(refreshAfter)
		bad(t, v, fresh(), noKey)
		good(t, v, fresh(by(es256("ec2", k.ecB))))
	})
}

// TestAllKeysWithdrawn: an empty set is how an issuer in trouble takes all back.
func TestAllKeysWithdrawn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := keys()
		p := newIDP(issA, jwk(k.ec, "ec", nil))
		v := inBubble(t, p)
		running(t, v)
		synctest.Wait()
		good(t, v, fresh())
		p.set(func(p *idp) { p.keys = jwks() })
		time.Sleep(refreshAfter + time.Second)
		if _, err := callerOf(v, t.Context(), fresh(), ""); !fault.Is(err, fault.InvalidToken) {
			t.Errorf("error = %v, want invalid_token", err)
		}
		p.set(func(p *idp) { p.keys = jwks(jwk(k.ec, "ec", nil)) })
		time.Sleep(fetchInterval)
		good(t, v, fresh())
	})
}

// TestOutage: keys in hand outlive their issuer's absence.
func TestOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newIDP(issA, jwk(keys().ec, "ec", nil))
		v := inBubble(t, p)
		running(t, v)
		synctest.Wait()
		p.set(func(p *idp) { p.down = true })
		time.Sleep(time.Hour)
		good(t, v, fresh())
		p.set(func(p *idp) { p.down, p.keys = false, []byte("<html>") })
		time.Sleep(time.Hour)
		good(t, v, fresh())
	})
}

// TestDownAtStart: refused until the issuer is there, then soon accepted.
func TestDownAtStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newIDP(issA, jwk(keys().ec, "ec", nil))
		p.keys = []byte("starting")
		v := inBubble(t, p)
		running(t, v)
		synctest.Wait()
		bad(t, v, fresh(), unavailable)
		if _, err := v.IDToken(t.Context(), issA, "writ", fresh(asIDToken("writ"))); !errors.Is(err, ErrKeysUnavailable) {
			t.Errorf("IDToken = %v, want ErrKeysUnavailable: it is not final", err)
		}
		time.Sleep(5 * time.Second)
		bad(t, v, fresh(), unavailable)
		p.set(func(p *idp) { p.keys = jwks(jwk(keys().ec, "ec", nil)) })
		time.Sleep(3 * time.Second)
		good(t, v, fresh())
	})
}

func TestRunBacksOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newIDP(issA)
		p.keys = []byte("starting")
		v := inBubble(t, p)
		start := time.Now()
		running(t, v)
		time.Sleep(2 * time.Minute)
		p.set(func(p *idp) { p.keys = jwks(jwk(keys().ec, "ec", nil)) })
		time.Sleep(6 * time.Minute)
		p.set(func(p *idp) { p.keys = []byte("<html>") })
		time.Sleep(5 * time.Minute)
		var got []int
		for _, at := range p.fetched() {
			got = append(got, int(at.Sub(start)/time.Second))
		}
		want := []int{0, 1, 3, 7, 15, 31, 61, 91, 121, 421, 721, 722, 724, 728, 736, 752}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("seconds of the fetches: %s", diff)
		}
	})
}

// server is an issuer over HTTP, whose key set a test may replace by anything.
type server struct {
	*httptest.Server
	fetches, discoveries atomic.Int32
}

func newServer(t *testing.T, keySet http.HandlerFunc) *server {
	t.Helper()
	s := &server{}
	mux := http.NewServeMux()
	mux.HandleFunc("/.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
		s.discoveries.Add(1)
		_ = json.NewEncoder(w).Encode(map[string]string{"issuer": s.URL, "jwks_uri": s.URL + "/keys"})
	})
	mux.HandleFunc("/keys", func(w http.ResponseWriter, r *http.Request) {
		s.fetches.Add(1)
		if keySet != nil {
			keySet(w, r)
			return
		}
		_, _ = w.Write(jwks(jwk(keys().ec, "ec", nil)))
	})
	s.Server = httptest.NewServer(mux)
	t.Cleanup(s.Close)
	return s
}

func (s *server) verifier(t *testing.T, client *http.Client) *Verifier {
	t.Helper()
	return remote(t, s.URL, client)
}

func remote(t *testing.T, issuer string, client *http.Client) *Verifier {
	t.Helper()
	t.Cleanup(client.CloseIdleConnections)
	v, err := New(Config{
		Now: time.Now, Logger: slog.New(slog.DiscardHandler), HTTP: client,
		Issuers: []Issuer{{URL: issuer, User: true, Agent: true, Audience: audience, Algorithms: []string{"ES256"}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// TestNegative08BadKeySets: whatever the issuer answers, the token is refused, the reader
// bounded, and keys that were in hand stay.
func TestNegative08BadKeySets(t *testing.T) {
	var written atomic.Int64
	elsewhere := newServer(t, nil)
	k := keys()
	for name, answer := range map[string]http.HandlerFunc{
		"HTML":            func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "<html>log in</html>") },
		"empty":           func(http.ResponseWriter, *http.Request) {},
		"an empty object": func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "{}") },
		"null":            func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "null") },
		"keys null":       func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, `{"keys":null}`) },
		"keys a string":   func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, `{"keys":"x"}`) },
		"status 500": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusInternalServerError)
			_, _ = w.Write(jwks(jwk(k.ec, "ec", nil)))
		},
		"status 404": func(w http.ResponseWriter, r *http.Request) { http.NotFound(w, r) },
		"redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL+"/keys", http.StatusFound)
		},
		"1 GiB": func(w http.ResponseWriter, _ *http.Request) {
			chunk := bytes.Repeat([]byte(" "), 1<<20)
			for range 1 << 10 {
				n, err := w.Write(chunk)
				written.Add(int64(n))
				if err != nil {
					return
				}
			}
		},
		"hang": func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
		"cut":  func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
	} {
		t.Run(name, func(t *testing.T) {
			srv := newServer(t, answer)
			client := NewHTTPClient(300 * time.Millisecond)
			v := srv.verifier(t, client)
			token := fresh(of(srv.URL, es256("ec", k.ec)))
			start := time.Now()
			bad(t, v, token, unavailable)
			if took := time.Since(start); took > 3*time.Second {
				t.Errorf("took %v", took)
			}

			// The same answer does not cost keys that are in hand.
			set := v.issuers[srv.URL].keys
			held := must(jws.ParseKeys(jwks(jwk(k.ec, "ec", nil))))
			set.loaded.Store(inHand(held))
			if err := set.refresh(t.Context()); err == nil {
				t.Error("refresh = nil, want an error")
			} else if len(err.Error()) > 300 {
				t.Errorf("the error has %d bytes, which would fill the log", len(err.Error()))
			}
			good(t, v, token)
		})
	}
	if n := elsewhere.fetches.Load(); n != 0 {
		t.Errorf("the redirect was followed %d times", n)
	}
	if n := written.Load(); n > 64<<20 {
		t.Errorf("%d MiB were read of the 1 GiB", n>>20)
	}
}

func TestDiscoveryRefused(t *testing.T) {
	answers := map[string]func(w http.ResponseWriter, r *http.Request, url string){
		"another issuer": func(w http.ResponseWriter, _ *http.Request, url string) {
			fmt.Fprintf(w, `{"issuer":"https://evil.example","jwks_uri":%q}`, url+"/keys")
		},
		"trailing slash": func(w http.ResponseWriter, _ *http.Request, url string) {
			fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":%q}`, url+"/", url+"/keys")
		},
		"no issuer": func(w http.ResponseWriter, _ *http.Request, url string) {
			fmt.Fprintf(w, `{"jwks_uri":%q}`, url+"/keys")
		},
		"no jwks_uri": func(w http.ResponseWriter, _ *http.Request, url string) { fmt.Fprintf(w, `{"issuer":%q}`, url) },
		"jwks_uri no URL": func(w http.ResponseWriter, _ *http.Request, url string) {
			fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":"::"}`, url)
		},
		"jwks_uri a local file": func(w http.ResponseWriter, _ *http.Request, url string) {
			fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":"file:///etc/passwd"}`, url)
		},
		"status 503": func(w http.ResponseWriter, _ *http.Request, _ string) {
			w.WriteHeader(503)
			_, _ = w.Write(bytes.Repeat([]byte("x"), 1<<16))
		},
		"HTML": func(w http.ResponseWriter, _ *http.Request, _ string) { _, _ = io.WriteString(w, "<html>") },
		"redirect": func(w http.ResponseWriter, r *http.Request, _ string) {
			http.Redirect(w, r, "/elsewhere", http.StatusFound)
		},
	}
	for name, answer := range answers {
		t.Run(name, func(t *testing.T) {
			var srv *httptest.Server
			srv = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				switch r.URL.Path {
				case "/.well-known/openid-configuration":
					answer(w, r, srv.URL)
				case "/elsewhere":
					fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":%q}`, srv.URL, srv.URL+"/keys")
				default:
					_, _ = w.Write(jwks(jwk(keys().ec, "ec", nil)))
				}
			}))
			defer srv.Close()
			v := remote(t, srv.URL, NewHTTPClient(time.Second))
			bad(t, v, fresh(of(srv.URL, es256("ec", keys().ec))), unavailable)
			if err := v.issuers[srv.URL].keys.refresh(t.Context()); err == nil || len(err.Error()) > 300 {
				t.Errorf("refresh = %v, want a short error", err)
			}
		})
	}
	t.Run("an https issuer with keys by http", func(t *testing.T) {
		client := &http.Client{Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
			body := `{"issuer":"https://a.example","jwks_uri":"http://a.example/keys"}`
			if r.URL.Scheme == "http" {
				body = string(jwks(jwk(keys().ec, "ec", nil)))
			}
			return &http.Response{StatusCode: 200, Body: io.NopCloser(strings.NewReader(body)), Request: r}, nil
		})}
		bad(t, remote(t, issA, client), fresh(), unavailable)
	})
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// TestIssuerMovesItsKeys: the discovery document is read anew with each refresh.
func TestIssuerMovesItsKeys(t *testing.T) {
	var path atomic.Pointer[string]
	old, moved := "/keys", "/moved"
	path.Store(&old)
	var srv *httptest.Server
	srv = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/.well-known/openid-configuration":
			fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":%q}`, srv.URL, srv.URL+*path.Load())
		case *path.Load():
			_, _ = w.Write(jwks(jwk(keys().ec, "ec"+*path.Load(), nil)))
		default:
			http.NotFound(w, r)
		}
	}))
	defer srv.Close()
	v := remote(t, srv.URL, NewHTTPClient(time.Second))
	good(t, v, fresh(of(srv.URL, es256("ec/keys", keys().ec))))
	path.Store(&moved)
	if err := v.issuers[srv.URL].keys.refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	good(t, v, fresh(of(srv.URL, es256("ec/moved", keys().ec))))
}

func TestJWKSFile(t *testing.T) {
	k := keys()
	dir := t.TempDir()
	path := filepath.Join(dir, "jwks.json")
	config := Config{
		Now: time.Now, Logger: slog.New(slog.DiscardHandler),
		HTTP: &http.Client{Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
			t.Errorf("the network was asked for %s", r.URL)
			return nil, errors.New("no network")
		})},
		Issuers: []Issuer{{URL: issA, User: true, Agent: true, Audience: audience, Algorithms: []string{"ES256"}, JWKSFile: path}},
	}
	for name, content := range map[string][]byte{
		"no file":       nil,
		"HTML":          []byte("<html>"),
		"no key":        jwks(),
		"symmetric key": jwks(jwkOf(k.oct, "oct", nil)),
		"private key":   jwks(jwkOf(k.ec, "ec", nil)),
		"weak key":      jwks(jwk(k.weak, "weak", nil)),
	} {
		if content != nil {
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := New(config); err == nil || errors.Is(err, os.ErrNotExist) != (content == nil) {
			t.Errorf("%s: New = %v, want an error", name, err)
		}
		_ = os.Remove(path)
	}
	write := func(data []byte) {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(jwks(jwk(k.ec, "ec", nil)))
	v, err := New(config)
	if err != nil {
		t.Fatal(err)
	}
	good(t, v, fresh())
	write(jwks(jwk(k.ecB, "ec2", nil)))
	good(t, v, fresh(by(es256("ec2", k.ecB))))
	bad(t, v, fresh(), noKey)
}

// TestConcurrentVerification is for the race detector.
func TestConcurrentVerification(t *testing.T) {
	srv := newServer(t, nil)
	v := srv.verifier(t, NewHTTPClient(time.Second))
	running(t, v)
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			for range 20 {
				if i%2 == 0 {
					good(t, v, fresh(of(srv.URL, es256("ec", keys().ec))))
				} else if _, err := callerOf(v, t.Context(), fresh(of(srv.URL, es256(rand.Text(), keys().ecB))), ""); err == nil {
					t.Error("a bad token passed")
				}
			}
		})
	}
	wg.Wait()
}

// TestManyKeys: a token without kid is tried against all.
func TestManyKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var members []map[string]any
		for i := range 50 {
			members = append(members, jwk(must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)), fmt.Sprint(i), nil))
		}
		v := inBubble(t, newIDP(issA, append(members, jwk(keys().ec, "last", nil))...))
		good(t, v, fresh(by(es256("", keys().ec))))
		bad(t, v, fresh(by(es256("", keys().ecB))), noKey)
	})
}

// inHand are keys that a fetch has just brought.
func inHand(keys jws.Keys) *keysInHand {
	k := &keysInHand{Keys: keys}
	k.seen.Store(time.Now().UnixNano())
	return k
}
