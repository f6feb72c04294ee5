package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/writsec/writ/client"
	"github.com/writsec/writ/internal/dev"
)

// kill is an operator's: it ends all that alice's agents hold, and freezes alice.
func (s *story) kill() (came string, err error) {
	// Something must live, or there would be nothing to end.
	var held *role
	var token string
	if s.admin != nil {
		held, err = s.login(s.sales.ID)
	} else {
		token, err = s.token(s.sales.ID)
	}
	if err != nil {
		return "", err
	}
	since := time.Now()
	body := map[string]any{
		"user":   map[string]string{"iss": s.IDP.Issuer(), "sub": "alice"},
		"freeze": true, "reason": "alice's laptop is lost",
	}
	if s.freeze, err = s.operate("/revocations", body); err != nil {
		return "", err
	}
	s.aside("olga: POST /revocations, user alice, freeze")
	if held != nil {
		came, err = s.gone(held, since)
	} else {
		var active bool
		active, err = introspect(s.ctx, s.URL, s.Services["crm"], token)
		if err == nil && active {
			err = errors.New("introspection still calls the token active")
		}
		came = fmt.Sprintf("introspection says inactive, %s after the call", time.Since(since).Round(time.Millisecond))
	}
	if err != nil {
		return "", err
	}
	s.aside(came)
	d, err := s.alice.Decide(s.ctx, s.wish(""))
	if err != nil {
		return "", err
	}
	return "and from now on deny: " + d.Reasons[0].Message, expect(d, client.Deny, "halted")
}

func (s *story) lift() (string, error) {
	if _, err := s.operate("/revocations/"+s.freeze+"/lift", nil); err != nil {
		return "", err
	}
	d, err := s.alice.Decide(s.ctx, s.wish(""))
	if err != nil {
		return "", err
	}
	if d.Effect != client.Allow {
		return "", fmt.Errorf("the decision is %s (%s), expected allow", d.Effect, d.Reasons[0].Code)
	}
	_, err = s.alice.Release(s.ctx, d.Credential.Lease)
	return "allow: " + d.Reasons[0].Message + ", in a new session", err
}

// wish is what alice's agent asks for before and after.
func (s *story) wish(session string) client.Request {
	if s.admin != nil {
		return queryAcme(session)
	}
	return readOpportunity(session)
}

func (s *story) token(session string) (string, error) {
	d, err := s.alice.Decide(s.ctx, readOpportunity(session))
	if err != nil {
		return "", err
	}
	return d.Credential.Secret["token"], expect(d, client.Allow, "read_opportunity")
}

// operate calls Writ as the operator, and returns the id of the revocation.
func (s *story) operate(path string, body any) (revocation string, err error) {
	token, err := s.IDP.AccessToken("olga", dev.OpsConsole, 0)
	if err != nil {
		return "", err
	}
	var text []byte
	if body != nil {
		if text, err = json.Marshal(body); err != nil {
			return "", err
		}
	}
	var answer struct {
		ID string `json:"id"`
	}
	err = post(s.ctx, s.URL+path, token, text, &answer)
	return answer.ID, err
}

func post(ctx context.Context, url, token string, body []byte, out any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Content-Type", "application/json")
	return do(req, out)
}
