package minter_test

import (
	"context"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/writsec/writ/internal/minter"
)

// keyShelf is a KeyStore in memory.
type keyShelf struct {
	now   time.Time
	keys  []minter.StoredKey
	until map[string]time.Time // retired from then on
}

func (k *keyShelf) Now() time.Time { return k.now }

func (k *keyShelf) SigningKeys(context.Context) ([]minter.StoredKey, error) {
	return slices.DeleteFunc(slices.Clone(k.keys), func(s minter.StoredKey) bool {
		until, ends := k.until[s.ID]
		return ends && !k.now.Before(until)
	}), nil
}

func (k *keyShelf) AddSigningKey(
	ctx context.Context, next minter.StoredKey, due func([]minter.StoredKey, time.Time) (active, retire time.Time, ok bool),
) error {
	believed, err := k.SigningKeys(ctx)
	if err != nil {
		return err
	}
	active, retire, ok := due(believed, k.now)
	if !ok {
		return nil
	}
	for _, s := range k.keys {
		if until, ends := k.until[s.ID]; !ends || until.After(retire) {
			k.until[s.ID] = retire
		}
	}
	next.ActiveAt = active
	k.keys = append(k.keys, next)
	return nil
}

// Whatever replica signs, and from whatever replica a verifier has its keys, as old as
// they may be: it knows the key of every token that is alive.
func TestVerifiersKnowEveryKeyInTime(t *testing.T) {
	t.Parallel()
	const life = 20 * time.Minute
	for seed := range uint64(2) {
		r := rand.New(rand.NewPCG(seed, 0)) // to be repeated
		shelf := &keyShelf{now: time.Unix(1_700_000_000, 0), until: map[string]time.Time{}}
		rotation := minter.Rotation{Algorithm: []string{"ES256", "EdDSA"}[seed%2], Every: time.Hour, Life: life}
		type replica struct {
			*minter.Keys
			looked time.Time
		}
		type verifier struct {
			knows   map[string]bool
			fetched time.Time
		}
		var replicas []*replica
		for range 3 {
			k, err := minter.LoadKeys(t.Context(), shelf, rotation)
			if err != nil {
				t.Fatal(err)
			}
			replicas = append(replicas, &replica{k, shelf.now})
		}
		verifiers := []*verifier{{}, {}, {}}
		alive := map[string]time.Time{} // by key, when the last token that it signed ends
		start, byHand := shelf.now, 0
		for shelf.now.Sub(start) < 5*time.Hour {
			shelf.now = shelf.now.Add(time.Duration(1+r.IntN(10)) * time.Second)
			for _, p := range replicas {
				if r.IntN(2) == 0 || shelf.now.Sub(p.looked) >= 10*time.Second {
					if err := p.Refresh(t.Context()); err != nil {
						t.Fatal(err)
					}
					p.looked = shelf.now
				}
				alive[p.Signer()] = shelf.now.Add(life)
			}
			if r.IntN(1000) == 0 {
				byHand++
				if _, _, err := minter.Rotate(t.Context(), shelf, rotation, false); err != nil {
					t.Fatal(err)
				}
			}
			for i, v := range verifiers {
				if shelf.now.Sub(v.fetched) >= minter.KeysMaxAge || r.IntN(100) == 0 {
					v.knows, v.fetched = map[string]bool{}, shelf.now
					for _, key := range replicas[r.IntN(3)].JWKS().Keys {
						v.knows[key.KeyID] = true
					}
				}
				for id, until := range alive {
					if shelf.now.Before(until) && !v.knows[id] {
						t.Fatalf("seed %d, after %v: verifier %d does not know key %s, whose tokens live until %v",
							seed, shelf.now.Sub(start), i, id, until.Sub(start))
					}
				}
			}
		}
		if n := len(shelf.keys); n < 4 || n > 6+byHand {
			t.Errorf("seed %d: %d keys in five hours, %d of them by hand", seed, n, byHand)
		}
		if n := len(replicas[0].JWKS().Keys); n > 3+byHand {
			t.Errorf("seed %d: %d keys are still published", seed, n)
		}
	}
}
