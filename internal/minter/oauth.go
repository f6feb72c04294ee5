package minter

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/jws"
	"github.com/writsec/writ/internal/lease"
)

// OAuthKind is the kind of credential that OAuth mints.
const OAuthKind = "oauth"

// The grants by which OAuth gets a token.
const (
	TokenExchange = "token_exchange" // RFC 8693
	JWTBearer     = "jwt_bearer"     // RFC 7523 §2.1
)

const (
	grantTypes  = "urn:ietf:params:oauth:grant-type:"
	typeURI     = "urn:ietf:params:oauth:token-type:"
	accessToken = typeURI + "access_token"
	jwtType     = typeURI + "jwt"
)

// OAuth gets access tokens of a target's own authorization server: in exchange for the
// token of the request's user, at the identity provider that issued it, or for an
// assertion of Writ's, at a target that trusts Writ as an issuer. It asks once; whether
// a lost answer had a token in it nobody knows, so nothing here tries again.
type OAuth struct {
	Name   string // of this minter in the configuration
	MaxTTL time.Duration
	Grant  string
	// Issuer is the one whose users it is for, and whose tokens it exchanges; "" any,
	// which only an Assertion can be.
	Issuer string
	// TokenEndpoint is found by discovery of Issuer where it is "".
	TokenEndpoint string
	// JSON sends parameters as a JSON object, as some targets want, not as a form.
	JSON   bool
	Client OAuthClient
	// Scopes is the most that is asked for; without any, none is, and the target alone
	// says what a token can do.
	Scopes []string
	// ImpliedScopes are those that the target adds by itself.
	ImpliedScopes []string
	Audience      string
	Resource      string
	RequestedType string // requested_token_type
	SubjectType   string // subject_token_type
	// Parameters and Headers are further ones of the request that the target wants.
	Parameters, Headers map[string]string
	// Assertion is what is shown; nil, the request's subject token.
	Assertion *OAuthAssertion
	// Actor is shown besides, in an exchange.
	Actor *OAuthActor
	// TokenTTL is the longest that the target's tokens live. EndsWithAssertion says that
	// they never outlive the assertion instead, so that Writ chooses.
	TokenTTL          time.Duration
	EndsWithAssertion bool
	// EnforcesDetails: authorization_details of the act are sent, and the target's
	// resource servers hold to them, so a token is good for its act only.
	EnforcesDetails bool
	// Returns lists members of the answer that the agent gets besides the token.
	Returns []string
	// Revocation is how a token is ended; nil, only time does.
	Revocation *OAuthRevocation
	// Introspection is where the end can be seen (RFC 7662), "" nowhere.
	Introspection string

	Keys *Keys
	HTTP *http.Client // made by identity.NewHTTPClient
	Now  func() time.Time

	known             atomic.Pointer[oauthMetadata]
	minting, revoking pause
}

// OAuthClient is what Writ is at the target.
type OAuthClient struct {
	ID string // "" for none
	// Auth is client_secret_basic, client_secret_post, private_key_jwt or none.
	Auth string
	// Secret reads the client's secret, each time, so that it can be replaced.
	Secret func() (string, error)
	// KeyFile signs private_key_jwt instead of Writ's own key.
	KeyFile string
	// Audience of private_key_jwt; "" the endpoint that is called.
	Audience string
}

// OAuthActor is the actor_token of an exchange: who acts for the subject.
type OAuthActor struct {
	// TokenFile holds it. Without, Writ signs an assertion that names the agent.
	TokenFile string
	Type      string // actor_token_type
	Assertion *OAuthAssertion
}

// OAuthRevocation ends tokens by RFC 7009.
type OAuthRevocation struct {
	// Endpoint is found by discovery of Issuer where it is "".
	Endpoint string
	// TakesEffect is the revocability that it gives.
	TakesEffect string
}

const (
	// mintSlack is what a lease must have beyond the life of a token that can't be
	// ended: the time until its Mint must be over, and a second lost to rounding.
	mintSlack = lease.MintTime + 2*time.Second
	// skew is how far a target's clock may be behind where it ends a token with its
	// assertion.
	skew = 5 * time.Second
	// leastAssertion is the shortest useful life of such a token.
	leastAssertion = 15 * time.Second
	// undoTime bounds the attempt to end what was made but can't be used.
	undoTime = 3 * time.Second
)

// Mint implements lease.Minter. Where it made a token that it can't hand out, it tries
// to end it, and returns Recall beside the error.
func (m *OAuth) Mint(ctx context.Context, o lease.Order) (lease.Made, error) {
	made, err := m.mint(ctx, o)
	r, declined := errors.AsType[refused](err)
	switch {
	case err == nil:
		return made, nil
	case declined && r.status/100 == 4 && r.code != "invalid_client":
		return made, fmt.Errorf("mint oauth: %w: %w", lease.ErrDeclined, err)
	}
	return made, fmt.Errorf("mint oauth: %w", err)
}

func (m *OAuth) mint(ctx context.Context, o lease.Order) (lease.Made, error) {
	now := m.Now()
	if err := m.check(o, now); err != nil {
		return lease.Made{}, fmt.Errorf("%w: %w", lease.ErrDeclined, err)
	}
	form, err := m.request(o, now)
	if err != nil {
		return lease.Made{}, err
	}
	endpoint, err := m.endpoint(ctx, m.TokenEndpoint, func(md *oauthMetadata) string { return md.Token })
	if err != nil {
		return lease.Made{}, err
	}
	body, err := m.ask(ctx, &m.minting, question{endpoint: endpoint, form: form, headers: m.Headers, json: m.JSON})
	if err != nil {
		return lease.Made{}, err
	}
	a, err := readAnswer(body)
	if err == nil {
		err = m.accept(a, o, form)
	}
	received := m.Now()
	a.life = ownLife(a, received)
	made := lease.Made{Recall: m.recall(a, o.Lease, received).String()}
	if err == nil {
		err = m.endsInTime(a, o.Lease, received)
	}
	var secret lease.Secret
	if err == nil {
		secret, err = m.secret(a, received)
	}
	if err != nil {
		m.undo(ctx, made.Recall)
		return made, err
	}
	made.Secret = secret
	return made, nil
}

