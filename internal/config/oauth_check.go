package config

import (
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/writsec/writ/internal/jws"
)

func (c *Config) checkOAuth(fail failFunc, key string, m Minter) {
	o := m.OAuth
	fail.oneOf(key+"grant", o.Grant, "token_exchange", "jwt_bearer")
	fail.oneOf(key+"encoding", o.Encoding, "form", "json")
	fail.positive(key+"timeout", o.Timeout)
	if o.Timeout > 10*time.Second {
		fail(key+"timeout", "is %v, expected at most 10s, within which a credential has to be made", o.Timeout)
	}
	if o.Issuer != "" {
		c.checkSpeaker(fail, key+"issuer", o.Issuer, User)
	}
	o.checkEndpoints(fail, key)
	o.Client.check(fail, key+"client.")
	if o.Client.Auth == "private_key_jwt" && o.Client.Audience != "" && c.takesOwnTokens(o.Client.Audience) {
		fail(key+"client.audience", "takes tokens of Writ's, for one of which an assertion could pass")
	}
	fail.scopes(key+"scopes", o.Scopes)
	fail.scopes(key+"implied_scopes", o.ImpliedScopes)
	if len(o.ImpliedScopes) > 0 && len(o.Scopes) == 0 {
		fail(key+"implied_scopes", "has no effect without scopes")
	}
	o.checkParameters(fail, key)
	c.checkAssertions(fail, key, o)
	o.checkLife(fail, key, m.MaxTTL)
}

func (fail failFunc) scopes(key string, scopes []string) {
	for i, s := range scopes {
		if s == "" || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' || r == '"' || r == '\\' }) {
			fail(fmt.Sprintf("%s[%d]", key, i), "is %q, which is no scope", s)
		}
	}
}

func (o *OAuth) checkEndpoints(fail failFunc, key string) {
	switch {
	case o.TokenEndpoint != "":
		fail.url(key+"token_endpoint", o.TokenEndpoint)
	case o.Issuer == "":
		fail(key+"token_endpoint", "is missing, and there is no issuer to find it by")
	}
	if o.IntrospectionEndpoint != "" {
		fail.url(key+"introspection_endpoint", o.IntrospectionEndpoint)
	}
	if r := o.Revocation; r != nil {
		fail.oneOf(key+"revocation.takes_effect", r.TakesEffect, "instant", "introspect", "expiry")
		switch {
		case r.Endpoint != "":
			fail.url(key+"revocation.endpoint", r.Endpoint)
		case o.Issuer == "":
			fail(key+"revocation.endpoint", "is missing, and there is no issuer to find it by")
		}
	} else if o.IntrospectionEndpoint != "" {
		fail(key+"introspection_endpoint", "has no effect without revocation")
	}
}

func (c OAuthClient) check(fail failFunc, key string) {
	fail.oneOf(key+"auth", c.Auth, "client_secret_basic", "client_secret_post", "private_key_jwt", "none")
	secret := strings.HasPrefix(c.Auth, "client_secret_")
	if c.Auth != "none" {
		fail.required(key+"id", c.ID)
	}
	switch {
	case secret:
		fail.secret(key+"secret_file", c.SecretFile)
	case c.SecretFile != "":
		fail(key+"secret_file", "has no effect: auth is %s", c.Auth)
	}
	if c.Auth == "private_key_jwt" {
		fail.key(key+"key_file", c.KeyFile)
		return
	}
	if c.KeyFile != "" {
		fail(key+"key_file", "has no effect: auth is %s", c.Auth)
	}
	if c.Audience != "" {
		fail(key+"audience", "has no effect: auth is %s", c.Auth)
	}
}

// key checks a private key that may be left out.
func (fail failFunc) key(key, path string) {
	if path == "" || !fail.file(key, path) {
		return
	}
	data, err := os.ReadFile(path)
	if err == nil {
		_, err = jws.ParsePrivateKey(data)
	}
	if err != nil {
		fail(key, "names %s, which %v", path, err)
	}
}

