package crash

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// rules let an agent read (with a credential), be denied, pay up to a budget, and ask
// a person.
const rules = `package writ

budget := 5

decision := verdict[input.intent.action]

credential := {"minter": "crm", "ttl": "5m", "scope": {"scopes": ["crm:read"]}}

verdict["read"] := {"effect": "allow", "reasons": [{"code": "ok", "message": "Fine"}], "credential": credential}

verdict["refuse"] := {"effect": "deny", "reasons": [{"code": "no", "message": "Never"}]}

paid := object.get(input.session.counters, "paid", 0)

verdict["pay"] := {
	"effect": "allow", "reasons": [{"code": "pay", "message": "Within the budget"}],
	"credential": credential, "counters": {"paid": 1},
} if paid < budget

verdict["pay"] := {"effect": "deny", "reasons": [{"code": "over_budget", "message": "Enough"}]} if paid >= budget

verdict["query"] := {
	"effect": "allow", "reasons": [{"code": "ok", "message": "Fine"}],
	"credential": {"minter": "db", "ttl": "6s", "scope": {"groups": ["app_ro"]}},
}

verdict["ask"] := {
	"effect": "require_ciba", "reasons": [{"code": "ask", "message": "Ask first"}],
	"approval": [{"code": "ask", "approver": "user", "display": "summary", "message": "Do it"}],
} if count(object.get(input, "approvals", [])) == 0

verdict["ask"] := {"effect": "allow", "reasons": [{"code": "asked", "message": "Agreed"}], "credential": credential} if {
	count(input.approvals) > 0
}
`

// budget is how often a session may pay.
const budget = 5

// site is one Writ: a store, and the replicas that share it.
type site struct {
	t        testing.TB
	dir      string
	store    string // URL
	minters  string // of the configuration
	is       *issuer
	replicas []*replica
}

// newSite writes what n replicas on a store need; they are not started. A store of ""
// is SQLite in a folder of its own.
func newSite(t testing.TB, store string, n int, settings ...string) *site {
	t.Helper()
	s := &site{t: t, dir: t.TempDir(), store: store, is: newIssuer(t)}
	s.minters = "minters: {crm: {max_ttl: 5m, jwt: {audience: 'urn:crm:api', scopes: [crm:read]}}}"
	if store == "" {
		s.store = "sqlite:" + filepath.Join(s.dir, "data", "writ.db")
	}
	key := make([]byte, 32)
	_, _ = rand.Read(key) // never fails (crypto/rand)
	s.write("root.key", base64.StdEncoding.EncodeToString(key))
	s.write("ciba.secret", "test-only")
	s.write("jwks.json", string(s.is.jwks))
	s.write("policies/writ.rego", rules)
	for i := range n {
		s.add(fmt.Sprint("r", i), settings...)
	}
	return s
}

// add installs one more replica.
func (s *site) add(name string, settings ...string) *replica {
	s.t.Helper()
	r := &replica{
		t: s.t, name: name, binary: binary, config: filepath.Join(s.dir, name+".yaml"), copies: filepath.Join(s.dir, name+".checkpoints"),
		url: fmt.Sprintf("http://127.0.0.1:%d", freePort(s.t)), ops: fmt.Sprintf("http://127.0.0.1:%d", freePort(s.t)),
		out: &buffer{},
	}
	s.write(name+".yaml", strings.Join(append([]string{
		"listen: " + strings.TrimPrefix(r.url, "http://"),
		"ops_listen: " + strings.TrimPrefix(r.ops, "http://"),
		"external_url: https://writ.test",
		"store: " + s.store,
		"root_key_file: root.key",
		"policy: {path: policies, deadline: 5s}", // a loaded machine must not turn an allow into policy_timeout
		"approvals: {max_pending: 1000}",
		"audit: {copies: {every: 100ms, file: " + r.copies + "}}",
		"issuers: [{issuer: '" + s.is.url + "', speaks_for: [user, agent], audience: '" + audience + "', algorithms: [ES256], jwks_file: jwks.json,",
		"  ciba: {client_id: " + cibaClient + ", client_secret_file: ciba.secret, binding_message: {max_length: 200, charset: text}}}]",
		s.minters,
	}, settings...), "\n"))
	s.replicas = append(s.replicas, r)
	s.t.Cleanup(func() {
		r.kill()
		if s.t.Failed() {
			s.t.Logf("%s said:\n%s", r.name, r.out.tail())
		}
	})
	return r
}

