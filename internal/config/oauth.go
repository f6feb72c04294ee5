package config

import (
	"time"
)

// OAuth makes Writ a client of an authorization server that gives out the tokens of a
// target (docs/targets.md).
type OAuth struct {
	// Grant is token_exchange (RFC 8693) or jwt_bearer (RFC 7523).
	Grant string `yaml:"grant"`
	// Issuer is the one of issuers whose users it is for. Without an assertion, it is
	// theirs whose tokens are exchanged, at Issuer's own token endpoint.
	Issuer string `yaml:"issuer"`
	// TokenEndpoint is found by discovery of Issuer where it is left out.
	TokenEndpoint string `yaml:"token_endpoint"`
	// Encoding of the request: form, or json for targets that want that.
	Encoding string      `yaml:"encoding"`
	Client   OAuthClient `yaml:"client"`
	// Scopes is the most that is asked for.
	Scopes []string `yaml:"scopes"`
	// ImpliedScopes are those that the target grants unasked. Any other is refused.
	ImpliedScopes []string `yaml:"implied_scopes"`
	// Audience and Resource say what the token is for, as the target knows it.
	Audience string `yaml:"audience"`
	Resource string `yaml:"resource"`
	// SubjectTokenType and RequestedTokenType are URIs of RFC 8693 §3.
	SubjectTokenType   string `yaml:"subject_token_type"`
	RequestedTokenType string `yaml:"requested_token_type"`
	// Parameters are further ones of the request.
	Parameters map[string]string `yaml:"parameters"`
	// Headers are further ones of the token request.
	Headers map[string]string `yaml:"headers"`
	// Assertion is signed by Writ and shown in place of the request's subject token.
	Assertion *OAuthAssertion `yaml:"assertion"`
	// Actor is the actor_token of an exchange.
	Actor *OAuthActor `yaml:"actor"`
	// TokenTTL is the longest that the target's tokens live.
	TokenTTL time.Duration `yaml:"token_ttl"`
	// EndsWithAssertion states that a token never outlives the assertion, so that Writ
	// chooses how long it lives.
	EndsWithAssertion bool `yaml:"ends_with_assertion"`
	// EnforcesDetails sends the act as authorization_details (RFC 9396) and states that
	// the target holds to it.
	EnforcesDetails bool `yaml:"enforces_details"`
	// Returns lists members of the token response that agents get besides the token.
	Returns []string `yaml:"returns"`
	// Revocation is how a token is ended; without, only time ends it.
	Revocation *OAuthRevocation `yaml:"revocation"`
	// IntrospectionEndpoint is where the end of a token can be seen (RFC 7662).
	IntrospectionEndpoint string `yaml:"introspection_endpoint"`
	// Timeout bounds one request to the target.
	Timeout time.Duration `yaml:"timeout"`
}

// OAuthClient is what Writ is to the authorization server.
type OAuthClient struct {
	ID string `yaml:"id"`
	// Auth is client_secret_basic, client_secret_post, private_key_jwt or none.
	Auth       string `yaml:"auth"`
	SecretFile string `yaml:"secret_file"`
	// KeyFile signs private_key_jwt in place of Writ's own key.
	KeyFile string `yaml:"key_file"`
	// Audience of private_key_jwt, by default the endpoint that is called.
	Audience string `yaml:"audience"`
}

// OAuthAssertion is what Writ says of a lease to whoever trusts it as an issuer.
type OAuthAssertion struct {
	// Issuer is iss, by default external_url.
	Issuer string `yaml:"issuer"`
	// Subject is sub: a text with {user}, {user_issuer}, {agent}, {agent_issuer},
	// {session} and {lease}.
	Subject string `yaml:"subject"`
	// Audience is aud.
	Audience string `yaml:"audience"`
	// TTL is how long it can be exchanged.
	TTL time.Duration `yaml:"ttl"`
	// Claims are further ones, texts like Subject.
	Claims map[string]string `yaml:"claims"`
	// KeyFile signs it in place of Writ's own key.
	KeyFile string `yaml:"key_file"`
}

// OAuthActor names the agent in an exchange.
type OAuthActor struct {
	// TokenFile holds the actor_token. Without, Writ signs an assertion.
	TokenFile string `yaml:"token_file"`
	// TokenType is a URI of RFC 8693 §3.
	TokenType string `yaml:"token_type"`
	// Subject and Audience are sub and aud of the assertion.
	Subject  string `yaml:"subject"`
	Audience string `yaml:"audience"`
}

// OAuthRevocation ends tokens by RFC 7009.
type OAuthRevocation struct {
	// Endpoint is found by discovery of the issuer where it is left out.
	Endpoint string `yaml:"endpoint"`
	// TakesEffect is instant, introspect or expiry.
	TakesEffect string `yaml:"takes_effect"`
}

const (
	typeURI      = "urn:ietf:params:oauth:token-type:"
	maxAssertion = 10 * time.Minute // the longest that an assertion can be exchanged
)

func (o *OAuth) setDefaults() {
	o.Encoding, o.Client.Auth, o.Timeout = "form", "client_secret_basic", 5*time.Second
}

func (c *OAuthClient) setDefaults() { c.Auth = "client_secret_basic" }

func (a *OAuthAssertion) setDefaults() { a.TTL = time.Minute }

func (a *OAuthActor) setDefaults() { a.TokenType, a.Subject = typeURI+"jwt", "{agent}" }

// fill sets what follows from other values.
func (o *OAuth) fill(abs func(*string), externalURL string) {
	abs(&o.Client.SecretFile)
	abs(&o.Client.KeyFile)
	if a := o.Assertion; a != nil {
		abs(&a.KeyFile)
		if a.Issuer == "" {
			a.Issuer = externalURL
		}
	}
	if a := o.Actor; a != nil {
		abs(&a.TokenFile)
	}
	if o.SubjectTokenType == "" && o.Grant == "token_exchange" {
		o.SubjectTokenType = typeURI + "access_token"
		if o.Assertion != nil {
			o.SubjectTokenType = typeURI + "jwt"
		}
	}
}
