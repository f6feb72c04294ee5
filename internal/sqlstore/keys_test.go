package sqlstore

import (
	"crypto/hkdf"
	"crypto/sha256"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sync/errgroup"

	"github.com/writsec/writ/internal/approval"
	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/minter"
)

// second opens the store once more, as another replica or a tool would.
func (f *fixture) second(change func(*Config)) (*Store, error) {
	f.t.Helper()
	c := f.config()
	c.Tool = f.path != "" // a second server on SQLite is refused
	if change != nil {
		change(&c)
	}
	s, err := Open(f.ctx, c)
	if err == nil {
		f.t.Cleanup(func() { _ = s.Close() })
	}
	return s, err
}

func TestSigningKeysRotateTogether(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		r := minter.Rotation{Algorithm: "ES256", Every: 24 * time.Hour, Life: 40 * time.Minute}
		a, err := minter.LoadKeys(f.ctx, f.Store, r)
		if err != nil {
			t.Fatal(err)
		}
		other, err := f.second(nil)
		if err != nil {
			t.Fatal(err)
		}
		b, err := minter.LoadKeys(f.ctx, other, r)
		if err != nil {
			t.Fatal(err)
		}
		first := a.JWKS().Keys
		if len(first) != 1 || b.JWKS().Keys[0].KeyID != first[0].KeyID {
			t.Fatalf("two replicas made a key each")
		}
		signs := func(k *minter.Keys) string {
			t.Helper()
			if err := k.Refresh(f.ctx); err != nil {
				t.Fatal(err)
			}
			return k.Signer()
		}
		// By the clock: one of the two makes the next key, and both know it in time.
		f.clock.Add(24*time.Hour - minter.KeyLead - time.Second)
		if signs(a); len(a.JWKS().Keys) != 1 {
			t.Error("the next key is made too early")
		}
		f.clock.Add(time.Second)
		if signs(a) != first[0].KeyID || signs(b) != first[0].KeyID || len(a.JWKS().Keys) != 2 || len(b.JWKS().Keys) != 2 {
			t.Errorf("%d and %d keys are published ahead", len(a.JWKS().Keys), len(b.JWKS().Keys))
		}
		byClock := a.JWKS().Keys[1].KeyID
		f.clock.Add(minter.KeyLead)
		if signs(a) != byClock || signs(b) != byClock || len(b.JWKS().Keys) != 2 {
			t.Error("the next key does not sign")
		}
		f.clock.Add(time.Hour) // the first is over
		signs(a)

		// By hand.
		next, _, err := minter.Rotate(f.ctx, other, r, false)
		if err != nil {
			t.Fatal(err)
		}
		// Published at once, used once everyone must have seen it, then the old one is
		// believed for as long as its tokens live.
		for _, c := range []struct {
			after time.Duration
			signs string
			known int
		}{{0, byClock, 2}, {minter.KeyLead - time.Second, byClock, 2}, {time.Second, next.ID, 2}, {r.Life + minter.KeyLead - time.Second, next.ID, 2}, {time.Second, next.ID, 1}} {
			f.clock.Add(c.after)
			for name, k := range map[string]*minter.Keys{"this": a, "the other": b} {
				if got := signs(k); got != c.signs || len(k.JWKS().Keys) != c.known {
					t.Errorf("after %v more, %s replica signs with %s and knows %d keys", c.after, name, got, len(k.JWKS().Keys))
				}
			}
		}
	})
}

// Replicas that see at once that a key is due make one, not one each.
func TestOneReplicaMakesTheNextKey(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		r := minter.Rotation{Algorithm: "ES256", Every: time.Hour, Life: time.Hour}
		var replicas []*minter.Keys
		for range 4 {
			s := f.Store
			if len(replicas) > 0 {
				var err error
				if s, err = f.second(nil); err != nil {
					t.Fatal(err)
				}
			}
			k, err := minter.LoadKeys(f.ctx, s, r)
			if err != nil {
				t.Fatal(err)
			}
			replicas = append(replicas, k)
		}
		f.clock.Add(time.Hour)
		var g errgroup.Group
		for _, k := range replicas {
			g.Go(func() error { return k.Refresh(f.ctx) })
		}
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
		for i, k := range replicas {
			if len(k.JWKS().Keys) != 2 || k.JWKS().Keys[1].KeyID != replicas[0].JWKS().Keys[1].KeyID {
				t.Errorf("replica %d publishes %d keys", i, len(k.JWKS().Keys))
			}
		}
	})
}

