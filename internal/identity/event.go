package identity

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/telemetry"
)

// The events that end what Writ holds for somebody.
const (
	EventLogout = "http://schemas.openid.net/event/backchannel-logout" // OpenID Back-Channel Logout §2.4

	caep = "https://schemas.openid.net/secevent/caep/event-type/"
	risc = "https://schemas.openid.net/secevent/risc/event-type/"
)

// events says for each event that Writ acts on whether it is about one login, where
// the event names one, or about all that the account has.
var events = map[string]struct{ login bool }{
	EventLogout:                    {login: true},
	caep + "session-revoked":       {login: true},
	caep + "credential-change":     {},
	risc + "account-disabled":      {},
	risc + "account-purged":        {},
	risc + "credential-compromise": {},
	risc + "sessions-revoked":      {},
}

// SignOut is a verified word of an issuer that somebody is not to be believed any
// more: what was begun before, and tokens that were issued before, end.
type SignOut struct {
	// ID is the token's own, by which a repetition is known; Transmitter, who said it.
	ID, Transmitter string
	// Event is the URI of what happened.
	Event string
	// User is whom it is about; only its issuer is set where Login names them alone.
	User Ref
	// Login is the sid of the one login that ends, "" for all of them.
	Login string
	// Before is when it happened.
	Before time.Time
	// Until is how long tokens from before could still be brought.
	Until time.Time
}

// minMemory is how long a sign-out is remembered at least: longer than sessions live.
const minMemory = 35 * 24 * time.Hour

// maxEventAge bounds how late an event may come, and how long its id is remembered.
const maxEventAge = 7 * 24 * time.Hour

// Logout verifies a logout token (OpenID Back-Channel Logout §2.6). Every refusal is
// a fault.InvalidRequest.
func (v *Verifier) Logout(ctx context.Context, raw string) (_ SignOut, err error) {
	ctx, span := telemetry.Start(ctx, "identity verify")
	defer func() { telemetry.End(span, err) }()
	out, err := v.logout(ctx, raw)
	return out, refusedEvent("logout_token", err)
}

func (v *Verifier) logout(ctx context.Context, raw string) (SignOut, error) {
	t, err := v.open(raw)
	if err != nil {
		return SignOut{}, err
	}
	if typ, present := t.token.Type(); present && typ != "logout+jwt" && typ != "jwt" {
		return SignOut{}, errors.New("is not a logout token (typ logout+jwt)")
	}
	t.kind = idToken // its algorithms are those of ID tokens (§2.6)
	if _, nonce := t.claims["nonce"]; nonce {
		return SignOut{}, errors.New("has a nonce, as only an ID token may")
	}
	aud, _ := audiences(t.claims)
	if !slices.ContainsFunc(aud, func(a string) bool { return slices.Contains(t.OwnClients, a) }) {
		return SignOut{}, errors.New("is not meant for Writ's client at its issuer")
	}
	named, _ := t.claims["events"].(map[string]any)
	if _, ok := named[EventLogout].(map[string]any); !ok || len(named) != 1 {
		return SignOut{}, errors.New("has no logout event alone in events")
	}
	// sub and sid are those of ID tokens, whatever access tokens call their subject.
	sub, sid := stringClaim(t.claims, "sub"), stringClaim(t.claims, "sid")
	if sub != "" && t.SubjectClaim != "" && sid == "" {
		return SignOut{}, errors.New("names a user by sub, which this issuer's profile knows by another claim; have the provider send sid")
	}
	if sub != "" && !Usable(sub) || sid != "" && !Usable(sid) || sub == "" && sid == "" {
		return SignOut{}, errors.New("has no usable sub or sid")
	}
	if err := t.checkTimes(t.claims, v.now()); err != nil {
		return SignOut{}, err
	}
	return v.signOut(ctx, t, EventLogout, Ref{t.URL, sub}, sid)
}

// SecurityEvent verifies a Security Event Token (RFC 8417) that a transmitter pushes
// (RFC 8935). ok is false for an event that ends nothing. Every refusal is a
// fault.InvalidRequest.
func (v *Verifier) SecurityEvent(ctx context.Context, raw string) (_ SignOut, ok bool, err error) {
	ctx, span := telemetry.Start(ctx, "identity verify")
	defer func() { telemetry.End(span, err) }()
	out, err := v.securityEvent(ctx, raw)
	return out, out.Event != "", refusedEvent("the security event token", err)
}

