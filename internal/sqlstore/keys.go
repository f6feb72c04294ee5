package sqlstore

import (
	"context"
	"errors"
	"time"

	"github.com/writsec/writ/internal/minter"
)

// Key is a private key as it is kept.
type Key struct {
	ID        string
	Purpose   string
	CreatedAt time.Time
	Private   []byte // sealed in the database
}

const (
	keyColumn = "keys.key"
	// rootKeyCheck is a row whose only use is to open or not to open.
	rootKeyCheck = "root-key-check"
)

// Keys lists the keys of a purpose, oldest first.
func (t *Tx) Keys(ctx context.Context, purpose string) ([]Key, error) {
	return some(ctx, t, "list keys", func(r scanner) (k Key, err error) {
		err = r.Scan(&k.ID, &k.Purpose, timeOf(&k.CreatedAt), t.sealedOf(&k.Private, keyColumn, &k.ID))
		return k, err
	}, `SELECT id, purpose, created_at, key_sealed FROM keys WHERE purpose = $1 ORDER BY created_at, id`, purpose)
}

// InsertKey stores a key.
func (t *Tx) InsertKey(ctx context.Context, k Key) error {
	_, err := t.exec(ctx, "insert key", `INSERT INTO keys (id, purpose, created_at, key_sealed) VALUES ($1, $2, $3, $4)`,
		k.ID, k.Purpose, micros(t.now), t.seal.seal(k.Private, keyColumn, k.ID))
	return err
}

// checkRootKey refuses a root key other than the one the store began with, before
// anything is lost to it.
func (s *Store) checkRootKey(ctx context.Context) error {
	return s.Update(ctx, func(tx *Tx) error {
		keys, err := tx.Keys(ctx, rootKeyCheck)
		if errors.Is(err, errRootKey) {
			return errors.New("its root key is another one than root_key_file holds")
		}
		if err != nil || len(keys) > 0 {
			return err
		}
		return tx.InsertKey(ctx, Key{ID: rootKeyCheck, Purpose: rootKeyCheck, Private: []byte(rootKeyCheck)})
	})
}

// signing is the purpose of the keys that credentials are signed with.
const signing = "signing"

// SigningKeys implements minter.KeyStore.
func (s *Store) SigningKeys(ctx context.Context) (out []minter.StoredKey, err error) {
	err = s.View(ctx, func(tx *Tx) error {
		keys, err := tx.Keys(ctx, signing)
		for _, k := range keys {
			out = append(out, minter.StoredKey{ID: k.ID, PKCS8: k.Private})
		}
		return err
	})
	return out, err
}

// AddSigningKey implements minter.KeyStore.
func (s *Store) AddSigningKey(ctx context.Context, k minter.StoredKey) error {
	return s.Update(ctx, func(tx *Tx) error {
		return tx.InsertKey(ctx, Key{ID: k.ID, Purpose: signing, Private: k.PKCS8})
	})
}
