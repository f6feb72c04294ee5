package httpapi

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/jws"
	"github.com/writsec/writ/internal/telemetry"
)

// ProblemBase is what, followed by a fault's code, is the type of a problem (RFC 9457
// §3.1.1): the page that explains it.
const ProblemBase = "https://github.com/writsec/writ/blob/main/docs/errors.md#"

// problemKinds is the one place where a fault gets an HTTP status.
var problemKinds = map[fault.Code]struct {
	status int
	title  string
}{
	fault.InvalidRequest:       {http.StatusBadRequest, "The request is not valid"},
	fault.InvalidToken:         {http.StatusUnauthorized, "A token is missing or refused"},
	fault.InvalidDPoPProof:     {http.StatusUnauthorized, "The DPoP proof is refused"},
	fault.UseDPoPNonce:         {http.StatusUnauthorized, "The DPoP proof needs a nonce"},
	fault.InvalidClient:        {http.StatusUnauthorized, "The service's credentials are refused"},
	fault.Forbidden:            {http.StatusForbidden, "Not allowed"},
	fault.NotFound:             {http.StatusNotFound, "No such thing"},
	fault.MethodNotAllowed:     {http.StatusMethodNotAllowed, "The route has no such method"},
	fault.LoginRequired:        {http.StatusConflict, "The user has not consented yet"},
	fault.SessionEnded:         {http.StatusConflict, "The session is over"},
	fault.IdempotencyConflict:  {http.StatusConflict, "The Idempotency-Key was used for another request"},
	fault.LeaseEnded:           {http.StatusConflict, "The credential of this decision has ended"},
	fault.NotRenewable:         {http.StatusConflict, "The lease can't be renewed"},
	fault.LeaseQuota:           {http.StatusTooManyRequests, "Too many leases are active"},
	fault.OutcomeConflict:      {http.StatusConflict, "The decision has another outcome, or can have none"},
	fault.BodyTooLarge:         {http.StatusRequestEntityTooLarge, "The body is too large"},
	fault.UnsupportedMediaType: {http.StatusUnsupportedMediaType, "The body is of the wrong type"},
	fault.MintFailed:           {http.StatusServiceUnavailable, "The credential could not be made"},
	fault.NotReady:             {http.StatusServiceUnavailable, "Writ is not ready"},
	fault.Unavailable:          {http.StatusServiceUnavailable, "The store is not available"},
	fault.Overloaded:           {http.StatusTooManyRequests, "Too much at a time"},
	fault.Internal:             {http.StatusInternalServerError, "Something went wrong inside Writ"},
}

// problem is RFC 9457, with the fields that are wrong as its §3 example has them.
type problem struct {
	Type      string         `json:"type"`
	Title     string         `json:"title"`
	Status    int            `json:"status"`
	Detail    string         `json:"detail"`
	Code      fault.Code     `json:"code"`
	OAuth     string         `json:"error,omitempty"`
	Errors    []problemField `json:"errors,omitempty"`
	RequestID string         `json:"request_id"`
}

type problemField struct {
	Pointer string `json:"pointer"`
	Detail  string `json:"detail"`
}

// writeProblem answers with what the caller may know of err and logs the rest.
func writeProblem(w http.ResponseWriter, r *http.Request, log *slog.Logger, err error) {
	f := refusal(r, log, err)
	kind := problemKinds[f.Code]
	p := problem{
		Type: ProblemBase + string(f.Code), Title: kind.title, Status: kind.status, Detail: f.Detail, Code: f.Code,
		OAuth: oauthError(r.URL.Path, kind.status, f.Code), RequestID: telemetry.RequestID(r.Context()),
	}
	for _, field := range f.Fields {
		p.Errors = append(p.Errors, problemField(field))
	}
	h := w.Header()
	switch f.Code {
	case fault.InvalidToken, fault.InvalidDPoPProof, fault.UseDPoPNonce:
		challenge := `Bearer realm="writ"`
		if usesDPoP(r) {
			challenge = `DPoP realm="writ", algs="` + strings.Join(jws.Algorithms, " ") + `"`
		}
		if len(r.Header.Values("Authorization")) > 0 { // RFC 6750 §3.1: else no error code
			challenge += `, error="` + string(f.Code) + `"`
		}
		h.Set("WWW-Authenticate", challenge)
	case fault.InvalidClient:
		h.Set("WWW-Authenticate", `Basic realm="writ"`)
	}
	retryAfter(h, f)
	h.Set("Cache-Control", "no-store") // also where the handler had promised more
	h.Set("Content-Type", "application/problem+json")
	w.WriteHeader(kind.status)
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	_ = e.Encode(p) // the client is gone if this fails
}

// oauthError is the error code of RFC 6749 §5.2, for clients of the two routes whose RFCs
// (7662 §2.3, 7009 §2.2.1) have it; "" where it has none.
func oauthError(path string, status int, code fault.Code) string {
	switch {
	case path != "/introspect" && path != "/revoke", status == http.StatusTooManyRequests, status >= 500:
		return ""
	case code == fault.InvalidClient:
		return "invalid_client"
	}
	return "invalid_request"
}

// refusal is what the caller may know of err; the log gets the rest.
func refusal(r *http.Request, log *slog.Logger, err error) *fault.Error {
	gone := errors.Is(err, context.Canceled) && r.Context().Err() != nil
	if gone { // the client left, and nobody reads the answer
		err = fault.Wrap(fault.NotReady, err, "the request was abandoned")
	}
	f, ok := errors.AsType[*fault.Error](err)
	if !ok {
		f = fault.Wrap(fault.Internal, err, "the log has the cause under this request_id")
	}
	level := slog.LevelInfo
	if problemKinds[f.Code].status >= 500 && !gone {
		level = slog.LevelError
	}
	path := r.URL.Path
	if strings.HasPrefix(path, signInPath) { // the rest is a secret
		path = signInPath + "…"
	}
	log.Log(r.Context(), level, "request refused", "code", f.Code, "path", path, "error", err)
	return f
}

// retryAfter says when to come back, where that helps.
func retryAfter(h http.Header, f *fault.Error) {
	switch problemKinds[f.Code].status {
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		wait := max(f.RetryAfter, time.Second)
		h.Set("Retry-After", strconv.Itoa(int((wait+time.Second-1)/time.Second)))
	}
}
