package ciba

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/writsec/writ/internal/approval"
	"github.com/writsec/writ/internal/identity"
)

const acknowledged = `{"auth_req_id":"req-1","expires_in":120,"interval":7}`

var ask = approval.StartRequest{Hint: "alice", Message: "hr.offboard#E17#CODE", ExpiresIn: 90*time.Second + time.Millisecond}

func TestStartSendsExactlyThis(t *testing.T) {
	t.Parallel()
	p := newProvider(t)
	p.backchannel = answer(200, acknowledged)
	c := p.client()
	withACR := ask
	withACR.ACRValues, withACR.ExpiresIn = []string{"phr", "phrh"}, time.Millisecond
	for _, r := range []approval.StartRequest{ask, withACR} {
		got := c.Start(t.Context(), r)
		want := approval.StartResult{Outcome: approval.Started, AuthReqID: "req-1", ExpiresIn: 2 * time.Minute, Interval: 7 * time.Second}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("(-want +got):\n%s", d)
		}
	}
	sent := p.sent("/bc")
	if d := cmp.Diff(url.Values{
		"scope": {"openid"}, "login_hint": {"alice"}, "binding_message": {"hr.offboard#E17#CODE"}, "requested_expiry": {"90"},
	}, sent[0].form); d != "" {
		t.Errorf("form (-want +got):\n%s", d)
	}
	if d := cmp.Diff(url.Values{
		"scope": {"openid"}, "login_hint": {"alice"}, "binding_message": {"hr.offboard#E17#CODE"}, "requested_expiry": {"1"},
		"acr_values": {"phr phrh"},
	}, sent[1].form); d != "" {
		t.Errorf("form with acr (-want +got):\n%s", d)
	}
	// RFC 6749 §2.3.1: id and secret are form-encoded before they are joined.
	user, password, _ := (&http.Request{Header: sent[0].header}).BasicAuth()
	if user != "writ%3Aclient%2F%C3%BC" || password != "p%26ss+w%C3%B6rd%25%3A%2B%2F%3D" {
		t.Errorf("authenticated as %q, %q", user, password)
	}
	if ct := sent[0].header.Get("Content-Type"); ct != "application/x-www-form-urlencoded" {
		t.Errorf("content type %q", ct)
	}
}

func TestPollSendsExactlyThis(t *testing.T) {
	t.Parallel()
	p := newProvider(t)
	p.token = answer(400, `{"error":"authorization_pending"}`)
	c := p.client(func(c *Config) { c.AuthInBody = true })
	if got := c.Poll(t.Context(), "req &1"); got.Outcome != approval.PollPending {
		t.Errorf("%+v", got)
	}
	sent := p.sent("/token")[0]
	if d := cmp.Diff(url.Values{
		"grant_type": {"urn:openid:params:grant-type:ciba"}, "auth_req_id": {"req &1"},
		"client_id": {clientID}, "client_secret": {clientSecret},
	}, sent.form); d != "" {
		t.Errorf("form (-want +got):\n%s", d)
	}
	if sent.header.Get("Authorization") != "" {
		t.Error("authenticated twice")
	}
}

func TestHint(t *testing.T) {
	t.Parallel()
	user := identity.Principal{Claims: map[string]any{"sub": "alice", "email": "a@x", "n": json.Number("7"), "empty": ""}}
	for _, c := range []struct{ template, want, missing string }{
		{"{sub}", "alice", ""},
		{`{"format":"iss_sub","iss":"https://x/","sub":"{sub}"}`, `{"format":"iss_sub","iss":"https://x/","sub":"alice"}`, ""},
		{"{email}/{sub}", "a@x/alice", ""},
		{"{phone}", "", "phone"},
		{"{n}", "", "n"},
		{"{empty}", "", "empty"},
	} {
		got, err := New(Config{LoginHint: c.template}).Hint(user)
		if (err != nil) != (c.missing != "") || err == nil && got != c.want || err != nil && !strings.HasSuffix(err.Error(), c.missing) {
			t.Errorf("%s: %q, %v", c.template, got, err)
		}
	}
}

var ignoreErr = cmpopts.IgnoreFields(approval.StartResult{}, "Err")

