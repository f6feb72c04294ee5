package server_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/writsec/writ/internal/config"
	"github.com/writsec/writ/internal/server"
	"github.com/writsec/writ/internal/storetest"
)

func TestMain(m *testing.M) {
	code := storetest.Main(m)
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Println(err)
		code = 1
	}
	os.Exit(code)
}

const smallPolicy = `package writ
decision := {"effect": "deny", "reasons": [{"code": "no", "message": "no"}]}
`

// newConfig is the least that a Writ runs on.
func newConfig(t *testing.T) config.Config {
	t.Helper()
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	c := config.Default()
	c.Listen, c.OpsListen, c.ExternalURL = "127.0.0.1:0", "127.0.0.1:0", "https://writ.example"
	c.Store = "sqlite:" + filepath.Join(dir, "writ.db")
	c.RootKeyFile = write("root.key", base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{1}, 32)))
	c.Policy.Path = filepath.Dir(write("policies/writ.rego", smallPolicy))
	return c
}

// start runs a Writ until the returned stop, which reports how it ended.
func start(t *testing.T, c config.Config) (*server.Server, func() error) {
	t.Helper()
	s, err := server.New(t.Context(), c, false, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	return s, func() error {
		cancel()
		http.DefaultClient.CloseIdleConnections()
		faultHTTP.CloseIdleConnections()
		return <-done
	}
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	res, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(body)
}

func TestServesAndStops(t *testing.T) {
	s, stop := start(t, newConfig(t))
	ops, api := "http://"+s.OpsAddr().String(), "http://"+s.Addr().String()
	for _, path := range []string{"/livez", "/readyz"} {
		if status, body := get(t, ops+path); status != http.StatusOK {
			t.Errorf("%s: %d %s", path, status, body)
		}
	}
	if _, body := get(t, ops+"/metrics"); !strings.Contains(body, `writ_policy_loads_total{result="activated"} 1`) {
		t.Error("the metrics do not count the policies")
	}
	// What is for operations is not on the API's listener, nor the other way round.
	if status, _ := get(t, api+"/metrics"); status != http.StatusNotFound {
		t.Errorf("metrics on the API: %d", status)
	}
	if status, _ := get(t, ops+"/openapi.yaml"); status != http.StatusNotFound {
		t.Errorf("API on the operations listener: %d", status)
	}
	begin := time.Now()
	if err := stop(); err != nil {
		t.Error(err)
	}
	if d := time.Since(begin); d > 15*time.Second {
		t.Errorf("stopping took %v", d)
	}
	if _, err := http.Get(api + "/openapi.yaml"); err == nil {
		t.Error("still answers after the stop")
	}
}

// Stopping and starting again on the same state keeps the signing key.
func TestRestartKeepsKeys(t *testing.T) {
	c := newConfig(t)
	var sets []string
	for range 2 {
		s, stop := start(t, c)
		_, jwks := get(t, "http://"+s.Addr().String()+"/.well-known/jwks.json")
		sets = append(sets, jwks)
		if err := stop(); err != nil {
			t.Fatal(err)
		}
	}
	if sets[0] != sets[1] || !strings.Contains(sets[0], `"alg":"ES256"`) || strings.Contains(sets[0], `"d":`) {
		t.Errorf("key sets %s and %s", sets[0], sets[1])
	}
}

func TestRefusesToStart(t *testing.T) {
	for _, tt := range []struct {
		name  string
		spoil func(*testing.T, *config.Config)
		want  string
	}{
		{"short root key", func(t *testing.T, c *config.Config) {
			if err := os.WriteFile(c.RootKeyFile, []byte("c2hvcnQ="), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "32 random bytes"},
		{"another root key", func(t *testing.T, c *config.Config) {
			_, stop := start(t, *c)
			if err := stop(); err != nil {
				t.Fatal(err)
			}
			other := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{2}, 32))
			if err := os.WriteFile(c.RootKeyFile, []byte(other), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "root key is another one"},
		{"port in use", func(t *testing.T, c *config.Config) {
			s, stop := start(t, newConfig(t))
			t.Cleanup(func() { _ = stop() })
			c.Listen = s.Addr().String()
		}, "address already in use"},
		{"database in use", func(t *testing.T, c *config.Config) {
			_, stop := start(t, *c)
			t.Cleanup(func() { _ = stop() })
		}, "another Writ uses"},
		{"missing secret", func(_ *testing.T, c *config.Config) {
			c.Services = []config.Service{{ID: "crm", SecretFile: "nowhere", Audience: "a"}}
		}, "service crm"},
		{"missing certificate", func(_ *testing.T, c *config.Config) {
			c.TLS = &config.TLS{CertFile: "nowhere", KeyFile: "nowhere"}
		}, "TLS certificate"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newConfig(t)
			tt.spoil(t, &c)
			_, err := server.New(t.Context(), c, false, slog.New(slog.DiscardHandler))
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("New = %v, want %q", err, tt.want)
			}
		})
	}
}

// Broken policies at start keep Writ from deciding, and from nothing else.
func TestUnreadyUntilPoliciesLoad(t *testing.T) {
	c := newConfig(t)
	file := filepath.Join(c.Policy.Path, "writ.rego")
	if err := os.WriteFile(file, []byte("package"), 0o600); err != nil {
		t.Fatal(err)
	}
	c.Policy.Reload = 10 * time.Millisecond
	s, stop := start(t, c)
	defer func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	}()
	ready := "http://" + s.OpsAddr().String() + "/readyz"
	if status, body := get(t, ready); status != http.StatusServiceUnavailable || !strings.Contains(body, "no policies") {
		t.Errorf("ready: %d %s", status, body)
	}
	res, err := http.Post("http://"+s.Addr().String()+"/revocations", "application/json", strings.NewReader(`{"all":true}`))
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != http.StatusUnauthorized { // it works, for operators
		t.Errorf("the kill switch answers %d", res.StatusCode)
	}
	if err := os.WriteFile(file, []byte(smallPolicy), 0o600); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if status, _ := get(t, ready); status == http.StatusOK {
			return
		}
		if time.Now().After(end) {
			t.Fatal("never ready after the policies were mended")
		}
	}
}
