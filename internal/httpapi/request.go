package httpapi

import (
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/strictjson"
)

// readJSON reads a JSON body strictly.
func readJSON(w http.ResponseWriter, r *http.Request, v any) error {
	body, err := readBody(w, r, "application/json")
	if err != nil {
		return err
	}
	return strictjson.Decode(body, v)
}

func readBody(w http.ResponseWriter, r *http.Request, want string) ([]byte, error) {
	types := r.Header.Values("Content-Type")
	if len(types) != 1 || !isType(types[0], want) {
		return nil, fault.New(fault.UnsupportedMediaType, "send the body as Content-Type: %s", want)
	}
	if r.Header.Get("Content-Encoding") != "" {
		return nil, fault.New(fault.UnsupportedMediaType, "send the body without Content-Encoding")
	}
	// A sender that dawdles must not keep a slot. Not every connection knows deadlines.
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTimeout))
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if _, large := errors.AsType[*http.MaxBytesError](err); large {
		return nil, fault.New(fault.BodyTooLarge, "the body has more than %d bytes", maxBody)
	}
	if err != nil {
		return nil, fault.Wrap(fault.InvalidRequest, err, "the body could not be read to its end")
	}
	return body, nil
}

// isType accepts a charset only if it is the one that the body is read as.
func isType(header, want string) bool {
	got, params, err := mime.ParseMediaType(header)
	charset, named := params["charset"]
	return err == nil && got == want && (!named || strings.EqualFold(charset, "utf-8"))
}

// optional reads a member that may be left out but, if there, must say something.
func optional(pointer string, s *string) (string, error) {
	if s == nil {
		return "", nil
	}
	if *s == "" {
		return "", fault.Invalid(pointer, "is empty; leave the member out instead")
	}
	return *s, nil
}

func writeJSON(w http.ResponseWriter, status int, v any) error {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	_ = e.Encode(v) // the client is gone if this fails
	return nil
}

// caller verifies the agent of a request that has no subject_token.
func (a *API) caller(r *http.Request) (identity.Caller, error) {
	return a.callerWith(r, "")
}

func (a *API) callerWith(r *http.Request, subject string) (identity.Caller, error) {
	p, err := a.bearer(r)
	if err != nil {
		return identity.Caller{}, err
	}
	p.Subject = subject
	c, err := a.Identity.Caller(r.Context(), p)
	if err != nil {
		a.Metrics.TokensRefused.WithLabelValues("agent").Inc()
	}
	return c, err
}

var visibleASCII = regexp.MustCompile(`^[!-~]{1,255}$`)

func idempotencyKey(r *http.Request) (string, error) {
	values := r.Header.Values("Idempotency-Key")
	if len(values) == 0 {
		return "", nil
	}
	if len(values) > 1 || !visibleASCII.MatchString(values[0]) {
		return "", fault.Invalid("Idempotency-Key", "expected one value of 1 to 255 visible ASCII characters")
	}
	return values[0], nil
}

// preferWait reads wait=SECONDS of the Prefer header (RFC 7240 §4.3), up to max.
func preferWait(r *http.Request, max time.Duration) (time.Duration, error) {
	for _, p := range strings.Split(strings.Join(r.Header.Values("Prefer"), ","), ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(p), "=")
		if !strings.EqualFold(strings.TrimSpace(name), "wait") {
			continue
		}
		value, _, _ = strings.Cut(value, ";") // RFC 7240 §2: parameters, of which wait has none
		n, err := strconv.ParseUint(strings.Trim(strings.TrimSpace(value), `"`), 10, 31)
		if err != nil {
			return 0, fault.Invalid("Prefer", "expected wait=SECONDS, such as wait=60")
		}
		return min(time.Duration(n)*time.Second, max), nil
	}
	return 0, nil
}

// queryWait reads ?wait=30s (or 30), up to max.
func queryWait(r *http.Request, max time.Duration) (time.Duration, error) {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil || len(query["wait"]) > 1 {
		return 0, fault.Invalid("wait", "expected one duration such as 30s")
	}
	if !query.Has("wait") {
		return 0, nil
	}
	v := query.Get("wait")
	d, err := time.ParseDuration(v)
	if n, e := strconv.ParseUint(v, 10, 31); e == nil {
		d, err = time.Duration(n)*time.Second, nil
	}
	if err != nil || d < 0 {
		return 0, fault.Invalid("wait", "expected a duration such as 30s")
	}
	return min(d, max), nil
}