// CIBA Core §7.3 and §13.
func TestStartOutcomes(t *testing.T) {
	t.Parallel()
	oauth := func(code string) string { return fmt.Sprintf(`{"error":%q,"error_description":"for people"}`, code) }
	refused := func(reason string) approval.StartResult {
		return approval.StartResult{Outcome: approval.StartRefused, Reason: reason}
	}
	unclear := func(reason string) approval.StartResult {
		return approval.StartResult{Outcome: approval.StartUnclear, Reason: reason}
	}
	ok := func(life, interval time.Duration) approval.StartResult {
		return approval.StartResult{Outcome: approval.Started, AuthReqID: "r", ExpiresIn: life, Interval: interval}
	}
	later := func(d time.Duration) approval.StartResult {
		return approval.StartResult{Outcome: approval.StartLater, RetryAfter: d}
	}
	const invalid, lost = "acknowledgement_invalid", "the provider's answer was lost"
	for _, c := range []struct {
		name    string
		handler http.HandlerFunc
		want    approval.StartResult
	}{
		{"no interval", answer(200, `{"auth_req_id":"r","expires_in":60}`), ok(time.Minute, 5*time.Second)},
		{"null interval", answer(200, `{"auth_req_id":"r","expires_in":60,"interval":null}`), ok(time.Minute, 5*time.Second)},
		{"zero interval", answer(200, `{"auth_req_id":"r","expires_in":60,"interval":0}`), ok(time.Minute, 5*time.Second)},
		{"strings", answer(200, `{"auth_req_id":"r","expires_in":"60","interval":"2"}`), ok(time.Minute, 2*time.Second)},
		{"huge interval", answer(200, `{"auth_req_id":"r","expires_in":60,"interval":2000000000}`), ok(time.Minute, 2000000000*time.Second)},
		{"absurd interval", answer(200, `{"auth_req_id":"r","expires_in":60,"interval":1e300}`), unclear(invalid)},
		{"unknown members", answer(200, `{"auth_req_id":"r","expires_in":60,"x":{}}`), ok(time.Minute, 5*time.Second)},
		{"no expires_in", answer(200, `{"auth_req_id":"r"}`), unclear(invalid)},
		{"null expires_in", answer(200, `{"auth_req_id":"r","expires_in":null}`), unclear(invalid)},
		{"zero expires_in", answer(200, `{"auth_req_id":"r","expires_in":0}`), unclear(invalid)},
		{"negative expires_in", answer(200, `{"auth_req_id":"r","expires_in":-1}`), unclear(invalid)},
		{"NaN", answer(200, `{"auth_req_id":"r","expires_in":"NaN"}`), unclear(invalid)},
		{"no auth_req_id", answer(200, `{"expires_in":60}`), unclear(invalid)},
		{"auth_req_id of another type", answer(200, `{"auth_req_id":7,"expires_in":60}`), unclear(invalid)},
		{"auth_req_id too long", answer(200, `{"auth_req_id":"`+strings.Repeat("r", maxID+1)+`","expires_in":60}`), unclear(invalid)},
		{"HTML", answer(200, `<html>Welcome</html>`), unclear(invalid)},
		{"nothing", answer(200, ``), unclear(invalid)},
		{"too big", big(`{"auth_req_id":"r","expires_in":60`), unclear(lost)},
		{"cut short", cutShort(200), unclear(lost)},
		{"dropped", dropped, unclear(lost)},

		{"invalid_request", answer(400, oauth("invalid_request")), refused("invalid_request")},
		{"invalid_scope", answer(400, oauth("invalid_scope")), refused("invalid_scope")},
		{"expired_login_hint_token", answer(400, oauth("expired_login_hint_token")), refused("expired_login_hint_token")},
		{"unknown_user_id", answer(400, oauth("unknown_user_id")), refused("unknown_user_id")},
		{"unauthorized_client", answer(400, oauth("unauthorized_client")), refused("unauthorized_client")},
		{"missing_user_code", answer(400, oauth("missing_user_code")), refused("missing_user_code")},
		{"invalid_user_code", answer(400, oauth("invalid_user_code")), refused("invalid_user_code")},
		{"invalid_binding_message", answer(400, oauth("invalid_binding_message")), refused("invalid_binding_message")},
		{"invalid_client", answer(401, oauth("invalid_client")), refused("invalid_client")},
		{"access_denied", answer(403, oauth("access_denied")), refused("access_denied")},
		{"HTML error", answer(404, `<html>`), refused("status_404")},
		{"error code with a line break", answer(400, `{"error":"a\nb"}`), refused("status_400")},
		{"error code too long", answer(400, `{"error":"`+strings.Repeat("e", 65)+`"}`), refused("status_400")},
		{"error code that is none", answer(400, `{"error":{}}`), refused("status_400")},

		{"503", answer(503, oauth("server_error")), later(0)},
		{"503 with a wait", answer(503, ``, "Retry-After", "20"), later(20 * time.Second)},
		{"429", answer(429, ``, "Retry-After", "3"), later(3 * time.Second)},
		{"503 with an absurd wait", answer(503, ``, "Retry-After", "4000000000"), later(24 * time.Hour)},
		{"503 with nonsense", answer(503, ``, "Retry-After", "99999999999999999999"), later(0)},
		{"503 with a negative wait", answer(503, ``, "Retry-After", "-5"), later(0)},
		{"503 with a past date", answer(503, ``, "Retry-After", "Fri, 31 Dec 1999 23:59:59 GMT"), later(0)},
		{"500", answer(500, oauth("server_error")), unclear("status_500")},
		{"502", answer(502, `<html>`), unclear("status_502")},
		{"504", answer(504, ``), unclear("status_504")},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			p := newProvider(t)
			p.backchannel = c.handler
			got := p.client().Start(t.Context(), ask)
			if d := cmp.Diff(c.want, got, ignoreErr); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
			if n := len(p.sent("/bc")); n != 1 {
				t.Errorf("%d requests", n)
			}
		})
	}
}

