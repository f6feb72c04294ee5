package identity

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"
	"golang.org/x/sync/singleflight"
)

const (
	fetchTimeout  = 5 * time.Second
	fetchInterval = 30 * time.Second // least time between two fetches caused by tokens
	refreshAfter  = 5 * time.Minute  // so that a removed key stops working
	maxDocument   = 1 << 20          // bytes of a discovery document or JWKS
)

var errUnknownKey = errors.New("has a signature that no key of its issuer verifies")

// ErrKeysUnavailable says that a token can't be verified now: its issuer's keys
// can't be fetched.
var ErrKeysUnavailable = errors.New("cannot be verified now: the keys of its issuer are not available")

// keySet verifies signatures with an issuer's published keys. go-oidc's own set
// fetches once for each bad token, reads without bound, and one hung fetch wedges
// it; here a stranger's tokens cause at most one fetch in 30 s, and keys in hand
// keep working while the issuer is away.
type keySet struct {
	algorithms []jose.SignatureAlgorithm
	fetch      func(context.Context) ([]byte, error)

	keys  atomic.Pointer[[]verificationKey]
	group singleflight.Group
	mu    sync.Mutex
	last  time.Time // of the last attempt to fetch
}

type verificationKey struct {
	jose.JSONWebKey
	ops []string // key_ops (RFC 7517 §4.3), which go-jose drops
}

// VerifySignature implements oidc.KeySet.
func (k *keySet) VerifySignature(ctx context.Context, token string) ([]byte, error) {
	jws, err := jose.ParseSigned(token, k.algorithms)
	if err != nil || len(jws.Signatures) != 1 {
		return nil, errors.New("is malformed or of a refused algorithm")
	}
	payload, known := k.verify(jws)
	if payload != nil {
		return payload, nil
	}
	if known {
		return nil, errUnknownKey
	}
	if !k.mayFetch() {
		if k.keys.Load() == nil {
			return nil, ErrKeysUnavailable
		}
		return nil, errUnknownKey
	}
	if err := k.refresh(ctx); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKeysUnavailable, err)
	}
	if payload, _ := k.verify(jws); payload != nil {
		return payload, nil
	}
	return nil, errUnknownKey
}

// verify tries the keys in hand. known says that one of them has the token's kid,
// so that fetching again would be pointless.
func (k *keySet) verify(jws *jose.JSONWebSignature) (payload []byte, known bool) {
	keys := k.keys.Load()
	if keys == nil {
		return nil, false
	}
	header := jws.Signatures[0].Header
	for _, key := range *keys {
		if header.KeyID != "" && key.KeyID != header.KeyID {
			continue
		}
		known = known || header.KeyID != ""
		if !key.usableFor(header.Algorithm) {
			continue
		}
		if payload, err := jws.Verify(key.JSONWebKey); err == nil {
			return payload, true
		}
	}
	return nil, known
}

// usableFor holds the key to what its owner published it for (RFC 7517 §4.2–4.4).
func (k verificationKey) usableFor(alg string) bool {
	return (k.Use == "" || k.Use == "sig") &&
		(k.Algorithm == "" || k.Algorithm == alg) &&
		(len(k.ops) == 0 || slices.Contains(k.ops, "verify"))
}

func (k *keySet) mayFetch() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if time.Since(k.last) < fetchInterval {
		return false
	}
	k.last = time.Now()
	return true
}

// refresh fetches the keys and keeps the old ones on any failure. Concurrent
// callers share one fetch, which outlives a caller that gives up.
func (k *keySet) refresh(ctx context.Context) error {
	done := k.group.DoChan("", func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), fetchTimeout)
		defer cancel()
		data, err := k.fetch(ctx)
		if err != nil {
			return nil, err
		}
		keys, err := parseKeys(data)
		if err != nil {
			return nil, err
		}
		k.keys.Store(&keys)
		return nil, nil
	})
	select {
	case r := <-done:
		return r.Err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// parseKeys reads a JWK set (RFC 7517 §5) and leaves out keys that it can't use:
// symmetric, private, of unknown type.
func parseKeys(data []byte) ([]verificationKey, error) {
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(data, &set); err != nil {
		return nil, fmt.Errorf("read key set: %w", err)
	}
	var keys []verificationKey
	for _, raw := range set.Keys {
		var key verificationKey
		var extra struct {
			Ops []string `json:"key_ops"`
		}
		if json.Unmarshal(raw, &key.JSONWebKey) != nil || json.Unmarshal(raw, &extra) != nil {
			continue
		}
		if !key.Valid() || !key.IsPublic() {
			continue
		}
		key.ops = extra.Ops
		keys = append(keys, key)
	}
	if len(keys) == 0 {
		return nil, errors.New("read key set: it has no usable public key")
	}
	return keys, nil
}

// remoteKeys finds the key set by OpenID Connect discovery, once, and fetches it.
func remoteKeys(issuer string, client *http.Client) func(context.Context) ([]byte, error) {
	var uri atomic.Pointer[string]
	return func(ctx context.Context) ([]byte, error) {
		if uri.Load() == nil {
			provider, err := oidc.NewProvider(oidc.ClientContext(ctx, client), issuer)
			if err != nil {
				return nil, fmt.Errorf("discover: %w", err)
			}
			var metadata struct {
				URI string `json:"jwks_uri"`
			}
			if err := provider.Claims(&metadata); err != nil || metadata.URI == "" {
				return nil, errors.New("discover: the metadata names no jwks_uri")
			}
			uri.Store(&metadata.URI)
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, *uri.Load(), nil)
		if err != nil {
			return nil, fmt.Errorf("fetch key set: %w", err)
		}
		res, err := client.Do(req)
		if err != nil {
			return nil, fmt.Errorf("fetch key set: %w", err)
		}
		defer res.Body.Close()
		if res.StatusCode != http.StatusOK {
			return nil, fmt.Errorf("fetch key set: status %d", res.StatusCode)
		}
		return io.ReadAll(res.Body)
	}
}

// NewHTTPClient returns a client for talking to identity providers: it follows no
// redirect, reads no more than 1 MiB of an answer and gives up after the timeout.
func NewHTTPClient(timeout time.Duration) *http.Client {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxConnsPerHost = 64
	return &http.Client{
		Timeout:       timeout,
		Transport:     bounded{transport},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

type bounded struct{ *http.Transport }

func (b bounded) RoundTrip(req *http.Request) (*http.Response, error) {
	res, err := b.Transport.RoundTrip(req)
	if err == nil {
		res.Body = struct {
			io.Reader
			io.Closer
		}{http.MaxBytesReader(nil, res.Body, maxDocument), res.Body}
	}
	return res, err
}
