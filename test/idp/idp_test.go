package idp

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const cibaGrant = "urn:openid:params:grant-type:ciba"

// header is the protected header of a token.
func header(t *testing.T, token string) map[string]any {
	t.Helper()
	raw, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[0])
	if err != nil {
		t.Fatal(err)
	}
	var h map[string]any
	if err := json.Unmarshal(raw, &h); err != nil {
		t.Fatal(err)
	}
	return h
}

// verified checks a token by the keys that discovery leads to, and returns its
// claims.
func verified(t *testing.T, p *IdP, token, audience string) map[string]any {
	t.Helper()
	ctx := oidc.ClientContext(t.Context(), p.client)
	provider, err := oidc.NewProvider(ctx, p.Issuer)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := provider.Verifier(&oidc.Config{ClientID: audience}).Verify(ctx, token)
	if err != nil {
		t.Fatal(err)
	}
	var claims map[string]any
	if err := parsed.Claims(&claims); err != nil {
		t.Fatal(err)
	}
	return claims
}

func pick(claims map[string]any, names ...string) map[string]any {
	out := map[string]any{}
	for _, name := range names {
		if v, ok := claims[name]; ok {
			out[name] = v
		}
	}
	return out
}

func TestUserToken(t *testing.T) {
	t.Parallel()
	for _, alg := range []string{"RS256", "ES256"} {
		t.Run(alg, func(t *testing.T) {
			t.Parallel()
			p := Start(t, Config{SigningAlg: alg})
			access, id, err := p.UserToken(t.Context(), "alice", SalesAgent)
			if err != nil {
				t.Fatal(err)
			}
			if h := header(t, access); h["typ"] != "at+jwt" || h["alg"] != alg {
				t.Errorf("access token header %v", h)
			}
			want := map[string]any{
				"aud": DefaultResource, "sub": "alice", "client_id": SalesAgent, "groups": []any{"sales"},
			}
			got := pick(verified(t, p, access, DefaultResource), "aud", "sub", "client_id", "groups", "act")
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("access token (-want +got)\n%s", diff)
			}
			want = map[string]any{"aud": SalesAgent, "sub": "alice", "groups": []any{"sales"}}
			got = pick(verified(t, p, id, SalesAgent), "aud", "sub", "groups")
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("ID token (-want +got)\n%s", diff)
			}
		})
	}
}

func TestSignInRefused(t *testing.T) {
	t.Parallel()
	p := Start(t, Config{})

	_, _, err := p.UserToken(t.Context(), "mallory", SalesAgent)
	wantCode(t, err, "access_denied")

	_, err = p.authorize(t.Context(), url.Values{
		"response_type": {"code"},
		"client_id":     {SalesAgent},
		"redirect_uri":  {callback},
		"scope":         {"openid"},
		"login_hint":    {"alice"},
	})
	wantCode(t, err, "invalid_request") // no PKCE
}

func TestAgentToken(t *testing.T) {
	t.Parallel()
	p := Start(t, Config{
		Resource: "https://writ.example.test/",
		Clients:  map[string]string{"robot": "s3cret &/%"},
	})
	for _, agent := range []string{SalesAgent, HRAgent, FinanceAgent, "robot"} {
		token, err := p.AgentToken(t.Context(), agent)
		if err != nil {
			t.Fatal(err)
		}
		if typ := header(t, token)["typ"]; typ != "at+jwt" {
			t.Errorf("%s: typ %v", agent, typ)
		}
		want := map[string]any{"aud": "https://writ.example.test/", "sub": agent, "client_id": agent}
		got := pick(verified(t, p, token, p.Resource), "aud", "sub", "client_id", "groups")
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got)\n%s", agent, diff)
		}
	}
	if _, err := p.AgentToken(t.Context(), Writ); err == nil {
		t.Error("Writ got a token by client credentials")
	}
}

type cibaAnswer struct {
	AuthReqID string `json:"auth_req_id"`
	ExpiresIn int    `json:"expires_in"`
	Interval  *int   `json:"interval"`
}

type cibaTokens struct {
	AccessToken          string           `json:"access_token"`
	IDToken              string           `json:"id_token"`
	AuthorizationDetails []map[string]any `json:"authorization_details"`
}

func ask(t *testing.T, p *IdP, user string, more url.Values) (cibaAnswer, error) {
	t.Helper()
	form := url.Values{"scope": {"openid"}, "login_hint": {user}}
	for k, v := range more {
		form[k] = v
	}
	var a cibaAnswer
	err := p.post(t.Context(), "/backchannel", Writ, form, &a)
	return a, err
}