func TestRetryAfterDate(t *testing.T) {
	t.Parallel()
	got := retryAfter(time.Now().Add(30 * time.Second).UTC().Format(http.TimeFormat))
	if got < 28*time.Second || got > 30*time.Second {
		t.Errorf("%v", got)
	}
}

// CIBA Core §10.1 and §11.
func TestPollOutcomes(t *testing.T) {
	t.Parallel()
	type result = approval.PollResult
	oauth := func(code string) string { return fmt.Sprintf(`{"error":%q}`, code) }
	for _, c := range []struct {
		name    string
		handler http.HandlerFunc
		want    result
	}{
		{"pending", answer(400, oauth("authorization_pending")), result{Outcome: approval.PollPending}},
		{"pending, with a wait", answer(400, oauth("authorization_pending"), "Retry-After", "9"), result{Outcome: approval.PollPending, RetryAfter: 9 * time.Second}},
		{"slow_down", answer(400, oauth("slow_down")), result{Outcome: approval.PollSlowDown}},
		{"slow_down, 429, interval", answer(429, `{"error":"slow_down","interval":10}`, "Retry-After", "8"),
			result{Outcome: approval.PollSlowDown, Interval: 10 * time.Second, RetryAfter: 8 * time.Second}},
		{"slow_down, null interval", answer(400, `{"error":"slow_down","interval":null}`), result{Outcome: approval.PollSlowDown}},
		{"access_denied", answer(400, oauth("access_denied")), result{Outcome: approval.PollDenied}},
		{"access_denied, 403", answer(403, oauth("access_denied")), result{Outcome: approval.PollDenied}},
		{"expired_token", answer(400, oauth("expired_token")), result{Outcome: approval.PollExpired}},
		{"invalid_grant", answer(400, oauth("invalid_grant")), result{Outcome: approval.PollUnknown}},
		{"unauthorized_client", answer(400, oauth("unauthorized_client")), result{Outcome: approval.PollFailed, Reason: "unauthorized_client"}},
		{"transaction_failed", answer(400, oauth("transaction_failed")), result{Outcome: approval.PollFailed, Reason: "transaction_failed"}},
		{"invalid_client", answer(401, oauth("invalid_client")), result{Outcome: approval.PollFailed, Reason: "invalid_client"}},
		{"something new", answer(400, oauth("brand_new")), result{Outcome: approval.PollFailed, Reason: "brand_new"}},
		{"server_error", answer(400, oauth("server_error")), result{Outcome: approval.PollUnreachable}},
		{"503", answer(503, oauth("access_denied"), "Retry-After", "20"), result{Outcome: approval.PollUnreachable, RetryAfter: 20 * time.Second}},
		{"500", answer(500, ``), result{Outcome: approval.PollUnreachable}},
		{"HTML error", answer(400, `<html>`), result{Outcome: approval.PollUnreachable}},
		{"HTML", answer(200, `<html>`), result{Outcome: approval.PollUnreachable}},
		{"204", answer(204, ``), result{Outcome: approval.PollUnreachable}},
		{"too big", big(`{"id_token":"x"`), result{Outcome: approval.PollUnreachable}},
		{"cut short", cutShort(200), result{Outcome: approval.PollUnreachable}},
		{"dropped", dropped, result{Outcome: approval.PollUnreachable}},
		{"tokens", answer(200, `{"id_token":"x"}`), result{Outcome: approval.PollAnswered, Answer: []byte(`{"id_token":"x"}`)}},
		{"success without tokens", answer(200, `{}`), result{Outcome: approval.PollAnswered, Answer: []byte(`{}`)}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			p := newProvider(t)
			p.token = c.handler
			got := p.client().Poll(t.Context(), "req-1")
			if got.Outcome == approval.PollUnreachable && got.Err == nil {
				t.Error("unreachable for no reason")
			}
			if d := cmp.Diff(c.want, got, cmpopts.IgnoreFields(result{}, "Err")); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}
}

// Negative test 31.
func TestRedirectsAreNotFollowed(t *testing.T) {
	t.Parallel()
	for _, status := range []int{301, 302, 303, 307, 308} {
		elsewhere := 0
		thief := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { elsewhere++ }))
		defer thief.Close()
		p := newProvider(t)
		// A body in OAuth's form doesn't make a redirect an answer.
		redirect := answer(status, `{"error":"access_denied","auth_req_id":"r","expires_in":60}`, "Location", thief.URL)
		p.backchannel, p.token = redirect, redirect
		c := p.client()
		if got := c.Start(t.Context(), ask); got.Outcome != approval.StartRefused {
			t.Errorf("%d: start %+v", status, got)
		}
		if got := c.Poll(t.Context(), "r"); got.Outcome != approval.PollUnreachable {
			t.Errorf("%d: poll %+v", status, got)
		}
		if elsewhere > 0 {
			t.Errorf("%d: followed, secret and all", status)
		}
	}
}

