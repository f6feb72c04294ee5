package identity

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"
	"golang.org/x/sync/errgroup"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/telemetry"
)

// Issuer configures one identity provider.
type Issuer struct {
	// URL is the exact iss of its tokens.
	URL string
	// User, Agent and Operator say for whom it may speak.
	User, Agent, Operator bool
	// Operators marks its operators.
	Operators Operators
	// Audience is what its access tokens must be meant for.
	Audience string
	// Algorithms is the JWS allow-list.
	Algorithms []string
	// IDTokenAlgorithms is that of its ID tokens, where it differs.
	IDTokenAlgorithms []string
	// JWKSFile, when set, replaces discovery.
	JWKSFile string
	// IDTokenClients are the clients whose ID tokens are believed as subject_token.
	IDTokenClients []string
	// Leeway is for iat and nbf.
	Leeway time.Duration
}

// Config makes a Verifier.
type Config struct {
	Issuers []Issuer
	HTTP    *http.Client     // to the issuers; NewHTTPClient's bounds are expected
	Now     func() time.Time // for the time claims
	Logger  *slog.Logger
}

// Verifier verifies tokens of the configured issuers.
type Verifier struct {
	issuers map[string]*issuer
	now     func() time.Time
	log     *slog.Logger
}

type issuer struct {
	Issuer
	keys *keySet
}

// New fails on an unreadable JWKS file. An issuer that can't be reached is no
// failure: its tokens are refused until its keys are there.
func New(cfg Config) (*Verifier, error) {
	v := &Verifier{issuers: map[string]*issuer{}, now: cfg.Now, log: cfg.Logger}
	for _, is := range cfg.Issuers {
		keys := &keySet{fetch: remoteKeys(is.URL, cfg.HTTP)}
		if is.JWKSFile != "" {
			keys.fetch = func(context.Context) ([]byte, error) { return os.ReadFile(is.JWKSFile) }
			if err := keys.refresh(context.Background()); err != nil {
				return nil, fmt.Errorf("issuer %s: %w", is.URL, err)
			}
		}
		if len(is.IDTokenAlgorithms) == 0 {
			is.IDTokenAlgorithms = is.Algorithms
		}
		for _, a := range slices.Concat(is.Algorithms, is.IDTokenAlgorithms) {
			keys.algorithms = append(keys.algorithms, jose.SignatureAlgorithm(a))
		}
		v.issuers[is.URL] = &issuer{is, keys}
	}
	return v, nil
}

// Run keeps the issuers' keys fresh until ctx ends.
func (v *Verifier) Run(ctx context.Context) error {
	var g errgroup.Group
	for _, is := range v.issuers {
		defer is.keys.fetches.Wait()
		g.Go(func() error {
			for retry := retryAfter; ; {
				wait := refreshAfter
				if err := is.keys.refresh(ctx); err == nil {
					retry = retryAfter
				} else if ctx.Err() == nil {
					v.log.WarnContext(ctx, "issuer keys not refreshed", "issuer", is.URL, "error", err)
					wait, retry = retry, min(2*retry, fetchInterval)
				}
				select {
				case <-ctx.Done():
					return nil
				case <-time.After(wait):
				}
			}
		})
	}
	return g.Wait()
}

// verified is a token whose signature, issuer, times and kind hold.
type verified struct {
	*issuer
	kind   tokenKind
	claims map[string]any
	client string // the OAuth client it was issued to
}

func (v *Verifier) verify(ctx context.Context, raw string) (verified, error) {
	t, err := v.authenticate(ctx, raw)
	if err != nil {
		return verified{}, err
	}
	if t.kind == accessToken {
		t.client = stringClaim(t.claims, "client_id")
		return t, checkAccessToken(t.claims, t.Audience)
	}
	t.client, err = checkIDToken(t.claims, t.IDTokenClients)
	return t, err
}

// authenticate verifies issuer, signature and times. For whom the token is and
// what it says is left to the checks of its kind.
func (v *Verifier) authenticate(ctx context.Context, raw string) (verified, error) {
	p, err := parse(raw)
	if err != nil {
		return verified{}, err
	}
	is, ok := v.issuers[p.issuer]
	if !ok {
		return verified{}, errors.New("is of an issuer that Writ does not know")
	}
	if err := v.verifySignature(ctx, is, p, raw); err != nil {
		return verified{}, err
	}
	if err := checkTimes(p.claims, v.now(), is.Leeway); err != nil {
		return verified{}, err
	}
	return verified{issuer: is, kind: p.kind, claims: p.claims}, nil
}

// verifySignature checks signature, algorithm and issuer. What go-oidc leaves to
// its caller, or checks with a leeway of its own, the functions in token.go check.
func (v *Verifier) verifySignature(ctx context.Context, is *issuer, p parsed, raw string) error {
	algorithms := is.Algorithms
	if p.kind == idToken {
		algorithms = is.IDTokenAlgorithms
	}
	if !slices.Contains(algorithms, p.alg) {
		return errors.New("is signed by an algorithm that its issuer may not use")
	}
	keys := &remembering{keySet: is.keys}
	_, err := oidc.NewVerifier(is.URL, keys, &oidc.Config{
		SupportedSigningAlgs: algorithms,
		SkipClientIDCheck:    true, // audiences are checked by token kind
		SkipExpiryCheck:      true, // checkTimes is stricter
	}).Verify(ctx, raw)
	switch {
	case keys.err != nil:
		v.log.DebugContext(ctx, "token not verified", "issuer", is.URL, "error", keys.err)
		return keys.err
	case err != nil:
		return errors.New("is signed, but its claims are malformed")
	}
	return nil
}

// remembering keeps the error of a key set, whose chain go-oidc cuts.
type remembering struct {
	*keySet
	err error
}

