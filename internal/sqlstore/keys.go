package sqlstore

import (
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/minter"
)

// Key is a private key as it is kept.
type Key struct {
	ID        string
	Purpose   Purpose
	CreatedAt time.Time
	ActiveAt  time.Time // used from then on; until then only believed
	RetiredAt time.Time // not even believed from then on; zero: never
	Private   []byte    // sealed in the database, and nil in lists
}

// Purpose says what a key is for.
type Purpose string

// The purposes.
const (
	DataKey       Purpose = "data"       // encrypts the other keys and the sealed columns
	SigningKey    Purpose = "signing"    // signs credentials
	CheckpointKey Purpose = "checkpoint" // signs the heads of the log
	DigestKey     Purpose = "digest"     // keys the digests of hidden values
)

// KeysTopic is notified when keys change.
const KeysTopic = "keys"

const (
	keyColumn = "keys.key"
	// legacyCheck is the row by which a store without data keys knew its root key.
	legacyCheck = "root-key-check"
	// keyDelay is how long a new key waits until every replica must know it.
	keyDelay = time.Minute
)

const keyColumns = `id, purpose, created_at, active_at, retired_at, key_sealed`

// unlock opens the data keys by the root key, and makes the first one. It refuses a
// root key other than the one that wraps them, before anything is lost to it.
func (s *Store) unlock(ctx context.Context, root RootKey) (*sealer, error) {
	var keys []dataKey
	err := s.Update(ctx, func(tx *Tx) (err error) {
		if err := tx.alone(ctx, KeysTopic); err != nil {
			return err
		}
		keys, err = tx.dataKeys(ctx, root)
		if err != nil || len(keys) > 0 {
			return err
		}
		first, err := tx.firstDataKey(ctx, root)
		if err != nil {
			return err
		}
		if err := tx.insertDataKey(ctx, root, first, tx.now); err != nil {
			return err
		}
		keys, err = tx.dataKeys(ctx, root)
		return err
	})
	if errors.Is(err, errRootKey) {
		return nil, errors.New("its root key is another one than root_key_file holds")
	}
	if err != nil {
		return nil, err
	}
	out := &sealer{now: s.Now}
	out.keys.Store(&keys)
	return out, nil
}

// dataKeys lists the data keys, newest first.
func (t *Tx) dataKeys(ctx context.Context, root RootKey) ([]dataKey, error) {
	rows, err := t.keyRows(ctx, DataKey)
	if err != nil {
		return nil, err
	}
	var out []dataKey
	for _, k := range slices.Backward(rows) {
		raw, err := root.unwrap(k.Private, k.ID)
		if err != nil {
			return nil, err
		}
		a, err := newAEAD(raw)
		if err != nil {
			return nil, err
		}
		out = append(out, dataKey{aead: a, activeAt: k.ActiveAt})
	}
	return out, nil
}

// firstDataKey is random, or, where a store of before has sealed values, the key
// that they are under.
func (t *Tx) firstDataKey(ctx context.Context, root RootKey) ([]byte, error) {
	legacy, err := t.keyRows(ctx, legacyCheck)
	if err != nil || len(legacy) == 0 {
		return newSecret(), err
	}
	key, err := hkdf.Key(sha256.New, root[:], nil, "writ column encryption v1", keySize)
	if err != nil {
		return nil, fmt.Errorf("derive key: %w", err)
	}
	a, err := newAEAD(key)
	if err != nil {
		return nil, err
	}
	_, err = openWith(a, legacy[0].Private, keyColumn, legacy[0].ID)
	return key, err
}

func (t *Tx) insertDataKey(ctx context.Context, root RootKey, raw []byte, active time.Time) error {
	id := "data-" + hex.EncodeToString(newSecret()[:8])
	wrapped, err := root.wrap(raw, id)
	if err != nil {
		return err
	}
	return t.insertKeyRow(ctx, Key{ID: id, Purpose: DataKey, ActiveAt: active, Private: wrapped})
}

// keyRows lists the keys of a purpose as they stand, oldest first.
func (t *Tx) keyRows(ctx context.Context, p Purpose) ([]Key, error) {
	return some(ctx, t, "list keys", scanKey,
		`SELECT `+keyColumns+` FROM keys WHERE purpose = $1 ORDER BY created_at, active_at, id`, p)
}

func scanKey(r scanner) (k Key, err error) {
	err = r.Scan(&k.ID, &k.Purpose, timeOf(&k.CreatedAt), timeOf(&k.ActiveAt), timeOf(&k.RetiredAt), &k.Private)
	return k, err
}

