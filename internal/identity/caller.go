package identity

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/writsec/writ/internal/dpop"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/telemetry"
)

// Presented is what a request brings to say who makes it.
type Presented struct {
	// Token of the Authorization header.
	Token string
	// DPoP says that its scheme was DPoP; Proofs are then the values of the DPoP header,
	// of which one is expected (RFC 9449 §7.1), and Method and URL are of the request.
	DPoP        bool
	Proofs      []string
	Method, URL string
	// Certificate is the TLS client's, nil for none.
	Certificate *x509.Certificate
	// Subject is the user's token that an agent brings besides, "" for none.
	Subject string
}

// Caller verifies the tokens of an agent's request and that they belong together.
// Every refusal is a fault.InvalidToken.
func (v *Verifier) Caller(ctx context.Context, p Presented) (_ Caller, err error) {
	ctx, span := telemetry.Start(ctx, "identity verify")
	defer func() { telemetry.End(span, err) }()
	b, held, err := v.bearer(ctx, p)
	if err != nil {
		return Caller{}, refused("the bearer token", err)
	}
	return v.caller(ctx, p.Token, p.Subject, held, b)
}

// UserToken is the token that names the user, "" where the session alone does. It is a
// secret of the user's identity provider: see lease.Order.
func (c Caller) UserToken() string {
	switch {
	case c.subject != "":
		return c.subject
	case c.User != nil:
		return c.bearer
	}
	return ""
}

// Again verifies once more what a caller presented, for a request that was held
// since. What is good once only was used up when the request began, and is not asked
// for again.
func (v *Verifier) Again(ctx context.Context, c Caller) (_ Caller, err error) {
	ctx, span := telemetry.Start(ctx, "identity verify")
	defer func() { telemetry.End(span, err) }()
	b, err := v.verify(ctx, c.bearer)
	if err != nil {
		return Caller{}, refused("the bearer token", err)
	}
	return v.caller(ctx, c.bearer, c.subject, dpop.Held(c.Held), b)
}

func (v *Verifier) caller(ctx context.Context, bearer, subject string, held dpop.Held, b verified) (Caller, error) {
	agent, user, err := v.split(b)
	if err != nil {
		return Caller{}, refused("the bearer token", err)
	}
	c := Caller{Agent: agent, User: user, Held: dpop.Confirmation(held), bearer: bearer, subject: subject}
	if subject == "" {
		return c, nil
	}
	if user != nil {
		return Caller{}, refused("the subject_token", errors.New("is one too many: the bearer token names the user already"))
	}
	if c.User, err = v.subject(ctx, subject, agent.Ref, held); err != nil {
		return Caller{}, refused("the subject_token", err)
	}
	return c, nil
}

// bearer verifies the token of the Authorization header and that who brings it may.
func (v *Verifier) bearer(ctx context.Context, p Presented) (t verified, held dpop.Held, err error) {
	if t, err = v.verify(ctx, p.Token); err != nil {
		return t, held, err
	}
	if t.kind == idToken {
		return t, held, errors.New("is not an access token (RFC 9068, typ at+jwt)")
	}
	if held, err = v.prove(ctx, p, t); err != nil {
		return t, held, err
	}
	if t.kind == ClientAssertion {
		err = v.spendAssertion(ctx, t)
	}
	return t, held, err
}

// prove holds who brings a token to the key that it is bound to, and returns what of
// that was proved.
func (v *Verifier) prove(ctx context.Context, p Presented, t verified) (held dpop.Held, err error) {
	switch {
	case p.DPoP && t.bound.JKT == "":
		return held, errors.New("is not bound to a DPoP key: send it as Authorization: Bearer")
	case !p.DPoP && t.bound.JKT != "":
		return held, errors.New("is bound to a DPoP key: send it as Authorization: DPoP, with a proof in the DPoP header")
	case !t.constrained():
		return held, fmt.Errorf("is not bound to a key by %s, as its issuer's profile wants", strings.Join(t.SenderConstraint, " or "))
	}
	if t.bound.X5T != "" {
		if p.Certificate == nil {
			return held, errors.New("is bound to a TLS client certificate, and the request came without one")
		}
		held.X5T = dpop.CertThumbprint(p.Certificate)
	}
	if p.DPoP {
		key, err := v.proofs.Verify(ctx, dpop.Request{
			Proofs: p.Proofs, Method: p.Method, URL: p.URL, Token: p.Token, NonceRequired: t.DPoPNonce,
		})
		if err != nil {
			return held, proofRefused(err)
		}
		held.JKT = key.Thumbprint
	}
	if t.bound.Bound() && !t.bound.Confirmed(held) {
		return held, errors.New("is bound to another key than its bearer holds")
	}
	return held, nil
}

