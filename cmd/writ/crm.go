package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"

	"github.com/writsec/writ/internal/dev"
)

// crm is a small resource server of the demo. It knows nothing of Writ but what
// any resource server would: where its keys are, or where to introspect.
type crm struct {
	http.Server
	name, url string
	done      chan struct{}
}

func newCRM(name string, accepts func(ctx context.Context, token string) error) (*crm, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	c := &crm{name: name, url: "http://" + l.Addr().String(), done: make(chan struct{})}
	c.ReadHeaderTimeout = time.Second
	c.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		if !ok || accepts(r.Context(), token) != nil {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		_, _ = io.WriteString(w, `{"id":"opp-42","stage":"negotiation"}`)
	})
	go func() {
		defer close(c.done)
		_ = c.Serve(l) // ends by stop
	}()
	return c, nil
}

// stop ends the server and waits for it. A demo server has nothing to lose.
func (c *crm) stop() {
	_ = c.Close()
	<-c.done
}

// newOfflineCRM verifies tokens by Writ's published keys and asks nobody.
func newOfflineCRM(ctx context.Context, writ, audience string) (*crm, error) {
	var metadata struct {
		Issuer  string `json:"issuer"`
		JWKSURI string `json:"jwks_uri"`
	}
	if err := getJSON(ctx, writ+"/.well-known/oauth-authorization-server", &metadata); err != nil {
		return nil, err
	}
	verifier := oidc.NewVerifier(metadata.Issuer, &freshKeys{url: metadata.JWKSURI}, &oidc.Config{
		ClientID: audience, SupportedSigningAlgs: []string{oidc.ES256},
	})
	return newCRM("the CRM that verifies offline", func(ctx context.Context, token string) error {
		jws, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.ES256})
		if err != nil || jws.Signatures[0].Header.ExtraHeaders[jose.HeaderType] != "at+jwt" { // go-oidc does not look
			return errors.Join(errors.New("not an access token"), err)
		}
		t, err := verifier.Verify(ctx, token)
		if err != nil {
			return err
		}
		var claims struct {
			Scope string `json:"scope"`
		}
		if err := t.Claims(&claims); err != nil || claims.Scope != "crm:read" {
			return errors.Join(errors.New("not good for reading"), err)
		}
		return nil
	})
}

// freshKeys begins anew every five minutes. By itself, a RemoteKeySet goes on with a key
// that Writ has withdrawn until somebody brings one that it does not know (docs/tokens.md).
type freshKeys struct {
	url string

	mu      sync.Mutex
	keys    *oidc.RemoteKeySet
	fetched time.Time
}

// VerifySignature implements oidc.KeySet.
func (k *freshKeys) VerifySignature(ctx context.Context, token string) ([]byte, error) {
	k.mu.Lock()
	if k.keys == nil || time.Since(k.fetched) > 5*time.Minute {
		k.keys, k.fetched = oidc.NewRemoteKeySet(context.Background(), k.url), time.Now()
	}
	keys := k.keys
	k.mu.Unlock()
	return keys.VerifySignature(ctx, token)
}

// newIntrospectingCRM asks Writ about every token, so that it sees a revocation at
// once.
func newIntrospectingCRM(writ string, account dev.Service) (*crm, error) {
	return newCRM("the CRM that introspects", func(ctx context.Context, token string) error {
		active, err := introspect(ctx, writ, account, token)
		if err == nil && !active {
			err = errors.New("inactive")
		}
		return err
	})
}

func (c *crm) get(ctx context.Context, token string) (status int, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.url+"/opportunities/opp-42", nil)
	if err != nil {
		return 0, err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	return res.StatusCode, res.Body.Close()
}

func introspect(ctx context.Context, writ string, account dev.Service, token string) (active bool, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, writ+"/introspect",
		strings.NewReader(url.Values{"token": {token}}.Encode()))
	if err != nil {
		return false, err
	}
	req.SetBasicAuth(url.QueryEscape(account.ID), url.QueryEscape(account.Secret))
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	var answer struct {
		Active bool `json:"active"`
	}
	err = do(req, &answer)
	return answer.Active, err
}

func getJSON(ctx context.Context, url string, out any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	return do(req, out)
}

func do(req *http.Request, out any) error {
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answered %s", req.URL, res.Status)
	}
	return json.NewDecoder(res.Body).Decode(out)
}
