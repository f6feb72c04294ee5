package identity

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/sync/errgroup"

	"github.com/writsec/writ/internal/dpop"
	"github.com/writsec/writ/internal/jws"
)

// Config makes a Verifier.
type Config struct {
	Issuers []Issuer
	Agents  []Agent
	HTTP    *http.Client     // to the issuers; NewHTTPClient's bounds are expected
	Now     func() time.Time // for the time claims
	// Spend uses up what is good once only, until a time, for all replicas: fresh says
	// that nobody has used it up before.
	Spend func(ctx context.Context, use string, expires time.Time) (fresh bool, err error)
	// NonceKey makes the nonces of DPoP, the same on all replicas.
	NonceKey [32]byte
	// SignedOut is when a subject, or the login sid of theirs, was last signed out. Of
	// agents and their users the session knows; this is for all others.
	SignedOut func(ctx context.Context, subject Ref, sid string) (time.Time, error)
	// Parse turns claims into what policy evaluates, once for as long as a token is
	// remembered. nil: not at all.
	Parse  func(claims map[string]any) any
	Logger *slog.Logger
}

// Agent is an agent with identities besides its own: a service account that is known
// to policy, and to the issuer of its users' tokens, as a client.
type Agent struct {
	Ref
	Identities []Ref
}

// Verifier verifies tokens of the configured issuers.
type Verifier struct {
	issuers   map[string]*issuer
	domains   map[string]*issuer // by SPIFFE trust domain
	agents    map[Ref]Ref        // from another identity to the agent
	cache     *lru.Cache[[sha256.Size]byte, remembered]
	now       func() time.Time
	spend     func(context.Context, string, time.Time) (bool, error)
	signedOut func(context.Context, Ref, string) (time.Time, error)
	proofs    *dpop.Verifier
	toParsed  func(map[string]any) any
	log       *slog.Logger
}

type issuer struct {
	Issuer
	keys *keySet
	// aboutMapped: the subjects of its signals are known by another claim than sub.
	aboutMapped bool
	match       matcher
	userMatch   matcher
}

// New fails on an unreadable JWKS file and on a pattern that is none. An issuer
// that can't be reached is no failure: its tokens are refused until its keys are
// there.
func New(cfg Config) (*Verifier, error) {
	v := &Verifier{
		issuers: map[string]*issuer{}, domains: map[string]*issuer{}, agents: map[Ref]Ref{},
		now: cfg.Now, spend: cfg.Spend, signedOut: cfg.SignedOut, toParsed: cfg.Parse, log: cfg.Logger,
	}
	v.proofs = &dpop.Verifier{Store: once(cfg.Spend), Now: cfg.Now, Nonces: dpop.NewNonces(cfg.NonceKey)}
	var err error
	if v.cache, err = lru.New[[sha256.Size]byte, remembered](cacheSize); err != nil {
		return nil, err
	}
	for _, profile := range cfg.Issuers {
		is, err := newIssuer(profile, cfg.HTTP)
		if err != nil {
			return nil, fmt.Errorf("issuer %s: %w", profile.URL, err)
		}
		v.issuers[is.URL] = is
		if is.Kind == JWTSVID {
			v.domains[is.TrustDomain] = is
		}
	}
	for _, is := range v.issuers {
		about, ok := v.issuers[is.Signals.Subjects]
		is.aboutMapped = ok && about.SubjectClaim != ""
	}
	for _, a := range cfg.Agents {
		for _, other := range a.Identities {
			v.agents[other] = a.Ref
		}
	}
	return v, nil
}

// once is Config.Spend as dpop wants it.
type once func(ctx context.Context, use string, expires time.Time) (fresh bool, err error)

// Spend implements dpop.Store.
func (f once) Spend(ctx context.Context, use string, expires time.Time) (fresh bool, err error) {
	fresh, err = f(ctx, use, expires)
	if err != nil {
		err = failure{err}
	}
	return fresh, err
}

func newIssuer(profile Issuer, client *http.Client) (is *issuer, err error) {
	is = &issuer{Issuer: profile, keys: &keySet{}}
	if is.Kind == "" {
		is.Kind = AccessToken
	}
	if len(is.IDTokenAlgorithms) == 0 {
		is.IDTokenAlgorithms = is.Algorithms
	}
	if is.match, err = newMatcher(is.Match); err != nil {
		return nil, err
	}
	if is.userMatch, err = newMatcher(is.UserMatch); err != nil {
		return nil, err
	}
	switch {
	case is.JWKSFile != "":
		is.keys.fetch = func(context.Context) ([]byte, error) { return os.ReadFile(is.JWKSFile) }
		return is, is.keys.refresh(context.Background())
	case is.JWKSURL != "":
		is.keys.fetch = fetchKeys(is.JWKSURL, client)
	default:
		is.keys.fetch = remoteKeys(is.URL, client)
	}
	return is, nil
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
	kind    Kind
	claims  map[string]any // shared with others: never written to
	subject string
	client  string // the OAuth client it was issued to
	bound   dpop.Confirmation
	parsed  any
}

// The cache of verified tokens. It remembers successes only, and not for long.
const (
	cacheSize = 4096
	cacheFor  = time.Minute
)