func (v *Verifier) securityEvent(ctx context.Context, raw string) (SignOut, error) {
	t, err := v.open(raw)
	if err != nil {
		return SignOut{}, err
	}
	if typ, _ := t.token.Type(); typ != "secevent+jwt" {
		return SignOut{}, errors.New("is not a security event token (typ secevent+jwt)")
	}
	if t.Signals.Audience == "" {
		return SignOut{}, errors.New("is of an issuer that is not configured to send signals")
	}
	if err := checkAudience(t.claims, t.Signals.Audience); err != nil {
		return SignOut{}, err
	}
	iat, timed := TimeClaim(t.claims, "iat")
	switch now := v.now(); {
	case !timed:
		return SignOut{}, errors.New("has no usable iat")
	case now.Add(t.Leeway).Before(iat):
		return SignOut{}, errors.New("was issued in the future")
	case now.Sub(iat) > maxEventAge:
		return SignOut{}, fmt.Errorf("is older than %v", maxEventAge)
	}
	named, _ := t.claims["events"].(map[string]any)
	if len(named) != 1 { // RFC 8417 §2.2 lets there be more; transmitters of CAEP and RISC send one
		return SignOut{}, errors.New("has not exactly one member in events")
	}
	for uri, payload := range named {
		return v.event(ctx, t, uri, payload)
	}
	return SignOut{}, nil
}

func (v *Verifier) event(ctx context.Context, t unverified, uri string, payload any) (SignOut, error) {
	what, acts := events[uri]
	if !acts || uri == EventLogout {
		// Heard and of no effect, but only from who may say it.
		_, err := v.signOut(ctx, t, "", Ref{}, "")
		return SignOut{}, err
	}
	detail, ok := payload.(map[string]any)
	if !ok {
		return SignOut{}, errors.New("has an event that is not an object")
	}
	subject, ok := t.claims["sub_id"]
	if !ok { // where events before the final CAEP and RISC have it
		subject = detail["subject"]
	}
	user, sid, err := t.eventSubject(subject)
	if err != nil {
		return SignOut{}, err
	}
	if !what.login {
		if user.ID == "" {
			return SignOut{}, errors.New("names no account in its subject")
		}
		sid = ""
	}
	return v.signOut(ctx, t, uri, user, sid)
}

// eventSubject reads a subject identifier (RFC 9493 §3): iss_sub, or complex (Shared
// Signals §3.5) with such a user, an opaque session, or both.
func (is *issuer) eventSubject(subject any) (user Ref, sid string, err error) {
	m, _ := subject.(map[string]any)
	parts := map[string]any{"user": m}
	if m["format"] == "complex" {
		parts = m
	}
	if u, ok := parts["user"].(map[string]any); ok && len(u) > 0 {
		iss, sub := stringClaim(u, "iss"), stringClaim(u, "sub")
		if u["format"] != "iss_sub" || !Usable(sub) {
			return user, "", errors.New("has a subject in a form that Writ can't match; have the transmitter send iss_sub")
		}
		if is.aboutMapped {
			return user, "", errors.New("names a user by sub, which the profile of their issuer knows by another claim; have the transmitter send the session")
		}
		if iss != is.Signals.Subjects {
			return user, "", errors.New("has a subject of an issuer that its transmitter may not speak about")
		}
		user.ID = sub
	}
	if s, ok := parts["session"].(map[string]any); ok {
		if sid = stringClaim(s, "id"); s["format"] != "opaque" || !Usable(sid) {
			return user, "", errors.New("has a session in a form that Writ can't match; have the transmitter send opaque, with the sid of its ID tokens")
		}
	}
	if user.ID == "" && sid == "" {
		return user, "", errors.New("has no usable subject")
	}
	user.Issuer = is.Signals.Subjects
	return user, sid, nil
}

// signOut verifies the signature at last. An event of any kind needs an id.
func (v *Verifier) signOut(ctx context.Context, t unverified, event string, user Ref, sid string) (SignOut, error) {
	id := stringClaim(t.claims, "jti")
	if !Usable(id) {
		return SignOut{}, errors.New("has no usable jti")
	}
	if !slices.Contains(t.algorithms(t.kind), t.token.Algorithm) {
		return SignOut{}, errors.New("is signed by an algorithm that its issuer may not use")
	}
	if _, err := v.verifySignature(ctx, t); err != nil {
		return SignOut{}, err
	}
	before, _ := TimeClaim(t.claims, "iat") // by the clock that its tokens have, too
	life := minMemory
	switch about, ok := v.issuers[user.Issuer]; {
	case !ok || about.MaxAge == 0:
		life = maxLife
	default:
		life = max(life, about.MaxAge)
	}
	if sid == "" { // accounts can be agents', too
		user = v.AgentOf(user)
	}
	now := v.now()
	return SignOut{
		ID: id, Transmitter: t.URL, Event: event, User: user, Login: sid, Before: before, Until: now.Add(life),
	}, nil
}

func refusedEvent(which string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ErrKeysUnavailable), errors.Is(err, errLimited):
		return fault.New(fault.NotReady, "%s %v; send it again later", which, ErrKeysUnavailable)
	}
	return fault.New(fault.InvalidRequest, "%s %v", which, err)
}
