package config

import "time"

// Signing says how Writ signs what it makes, and when it changes the key.
type Signing struct {
	// Algorithm of new keys is ES256 or EdDSA (Ed25519). Keys of before stay what they are.
	Algorithm string `yaml:"algorithm"`
	// RotateEvery is how long a key signs; zero: until a person rotates it.
	RotateEvery time.Duration `yaml:"rotate_every"`
}

// The bounds of how long a key signs. Below, keys would follow each other faster than
// verifiers fetch them.
const (
	minRotate = time.Hour
	maxRotate = 366 * 24 * time.Hour
)

func (s Signing) check(fail failFunc) {
	fail.oneOf("signing.algorithm", s.Algorithm, "ES256", "EdDSA")
	if r := s.RotateEvery; r != 0 && (r < minRotate || r > maxRotate) {
		fail("signing.rotate_every", "is %v, expected zero (never by itself) or %v to %v", r, minRotate, maxRotate)
	}
}

// LongestLife is the longest that anything that Writ signs for a minter can live.
func (c Config) LongestLife() (most time.Duration) {
	for _, m := range c.Minters {
		most = max(most, m.MaxTTL)
		if m.OAuth != nil && m.OAuth.Assertion != nil {
			most = max(most, m.OAuth.Assertion.TTL)
		}
	}
	return most
}