// Another algorithm is for new keys. A replica that still wants the one of before does
// not take it back while it runs.
func TestAnotherAlgorithm(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		before, err := minter.LoadKeys(f.ctx, f.Store, minter.Rotation{Algorithm: "ES256", Life: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		other, err := f.second(nil)
		if err != nil {
			t.Fatal(err)
		}
		after, err := minter.LoadKeys(f.ctx, other, minter.Rotation{Algorithm: "EdDSA", Life: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		algorithms := func(k *minter.Keys) (out []string) {
			t.Helper()
			if err := k.Refresh(f.ctx); err != nil {
				t.Fatal(err)
			}
			for _, key := range k.JWKS().Keys {
				out = append(out, key.Algorithm)
			}
			return out
		}
		for _, k := range []*minter.Keys{before, after} {
			if d := cmp.Diff([]string{"ES256", "EdDSA"}, algorithms(k)); d != "" || k.Signer() != before.JWKS().Keys[0].KeyID {
				t.Errorf("signs with %s, publishes %s", k.Signer(), d)
			}
		}
		f.clock.Add(minter.KeyLead)
		for _, k := range []*minter.Keys{before, after} {
			if algorithms(k); k.Signer() != after.JWKS().Keys[1].KeyID {
				t.Error("the key of the new algorithm does not sign")
			}
		}
		f.clock.Add(time.Hour + minter.KeyLead)
		if d := cmp.Diff([]string{"EdDSA"}, algorithms(before)); d != "" {
			t.Error(d)
		}
	})
}

// A key in wrong hands is out of the published set at once, and so is what was to follow
// it, which may have been seen too.
func TestCompromisedKey(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		r := minter.Rotation{Algorithm: "ES256", Life: time.Hour}
		k, err := minter.LoadKeys(f.ctx, f.Store, r)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := minter.Rotate(f.ctx, f.Store, r, false); err != nil {
			t.Fatal(err)
		}
		fresh, until, err := minter.Rotate(f.ctx, f.Store, r, true)
		if err != nil || !until.Equal(f.Now()) || fresh.PKCS8 != nil {
			t.Fatal(until, err)
		}
		if err := k.Refresh(f.ctx); err != nil || k.Signer() != fresh.ID || len(k.JWKS().Keys) != 1 {
			t.Errorf("signs with %s, publishes %d keys (%v)", k.Signer(), len(k.JWKS().Keys), err)
		}
	})
}

func TestRewrap(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		a := f.approval(f.session(), "h")
		a.AuthReqID = "sealed"
		f.in(func(tx *Tx) error { return tx.UpdateApproval(f.ctx, &a) })
		opens := func(s *Store) {
			t.Helper()
			err := s.View(f.ctx, func(tx *Tx) error {
				got, err := tx.Approval(f.ctx, a.ID)
				if got.AuthReqID != "sealed" {
					t.Error("a sealed value does not open")
				}
				return err
			})
			if err != nil {
				t.Error(err)
			}
		}
		next := RootKey{9}
		if err := f.Rewrap(f.ctx, RootKey{7}, next); err == nil {
			t.Error("rewrapped from a key that is not its own")
		}
		opens(f.Store)
		if err := f.Rewrap(f.ctx, root, next); err != nil {
			t.Fatal(err)
		}
		opens(f.Store) // who runs is not disturbed
		if _, err := f.second(nil); err == nil || !strings.Contains(err.Error(), "root key") {
			t.Errorf("the old root key: %v", err)
		}
		s, err := f.second(func(c *Config) { c.Root = next })
		if err != nil {
			t.Fatal(err)
		}
		opens(s)
	})
}