func mustAsk(t *testing.T, p *IdP, user string, more url.Values) cibaAnswer {
	t.Helper()
	a, err := ask(t, p, user, more)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func poll(t *testing.T, p *IdP, id string) (cibaTokens, error) {
	t.Helper()
	var tokens cibaTokens
	err := p.post(t.Context(), "/token", Writ, url.Values{"grant_type": {cibaGrant}, "auth_req_id": {id}}, &tokens)
	return tokens, err
}

func wantCode(t *testing.T, err error, code string) {
	t.Helper()
	fail, ok := errors.AsType[*OAuthError](err)
	if !ok || fail.Code != code {
		t.Fatalf("got %v, want %s", err, code)
	}
}

func TestCIBAApprove(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	p := Start(t, Config{})
	a := mustAsk(t, p, "carol@example.test", url.Values{
		"binding_message":  {"Pay 300 to ACME · K7QX"},
		"acr_values":       {"urn:example:high urn:example:low"},
		"requested_expiry": {"30"},
	})
	if a.Interval == nil || *a.Interval != 1 || a.ExpiresIn != 30 {
		t.Errorf("answer %+v", a)
	}

	prompt, err := p.WaitPrompt(ctx, func(q Prompt) bool { return q.AuthReqID == a.AuthReqID })
	if err != nil {
		t.Fatal(err)
	}
	want := Prompt{
		ID: "prompt-1", AuthReqID: a.AuthReqID, Account: "carol", Client: Writ, Scope: "openid",
		BindingMessage: "Pay 300 to ACME · K7QX", ACRValues: []string{"urn:example:high", "urn:example:low"},
		RequestedExpiry: 30, ExpiresIn: 30, Status: Pending,
		CreatedAt: prompt.CreatedAt, ExpiresAt: prompt.ExpiresAt,
	}
	if diff := cmp.Diff(want, prompt); diff != "" {
		t.Errorf("prompt (-want +got)\n%s", diff)
	}

	_, err = poll(t, p, a.AuthReqID)
	wantCode(t, err, "authorization_pending")
	if err := p.Approve(ctx, prompt.ID); err != nil {
		t.Fatal(err)
	}
	if err := p.Deny(ctx, prompt.ID); err == nil {
		t.Error("a prompt was answered twice")
	}
	tokens, err := poll(t, p, a.AuthReqID)
	if err != nil {
		t.Fatal(err)
	}
	claims := verified(t, p, tokens.IDToken, Writ)
	if since := time.Since(time.Unix(int64(claims["auth_time"].(float64)), 0)); since > 10*time.Second {
		t.Errorf("auth_time is %v ago", since)
	}
	wantClaims := map[string]any{"sub": "carol", "acr": "urn:example:high", "amr": []any{"mfa"}}
	if diff := cmp.Diff(wantClaims, pick(claims, "sub", "acr", "amr", "at_hash")); diff != "" {
		t.Errorf("ID token (-want +got)\n%s", diff)
	}

	// The access token is opaque, so that it can be revoked.
	if active := introspect(t, p, tokens.AccessToken); !active {
		t.Error("the access token is not active")
	}
	// A second poll after success revokes what the first one got.
	_, err = poll(t, p, a.AuthReqID)
	wantCode(t, err, "invalid_grant")
	if active := introspect(t, p, tokens.AccessToken); active {
		t.Error("the access token outlived a replay")
	}

	polls, err := p.Polls(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var outcomes []string
	for _, q := range polls {
		outcomes = append(outcomes, q.Outcome)
		if q.Prompt != prompt.ID || q.Client != Writ || q.Overlap || q.End.Before(q.Start) {
			t.Errorf("poll %+v", q)
		}
	}
	if diff := cmp.Diff([]string{"authorization_pending", "tokens", "invalid_grant"}, outcomes); diff != "" {
		t.Errorf("outcomes (-want +got)\n%s", diff)
	}
}

func introspect(t *testing.T, p *IdP, token string) bool {
	t.Helper()
	var out struct{ Active bool }
	if err := p.post(t.Context(), "/token/introspection", Writ, url.Values{"token": {token}}, &out); err != nil {
		t.Fatal(err)
	}
	return out.Active
}

func TestCIBADeny(t *testing.T) {
	t.Parallel()
	p := Start(t, Config{})
	for _, c := range []struct {
		verdict Verdict
		want    string
	}{
		{Verdict{Deny: true}, "access_denied"},
		{Verdict{Deny: true, Error: "transaction_failed"}, "transaction_failed"},
	} {
		a := mustAsk(t, p, "alice", nil)
		if err := p.Answer(t.Context(), a.AuthReqID, c.verdict); err != nil {
			t.Fatal(err)
		}
		_, err := poll(t, p, a.AuthReqID)
		wantCode(t, err, c.want)
		// The refusal is told once.
		_, err = poll(t, p, a.AuthReqID)
		wantCode(t, err, "invalid_grant")
	}
}

func TestCIBAExpire(t *testing.T) {
	t.Parallel()
	p := Start(t, Config{})
	a := mustAsk(t, p, "alice", url.Values{"requested_expiry": {"2"}})
	if _, err := p.WaitPrompt(t.Context(), func(q Prompt) bool { return q.Status == Expired }); err != nil {
		t.Fatal(err)
	}
	_, err := poll(t, p, a.AuthReqID)
	wantCode(t, err, "expired_token")
	if err := p.Approve(t.Context(), a.AuthReqID); err == nil {
		t.Error("an expired prompt was approved")
	}
}

func TestCIBASlowDown(t *testing.T) {
	t.Parallel()
	p := Start(t, Config{})
	a := mustAsk(t, p, "alice", nil)
	polls := []struct {
		wait time.Duration
		want string
	}{
		{0, "authorization_pending"},
		{0, "slow_down"}, // 6 s from now on
		{1100 * time.Millisecond, "slow_down"},
	}
	for _, c := range polls {
		time.Sleep(c.wait)
		_, err := poll(t, p, a.AuthReqID)
		wantCode(t, err, c.want)
	}

	b := mustAsk(t, p, "alice", nil)
	for range 2 {
		_, err := poll(t, p, b.AuthReqID)
		wantCode(t, err, "authorization_pending")
		time.Sleep(time.Second)
	}
}

func TestCIBANoInterval(t *testing.T) {
	t.Parallel()
	p := Start(t, Config{NoInterval: true})
	a := mustAsk(t, p, "alice", nil)
	if a.Interval != nil {
		t.Errorf("interval %d", *a.Interval)
	}
	_, err := poll(t, p, a.AuthReqID)
	wantCode(t, err, "authorization_pending")
	time.Sleep(1100 * time.Millisecond)
	_, err = poll(t, p, a.AuthReqID)
	wantCode(t, err, "slow_down") // five seconds are to be assumed
}

func TestCIBARedeemedOnce(t *testing.T) {
	t.Parallel()
	p := Start(t, Config{})
	a := mustAsk(t, p, "alice", nil)
	if err := p.Approve(t.Context(), a.AuthReqID); err != nil {
		t.Fatal(err)
	}
	const racers = 12
	// Held back, they all go on at the same moment.
	hold := Fault{Endpoint: PollEndpoint, Kind: FaultHang, Delay: 300 * time.Millisecond, Times: racers}
	if err := p.Fault(t.Context(), hold); err != nil {
		t.Fatal(err)
	}
	errs := make(chan error, racers)
	for range racers {
		go func() {
			_, err := poll(t, p, a.AuthReqID)
			errs <- err
		}()
	}
	won := 0
	for range racers {
		if err := <-errs; err == nil {
			won++
		}
	}
	polls, err := p.Polls(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	overlaps := 0
	for _, q := range polls {
		if q.Overlap {
			overlaps++
		}
	}
	if won != 1 || overlaps < racers/2 {
		t.Errorf("%d of %d polls got tokens, %d overlapped", won, racers, overlaps)
	}
}

func TestCIBAWrongPerson(t *testing.T) {
	t.Parallel()
	p := Start(t, Config{})
	a := mustAsk(t, p, "alice", nil)
	if err := p.Answer(t.Context(), a.AuthReqID, Verdict{As: "bob", ACR: "low", AMR: []string{"pwd"}}); err != nil {
		t.Fatal(err)
	}
	tokens, err := poll(t, p, a.AuthReqID)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]any{"sub": "bob", "acr": "low", "amr": []any{"pwd"}}
	if diff := cmp.Diff(want, pick(verified(t, p, tokens.IDToken, Writ), "sub", "acr", "amr")); diff != "" {
		t.Errorf("ID token (-want +got)\n%s", diff)
	}
}

func TestCIBARequestRefused(t *testing.T) {
	t.Parallel()
	p := Start(t, Config{
		BindingMessagePattern: `^[a-zA-Z0-9 ]+$`,
		Users:                 map[string]User{"dora": {UserCode: "1234"}},
	})
	for _, c := range []struct {
		user string
		more url.Values
		want string
	}{
		{"mallory", nil, "unknown_user_id"},
		{"alice", url.Values{"binding_message": {strings.Repeat("x", 129)}}, "invalid_binding_message"},
		{"alice", url.Values{"binding_message": {"a\nb"}}, "invalid_binding_message"},
		{"alice", url.Values{"binding_message": {"a-b"}}, "invalid_binding_message"},
		{"alice", url.Values{"requested_expiry": {"-1"}}, "invalid_request"},
		{"alice", url.Values{"scope": {"profile"}}, "invalid_request"},
		{"dora", nil, "missing_user_code"},
		{"dora", url.Values{"user_code": {"4321"}}, "invalid_user_code"},
	} {
		_, err := ask(t, p, c.user, c.more)
		wantCode(t, err, c.want)
	}
	mustAsk(t, p, "dora", url.Values{"user_code": {"1234"}})

	requests, err := p.Requests(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(requests) != 9 || requests[0].Outcome != "unknown_user_id" || requests[8].Outcome != "accepted" {
		t.Errorf("requests %+v", requests)
	}
	if prompts, err := p.Prompts(t.Context()); err != nil || len(prompts) != 1 {
		t.Errorf("prompts %+v, %v", prompts, err)
	}
	if err := p.Reset(t.Context()); err != nil {
		t.Fatal(err)
	}
	if prompts, err := p.Prompts(t.Context()); err != nil || len(prompts) != 0 {
		t.Errorf("after reset: prompts %+v, %v", prompts, err)
	}
}

func TestAuthorizationDetails(t *testing.T) {
	t.Parallel()
	p := Start(t, Config{AuthorizationDetailsTypes: []string{"payment"}})
	for _, amount := range []string{"", "999"} {
		a := mustAsk(t, p, "alice", url.Values{"authorization_details": {`[{"type":"payment","amount":"300"}]`}})
		var v Verdict
		want := "300"
		if amount != "" {
			v.AuthorizationDetails = []map[string]any{{"type": "payment", "amount": amount}}
			want = amount
		}
		if err := p.Answer(t.Context(), a.AuthReqID, v); err != nil {
			t.Fatal(err)
		}
		tokens, err := poll(t, p, a.AuthReqID)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]map[string]any{{"type": "payment", "amount": want}}, tokens.AuthorizationDetails); diff != "" {
			t.Errorf("details (-want +got)\n%s", diff)
		}
	}
}

func TestFaults(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	p := Start(t, Config{})
	a := mustAsk(t, p, "alice", nil)
	form := url.Values{"grant_type": {cibaGrant}, "auth_req_id": {a.AuthReqID}}.Encode()

	// raw polls once, following redirects as a careless client would.
	raw := func(t *testing.T, timeout time.Duration) (*http.Response, string, error) {
		t.Helper()
		ctx, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.Issuer+"/token", strings.NewReader(form))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		req.SetBasicAuth(Writ, p.Clients[Writ])
		res, err := p.client.Do(req)
		if err != nil {
			return nil, "", err
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		return res, string(body), err
	}

	for _, c := range []struct {
		fault   Fault
		outcome string
		check   func(*http.Response, string, error) bool
	}{
		{Fault{Kind: FaultStatus, RetryAfter: "7"}, "fault:status", func(r *http.Response, _ string, err error) bool {
			return err == nil && r.StatusCode == 503 && r.Header.Get("Retry-After") == "7"
		}},
		{Fault{Kind: FaultHTML}, "fault:html", func(r *http.Response, b string, err error) bool {
			return err == nil && strings.HasPrefix(r.Header.Get("Content-Type"), "text/html") && strings.Contains(b, "<h1>")
		}},
		{Fault{Kind: FaultBig}, "fault:big", func(_ *http.Response, b string, err error) bool {
			return err == nil && len(b) == 1<<20 && json.Valid([]byte(b))
		}},
		{Fault{Kind: FaultSlowDown}, "slow_down", func(r *http.Response, b string, err error) bool {
			return err == nil && r.StatusCode == 400 && strings.Contains(b, "slow_down")
		}},
		{Fault{Kind: FaultRedirect}, "fault:redirect", func(r *http.Response, _ string, err error) bool {
			return err == nil && r.Request.URL.Path == "/trap"
		}},
		{Fault{Kind: FaultDrop}, "fault:drop", func(_ *http.Response, _ string, err error) bool { return err != nil }},
		{Fault{Kind: FaultHang, Delay: time.Minute}, "fault:hang", func(_ *http.Response, _ string, err error) bool {
			return errors.Is(err, context.DeadlineExceeded)
		}},
		{Fault{Kind: FaultPatch, Status: 200, Set: map[string]any{"error": nil, "access_token": "x"}}, "fault:patch",
			func(r *http.Response, b string, err error) bool {
				return err == nil && r.StatusCode == 200 && strings.Contains(b, `"access_token":"x"`) && !strings.Contains(b, `"error"`)
			}},
	} {
		c.fault.Endpoint = PollEndpoint
		if err := p.Fault(ctx, c.fault); err != nil {
			t.Fatal(err)
		}
		if res, body, err := raw(t, 500*time.Millisecond); !c.check(res, body, err) {
			t.Errorf("%s: %v, %.100s, %v", c.fault.Kind, res, body, err)
		}
		// A caller that has hung up may ask before the provider has noticed.
		deadline := time.Now().Add(5 * time.Second)
		for {
			polls, err := p.Polls(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if last := polls[len(polls)-1]; last.Outcome == c.outcome && last.Fault == c.fault.Kind {
				break
			} else if time.Now().After(deadline) {
				t.Fatalf("%s: poll %+v", c.fault.Kind, last)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	trapped, err := p.Trapped(ctx)
	if err != nil || len(trapped) != 1 || trapped[0].Body != form {
		t.Errorf("trapped %+v, %v", trapped, err)
	}

	// A lost reply has done its work: the tokens are gone.
	if err := p.Approve(ctx, a.AuthReqID); err != nil {
		t.Fatal(err)
	}
	if err := p.Fault(ctx, Fault{Endpoint: PollEndpoint, Kind: FaultLostReply}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := raw(t, time.Second); err == nil {
		t.Error("the reply was not lost")
	}
	_, err = poll(t, p, a.AuthReqID)
	wantCode(t, err, "invalid_grant")

	// So has a lost reply of the first request: the person is asked.
	if err := p.Fault(ctx, Fault{Endpoint: BackchannelEndpoint, Kind: FaultLostReply}); err != nil {
		t.Fatal(err)
	}
	if _, err := ask(t, p, "bob", nil); err == nil {
		t.Error("the reply was not lost")
	}
	if _, err := p.WaitPrompt(ctx, func(q Prompt) bool { return q.Account == "bob" }); err != nil {
		t.Error(err)
	}
	if hits, err := p.Hits(ctx); err != nil || hits[BackchannelEndpoint] != 2 {
		t.Errorf("hits %v, %v", hits, err)
	}
	if err := p.Fault(ctx, Fault{Endpoint: "nowhere", Kind: FaultDrop}); err == nil {
		t.Error("a fault of no endpoint was taken")
	}
}

func TestPing(t *testing.T) {
	t.Parallel()
	type ping struct{ bearer, body string }
	pings := make(chan ping, 1)
	writ := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		pings <- ping{r.Header.Get("Authorization"), string(body)}
		w.WriteHeader(http.StatusNoContent)
	}))
	defer writ.Close()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: writ.Certificate().Raw})
	p := Start(t, Config{Ping: &Ping{Endpoint: writ.URL + "/ciba/notify/test", CA: string(ca)}})

	a := mustAsk(t, p, "alice", url.Values{"client_notification_token": {"a-token-of-enough-entropy"}})
	if err := p.Approve(t.Context(), a.AuthReqID); err != nil {
		t.Fatal(err)
	}
	want := ping{"Bearer a-token-of-enough-entropy", `{"auth_req_id":"` + a.AuthReqID + `"}`}
	if got := <-pings; got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if _, err := poll(t, p, a.AuthReqID); err != nil {
		t.Error(err)
	}
}

func TestRestart(t *testing.T) {
	t.Parallel()
	p := Start(t, Config{})
	before, err := p.AgentToken(t.Context(), SalesAgent)
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	p.Stop()
	if took := time.Since(began); took >= stopTimeout {
		t.Errorf("stopping took %v: the process had to be killed", took)
	}
	if _, err := p.AgentToken(t.Context(), SalesAgent); err == nil {
		t.Error("a stopped provider answered")
	}
	if err := p.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	after, err := p.AgentToken(t.Context(), SalesAgent)
	if err != nil {
		t.Fatal(err)
	}
	if header(t, before)["kid"] == header(t, after)["kid"] {
		t.Error("the keys are the same")
	}
	verified(t, p, after, DefaultResource)
}

func TestStartFails(t *testing.T) {
	t.Parallel()
	p := Start(t, Config{})
	_, err := New(t.Context(), Config{Port: portOf(p.Issuer)})
	if err == nil || !strings.Contains(err.Error(), "EADDRINUSE") {
		t.Errorf("on a taken port: %v", err)
	}
}

func TestWithoutNode(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	_, err := New(t.Context(), Config{})
	if err == nil || !strings.Contains(err.Error(), "install") {
		t.Errorf("got %v", err)
	}
}
