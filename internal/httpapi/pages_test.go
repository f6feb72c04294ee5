package httpapi

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/telemetry"
)

func TestCookieBehindTLS(t *testing.T) {
	t.Parallel()
	a := &API{Config: Config{ExternalURL: "https://writ.example/below"}}
	c := a.cookie("sin_1", "secret")
	if c.Name != "__Host-writ-sin_1" || !c.Secure || !c.HttpOnly || c.Path != "/" || c.Domain != "" || c.SameSite != http.SameSiteLaxMode || c.Valid() != nil {
		t.Errorf("cookie %s", c)
	}
	r := httptest.NewRequestWithContext(t.Context(), "GET", "/", nil)
	r.AddCookie(&http.Cookie{Name: "writ-sin_1", Value: "set by plain http"})
	if got := a.browser(r, "sin_1"); got != "" {
		t.Errorf("believes a cookie without the prefix: %q", got)
	}
	r.AddCookie(c)
	if got := a.browser(r, "sin_1"); got != "secret" {
		t.Errorf("got %q", got)
	}
	// Links lead below the path that a proxy takes away.
	rec := httptest.NewRecorder()
	if err := a.writePage(rec, 200, "error", "x", struct{ Detail, RequestID string }{}); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(rec.Body.String(), `href="/below/signin/style.css"`) {
		t.Error(rec.Body.String())
	}
}

// Whatever goes wrong, a person gets a page: where nobody can sign in, where too many
// are at it, and where something breaks.
func TestErrorsArePages(t *testing.T) {
	t.Parallel()
	var log strings.Builder
	a := &API{Config: Config{Metrics: telemetry.NewMetrics(), Logger: telemetry.NewLogger(&log, slog.LevelDebug)}}
	h := New(a.Config)
	serve := func(h http.Handler, method, path string) *httptest.ResponseRecorder {
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, httptest.NewRequestWithContext(t.Context(), method, path, nil))
		return rec
	}
	for _, path := range []string{"/signin/the-token-of-a-link", "/consent/sin_x", "/callback?code=the-code-of-a-provider"} {
		if rec := serve(h, "GET", path); rec.Code != 404 || !strings.Contains(rec.Body.String(), "no such page") {
			t.Errorf("%s: %d %s", path, rec.Code, rec.Body)
		}
	}
	full := a.boundBy(0, a.errorPage)(http.NotFoundHandler())
	panics := a.page(func(http.ResponseWriter, *http.Request) error { panic("the secret cause") })
	fails := a.page(func(http.ResponseWriter, *http.Request) error { return fault.New(fault.Unavailable, "Later.") })
	for name, tt := range map[string]struct {
		h      http.Handler
		status int
		text   string
	}{"full": {full, 429, "too many requests"}, "panic": {panics, 500, "Something went wrong inside Writ"}, "store": {fails, 503, "Later."}} {
		rec := serve(tt.h, "GET", "/signin/the-token-of-a-link")
		body := rec.Body.String()
		if rec.Code != tt.status || !strings.Contains(body, tt.text) || strings.Contains(body, "secret cause") || strings.Contains(body, "goroutine") {
			t.Errorf("%s: %d %s", name, rec.Code, body)
		}
		if rec.Header().Get("Content-Security-Policy") != pagePolicy || rec.Header().Get("Cache-Control") != "no-store" || !strings.HasPrefix(rec.Header().Get("Content-Type"), "text/html") {
			t.Errorf("%s: %v", name, rec.Header())
		}
		if (rec.Header().Get("Retry-After") != "") != (tt.status != 500) {
			t.Errorf("%s: Retry-After %q", name, rec.Header().Get("Retry-After"))
		}
	}
	if text := log.String(); strings.Contains(text, "the-token-of-a-link") || strings.Contains(text, "the-code-of-a-provider") || !strings.Contains(text, "/signin/…") {
		t.Errorf("log: %s", text)
	}
}
