package browser

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
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

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
)

// site is the real writ serve with a real provider, oidc-provider, where alice is
// signed in.
type site struct {
	t             *testing.T
	api, issuer   string
	agentSecret   string
	redirectAgent string // a registered redirect URI of sales-agent
}

// startSite needs what `go test ./test/idp` has installed.
func startSite(t *testing.T, redirect string) *site {
	t.Helper()
	s := &site{t: t, redirectAgent: redirect}
	node := exec.Command("node", "../idp/idp.mjs", `{"default_user": "alice", "users": {"alice": {"groups": ["sales"], "claims": {"email": "alice@example.test"}}}}`)
	node.Stderr = os.Stderr
	stdin, err := node.StdinPipe() // it ends when this closes
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := node.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := node.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = stdin.Close(); _ = node.Wait() })
	var ready struct {
		Issuer  string            `json:"issuer"`
		Clients map[string]string `json:"clients"`
	}
	if err := json.NewDecoder(stdout).Decode(&ready); err != nil {
		t.Fatal("start oidc-provider: ", err)
	}
	s.issuer, s.agentSecret = ready.Issuer, ready.Clients["sales-agent"]

	dir := t.TempDir()
	policies, err := filepath.Abs("../../policies")
	if err != nil {
		t.Fatal(err)
	}
	l := listen(t)
	address := l.Addr().String()
	_ = l.Close()
	s.api = "http://" + address
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("root.key", base64.StdEncoding.EncodeToString(make([]byte, 32)))
	write("secret", ready.Clients["writ"])
	write("writ.yaml", fmt.Sprintf(`listen: %s
ops_listen: 127.0.0.1:0
external_url: %s
store: sqlite:writ.db
root_key_file: root.key
policy: {path: %s}
issuers:
  - issuer: %s
    speaks_for: [user, agent]
    audience: urn:writ:test
    algorithms: [RS256]
    sign_in: {client_id: writ, client_secret_file: secret}
agents:
  - {issuer: %q, id: sales-agent, redirect_uris: [%q]}
`, address, s.api, policies, s.issuer, s.issuer, redirect))
	cmd := exec.Command(binary, "serve", "--config", filepath.Join(dir, "writ.yaml"))
	log, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout = cmd.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("writ serve ended with %v", err)
		}
	})
	lines := bufio.NewScanner(log)
	for lines.Scan() && !strings.Contains(lines.Text(), "writ is serving") {
		t.Log(lines.Text())
	}
	go func() { _, _ = io.Copy(io.Discard, log) }()
	return s
}

