// Package fault names the failures that a caller of Writ can tell apart. An
// error that is not a fault is internal: its text goes to the log, never to
// the caller.
package fault

import (
	"errors"
	"fmt"
	"time"
)

// Code is the stable name of a failure: the last part of the problem type that
// the HTTP API answers with, and a heading in docs/errors.md.
type Code string

// The codes. The HTTP status of each stands in httpapi/problem.go alone.
const (
	InvalidRequest       Code = "invalid_request"        // the request is malformed; Fields says where
	InvalidToken         Code = "invalid_token"          // a token is missing, unverifiable or not for Writ
	InvalidDPoPProof     Code = "invalid_dpop_proof"     // the proof of a bound token is missing or wrong
	UseDPoPNonce         Code = "use_dpop_nonce"         // the proof needs the nonce of the answer
	InvalidClient        Code = "invalid_client"         // a service's own credentials are wrong
	Forbidden            Code = "forbidden"              // verified, but not allowed to do this
	NotFound             Code = "not_found"              // no such thing, or not the caller's
	MethodNotAllowed     Code = "method_not_allowed"     // the route exists with another method
	LoginRequired        Code = "login_required"         // the user has not signed in and consented yet
	SessionEnded         Code = "session_ended"          // the session is over
	IdempotencyConflict  Code = "idempotency_conflict"   // the key was used with another body
	LeaseEnded           Code = "lease_ended"            // a retry of a decision whose credential is gone
	NotRenewable         Code = "not_renewable"          // the lease can't be renewed; ask anew
	LeaseQuota           Code = "lease_quota"            // too many leases are active
	OutcomeConflict      Code = "outcome_conflict"       // the decision has another outcome, or can have none
	BodyTooLarge         Code = "body_too_large"         // more bytes than the limit
	UnsupportedMediaType Code = "unsupported_media_type" // the body is not of the documented type
	MintFailed           Code = "mint_failed"            // decided, but the credential could not be made
	NotReady             Code = "not_ready"              // no policy is loaded yet
	Unavailable          Code = "unavailable"            // the store cannot be read or written
	Overloaded           Code = "overloaded"             // a bounded queue is full
	Internal             Code = "internal"               // a bug or an unforeseen condition
)

// Field is one part of a request that is wrong.
type Field struct {
	// Pointer is the RFC 6901 JSON pointer to the part, or the name of a header,
	// query parameter or form field.
	Pointer string
	// Detail says what was expected.
	Detail string
}

// Error is a failure with a code. Detail and Fields are shown to the caller;
// Err is only logged.
type Error struct {
	Code       Code
	Detail     string
	Fields     []Field
	RetryAfter time.Duration
	Err        error
}

func (e *Error) Error() string {
	s := string(e.Code)
	if e.Detail != "" {
		s += ": " + e.Detail
	}
	for _, f := range e.Fields {
		s += fmt.Sprintf("; %s: %s", f.Pointer, f.Detail)
	}
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

func (e *Error) Unwrap() error { return e.Err }

// New makes a fault whose detail the caller may read.
func New(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Detail: fmt.Sprintf(format, args...)}
}

// Wrap makes a fault that carries a cause for the log.
func Wrap(code Code, err error, format string, args ...any) *Error {
	return &Error{Code: code, Detail: fmt.Sprintf(format, args...), Err: err}
}

// Invalid makes an InvalidRequest that points at one field.
func Invalid(pointer, format string, args ...any) *Error {
	return &Error{
		Code:   InvalidRequest,
		Detail: "the request is not valid",
		Fields: []Field{{Pointer: pointer, Detail: fmt.Sprintf(format, args...)}},
	}
}

// CodeOf returns the code of the fault in err's chain, Internal for any other
// error.
func CodeOf(err error) Code {
	if f, ok := errors.AsType[*Error](err); ok {
		return f.Code
	}
	return Internal
}

// Detail returns what the caller may read of the fault in err's chain, "" for any
// other error.
func Detail(err error) string {
	if f, ok := errors.AsType[*Error](err); ok {
		return f.Detail
	}
	return ""
}

// Is reports whether err carries the code.
func Is(err error, code Code) bool {
	f, ok := errors.AsType[*Error](err)
	return ok && f.Code == code
}
