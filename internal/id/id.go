// Package id makes the identifiers of Writ's records: a prefix that names the
// kind, then a UUIDv7 in lower-case base32hex, so that ids sort by age and are
// safe in URLs, SQL role names and file names.
package id

import (
	"encoding/base32"
	"strings"

	"github.com/google/uuid"
)

// Kind is the prefix of an id.
type Kind string

// The kinds of record.
const (
	Decision Kind = "dec"
	Session  Kind = "ses"
	Approval Kind = "apr"
	Lease    Kind = "lea"
	Request  Kind = "req"
	SignIn   Kind = "sin"

	Revocation Kind = "rev"
)

// base32hex keeps the byte order, which standard base32 does not.
var encoding = base32.HexEncoding.WithPadding(base32.NoPadding)

const encodedLen = 26 // 16 bytes in base32

// New returns a fresh id. It panics only if the system has no randomness.
func New(k Kind) string {
	u := uuid.Must(uuid.NewV7())
	return string(k) + "_" + strings.ToLower(encoding.EncodeToString(u[:]))
}

// Valid reports whether s has the form of an id of kind k.
func Valid(k Kind, s string) bool {
	rest, ok := strings.CutPrefix(s, string(k)+"_")
	if !ok || len(rest) != encodedLen {
		return false
	}
	for _, c := range []byte(rest) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'v') {
			return false
		}
	}
	return true
}