func (s *site) write(name, text string) {
	s.t.Helper()
	path := filepath.Join(s.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text+"\n"), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// start starts all replicas, one after the other, and waits until they are ready.
func (s *site) start() {
	s.t.Helper()
	for _, r := range s.replicas {
		r.start()
	}
}

// stop stops all replicas as an operator does.
func (s *site) stop() {
	s.t.Helper()
	for _, r := range s.replicas {
		r.stop()
	}
}

// replica is one process of Writ, which comes and goes.
type replica struct {
	t         testing.TB
	name      string
	binary    string
	config    string
	copies    string // where it copies checkpoints to
	url, ops  string // of the API, and of /livez, /readyz and /metrics
	tolerates bool   // errors in its log are what the test is about
	out       *buffer

	mu   sync.Mutex
	cmd  *exec.Cmd
	gone chan struct{} // closed once it has ended
}

// launch starts the process, which ends with this one, however that ends.
func (r *replica) launch() {
	r.t.Helper()
	cmd := exec.Command(r.binary, "serve", "--config", r.config)
	cmd.Stdout, cmd.Stderr = r.out, r.out
	tieToUs(cmd)
	started, gone := make(chan error), make(chan struct{})
	go func() {
		// The tie is to the thread that started it, which therefore must live on.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // read from ProcessState
		}
		close(gone)
	}()
	if err := <-started; err != nil {
		r.t.Fatal(err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cmd, r.gone = cmd, gone
}

// start launches the process and waits until it is ready.
func (r *replica) start() {
	r.t.Helper()
	r.launch()
	within(r.t, 60*time.Second, func() error {
		select {
		case <-r.ended():
			r.t.Fatalf("%s ended with %d:\n%s", r.name, r.cmd.ProcessState.ExitCode(), r.out.tail())
		default:
		}
		return r.ready()
	})
}

// ready is nil if it says so.
func (r *replica) ready() error {
	status, _, err := r.probe("/readyz", 2*time.Second)
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("%s: readyz %d", r.name, status)
	}
	return err
}

// probe looks at a path for operations.
func (r *replica) probe(path string, timeout time.Duration) (status int, body string, err error) {
	return get(r.ops+path, timeout)
}

func get(url string, timeout time.Duration) (status int, body string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, "", err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	return res.StatusCode, string(text), err
}

// ended is closed once the present process has ended.
func (r *replica) ended() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.gone
}

func (r *replica) running() bool {
	select {
	case <-r.ended():
		return false
	default:
		return true
	}
}

func (r *replica) pid() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.cmd.Process.Pid
}

// kill ends the process at once, and reports whether it ran.
func (r *replica) kill() bool {
	r.mu.Lock()
	cmd, gone := r.cmd, r.gone
	r.mu.Unlock()
	if cmd == nil {
		return false
	}
	killed := cmd.Process.Kill() == nil
	<-gone
	return killed
}

// stop ends the process as an operator does, and holds it to a clean end.
func (r *replica) stop() {
	r.t.Helper()
	_ = r.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-r.ended():
	case <-time.After(30 * time.Second):
		r.kill()
		r.t.Errorf("%s did not stop", r.name)
	}
	if code := r.cmd.ProcessState.ExitCode(); code != 0 {
		r.t.Errorf("%s ended with %d", r.name, code)
	}
	if errs := r.out.lines(`"level":"ERROR"`); len(errs) > 0 && !r.tolerates {
		r.t.Errorf("%s logged %d errors, the first: %s", r.name, len(errs), errs[0])
	}
}

// buffer holds the last of what processes wrote, and is safe to read meanwhile.
type buffer struct {
	mu sync.Mutex
	b  []byte
}

const bufferSize = 1 << 20

// Write implements io.Writer.
func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.b = append(b.b, p...)
	if n := len(b.b) - bufferSize; n > bufferSize/2 { // not at each line
		b.b = append([]byte(nil), b.b[n:]...)
	}
	return len(p), nil
}

// bytes is all that is kept.
func (b *buffer) bytes() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]byte(nil), b.b...)
}

// lines returns those with a text in them.
func (b *buffer) lines(with string) (out []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for l := range strings.Lines(string(b.b)) {
		if strings.Contains(l, with) {
			out = append(out, l)
		}
	}
	return out
}

// tail is what helps after a failure: the last lines that are no mere decisions.
func (b *buffer) tail() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []string
	for l := range strings.Lines(string(b.b)) {
		if !strings.Contains(l, `"msg":"decision"`) {
			out = append(out, l)
		}
	}
	return strings.Join(out[max(0, len(out)-20):], "")
}