func (r *remembering) VerifySignature(ctx context.Context, token string) (payload []byte, err error) {
	payload, r.err = r.keySet.VerifySignature(ctx, token)
	return payload, r.err
}

// IDToken verifies an ID token that an issuer gave to Writ itself, as its client,
// in answer to a request of Writ's own. ErrKeysUnavailable is not final.
func (v *Verifier) IDToken(ctx context.Context, issuerURL, client, raw string) (map[string]any, error) {
	t, err := v.authenticate(ctx, raw)
	if errors.Is(err, errLimited) {
		return nil, ErrKeysUnavailable // an answer to Writ must not fail for what strangers sent
	}
	if err != nil {
		return nil, err
	}
	if t.URL != issuerURL || t.kind != idToken {
		return nil, errors.New("is not an ID token of the issuer that was asked")
	}
	if _, err := checkIDToken(t.claims, []string{client}); err != nil {
		return nil, err
	}
	return t.claims, nil
}

// Caller verifies the tokens of an agent's request and that they belong together.
// subject may be empty. Every refusal is a fault.InvalidToken.
func (v *Verifier) Caller(ctx context.Context, bearer, subject string) (_ Caller, err error) {
	ctx, span := telemetry.Start(ctx, "identity verify")
	defer func() { telemetry.End(span, err) }()
	b, err := v.verify(ctx, bearer)
	if err != nil {
		return Caller{}, refused("the bearer token", err)
	}
	if b.kind != accessToken {
		return Caller{}, refused("the bearer token", errors.New("is not an access token (RFC 9068, typ at+jwt)"))
	}
	agent, user, err := b.split()
	if err != nil {
		return Caller{}, refused("the bearer token", err)
	}
	c := Caller{Agent: agent, User: user}
	if subject == "" {
		return c, nil
	}
	if user != nil {
		return Caller{}, refused("the subject_token", errors.New("is one too many: the bearer token names the user already"))
	}
	if c.User, err = v.subject(ctx, subject, agent.Ref); err != nil {
		return Caller{}, refused("the subject_token", err)
	}
	return c, nil
}

// split reads agent and user out of one access token: sub is the user, act.sub or
// else the client is the agent. A token without act whose sub is its client
// speaks for the agent alone.
func (t verified) split() (agent Principal, user *Principal, err error) {
	act, ok := actor(t.claims, "act", t.URL)
	if !ok {
		return Principal{}, nil, errors.New("has an act that names no actor of its issuer")
	}
	if !t.Agent {
		return Principal{}, nil, errors.New("is of an issuer that may not speak for agents")
	}
	sub := stringClaim(t.claims, "sub")
	agent = Principal{Ref: Ref{t.URL, t.client}, Claims: map[string]any{}}
	if act != "" {
		agent.ID = act
	}
	if sub == t.client || sub == act {
		if act != "" {
			return Principal{}, nil, errors.New("has an actor but no user: its sub is its client or its actor")
		}
		agent.Claims = t.claims
		return agent, nil, nil
	}
	if !t.User {
		return Principal{}, nil, errors.New("is of an issuer that may not speak for users")
	}
	return agent, &Principal{Ref: Ref{t.URL, sub}, Claims: t.claims}, nil
}

// subject verifies a user's token that an agent brings, and that it was issued to
// this agent or lets it act.
func (v *Verifier) subject(ctx context.Context, raw string, agent Ref) (*Principal, error) {
	t, err := v.verify(ctx, raw)
	if err != nil {
		return nil, err
	}
	sub := stringClaim(t.claims, "sub")
	if !t.User {
		return nil, errors.New("is of an issuer that may not speak for users")
	}
	if sub == t.client {
		return nil, errors.New("names no user: its sub is its client")
	}
	act, ok := actor(t.claims, "act", t.URL)
	if !ok {
		return nil, errors.New("has an act that names no actor of its issuer")
	}
	mayAct, ok := actor(t.claims, "may_act", t.URL)
	if !ok {
		return nil, errors.New("has a may_act that names no actor of its issuer")
	}
	holder := t.client
	if act != "" {
		holder = act
	}
	if agent.Issuer != t.URL || (agent.ID != holder && agent.ID != mayAct) {
		return nil, errors.New("was not issued to the agent that brings it")
	}
	if sub == holder || sub == mayAct {
		return nil, errors.New("names no user: its sub is its actor")
	}
	return &Principal{Ref: Ref{t.URL, sub}, Claims: t.claims}, nil
}

// Operator verifies an operator's access token. A token without the configured
// claim is fault.Forbidden.
func (v *Verifier) Operator(ctx context.Context, bearer string) (_ Principal, err error) {
	ctx, span := telemetry.Start(ctx, "identity verify")
	defer func() { telemetry.End(span, err) }()
	t, err := v.verify(ctx, bearer)
	if err != nil {
		return Principal{}, refused("the bearer token", err)
	}
	if t.kind != accessToken {
		return Principal{}, refused("the bearer token", errors.New("is not an access token (RFC 9068, typ at+jwt)"))
	}
	// An agent that holds an operator's token is still an agent.
	if _, delegated := t.claims["act"]; delegated || !t.Operator || !t.Operators.include(t.claims, t.client) {
		return Principal{}, fault.New(fault.Forbidden, "this needs an operator")
	}
	return Principal{Ref: Ref{t.URL, stringClaim(t.claims, "sub")}, Claims: t.claims}, nil
}

// refused makes the answer to a bad token. It says which token and why, never
// what is in it.
func refused(which string, err error) error {
	if errors.Is(err, ErrKeysUnavailable) {
		err = ErrKeysUnavailable // its cause names addresses; the log has it
	}
	return fault.New(fault.InvalidToken, "%s %v", which, err)
}
