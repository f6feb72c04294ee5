package dpop

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"time"
)

const (
	nonceStep = time.Minute // a new nonce each
	nonceAge  = 5           // steps that one is accepted for
)

// Nonces makes the nonces that force a client to make its proofs now, not in
// advance (RFC 9449 §8, §9). They need no memory: replicas with one key take each
// other's.
type Nonces struct{ key [32]byte }

// NewNonces returns the nonces of a secret key, which serves nothing else.
func NewNonces(key [32]byte) *Nonces { return &Nonces{key} }

// Nonce is the value of the header DPoP-Nonce at a time: another each minute, good
// for 5 minutes from the start of its own.
func (n *Nonces) Nonce(now time.Time) string { return n.at(step(now)) }

func step(t time.Time) int64 { return t.Unix() / int64(nonceStep/time.Second) }

func (n *Nonces) at(step int64) string {
	b := binary.BigEndian.AppendUint64(nil, uint64(step)) //nolint:gosec // G115: its bits
	mac := hmac.New(sha256.New, n.key[:])
	mac.Write(b)
	return base64.RawURLEncoding.EncodeToString(mac.Sum(b))
}

// fresh accepts the next minute's too: a replica may be a moment ahead.
func (n *Nonces) fresh(nonce string, now time.Time) bool {
	b, err := segment(nonce)
	if n == nil || err != nil || len(b) != 8+sha256.Size {
		return false
	}
	made := int64(binary.BigEndian.Uint64(b)) //nolint:gosec // G115: as above
	age := step(now) - made
	return same(nonce, n.at(made)) && age >= -1 && age < nonceAge
}