// constrained reports whether a token is bound as its issuer's profile wants.
func (t verified) constrained() bool {
	return len(t.SenderConstraint) == 0 ||
		t.bound.JKT != "" && slices.Contains(t.SenderConstraint, "dpop") ||
		t.bound.X5T != "" && slices.Contains(t.SenderConstraint, "mtls")
}

func proofRefused(err error) error {
	if errors.Is(err, dpop.ErrUseNonce) {
		return fault.New(fault.UseDPoPNonce, "the DPoP proof %v", err)
	}
	if f, ok := errors.AsType[failure](err); ok {
		return f
	}
	return fault.New(fault.InvalidDPoPProof, "the DPoP proof %v", err)
}

// Nonce is for the DPoP-Nonce header (RFC 9449 §8).
func (v *Verifier) Nonce() string { return v.proofs.Nonces.Nonce(v.now()) }

// split reads agent and user out of one token: the subject is the user, act.sub or
// else the client is the agent. A token without act whose subject is its client
// speaks for the agent alone.
func (v *Verifier) split(t verified) (agent Principal, user *Principal, err error) {
	act, ok := actor(t.claims, "act", t.URL)
	if !ok || !act.IsZero() && act.Issuer != t.URL {
		return Principal{}, nil, errors.New("has an act that names no actor of its issuer")
	}
	if !t.Agent {
		return Principal{}, nil, errors.New("is of an issuer that may not speak for agents")
	}
	itself := t.speaksForItself() || t.subject == act.ID
	switch {
	case itself && !act.IsZero():
		return Principal{}, nil, errors.New("has an actor but no user: its sub is its client or its actor")
	case itself:
		return Principal{Ref: v.AgentOf(t.holder()), Claims: t.claims, Parsed: t.parsed}, nil, nil
	case !t.User:
		return Principal{}, nil, errors.New("is of an issuer that may not speak for users")
	}
	agent = Principal{Ref: v.AgentOf(Ref{t.URL, t.client}), Claims: map[string]any{}}
	if !act.IsZero() {
		agent.Ref = v.AgentOf(act)
	}
	return agent, &Principal{Ref: Ref{t.URL, t.subject}, Claims: t.claims, Parsed: t.parsed}, nil
}

// speaksForItself says that a token is a client's own: nobody's but the workload's
// that holds it.
func (t verified) speaksForItself() bool {
	switch {
	case t.kind != AccessToken && t.kind != idToken && !t.User: // a platform's: its subjects are workloads
		return true
	case t.subject == t.client || stringClaim(t.claims, "sub") == t.client:
		return true
	}
	return t.kind != idToken && !t.userMatch.matches(t.claims)
}

// holder is the workload of a token that speaks for itself.
func (t verified) holder() Ref {
	if t.client != "" && (t.kind == AccessToken || t.User) {
		return Ref{t.URL, t.client}
	}
	return Ref{t.URL, t.subject}
}

// AgentOf is the agent that an identity is one of.
func (v *Verifier) AgentOf(r Ref) Ref {
	if agent, ok := v.agents[r]; ok {
		return agent
	}
	return r
}

// subject verifies a user's token that an agent brings, and that it was issued to
// this agent or lets it act.
func (v *Verifier) subject(ctx context.Context, raw string, agent Ref, held dpop.Held) (*Principal, error) {
	t, err := v.verify(ctx, raw)
	if err != nil {
		return nil, err
	}
	if t.bound.Bound() && !t.bound.Confirmed(held) {
		return nil, errors.New("is bound to another key than its bearer holds")
	}
	if t.kind != idToken && !t.constrained() { // ID tokens are bound to nothing
		return nil, errors.New("is not bound to a key, as its issuer's profile wants")
	}
	if !t.User {
		return nil, errors.New("is of an issuer that may not speak for users")
	}
	if t.speaksForItself() {
		return nil, errors.New("names no user: its sub is its client")
	}
	act, ok := actor(t.claims, "act", t.URL)
	if !ok {
		return nil, errors.New("has an act that names no actor")
	}
	mayAct, ok := actor(t.claims, "may_act", t.URL)
	if !ok {
		return nil, errors.New("has a may_act that names no actor")
	}
	holder := act
	if act.IsZero() {
		holder = Ref{t.URL, t.client}
	}
	if agent != v.AgentOf(holder) && (mayAct.IsZero() || agent != v.AgentOf(mayAct)) {
		return nil, errors.New("was not issued to the agent that brings it")
	}
	user := Ref{t.URL, t.subject}
	if user == holder || user == mayAct {
		return nil, errors.New("names no user: its sub is its actor")
	}
	return &Principal{Ref: user, Claims: t.claims, Parsed: t.parsed}, nil
}

