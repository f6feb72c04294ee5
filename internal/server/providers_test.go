package server_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"go.yaml.in/yaml/v3"

	"github.com/writsec/writ/internal/config"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/server"
	"github.com/writsec/writ/internal/telemetry"
)

// The tokens of this file have the shapes that the vendors document. Documented, not
// recorded: no vendor's server made one.

// claims are a token's; a value of nil takes one away.
type claims = map[string]any

// shape is a token before it is signed. iat, nbf and exp are added.
type shape struct {
	alg, typ string // typ "" leaves it out
	claims   claims
}

func (s shape) with(c claims) *shape {
	out := maps.Clone(s.claims)
	maps.Copy(out, c)
	return &shape{s.alg, s.typ, out}
}

func (s shape) as(typ string) *shape { return &shape{s.alg, typ, s.claims} }

func newKeys(t *testing.T) (map[string]any, []byte) {
	t.Helper()
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	keys := map[string]any{"RS256": rsaKey}
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: &rsaKey.PublicKey, KeyID: "RS256", Algorithm: "RS256", Use: "sig"}}}
	for alg, curve := range map[string]elliptic.Curve{"ES256": elliptic.P256(), "ES384": elliptic.P384()} {
		k, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		keys[alg] = k
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: &k.PublicKey, KeyID: alg, Algorithm: alg})
	}
	b, err := json.Marshal(set)
	if err != nil {
		t.Fatal(err)
	}
	return keys, b
}

func (s shape) sign(t *testing.T, keys map[string]any) string {
	t.Helper()
	opts := &jose.SignerOptions{}
	if s.typ != "" {
		opts = opts.WithType(jose.ContentType(s.typ))
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.SignatureAlgorithm(s.alg), Key: jose.JSONWebKey{Key: keys[s.alg], KeyID: s.alg}}, opts)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	all := claims{"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(5 * time.Minute).Unix()}
	maps.Copy(all, s.claims)
	maps.DeleteFunc(all, func(_ string, v any) bool { return v == nil })
	payload, err := json.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	token, err := signer.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	compact, err := token.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return compact
}

// brought is what an agent brings, and what comes of it: who is believed, or the
// detail of the refusal.
type brought struct {
	name            string
	bearer, subject *shape
	want            string
}

const (
	writ      = "https://writ.example.com"
	noMatch   = "does not match what its issuer's profile wants of it"
	notMeant  = "is not meant for " + writ
	notBearer = "is not an access token (RFC 9068, typ at+jwt)"
	unknown   = "is of an issuer that Writ does not know"
	noUser    = "names no user: its sub is its client"
	notIssued = "was not issued to the agent that brings it"
	otherKind = "is of another kind than an access token"
	noClient  = "names no client that it was issued to"
	forClient = "is an ID token of a client that Writ does not know"
)

func bearerToken(reason string) string  { return "the bearer token " + reason }
func subjectToken(reason string) string { return "the subject_token " + reason }

// rows are by heading of the document.
func rows() map[string][]brought {
	out := map[string][]brought{}
	oktaRows(out)
	auth0Rows(out)
	ibmRows(out)
	keycloakRows(out)
	entraRows(out)
	pingRows(out)
	googleRows(out)
	platformRows(out)
	return out
}

func oktaRows(out map[string][]brought) {
	const iss, agent = "https://acme.okta.com/oauth2/aus4writ", "0oa1agent"
	user := shape{"RS256", "", claims{
		"ver": 1, "jti": "AT.x1", "iss": iss, "aud": writ, "sub": "alice@acme.example", "cid": agent, "uid": "00u1alice",
		"scp": []string{"openid", "writ"}, "auth_time": 1700000000,
	}}
	own := user.with(claims{"sub": agent, "uid": nil, "scp": []string{"writ"}, "auth_time": nil})
	id := shape{"RS256", "", claims{
		"ver": 1, "jti": "ID.x1", "iss": iss, "aud": agent, "sub": "00u1alice", "amr": []string{"pwd"}, "idp": "00o1", "at_hash": "x",
		"preferred_username": "alice@acme.example",
	}}
	out["Okta"] = []brought{
		{"a user through the agent", &user, nil, "agent 0oa1agent, user 00u1alice"},
		{"the agent's own", own, nil, "agent 0oa1agent"},
		{"the agent's own, the user's beside it", own, &user, "agent 0oa1agent, user 00u1alice"},
		{"ID token as bearer", &id, nil, bearerToken(otherKind)},
		{"ID token as subject_token", own, &id, subjectToken(otherKind)},
		{"the agent's own as a user's", own, own, subjectToken(noUser)},
		{"another client's user", own, user.with(claims{"cid": "0oa2other"}), subjectToken(notIssued)},
		{"the default API", user.with(claims{"aud": "api://default"}), nil, bearerToken(notMeant)},
		{"the org server", user.with(claims{"iss": "https://acme.okta.com", "aud": "https://acme.okta.com"}), nil, bearerToken(unknown)},
		{"another tenant", user.with(claims{"iss": "https://evil.okta.com/oauth2/aus4writ"}), nil, bearerToken(unknown)},
		{"no cid", user.with(claims{"cid": nil}), nil, bearerToken(noClient)},
		{"a user without uid", user.with(claims{"uid": nil}), nil, bearerToken("has no usable uid")},
	}
}