func (t *Tx) insertKeyRow(ctx context.Context, k Key) error {
	_, err := t.exec(ctx, "insert key", `INSERT INTO keys (`+keyColumns+`) VALUES ($1, $2, $3, $4, $5, $6)`,
		k.ID, k.Purpose, micros(t.now), micros(k.ActiveAt), micros(k.RetiredAt), k.Private)
	return err
}

// Keys lists the keys of a purpose that are believed, oldest first.
func (t *Tx) Keys(ctx context.Context, p Purpose) ([]Key, error) {
	keys, err := t.keyRows(ctx, p)
	if err != nil {
		return nil, err
	}
	keys = slices.DeleteFunc(keys, func(k Key) bool { return !k.RetiredAt.IsZero() && !t.now.Before(k.RetiredAt) })
	for i := range keys {
		if keys[i].Private, err = t.seal.open(keys[i].Private, keyColumn, keys[i].ID); err != nil {
			return nil, err
		}
	}
	return keys, nil
}

// InsertKey stores a key.
func (t *Tx) InsertKey(ctx context.Context, k Key) error {
	k.Private = t.seal.seal(k.Private, keyColumn, k.ID)
	return t.insertKeyRow(ctx, k)
}

// firstKey stores a key where none of its purpose is believed, unless a replica was
// faster.
func (s *Store) firstKey(ctx context.Context, k Key) error {
	return s.Update(ctx, func(tx *Tx) error {
		if err := tx.alone(ctx, KeysTopic); err != nil {
			return err
		}
		keys, err := tx.Keys(ctx, k.Purpose)
		if err != nil || len(keys) > 0 {
			return err
		}
		k.ActiveAt = tx.now
		return tx.InsertKey(ctx, k)
	})
}

// RetireSigningKeys implements audit.RestoreTx.
func (t *Tx) RetireSigningKeys(ctx context.Context) error {
	t.Notify(KeysTopic)
	return t.retire(ctx, SigningKey, t.now)
}

// ListKeys lists all keys, without what is secret of them.
func (s *Store) ListKeys(ctx context.Context) (out []Key, err error) {
	err = s.View(ctx, func(tx *Tx) (err error) {
		out, err = some(ctx, tx, "list keys", scanKey,
			`SELECT `+keyColumns+` FROM keys WHERE purpose <> $1 ORDER BY purpose, created_at, id`, legacyCheck)
		return err
	})
	for i := range out {
		out[i].Private = nil
	}
	return out, err
}

// AddSigningKey implements minter.KeyStore.
func (s *Store) AddSigningKey(
	ctx context.Context, k minter.StoredKey, due func([]minter.StoredKey, time.Time) (active, retire time.Time, ok bool),
) error {
	return s.Update(ctx, func(tx *Tx) error {
		if err := tx.alone(ctx, KeysTopic); err != nil {
			return err
		}
		believed, err := tx.signingKeys(ctx)
		if err != nil {
			return err
		}
		active, retire, ok := due(believed, tx.now)
		if !ok {
			return nil
		}
		if err := tx.retire(ctx, SigningKey, retire); err != nil {
			return err
		}
		next := Key{ID: k.ID, Purpose: SigningKey, ActiveAt: active, Private: k.PKCS8}
		if err := tx.InsertKey(ctx, next); err != nil {
			return err
		}
		tx.Notify(KeysTopic)
		return recordKey(ctx, tx, next, retire)
	})
}

// RotateCheckpointKey adds a key that signs the heads of the log from now on, beside
// those before it, which end after a time. It returns its verifier key.
func (s *Store) RotateCheckpointKey(ctx context.Context, overlap time.Duration) (verifier string, err error) {
	err = s.Update(ctx, func(tx *Tx) error {
		if err := tx.alone(ctx, KeysTopic); err != nil {
			return err
		}
		head, err := audit.HeadOf(ctx, tx) // locked: no restore gives the log another origin meanwhile
		if err != nil {
			return err
		}
		var signer string
		if signer, verifier, err = audit.NewCheckpointKey(head.Origin); err != nil {
			return err
		}
		until := tx.now.Add(overlap)
		if err := tx.retire(ctx, CheckpointKey, until); err != nil {
			return err
		}
		if err := tx.AddCheckpointKey(ctx, signer, verifier); err != nil {
			return err
		}
		tx.Notify(KeysTopic)
		return recordKey(ctx, tx, Key{ID: verifier, Purpose: CheckpointKey, ActiveAt: tx.now}, until)
	})
	return verifier, err
}