// ownParameters are those that Writ sets by itself, or never asks for.
var ownParameters = []string{
	"grant_type", "assertion", "subject_token", "subject_token_type", "actor_token", "actor_token_type", "requested_token_type",
	"audience", "resource", "scope", "authorization_details", "client_id", "client_secret", "client_assertion",
	"client_assertion_type", "token", "token_type_hint",
}

// kept are members of a token response that no agent gets, or gets in any case.
var kept = []string{
	"access_token", "token_type", "expires_in", "scope", "issued_token_type", "refresh_token", "id_token", "token", "expires_at",
	"authorization_details",
}

// ownHeaders are set by Writ, by whoever carries the request, or would be a secret in
// this file.
var ownHeaders = []string{
	"authorization", "proxy-authorization", "cookie", "host", "content-type", "content-length", "content-encoding", "transfer-encoding",
	"connection", "te", "trailer", "upgrade", "expect", "accept", "accept-encoding", "traceparent", "dpop", "x-api-key",
}

var headerName = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9-]{0,63}$`)

var memberName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.-]{0,63}$`)

func (o *OAuth) checkParameters(fail failFunc, key string) {
	for _, name := range slices.Sorted(maps.Keys(o.Parameters)) {
		switch {
		case slices.Contains(ownParameters, name):
			fail(key+"parameters."+name, "is set by Writ, by a key of its own")
		case !memberName.MatchString(name) || o.Parameters[name] == "":
			fail(key+"parameters", "has %q: %q, expected a parameter and its value", name, o.Parameters[name])
		}
	}
	for _, name := range slices.Sorted(maps.Keys(o.Headers)) {
		v := o.Headers[name]
		if !headerName.MatchString(name) || slices.Contains(ownHeaders, strings.ToLower(name)) || v == "" ||
			strings.ContainsFunc(v, func(r rune) bool { return r < ' ' || r > '~' }) {
			fail(key+"headers", "has %q: %q, expected a header that Writ does not set by itself, and its value", name, v)
		}
	}
	for i, name := range o.Returns {
		if slices.Contains(kept, name) || !memberName.MatchString(name) {
			fail(fmt.Sprintf("%sreturns[%d]", key, i), "is %q, which is not among what a target adds for whoever uses the token", name)
		}
	}
	if o.Grant != "token_exchange" {
		for _, other := range []struct {
			name string
			set  bool
		}{{"subject_token_type", o.SubjectTokenType != ""}, {"requested_token_type", o.RequestedTokenType != ""}, {"actor", o.Actor != nil}} {
			if other.set {
				fail(key+other.name, "has no effect: grant is not token_exchange")
			}
		}
		return
	}
	if o.RequestedTokenType == typeURI+"refresh_token" {
		fail(key+"requested_token_type", "is a refresh token, which outlives every lease")
	}
}

func (c *Config) checkAssertions(fail failFunc, key string, o *OAuth) {
	a := o.Assertion
	switch {
	case a != nil:
		c.checkAssertion(fail, key+"assertion.", o, *a)
	case o.Grant == "jwt_bearer":
		fail(key+"assertion", "is missing, which grant jwt_bearer shows")
	case o.Issuer == "":
		fail(key+"issuer", "is missing: whose users' tokens are exchanged? A token goes to nobody but its issuer")
	}
	b := o.Actor
	switch {
	case b == nil:
	case b.TokenFile != "":
		fail.secret(key+"actor.token_file", b.TokenFile)
		if b.Audience != "" {
			fail(key+"actor.audience", "has no effect: token_file holds the token")
		}
	default:
		c.checkAssertion(fail, key+"actor.", o, OAuthAssertion{Issuer: c.ExternalURL, Subject: b.Subject, Audience: b.Audience, TTL: time.Minute})
	}
}

