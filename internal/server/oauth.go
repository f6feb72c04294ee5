package server

import (
	"time"

	"github.com/writsec/writ/internal/config"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/minter"
)

// actorTTL is how long an actor's assertion is good: it is shown at once.
const actorTTL = time.Minute

func newOAuth(name string, m config.Minter, externalURL string, keys *minter.Keys, now func() time.Time) *minter.OAuth {
	c := m.OAuth
	out := &minter.OAuth{
		Name: name, MaxTTL: m.MaxTTL, Grant: c.Grant, Issuer: c.Issuer, TokenEndpoint: c.TokenEndpoint, JSON: c.Encoding == "json",
		Client: minter.OAuthClient{
			ID: c.Client.ID, Auth: c.Client.Auth, KeyFile: c.Client.KeyFile, Audience: c.Client.Audience,
			Secret: func() (string, error) { return config.Secret(c.Client.SecretFile) },
		},
		Scopes: c.Scopes, ImpliedScopes: c.ImpliedScopes, Audience: c.Audience, Resource: c.Resource,
		RequestedType: c.RequestedTokenType, SubjectType: c.SubjectTokenType, Parameters: c.Parameters, Headers: c.Headers,
		TokenTTL: c.TokenTTL, EndsWithAssertion: c.EndsWithAssertion, EnforcesDetails: c.EnforcesDetails,
		Returns: c.Returns, Introspection: c.IntrospectionEndpoint,
		Keys: keys, HTTP: identity.NewHTTPClient(c.Timeout), Now: now,
	}
	if c.Assertion != nil {
		a := minter.OAuthAssertion(*c.Assertion)
		out.Assertion = &a
	}
	if a := c.Actor; a != nil {
		out.Actor = &minter.OAuthActor{TokenFile: a.TokenFile, Type: a.TokenType, Assertion: &minter.OAuthAssertion{
			Issuer: externalURL, Subject: a.Subject, Audience: a.Audience, TTL: actorTTL,
		}}
	}
	if c.Revocation != nil {
		out.Revocation = &minter.OAuthRevocation{Endpoint: c.Revocation.Endpoint, TakesEffect: c.Revocation.TakesEffect}
	}
	return out
}
