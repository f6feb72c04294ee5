package evidence

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// Format names the form of an export, which docs/audit.md describes.
const Format = "writ-audit-export/1"

// Header is the first line of an export.
type Header struct {
	Format string `json:"format"`
	Origin string `json:"origin"`
	// From and To (exclusive) are the indexes of its entries.
	From int64 `json:"from"`
	To   int64 `json:"to"`
	// Range is what the tree was at From: the roots of its maximal complete subtrees,
	// oldest first. Nothing where From is 0.
	Range []tlog.Hash `json:"range"`
	// Checkpoint is signed, of size To or greater.
	Checkpoint string `json:"checkpoint"`
	// Tail proves that the tree of Checkpoint begins with that of size To. Nothing where
	// both are one.
	Tail tlog.TreeProof `json:"tail"`
	// Verifiers are the keys that Writ says it signs by. Nobody may believe them on the
	// word of the file.
	Verifiers []string `json:"verifiers"`
}

// line is the header exactly as it stands in a file.
func (h Header) line() ([]byte, error) {
	if h.Range == nil {
		h.Range = []tlog.Hash{}
	}
	if h.Tail == nil {
		h.Tail = tlog.TreeProof{}
	}
	if h.Verifiers == nil {
		h.Verifiers = []string{}
	}
	b, err := json.Marshal(h)
	if err != nil {
		return nil, fmt.Errorf("write header: %w", err)
	}
	return append(b, '\n'), nil
}

// parseHeader reads what Header.line wrote, to the byte.
func parseHeader(line []byte) (h Header, err error) {
	if err := json.Unmarshal(line, &h); err != nil || h.Format != Format {
		return h, errors.New("not an audit export: the first line is no header of the format " + Format)
	}
	again, err := h.line()
	switch {
	case err != nil:
		return h, err
	case !bytes.Equal(line, again):
		return h, errors.New("the header is not as Writ writes it")
	case h.From < 0 || h.To < h.From || h.From == h.To && h.To > 0 || !(frontier{h.From, h.Range}).whole():
		return h, fmt.Errorf("the header has no range of a log: from %d to %d with %d hashes", h.From, h.To, len(h.Range))
	}
	for _, key := range h.Verifiers {
		if err := checkVerifier(key); err != nil {
			return h, fmt.Errorf("the header has a damaged verifier key: %w", err)
		}
	}
	return h, nil
}

// checkVerifier demands the one spelling that a key has.
func checkVerifier(key string) error {
	v, err := note.NewVerifier(key)
	if err != nil {
		return err
	}
	if want := fmt.Sprintf("%s+%08x+", v.Name(), v.KeyHash()); !strings.HasPrefix(key, want) {
		return errors.New("malformed verifier id")
	}
	return nil
}

const (
	beforeIndex = `{"index":`
	beforeHash  = `,"hash":"`
	beforeEntry = `","entry":`
	afterEntry  = "}\n"
	hashText    = 44 // characters of a hash in base64
)

// appendLine writes an entry's line.
func appendLine(b []byte, index int64, hash tlog.Hash, entry []byte) []byte {
	b = strconv.AppendInt(append(b, beforeIndex...), index, 10)
	b = append(append(b, beforeHash...), hash.String()...)
	b = append(append(b, beforeEntry...), entry...)
	return append(b, afterEntry...)
}

// parseLine reads what appendLine wrote, to the byte; the entry itself is for its
// hash to prove.
func parseLine(line []byte) (index int64, hash tlog.Hash, entry []byte, ok bool) {
	rest, ok := bytes.CutPrefix(line, []byte(beforeIndex))
	digits, rest, found := bytes.Cut(rest, []byte(beforeHash))
	if !ok || !found || len(rest) < hashText {
		return 0, hash, nil, false
	}
	index, err := strconv.ParseInt(string(digits), 10, 64)
	if err != nil || index < 0 || strconv.FormatInt(index, 10) != string(digits) {
		return 0, hash, nil, false
	}
	hash, err = tlog.ParseHash(string(rest[:hashText]))
	if err != nil || hash.String() != string(rest[:hashText]) {
		return 0, hash, nil, false
	}
	rest, ok = bytes.CutPrefix(rest[hashText:], []byte(beforeEntry))
	entry, found = bytes.CutSuffix(rest, []byte(afterEntry))
	return index, hash, entry, ok && found
}