func TestStartThatCertainlyDidNotHappen(t *testing.T) {
	t.Parallel()
	later := func(t *testing.T, c *Client) {
		t.Helper()
		got := c.Start(t.Context(), ask)
		if got.Outcome != approval.StartLater || got.Err == nil {
			t.Errorf("%+v", got)
		}
	}
	t.Run("no discovery", func(t *testing.T) {
		t.Parallel()
		p := newProvider(t)
		p.server.Close()
		c := p.client()
		later(t, c)
		if got := c.Poll(t.Context(), "r"); got.Outcome != approval.PollUnreachable {
			t.Errorf("%+v", got)
		}
	})
	t.Run("no CIBA there", func(t *testing.T) {
		t.Parallel()
		p := newProvider(t)
		p.noCIBA = true
		c := p.client()
		later(t, c)
		p.mu.Lock()
		p.noCIBA, p.backchannel = false, answer(200, acknowledged)
		p.mu.Unlock()
		if got := c.Start(t.Context(), ask); got.Outcome != approval.Started {
			t.Errorf("a failed discovery is remembered: %+v", got)
		}
	})
	t.Run("connection refused", func(t *testing.T) {
		t.Parallel()
		p := newProvider(t)
		c := p.client()
		if _, err := c.discover(t.Context()); err != nil {
			t.Fatal(err)
		}
		p.server.Close()
		later(t, c)
	})
	// This once counted as sent, which ends the approval.
	t.Run("TLS that does not verify", func(t *testing.T) {
		t.Parallel()
		reached := 0
		secure := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached++ }))
		defer secure.Close()
		p := newProvider(t)
		c := p.client()
		c.endpoints = &endpoints{Backchannel: secure.URL, Token: secure.URL}
		later(t, c)
		if reached > 0 {
			t.Error("the provider was reached")
		}
	})
}

func TestStartWhoseReplyIsTooSlow(t *testing.T) {
	t.Parallel()
	p := newProvider(t)
	p.backchannel = func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-r.Context().Done():
		case <-time.After(10 * time.Second):
		}
	}
	c := p.client()
	if _, err := c.discover(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if got := c.Start(ctx, ask); got.Outcome != approval.StartUnclear {
		t.Errorf("%+v", got)
	}
}

