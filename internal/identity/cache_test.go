package identity

import (
	"crypto/sha256"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// fromCache is the name that a token's user has once its entry in the cache was
// tampered with: the proof that an answer came from there.
const fromCache = "read from the cache"

// tamper marks the entry of a token that must be in the cache.
func tamper(t *testing.T, v *Verifier, token string) {
	t.Helper()
	sum := sha256.Sum256([]byte(token))
	entry, ok := v.cache.Peek(sum)
	if !ok {
		t.Fatal("the token is not in the cache")
	}
	entry.subject = fromCache
	v.cache.Add(sum, entry)
}

func userOf(t *testing.T, v *Verifier, token string) string {
	t.Helper()
	c, err := callerOf(v, t.Context(), token, "")
	if err != nil {
		t.Fatal(err)
	}
	return c.User.ID
}

// TestNegative09: a token in the cache is refused from the moment it has ended.
func TestNegative09Cached(t *testing.T) {
	k := keys()
	for _, tt := range []struct {
		name  string
		edits []edit
		then  func(t *testing.T, v *Verifier, p *idp)
		want  string // "" where the token stays good
	}{
		{"nothing happens", nil, func(*testing.T, *Verifier, *idp) {}, ""},
		{"a moment before exp", nil, func(*testing.T, *Verifier, *idp) { time.Sleep(30*time.Second - time.Millisecond) }, ""},
		{"exp", nil, func(*testing.T, *Verifier, *idp) { time.Sleep(30 * time.Second) }, "is expired"},
		{"max_age", []edit{claim("exp", at(time.Hour))}, func(_ *testing.T, v *Verifier, _ *idp) {
			v.issuers[issA].MaxAge = 20 * time.Second
			time.Sleep(20 * time.Second)
		}, "is older than the 20s that its issuer's profile allows"},
		{"the same keys are fetched again", nil, func(t *testing.T, v *Verifier, _ *idp) {
			if err := v.issuers[issA].keys.refresh(t.Context()); err != nil {
				t.Fatal(err)
			}
		}, ""},
		{"its key is withdrawn", nil, func(t *testing.T, v *Verifier, p *idp) {
			p.set(func(p *idp) { p.keys = jwks(jwk(k.ecB, "ec2", nil)) })
			if err := v.issuers[issA].keys.refresh(t.Context()); err != nil {
				t.Fatal(err)
			}
		}, noKey},
		{"all keys are withdrawn", nil, func(t *testing.T, v *Verifier, p *idp) {
			p.set(func(p *idp) { p.keys = jwks() })
			if err := v.issuers[issA].keys.refresh(t.Context()); err == nil {
				t.Fatal("no error for an empty set")
			}
		}, unavailable},
		{"its kid is given to another key", nil, func(t *testing.T, v *Verifier, p *idp) {
			p.set(func(p *idp) { p.keys = jwks(jwk(k.ecB, "ec", nil)) })
			if err := v.issuers[issA].keys.refresh(t.Context()); err != nil {
				t.Fatal(err)
			}
		}, noKey},
		{"a stranger's token brings the new keys", nil, func(t *testing.T, v *Verifier, p *idp) {
			p.set(func(p *idp) { p.keys = jwks(jwk(k.ecB, "ec2", nil)) })
			time.Sleep(fetchInterval - time.Second)
			_, _ = callerOf(v, t.Context(), fresh(by(es256("unheard-of", k.ecB))), "")
		}, noKey},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newIDP(issA, jwk(k.ec, "ec", nil))
				v := inBubble(t, p)
				if err := v.issuers[issA].keys.refresh(t.Context()); err != nil {
					t.Fatal(err)
				}
				start := time.Now()
				token := forge(append([]edit{claim("iat", start.Unix()), claim("exp", start.Add(30*time.Second).Unix())}, tt.edits...)...)
				if len(tt.edits) > 0 {
					token = fresh()
				}
				good(t, v, token)
				tamper(t, v, token)
				if got := userOf(t, v, token); got != fromCache {
					t.Fatalf("user = %q: the cache was not asked", got)
				}
				tt.then(t, v, p)
				if tt.want != "" {
					bad(t, v, token, tt.want)
					if _, err := callerOf(v, t.Context(), token, ""); err == nil {
						t.Error("refused once, then accepted")
					}
				} else if got := userOf(t, v, token); got != fromCache {
					t.Errorf("user = %q: the cache forgot a token that is still good", got)
				}
			})
		})
	}
}

