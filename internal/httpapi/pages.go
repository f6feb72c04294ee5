package httpapi

import (
	"bytes"
	"embed"
	"fmt"
	"html/template"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/telemetry"
)

//go:embed pages
var pageFiles embed.FS

const signInPath = "/signin/"

// pages are the templates by name, each with the layout around it.
var pages = func() map[string]*template.Template {
	layout := template.Must(template.New("layout.html").Funcs(template.FuncMap{
		"visible": visible, "names": names, "host": host, "action": actionWords, "resource": resourceWords, "span": span,
		"when": func(t time.Time) string { return t.UTC().Format("2 January 2006, 15:04 UTC") },
		"iso":  func(t time.Time) string { return t.UTC().Format(time.RFC3339) },
	}).ParseFS(pageFiles, "pages/layout.html"))
	out := map[string]*template.Template{}
	for _, name := range []string{"start", "onward", "consent", "code", "declined", "done", "error"} {
		out[name] = template.Must(template.Must(layout.Clone()).ParseFS(pageFiles, "pages/"+name+".html"))
	}
	return out
}()

// pagePolicy lets a page load our style sheet and send forms to us, and no more.
const pagePolicy = "default-src 'none'; style-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"

// page serves a person: errors are pages too.
func (a *API) page(h handler) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			if v := recover(); v != nil {
				a.errorPage(w, r, a.panicked(r, v))
			}
		}()
		pageHeaders(w)
		if err := h(w, r); err != nil {
			a.errorPage(w, r, err)
		}
	}
}

func pageHeaders(w http.ResponseWriter) {
	w.Header().Set("Content-Security-Policy", pagePolicy)
	w.Header().Set("Referrer-Policy", "no-referrer") // addresses here are secrets
	w.Header().Set("X-Frame-Options", "DENY")        // for browsers that don't know frame-ancestors
}

// base is the path before those of our routes, as browsers see it.
func (a *API) base() string {
	u, err := url.Parse(a.ExternalURL)
	if err != nil {
		return ""
	}
	return u.Path
}