func TestErrorsNameNoSecret(t *testing.T) {
	t.Parallel()
	p := newProvider(t)
	p.backchannel, p.token = dropped, dropped
	c := p.client(func(c *Config) { c.AuthInBody = true })
	for _, err := range []error{c.Start(t.Context(), ask).Err, c.Poll(t.Context(), "the-request-id").Err} {
		if err == nil || strings.Contains(err.Error(), clientSecret) || strings.Contains(err.Error(), "the-request-id") {
			t.Errorf("%v", err)
		}
	}
}

// Negative tests 22 and 29.
func TestVerify(t *testing.T) {
	t.Parallel()
	p := newProvider(t)
	other := newProvider(t)
	stranger, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	want := approval.Expectation{Subject: "alice", ACRValues: []string{"phr", "phrh"}, AuthReqID: "req-1", NotBefore: now.Add(-30 * time.Second)}
	type change = func(claims map[string]any)
	set := func(name string, v any) change { return func(c map[string]any) { c[name] = v } }
	const reqClaim = "urn:openid:params:jwt:claim:auth_req_id"
	for _, c := range []struct {
		name   string
		change change
		ok     bool
	}{
		{"as it should be", func(map[string]any) {}, true},
		{"the other acr", set("acr", "phrh"), true},
		{"at_hash", set("at_hash", atHash("access")), true},
		{"auth_req_id", set(reqClaim, "req-1"), true},
		{"a little older than the request", set("iat", now.Add(-80*time.Second).Unix()), true},
		{"somebody else", set("sub", "bob"), false},
		{"nobody", func(c map[string]any) { delete(c, "sub") }, false},
		{"another client", set("aud", "another"), false},
		{"several audiences", set("aud", []string{clientID, "another"}), false},
		{"issued to another", set("azp", "another"), false},
		{"another issuer", set("iss", other.server.URL), false},
		{"lower acr", set("acr", "pwd"), false},
		{"acr of another type", set("acr", []string{"phr"}), false},
		{"no acr", func(c map[string]any) { delete(c, "acr") }, false},
		{"older than the request", set("iat", now.Add(-100*time.Second).Unix()), false},
		{"no iat", func(c map[string]any) { delete(c, "iat") }, false},
		{"of the future", set("iat", now.Add(time.Hour).Unix()), false},
		{"expired", set("exp", now.Add(-time.Second).Unix()), false},
		{"never ends", func(c map[string]any) { delete(c, "exp") }, false},
		{"about another request", set(reqClaim, "req-2"), false},
		{"about a number", set(reqClaim, 1), false},
		{"wrong at_hash", set("at_hash", atHash("another")), false},
		{"at_hash of another type", set("at_hash", 1), false},
		{"empty at_hash", set("at_hash", ""), false},
		{"a logout token", set("events", map[string]any{}), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			claims := map[string]any{
				"iss": p.server.URL, "sub": "alice", "aud": clientID, "iat": now.Unix(), "exp": now.Add(time.Minute).Unix(),
				"acr": "phr", "amr": []any{"pin", 7, "hwk"}, "auth_time": now.Unix(),
			}
			c.change(claims)
			e, err := p.client().Verify(t.Context(), tokensJSON(t, p.idToken(nil, claims)), want)
			switch {
			case (err == nil) != c.ok:
				t.Errorf("%v", err)
			case errors.Is(err, approval.ErrUnavailable):
				t.Errorf("not final: %v", err)
			case c.ok && (!cmp.Equal(e.AMR, []string{"pin", "hwk"}) || e.AuthTime.Unix() != now.Unix() || e.ACR != claims["acr"]):
				t.Errorf("evidence %+v", e)
			case !c.ok && !cmp.Equal(e, approval.Evidence{}):
				t.Errorf("evidence beside an error: %+v", e)
			}
		})
	}
	claims := map[string]any{
		"iss": p.server.URL, "sub": "alice", "aud": clientID, "iat": now.Unix(), "exp": now.Add(time.Minute).Unix(), "acr": "phr",
	}
	good := p.idToken(nil, claims)
	t.Run("any acr", func(t *testing.T) {
		t.Parallel()
		x := want
		x.ACRValues = nil
		if _, err := p.client().Verify(t.Context(), tokensJSON(t, good), x); err != nil {
			t.Error(err)
		}
	})
	for name, answer := range map[string][]byte{
		"signed by a stranger": tokensJSON(t, p.idToken(stranger, claims)),
		"altered":              tokensJSON(t, good[:len(good)-8]+"AAAAAAAA"),
		"no ID token":          []byte(`{"access_token":"access"}`),
		"ID token of no type":  []byte(`{"id_token":7}`),
		"not JSON":             []byte(`<html>`),
		"not a JWT":            tokensJSON(t, "x.y"),
		"nothing":              nil,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, err := p.client().Verify(t.Context(), answer, want); err == nil || errors.Is(err, approval.ErrUnavailable) {
				t.Errorf("%v", err)
			}
		})
	}
	t.Run("at_hash without an access token", func(t *testing.T) {
		t.Parallel()
		with := map[string]any{"at_hash": atHash("")}
		for k, v := range claims {
			with[k] = v
		}
		answer := []byte(`{"id_token":"` + p.idToken(nil, with) + `"}`)
		if _, err := p.client().Verify(t.Context(), answer, want); err == nil {
			t.Error("accepted")
		}
	})
	t.Run("keys away", func(t *testing.T) {
		t.Parallel()
		q := newProvider(t)
		q.keysAway = true
		mine := map[string]any{}
		for k, v := range claims {
			mine[k] = v
		}
		mine["iss"] = q.server.URL
		c := q.client()
		for range 2 {
			if _, err := c.Verify(t.Context(), tokensJSON(t, q.idToken(nil, mine)), want); !errors.Is(err, approval.ErrUnavailable) {
				t.Errorf("%v, want ErrUnavailable", err)
			}
		}
	})
}