// checkAssertion keeps an assertion from being good for Writ, or for those who take
// Writ's access tokens, and from speaking for somebody else.
func (c *Config) checkAssertion(fail failFunc, key string, o *OAuth, a OAuthAssertion) {
	if slices.ContainsFunc(c.Issuers, func(is Issuer) bool { return is.Issuer == a.Issuer }) {
		fail(key+"issuer", "is one of issuers, for which Writ must not speak")
	}
	if fail.required(key+"audience", a.Audience) && c.takesOwnTokens(a.Audience) {
		fail(key+"audience", "takes tokens of Writ's, for one of which an assertion could pass")
	}
	if a.TTL < 5*time.Second || a.TTL > maxAssertion {
		fail(key+"ttl", "is %v, expected 5s to %v", a.TTL, maxAssertion)
	}
	fail.key(key+"key_file", a.KeyFile)
	if fail.required(key+"subject", a.Subject) {
		c.checkTemplate(fail, key+"subject", o, a.Subject)
	}
	for _, name := range slices.Sorted(maps.Keys(a.Claims)) {
		if slices.Contains(ownClaims, name) || a.Claims[name] == "" {
			fail(key+"claims."+name, "is a claim that can't be configured, or empty")
		}
		c.checkTemplate(fail, key+"claims."+name, o, a.Claims[name])
	}
}

// takesOwnTokens says that an audience is Writ, or one that minted tokens are for.
func (c *Config) takesOwnTokens(audience string) bool {
	if strings.TrimSuffix(audience, "/") == c.ExternalURL {
		return true
	}
	for _, is := range c.Issuers {
		if is.Audience == audience {
			return true
		}
	}
	for _, m := range c.Minters {
		if m.JWT != nil && m.JWT.Audience == audience {
			return true
		}
	}
	return slices.ContainsFunc(c.Services, func(s Service) bool { return s.Audience == audience })
}

// ownClaims have a meaning that the configuration must not change.
var ownClaims = []string{
	"iss", "sub", "aud", "exp", "nbf", "iat", "jti", "sid", "act", "may_act", "cnf", "scope", "scp", "client_id", "azp", "typ", "events",
	"sub_id", "authorization_details", "nonce", "at_hash", "c_hash", "auth_time", "acr", "amr",
}

// checkTemplate also wants a name to be one principal's: names are unique only within
// their issuer.
func (c *Config) checkTemplate(fail failFunc, key string, o *OAuth, template string) {
	rest := placeholder.ReplaceAllStringFunc(template, func(name string) string {
		if !slices.Contains(templateNames, name) {
			fail(key, "has %s, expected one of %s", name, strings.Join(templateNames, ", "))
		}
		return ""
	})
	if strings.ContainsAny(rest, "{}") || strings.ContainsFunc(rest, func(r rune) bool { return r <= ' ' || r > '~' }) {
		fail(key, "is %q, expected visible ASCII characters and names in braces", template)
	}
	if ambiguous(template) {
		fail(key, "is %q, expected a character such as : / # or | between any two names: others can be part of one", template)
	}
	several := func(p Principal) bool {
		n := 0
		for _, is := range c.Issuers {
			if slices.Contains(is.SpeaksFor, p) {
				n++
			}
		}
		return n > 1
	}
	for _, p := range []Principal{User, Agent} {
		name, issuer := "{"+string(p)+"}", "{"+string(p)+"_issuer}"
		one := p == User && o.Issuer != "" || !several(p)
		if strings.Contains(template, name) && !strings.Contains(template, issuer) && !one {
			fail(key, "has %s without %s, but several issuers speak for %ss: one of them could name another's", name, issuer, p)
		}
	}
}

func (o *OAuth) checkLife(fail failFunc, key string, maxTTL time.Duration) {
	instant := o.Revocation != nil && o.Revocation.TakesEffect == "instant"
	switch {
	case o.EndsWithAssertion && o.Assertion == nil:
		fail(key+"ends_with_assertion", "has no effect without assertion")
	case o.EndsWithAssertion && o.TokenTTL != 0:
		fail(key+"token_ttl", "stands beside ends_with_assertion, expected one of them")
	case o.EndsWithAssertion:
	case o.TokenTTL <= 0:
		fail(key+"token_ttl", "is %v, expected how long the target's tokens live at most; or state ends_with_assertion", o.TokenTTL)
	case !instant && maxTTL < o.TokenTTL+12*time.Second:
		fail(strings.TrimSuffix(key, "oauth.")+"max_ttl",
			"is %v, but the target's tokens live %v and can't be ended at once: expected %v or more", maxTTL, o.TokenTTL, o.TokenTTL+12*time.Second)
	}
}
