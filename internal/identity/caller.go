package identity

import (
	"context"
	"errors"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/telemetry"
)

// Presented is what a request brings to say who makes it.
type Presented struct {
	// Token of the Authorization header.
	Token string
	// Subject is the user's token that an agent brings besides, "" for none.
	Subject string
}

// Caller verifies the tokens of an agent's request and that they belong together.
// Every refusal is a fault.InvalidToken.
func (v *Verifier) Caller(ctx context.Context, p Presented) (_ Caller, err error) {
	ctx, span := telemetry.Start(ctx, "identity verify")
	defer func() { telemetry.End(span, err) }()
	b, err := v.bearer(ctx, p)
	if err != nil {
		return Caller{}, refused("the bearer token", err)
	}
	return v.caller(ctx, p, b)
}

// Again verifies once more what a caller presented, for a request that was held
// since. What is good once only was used up when the request began, and is not asked
// for again.
func (v *Verifier) Again(ctx context.Context, c Caller) (_ Caller, err error) {
	ctx, span := telemetry.Start(ctx, "identity verify")
	defer func() { telemetry.End(span, err) }()
	b, err := v.verify(ctx, c.presented.Token)
	if err != nil {
		return Caller{}, refused("the bearer token", err)
	}
	return v.caller(ctx, c.presented, b)
}

func (v *Verifier) caller(ctx context.Context, p Presented, b verified) (Caller, error) {
	agent, user, err := v.split(b)
	if err != nil {
		return Caller{}, refused("the bearer token", err)
	}
	c := Caller{Agent: agent, User: user, presented: p}
	if p.Subject == "" {
		return c, nil
	}
	if user != nil {
		return Caller{}, refused("the subject_token", errors.New("is one too many: the bearer token names the user already"))
	}
	if c.User, err = v.subject(ctx, p.Subject, agent.Ref); err != nil {
		return Caller{}, refused("the subject_token", err)
	}
	return c, nil
}

// bearer verifies the token of the Authorization header and that who brings it may.
func (v *Verifier) bearer(ctx context.Context, p Presented) (verified, error) {
	t, err := v.verify(ctx, p.Token)
	if err != nil {
		return verified{}, err
	}
	if t.kind == idToken {
		return verified{}, errors.New("is not an access token (RFC 9068, typ at+jwt)")
	}
	if t.kind == ClientAssertion {
		return t, v.spendAssertion(ctx, t)
	}
	return t, nil
}

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
		return Principal{Ref: v.agentOf(t.holder()), Claims: t.claims}, nil, nil
	case !t.User:
		return Principal{}, nil, errors.New("is of an issuer that may not speak for users")
	}
	agent = Principal{Ref: v.agentOf(Ref{t.URL, t.client}), Claims: map[string]any{}}
	if !act.IsZero() {
		agent.Ref = v.agentOf(act)
	}
	return agent, &Principal{Ref: Ref{t.URL, t.subject}, Claims: t.claims}, nil
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

// agentOf is the agent that an identity is one of.
func (v *Verifier) agentOf(r Ref) Ref {
	if agent, ok := v.agents[r]; ok {
		return agent
	}
	return r
}

// subject verifies a user's token that an agent brings, and that it was issued to
// this agent or lets it act.
func (v *Verifier) subject(ctx context.Context, raw string, agent Ref) (*Principal, error) {
	t, err := v.verify(ctx, raw)
	if err != nil {
		return nil, err
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
	if agent != v.agentOf(holder) && (mayAct.IsZero() || agent != v.agentOf(mayAct)) {
		return nil, errors.New("was not issued to the agent that brings it")
	}
	user := Ref{t.URL, t.subject}
	if user == holder || user == mayAct {
		return nil, errors.New("names no user: its sub is its actor")
	}
	return &Principal{Ref: user, Claims: t.claims}, nil
}

// Operator verifies an operator's token. A token without the configured claim is
// fault.Forbidden.
func (v *Verifier) Operator(ctx context.Context, p Presented) (_ Principal, err error) {
	ctx, span := telemetry.Start(ctx, "identity verify")
	defer func() { telemetry.End(span, err) }()
	t, err := v.bearer(ctx, p)
	if err != nil {
		return Principal{}, refused("the bearer token", err)
	}
	// An agent that holds an operator's token is still an agent.
	if _, delegated := t.claims["act"]; delegated || !t.Issuer.Operator || !t.Operators.include(t.claims, t.client) {
		return Principal{}, fault.New(fault.Forbidden, "this needs an operator")
	}
	return Principal{Ref: Ref{t.URL, t.subject}, Claims: t.claims}, nil
}

// Service verifies a resource server's own token. Which resource server that is, the
// configuration knows.
func (v *Verifier) Service(ctx context.Context, p Presented) (_ Ref, err error) {
	ctx, span := telemetry.Start(ctx, "identity verify")
	defer func() { telemetry.End(span, err) }()
	t, err := v.bearer(ctx, p)
	if err != nil {
		return Ref{}, refused("the bearer token", err)
	}
	if _, delegated := t.claims["act"]; delegated || !t.Issuer.Service || !t.speaksForItself() {
		return Ref{}, refused("the bearer token", errors.New("is not a service's own token, or its issuer may not speak for services"))
	}
	return t.holder(), nil
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
	if errors.Is(err, ErrKeysUnavailable) {
		err = ErrKeysUnavailable // its cause names addresses; the log has it
	}
	return fault.New(fault.InvalidToken, "%s %v", which, err)
}
