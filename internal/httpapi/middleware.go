package httpapi

import (
	"fmt"
	"net"
	"net/http"
	"regexp"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/telemetry"
)

// callerID is what a caller may choose as request id: nothing that could forge a
// log line.
var callerID = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)

func (a *API) requestID(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		reqID := r.Header.Get("X-Request-ID")
		if !callerID.MatchString(reqID) {
			reqID = id.New(id.Request)
		}
		w.Header().Set("X-Request-ID", reqID)
		next.ServeHTTP(w, r.WithContext(telemetry.WithRequestID(r.Context(), reqID)))
	})
}

func (a *API) observe(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		ww := middleware.NewWrapResponseWriter(w, r.ProtoMajor)
		r, span := telemetry.StartRequest(r)
		next.ServeHTTP(ww, r)
		route := chi.RouteContext(r.Context()).RoutePattern()
		if route == "" {
			route = "none" // a stranger's path must not become a label or a span
		}
		method := r.Method
		switch method {
		case http.MethodGet, http.MethodPost, http.MethodDelete:
		default:
			method = "other"
		}
		a.Metrics.Requests.WithLabelValues(route, method, strconv.Itoa(ww.Status())).Observe(time.Since(start).Seconds())
		telemetry.EndRequest(span, method, route, ww.Status())
	})
}

// headers are those of every answer, whoever writes it.
func (a *API) headers(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Answers carry secrets or personal data unless a handler says otherwise.
		w.Header().Set("Cache-Control", "no-store")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		if usesDPoP(r) { // for the next proof (RFC 9449 §8.2)
			w.Header().Set("DPoP-Nonce", a.Identity.Nonce())
		}
		next.ServeHTTP(w, r)
	})
}

func (a *API) recoverPanic(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			if v := recover(); v != nil {
				writeProblem(w, r, a.Logger, a.panicked(r, v))
			}
		}()
		next.ServeHTTP(w, r)
	})
}

// panicked logs a panic and makes an error of it.
func (a *API) panicked(r *http.Request, v any) error {
	a.Logger.ErrorContext(r.Context(), "panic", "value", fmt.Sprint(v), "stack", string(debug.Stack()))
	return fault.New(fault.Internal, "the log has the cause under this request_id")
}

// bound lets n requests run at a time: each can hold memory for its body and, if it
// waits, for long.
func (a *API) bound(n int) func(http.Handler) http.Handler {
	return a.boundBy(n, func(w http.ResponseWriter, r *http.Request, err error) { writeProblem(w, r, a.Logger, err) })
}

// boundBy is bound with a way of its own to refuse.
func (a *API) boundBy(n int, refuse func(http.ResponseWriter, *http.Request, error)) func(http.Handler) http.Handler {
	slots := make(chan struct{}, n)
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			select {
			case slots <- struct{}{}:
				defer func() { <-slots }()
				next.ServeHTTP(w, r)
			default:
				refuse(w, r, &fault.Error{
					Code: fault.Overloaded, Detail: "too many requests at a time", RetryAfter: time.Second,
				})
			}
		})
	}
}

// callerIP is the caller's address as Writ can know it.
func (a *API) callerIP(r *http.Request) string {
	if a.BehindProxy {
		// Only the entry that our own proxy appended can be believed.
		hops := strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")
		if ip := net.ParseIP(strings.TrimSpace(hops[len(hops)-1])); ip != nil {
			return ip.String()
		}
	}
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return ""
	}
	return host
}
