package audit

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// Checkpoint is the head of a log at one size (C2SP tlog-checkpoint).
type Checkpoint struct {
	Origin string
	Size   int64
	Root   tlog.Hash
}

// text is what is signed.
func (c Checkpoint) text() string { return fmt.Sprintf("%s\n%d\n%s\n", c.Origin, c.Size, c.Root) }

// sign makes a signed note (C2SP signed-note) of c.
func (c Checkpoint) sign(keys []string) (string, error) {
	var signers []note.Signer
	for _, k := range keys {
		s, err := note.NewSigner(k)
		if err != nil {
			return "", errors.New("sign checkpoint: a checkpoint key of the store is damaged")
		}
		if s.Name() == c.Origin {
			signers = append(signers, s)
		}
	}
	if len(signers) == 0 {
		return "", fmt.Errorf("sign checkpoint: the store has no key of %s", c.Origin)
	}
	signed, err := note.Sign(&note.Note{Text: c.text()}, signers...)
	if err != nil {
		return "", fmt.Errorf("sign checkpoint: %w", err)
	}
	return string(signed), nil
}

// OpenCheckpoint verifies a signed note by verifier keys, of which one suffices.
func OpenCheckpoint(signed string, vkeys ...string) (Checkpoint, error) {
	var verifiers []note.Verifier
	for _, k := range vkeys {
		v, err := note.NewVerifier(k)
		if err != nil {
			return Checkpoint{}, fmt.Errorf("verifier key %q: %w", k, err)
		}
		verifiers = append(verifiers, v)
	}
	n, err := note.Open([]byte(signed), note.VerifierList(verifiers...))
	if err != nil {
		return Checkpoint{}, fmt.Errorf("checkpoint is not signed by a known key: %w", err)
	}
	c, err := parseCheckpoint(n.Text)
	if err != nil {
		return Checkpoint{}, err
	}
	for _, s := range n.Sigs {
		if s.Name == c.Origin {
			return c, nil
		}
	}
	return Checkpoint{}, fmt.Errorf("checkpoint of %s is signed in another name", c.Origin)
}

// ReadCheckpoint reads a signed note without verifying it.
func ReadCheckpoint(signed string) (Checkpoint, error) {
	text, _, ok := strings.Cut(signed, "\n\n")
	if !ok {
		return Checkpoint{}, errors.New("not a signed note")
	}
	return parseCheckpoint(text + "\n")
}

func parseCheckpoint(text string) (c Checkpoint, err error) {
	lines := strings.SplitN(text, "\n", 4)
	if len(lines) < 4 {
		return c, errors.New("checkpoint has not the three lines origin, size and root")
	}
	c.Origin = lines[0]
	c.Size, err = strconv.ParseInt(lines[1], 10, 64)
	if err != nil || c.Size < 0 || strconv.FormatInt(c.Size, 10) != lines[1] {
		return c, fmt.Errorf("checkpoint has the size %q", lines[1])
	}
	if c.Root, err = tlog.ParseHash(lines[2]); err != nil {
		return c, fmt.Errorf("checkpoint has the root %q", lines[2])
	}
	return c, nil
}

// NewOrigin names a log: whose it is, and which of theirs.
func NewOrigin(host string) string {
	b := make([]byte, 8)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	return host + "/audit/" + hex.EncodeToString(b)
}

// NewCheckpointKey makes an Ed25519 key that signs in the name of an origin, and
// the verifier key that belongs to it (C2SP signed-note).
func NewCheckpointKey(origin string) (signer, verifier string, err error) {
	signer, verifier, err = note.GenerateKey(rand.Reader, origin)
	if err != nil {
		return "", "", fmt.Errorf("make checkpoint key: %w", err)
	}
	return signer, verifier, nil
}