// Operator verifies an operator's token. A token without the configured claim is
// fault.Forbidden.
func (v *Verifier) Operator(ctx context.Context, p Presented) (_ Principal, err error) {
	ctx, span := telemetry.Start(ctx, "identity verify")
	defer func() { telemetry.End(span, err) }()
	t, _, err := v.bearer(ctx, p)
	if err != nil {
		return Principal{}, refused("the bearer token", err)
	}
	// An agent that holds an operator's token is still an agent.
	if _, delegated := t.claims["act"]; delegated || !t.Operator || !t.Operators.include(t.claims, t.client) {
		return Principal{}, fault.New(fault.Forbidden, "this needs an operator")
	}
	return v.believed(ctx, Principal{Ref: Ref{t.URL, t.subject}, Claims: t.claims, Parsed: t.parsed})
}

// believed refuses a principal that was signed out since.
func (v *Verifier) believed(ctx context.Context, p Principal) (Principal, error) {
	at, err := v.signedOut(ctx, p.Ref, p.Login())
	if err == nil && !p.Believed(at) {
		err = ErrSignedOut
	}
	if err != nil {
		return Principal{}, err
	}
	return p, nil
}

// Service verifies a resource server's own token. Which resource server that is, the
// configuration knows.
func (v *Verifier) Service(ctx context.Context, p Presented) (_ Principal, err error) {
	ctx, span := telemetry.Start(ctx, "identity verify")
	defer func() { telemetry.End(span, err) }()
	t, _, err := v.bearer(ctx, p)
	if err != nil {
		return Principal{}, refused("the bearer token", err)
	}
	if _, delegated := t.claims["act"]; delegated || !t.Service || !t.speaksForItself() {
		return Principal{}, refused("the bearer token", errors.New("is not a service's own token, or its issuer may not speak for services"))
	}
	return v.believed(ctx, Principal{Ref: t.holder(), Claims: t.claims, Parsed: t.parsed})
}

// Subject is whom the claims of an issuer's token are about, "" where they do not say:
// its profile can name another claim than sub.
func (v *Verifier) Subject(issuerURL string, claims map[string]any) string {
	is, ok := v.issuers[issuerURL]
	if !ok {
		return ""
	}
	subject := stringClaim(claims, is.subjectClaim())
	if !Usable(subject) {
		return ""
	}
	return subject
}

// IDToken verifies an ID token that an issuer gave to Writ itself, as its client,
// in answer to a request of Writ's own. ErrKeysUnavailable is not final.
func (v *Verifier) IDToken(ctx context.Context, issuerURL, client, raw string) (map[string]any, error) {
	t, err := v.parse(raw)
	if err != nil {
		return nil, err
	}
	if t.URL != issuerURL || t.kind != idToken {
		return nil, errors.New("is not an ID token of the issuer that was asked")
	}
	if _, err := checkIDToken(t.claims, []string{client}); err != nil {
		return nil, err
	}
	if !t.match.matches(t.claims) {
		return nil, errUnmatched
	}
	if _, err := v.verifySignature(ctx, t); errors.Is(err, errLimited) {
		return nil, ErrKeysUnavailable // an answer to Writ must not fail for what strangers sent
	} else if err != nil {
		return nil, err
	}
	return t.claims, nil
}

// failure is an error that is not the token's.
type failure struct{ error }

// refused makes the answer to a bad token. It says which token and why, never
// what is in it.
func refused(which string, err error) error {
	if f, ok := errors.AsType[failure](err); ok {
		return f.error
	}
	if _, ok := errors.AsType[*fault.Error](err); ok {
		return err // the proof's fault, not the token's
	}
	if errors.Is(err, ErrKeysUnavailable) {
		err = ErrKeysUnavailable // its cause names addresses; the log has it
	}
	return fault.New(fault.InvalidToken, "%s %v", which, err)
}
