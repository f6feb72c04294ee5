package minter

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/writsec/writ/internal/strictjson"
)

const (
	maxAnswer = 64 << 10 // bytes of a target's answer
	maxToken  = 16 << 10 // bytes of a token
	maxMember = 4 << 10  // bytes of anything else that is handed on
	maxLife   = 400 * 24 * time.Hour
	// maxPause bounds how long a target can have itself left alone: Retry-After must not
	// switch revocation off.
	maxPause = time.Minute
)

// pause keeps to Retry-After (RFC 9110 §10.2.3).
type pause struct{ until atomic.Int64 }

func (p *pause) check(now time.Time) error {
	if until := time.UnixMilli(p.until.Load()); now.Before(until) {
		return unavailable{later{until.UTC(), "the target asked to be left alone"}}
	}
	return nil
}

func (p *pause) set(header string, now time.Time) (until time.Time, ok bool) {
	var d time.Duration
	if n, err := strconv.ParseUint(header, 10, 31); err == nil {
		d = time.Duration(n) * time.Second
	} else if at, err := http.ParseTime(header); err == nil {
		d = at.Sub(now)
	}
	if d <= 0 {
		return time.Time{}, false
	}
	until = now.Add(min(d, maxPause))
	p.until.Store(until.UnixMilli())
	return until.UTC(), true
}

// later is an error that time cures.
type later struct {
	at  time.Time
	why string
}

func (e later) Error() string { return e.why + " until " + e.at.Format(time.RFC3339) }

// RetryAt is when it makes sense to ask again.
func (e later) RetryAt() time.Time { return e.at }

// unavailable is an error that the target gives whatever it is asked.
type unavailable struct{ error }

func (e unavailable) Unwrap() error { return e.error }

// overload are the states in which a target serves nobody.
var overload = []int{http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout}

// refused is an answer of a target that is no success.
type refused struct {
	status int
	code   string // a known error code, or ""
}

func (e refused) Error() string {
	if e.code == "" {
		return fmt.Sprintf("the target answered with status %d", e.status)
	}
	return fmt.Sprintf("the target answered with status %d, error %s", e.status, e.code)
}

// errorCodes are those that are repeated. A target may say anything in the place of one,
// such as the token that it was sent.
var errorCodes = []string{
	"invalid_request", "invalid_client", "invalid_grant", "unauthorized_client", "unsupported_grant_type", "invalid_scope", // RFC 6749 §5.2
	"invalid_target", "unsupported_token_type", "invalid_authorization_details", "use_dpop_nonce", // RFC 8707, 7009, 9396, 9449
	"invalid_token", "insufficient_scope", "access_denied", "temporarily_unavailable", "server_error", "slow_down",
	"interaction_required", "consent_required", "invalid_subject_token", "unsupported_response_type",
	"invalid_request_error", "authentication_error", "permission_error", "not_found_error", "rate_limit_error", "api_error", "overloaded_error",
}

// question is a request to a target, but for the client's authentication.
type question struct {
	endpoint string
	form     map[string]string
	headers  map[string]string
	json     bool
}

