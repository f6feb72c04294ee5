package ciba

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/writsec/writ/internal/approval"
	"github.com/writsec/writ/internal/identity"
)

const (
	grantType = "urn:openid:params:grant-type:ciba"
	// defaultInterval counts where a provider names none (CIBA Core §7.3).
	defaultInterval = 5 * time.Second
	// freshness is how much older than the prompt an answer's iat may be: clocks.
	freshness = time.Minute
	maxID     = 4096 // bytes of an auth_req_id
)

var placeholder = regexp.MustCompile(`\{[A-Za-z0-9_]+\}`)

// Hint implements approval.Provider: it fills the template with string claims.
func (c *Client) Hint(user identity.Principal) (string, error) {
	var missing string
	hint := placeholder.ReplaceAllStringFunc(c.cfg.LoginHint, func(p string) string {
		name := p[1 : len(p)-1]
		v, _ := user.Claims[name].(string)
		if v == "" {
			missing = name
		}
		return v
	})
	if missing != "" {
		return "", fmt.Errorf("the user's token has no claim %s", missing)
	}
	return hint, nil
}

// Start implements approval.Provider (CIBA Core §7).
func (c *Client) Start(ctx context.Context, r approval.StartRequest) approval.StartResult {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	e, err := c.discover(ctx)
	if err != nil {
		return approval.StartResult{Outcome: approval.StartLater, Err: err}
	}
	form := url.Values{
		"scope":            {"openid"},
		"login_hint":       {r.Hint},
		"binding_message":  {r.Message},
		"requested_expiry": {strconv.Itoa(max(int(r.ExpiresIn.Seconds()), 1))},
	}
	if len(r.ACRValues) > 0 {
		form.Set("acr_values", strings.Join(r.ACRValues, " "))
	}
	// A connection kept from before may be dead, which leaves it open whether the
	// person was asked; a new one fails before anything is sent.
	c.cfg.HTTP.CloseIdleConnections()
	res, sent, err := c.post(ctx, e.Backchannel, form)
	code, _ := errorCode(res)
	switch {
	case err != nil && !sent:
		return approval.StartResult{Outcome: approval.StartLater, Err: err}
	case err != nil:
		return approval.StartResult{Outcome: approval.StartUnclear, Reason: "the provider's answer was lost", Err: err}
	case res.status == http.StatusOK:
		return acknowledgement(res)
	case res.status == http.StatusTooManyRequests || res.status == http.StatusServiceUnavailable:
		return approval.StartResult{Outcome: approval.StartLater, RetryAfter: res.retryAfter, Err: res.unusable()}
	case res.status >= 500:
		return approval.StartResult{Outcome: approval.StartUnclear, Reason: fmt.Sprintf("status_%d", res.status), Err: res.unusable()}
	case code != "":
		return approval.StartResult{Outcome: approval.StartRefused, Reason: code}
	}
	return approval.StartResult{Outcome: approval.StartRefused, Reason: fmt.Sprintf("status_%d", res.status)}
}

// acknowledgement reads CIBA Core §7.3.
func acknowledgement(res response) approval.StartResult {
	var a struct {
		AuthReqID string   `json:"auth_req_id"`
		ExpiresIn seconds  `json:"expires_in"`
		Interval  *seconds `json:"interval"`
	}
	// The person may have been prompted, but nothing can come of it.
	unusable := approval.StartResult{Outcome: approval.StartUnclear, Reason: "acknowledgement_invalid"}
	if json.Unmarshal(res.body, &a) != nil || a.AuthReqID == "" || len(a.AuthReqID) > maxID || a.ExpiresIn <= 0 {
		return unusable
	}
	out := approval.StartResult{
		Outcome: approval.Started, AuthReqID: a.AuthReqID, ExpiresIn: a.ExpiresIn.duration(), Interval: defaultInterval,
	}
	if a.Interval != nil && *a.Interval > 0 {
		out.Interval = a.Interval.duration()
	}
	return out
}

