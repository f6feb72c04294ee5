package devidp

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
)

func askForm(more ...string) url.Values {
	f := url.Values{"scope": {"openid"}, "login_hint": {"alice"}, "binding_message": {"K7QX pay"}}
	for i := 0; i < len(more); i += 2 {
		f.Set(more[i], more[i+1])
	}
	return f
}

// ask puts a prompt on alice's phone.
func ask(t *testing.T, p *Provider, more ...string) backchannelAnswer {
	t.Helper()
	w := post(t, p, "/bc-authorize", "writ", writSecret, askForm(more...))
	if w.Code != http.StatusOK {
		t.Fatalf("bc-authorize: %d %s", w.Code, w.Body)
	}
	return decode[backchannelAnswer](t, w)
}

func poll(t *testing.T, p *Provider, authReqID string) *httptest.ResponseRecorder {
	t.Helper()
	return post(t, p, "/token", "writ", writSecret, url.Values{"grant_type": {grantCIBA}, "auth_req_id": {authReqID}})
}

func wantPoll(t *testing.T, p *Provider, authReqID, code string) {
	t.Helper()
	wantError(t, poll(t, p, authReqID), http.StatusBadRequest, code)
}

// answerLatest taps on the newest prompt.
func answerLatest(t *testing.T, p *Provider, approve bool) {
	t.Helper()
	prompts := p.Prompts()
	if err := p.Answer(prompts[len(prompts)-1].ID, approve); err != nil {
		t.Fatal(err)
	}
}

func TestApproval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProvider(t)
		asked := ask(t, p, "acr_values", "mfa phr", "login_hint", "alice@example.com")
		if asked.ExpiresIn != 120 || asked.Interval != 1 || len(asked.AuthReqID) < 27 { // 27×6 bits > 160
			t.Errorf("answer %+v", asked)
		}
		wantPoll(t, p, asked.AuthReqID, "authorization_pending")
		time.Sleep(time.Second)
		wantPoll(t, p, asked.AuthReqID, "authorization_pending")

		prompt := p.Prompts()[0]
		if prompt.User != "alice" || prompt.Client != "writ" || prompt.Message != "K7QX pay" ||
			prompt.Status != Pending || !slices.Equal(prompt.ACRValues, []string{"mfa", "phr"}) {
			t.Errorf("prompt %+v", prompt)
		}
		answerLatest(t, p, true)
		approvedAt := time.Now().Unix()
		time.Sleep(time.Second)

		answer := decode[tokenAnswer](t, poll(t, p, asked.AuthReqID))
		id := claimsOf[idClaims](t, p, "writ", answer.IDToken)
		if id.Subject != "alice" || id.ACR != "mfa" || len(id.AMR) == 0 || id.AuthTime != approvedAt ||
			id.AuthReqID != asked.AuthReqID || id.AccessTokenHash != accessTokenHash(answer.AccessToken) {
			t.Errorf("ID token %+v", id)
		}
		// An approver's access token is not one that Writ takes from an agent.
		if access := claimsOf[accessClaims](t, p, p.Issuer(), answer.AccessToken); access.ClientID != "writ" {
			t.Errorf("access token %+v", access)
		}
		wantPoll(t, p, asked.AuthReqID, "invalid_grant")
	})
}

func TestDenial(t *testing.T) {
	p := newProvider(t)
	asked := ask(t, p)
	answerLatest(t, p, false)
	wantPoll(t, p, asked.AuthReqID, "access_denied")
	if err := p.Answer(p.Prompts()[0].ID, true); !errors.Is(err, ErrPromptEnded) {
		t.Errorf("approval after denial: %v, want %v", err, ErrPromptEnded)
	}
	wantPoll(t, p, asked.AuthReqID, "access_denied")
}

func TestExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProvider(t)
		unanswered := ask(t, p, "requested_expiry", "30")
		approved := ask(t, p, "requested_expiry", "30")
		answerLatest(t, p, true)
		if unanswered.ExpiresIn != 30 {
			t.Errorf("expires_in %d, want 30", unanswered.ExpiresIn)
		}
		time.Sleep(30*time.Second - time.Millisecond)
		wantPoll(t, p, unanswered.AuthReqID, "authorization_pending")
		time.Sleep(time.Millisecond)
		wantPoll(t, p, unanswered.AuthReqID, "expired_token")
		wantPoll(t, p, approved.AuthReqID, "expired_token")

		prompts := p.Prompts()
		if prompts[0].Status != Expired || prompts[1].Status != Approved {
			t.Errorf("statuses %s and %s, want expired and approved", prompts[0].Status, prompts[1].Status)
		}
		if err := p.Answer(prompts[0].ID, true); !errors.Is(err, ErrPromptEnded) {
			t.Errorf("approval after expiry: %v, want %v", err, ErrPromptEnded)
		}
	})
}

func TestSlowDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProvider(t)
		asked := ask(t, p)
		for _, step := range []struct {
			wait time.Duration
			want string
		}{
			{0, "authorization_pending"},
			{time.Second, "authorization_pending"},
			{950 * time.Millisecond, "authorization_pending"}, // sent in time, travelled faster
			{800 * time.Millisecond, "slow_down"},             // from now on 6 s
			{5 * time.Second, "slow_down"},                    // from now on 11 s
			{11 * time.Second, "authorization_pending"},
			{10 * time.Second, "slow_down"},
		} {
			time.Sleep(step.wait)
			wantPoll(t, p, asked.AuthReqID, step.want)
		}
		// slow_down is a kind of "still pending" (CIBA Core §11): an answer is not held back.
		answerLatest(t, p, true)
		if w := poll(t, p, asked.AuthReqID); w.Code != http.StatusOK {
			t.Errorf("approved: %d %s", w.Code, w.Body)
		}
	})
}

func TestOneOfManyPollsWins(t *testing.T) {
	p := newProvider(t)
	asked := ask(t, p)
	answerLatest(t, p, true)
	codes := make([]int, 12)
	var all sync.WaitGroup
	for i := range codes {
		all.Go(func() { codes[i] = poll(t, p, asked.AuthReqID).Code })
	}
	all.Wait()
	slices.Sort(codes)
	if codes[0] != http.StatusOK || codes[1] != http.StatusBadRequest {
		t.Errorf("answers %v, want one 200", codes)
	}
}

func TestAnotherClientsRequest(t *testing.T) {
	p := newProvider(t)
	asked := ask(t, p)
	answerLatest(t, p, true)
	if _, err := p.state.poll("other", asked.AuthReqID); err == nil || !strings.HasPrefix(err.Error(), "invalid_grant") {
		t.Errorf("another client's poll: %v", err)
	}
	wantPoll(t, p, "unknown", "invalid_grant")
	wantPoll(t, p, "", "invalid_grant")
	wantPoll(t, p, p.Prompts()[0].ID, "invalid_grant")
	if w := poll(t, p, asked.AuthReqID); w.Code != http.StatusOK {
		t.Errorf("the owner's poll after them: %d %s", w.Code, w.Body)
	}
}