func auth0Rows(out map[string][]brought) {
	const iss, agent = "https://acme.eu.auth0.com/", "kTz3agentClientId"
	user := shape{"RS256", "JWT", claims{
		"iss": iss, "sub": "auth0|64alice", "aud": []string{writ, iss + "userinfo"}, "azp": agent, "scope": "openid profile writ",
	}}
	own := user.with(claims{"sub": agent + "@clients", "aud": writ, "scope": "writ", "gty": "client-credentials"})
	id := shape{"RS256", "JWT", claims{
		"iss": iss, "sub": "auth0|64alice", "aud": agent, "nickname": "alice", "sid": "s1", "nonce": "n", "email_verified": true,
	}}
	common := func(user shape, own *shape) []brought {
		return []brought{
			{"a user through the agent", &user, nil, "agent kTz3agentClientId, user auth0|64alice"},
			{"a federated user", user.with(claims{"sub": "samlp|acme|alice@acme.example"}), nil, "agent kTz3agentClientId, user samlp|acme|alice@acme.example"},
			{"the agent's own", own, nil, "agent kTz3agentClientId"},
			{"the agent's own, the user's beside it", own, &user, "agent kTz3agentClientId, user auth0|64alice"},
			{"ID token as subject_token", own, &id, "agent kTz3agentClientId, user auth0|64alice"},
			{"ID token as bearer", &id, nil, bearerToken(notBearer)},
			{"ID token of another client", own, id.with(claims{"aud": "other"}), subjectToken("")},
			{"the agent's own as a user's", own, own, subjectToken(noUser)},
			{"for userinfo alone", user.with(claims{"aud": iss + "userinfo"}), nil, bearerToken(notMeant)},
			{"the management API", own.with(claims{"aud": iss + "api/v2/"}), nil, bearerToken(notMeant)},
			{"iss without the slash", user.with(claims{"iss": "https://acme.eu.auth0.com"}), nil, bearerToken(unknown)},
			{"another tenant", user.with(claims{"iss": "https://evil.eu.auth0.com/"}), nil, bearerToken(unknown)},
		}
	}
	const other = "Auth0, default profile"
	out[other] = common(user, own)
	out[other][6].want = subjectToken(noClient)
	rfc := func(s *shape) *shape {
		c := s.with(claims{"client_id": agent, "azp": nil, "gty": nil, "jti": "73Wak"})
		return c.as("at+jwt")
	}
	out[other] = append(out[other],
		brought{"no azp", user.with(claims{"azp": nil}), nil, bearerToken(noClient)},
		brought{"of the other profile", rfc(&user), nil, bearerToken("is an access token (typ at+jwt), and its issuer is configured for jwt")})
	const profile = "Auth0, RFC 9068 profile"
	out[profile] = common(*rfc(&user), rfc(own))
	out[profile][6].want = subjectToken(forClient)
	out[profile] = append(out[profile],
		brought{"of the other profile", &user, nil, bearerToken("is not an ID token, though its header lets it seem one")})
}

