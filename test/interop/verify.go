package interop

import (
	"bytes"
	"compress/zlib"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"
)

var algorithms = []jose.SignatureAlgorithm{jose.ES256, jose.EdDSA}

// ErrRevoked says that a token was good, but ended before its time.
var ErrRevoked = errors.New("revoked")

// Verifier holds tokens to Writ's keys.
type Verifier struct {
	Issuer, Audience string

	mu      sync.Mutex
	keys    *oidc.RemoteKeySet
	fetched time.Time
	lists   map[string]list // by URI, as long as their ttl says
}

type list struct {
	bits  []byte
	until time.Time
}

// keySet begins anew every five minutes. By itself, a RemoteKeySet goes on with a key
// that Writ has withdrawn until somebody brings one that it does not know.
func (v *Verifier) keySet() *oidc.RemoteKeySet {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.keys == nil || time.Since(v.fetched) > 5*time.Minute {
		v.keys, v.fetched = oidc.NewRemoteKeySet(context.Background(), v.Issuer+"/.well-known/jwks.json"), time.Now()
	}
	return v.keys
}

// verified checks all but the type by go-oidc, and the type, which that does not.
func (v *Verifier) verified(ctx context.Context, token, typ string, c oidc.Config) (*oidc.IDToken, error) {
	jws, err := jose.ParseSignedCompact(token, algorithms)
	if err != nil {
		return nil, err
	}
	if jws.Signatures[0].Header.ExtraHeaders[jose.HeaderType] != typ {
		return nil, fmt.Errorf("not a %s", typ)
	}
	c.SupportedSigningAlgs = []string{oidc.ES256, oidc.EdDSA}
	return oidc.NewVerifier(v.Issuer, v.keySet(), &c).Verify(ctx, token)
}

// Verify reads the claims of a token that is good into claims.
func (v *Verifier) Verify(ctx context.Context, token string, claims any) error {
	t, err := v.verified(ctx, token, "at+jwt", oidc.Config{ClientID: v.Audience})
	if err != nil {
		return err
	}
	var c struct {
		Status *struct {
			List struct {
				Index int    `json:"idx"`
				URI   string `json:"uri"`
			} `json:"status_list"`
		} `json:"status"` // only where the minter has checks: status_list
	}
	if err := t.Claims(&c); err != nil {
		return err
	}
	if c.Status != nil {
		at := c.Status.List.Index
		bits, err := v.bits(ctx, c.Status.List.URI)
		switch {
		case err != nil:
			return fmt.Errorf("status list: %w", err)
		case at < 0 || at/8 >= len(bits):
			return errors.New("status list: no such index")
		case bits[at/8]>>(at%8)&1 == 1:
			return ErrRevoked
		}
	}
	return t.Claims(claims)
}

func (v *Verifier) bits(ctx context.Context, uri string) ([]byte, error) {
	v.mu.Lock()
	held := v.lists[uri]
	v.mu.Unlock()
	if time.Now().Before(held.until) {
		return held.bits, nil
	}
	if !strings.HasPrefix(uri, v.Issuer+"/status/") {
		return nil, errors.New("of somebody else")
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, uri, nil)
	if err != nil {
		return nil, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err != nil || res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s, %w", res.Status, err)
	}
	t, err := v.verified(ctx, string(text), "statuslist+jwt", oidc.Config{SkipClientIDCheck: true})
	if err != nil {
		return nil, err
	}
	var c struct {
		TTL  int `json:"ttl"`
		List struct {
			Bits int    `json:"bits"`
			List string `json:"lst"`
		} `json:"status_list"`
	}
	if err := t.Claims(&c); err != nil || t.Subject != uri || c.List.Bits != 1 {
		return nil, errors.Join(errors.New("another one"), err)
	}
	packed, err := base64.RawURLEncoding.DecodeString(c.List.List)
	if err != nil {
		return nil, err
	}
	z, err := zlib.NewReader(bytes.NewReader(packed))
	if err != nil {
		return nil, err
	}
	bits, err := io.ReadAll(io.LimitReader(z, 1<<20))
	if err != nil {
		return nil, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.lists == nil {
		v.lists = map[string]list{}
	}
	v.lists[uri] = list{bits, time.Now().Add(time.Duration(c.TTL) * time.Second)}
	return bits, nil
}