func TestBackchannelErrors(t *testing.T) {
	p := newProvider(t)
	without := func(name string) url.Values {
		f := askForm()
		f.Del(name)
		return f
	}
	twice := askForm()
	twice.Add("login_hint", "bob")
	tests := map[string]struct {
		form url.Values
		code string
	}{
		"no openid":          {askForm("scope", "profile"), "invalid_scope"},
		"no scope":           {without("scope"), "invalid_scope"},
		"no hint":            {without("login_hint"), "invalid_request"},
		"two hints":          {askForm("id_token_hint", "x"), "invalid_request"},
		"a hint twice":       {twice, "invalid_request"},
		"another hint":       {url.Values{"scope": {"openid"}, "login_hint_token": {"x"}}, "invalid_request"},
		"unknown user":       {askForm("login_hint", "mallory"), "unknown_user_id"},
		"signed request":     {askForm("request", "e30.e30."), "invalid_request"},
		"long message":       {askForm("binding_message", strings.Repeat("ä", 257)), "invalid_binding_message"},
		"line break":         {askForm("binding_message", "a\nb"), "invalid_binding_message"},
		"bidi override":      {askForm("binding_message", "a\u202eb"), "invalid_binding_message"},
		"broken UTF-8":       {askForm("binding_message", "a\xff"), "invalid_binding_message"},
		"zero expiry":        {askForm("requested_expiry", "0"), "invalid_request"},
		"negative expiry":    {askForm("requested_expiry", "-1"), "invalid_request"},
		"fractional expiry":  {askForm("requested_expiry", "1.5"), "invalid_request"},
		"astronomic expiry":  {askForm("requested_expiry", "99999999999999999999"), "invalid_request"},
		"expiry with a sign": {askForm("requested_expiry", "+5"), "invalid_request"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			wantError(t, post(t, p, "/bc-authorize", "writ", writSecret, tt.form), http.StatusBadRequest, tt.code)
		})
	}
	wantError(t, post(t, p, "/bc-authorize", "writ", "guess", askForm()), 401, "invalid_client")
	wantError(t, post(t, p, "/bc-authorize", "sales-agent", salesSecret, askForm()), 400, "unauthorized_client")
	if n := len(p.Prompts()); n != 0 {
		t.Errorf("%d prompts after refusals alone", n)
	}

	ask(t, p, "binding_message", strings.Repeat("ä", 256))
	if got := ask(t, p, "requested_expiry", "86400"); got.ExpiresIn != int64(maxExpiry/time.Second) {
		t.Errorf("expires_in %d, want the most there is", got.ExpiresIn)
	}
}

func TestPromptsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProvider(t)
		var asked backchannelAnswer
		for range maxPrompts {
			asked = ask(t, p)
		}
		wantError(t, post(t, p, "/bc-authorize", "writ", writSecret, askForm()), 503, "temporarily_unavailable")

		// Approved but not yet fetched still counts; once fetched it makes room.
		answerLatest(t, p, true)
		wantError(t, post(t, p, "/bc-authorize", "writ", writSecret, askForm()), 503, "temporarily_unavailable")
		if w := poll(t, p, asked.AuthReqID); w.Code != http.StatusOK {
			t.Fatalf("poll: %d %s", w.Code, w.Body)
		}
		ask(t, p)
		wantError(t, post(t, p, "/bc-authorize", "writ", writSecret, askForm()), 503, "temporarily_unavailable")
		answerLatest(t, p, false)
		ask(t, p)

		time.Sleep(defaultExpiry)
		ask(t, p)
		if n := len(p.Prompts()); n != maxPrompts {
			t.Errorf("%d prompts kept, want %d", n, maxPrompts)
		}
	})
}

// The tokens of an approval must pass a stock client, over a socket.
func TestApprovalOverHTTP(t *testing.T) {
	p, browser := serve(t)
	ctx := oidc.ClientContext(t.Context(), browser)
	provider, err := oidc.NewProvider(ctx, p.Issuer())
	if err != nil {
		t.Fatal(err)
	}
	var meta struct {
		Backchannel string `json:"backchannel_authentication_endpoint"`
	}
	if err := provider.Claims(&meta); err != nil {
		t.Fatal(err)
	}
	send := func(endpoint string, form url.Values) *httptest.ResponseRecorder {
		form.Set("client_id", "writ")
		form.Set("client_secret", writSecret)
		res, err := browser.PostForm(endpoint, form)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = res.Body.Close() }()
		w := httptest.NewRecorder()
		w.Code = res.StatusCode
		_, _ = w.Body.ReadFrom(res.Body)
		return w
	}
	asked := decode[backchannelAnswer](t, send(meta.Backchannel, askForm()))
	answerLatest(t, p, true)
	answer := decode[tokenAnswer](t, send(provider.Endpoint().TokenURL, url.Values{
		"grant_type": {grantCIBA}, "auth_req_id": {asked.AuthReqID},
	}))
	id, err := provider.VerifierContext(ctx, &oidc.Config{ClientID: "writ"}).Verify(ctx, answer.IDToken)
	if err != nil {
		t.Fatal(err)
	}
	if err := id.VerifyAccessToken(answer.AccessToken); err != nil {
		t.Error(err)
	}
}
