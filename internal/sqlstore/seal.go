package sqlstore

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
)

// rootKeySize is in bytes.
const rootKeySize = 32

// RootKey is the key that every other key and every encrypted column is under.
type RootKey [rootKeySize]byte

// Format keeps the key out of anything that package fmt writes.
func (RootKey) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[root key]") }

// LogValue keeps the key out of logs.
func (RootKey) LogValue() slog.Value { return slog.StringValue("[root key]") }

// sealer encrypts columns with AES-256-GCM. Where a value belongs is authenticated
// with it, so that values can't be swapped between rows or columns.
type sealer struct{ aead cipher.AEAD }

func newSealer(root RootKey) (sealer, error) {
	key, err := hkdf.Key(sha256.New, root[:], nil, "writ column encryption v1", rootKeySize)
	if err != nil {
		return sealer{}, fmt.Errorf("derive column key: %w", err)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return sealer{}, fmt.Errorf("derive column key: %w", err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return sealer{}, fmt.Errorf("derive column key: %w", err)
	}
	return sealer{aead}, nil
}

// errRootKey is what a wrong root key looks like, and an altered value.
var errRootKey = errors.New("a stored value does not open: it was sealed under another root key, or altered")

// seal returns nil for an empty value. column and row say where it will stand.
func (s sealer) seal(value []byte, column, row string) []byte {
	if len(value) == 0 {
		return nil
	}
	return s.aead.Seal(nil, nil, value, []byte(column+"\x00"+row)) //nolint:gosec // this AEAD makes its own random nonce
}

func (s sealer) open(sealed []byte, column, row string) ([]byte, error) {
	if len(sealed) == 0 {
		return nil, nil
	}
	v, err := s.aead.Open(nil, nil, sealed, []byte(column+"\x00"+row))
	if err != nil {
		return nil, fmt.Errorf("%s of %s: %w", column, row, errRootKey)
	}
	return v, nil
}
