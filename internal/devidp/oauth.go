package devidp

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
)

// oauthError is an error answer of the token, revocation and backchannel
// endpoints (RFC 6749 §5.2, CIBA Core §11 and §13) or of a redirect back to the
// client (RFC 6749 §4.1.2.1). Descriptions hold neither quotes nor backslashes.
type oauthError struct {
	status      int
	Code        string `json:"error"`
	Description string `json:"error_description,omitempty"`
}

func (e *oauthError) Error() string { return e.Code + ": " + e.Description }

func badRequest(code, description string) *oauthError {
	return &oauthError{status: http.StatusBadRequest, Code: code, Description: description}
}

// api serves an endpoint that clients call: what it returns is sent as JSON, a
// nil as an empty 200, and nothing of it may be cached (RFC 6749 §5.1).
func (p *Provider) api(answer func(*http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "no-store")
		body, err := answer(r)
		if err != nil {
			p.refuse(w, r, err)
		} else if body != nil {
			writeJSON(w, http.StatusOK, body)
		}
	}
}

func (p *Provider) refuse(w http.ResponseWriter, r *http.Request, err error) {
	refusal, ok := errors.AsType[*oauthError](err)
	if !ok {
		p.log.ErrorContext(r.Context(), "dev identity provider", slog.String("path", r.URL.Path), slog.Any("error", err))
		refusal = &oauthError{status: http.StatusInternalServerError, Code: "server_error"}
	}
	if refusal.status == http.StatusUnauthorized {
		w.Header().Set("WWW-Authenticate", `Basic realm="writ dev"`) // RFC 6749 §5.2
	}
	writeJSON(w, refusal.status, refusal)
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // only a client that hung up makes this fail
}

// clientForm reads the form of a client's POST and authenticates its sender.
// Parameters in the URL do not count (RFC 6749 §2.3.1).
func (p *Provider) clientForm(r *http.Request) (client, url.Values, error) {
	if err := r.ParseForm(); err != nil {
		return client{}, nil, badRequest("invalid_request", "not a form, or too large a one")
	}
	if err := checkSingle(r.PostForm); err != nil {
		return client{}, nil, err
	}
	c, err := p.authenticate(r, r.PostForm)
	return c, r.PostForm, err
}

// checkSingle refuses parameters that come twice (RFC 6749 §3.1).
func checkSingle(params url.Values) error {
	for _, values := range params {
		if len(values) > 1 {
			return badRequest("invalid_request", "a parameter comes more than once")
		}
	}
	return nil
}

// scopes are the ones that mean something here.
var scopes = []string{"openid", "profile", "email", "groups"}

// grantedScope is what of the asked scope exists here, in this package's order.
// Answers name it, since it may be less than was asked (RFC 6749 §3.3).
func grantedScope(asked string) string {
	var granted []string
	for _, s := range scopes {
		if hasScope(asked, s) {
			granted = append(granted, s)
		}
	}
	return strings.Join(granted, " ")
}

func hasScope(scope, want string) bool {
	for s := range strings.SplitSeq(scope, " ") {
		if s == want {
			return true
		}
	}
	return false
}

// newSecret is 256 random bits for codes, auth_req_ids and client secrets.
func newSecret() string {
	b := make([]byte, 32)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	return base64.RawURLEncoding.EncodeToString(b)
}
