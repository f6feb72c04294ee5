// Package signin signs users in for agents that have no token of theirs, by OpenID
// Connect's authorization code flow, and asks them to consent to what the agent wants
// to do. A link that somebody was sent opens nothing for its sender: consent belongs to
// the browser that started, and its fruit, a code, to the person at that browser and to
// the one agent that asked.
//
// It keeps no secret in the store. What must be unguessable is derived from the cookie
// of one browser, or is random, and only hashes of it are stored.
package signin

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"strings"
	"time"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/session"
)

// State is how far a sign-in has come. That its time is over is no state: ExpiresAt
// says so, in any of them.
type State string

// The states.
const (
	Opened    State = "opened"    // by the agent; nobody has started
	Started   State = "started"   // a browser was sent to the identity provider
	SignedIn  State = "signed_in" // it is known who is at the browser
	Consented State = "consented" // the code is good
	Declined  State = "declined"
	Completed State = "completed" // the session is open
)

const (
	// consentWithin is how long a sign-in waits for consent after the agent opened it.
	consentWithin = 10 * time.Minute
	// codeLife is how long the code is good after consent.
	codeLife = 5 * time.Minute
	// maxWrongCodes ends a sign-in.
	maxWrongCodes = 5
	// maxOpen bounds what one agent can have open at a time.
	maxOpen = 100
)

// SignIn is one request of an agent for a user.
type SignIn struct {
	ID      string
	Version int64
	State   State
	Agent   identity.Ref
	// From is the address that the agent opened it from; "" where unknown.
	From string
	// Spec is the session that it shall become.
	Spec session.Spec
	// RedirectURI is a registered one of the agent's, or "": the user carries the code.
	// AgentState goes back with it.
	RedirectURI, AgentState string

	// Hashes: of the link's token, the browser's secret, the state parameter while the
	// identity provider has not answered, and the code from consent on.
	TokenHash, BrowserHash, StateHash, CodeHash string

	// Issuer is the identity provider that the browser was sent to.
	Issuer string
	// User is who signed in there.
	User       identity.Principal
	WrongCodes int
	Session    string // that it became

	OpenedAt  time.Time
	ExpiresAt time.Time
}

// Over reports whether nothing can come of it any more.
func (s SignIn) Over(now time.Time) bool {
	return s.State == Declined || s.State == Completed || !now.Before(s.ExpiresAt) || s.WrongCodes >= maxWrongCodes
}

// ErrStale says that a sign-in is not at the version that was read.
var ErrStale = errors.New("sign-in changed since it was read")

// Store runs transactions.
type Store interface {
	Update(ctx context.Context, f func(Tx) error) error
	View(ctx context.Context, f func(Tx) error) error
}

// Tx is what sign-ins need of a transaction. The three that read one return
// fault.NotFound where there is none.
type Tx interface {
	session.Tx
	InsertSignIn(ctx context.Context, s SignIn) error
	SignIn(ctx context.Context, id string) (SignIn, error)
	SignInByToken(ctx context.Context, hash string) (SignIn, error)
	SignInByState(ctx context.Context, hash string) (SignIn, error)
	// UpdateSignIn stores what changes in the life of a sign-in and increments the
	// version, here too, if it is still s.Version; otherwise ErrStale.
	UpdateSignIn(ctx context.Context, s *SignIn) error
	// CountOpenSignIns counts what an agent has open. In an Update, those of one agent
	// wait for one another.
	CountOpenSignIns(ctx context.Context, agent identity.Ref) (int, error)
}

// record enters a step into the audit log.
func record(ctx context.Context, tx Tx, kind audit.Kind, s SignIn, detail map[string]any) error {
	if detail == nil {
		detail = map[string]any{}
	}
	detail["sign_in"] = s.ID
	return audit.Append(ctx, tx, audit.Entry{Kind: kind, User: s.User.Ref, Agent: s.Agent, Session: s.Session, Detail: detail})
}

// newSecret makes n random bytes, for URLs and cookies.
func newSecret(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	return base64.RawURLEncoding.EncodeToString(b)
}

// hash is what the store has of a secret.
func hash(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

// same compares in constant time. Nothing is the same as an empty hash.
func same(a, b string) bool {
	return b != "" && subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1
}

// browser is the secret that the cookie of one browser holds, 256 bits, anew with each
// start. What else that start needs is derived from it, so that none of it has to be
// kept, and all of it ends with the cookie.
type browser string

func newBrowser() browser { return browser(newSecret(32)) }

func (b browser) derive(purpose string) []byte {
	m := hmac.New(sha256.New, []byte(b))
	m.Write([]byte("writ sign-in " + purpose))
	return m.Sum(nil)
}

func (b browser) text(purpose string) string {
	return base64.RawURLEncoding.EncodeToString(b.derive(purpose))
}

func (b browser) state() string { return b.text("state") }
func (b browser) nonce() string { return b.text("nonce") }

// verifier is a code_verifier of 43 characters (RFC 7636 §4.1).
func (b browser) verifier() string { return b.text("verifier") }

// form is what proves that a form is one that this browser was shown.
func (b browser) form() string { return b.text("form") }

// started reports whether this browser is the one that last started s.
func (b browser) started(s SignIn) bool { return same(hash(string(b)), s.BrowserHash) }

// The code is 50 bits in Crockford's base32, without letters that look like digits.
const (
	alphabet   = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
	codeLength = 10
)

// code is what the user carries to the agent.
func (b browser) code() string {
	var out strings.Builder
	for i, c := range b.derive("code")[:codeLength] {
		if i == codeLength/2 {
			out.WriteByte('-')
		}
		out.WriteByte(alphabet[c&31])
	}
	return out.String()
}

// normal undoes what becomes of a code on its way through hands: case, spaces,
// hyphens and look-alikes.
var normal = strings.NewReplacer(" ", "", "-", "", "O", "0", "I", "1", "L", "1")

func codeHash(id, code string) string { return hash(id + " " + normal.Replace(strings.ToUpper(code))) }
