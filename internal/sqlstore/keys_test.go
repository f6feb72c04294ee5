package sqlstore

import (
	"crypto/hkdf"
	"crypto/sha256"
	"strings"
	"testing"
	"time"

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
		a, err := minter.LoadKeys(f.ctx, f.Store)
		if err != nil {
			t.Fatal(err)
		}
		other, err := f.second(nil)
		if err != nil {
			t.Fatal(err)
		}
		b, err := minter.LoadKeys(f.ctx, other)
		if err != nil {
			t.Fatal(err)
		}
		first := a.JWKS().Keys
		if len(first) != 1 || b.JWKS().Keys[0].KeyID != first[0].KeyID {
			t.Fatalf("two replicas made a key each")
		}
		next, err := minter.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Rotate(f.ctx, Key{ID: next.ID, Purpose: SigningKey, Private: next.PKCS8}, time.Minute, time.Hour); err != nil {
			t.Fatal(err)
		}
		signs := func(k *minter.Keys) string {
			t.Helper()
			if err := k.Refresh(f.ctx); err != nil {
				t.Fatal(err)
			}
			return k.Signer()
		}
		// Published at once, used once everyone must have seen it, then the old one is
		// believed for as long as its tokens live.
		for _, c := range []struct {
			after time.Duration
			signs string
			known int
		}{{0, first[0].KeyID, 2}, {59 * time.Second, first[0].KeyID, 2}, {time.Second, next.ID, 2}, {59 * time.Minute, next.ID, 2}, {time.Minute, next.ID, 1}} {
			f.clock.Add(c.after)
			for name, k := range map[string]*minter.Keys{"this": a, "the other": b} {
				if got := signs(k); got != c.signs || len(k.JWKS().Keys) != c.known {
					t.Errorf("after %v more, %s replica signs with %s and knows %d keys", c.after, name, got, len(k.JWKS().Keys))
				}
			}
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