func ibmRows(out map[string][]brought) {
	const iss, agent = "https://acme.verify.ibm.com/oauth2", "2f6a1c-agent"
	user := shape{"RS256", "at+jwt", claims{
		"iss": iss, "sub": "6540001ABC", "aud": []string{writ}, "client_id": agent, "jti": "j1", "scope": "openid writ",
		"acr": "urn:ibm:security:policy:id:1", "auth_time": 1700000000,
	}}
	own := user.with(claims{"sub": agent, "acr": nil, "auth_time": nil, "scope": "writ"})
	id := shape{"RS256", "JWT", claims{"iss": iss, "sub": "6540001ABC", "aud": agent, "at_hash": "x", "nonce": "n", "realmName": "cloudIdentityRealm"}}
	out["IBM Verify"] = []brought{
		{"a user through the agent", &user, nil, "agent 2f6a1c-agent, user 6540001ABC"},
		{"the agent's own", own, nil, "agent 2f6a1c-agent"},
		{"ID token as subject_token", own, &id, "agent 2f6a1c-agent, user 6540001ABC"},
		{"ID token as bearer", &id, nil, bearerToken(notBearer)},
		{"ID token of another client", own, id.with(claims{"aud": "other"}), subjectToken(forClient)},
		{"the agent's own as a user's", own, own, subjectToken(noUser)},
		{"typ JWT", user.as("JWT"), nil, bearerToken("is not an ID token, though its header lets it seem one")},
		{"the older endpoint", user.with(claims{"iss": "https://acme.verify.ibm.com/oidc/endpoint/default"}), nil, bearerToken(unknown)},
		{"for its client alone", user.with(claims{"aud": agent}), nil, bearerToken(notMeant)},
		{"no jti", user.with(claims{"jti": nil}), nil, bearerToken("has no usable jti")},
	}
}

func keycloakRows(out map[string][]brought) {
	const iss, agent, account = "https://sso.acme.example/realms/acme", "crm-agent", "d952cf23-bf92-4c8f-a3ff-4972b4f2bc5b"
	user := shape{"RS256", "JWT", claims{
		"jti": "onrtac:1", "iss": iss, "aud": []string{writ, "account"}, "sub": "f1a7alice", "typ": "Bearer", "azp": agent, "sid": "s1",
		"acr": "1", "realm_access": claims{"roles": []string{"sales"}}, "scope": "openid profile", "preferred_username": "alice",
	}}
	own := user.with(claims{
		"sub": account, "sid": nil, "scope": "profile", "preferred_username": "service-account-crm-agent", "client_id": agent,
		"clientHost": "192.0.2.7", "clientAddress": "192.0.2.7",
	})
	id := shape{"RS256", "JWT", claims{
		"jti": "j2", "iss": iss, "aud": agent, "sub": "f1a7alice", "typ": "ID", "azp": agent, "sid": "s1", "at_hash": "x", "acr": "1",
		"preferred_username": "alice",
	}}
	out["Keycloak"] = []brought{
		{"a user through the agent", &user, nil, "agent crm-agent, user f1a7alice"},
		{"the agent's own", own, nil, "agent crm-agent"},
		{"the agent's own, the user's beside it", own, &user, "agent crm-agent, user f1a7alice"},
		{"ID token as subject_token", own, &id, "agent crm-agent, user f1a7alice"},
		{"ID token as bearer", &id, nil, bearerToken(notBearer)},
		{"ID token for Writ too", id.with(claims{"aud": []string{agent, writ}}), nil, bearerToken(forClient)},
		{"ID token of another client", own, id.with(claims{"aud": "web", "azp": "web"}), subjectToken(otherKind)},
		{"the agent's own as a user's", own, own, subjectToken(noUser)},
		{"another client's user", own, user.with(claims{"azp": "web"}), subjectToken(notIssued)},
		{"no audience mapper", user.with(claims{"aud": "account"}), nil, bearerToken(notMeant)},
		{"logout token", own, &shape{"RS256", "logout+jwt", claims{
			"iss": iss, "aud": agent, "sub": "f1a7alice", "typ": "Logout", "sid": "s1", "jti": "j",
			"events": claims{"http://schemas.openid.net/event/backchannel-logout": claims{}},
		}}, subjectToken("is neither an access token (typ at+jwt) nor an ID token (typ JWT)")},
		{"logout token with typ JWT", own, &shape{"RS256", "JWT", claims{
			"iss": iss, "aud": agent, "sub": "f1a7alice", "typ": "Logout", "sid": "s1", "jti": "j",
			"events": claims{"http://schemas.openid.net/event/backchannel-logout": claims{}},
		}}, subjectToken("is a security event, not an ID token")},
		{"another typ, such as of a registration token", user.with(claims{"typ": "RegistrationAccessToken"}), nil, bearerToken(noMatch)},
		{"a lightweight token", user.with(claims{"sub": nil}), nil, bearerToken("has no usable sub")},
		{"another realm", user.with(claims{"iss": "https://sso.acme.example/realms/master"}), nil, bearerToken(unknown)},
		{"a client that is set to at+jwt", user.as("at+jwt"), nil, bearerToken("is an access token (typ at+jwt), and its issuer is configured for jwt")},
		// What the document warns of: a service account with a session passes for a user.
		{"the agent's own with a session", own.with(claims{"sid": "s9"}), nil, "agent crm-agent, user " + account},
	}
}