func (a *API) writePage(w http.ResponseWriter, status int, name, title string, data any) error {
	var b bytes.Buffer
	err := pages[name].Execute(&b, struct {
		Title, Base string
		Data        any
	}{title, a.base(), data})
	if err != nil {
		return fmt.Errorf("write page %s: %w", name, err)
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.WriteHeader(status)
	_, _ = b.WriteTo(w) // the client is gone if this fails
	return nil
}

// writeOnward leads to another site at once. to is an absolute URL in ASCII.
func (a *API) writeOnward(w http.ResponseWriter, title, site, to string) error {
	w.Header().Set("Refresh", "0; url="+to)
	return a.writePage(w, http.StatusOK, "onward", title, struct{ Site, To string }{site, to})
}

// errNoPage: nobody can sign in here.
var errNoPage = fault.New(fault.NotFound, "There is no such page here.")

// errorTitles are for people; codes mean nothing to them.
var errorTitles = map[fault.Code]string{
	fault.InvalidRequest: "That did not work",
	fault.Forbidden:      "Nothing was allowed",
	fault.NotFound:       "Nothing is here",
	fault.SessionEnded:   "This sign-in is over",
	fault.Overloaded:     "Too busy right now",
	fault.NotReady:       "Too busy right now",
	fault.Unavailable:    "Not possible right now",
}

func (a *API) errorPage(w http.ResponseWriter, r *http.Request, err error) {
	f := refusal(r, a.Logger, err)
	title, known := errorTitles[f.Code]
	detail := f.Detail
	switch {
	case f.Code == fault.Internal:
		title, detail = "Something went wrong inside Writ", "Nothing was allowed. Whoever runs Writ finds the cause in its log."
	case !known:
		title = errorTitles[fault.InvalidRequest]
	}
	pageHeaders(w)
	w.Header().Set("Cache-Control", "no-store")
	retryAfter(w.Header(), f)
	if err := a.writePage(w, problemKinds[f.Code].status, "error", title, struct{ Detail, RequestID string }{
		detail, telemetry.RequestID(r.Context()),
	}); err != nil {
		writeProblem(w, r, a.Logger, err)
	}
}

func (a *API) stylesheet(w http.ResponseWriter, _ *http.Request) error {
	css, err := pageFiles.ReadFile("pages/style.css")
	if err != nil {
		return err
	}
	w.Header().Set("Cache-Control", "public, max-age=300")
	w.Header().Set("Content-Type", "text/css; charset=utf-8")
	_, _ = w.Write(css) // the client is gone if this fails
	return nil
}

// visible shows characters that can't be seen, or that change how others are seen, by
// their numbers, so that a text reads the way that it is.
func visible(s string) string {
	var b strings.Builder
	for _, r := range s {
		if r == '\n' || r == ' ' || unicode.IsPrint(r) && !blank(r) {
			b.WriteRune(r)
		} else {
			fmt.Fprintf(&b, "[U+%04X]", r)
		}
	}
	return b.String()
}

// blank are the printable characters that look like nothing.
func blank(r rune) bool {
	switch r {
	case 0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0:
		return true
	}
	return unicode.Is(unicode.Variation_Selector, r)
}

// names are what a person is called by, best known first; the subject, which alone is
// sure, is always among them.
func names(p identity.Principal) (out []string) {
	for _, claim := range []string{"name", "preferred_username", "email"} {
		if v, ok := p.Claims[claim].(string); ok && v != "" && !slices.Contains(out, v) {
			out = append(out, v)
		}
	}
	if !slices.Contains(out, p.ID) {
		out = append(out, p.ID)
	}
	return out
}

// host is a URL without what is always the same.
func host(u string) string { return strings.TrimSuffix(strings.TrimPrefix(u, "https://"), "/") }

// origin is the scheme and host of a URL.
func origin(u string) string {
	p, err := url.Parse(u)
	if err != nil {
		return ""
	}
	return p.Scheme + "://" + p.Host
}

// words is a pattern with what it means: Before, the pattern itself, After. Where the
// pattern is its own best name there is only the Pattern.
type words struct{ Before, Pattern, After string }

// actionWords explains a pattern of actions: * stops at a dot, ** at nothing.
func actionWords(p string) words {
	if p == "**" {
		return words{Before: "every action there is"}
	}
	return patternWords(p, ".", "any action")
}

// resourceWords explains a pattern of ids: * stops at a slash, ** at nothing.
func resourceWords(p string) words {
	if p == "**" {
		return words{Before: "every one there is"}
	}
	if p == "*" {
		return words{Before: "any whose name has no slash"}
	}
	return patternWords(p, "/", "any")
}

func patternWords(p, separator, some string) words {
	const special = `*?[]{}!\`
	if !strings.ContainsAny(p, special) {
		return words{Pattern: p}
	}
	if rest, ok := strings.CutSuffix(p, separator+"**"); ok && !strings.ContainsAny(rest, special) {
		return words{Before: some + " under", Pattern: rest, After: ", at any depth"}
	}
	if rest, ok := strings.CutSuffix(p, separator+"*"); ok && !strings.ContainsAny(rest, special) {
		return words{Before: some + " directly under", Pattern: rest}
	}
	return words{Before: "whatever matches", Pattern: p}
}

// span is a length of time as people say it.
func span(d time.Duration) string {
	d = max(d.Round(time.Second), time.Second)
	var parts []string
	for _, unit := range []struct {
		name string
		size time.Duration
	}{{"hour", time.Hour}, {"minute", time.Minute}, {"second", time.Second}} {
		n := int64(d / unit.size)
		d %= unit.size
		if n == 1 {
			parts = append(parts, "1 "+unit.name)
		} else if n > 1 {
			parts = append(parts, fmt.Sprintf("%d %ss", n, unit.name))
		}
	}
	return strings.Join(parts, " ")
}
