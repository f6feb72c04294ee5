package e2e

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/writsec/writ/test/idp"
)

// buffer is safe to read while a process writes to it.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// command runs writ to its end.
func command(t testing.TB, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := exec.Command(binary, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	timer := time.AfterFunc(30*time.Second, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	err := cmd.Run()
	if _, ended := errors.AsType[*exec.ExitError](err); err != nil && !ended {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// writ is one installation: a folder with configuration, secrets and store. Its
// process comes and goes.
type writ struct {
	t   testing.TB
	dir string
	idp *idp.IdP
	// since is when it was installed, to the millisecond that the provider counts in.
	since time.Time
	url   string // of the API
	ops   string // of /livez, /readyz and /metrics
	http  *http.Client

	cmd    *exec.Cmd
	exited chan struct{}
	out    *buffer // all runs
	errs   *buffer // all runs
	// tolerant: errors in the log are what the test is about.
	tolerant bool
}

// settings is a configuration file as a tree.
type settings map[string]any

// set puts a value at a dotted path; a number picks an element of a list.
func (s settings) set(path string, value any) {
	var node any = map[string]any(s)
	parts := strings.Split(path, ".")
	for i, part := range parts {
		last := i == len(parts)-1
		switch n := node.(type) {
		case map[string]any:
			if last {
				n[part] = value
				return
			}
			if n[part] == nil {
				n[part] = map[string]any{}
			}
			node = n[part]
		case []any:
			var index int
			if _, err := fmt.Sscan(part, &index); err != nil {
				panic(path)
			}
			node = n[index]
		default:
			panic(path)
		}
	}
}

// with is a change to the configuration.
func with(path string, value any) func(settings) {
	return func(s settings) { s.set(path, value) }
}

// install writes everything that Writ needs into a fresh folder. The policies are
// the sample ones without their tests, which take seconds under the race detector.
func install(t testing.TB, p *idp.IdP, changes ...func(settings)) *writ {
	t.Helper()
	port := freePorts(t, 2)
	w := &writ{
		t: t, dir: t.TempDir(), idp: p, since: time.Now().Truncate(time.Millisecond),
		url: fmt.Sprintf("http://127.0.0.1:%d", port), ops: fmt.Sprintf("http://127.0.0.1:%d", port+1),
		http: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 16}, Timeout: time.Minute},
		out:  &buffer{}, errs: &buffer{},
	}
	key := make([]byte, 32)
	_, _ = rand.Read(key) // never fails (crypto/rand)
	w.write("root.key", base64.StdEncoding.EncodeToString(key)+"\n")
	w.write("ciba.secret", p.Clients[idp.Writ]+"\n")

	minters, services := map[string]any{}, []any{}
	for name, scopes := range map[string][]string{
		"crm": {"crm:read", "crm:write"}, "hr": {"hr:onboard", "hr:offboard"}, "payments": {"payments:create"},
	} {
		w.write(name+".secret", secretOf(name)+"\n")
		minters[name] = map[string]any{
			"max_ttl": "5m",
			"jwt":     map[string]any{"audience": audience(name), "scopes": scopes, "checks": "introspection", "enforces_details": true},
		}
		services = append(services, map[string]any{"id": name + "-api", "secret_file": name + ".secret", "audience": audience(name)})
	}
	s := settings{
		"listen": strings.TrimPrefix(w.url, "http://"), "ops_listen": strings.TrimPrefix(w.ops, "http://"), "external_url": w.url,
		"store": "sqlite:data/writ.db", "root_key_file": "root.key",
		// A loaded machine must not turn an allow into policy_timeout.
		"policy":    map[string]any{"path": "policies", "deadline": "5s"},
		"approvals": map[string]any{"max_pending": 50},
		"issuers": []any{map[string]any{
			"issuer": p.Issuer, "speaks_for": []string{"user", "agent", "operator"}, "audience": p.Resource, "algorithms": []string{"RS256"},
			"operator": map[string]any{"claim": "groups", "value": "writ-operators", "clients": []string{opsConsole}},
			"ciba": map[string]any{
				"client_id": idp.Writ, "client_secret_file": "ciba.secret",
				"binding_message": map[string]any{"max_length": 128, "charset": "text"},
			},
		}},
		"minters": minters, "services": services,
	}
	for _, change := range changes {
		change(s)
	}
	if s["policy"].(map[string]any)["path"] == "policies" {
		w.copyPolicies()
	}
	text, err := yaml.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	w.write("writ.yaml", string(text))
	t.Cleanup(func() {
		if w.running() {
			w.stop()
		}
		w.http.CloseIdleConnections()
		if t.Failed() {
			t.Logf("writ said:\n%s%s", w.out, w.errs)
		}
	})
	return w
}

// start installs Writ and runs it.
func start(t testing.TB, p *idp.IdP, changes ...func(settings)) *writ {
	t.Helper()
	w := install(t, p, changes...)
	w.start()
	return w
}

// in is w for a subtest: what fails there fails the subtest.
func (w *writ) in(t testing.TB) *writ {
	c := *w
	c.t = t
	return &c
}

func audience(minter string) string { return "urn:" + minter + ":api" }

func secretOf(minter string) string { return "test-only-secret-of-" + minter }

// samplePolicies is the folder of the policies that ship with Writ.
func samplePolicies(t testing.TB) string {
	t.Helper()
	dir, err := filepath.Abs(filepath.Join("..", "..", "policies"))
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func (w *writ) path(name string) string { return filepath.Join(w.dir, name) }

func (w *writ) write(name, content string) {
	w.t.Helper()
	if err := os.MkdirAll(filepath.Dir(w.path(name)), 0o700); err != nil {
		w.t.Fatal(err)
	}
	if err := os.WriteFile(w.path(name), []byte(content), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

func (w *writ) copyPolicies() {
	w.t.Helper()
	from := samplePolicies(w.t)
	err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.HasSuffix(path, "_test.rego") {
			return err
		}
		name, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		data, err := os.ReadFile(path)
		w.write(filepath.Join("policies", name), string(data))
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

// launch starts the process without waiting for it to serve.
func (w *writ) launch() {
	w.t.Helper()
	w.cmd = exec.Command(binary, "serve", "--config", w.path("writ.yaml"))
	w.cmd.Stdout, w.cmd.Stderr = w.out, w.errs
	if err := w.cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	w.exited = make(chan struct{})
	go func(cmd *exec.Cmd, exited chan struct{}) {
		_ = cmd.Wait() // read from ProcessState
		close(exited)
	}(w.cmd, w.exited)
}

// start launches Writ and waits until it is ready.
func (w *writ) start() {
	w.t.Helper()
	w.launch()
	within(w.t, 30*time.Second, func() error {
		select {
		case <-w.exited:
			w.t.Fatalf("writ ended with %d", w.cmd.ProcessState.ExitCode())
		default:
		}
		res, err := w.http.Get(w.ops + "/readyz")
		if err != nil {
			return err
		}
		defer res.Body.Close()
		if res.StatusCode != http.StatusOK {
			return fmt.Errorf("readyz %d", res.StatusCode)
		}
		return nil
	})
}

func (w *writ) running() bool {
	if w.cmd == nil {
		return false
	}
	select {
	case <-w.exited:
		return false
	default:
		return true
	}
}

func (w *writ) signal(s os.Signal) {
	w.t.Helper()
	if err := w.cmd.Process.Signal(s); err != nil {
		w.t.Error(err)
	}
}

// wait waits for the process to end.
func (w *writ) wait(d time.Duration) int {
	w.t.Helper()
	select {
	case <-w.exited:
	case <-time.After(d):
		_ = w.cmd.Process.Kill()
		<-w.exited
		w.t.Errorf("writ did not end within %v", d)
	}
	return w.cmd.ProcessState.ExitCode()
}

// stop ends Writ as an operator does, and holds it to a clean end: exit code 0,
// which the race detector turns into another, and nothing in the log to worry about.
func (w *writ) stop() {
	w.t.Helper()
	w.signal(syscall.SIGTERM)
	if code := w.wait(15 * time.Second); code != 0 {
		w.t.Errorf("writ ended with %d", code)
	}
	if errs := w.errs.String(); errs != "" {
		w.t.Errorf("writ wrote to its standard error: %s", errs)
	}
	last := ""
	for _, l := range w.log() {
		last = l.Message
		if !w.tolerant && l.Level == "ERROR" {
			w.t.Errorf("writ logged an error: %s: %s", l.Message, l.Error)
		}
	}
	if last != "writ has stopped" {
		w.t.Errorf("the last line of the log is %q", last)
	}
}

// kill ends Writ as a power cut does.
func (w *writ) kill() {
	w.t.Helper()
	w.signal(syscall.SIGKILL)
	w.wait(10 * time.Second)
}

// line is one line of the log.
type line struct {
	Level     string `json:"level"`
	Message   string `json:"msg"`
	Error     string `json:"error"`
	RequestID string `json:"request_id"`
	Decision  string `json:"decision"`
	Code      string `json:"code"`
}

// log is what Writ logged, all of it JSON.
func (w *writ) log() []line {
	w.t.Helper()
	var lines []line
	for text := range strings.Lines(w.out.String()) {
		if !strings.HasSuffix(text, "\n") {
			break // being written, or cut off by a kill
		}
		var l line
		if err := json.Unmarshal([]byte(text), &l); err != nil {
			w.t.Errorf("a line of the log is not JSON: %q", text)
		}
		lines = append(lines, l)
	}
	return lines
}

// logged counts the lines with a message.
func (w *writ) logged(message string) int {
	n := 0
	for _, l := range w.log() {
		if l.Message == message {
			n++
		}
	}
	return n
}

// metric is the value of one series, 0 where it does not exist.
func (w *writ) metric(series string) float64 {
	w.t.Helper()
	r := client{w, ""}.call(http.MethodGet, w.ops+"/metrics", nil)
	for l := range strings.Lines(string(r.body)) {
		if rest, ok := strings.CutPrefix(l, series+" "); ok {
			var v float64
			if _, err := fmt.Sscan(rest, &v); err != nil {
				w.t.Fatal(err)
			}
			return v
		}
	}
	return 0
}
