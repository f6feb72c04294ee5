package approval

import (
	"context"
	"errors"
	"time"

	"github.com/writsec/writ/internal/identity"
)

// Provider asks people through one identity provider (CIBA Core). Its methods
// never block past their context, and report every outcome as a value: an error
// would leave open what the person saw.
type Provider interface {
	// Limits says what the provider can show.
	Limits() Limits
	// Hint names the user to the provider (login_hint).
	Hint(user identity.Principal) (string, error)
	// Start asks the provider to prompt the person.
	Start(ctx context.Context, r StartRequest) StartResult
	// Poll asks once whether there is an answer.
	Poll(ctx context.Context, authReqID string) PollResult
	// Verify checks the answer of a successful poll against what was asked. An error
	// is final, unless it is ErrUnavailable.
	Verify(ctx context.Context, answer []byte, want Expectation) (Evidence, error)
	// Discard revokes the tokens of an answer, as far as the provider lets it.
	Discard(ctx context.Context, answer []byte)
	// Timeout is the longest that one call can take.
	Timeout() time.Duration
}

// ErrUnavailable says that an answer can't be verified now, but perhaps later.
var ErrUnavailable = errors.New("the provider's keys are not available")

// StartRequest is one backchannel authentication request (CIBA Core §7.1).
type StartRequest struct {
	Hint      string
	Message   string
	ACRValues []string
	ExpiresIn time.Duration
}

// StartOutcome says what became of a start.
type StartOutcome int

// The outcomes of a start.
const (
	Started      StartOutcome = iota // the provider took it
	StartRefused                     // it will never take it
	StartLater                       // it certainly took nothing; try again
	StartUnclear                     // it may or may not have prompted the person
)

// StartResult is the provider's acknowledgement (CIBA Core §7.3).
type StartResult struct {
	Outcome    StartOutcome
	AuthReqID  string
	ExpiresIn  time.Duration
	Interval   time.Duration
	Reason     string        // of a refusal: the OAuth error code, or a word of ours
	RetryAfter time.Duration // of StartLater; zero where the provider did not say
	Err        error         // why there was no answer, for the log
}

// PollOutcome says what became of a poll.
type PollOutcome int

// The outcomes of a poll (CIBA Core §10.1, §11).
const (
	PollPending     PollOutcome = iota // no answer yet
	PollSlowDown                       // no answer yet, and ask less often
	PollAnswered                       // yes: tokens
	PollDenied                         // no
	PollExpired                        // too late
	PollUnknown                        // invalid_grant: the provider knows no such prompt (any more)
	PollFailed                         // any other final error
	PollUnreachable                    // no usable answer; try again
)

// PollResult is the outcome of one poll.
type PollResult struct {
	Outcome    PollOutcome
	Answer     []byte        // of PollAnswered
	Interval   time.Duration // a new least interval, if the provider named one
	RetryAfter time.Duration // not before then, if the provider said so
	Reason     string        // of PollFailed
	Err        error         // why there was no answer, for the log
}

// Expectation is what an answer must say to be a yes.
type Expectation struct {
	Subject   string // of the person who was asked
	ACRValues []string
	AuthReqID string
	NotBefore time.Time // when the person was asked
}

// Evidence is what a verified answer says.
type Evidence struct {
	ACR      string
	AMR      []string
	AuthTime time.Time
}