// remembered is a token that was verified with these keys.
type remembered struct {
	verified
	keys  *keysInHand
	until time.Time
}

// verify verifies a token that an agent, operator or service brings.
func (v *Verifier) verify(ctx context.Context, raw string) (verified, error) {
	sum := sha256.Sum256([]byte(raw))
	if hit, ok := v.cache.Get(sum); ok {
		now := v.now()
		if now.Before(hit.until) && hit.keys == hit.issuer.keys.current() {
			return hit.verified, hit.checkTimes(hit.claims, now)
		}
		v.cache.Remove(sum)
	}
	t, err := v.parse(raw)
	if err != nil {
		return verified{}, err
	}
	if t.subject, t.client, err = t.check(t.kind, t.claims); err != nil {
		return verified{}, err
	}
	if t.bound, err = dpop.ParseConfirmation(t.claims); err != nil {
		return verified{}, err
	}
	keys, err := v.verifySignature(ctx, t)
	if err != nil {
		return verified{}, err
	}
	if v.toParsed != nil {
		t.parsed = v.toParsed(t.claims)
	}
	v.cache.Add(sum, remembered{t.verified, keys, v.now().Add(cacheFor)})
	return t.verified, nil
}

// unverified is a token whose signature has not been looked at.
type unverified struct {
	verified
	token jws.Token
}

// open reads a token's form and finds its issuer.
func (v *Verifier) open(raw string) (t unverified, err error) {
	if t.token, err = jws.Parse(raw); err != nil {
		return t, err
	}
	if t.claims, err = t.token.Claims(); err != nil {
		return t, err
	}
	t.issuer, err = v.issuerOf(t.claims)
	return t, err
}

// parse does all that costs little: form, issuer, kind, algorithm, times.
func (v *Verifier) parse(raw string) (t unverified, err error) {
	if t, err = v.open(raw); err != nil {
		return t, err
	}
	if t.kind, err = t.kindOf(t.token, t.claims); err != nil {
		return t, err
	}
	if !slices.Contains(t.algorithms(t.kind), t.token.Algorithm) {
		return t, errors.New("is signed by an algorithm that its issuer may not use")
	}
	return t, t.checkTimes(t.claims, v.now())
}

// issuerOf finds the profile by iss, exactly. JWT-SVIDs need have no iss: these have
// the trust domain of their sub.
func (v *Verifier) issuerOf(claims map[string]any) (*issuer, error) {
	iss, present := claims["iss"]
	name, _ := iss.(string)
	is, ok := v.issuers[name]
	if !present {
		is, ok = v.domains[trustDomainOf(claims)]
	}
	switch {
	case ok:
		return is, nil
	case name == "":
		return nil, errors.New("has no iss")
	}
	return nil, errors.New("is of an issuer that Writ does not know")
}

func (is *issuer) algorithms(kind Kind) []string {
	if kind == idToken {
		return is.IDTokenAlgorithms
	}
	return is.Algorithms
}

// verifySignature checks signature, algorithm and issuer. What go-oidc leaves to
// its caller, or checks with a leeway of its own, the functions in token.go check.
func (v *Verifier) verifySignature(ctx context.Context, t unverified) (*keysInHand, error) {
	keys := &tokenKeys{unverified: t}
	_, err := oidc.NewVerifier(t.URL, keys, &oidc.Config{
		SupportedSigningAlgs: t.algorithms(t.kind),
		SkipClientIDCheck:    true, // audiences are checked by token kind
		SkipExpiryCheck:      true, // checkTimes is stricter
		SkipIssuerCheck:      t.kind == JWTSVID,
	}).Verify(ctx, t.token.Raw)
	switch {
	case keys.err != nil:
		v.log.DebugContext(ctx, "token not verified", "issuer", t.URL, "error", keys.err)
		return nil, keys.err
	case err != nil:
		return nil, errors.New("is signed, but its claims are malformed")
	}
	return keys.used, nil
}

// tokenKeys is the oidc.KeySet for one token, which it need not parse again. It
// keeps its error, whose chain go-oidc cuts.
type tokenKeys struct {
	unverified
	used *keysInHand
	err  error
}

func (k *tokenKeys) VerifySignature(ctx context.Context, _ string) ([]byte, error) {
	var uses []string
	if k.kind == JWTSVID {
		uses = []string{"jwt-svid"}
	}
	k.used, k.err = k.keys.verify(ctx, k.token, k.algorithms(k.kind), uses...)
	return k.token.Payload, k.err
}

// spendAssertion lets a client's own assertion be used once (RFC 7523 §3).
func (v *Verifier) spendAssertion(ctx context.Context, t verified) error {
	exp, _ := TimeClaim(t.claims, "exp")
	fresh, err := v.spend(ctx, "private_key_jwt:"+Ref{t.URL, stringClaim(t.claims, "jti")}.String(), exp)
	if err != nil {
		return failure{fmt.Errorf("use up an assertion: %w", err)}
	}
	if !fresh {
		return errors.New("was used before; sign a new one, with a new jti, for each request")
	}
	return nil
}
