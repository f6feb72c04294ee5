package httpapi_test

import (
	"html"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"

	"github.com/writsec/writ/internal/storetest"
)

func init() {
	text := func(body io.Reader, _ http.Header, _ *openapi3.SchemaRef, _ openapi3filter.EncodingFn) (any, error) {
		b, err := io.ReadAll(body)
		return string(b), err
	}
	openapi3filter.RegisterBodyDecoder("text/html", text)
	openapi3filter.RegisterBodyDecoder("text/css", text)
}

// tab is a browser that stops at each redirect.
type tab struct {
	jar    http.CookieJar
	client *http.Client
}

func newTab(t *testing.T) *tab {
	t.Helper()
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	return &tab{jar, &http.Client{
		Transport: w.client.Transport, Jar: jar, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// send does what browsers do, holds Writ's pages to the spec and to what every page owes.
func (b *tab) send(t *testing.T, c call) answer {
	t.Helper()
	if c.method == http.MethodPost && c.header == nil {
		c.header = headers("Sec-Fetch-Site", "same-origin", "Origin", "null") // as with Referrer-Policy: no-referrer
	}
	r := c.request(t)
	in := w.find(t, r)
	if in != nil && !c.loose {
		if err := openapi3filter.ValidateRequest(r.Context(), in); (err != nil) != c.invalid {
			t.Errorf("the spec says %v to %s %s", err, c.method, c.path)
		}
		r = c.request(t)
	}
	res, err := b.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	a := answer{status: res.StatusCode, header: res.Header}
	if a.raw, err = io.ReadAll(res.Body); err != nil {
		t.Fatal(err)
	}
	if in == nil {
		return a
	}
	w.check(t, in, a)
	for _, cookie := range res.Cookies() {
		w.secret(cookie.Value, "a cookie")
		if !cookie.HttpOnly || cookie.SameSite != http.SameSiteLaxMode || cookie.Path != "/" || cookie.Secure { // loopback
			t.Errorf("cookie %s", cookie)
		}
	}
	page := string(a.raw)
	if a.status != http.StatusSeeOther {
		for _, owed := range []string{`<html lang="en">`, `<meta name="viewport"`, `<title>`, `<main>`, "<h1>"} {
			if strings.Count(page, owed) != 1 {
				t.Errorf("%s %s has %d %s:\n%s", c.method, c.path, strings.Count(page, owed), owed, page)
			}
		}
	}
	for _, never := range []string{"<script", "javascript:", " style=", " on", "goroutine", "nil pointer"} {
		if m := regexp.MustCompile(`<[^>]*` + regexp.QuoteMeta(never)).FindString(page); m != "" {
			t.Errorf("%s %s holds %s", c.method, c.path, m)
		}
	}
	return a
}

func (b *tab) get(t *testing.T, path string) answer {
	t.Helper()
	return b.send(t, call{method: "GET", path: path})
}

func (b *tab) post(t *testing.T, path string, pairs ...string) answer {
	t.Helper()
	form := url.Values{}
	for i := 0; i < len(pairs); i += 2 {
		form.Add(pairs[i], pairs[i+1])
	}
	return b.send(t, call{method: "POST", path: path, body: form})
}

func (a answer) page(t *testing.T, status int, text string) answer {
	t.Helper()
	if a.status != status || !strings.Contains(string(a.raw), text) {
		t.Errorf("got %d, want %d with %q:\n%s", a.status, status, text, a.raw)
	}
	return a
}

func (a answer) field(name string) string {
	m := regexp.MustCompile(`name="` + name + `" value="([^"]*)"`).FindSubmatch(a.raw)
	if m == nil {
		return ""
	}
	return html.UnescapeString(string(m[1]))
}

func salesAgent(t *testing.T) string { return token(t, "kind=agent&agent=sales-agent") }

// openSignIn returns the id and the path of the link.
func openSignIn(t *testing.T, body obj) (id, path string) {
	t.Helper()
	a := call{method: "POST", path: "/sessions", token: salesAgent(t), body: body}.send(t)
	if a.status != http.StatusAccepted {
		t.Fatalf("open: %d %s", a.status, a.raw)
	}
	path = strings.TrimPrefix(a.str("sign_in", "url"), w.dev.URL)
	w.secret(strings.TrimPrefix(path, "/signin/"), "the token of a link")
	return a.str("sign_in", "id"), path
}

func complete(t *testing.T, id, code string) answer {
	t.Helper()
	return call{method: "POST", path: "/sessions", token: salesAgent(t), body: obj{"sign_in": obj{"id": id, "code": code}}}.send(t)
}

// atProvider signs in at the embedded provider as user ("" cancels), and returns the
// path that leads back to Writ.
func (b *tab) atProvider(t *testing.T, start answer, user string) string {
	t.Helper()
	_, to, ok := strings.Cut(start.header.Get("Refresh"), "url=")
	if !ok || !strings.HasPrefix(to, w.dev.IDP.Issuer()) {
		t.Fatalf("leads to %q", start.header.Get("Refresh"))
	}
	res, err := b.client.Get(to)
	if err != nil {
		t.Fatal(err)
	}
	form := answer{}
	if form.raw, err = io.ReadAll(res.Body); err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	res, err = b.client.PostForm(to, url.Values{"csrf": {form.field("csrf")}, "user": {user}})
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	back, ok := strings.CutPrefix(res.Header.Get("Location"), w.dev.URL)
	if !ok {
		t.Fatalf("the provider answers %s to %s", res.Status, res.Header.Get("Location"))
	}
	return back
}

// toConsent brings a browser to the consent page of a new sign-in.
func (b *tab) toConsent(t *testing.T, body obj) (id string, page answer) {
	t.Helper()
	id, path := openSignIn(t, body)
	back := b.atProvider(t, b.post(t, path), "alice")
	if a := b.get(t, back); a.status != http.StatusSeeOther || a.header.Get("Location") != "/consent/"+id {
		t.Fatalf("%d %v %s", a.status, a.header, a.raw)
	}
	return id, b.get(t, "/consent/"+id).page(t, 200, "Who asks")
}

func TestSignInJourney(t *testing.T) {
	id, path := openSignIn(t, obj{"task": "Tidy <b>the</b> pipeline", "expires_in": 1800,
		"envelope": obj{"actions": []string{"crm.opportunity.*"}, "resources": []obj{{"type": "crm.opportunity", "id": "**"}}}})
	b := newTab(t)
	start := b.get(t, path).page(t, 200, "sales-agent")
	if strings.Contains(string(start.raw), "pipeline") || len(start.header.Values("Set-Cookie")) > 0 {
		t.Errorf("the first page is not inert: %v %s", start.header, start.raw)
	}
	head := b.send(t, call{method: "HEAD", path: path})
	if head.status != http.StatusMethodNotAllowed {
		t.Errorf("HEAD %d", head.status)
	}
	complete(t, id, "x").refused(t, 409, "login_required", "-")

	back := b.atProvider(t, b.post(t, path, "issuer", start.field("issuer")), "alice")
	stranger := newTab(t)
	stranger.get(t, back).page(t, 403, "This browser is not the one")
	if a := b.get(t, back); a.header.Get("Location") != "/consent/"+id {
		t.Fatalf("%d %s", a.status, a.raw)
	}
	b.get(t, back).page(t, 404, "belongs to no sign-in")
	stranger.get(t, "/consent/"+id).page(t, 403, "This browser is not the one")

	consent := b.get(t, "/consent/"+id)
	for _, want := range []string{"sales-agent", "alice", "Tidy &lt;b&gt;the&lt;/b&gt; pipeline", "any action directly under", "every one there is", "30 minutes", "127.0.0.1"} {
		consent.page(t, 200, want)
	}
	stranger.post(t, "/consent/"+id, "form", consent.field("form"), "answer", "accept").page(t, 403, "Nothing was allowed")
	b.post(t, "/consent/"+id, "form", "guessed", "answer", "accept").page(t, 403, "not one that Writ showed")
	complete(t, id, "x").refused(t, 409, "login_required", "-")
	if a := b.post(t, "/consent/"+id, "form", consent.field("form"), "answer", "accept"); a.header.Get("Location") != "/consent/"+id {
		t.Fatalf("%d %s", a.status, a.raw)
	}
	b.post(t, "/consent/"+id, "form", consent.field("form"), "answer", "accept").page(t, 409, "over")
	shown := b.get(t, "/consent/"+id).page(t, 200, "Give it only to the agent")
	code := regexp.MustCompile(`[0-9A-Z]{5}-[0-9A-Z]{5}`).FindString(string(shown.raw))
	w.secret(code, "a code")

	complete(t, id, "00000-00000").refused(t, 400, "invalid_request", "/sign_in/code")
	call{method: "POST", path: "/sessions", token: token(t, "kind=agent&agent=hr-agent"), body: obj{"sign_in": obj{"id": id, "code": code}}}.send(t).refused(t, 404, "not_found", "-")
	call{method: "POST", path: "/sessions", token: alice(t), body: obj{"sign_in": obj{"id": id, "code": code}}}.send(t).refused(t, 400, "invalid_request", "/sign_in")
	s := complete(t, id, code)
	if s.status != http.StatusCreated || s.str("task", "source") != "user" || s.str("envelope", "source") != "user" || s.str("user", "sub") != "alice" ||
		s.header.Get("Location") != "/sessions/"+s.str("session") {
		t.Fatalf("%d %s", s.status, s.raw)
	}
	complete(t, id, code).refused(t, 404, "not_found", "-")
	b.get(t, "/consent/"+id).page(t, 200, "works for you now")
	b.get(t, path).page(t, 409, "over")
	b.post(t, path).page(t, 409, "over")

	// The session is the agent's, and carries the user's groups.
	decide(t, salesAgent(t), read(s.str("session"))).decided(t, "allow", "read_opportunity")
}

func TestSignInEndsOtherwise(t *testing.T) {
	b := newTab(t)
	id, page := b.toConsent(t, obj{})
	page.page(t, 200, "It has set itself no limits")
	if a := b.post(t, "/consent/"+id, "form", page.field("form"), "answer", "decline"); a.status != http.StatusSeeOther {
		t.Fatalf("%d %s", a.status, a.raw)
	}
	b.get(t, "/consent/"+id).page(t, 200, "Nothing was allowed")
	complete(t, id, "x").refused(t, 403, "forbidden", "-")

	_, path := openSignIn(t, obj{})
	back := b.atProvider(t, b.post(t, path), "")
	b.get(t, back).page(t, 403, "You did not sign in")

	// Late.
	expire := func(id string) {
		storetest.Exec(t, "sqlite:"+filepath.Join(w.dir, "writ.db"), `UPDATE sign_ins SET expires_at = 1 WHERE id = '`+id+`'`)
	}
	id, path = openSignIn(t, obj{})
	back = b.atProvider(t, b.post(t, path), "alice")
	expire(id)
	b.get(t, back).page(t, 409, "Its time is over")
	b.get(t, path).page(t, 409, "Its time is over")
	id, page = b.toConsent(t, obj{})
	expire(id)
	b.get(t, "/consent/"+id).page(t, 409, "Its time is over")
	b.post(t, "/consent/"+id, "form", page.field("form"), "answer", "accept").page(t, 409, "Its time is over")
	complete(t, id, "x").refused(t, 404, "not_found", "-")
}

// A form counts only if the browser itself says that it comes from our page.
func TestPageFormsFromElsewhere(t *testing.T) {
	b := newTab(t)
	id, page := b.toConsent(t, obj{})
	_, link := openSignIn(t, obj{})
	for _, path := range []string{"/consent/" + id, link} {
		form := url.Values{"form": {page.field("form")}, "answer": {"accept"}}
		if path == link {
			form = url.Values{}
		}
		for name, h := range map[string]http.Header{
			"another site":           headers("Sec-Fetch-Site", "cross-site", "Origin", "https://evil.example"),
			"a neighbouring site":    headers("Sec-Fetch-Site", "same-site", "Origin", "https://evil.example"),
			"an old browser":         headers("Origin", "https://evil.example"),
			"a sandboxed frame":      headers("Origin", "null"),
			"no browser":             {},
			"an unknown word":        headers("Sec-Fetch-Site", "trust-me"),
			"another port":           headers("Origin", "http://127.0.0.1:1"),
			"a site with our prefix": headers("Origin", w.dev.URL+".evil.example"),
		} {
			a := b.send(t, call{method: "POST", path: path, body: form, header: h})
			if a.status != http.StatusForbidden {
				t.Errorf("%s to %s: %d %s", name, path, a.status, a.raw)
			}
		}
		for _, tt := range []struct {
			c      call
			status int
		}{
			{call{body: "{}"}, 415},
			{call{}, 415},
			{call{body: strings.Repeat("x", 64<<10+1), header: headers("Sec-Fetch-Site", "same-origin", "Content-Type", "application/x-www-form-urlencoded")}, 413},
			{call{body: "answer=accept&answer=decline&issuer=a&issuer=b", header: headers("Sec-Fetch-Site", "same-origin", "Content-Type", "application/x-www-form-urlencoded")}, 400},
			{call{body: "%zz", header: headers("Sec-Fetch-Site", "same-origin", "Content-Type", "application/x-www-form-urlencoded")}, 400},
			{call{body: url.Values{"answer": {"maybe"}, "issuer": {"https://evil.example"}}}, 400},
		} {
			tt.c.method, tt.c.path, tt.c.loose = "POST", path, true
			if a := b.send(t, tt.c); a.status != tt.status {
				t.Errorf("%.40v to %s: %d, want %d", tt.c.body, path, a.status, tt.status)
			}
		}
	}
	b.get(t, "/consent/"+id).page(t, 200, "Who asks") // nothing has happened
	// A browser that sends Origin alone, rightly.
	a := b.send(t, call{method: "POST", path: "/consent/" + id, body: url.Values{"form": {page.field("form")}, "answer": {"accept"}}, header: headers("Origin", w.dev.URL)})
	if a.status != http.StatusSeeOther {
		t.Errorf("%d %s", a.status, a.raw)
	}
}

// What the agent says is shown for what it is.
func TestConsentShowsHostileText(t *testing.T) {
	b := newTab(t)
	_, page := b.toConsent(t, obj{
		"task": "</blockquote><script>alert(1)</script><style>*{display:none}</style>\u202egnp.exe\u200b\u2066 &amp; \u3164\x01\r\nnext",
		"envelope": obj{
			"actions":   []string{"<img src=x onerror=alert(1)>", "\u202ecrm.**", "crm.*.read", "hr.employee.read", "**"},
			"resources": []obj{{"type": "\"><script>", "id": "*"}, {"type": "crm", "id": "a/**"}, {"type": "crm", "id": "{a,b}"}},
		},
	})
	text := strings.ReplaceAll(string(page.raw), "&#43;", "+")
	for _, want := range []string{
		"&lt;/blockquote&gt;&lt;script&gt;alert(1)&lt;/script&gt;", "[U+202E]gnp.exe[U+200B][U+2066] &amp;amp; [U+3164][U+0001][U+000D]\nnext",
		"&lt;img src=x onerror=alert(1)&gt;", "any action under <bdi class=\"pattern\">[U+202E]crm</bdi>, at any depth",
		"whatever matches <bdi class=\"pattern\">crm.*.read</bdi>", "<bdi class=\"pattern\">hr.employee.read</bdi>", "every action there is",
		"<bdi class=\"pattern\">&#34;&gt;&lt;script&gt;</bdi>: any whose name has no slash",
		"any under <bdi class=\"pattern\">a</bdi>, at any depth", "whatever matches <bdi class=\"pattern\">{a,b}</bdi>",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in the page", want)
		}
	}
	for _, r := range "\u202e\u200b\u2066\u3164\x01\r" {
		if strings.ContainsRune(text, r) {
			t.Errorf("%U is in the page", r)
		}
	}
	if t.Failed() {
		t.Log(text)
	}
}

func TestPagesThatAreNotThere(t *testing.T) {
	b := newTab(t)
	b.get(t, "/signin/AAAAAAAAAAAAAAAAAAAAAA").page(t, 404, "no sign-in behind this link")
	b.post(t, "/signin/AAAAAAAAAAAAAAAAAAAAAA").page(t, 404, "no sign-in behind this link")
	b.get(t, "/callback").page(t, 404, "belongs to no sign-in")
	b.send(t, call{method: "GET", path: "/callback?state=%zz", loose: true}).page(t, 400, "malformed")
	b.get(t, "/callback?state=a&state=b").page(t, 400, "malformed")
	b.get(t, "/callback?error=x&error_description=%3Cscript%3E").page(t, 404, "belongs to no sign-in")
	b.get(t, "/consent/sin_00000000000000000000000000").page(t, 403, "This browser is not the one")
	b.get(t, "/consent/%3Cscript%3E").page(t, 403, "This browser is not the one")
	css := call{method: "GET", path: "/signin/style.css"}.send(t)
	if css.status != http.StatusOK || css.header.Get("Content-Type") != "text/css; charset=utf-8" || css.header.Get("Cache-Control") != "public, max-age=300" {
		t.Errorf("%d %v", css.status, css.header)
	}
}

func TestSignInRequests(t *testing.T) {
	agent := salesAgent(t)
	for name, tt := range map[string]struct {
		token, body string
		at          string
		invalid     bool
	}{
		"beside a task":          {agent, `{"sign_in":{"id":"x","code":"y"},"task":"t"}`, "/sign_in", true},
		"beside a subject_token": {agent, `{"sign_in":{"id":"x","code":"y"},"subject_token":"a.b.c"}`, "/sign_in", true},
		"beside a state":         {agent, `{"sign_in":{"id":"x","code":"y"},"state":"s"}`, "/sign_in", true},
		"no object":              {agent, `{"sign_in":"x"}`, "/sign_in", true},
		"an unknown member":      {agent, `{"sign_in":{"id":"x","code":"y","form":"z"}}`, "/sign_in/form", true},
		"an unregistered URI":    {agent, `{"redirect_uri":"https://evil.example/"}`, "/redirect_uri", false},
		"an empty URI":           {agent, `{"redirect_uri":""}`, "/redirect_uri", true},
		"a state alone":          {agent, `{"state":"s"}`, "/state", true},
		"a URI for nothing":      {alice(t), `{"redirect_uri":"https://evil.example/"}`, "/redirect_uri", false},
		"a long age":             {agent, `{"expires_in":28801}`, "/expires_in", false},
		"a long task":            {agent, `{"task":"` + strings.Repeat("x", 2049) + `"}`, "/task", true},
	} {
		t.Run(name, func(t *testing.T) {
			call{method: "POST", path: "/sessions", token: tt.token, body: tt.body, invalid: tt.invalid, loose: !tt.invalid}.send(t).
				refused(t, 400, "invalid_request", tt.at)
		})
	}
	complete(t, "sin_00000000000000000000000000", "x").refused(t, 404, "not_found", "-")
}

// TestSignInEndsByTheKillSwitch: what a user consented to before they were revoked
// opens no session after it.
func TestSignInEndsByTheKillSwitch(t *testing.T) {
	b := newTab(t)
	id, consent := b.toConsent(t, obj{})
	b.post(t, "/consent/"+id, "form", consent.field("form"), "answer", "accept")
	shown := b.get(t, "/consent/"+id).page(t, 200, "Give it only to the agent")
	code := regexp.MustCompile(`[0-9A-Z]{5}-[0-9A-Z]{5}`).FindString(string(shown.raw))
	w.secret(code, "a code")
	user := obj{"iss": w.dev.IDP.Issuer(), "sub": "alice"}
	if a := (call{method: "POST", path: "/revocations", token: olga(t), body: obj{"user": user}}).send(t); a.status != 200 {
		t.Fatalf("%s", a.raw)
	}
	complete(t, id, code).refused(t, 404, "not_found", "-")
}
