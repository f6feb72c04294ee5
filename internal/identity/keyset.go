package identity

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/writsec/writ/internal/jws"
	"github.com/writsec/writ/internal/telemetry"
)

const (
	fetchTimeout  = 5 * time.Second
	fetchInterval = 30 * time.Second // least time between two fetches caused by tokens
	refreshAfter  = 5 * time.Minute  // so that a removed key stops working
	retryAfter    = time.Second      // after the first failure; doubled up to fetchInterval
	maxStale      = 24 * time.Hour   // how long keys are believed that can't be fetched again
	maxDocument   = 1 << 20          // bytes of a discovery document or JWKS
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
	fetch  func(context.Context) ([]byte, error)
	loaded atomic.Pointer[keysInHand]

	mu       sync.Mutex
	asked    time.Time // when a token last caused a fetch
	underway *fetching
	fetches  sync.WaitGroup // for Run to wait for
}

// keysInHand are the keys of one content. While a fetch brings the same, they stay
// the same, so that what was verified by them can be remembered.
type keysInHand struct {
	jws.Keys
	sum  [sha256.Size]byte
	seen atomic.Int64 // when a fetch last brought them, nanoseconds since 1970
}

// current are the keys to verify with, nil where there are none. Keys that could
// not be fetched again for maxStale are none: the issuer may have withdrawn them.
func (k *keySet) current() *keysInHand {
	keys := k.loaded.Load()
	if keys == nil || time.Since(time.Unix(0, keys.seen.Load())) > maxStale {
		return nil
	}
	return keys
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

// verify verifies a token's signature and returns the keys that it was done with.
func (k *keySet) verify(ctx context.Context, t jws.Token, algorithms []string, uses ...string) (*keysInHand, error) {
	keys := k.current()
	if keys != nil {
		verified, known := keys.Verify(t, algorithms, uses...)
		if verified {
			return keys, nil
		}
		if known {
			return nil, errUnknownKey
		}
	}
	f := k.start(ctx, true)
	if f == nil {
		if keys == nil {
			return nil, ErrKeysUnavailable
		}
		return nil, errLimited
	}
	if err := f.wait(ctx); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKeysUnavailable, err)
	}
	if keys = k.current(); keys != nil {
		if verified, _ := keys.Verify(t, algorithms, uses...); verified {
			return keys, nil
		}
	}
	return nil, errUnknownKey
}

// refresh fetches the keys, or waits for the fetch that is under way.
func (k *keySet) refresh(ctx context.Context) error { return k.start(ctx, false).wait(ctx) }

// start joins the fetch under way or begins one, which outlives a caller that
// gives up. For a token it begins none, and returns nil, within fetchInterval of
// the last that a token caused.
func (k *keySet) start(ctx context.Context, forToken bool) *fetching {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.underway != nil {
		return k.underway
	}
	if forToken {
		if time.Since(k.asked) < fetchInterval {
			return nil
		}
		k.asked = time.Now()
	}
	f := &fetching{done: make(chan struct{})}
	k.underway = f
	k.fetches.Go(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), fetchTimeout)
		defer cancel()
		f.err = k.load(ctx)
		k.mu.Lock()
		k.underway = nil
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
	keys, err := jws.ParseKeys(data)
	if err != nil {
		return err
	}
	next := &keysInHand{Keys: keys, sum: sha256.Sum256(data)}
	if old := k.loaded.Load(); old != nil && old.sum == next.sum {
		next = old
	}
	next.seen.Store(time.Now().UnixNano())
	k.loaded.Store(next)
	if len(keys) == 0 {
		return errors.New("the key set has no usable public key")
	}
	return nil
}

// fetchKeys fetches a key set from a fixed place.
func fetchKeys(address string, client *http.Client) func(context.Context) ([]byte, error) {
	return func(ctx context.Context) ([]byte, error) {
		data, err := get(ctx, client, address)
		if err != nil {
			return nil, fmt.Errorf("fetch key set: %w", err)
		}
		return data, nil
	}
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
		return fetchKeys(metadata.JWKS, client)(ctx)
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