func entraRows(out map[string][]brought) {
	const (
		tid   = "72f988bf-0000-4000-8000-2d7cd011db47"
		v2    = "https://login.microsoftonline.com/" + tid + "/v2.0"
		v1    = "https://sts.windows.net/" + tid + "/"
		api   = "6e74172b-0000-4000-8000-cff0a3f1e2d4"
		agent = "9b1deb4d-0000-4000-8000-2b0d7b3dcb6d"
		mi    = "1c8e2f3a-0000-4000-8000-5a6b7c8d9e0f"
		graph = "00000003-0000-0000-c000-000000000000"
	)
	user := shape{"RS256", "JWT", claims{
		"aud": api, "iss": v2, "azp": agent, "azpacr": "1", "name": "Alice", "oid": "oid-alice", "preferred_username": "alice@acme.example",
		"rh": "0.A", "scp": "writ.use", "sub": "pairwise-alice", "tid": tid, "uti": "u", "ver": "2.0",
	}}
	own := user.with(claims{
		"oid": "oid-of-service-principal", "sub": "oid-of-service-principal", "scp": nil, "roles": []string{"Writ.Agent"}, "name": nil,
		"preferred_username": nil, "idtyp": "app",
	})
	managed := own.with(claims{"azp": mi, "azpacr": "2", "oid": "oid-of-identity", "sub": "oid-of-identity", "xms_mirid": "/subscriptions/x"})
	id := shape{"RS256", "JWT", claims{
		"aud": agent, "iss": v2, "oid": "oid-alice", "sub": "pairwise-alice-2", "tid": tid, "ver": "2.0", "nonce": "n", "name": "Alice", "uti": "u",
	}}
	first := user.with(claims{
		"aud": "api://writ.example.com", "iss": v1, "azp": nil, "azpacr": nil, "appid": agent, "appidacr": "1", "ver": "1.0",
		"upn": "alice@acme.example", "preferred_username": nil,
	})
	firstOwn := first.with(claims{"scp": nil, "oid": "oid-of-service-principal", "sub": "oid-of-service-principal", "upn": nil, "roles": []string{"Writ.Agent"}})
	const v1Meant = "is not meant for api://writ.example.com"
	out["Entra ID, v2.0"] = []brought{
		{"a user through the agent", &user, nil, "agent " + agent + ", user oid-alice"},
		{"the agent's own", own, nil, "agent " + agent},
		{"managed identity", managed, nil, "agent " + agent},
		{"managed identity, the user's token of its client", managed, &user, "agent " + agent + ", user oid-alice"},
		{"managed identity of another", managed.with(claims{"azp": "other"}), nil, "agent other"},
		{"managed identity of another, our user's token", managed.with(claims{"azp": "other"}), &user, subjectToken(notIssued)},
		{"ID token as subject_token", own, &id, "agent " + agent + ", user oid-alice"},
		{"ID token without the scope profile", own, id.with(claims{"oid": nil}), subjectToken("has no usable oid")},
		{"ID token as bearer", &id, nil, bearerToken(notBearer)},
		{"ID token of Writ's own registration", id.with(claims{"aud": api}), nil, bearerToken(noClient)},
		{"ID token of another tenant's shape", own, id.with(claims{"tid": "other"}), subjectToken(noMatch)},
		{"the agent's own as a user's", own, own, subjectToken(noUser)},
		{"for Graph", user.with(claims{"aud": graph}), nil, bearerToken("is not meant for " + api)},
		{"of the other version", first, nil, bearerToken(unknown)},
		{"of the other version under this issuer", user.with(claims{"ver": "1.0"}), nil, bearerToken(noMatch)},
		{"another tenant", user.with(claims{"iss": "https://login.microsoftonline.com/other/v2.0", "tid": "other"}), nil, bearerToken(unknown)},
		{"common", user.with(claims{"iss": "https://login.microsoftonline.com/common/v2.0"}), nil, bearerToken(unknown)},
		{"no oid", user.with(claims{"oid": nil}), nil, bearerToken("has no usable oid")},
	}
	out["Entra ID, v1.0"] = []brought{
		{"a user through the agent", first, nil, "agent " + agent + ", user oid-alice"},
		{"the agent's own", firstOwn, nil, "agent " + agent},
		{"the agent's own as a user's", firstOwn, firstOwn, subjectToken(noUser)},
		{"of the other version", &user, nil, bearerToken(unknown)},
		{"of the other version under this issuer", first.with(claims{"ver": "2.0", "appid": nil, "azp": agent}), nil, bearerToken(noClient)},
		{"ID token as bearer", id.with(claims{"iss": v1, "ver": "1.0"}), nil, bearerToken(noClient)},
		{"iss without the slash", first.with(claims{"iss": strings.TrimSuffix(v1, "/")}), nil, bearerToken(unknown)},
		{"another API", first.with(claims{"aud": "https://management.azure.com/"}), nil, bearerToken(v1Meant)},
		{"another tenant's shape", first.with(claims{"tid": "other"}), nil, bearerToken(noMatch)},
	}
}

