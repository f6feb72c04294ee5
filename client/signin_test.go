package client_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"regexp"
	"strings"
	"testing"

	"github.com/writsec/writ/client"
)

// A user's way through the pages, as in a browser.
func TestClientSignIn(t *testing.T) {
	d := newDev(t)
	ctx := t.Context()
	get := func(b *http.Client, address string) string {
		res, err := b.Get(address)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(text) + res.Header.Get("Refresh")
	}
	own := client.New(d.URL, func(context.Context) (string, error) {
		return get(http.DefaultClient, d.IDP.Issuer()+"/dev/token?kind=agent&agent=sales-agent"), nil
	})
	_, err := own.OpenSession(ctx, client.SessionRequest{Task: "read"})
	need, ok := errors.AsType[*client.SignInRequired](err)
	if !ok || need.ID == "" || need.ExpiresAt.IsZero() || strings.Contains(err.Error(), need.URL) {
		t.Fatalf("opened: %v", err)
	}
	_, err = own.CompleteSignIn(ctx, need.ID, "x")
	if p, ok := errors.AsType[*client.Error](err); !ok || p.Code != "login_required" {
		t.Errorf("too early: %v", err)
	}

	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	browser := &http.Client{Jar: jar}
	post := func(address string, form url.Values) string {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, address, strings.NewReader(form.Encode()))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		req.Header.Set("Sec-Fetch-Site", "same-origin")
		res, err := browser.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(text) + res.Header.Get("Refresh")
	}
	find := func(pattern, text string) string {
		m := regexp.MustCompile(pattern).FindStringSubmatch(text)
		if m == nil {
			t.Fatalf("no %s in %s", pattern, text)
		}
		return m[1]
	}
	provider := find(`0; url=(.*)$`, post(need.URL, nil))
	consent := post(provider, url.Values{"user": {"alice"}, "csrf": {find(`name="csrf" value="([^"]+)"`, get(browser, provider))}})
	shown := post(d.URL+find(`action="([^"]+)"`, consent), url.Values{"answer": {"accept"}, "form": {find(`name="form" value="([^"]+)"`, consent)}})
	s, err := own.CompleteSignIn(ctx, need.ID, find(`([0-9A-Z]{5}-[0-9A-Z]{5})`, shown))
	if err != nil || s.User.Subject != "alice" || s.Task.Source != "user" || s.Status != "active" {
		t.Fatalf("completed %+v, %v", s, err)
	}
	if got, err := own.Decide(ctx, client.Request{Session: s.ID, Intent: read, Resource: opp}); err != nil || got.Effect != client.Allow {
		t.Errorf("decided %+v, %v", got, err)
	}
}