func TestDataKeysRotate(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		other, err := f.second(nil)
		if err != nil {
			t.Fatal(err)
		}
		s := f.session()
		store := func(hash string) string {
			t.Helper()
			a := f.approval(s, hash)
			a.AuthReqID = "sealed " + hash
			f.in(func(tx *Tx) error { return tx.UpdateApproval(f.ctx, &a) })
			return a.ID
		}
		damaged := func(s *Store, id string) (bad bool) {
			t.Helper()
			err := s.View(f.ctx, func(tx *Tx) error {
				got, err := tx.Approval(f.ctx, id)
				bad = got.Damaged
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			return bad
		}
		before := store("before")
		if err := f.RotateDataKey(f.ctx, root); err != nil {
			t.Fatal(err)
		}
		if err := f.RefreshDataKeys(f.ctx, root); err != nil {
			t.Fatal(err)
		}
		soon := store("soon") // the other replica may not know the new key yet
		if damaged(other, soon) {
			t.Error("sealed under a key that the other replica can't know")
		}
		f.clock.Add(keyDelay)
		after := store("after")
		if !damaged(other, after) {
			t.Error("the new key is not used")
		}
		if err := other.RefreshDataKeys(f.ctx, root); err != nil {
			t.Fatal(err)
		}
		for _, id := range []string{before, soon, after} {
			if damaged(f.Store, id) || damaged(other, id) {
				t.Errorf("%s does not open", id)
			}
		}
		if err := f.RotateDataKey(f.ctx, RootKey{7}); err == nil {
			t.Error("rotated under a root key that is not its own")
		}
		keys, err := f.ListKeys(f.ctx)
		if err != nil || len(keys) != 2 {
			t.Errorf("%d keys, %v", len(keys), err)
		}
		for _, k := range keys {
			if k.Private != nil {
				t.Errorf("%s is listed with its secret", k.ID)
			}
		}
		es := must(f, func(tx *Tx) ([]audit.Entry, error) { return tx.Unsequenced(f.ctx, 10) })
		if len(es) != 1 || es[0].Kind != audit.KeyAdded {
			t.Errorf("entries %v", es)
		}
	})
}

func TestDigestKeyStays(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		a, err := f.DigestKey(f.ctx)
		if err != nil || len(a) != keySize {
			t.Fatal(err)
		}
		other, err := f.second(nil)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := other.DigestKey(f.ctx); err != nil || string(a) != string(b) {
			t.Errorf("two keys (%v)", err)
		}
		f.wantAbsent(string(a), string(root[:]))
	})
}

// A store of before had no data key: what it sealed opens as it did.
func TestStoreOfBeforeDataKeys(t *testing.T) {
	f := newSQLite(t)
	key, err := hkdf.Key(sha256.New, root[:], nil, "writ column encryption v1", keySize)
	if err != nil {
		t.Fatal(err)
	}
	old, err := newAEAD(key)
	if err != nil {
		t.Fatal(err)
	}
	a := f.approval(f.session(), "h")
	if err := f.raw().Exec(`DELETE FROM keys`); err != nil {
		t.Fatal(err)
	}
	f.in(func(tx *Tx) error {
		if _, err := tx.exec(f.ctx, "x", `UPDATE approvals SET auth_req_id_sealed = $1`, sealWith(old, []byte("of before"), authReqIDColumn, a.ID)); err != nil {
			return err
		}
		return tx.insertKeyRow(f.ctx, Key{ID: legacyCheck, Purpose: legacyCheck, Private: sealWith(old, []byte(legacyCheck), keyColumn, legacyCheck)})
	})
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	wrong := f.config()
	wrong.Root = RootKey{9}
	if _, err := Open(f.ctx, wrong); err == nil || !strings.Contains(err.Error(), "root key") {
		t.Errorf("another root key: %v", err)
	}
	f.reopen()
	got := must(f, func(tx *Tx) (approval.Approval, error) { return tx.Approval(f.ctx, a.ID) })
	if got.AuthReqID != "of before" {
		t.Errorf("%+v", got)
	}
}