func pingRows(out map[string][]brought) {
	const iss, agent = "https://auth.pingone.eu/5d1f6b3e-0000-4000-8000-7d3f1f0b9a11/as", "3d9b1f40-0000-4000-8000-6b0f52c5d9aa"
	user := shape{"RS256", "", claims{"client_id": agent, "iss": iss, "aud": []string{writ}, "sub": "uuid-alice", "scope": "openid writ", "sid": "s1", "jti": "j"}}
	own := user.with(claims{"sub": nil, "sid": nil, "scope": "writ"})
	id := shape{"RS256", "", claims{"iss": iss, "aud": agent, "sub": "uuid-alice", "sid": "s1", "at_hash": "x", "acr": "Single_Factor", "amr": []string{"pwd"}}}
	out["PingOne"] = []brought{
		{"a user through the agent", &user, nil, "agent " + agent + ", user uuid-alice"},
		{"the agent's own", own, nil, "agent " + agent},
		{"ID token as subject_token", own, &id, "agent " + agent + ", user uuid-alice"},
		{"ID token as bearer", &id, nil, bearerToken(notBearer)},
		{"ID token of another client", own, id.with(claims{"aud": "other"}), subjectToken(otherKind)},
		{"the agent's own as a user's", own, own, subjectToken(noUser)},
		{"for PingOne's API", user.with(claims{"aud": []string{"https://api.pingone.eu"}, "env": "5d1f", "org": "o"}), nil, bearerToken(notMeant)},
		{"another environment", user.with(claims{"iss": "https://auth.pingone.eu/other/as"}), nil, bearerToken(unknown)},
		{"another region", user.with(claims{"iss": "https://auth.pingone.com/5d1f6b3e-0000-4000-8000-7d3f1f0b9a11/as"}), nil, bearerToken(unknown)},
		{"a user without sub", user.with(claims{"sub": nil}), nil, bearerToken("has no usable sub")},
		{"no client_id", own.with(claims{"client_id": nil}), nil, bearerToken("has no usable sub")},
		{"typ at+jwt", user.as("at+jwt"), nil, bearerToken("is an access token (typ at+jwt), and its issuer is configured for jwt")},
	}
}