// ask sends parameters to an endpoint, with the client's authentication, and returns
// the JSON object of a success. Any other answer is a refused or, with Retry-After, a
// later. No error has anything of the request or of the answer in it but such a code.
func (m *OAuth) ask(ctx context.Context, p *pause, q question) ([]byte, error) {
	if err := p.check(m.Now()); err != nil {
		return nil, err
	}
	req, err := m.newRequest(ctx, q)
	if err != nil {
		return nil, err
	}
	res, err := m.HTTP.Do(req)
	if err != nil {
		return nil, unreached(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	if err != nil {
		return nil, unreached(err)
	}
	if res.StatusCode/100 != 2 {
		until, wait := p.set(res.Header.Get("Retry-After"), m.Now())
		if wait && (res.StatusCode == http.StatusTooManyRequests || res.StatusCode >= 500) {
			return nil, unavailable{later{until, refused{res.StatusCode, codeOf(body)}.Error() + " and asked to be left alone"}}
		}
		if slices.Contains(overload, res.StatusCode) {
			return nil, unavailable{refused{res.StatusCode, codeOf(body)}}
		}
		return nil, refused{res.StatusCode, codeOf(body)}
	}
	if len(body) > maxAnswer {
		return nil, fmt.Errorf("the target's answer is larger than %d bytes", maxAnswer)
	}
	if len(body) > 0 {
		switch kind, _, err := mime.ParseMediaType(res.Header.Get("Content-Type")); {
		case kind == "text/html":
			return nil, errors.New("the target answered with a page for people")
		case err != nil || kind != "application/json":
			return nil, errNotJSON
		}
	}
	return body, nil
}

var errNotJSON = errors.New("the target's answer is not JSON")

func (m *OAuth) newRequest(ctx context.Context, q question) (*http.Request, error) {
	sent := maps.Clone(q.form)
	var basic string
	switch c := m.Client; c.Auth {
	case "client_secret_basic", "client_secret_post":
		secret, err := c.Secret()
		if err != nil {
			return nil, fmt.Errorf("client secret: %w", err)
		}
		if c.Auth == "client_secret_basic" {
			basic = secret
		} else {
			sent["client_id"], sent["client_secret"] = c.ID, secret
		}
	case "private_key_jwt":
		audience := c.Audience
		if audience == "" {
			audience = q.endpoint
		}
		proof, err := c.proof(m.Keys, audience, m.Now())
		if err != nil {
			return nil, err
		}
		sent["client_id"], sent["client_assertion"] = c.ID, proof
		sent["client_assertion_type"] = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
	default:
		if c.ID != "" {
			sent["client_id"] = c.ID
		}
	}
	body, kind := encode(sent), "application/x-www-form-urlencoded"
	if q.json {
		var err error
		if body, err = json.Marshal(sent); err != nil {
			return nil, fmt.Errorf("encode request: %w", err)
		}
		kind = "application/json"
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, q.endpoint, bytes.NewReader(body))
	if err != nil {
		return nil, errors.New("the endpoint is no URL")
	}
	for name, v := range q.headers {
		req.Header.Set(name, v)
	}
	req.Header.Set("Content-Type", kind)
	req.Header.Set("Accept", "application/json")
	if basic != "" {
		req.SetBasicAuth(url.QueryEscape(m.Client.ID), url.QueryEscape(basic)) // RFC 6749 §2.3.1
	}
	return req, nil
}

func encode(form map[string]string) []byte {
	v := url.Values{}
	for name, value := range form {
		v.Set(name, value)
	}
	return []byte(v.Encode())
}

// unreached says why there is no answer. What net/http says of an answer that is not
// HTTP repeats its bytes, which may be a token, so only what is known to be harmless
// is told.
func unreached(err error) error {
	if certificate, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return unavailable{fmt.Errorf("reach the target: %w", certificate)}
	}
	if dial, ok := errors.AsType[*net.OpError](err); ok && dial.Op == "dial" {
		return unavailable{fmt.Errorf("reach the target: %w", dial)}
	}
	if timeout, ok := errors.AsType[net.Error](err); ok && timeout.Timeout() || errors.Is(err, context.DeadlineExceeded) {
		return unavailable{errors.New("the target did not answer in time")}
	}
	if errors.Is(err, context.Canceled) {
		return unavailable{context.Canceled}
	}
	return unavailable{errors.New("the connection to the target failed")}
}

// codeOf reads the error code of RFC 6749 §5.2, or the type of an error that is an
// object, as some targets have it.
func codeOf(body []byte) string {
	if len(body) > maxAnswer {
		return ""
	}
	all, err := strictjson.Object(body)
	if err != nil {
		return ""
	}
	code, ok := all["error"].(string)
	if !ok {
		e, _ := all["error"].(map[string]any)
		code, _ = e["type"].(string)
	}
	if !slices.Contains(errorCodes, code) {
		return ""
	}
	return code
}

// answer is a token response (RFC 6749 §5.1, RFC 8693 §2.2.1).
type answer struct {
	token, tokenType, issuedType, refresh string
	life                                  time.Duration // zero: not told
	scope                                 *string       // nil: not told
	details                               []any
	all                                   map[string]any
}

// readAnswer returns the tokens that are there even where the rest is wrong, so that
// they can be revoked.
func readAnswer(body []byte) (answer, error) {
	all, err := strictjson.Object(body)
	if err != nil {
		return answer{}, errors.New("the target's answer is not one JSON object")
	}
	a := answer{all: all}
	var wrong error
	text := func(name string, most int) string {
		v, present := all[name]
		s, ok := v.(string)
		if present && v != nil && (!ok || s != "" && !visible(s, most)) {
			wrong = fmt.Errorf("the target's %s is malformed", name)
			return ""
		}
		return s
	}
	a.tokenType, a.issuedType = text("token_type", maxMember), text("issued_token_type", maxMember)
	a.refresh, a.token = text("refresh_token", maxToken), text("access_token", maxToken)
	if v, present := all["scope"]; present && v != nil {
		s, ok := v.(string)
		if !ok || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) {
			wrong = errors.New("the target's scope is malformed")
		}
		a.scope = &s
	}
	if v, present := all["expires_in"]; present && v != nil {
		n, _ := v.(json.Number)
		seconds, err := n.Int64()
		if err != nil || seconds < 1 || seconds > int64(maxLife/time.Second) {
			wrong = errors.New("the target's expires_in is not a number of seconds from 1 on")
			if f, _ := n.Float64(); f > maxLife.Seconds() { // infinite if it overflows
				a.life = maxLife
			}
		} else {
			a.life = time.Duration(seconds) * time.Second
		}
	}
	a.details, _ = all["authorization_details"].([]any)
	if wrong == nil && a.token == "" {
		wrong = errors.New("the target's answer has no access_token")
	}
	return a, wrong
}

// visible says that a text is what RFC 6750 §2.1 and header fields can carry.
func visible(s string, most int) bool {
	return s != "" && len(s) <= most && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' })
}