// check refuses, before the target is touched, what must not be sent or could not be
// used.
func (m *OAuth) check(o lease.Order, now time.Time) error {
	l := o.Lease
	if m.Issuer != "" && l.User.Issuer != m.Issuer {
		return errors.New("the user is of another issuer than this minter's")
	}
	if m.Assertion == nil {
		// Writ verified it; here is only made sure that it goes to nobody but its issuer.
		t, err := jws.Parse(o.SubjectToken)
		if err != nil {
			return errors.New("the request brings no subject token")
		}
		claims, err := t.Claims()
		if err != nil || claims["iss"] != m.Issuer {
			return errors.New("the subject token is of another issuer than this minter's")
		}
	}
	left := l.ExpiresAt.Sub(now)
	switch {
	case m.EndsWithAssertion && left <= skew:
		return errors.New("the lease is nearly over")
	case m.lasting() && !m.EndsWithAssertion && m.TokenTTL > left:
		return fmt.Errorf("a token would outlive its lease: the target's live %v and can't be ended, the lease has %v", m.TokenTTL, left.Round(time.Second))
	}
	return nil
}

// request is the parameters of the token request.
func (m *OAuth) request(o lease.Order, now time.Time) (map[string]string, error) {
	form := maps.Clone(m.Parameters)
	if form == nil {
		form = map[string]string{}
	}
	set := func(name, value string) {
		if value != "" {
			form[name] = value
		}
	}
	shown := o.SubjectToken
	if a := m.Assertion; a != nil {
		until := now.Add(a.TTL)
		if m.EndsWithAssertion {
			until = o.Lease.ExpiresAt.Add(-skew)
		}
		var err error
		if shown, err = a.sign(m.Keys, o.Lease, o.Lease.ID, now, until, map[string]any{"act": o.Lease.Agent}); err != nil {
			return nil, err
		}
	}
	set("audience", m.Audience)
	set("resource", m.Resource)
	if len(m.Scopes) > 0 {
		scopes, err := grantedScopes(o.Lease.Scope)
		if err != nil {
			return nil, err
		}
		set("scope", strings.Join(scopes, " "))
	}
	if m.EnforcesDetails {
		d, err := json.Marshal([]details{detailsOf(o)})
		if err != nil {
			return nil, fmt.Errorf("authorization_details: %w", err)
		}
		set("authorization_details", string(d))
	}
	if m.Grant == JWTBearer {
		set("grant_type", grantTypes+"jwt-bearer")
		set("assertion", shown)
		return form, nil
	}
	set("grant_type", grantTypes+"token-exchange")
	set("subject_token", shown)
	set("subject_token_type", m.SubjectType)
	set("requested_token_type", m.RequestedType)
	if m.Actor != nil {
		token, err := m.Actor.token(m.Keys, o.Lease, now)
		if err != nil {
			return nil, err
		}
		set("actor_token", token)
		set("actor_token_type", m.Actor.Type)
	}
	return form, nil
}

func (a *OAuthActor) token(keys *Keys, l lease.Lease, now time.Time) (string, error) {
	if a.TokenFile == "" {
		return a.Assertion.sign(keys, l, l.ID+"-actor", now, now.Add(a.Assertion.TTL), nil)
	}
	data, err := os.ReadFile(a.TokenFile)
	if err != nil {
		return "", fmt.Errorf("read actor.token_file: %w", err)
	}
	token := strings.TrimSpace(string(data))
	if !visible(token, maxToken) {
		return "", errors.New("read actor.token_file: it holds no token")
	}
	return token, nil
}

// detailsOf is the exact act, as JWT says it.
func detailsOf(o lease.Order) details {
	parameters := o.Act.Intent.Parameters
	if parameters == nil {
		parameters = map[string]any{}
	}
	r := o.Act.Resource
	return details{
		Type: "writ_intent", Actions: []string{o.Act.Intent.Action}, Identifier: r.ID,
		Resource: resource{r.Type, r.ID, r.Properties}, Parameters: parameters, IntentHash: o.Lease.IntentHash,
	}
}

// oauthMetadata is what is needed of RFC 8414 §2.
type oauthMetadata struct {
	Token      string `json:"token_endpoint"`
	Revocation string `json:"revocation_endpoint"`

	until time.Time
}

const oauthMetadataAge = 10 * time.Minute

// endpoint is a configured one, or one that the issuer's metadata name. Metadata that
// can't be read again are believed on: tokens must stay revocable.
func (m *OAuth) endpoint(ctx context.Context, configured string, pick func(*oauthMetadata) string) (string, error) {
	if configured != "" {
		return configured, nil
	}
	md := m.known.Load()
	if md == nil || !m.Now().Before(md.until) {
		fresh := &oauthMetadata{until: m.Now().Add(oauthMetadataAge)}
		switch err := identity.Discover(ctx, m.HTTP, m.Issuer, fresh); {
		case err == nil:
			md = fresh
			m.known.Store(md)
		case md == nil:
			return "", err
		}
	}
	at := pick(md)
	if at == "" || !identity.Trustworthy(m.Issuer, at) {
		return "", errors.New("discover: the issuer's metadata name no https endpoint for this; set it in the configuration")
	}
	return at, nil
}