func googleRows(out map[string][]brought) {
	const iss, client, unique = "https://accounts.google.com", "407408718192-crm.apps.googleusercontent.com", "117512345678901234567"
	machine := shape{"RS256", "JWT", claims{
		"iss": iss, "aud": writ, "azp": unique, "sub": unique, "email": "crm@acme-agents.iam.gserviceaccount.com", "email_verified": true,
	}}
	vm := machine.with(claims{"google": claims{"compute_engine": claims{
		"project_id": "acme-agents", "project_number": 739419398126, "zone": "europe-west1-b", "instance_id": "152986662232938449",
		"instance_name": "crm", "instance_creation_timestamp": 1496952205,
	}}})
	id := shape{"RS256", "JWT", claims{
		"iss": iss, "aud": client, "azp": client, "sub": "10769150350006150715113082367", "email": "alice@acme.example",
		"email_verified": true, "hd": "acme.example", "at_hash": "x",
	}}
	other := machine.with(claims{"azp": "999", "sub": "999", "email": "hr@acme-agents.iam.gserviceaccount.com"})
	out["Google"] = []brought{
		{"the agent's own", &machine, nil, "agent " + client},
		{"the agent's own, format=full", vm, nil, "agent " + client},
		{"the user's ID token as subject_token", &machine, &id, "agent " + client + ", user 10769150350006150715113082367"},
		{"another service account", other, nil, "agent 999"},
		{"another service account, our user's ID token", other, &id, subjectToken(notIssued)},
		{"another project's", machine.with(claims{"email": "x@evil.iam.gserviceaccount.com"}), nil, bearerToken(noMatch)},
		{"a project that only begins alike", machine.with(claims{"email": "x@acme-agents.iam.gserviceaccount.com.evil.example"}), nil, bearerToken(noMatch)},
		{"without its email", machine.with(claims{"email": nil, "email_verified": nil}), nil, bearerToken(noMatch)},
		{"for another audience", machine.with(claims{"aud": "https://other.example"}), nil, bearerToken(notMeant)},
		{"a service account that asks for the client as audience", &machine, machine.with(claims{"aud": client}), subjectToken(forClient)},
		{"the agent's own as a user's", &machine, &machine, subjectToken(noUser)},
		{"ID token as bearer", &id, nil, bearerToken(notBearer)},
		{"ID token of another client", &machine, id.with(claims{"aud": "x.apps.googleusercontent.com", "azp": "x.apps.googleusercontent.com"}), subjectToken(otherKind)},
		{"a consumer account", &machine, id.with(claims{"email": "alice@gmail.com", "hd": nil}), subjectToken(noMatch)},
		{"an address that is not verified", &machine, id.with(claims{"email_verified": false}), subjectToken(noMatch)},
		{"iss without scheme", id.with(claims{"iss": "accounts.google.com"}), nil, bearerToken(unknown)},
	}
}

