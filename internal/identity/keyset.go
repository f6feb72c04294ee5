package identity

import (
	"context"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/writsec/writ/internal/telemetry"
)

const (
	fetchTimeout  = 5 * time.Second
	fetchInterval = 30 * time.Second // least time between two fetches caused by tokens
	refreshAfter  = 5 * time.Minute  // so that a removed key stops working
	retryAfter    = time.Second      // after the first failure; doubled up to fetchInterval
	maxDocument   = 1 << 20          // bytes of a discovery document or JWKS
	minRSA        = 2048             // bits (RFC 7518 §3.3)
)

var errUnknownKey = errors.New("has a signature that no key of its issuer verifies")

// errLimited is an errUnknownKey that a fetch might cure, were it not so soon after
// the last. A stranger need not know the difference.
var errLimited = fmt.Errorf("%w", errUnknownKey)

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
	keys       atomic.Pointer[[]verificationKey]

	mu      sync.Mutex
	asked   time.Time // when a token last caused a fetch
	current *fetching
	fetches sync.WaitGroup // for Run to wait for
}

type verificationKey struct {
	jose.JSONWebKey
	ops []string // key_ops (RFC 7517 §4.3), which go-jose drops
}

// fetching is a fetch under way, for which any number of callers wait.
type fetching struct {
	done chan struct{} // closed once err is final
	err  error
}

func (f *fetching) wait(ctx context.Context) error {
	select {
	case <-f.done:
		return f.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// VerifySignature implements oidc.KeySet.
func (k *keySet) VerifySignature(ctx context.Context, token string) ([]byte, error) {
	jws, err := jose.ParseSignedCompact(token, k.algorithms)
	if err != nil {
		return nil, errors.New("is malformed")
	}
	payload, known := k.verify(jws)
	if payload != nil {
		return payload, nil
	}
	if known {
		return nil, errUnknownKey
	}
	f := k.start(ctx, true)
	if f == nil {
		if k.keys.Load() == nil {
			return nil, ErrKeysUnavailable
		}
		return nil, errLimited
	}
	if err := f.wait(ctx); err != nil {
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
		(k.ops == nil || slices.Contains(k.ops, "verify"))
}

// refresh fetches the keys, or waits for the fetch that is under way.
func (k *keySet) refresh(ctx context.Context) error { return k.start(ctx, false).wait(ctx) }

// start joins the fetch under way or begins one, which outlives a caller that
// gives up. For a token it begins none, and returns nil, within fetchInterval of
// the last that a token caused.
func (k *keySet) start(ctx context.Context, forToken bool) *fetching {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.current != nil {
		return k.current
	}
	if forToken {
		if time.Since(k.asked) < fetchInterval {
			return nil
		}
		k.asked = time.Now()
	}
	f := &fetching{done: make(chan struct{})}
	k.current = f
	k.fetches.Go(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), fetchTimeout)
		defer cancel()
		f.err = k.load(ctx)
		k.mu.Lock()
		k.current = nil
		k.mu.Unlock()
		close(f.done)
	})
	return f
}

// load replaces the keys. Whatever is not a key set leaves the old ones; a set
// without a usable key is believed, since this is how an issuer takes all back.
func (k *keySet) load(ctx context.Context) error {
	data, err := k.fetch(ctx)
	if err != nil {
		return err
	}
	keys, err := parseKeys(data)
	if err != nil {
		return err
	}
	k.keys.Store(&keys)
	if len(keys) == 0 {
		return errors.New("the key set has no usable public key")
	}
	return nil
}

// parseKeys reads a JWK set (RFC 7517 §5) and leaves out keys that it can't use:
// symmetric, private, weak, of unknown type.
func parseKeys(data []byte) ([]verificationKey, error) {
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(data, &set); err != nil {
		return nil, fmt.Errorf("read key set: %w", err)
	}
	if set.Keys == nil {
		return nil, errors.New("read key set: it has no keys member")
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
		if r, ok := key.Key.(*rsa.PublicKey); ok && r.N.BitLen() < minRSA {
			continue
		}
		key.ops = extra.Ops
		keys = append(keys, key)
	}
	return keys, nil
}

// remoteKeys finds the key set by OpenID Connect discovery and fetches it. It
// discovers anew each time: rarely enough, and an issuer may move its keys.
func remoteKeys(issuer string, client *http.Client) func(context.Context) ([]byte, error) {
	return func(ctx context.Context) ([]byte, error) {
		var metadata struct {
			JWKS string `json:"jwks_uri"`
		}
		if err := Discover(ctx, client, issuer, &metadata); err != nil {
			return nil, err
		}
		if !Trustworthy(issuer, metadata.JWKS) {
			return nil, errors.New("discover: the metadata names no https jwks_uri")
		}
		data, err := get(ctx, client, metadata.JWKS)
		if err != nil {
			return nil, fmt.Errorf("fetch key set: %w", err)
		}
		return data, nil
	}
}

// Discover reads an issuer's metadata (OpenID Connect Discovery §4). Nothing of an
// answer that is not its metadata shows in the error.
func Discover(ctx context.Context, client *http.Client, issuer string, metadata any) error {
	data, err := get(ctx, client, strings.TrimSuffix(issuer, "/")+"/.well-known/openid-configuration")
	if err != nil {
		return fmt.Errorf("discover: %w", err)
	}
	var named struct {
		Issuer string `json:"issuer"`
	}
	if err := errors.Join(json.Unmarshal(data, &named), json.Unmarshal(data, metadata)); err != nil {
		return fmt.Errorf("discover: %w", err)
	}
	if named.Issuer != issuer {
		return errors.New("discover: the metadata is of another issuer")
	}
	return nil
}

// Trustworthy reports whether an endpoint that an issuer's metadata names may be
// called: by https, unless the issuer itself is plain http, which is for loopback.
func Trustworthy(issuer, endpoint string) bool {
	return strings.HasPrefix(endpoint, "https://") ||
		strings.HasPrefix(issuer, "http://") && strings.HasPrefix(endpoint, "http://")
}

func get(ctx context.Context, client *http.Client, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	res, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answers with status %d", url, res.StatusCode)
	}
	return io.ReadAll(res.Body)
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
	res, err := telemetry.RoundTrip(b.Transport, req)
	if err == nil {
		res.Body = struct {
			io.Reader
			io.Closer
		}{http.MaxBytesReader(nil, res.Body, maxDocument), res.Body}
	}
	return res, err
}