// retire brings the end of the keys of a purpose forward to a time.
func (t *Tx) retire(ctx context.Context, p Purpose, at time.Time) error {
	_, err := t.exec(ctx, "retire keys", `UPDATE keys SET retired_at = $1
		WHERE purpose = $2 AND (retired_at = 0 OR retired_at > $1)`, micros(at), p)
	return err
}

// RotateDataKey adds a data key, for what is sealed after a minute. Those before it
// stay, to open what they sealed.
func (s *Store) RotateDataKey(ctx context.Context, root RootKey) error {
	return s.Update(ctx, func(tx *Tx) error {
		if err := tx.alone(ctx, KeysTopic); err != nil {
			return err
		}
		if _, err := tx.dataKeys(ctx, root); err != nil { // is it the right root key?
			return err
		}
		active := tx.now.Add(keyDelay)
		if err := tx.insertDataKey(ctx, root, newSecret(), active); err != nil {
			return err
		}
		tx.Notify(KeysTopic)
		return recordKey(ctx, tx, Key{Purpose: DataKey, ActiveAt: active}, time.Time{})
	})
}

// Rewrap puts the data keys under another root key. From then on Writ starts with
// the new one only; replicas that run are not disturbed.
func (s *Store) Rewrap(ctx context.Context, old, next RootKey) error {
	return s.Update(ctx, func(tx *Tx) error {
		if err := tx.alone(ctx, KeysTopic); err != nil {
			return err
		}
		rows, err := tx.keyRows(ctx, DataKey)
		if err != nil {
			return err
		}
		for _, k := range rows {
			raw, err := old.unwrap(k.Private, k.ID)
			if err != nil {
				return err
			}
			wrapped, err := next.wrap(raw, k.ID)
			if err != nil {
				return err
			}
			if err := tx.change(ctx, errRootKey, "rewrap key", `UPDATE keys SET key_sealed = $1 WHERE id = $2`, wrapped, k.ID); err != nil {
				return err
			}
		}
		return audit.Append(ctx, tx, audit.Entry{Kind: audit.KeysRewrapped, Detail: map[string]any{"keys": len(rows)}})
	})
}

// recordKey records a key that was added. retire is until when those before it are
// believed, where that ends.
func recordKey(ctx context.Context, tx *Tx, k Key, retire time.Time) error {
	detail := map[string]any{"purpose": k.Purpose, "active_at": k.ActiveAt}
	if !retire.IsZero() {
		detail["others_until"] = retire
	}
	if k.ID != "" {
		detail["key"] = k.ID
	}
	return audit.Append(ctx, tx, audit.Entry{Kind: audit.KeyAdded, Detail: detail})
}

// RefreshDataKeys reads the data keys again, which another replica may have added
// to.
func (s *Store) RefreshDataKeys(ctx context.Context, root RootKey) error {
	var keys []dataKey
	err := s.View(ctx, func(tx *Tx) (err error) {
		keys, err = tx.dataKeys(ctx, root)
		return err
	})
	// A root key that no longer unwraps them is for the next start to refuse.
	if err != nil || len(keys) == 0 {
		return err
	}
	s.seal.keys.Store(&keys)
	return nil
}

// SigningKeys implements minter.KeyStore.
func (s *Store) SigningKeys(ctx context.Context) (out []minter.StoredKey, err error) {
	err = s.View(ctx, func(tx *Tx) error {
		out, err = tx.signingKeys(ctx)
		return err
	})
	return out, err
}

func (t *Tx) signingKeys(ctx context.Context) (out []minter.StoredKey, err error) {
	keys, err := t.Keys(ctx, SigningKey)
	for _, k := range keys {
		out = append(out, minter.StoredKey{ID: k.ID, PKCS8: k.Private, ActiveAt: k.ActiveAt})
	}
	return out, err
}

// DigestKey returns the key of the digests of hidden values, and makes it the first
// time.
func (s *Store) DigestKey(ctx context.Context) (key []byte, err error) {
	if err := s.firstKey(ctx, Key{ID: "digest-" + hex.EncodeToString(newSecret()[:8]), Purpose: DigestKey, Private: newSecret()}); err != nil {
		return nil, err
	}
	err = s.View(ctx, func(tx *Tx) error {
		keys, err := tx.Keys(ctx, DigestKey)
		if err == nil {
			key = keys[0].Private
		}
		return err
	})
	return key, err
}