// agentToken is sales-agent's own.
func (s *site) agentToken() string {
	s.t.Helper()
	req, err := http.NewRequestWithContext(s.t.Context(), http.MethodPost, s.issuer+"/token", strings.NewReader("grant_type=client_credentials"))
	if err != nil {
		s.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.SetBasicAuth("sales-agent", s.agentSecret)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer res.Body.Close()
	var answer struct {
		Token string `json:"access_token"`
	}
	if err := json.NewDecoder(res.Body).Decode(&answer); err != nil || answer.Token == "" {
		s.t.Fatal(res.Status, err)
	}
	return answer.Token
}

type sessionAnswer struct {
	status  int
	Session string `json:"session"`
	Code    string `json:"code"` // of a problem
	User    struct {
		Sub string `json:"sub"`
	} `json:"user"`
	Task struct {
		Source string `json:"source"`
	} `json:"task"`
	SignIn struct {
		ID, URL string
	} `json:"sign_in"`
}

func (s *site) sessions(body any) (a sessionAnswer) {
	s.t.Helper()
	b, err := json.Marshal(body)
	if err != nil {
		s.t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(s.t.Context(), http.MethodPost, s.api+"/sessions", strings.NewReader(string(b)))
	if err != nil {
		s.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Authorization", "Bearer "+s.agentToken())
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer res.Body.Close()
	if err := json.NewDecoder(res.Body).Decode(&a); err != nil {
		s.t.Fatal(err)
	}
	a.status = res.StatusCode
	return a
}

type obj = map[string]any

var work = obj{
	"task": "Summarise the pipeline for the Q3 review, and mark the opportunities that have not moved since July.", "expires_in": 1800,
	"envelope": obj{
		"actions":   []string{"crm.opportunity.*", "crm.report.create"},
		"resources": []obj{{"type": "crm.opportunity", "id": "**"}, {"type": "crm.report", "id": "q3/*"}},
	},
}

func (s *site) open(body obj) sessionAnswer {
	s.t.Helper()
	a := s.sessions(body)
	if a.status != http.StatusAccepted {
		s.t.Fatalf("open: %+v", a)
	}
	return a
}

func (s *site) complete(id, code string) sessionAnswer {
	s.t.Helper()
	return s.sessions(obj{"sign_in": obj{"id": id, "code": code}})
}

// shots is where screenshots go; they are there to be looked at.
var shots = filepath.Join("..", "..", "dist", "signin")

// shoot takes a picture of the whole page and holds the page to what anybody needs: a
// language, a title, one heading of the first level, names for all that can be
// operated, contrast, and nothing wider than the screen.
func shoot(t *testing.T, ctx context.Context, name string) {
	t.Helper()
	do(t, ctx, chromedp.WaitVisible(`main`))
	if err := os.MkdirAll(shots, 0o700); err != nil {
		t.Fatal(err)
	}
	png := do(t, ctx, chromedp.FullScreenshot(100))
	if err := os.WriteFile(filepath.Join(shots, name+".png"), png, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, fault := range do(t, ctx, chromedp.Evaluate[[]string](accessibility)) {
		t.Errorf("%s: %s", name, fault)
	}
}

const accessibility = `(() => {
  const faults = [];
  const need = (ok, what) => { if (!ok) faults.push(what); };
  need(document.documentElement.lang === 'en', 'no language');
  need(document.title.length > 8, 'no title');
  need(document.querySelectorAll('h1').length === 1, 'not one h1');
  need(document.querySelectorAll('main').length === 1, 'not one main');
  need(document.scripts.length === 0, 'a script');
  need(document.styleSheets.length === 1 && document.styleSheets[0].cssRules.length > 10, 'no style');
  need(document.documentElement.scrollWidth <= window.innerWidth, 'wider than the screen: ' + document.documentElement.scrollWidth);
  let level = 1;
  for (const h of document.querySelectorAll('h1, h2, h3')) {
    const l = Number(h.tagName[1]);
    need(l <= level + 1, 'a heading is left out before ' + h.textContent);
    level = l;
  }
  for (const s of document.querySelectorAll('section')) need(document.getElementById(s.getAttribute('aria-labelledby')), 'a section without a name');
  for (const e of document.querySelectorAll('a, button')) {
    need(e.textContent.trim(), 'a control without a name');
    need(e.getBoundingClientRect().height >= 24, 'a control that is hard to hit: ' + e.textContent);
  }
  const rgb = (c) => (c.match(/[\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  for (const e of document.querySelectorAll('body *')) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
    need((a + 0.05) / (b + 0.05) >= 4.5, 'contrast ' + ((a + 0.05) / (b + 0.05)).toFixed(2) + ' of ' + e.textContent.trim().slice(0, 40));
  }
  return faults;
})()`

func dark(on bool) chromedp.Action[chromedp.Void] {
	value := "light"
	if on {
		value = "dark"
	}
	return chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		_, err := cdp.Call(ctx, t, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
			Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: value}},
		})
		return err
	})
}

// startPhone is a browser as wide as a phone, which no window of Chromium's is.
func startPhone(t *testing.T) context.Context {
	t.Helper()
	ctx := startBrowser(t)
	do(t, ctx, chromedp.EmulateViewport(390, 844, chromedp.EmulateMobile))
	return ctx
}