func tokensJSON(t *testing.T, idToken string) []byte {
	t.Helper()
	b, err := json.Marshal(map[string]any{"id_token": idToken, "access_token": "access", "refresh_token": "refresh", "token_type": "Bearer"})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestDiscard(t *testing.T) {
	t.Parallel()
	for name, h := range map[string]http.HandlerFunc{
		"revoked":        answer(200, ``),
		"can't be":       answer(400, `{"error":"unsupported_token_type"}`),
		"down":           answer(503, ``),
		"no such route":  nil,
		"drops the call": dropped,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newProvider(t)
			p.revoke = h
			p.client().Discard(t.Context(), tokensJSON(t, "id"))
			got := map[string]string{}
			for _, r := range p.sent("/revoke") {
				got[r.form.Get("token_type_hint")] = r.form.Get("token")
				if r.header.Get("Authorization") == "" {
					t.Error("not authenticated")
				}
			}
			if d := cmp.Diff(map[string]string{"access_token": "access", "refresh_token": "refresh"}, got); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}
	for _, answer := range []string{``, `{}`, `<html>`, `{"access_token":7}`, `{"id_token":"x"}`} {
		p := newProvider(t)
		p.client().Discard(t.Context(), []byte(answer))
		if n := len(p.sent("/revoke")); n != 0 {
			t.Errorf("%q: %d calls", answer, n)
		}
	}
	p := newProvider(t)
	p.server.Close()
	p.client().Discard(t.Context(), tokensJSON(t, "id")) // must not hang or panic
}

func FuzzResponses(f *testing.F) {
	for _, s := range []string{
		acknowledged, `{"auth_req_id":"r","expires_in":"60","interval":null}`, `{"error":"slow_down","interval":1e9}`,
		`{"error":"a\u0000"}`, `{"auth_req_id":"r","expires_in":-1}`, `[]`, `null`, `"x"`, `{"expires_in":"0x1p4","auth_req_id":"r"}`, `{"expires_in":"\"\"5"}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		got := acknowledgement(response{status: 200, body: body})
		if got.Outcome == approval.Started {
			if got.AuthReqID == "" || len(got.AuthReqID) > maxID || got.ExpiresIn < time.Second || got.Interval < time.Second {
				t.Errorf("%+v", got)
			}
			if got.ExpiresIn > 1<<31*time.Second || got.Interval > 1<<31*time.Second {
				t.Errorf("unbounded: %+v", got)
			}
		} else if got.Outcome != approval.StartUnclear || got.Reason == "" {
			t.Errorf("%+v", got)
		}
		code, interval := errorCode(response{status: 400, body: body})
		if len(code) > 64 || bytes.ContainsAny([]byte(code), " \n\x00\x7f") || interval > 1<<31*time.Second || interval < -(1<<31)*time.Second {
			t.Errorf("%q %v", code, interval)
		}
	})
}