func platformRows(out map[string][]brought) {
	user := &shape{"ES256", "at+jwt", claims{"iss": "https://idp.example.com", "sub": "alice", "client_id": "crm-agent", "aud": writ, "jti": "u1"}}
	others := user.with(claims{"client_id": "hr-agent"})
	const crm, crmAlice = "agent crm-agent", "agent crm-agent, user alice"

	const cluster = "https://oidc.eks.eu-central-1.amazonaws.com/id/EXAMPLED539D4633E53DE1B71EXAMPLE"
	pod := func(namespace, account string) claims {
		return claims{"sub": "system:serviceaccount:" + namespace + ":" + account, "kubernetes.io": claims{
			"namespace": namespace, "node": claims{"name": "n1", "uid": "u"}, "pod": claims{"name": "crm-1", "uid": "u"},
			"serviceaccount": claims{"name": account, "uid": "u"},
		}}
	}
	k8s := *shape{"RS256", "", claims{"iss": cluster, "aud": []string{writ}, "jti": "j"}}.with(pod("agents", "crm"))
	out["Kubernetes"] = []brought{
		{"the service account", &k8s, nil, crm},
		{"the service account, its client's user", &k8s, user, crmAlice},
		{"the service account, another's user", &k8s, others, subjectToken(notIssued)},
		{"another account", k8s.with(pod("agents", "hr")), nil, "agent system:serviceaccount:agents:hr"},
		{"another account, the client's user", k8s.with(pod("agents", "hr")), user, subjectToken(notIssued)},
		{"another namespace", k8s.with(pod("default", "crm")), nil, bearerToken(noMatch)},
		{"another cluster", k8s.with(claims{"iss": "https://kubernetes.default.svc.cluster.local"}), nil, bearerToken(unknown)},
		{"for the API server", k8s.with(claims{"aud": []string{"https://kubernetes.default.svc"}}), nil, bearerToken(notMeant)},
		{"a legacy token", k8s.with(claims{"iss": "kubernetes/serviceaccount"}), nil, bearerToken(unknown)},
		{"as subject_token", &k8s, &k8s, subjectToken("is of an issuer that may not speak for users")},
		{"too old", k8s.with(claims{"iat": time.Now().Add(-time.Hour).Unix()}), nil, bearerToken("is older than the 1h0m0s that its issuer's profile allows")},
	}

	const spire = "https://oidc-discovery.acme.example"
	svid := shape{"ES256", "JWT", claims{"sub": "spiffe://acme.example/ns/agents/sa/crm", "aud": []string{writ}, "nbf": nil}}
	out["SPIFFE"] = []brought{
		{"without iss", &svid, nil, crm},
		{"with iss", svid.with(claims{"iss": spire}), nil, crm},
		{"without iat", svid.with(claims{"iat": nil}), nil, crm},
		{"no typ, its client's user", svid.as(""), user, crmAlice},
		{"another workload", svid.with(claims{"sub": "spiffe://acme.example/ns/agents/sa/hr"}), nil, "agent spiffe://acme.example/ns/agents/sa/hr"},
		{"another workload, the client's user", svid.with(claims{"sub": "spiffe://acme.example/ns/agents/sa/hr"}), user, subjectToken(notIssued)},
		{"another trust domain", svid.with(claims{"sub": "spiffe://evil.example/ns/agents/sa/crm"}), nil, bearerToken("has no iss")},
		{"another trust domain with iss", svid.with(claims{"iss": spire, "sub": "spiffe://evil.example/x"}), nil, bearerToken("is of no SPIFFE ID of its trust domain")},
		{"another issuer", svid.with(claims{"iss": "https://spire.evil.example"}), nil, bearerToken(unknown)},
		{"for another workload", svid.with(claims{"aud": "spiffe://acme.example/other"}), nil, bearerToken(notMeant)},
		{"SPIFFE ID at the provider", user.with(claims{"sub": "spiffe://acme.example/ns/agents/sa/crm", "client_id": "web"}), nil, "agent web, user spiffe://acme.example/ns/agents/sa/crm"},
	}

	const account, tag = "https://5b1a7d2e-0000-4000-8000-1f2e3d4c5b6a.tokens.sts.global.api.aws", "https://sts.amazonaws.com/"
	role := shape{"ES384", "JWT", claims{
		"iss": account, "aud": writ, "sub": "arn:aws:iam::123456789012:role/agents/crm", "jti": "xyz", "nbf": nil,
		tag: claims{
			"aws_account": "123456789012", "source_region": "eu-central-1", "org_id": "o-abc1234567",
			"principal_tags": claims{"team": "crm"}, "request_tags": claims{"job-id": "7"},
		},
	}}
	out["AWS web identity"] = []brought{
		{"the role", &role, nil, crm},
		{"the role, RS256, its client's user", &shape{"RS256", "JWT", role.claims}, user, crmAlice},
		{"another role of the path", role.with(claims{"sub": "arn:aws:iam::123456789012:role/agents/hr"}), nil, "agent arn:aws:iam::123456789012:role/agents/hr"},
		{"a role outside the path", role.with(claims{"sub": "arn:aws:iam::123456789012:role/admin"}), nil, bearerToken(noMatch)},
		{"a user", role.with(claims{"sub": "arn:aws:iam::123456789012:user/agents/crm"}), nil, bearerToken(noMatch)},
		{"another account's issuer", role.with(claims{"iss": "https://other.tokens.sts.global.api.aws"}), nil, bearerToken(unknown)},
		{"another account", role.with(claims{tag: claims{"aws_account": "210987654321"}}), nil, bearerToken(noMatch)},
		{"the account as a request tag", role.with(claims{tag: claims{"request_tags": claims{"aws_account": "123456789012"}}}), nil, bearerToken(noMatch)},
		{"for another service", role.with(claims{"aud": "https://api.example.com"}), nil, bearerToken(notMeant)},
		{"as subject_token", &role, &role, subjectToken("is of an issuer that may not speak for users")},
		{"longer than 15 minutes ago", role.with(claims{"iat": time.Now().Add(-15 * time.Minute).Unix()}), nil, bearerToken("is older than the 15m0s that its issuer's profile allows")},
	}

	own := func(jti string, c claims) *shape {
		return shape{"ES256", "JWT", claims{"iss": "crm-agent-key", "sub": "crm-agent-key", "aud": writ, "jti": jti, "nbf": nil}}.with(c)
	}
	out["private_key_jwt"] = []brought{
		{"the agent's", own("1", nil), nil, crm},
		{"the same jti again", own("1", nil), nil, bearerToken("was used before; sign a new one, with a new jti, for each request")},
		{"the agent's, its client's user", own("2", nil), user, crmAlice},
		{"as subject_token", own("3", nil), own("4", nil), subjectToken("is of an issuer that may not speak for users")},
		{"for its provider", own("5", claims{"aud": "https://idp.example.com"}), nil, bearerToken(notMeant)},
		{"about another", own("6", claims{"sub": "crm-agent"}), nil, bearerToken("has a sub that is not its iss, as a client's own assertion has")},
		{"good for an hour", own("7", claims{"exp": time.Now().Add(time.Hour).Unix()}), nil, bearerToken("lives longer than the 5m0s that an assertion may")},
		{"in the provider's name", own("8", claims{"iss": "https://idp.example.com", "sub": "crm-agent", "client_id": "crm-agent"}), nil, bearerToken("is an ID token of a client that Writ does not know")},
	}
}