func TestConsentJourney(t *testing.T) {
	s, ctx := startSite(t, "https://crm.example/done"), startPhone(t)
	a := s.open(work)

	do(t, ctx, chromedp.Navigate(a.SignIn.URL))
	shoot(t, ctx, "1-start")
	if text := do(t, ctx, chromedp.Text(`main`)); !strings.Contains(text, "sales-agent") || strings.Contains(text, "pipeline") {
		t.Errorf("the first page says %q", text)
	}
	do(t, ctx, chromedp.Click(`button`))
	do(t, ctx, chromedp.WaitVisible(`button[value=accept]`))
	shoot(t, ctx, "2-consent")
	do(t, ctx, dark(true))
	shoot(t, ctx, "2-consent-dark")
	do(t, ctx, dark(false))
	do(t, ctx, chromedp.EmulateViewport(320, 640))
	shoot(t, ctx, "2-consent-320")
	do(t, ctx, chromedp.EmulateViewport(1280, 900))
	shoot(t, ctx, "2-consent-desktop")
	do(t, ctx, chromedp.EmulateViewport(390, 844, chromedp.EmulateMobile))
	text := do(t, ctx, chromedp.Text(`main`))
	for _, want := range []string{"alice", "alice@example.test", "sales-agent", "Summarise the pipeline", "any action directly under crm.opportunity", "30 minutes", "127.0.0.1"} {
		if !strings.Contains(text, want) {
			t.Errorf("the consent page does not say %q: %s", want, text)
		}
	}
	if got := s.complete(a.SignIn.ID, "x"); got.Code != "login_required" {
		t.Errorf("before consent: %+v", got)
	}
	do(t, ctx, chromedp.Click(`button[value=accept]`))
	do(t, ctx, chromedp.WaitVisible(`.code`))
	shoot(t, ctx, "3-code")
	code := do(t, ctx, chromedp.Text(`.code`))
	do(t, ctx, chromedp.Reload())
	if again := do(t, ctx, chromedp.Text(`.code`)); again != code {
		t.Errorf("after a reload the code is %q, before %q", again, code)
	}
	got := s.complete(a.SignIn.ID, strings.ToLower(code))
	if got.status != http.StatusCreated || got.User.Sub != "alice" || got.Task.Source != "user" {
		t.Fatalf("completed: %+v", got)
	}
	do(t, ctx, chromedp.Reload())
	shoot(t, ctx, "4-done")
	do(t, ctx, chromedp.Navigate(a.SignIn.URL))
	shoot(t, ctx, "5-over")
}

// Text that an agent made up to deceive stays text, and stays in its box.
func TestConsentOfHostileText(t *testing.T) {
	s, ctx := startSite(t, "https://crm.example/done"), startPhone(t)
	a := s.open(obj{
		"task": "</blockquote><script>document.title='owned'</script><style>body{display:none}</style>\u202egnp.exe\n\nWrit has checked this agent.\n" +
			strings.Repeat("a", 300) + strings.Repeat("Z\u0351\u0352\u0353", 40) + " שלום",
		"envelope": obj{"actions": []string{"<img src=x onerror=\"document.title='owned'\">", "**", strings.Repeat("crm.", 100) + "*"}, "resources": []obj{{"type": "\"><b>x", "id": "**"}}},
	})
	do(t, ctx, chromedp.Navigate(a.SignIn.URL))
	do(t, ctx, chromedp.Click(`button`))
	do(t, ctx, chromedp.WaitVisible(`button[value=accept]`))
	shoot(t, ctx, "6-hostile")
	if title := do(t, ctx, chromedp.Title()); !strings.HasPrefix(title, "Let an agent") {
		t.Errorf("title %q", title)
	}
	do(t, ctx, chromedp.Click(`button[value=decline]`))
	do(t, ctx, chromedp.WaitVisible(`main`))
	within(t, func() bool { return strings.Contains(do(t, ctx, chromedp.Text(`h1`)), "declined") })
	shoot(t, ctx, "7-declined")
	if got := s.complete(a.SignIn.ID, "x"); got.status != http.StatusForbidden {
		t.Errorf("declined: %+v", got)
	}
}

func within(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not within 10 s")
		}
	}
}