// Poll implements approval.Provider (CIBA Core §10.1, §11).
func (c *Client) Poll(ctx context.Context, authReqID string) approval.PollResult {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.PollTimeout)
	defer cancel()
	e, err := c.discover(ctx)
	if err != nil {
		return approval.PollResult{Outcome: approval.PollUnreachable, Err: err}
	}
	res, _, err := c.post(ctx, e.Token, url.Values{"grant_type": {grantType}, "auth_req_id": {authReqID}})
	if err != nil {
		return approval.PollResult{Outcome: approval.PollUnreachable, Err: err}
	}
	if res.status == http.StatusOK && json.Valid(res.body) {
		return approval.PollResult{Outcome: approval.PollAnswered, Answer: res.body}
	}
	out := approval.PollResult{RetryAfter: res.retryAfter}
	var code string
	if res.status >= 400 && res.status != http.StatusServiceUnavailable {
		code, out.Interval = errorCode(res)
	}
	switch code {
	case "authorization_pending":
		out.Outcome = approval.PollPending
	case "slow_down":
		out.Outcome = approval.PollSlowDown
	case "access_denied":
		out.Outcome = approval.PollDenied
	case "expired_token":
		out.Outcome = approval.PollExpired
	case "invalid_grant":
		out.Outcome = approval.PollUnknown
	case "", "server_error", "temporarily_unavailable":
		out.Outcome, out.Err = approval.PollUnreachable, res.unusable()
	default:
		out.Outcome, out.Reason = approval.PollFailed, code
	}
	return out
}

// tokens is a successful token response (OpenID Connect Core §3.1.3.3).
type tokens struct {
	ID      string `json:"id_token"`
	Access  string `json:"access_token"`
	Refresh string `json:"refresh_token"`
}

// Verify implements approval.Provider. The yes counts only if the provider signed
// that the very person who was asked gave it, after being asked, in the way that
// was asked for.
func (c *Client) Verify(ctx context.Context, answer []byte, want approval.Expectation) (approval.Evidence, error) {
	var t tokens
	if err := json.Unmarshal(answer, &t); err != nil || t.ID == "" {
		return approval.Evidence{}, errors.New("the answer has no ID token")
	}
	claims, err := c.cfg.Verifier.IDToken(ctx, c.cfg.Issuer, c.cfg.ClientID, t.ID)
	if errors.Is(err, identity.ErrKeysUnavailable) {
		return approval.Evidence{}, fmt.Errorf("%w: %w", approval.ErrUnavailable, err)
	}
	if err != nil {
		return approval.Evidence{}, fmt.Errorf("the ID token %w", err)
	}
	text := func(name string) string { s, _ := claims[name].(string); return s }
	if text("sub") != want.Subject {
		return approval.Evidence{}, errors.New("somebody else answered than was asked")
	}
	// §10.3.1 asks for this claim in push mode only; where it is, it must be ours.
	if id, present := claims["urn:openid:params:jwt:claim:auth_req_id"]; present && id != want.AuthReqID {
		return approval.Evidence{}, errors.New("the ID token is about another request")
	}
	if hash, present := claims["at_hash"]; present && !identity.AccessTokenHashed(t.ID, t.Access, hash) {
		return approval.Evidence{}, errors.New("at_hash does not fit the access token")
	}
	if iat, ok := identity.TimeClaim(claims, "iat"); !ok || iat.Before(want.NotBefore.Add(-freshness)) {
		return approval.Evidence{}, errors.New("the ID token is older than the request")
	}
	e := approval.Evidence{ACR: text("acr")}
	if len(want.ACRValues) > 0 && !slices.Contains(want.ACRValues, e.ACR) {
		return approval.Evidence{}, fmt.Errorf("authenticated as %q, which is not what was asked for", e.ACR)
	}
	if list, ok := claims["amr"].([]any); ok {
		for _, v := range list {
			if s, ok := v.(string); ok {
				e.AMR = append(e.AMR, s)
			}
		}
	}
	e.AuthTime, _ = identity.TimeClaim(claims, "auth_time")
	return e, nil
}

// Discard implements approval.Provider (RFC 7009). The tokens were a means to an
// answer and are good for nothing else; a provider that can't revoke them lets
// them expire.
func (c *Client) Discard(ctx context.Context, answer []byte) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	e, err := c.discover(ctx)
	if err != nil || e.Revocation == "" {
		return
	}
	var t tokens
	if json.Unmarshal(answer, &t) != nil {
		return
	}
	for token, hint := range map[string]string{t.Refresh: "refresh_token", t.Access: "access_token"} {
		if token != "" {
			_, _, _ = c.post(ctx, e.Revocation, url.Values{"token": {token}, "token_type_hint": {hint}}) // best effort
		}
	}
}
