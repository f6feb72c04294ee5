package devidp

import (
	"net/http"
	"net/url"
)

const maxBody = 16 << 10

// guard stands before every route: it keeps other sites' pages out of a service
// that trusts whoever reaches it.
func guard(next http.Handler) http.Handler {
	next = http.MaxBytesHandler(next, maxBody)
	next = http.NewCrossOriginProtection().Handler(next)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// DNS rebinding makes a foreign page same-origin with us; its Host header
		// still tells.
		if host := (&url.URL{Host: r.Host}).Hostname(); !isLoopback(host) {
			http.Error(w, "This provider answers only to loopback host names.", http.StatusMisdirectedRequest)
			return
		}
		h := w.Header()
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		// Not no-referrer: that would make browsers send "Origin: null" with our
		// own forms.
		h.Set("Referrer-Policy", "same-origin")
		next.ServeHTTP(w, r)
	})
}