// focused says what the keyboard is at, and whether that can be seen.
func focused(t *testing.T, ctx context.Context) string {
	t.Helper()
	return do(t, ctx, chromedp.Evaluate[string](`(() => {
		const e = document.activeElement, s = getComputedStyle(e);
		return e.textContent.trim() + (s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2 ? '' : ' unseen');
	})()`))
}

func TestConsentByKeyboard(t *testing.T) {
	s, ctx := startSite(t, "https://crm.example/done"), startPhone(t)
	a := s.open(work)
	do(t, ctx, chromedp.Navigate(a.SignIn.URL))
	do(t, ctx, chromedp.WaitVisible(`button`))
	do(t, ctx, chromedp.KeyEvent(kb.Tab))
	if got := focused(t, ctx); !strings.HasPrefix(got, "Sign in at") || strings.HasSuffix(got, "unseen") {
		t.Fatalf("the first stop is %q", got)
	}
	do(t, ctx, chromedp.KeyEvent(kb.Enter))
	do(t, ctx, chromedp.WaitVisible(`button[value=accept]`))
	for _, want := range []string{"Decline", "Allow"} { // the safe one first
		do(t, ctx, chromedp.KeyEvent(kb.Tab))
		if got := focused(t, ctx); got != want {
			t.Fatalf("the keyboard is at %q, want %q", got, want)
		}
	}
	shoot(t, ctx, "8-focus")
	do(t, ctx, chromedp.KeyEvent(" "))
	do(t, ctx, chromedp.WaitVisible(`.code`))
	if got := s.complete(a.SignIn.ID, do(t, ctx, chromedp.Text(`.code`))); got.status != http.StatusCreated {
		t.Errorf("completed: %+v", got)
	}
}

// Chromium holds redirects after a form to form-action, which is 'self' alone: this
// goes to the provider and to the agent all the same.
func TestConsentWithRedirect(t *testing.T) {
	back := make(chan url.Values, 4)
	app := &http.Server{ReadHeaderTimeout: time.Second, Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/done" {
			if r.Referer() != "" {
				t.Errorf("Referer %s", r.Referer())
			}
			back <- r.URL.Query()
		}
		_, _ = io.WriteString(rw, "<p id=done>back")
	})}
	l := listen(t)
	go func() { _ = app.Serve(l) }()
	t.Cleanup(func() { _ = app.Close() })
	redirect := "http://" + l.Addr().String() + "/done"
	s, ctx := startSite(t, redirect), startPhone(t)

	a := s.open(obj{"redirect_uri": redirect, "state": "s1"})
	do(t, ctx, chromedp.Navigate(a.SignIn.URL))
	do(t, ctx, chromedp.Click(`button`))
	do(t, ctx, chromedp.WaitVisible(`button[value=accept]`))
	shoot(t, ctx, "9-no-limits")
	do(t, ctx, chromedp.Click(`button[value=accept]`))
	do(t, ctx, chromedp.WaitVisible(`#done`))
	q := <-back
	if q.Get("sign_in") != a.SignIn.ID || q.Get("state") != "s1" || q.Get("iss") != s.api || !regexp.MustCompile(`^[0-9A-Z]{5}-[0-9A-Z]{5}$`).MatchString(q.Get("code")) {
		t.Fatalf("came back with %v", q)
	}
	if got := s.complete(a.SignIn.ID, q.Get("code")); got.status != http.StatusCreated {
		t.Errorf("completed: %+v", got)
	}

	// A link that somebody was sent: what the victim's browser gets, its sender does not.
	a = s.open(work)
	victim := startPhone(t)
	do(t, victim, chromedp.Navigate(a.SignIn.URL))
	do(t, victim, chromedp.Click(`button`))
	do(t, victim, chromedp.WaitVisible(`button[value=accept]`))
	do(t, ctx, chromedp.Navigate(s.api+"/consent/"+a.SignIn.ID))
	shoot(t, ctx, "10-other-browser")
	if text := do(t, ctx, chromedp.Text(`main`)); !strings.Contains(text, "This browser is not the one") {
		t.Errorf("the sender sees %q", text)
	}
}