// TestIdentityProviders makes every block of the document the configuration of a Writ,
// and brings it tokens.
func TestIdentityProviders(t *testing.T) {
	doc, err := os.ReadFile("../../docs/identity-providers.md")
	if err != nil {
		t.Fatal(err)
	}
	keys, jwks := newKeys(t)
	base := newConfig(t)
	root, err := config.RootKey(base.RootKeyFile)
	if err != nil {
		t.Fatal(err)
	}
	store, err := server.OpenStore(t.Context(), base, root, telemetry.NewMetrics(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	blocks, all := yamlBlocks(string(doc)), rows()
	if want := slices.Sorted(maps.Keys(all)); !slices.Equal(slices.Sorted(maps.Keys(blocks)), want) {
		t.Errorf("blocks of the document: %q\nblocks with tokens: %q", slices.Sorted(maps.Keys(blocks)), want)
	}
	for heading, block := range blocks {
		t.Run(heading, func(t *testing.T) {
			cfg := load(t, base, block, jwks)
			v, err := server.NewIdentity(t.Context(), cfg, store, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			for _, tt := range all[heading] {
				t.Run(tt.name, func(t *testing.T) {
					p := identity.Presented{Token: tt.bearer.sign(t, keys)}
					if tt.subject != nil {
						p.Subject = tt.subject.sign(t, keys)
					}
					c, err := v.Caller(t.Context(), p)
					got := "agent " + c.Agent.ID
					if c.User != nil {
						got += ", user " + c.User.ID
					}
					if f, ok := errors.AsType[*fault.Error](err); ok && f.Code == fault.InvalidToken {
						got = f.Detail
					} else if err != nil {
						t.Fatal(err)
					}
					if got != tt.want {
						t.Errorf("got  %s\nwant %s", got, tt.want)
					}
				})
			}
		})
	}
}

// yamlBlocks returns the document's YAML by the heading over it.
func yamlBlocks(doc string) map[string]string {
	out := map[string]string{}
	heading, inBlock := "", false
	for line := range strings.Lines(doc) {
		switch {
		case inBlock && strings.HasPrefix(line, "```"):
			inBlock = false
		case inBlock:
			out[heading] += line
		case strings.HasPrefix(line, "```yaml"):
			inBlock = true
		case strings.HasPrefix(line, "#"):
			heading = strings.TrimSpace(strings.TrimLeft(line, "#"))
		}
	}
	return out
}

// load reads a block as a whole configuration: first as it stands, then with the keys
// of all its issuers in a file.
func load(t *testing.T, base config.Config, block string, jwks []byte) config.Config {
	t.Helper()
	dir := t.TempDir()
	head := fmt.Sprintf("external_url: https://writ.example.com/pdp\nstore: %q\nroot_key_file: %q\npolicy: {path: %q}\n", base.Store, base.RootKeyFile, base.Policy.Path)
	for _, name := range []string{"jwks.json", "agents/crm-agent.json"} {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, jwks, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	read := func(block []byte) config.Config {
		path := filepath.Join(dir, "writ.yaml")
		if err := os.WriteFile(path, append([]byte(head), block...), 0o600); err != nil {
			t.Fatal(err)
		}
		cfg, err := config.Load(path)
		if err != nil {
			t.Fatalf("the block does not load: %v", err)
		}
		return cfg
	}
	read([]byte(block))
	var edited map[string]any
	if err := yaml.Unmarshal([]byte(block), &edited); err != nil {
		t.Fatal(err)
	}
	for _, is := range edited["issuers"].([]any) {
		is := is.(map[string]any)
		delete(is, "jwks_url")
		is["jwks_file"] = "jwks.json"
	}
	out, err := yaml.Marshal(edited)
	if err != nil {
		t.Fatal(err)
	}
	return read(out)
}
