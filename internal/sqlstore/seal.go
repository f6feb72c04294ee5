package sqlstore

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync/atomic"
	"time"
)

// keySize of symmetric keys is in bytes.
const keySize = 32

// RootKey wraps the data keys, which encrypt every other key and every sealed
// column. It is the one secret that is not in the store; a key management service
// could stand in for its two methods.
type RootKey [keySize]byte

// Format keeps the key out of anything that package fmt writes.
func (RootKey) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[root key]") }

// LogValue keeps the key out of logs.
func (RootKey) LogValue() slog.Value { return slog.StringValue("[root key]") }

func (r RootKey) aead() (cipher.AEAD, error) { return r.derive("writ key wrapping v1") }

func (r RootKey) derive(purpose string) (cipher.AEAD, error) {
	key, err := hkdf.Key(sha256.New, r[:], nil, purpose, keySize)
	if err != nil {
		return nil, fmt.Errorf("derive key: %w", err)
	}
	return newAEAD(key)
}

func newAEAD(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("make cipher: %w", err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, fmt.Errorf("make cipher: %w", err)
	}
	return aead, nil
}

func (r RootKey) wrap(key []byte, id string) ([]byte, error) {
	a, err := r.aead()
	if err != nil {
		return nil, err
	}
	return sealWith(a, key, dataKeyColumn, id), nil
}

func (r RootKey) unwrap(wrapped []byte, id string) ([]byte, error) {
	a, err := r.aead()
	if err != nil {
		return nil, err
	}
	return openWith(a, wrapped, dataKeyColumn, id)
}

// dataKeyColumn is where wrapped keys stand, apart from those that are sealed.
const dataKeyColumn = "keys.key wrapped"

// sealWith encrypts with AES-256-GCM. Where a value belongs is authenticated with
// it, so that values can't be swapped between rows or columns.
func sealWith(a cipher.AEAD, value []byte, column, row string) []byte {
	return a.Seal(nil, nil, value, []byte(column+"\x00"+row)) //nolint:gosec // this AEAD makes its own random nonce
}

func openWith(a cipher.AEAD, sealed []byte, column, row string) ([]byte, error) {
	v, err := a.Open(nil, nil, sealed, []byte(column+"\x00"+row))
	if err != nil {
		return nil, fmt.Errorf("%s of %s: %w", column, row, errRootKey)
	}
	return v, nil
}

// errRootKey is what a wrong root key looks like, and an altered value.
var errRootKey = errors.New("a stored value does not open: it was sealed under another key, or altered")

// dataKey encrypts columns from a time on.
type dataKey struct {
	aead     cipher.AEAD
	activeAt time.Time
}

// sealer encrypts columns under the data keys, which may be added to while it works.
type sealer struct {
	keys atomic.Pointer[[]dataKey] // newest first
	now  func() time.Time
}

// seal returns nil for an empty value. column and row say where it will stand.
func (s *sealer) seal(value []byte, column, row string) []byte {
	if len(value) == 0 {
		return nil
	}
	keys, now := *s.keys.Load(), s.now()
	for _, k := range keys[:len(keys)-1] {
		// A new key waits until every replica knows it.
		if !now.Before(k.activeAt) {
			return sealWith(k.aead, value, column, row)
		}
	}
	return sealWith(keys[len(keys)-1].aead, value, column, row)
}

func (s *sealer) open(sealed []byte, column, row string) (v []byte, err error) {
	if len(sealed) == 0 {
		return nil, nil
	}
	for _, k := range *s.keys.Load() {
		if v, err = openWith(k.aead, sealed, column, row); err == nil {
			return v, nil
		}
	}
	return nil, err
}

// newSecret makes a random key.
func newSecret() []byte {
	b := make([]byte, keySize)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	return b
}
