// Package browser drives Writ's pages in a real Chromium. It is a module of its
// own, so that what drives the browser stays out of Writ's dependencies.
package browser

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
)

// binary is the real writ, built once.
var binary string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "writ-browser-")
	if err != nil {
		panic(err)
	}
	binary = filepath.Join(dir, "writ")
	build := exec.Command("go", "build", "-o", binary, "./cmd/writ")
	build.Dir = "../.."
	if out, err := build.CombinedOutput(); err != nil {
		panic(string(out))
	}
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// writ is a running `writ dev`.
type writ struct{ api, idp string }

var printed = regexp.MustCompile(`(?m)^  (API|OpenID provider) +(http://\S+)`)

func startWrit(t *testing.T) writ {
	t.Helper()
	cmd := exec.Command(binary, "dev", "--port", "0", "--dir", t.TempDir())
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("writ dev ended with %v", err)
		}
	})
	var w writ
	lines := bufio.NewScanner(out)
	for lines.Scan() && (w.api == "" || w.idp == "") {
		if m := printed.FindStringSubmatch(lines.Text()); m != nil && m[1] == "API" {
			w.api = m[2]
		} else if m != nil {
			w.idp = m[2]
		}
	}
	if w.idp == "" {
		t.Fatal("writ dev did not say where it is")
	}
	go func() { _, _ = io.Copy(io.Discard, out) }()
	return w
}

func startBrowser(t *testing.T) context.Context {
	t.Helper()
	chromium, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatal("install Debian's chromium: ", err)
	}
	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(chromium), chromedp.NoSandbox,
		chromedp.WindowSize(390, 844), chromedp.Flag("disable-quic", true))
	ctx, cancelAllocator := chromedp.NewExecAllocator(t.Context(), options...)
	ctx, cancelTab := chromedp.NewContext(ctx)
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	t.Cleanup(func() { cancel(); cancelTab(); cancelAllocator() })
	return ctx
}

// do runs one step in the browser.
func do[T any](t *testing.T, ctx context.Context, step chromedp.Action[T]) T {
	t.Helper()
	v, err := chromedp.Run(ctx, step)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func (w writ) token(t *testing.T, query string) string {
	t.Helper()
	res, err := http.Get(w.idp + "/dev/token?" + query)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatal(res.Status, string(b), err)
	}
	return string(b)
}

// offboard asks to offboard an employee and waits for bob's answer.
func (w writ) offboard(t *testing.T, employee string) <-chan string {
	t.Helper()
	body := `{"intent":{"action":"hr.employee.offboard"},"resource":{"type":"hr.employee","id":"` + employee + `"}}`
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, w.api+"/decide", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Prefer", "wait=50")
	req.Header.Set("Authorization", "Bearer "+w.token(t, "user=bob&agent=hr-agent"))
	decision := make(chan string, 1)
	go func() {
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			decision <- err.Error()
			return
		}
		defer res.Body.Close()
		var answer struct {
			Decision string `json:"decision"`
		}
		_ = json.NewDecoder(res.Body).Decode(&answer)
		decision <- answer.Decision
	}()
	return decision
}

func TestPhone(t *testing.T) {
	w, ctx := startWrit(t), startBrowser(t)

	approved := w.offboard(t, "e-1001")
	do(t, ctx, chromedp.Navigate(w.idp+"/phone?user=bob")) // which refreshes itself until the prompt is there
	do(t, ctx, chromedp.WaitVisible(`button[value=approve]`))
	message := do(t, ctx, chromedp.Text(`.message`))
	do(t, ctx, chromedp.Click(`button[value=approve]`))
	if !regexp.MustCompile(`^Offboard employee "e-1001" \[hr\.employee\.offboard on hr\.employee "e-1001"\] \(code [A-Z2-9]{4}\)$`).MatchString(message) {
		t.Errorf("the phone shows %q", message)
	}
	if got := <-approved; got != "allow" {
		t.Errorf("after Approve: %s", got)
	}

	// By keyboard alone: Deny stands before Approve.
	denied := w.offboard(t, "e-1002")
	do(t, ctx, chromedp.Navigate(w.idp+"/phone?user=bob"))
	do(t, ctx, chromedp.WaitVisible(`button[value=deny]`))
	do(t, ctx, chromedp.Focus(`button[value=deny]`))
	do(t, ctx, chromedp.KeyEvent(kb.Enter))
	if got := <-denied; got != "deny" {
		t.Errorf("after Deny: %s", got)
	}
}

func TestSignIn(t *testing.T) {
	w, ctx := startWrit(t), startBrowser(t)
	back := make(chan url.Values, 1)
	app := &http.Server{ReadHeaderTimeout: time.Second, Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/callback" {
			back <- r.URL.Query()
		}
		_, _ = io.WriteString(rw, "<p id=done>signed in")
	})}
	l := listen(t)
	go func() { _ = app.Serve(l) }()
	defer app.Close()

	query := url.Values{
		"client_id": {"sales-agent"}, "response_type": {"code"}, "scope": {"openid"}, "state": {"s1"}, "nonce": {"n1"},
		"redirect_uri": {"http://" + l.Addr().String() + "/callback"}, "code_challenge_method": {"S256"},
		"code_challenge": {"E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"},
	}
	do(t, ctx, chromedp.Navigate(w.idp+"/authorize?"+query.Encode()))
	text := do(t, ctx, chromedp.Text(`main`))
	do(t, ctx, chromedp.Click(`button[value=alice]`))
	do(t, ctx, chromedp.WaitVisible(`#done`))
	if !strings.Contains(text, "sales-agent") {
		t.Errorf("the page does not say who asks: %q", text)
	}
	if q := <-back; q.Get("code") == "" || q.Get("state") != "s1" || q.Get("iss") != w.idp {
		t.Errorf("came back with %v", q)
	}
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}