// TestCacheForgets: an entry lives for a minute, and comes back by verifying again.
func TestCacheForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := inBubble(t, newIDP(issA, jwk(keys().ec, "ec", nil)))
		token := fresh()
		good(t, v, token)
		tamper(t, v, token)
		time.Sleep(cacheFor - time.Millisecond)
		if got := userOf(t, v, token); got != fromCache {
			t.Errorf("user = %q before the minute is over", got)
		}
		time.Sleep(time.Millisecond)
		if got := userOf(t, v, token); got != "alice" {
			t.Errorf("user = %q after the minute", got)
		}
	})
}

// TestCacheHoldsOnlyGoodTokens: what is refused is not remembered, and a token under
// another signature is another token.
func TestCacheHoldsOnlyGoodTokens(t *testing.T) {
	v, _ := world(t)
	token := forge()
	for _, bearer := range []string{
		forge(by(es256("ec", keys().ecB))), forge(claim("aud", "x")), forge(claim("exp", at(0))), forge(by(unsigned)), "garbage",
	} {
		if _, err := callerOf(v, t.Context(), bearer, ""); err == nil {
			t.Errorf("%s passed", bearer)
		}
	}
	if n := v.cache.Len(); n != 0 {
		t.Errorf("%d refused tokens in the cache", n)
	}
	good(t, v, token)
	input := token[:strings.LastIndexByte(token, '.')+1]
	forged := forge(by(es256("ec", keys().ecB)))
	bad(t, v, input+forged[strings.LastIndexByte(forged, '.')+1:], noKey)
	bad(t, v, input, noKey)
	if n := v.cache.Len(); n != 1 {
		t.Errorf("%d tokens in the cache, want 1", n)
	}
}

// TestCachedKinds: an ID token that was believed as subject_token is still no bearer,
// nor is a client's own token a user's.
func TestCachedKinds(t *testing.T) {
	v, _ := world(t)
	bearer, subject := forge(own("crm-agent")), forge(asIDToken("crm-agent"))
	for range 2 {
		if _, err := callerOf(v, t.Context(), bearer, subject); err != nil {
			t.Fatal(err)
		}
		bad(t, v, subject, notAccess)
		_, err := callerOf(v, t.Context(), bearer, bearer)
		checkRefusal(t, err, "the subject_token names no user: its sub is its client")
	}
}

// TestNegative08Stale: keys that could not be fetched again for 24 h are no longer
// believed, not even for what was verified by them a moment ago.
func TestNegative08Stale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newIDP(issA, jwk(keys().ec, "ec", nil))
		v := inBubble(t, p)
		running(t, v)
		synctest.Wait()
		p.set(func(p *idp) { p.down = true })
		token := fresh(claim("exp", time.Now().Add(72*time.Hour).Unix()))
		time.Sleep(maxStale)
		good(t, v, token)
		tamper(t, v, token)
		if got := userOf(t, v, token); got != fromCache {
			t.Fatalf("user = %q: the cache was not asked", got)
		}
		time.Sleep(time.Second)
		bad(t, v, token, unavailable)
		if _, err := v.IDToken(t.Context(), issA, "writ", fresh(asIDToken("writ"))); !errors.Is(err, ErrKeysUnavailable) {
			t.Errorf("IDToken = %v, want ErrKeysUnavailable", err)
		}
		p.set(func(p *idp) { p.down = false })
		time.Sleep(fetchInterval)
		good(t, v, token)
	})
}

func BenchmarkCaller(b *testing.B) {
	k := keys()
	for name, key := range map[string]signer{"ES256": es256("ec", k.ec), "RS256": rs256("rsa", k.rsa)} {
		token := forge(by(key))
		for _, cached := range []bool{true, false} {
			sub := name + "/uncached"
			if cached {
				sub = name + "/cached"
			}
			b.Run(sub, func(b *testing.B) {
				v, _ := world(b)
				for b.Loop() {
					if !cached {
						v.cache.Purge()
					}
					if _, err := callerOf(v, b.Context(), token, ""); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
