package devidp

import (
	"bytes"
	"embed"
	"fmt"
	"html/template"
	"log/slog"
	"net/http"
	"time"
)

//go:embed pages
var pageFiles embed.FS

var templates = template.Must(template.New("").Funcs(template.FuncMap{
	"clock": func(t time.Time) string { return t.Local().Format(time.TimeOnly) },
}).ParseFS(pageFiles, "pages/*.html"))

// page is how a page is sent.
type page struct {
	status     int    // 200 when zero
	formTarget string // origin that a form may lead to besides this one
}

// render sends a page that may load one stylesheet and nothing else: no script,
// no frame, no picture.
func (p *Provider) render(w http.ResponseWriter, r *http.Request, name string, as page, data any) {
	var body bytes.Buffer
	if err := templates.ExecuteTemplate(&body, name, data); err != nil {
		p.log.ErrorContext(r.Context(), "render page", slog.String("page", name), slog.Any("error", err))
		http.Error(w, "This page cannot be shown.", http.StatusInternalServerError)
		return
	}
	formAction := "'self'"
	if as.formTarget != "" {
		formAction += " " + as.formTarget
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Cache-Control", "no-store")
	h.Set("Content-Security-Policy", fmt.Sprintf(
		"default-src 'none'; style-src 'self'; form-action %s; frame-ancestors 'none'; base-uri 'none'", formAction))
	if as.status != 0 {
		w.WriteHeader(as.status)
	}
	_, _ = body.WriteTo(w)
}

type signInPage struct {
	Action string
	CSRF   string
	Client string
	Users  []User
}

func (p *Provider) showMessage(w http.ResponseWriter, r *http.Request, status int, text string) {
	p.render(w, r, "message.html", page{status: status}, text)
}

func showStyle(w http.ResponseWriter, r *http.Request) {
	http.ServeFileFS(w, r, pageFiles, "pages/style.css")
}
