package devidp

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// tap sends a form of the phone page as the browser with that cookie does.
func tap(t *testing.T, p *Provider, path, csrf, verdict string, cookie *http.Cookie, header ...string) *httptest.ResponseRecorder {
	t.Helper()
	form := url.Values{"csrf": {csrf}, "verdict": {verdict}}
	r := httptest.NewRequest(http.MethodPost, p.Issuer()+path, strings.NewReader(form.Encode()))
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	if cookie != nil {
		r.AddCookie(cookie)
	}
	w := httptest.NewRecorder()
	p.ServeHTTP(w, r)
	return w
}

func TestPhone(t *testing.T) {
	p := newProvider(t)
	ask(t, p)
	w := get(t, p, "/phone?user=alice")
	page, cookie := w.Body.String(), w.Result().Cookies()[0]
	action := formField(t, page, `action="([^"]*)"`)
	csrf := formField(t, page, `name="csrf" value="([^"]*)"`)
	id := p.Prompts()[0].ID

	refusals := map[string]struct {
		w    *httptest.ResponseRecorder
		want int
	}{
		"no token":           {tap(t, p, action, "", "approve", cookie), http.StatusForbidden},
		"no cookie":          {tap(t, p, action, csrf, "approve", nil), http.StatusForbidden},
		"another cookie":     {tap(t, p, action, csrf, "approve", &http.Cookie{Name: csrfCookie, Value: "x"}), http.StatusForbidden},
		"cross-site":         {tap(t, p, action, csrf, "approve", cookie, "Sec-Fetch-Site", "cross-site"), http.StatusForbidden},
		"another port":       {tap(t, p, action, csrf, "approve", cookie, "Sec-Fetch-Site", "same-site"), http.StatusForbidden},
		"foreign origin":     {tap(t, p, action, csrf, "approve", cookie, "Origin", "https://evil.example"), http.StatusForbidden},
		"no verdict":         {tap(t, p, action, csrf, "", cookie), http.StatusBadRequest},
		"unknown prompt":     {tap(t, p, "/phone/nothing", csrf, "approve", cookie), http.StatusNotFound},
		"GET must not apply": {get(t, p, action+"&verdict=approve&csrf="+csrf), http.StatusMethodNotAllowed},
	}
	for name, tt := range refusals {
		if tt.w.Code != tt.want {
			t.Errorf("%s: %d, want %d", name, tt.w.Code, tt.want)
		}
	}
	if got := p.Prompts()[0].Status; got != Pending {
		t.Fatalf("prompt is %s after refusals alone", got)
	}

	got := tap(t, p, action, csrf, "approve", cookie, "Sec-Fetch-Site", "same-origin")
	if got.Code != http.StatusSeeOther || got.Header().Get("Location") != "/phone?user=alice" {
		t.Errorf("tap: %d to %s", got.Code, got.Header().Get("Location"))
	}
	if status := p.Prompts()[0].Status; status != Approved {
		t.Errorf("prompt is %s", status)
	}
	if got := tap(t, p, "/phone/"+id, csrf, "deny", cookie); got.Code != http.StatusConflict {
		t.Errorf("second tap: %d", got.Code)
	}
	if page := get(t, p, "/phone").Body.String(); strings.Contains(page, "<form") || !strings.Contains(page, "K7QX pay") {
		t.Errorf("an answered prompt should be listed without a form: %s", page)
	}
}

func TestPhoneShowsMessagesAsText(t *testing.T) {
	p := newProvider(t)
	ask(t, p, "binding_message", `<script>alert("1")</script>`)
	w := get(t, p, "/phone")
	if page := w.Body.String(); strings.Contains(page, "<script") ||
		!strings.Contains(page, "&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt;") {
		t.Errorf("page %s", page)
	}
	want := "default-src 'none'; style-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
	if got := w.Header().Get("Content-Security-Policy"); got != want {
		t.Errorf("CSP %q, want %q", got, want)
	}
}

func TestPhoneFilter(t *testing.T) {
	p := newProvider(t)
	ask(t, p, "binding_message", "for alice")
	ask(t, p, "binding_message", "for bob", "login_hint", "bob")
	page := get(t, p, "/phone?user=bob").Body.String()
	if strings.Contains(page, "for alice") || !strings.Contains(page, "for bob") {
		t.Errorf("bob's phone: %s", page)
	}
	page = get(t, p, "/phone").Body.String()
	if !strings.Contains(page, "for alice") || !strings.Contains(page, "for bob") {
		t.Errorf("everyone's phone: %s", page)
	}
	w := get(t, p, "/phone?user=mallory")
	if w.Code != http.StatusNotFound || !strings.Contains(w.Body.String(), "alice, bob, carol") {
		t.Errorf("unknown user: %d %s", w.Code, w.Body)
	}
}

// A page with something to answer must not reload under the finger.
func TestPhoneHoldsStillWhileAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProvider(t)
		refresh := func() string {
			return formField(t, get(t, p, "/phone").Body.String(), `http-equiv="refresh" content="(\d+)"`)
		}
		if got := refresh(); got != "2" {
			t.Errorf("idle: reload after %s s, want 2", got)
		}
		ask(t, p, "requested_expiry", "60")
		ask(t, p, "requested_expiry", "30")
		time.Sleep(10 * time.Second)
		if got := refresh(); got != "51" {
			t.Errorf("asked: reload after %s s, want 51, when the last prompt is over", got)
		}
		time.Sleep(50 * time.Second)
		if got := refresh(); got != "2" {
			t.Errorf("idle again: reload after %s s, want 2", got)
		}
	})
}

func TestStylesheet(t *testing.T) {
	w := get(t, newProvider(t), "/style.css")
	if got := w.Header().Get("Content-Type"); w.Code != http.StatusOK || !strings.HasPrefix(got, "text/css") {
		t.Errorf("answer %d %s", w.Code, got) // nosniff makes browsers drop any other type
	}
}
