package identity

import (
	"context"
	"crypto"
	"encoding/base64"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/writsec/writ/internal/fault"
)

// Issuers whose tokens are not RFC 9068's. All sign by issuer B's keys.
const (
	issPlain    = "https://plain.example"       // jwt, for users and agents
	issOwnNames = "https://own-names.example"   // the same, with claims of its own
	issPlatform = "https://platform.example"    // jwt, for agents alone
	issSPIRE    = "https://spire.example"       // jwt_svid
	issCluster  = "https://cluster.example"     // kubernetes
	issSelf     = "self-signed-agent"           // private_key_jwt
	issDialect  = "https://dialect.example"     // access_token with claims of its own
	issClockOut = "https://short-lived.example" // jwt for agents, max_age 5m
)

// profiles is a verifier of the issuers above and of issuer A, where the client
// crm-agent has other identities.
func profiles(t testing.TB) *Verifier {
	t.Helper()
	k := keys()
	dir := t.TempDir()
	file := func(name string, data []byte) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	setB := file("b", jwks(
		jwk(k.ecB, "ec", nil), jwk(k.ecB, "svid", map[string]any{"use": "jwt-svid"}), jwk(k.ecB, "x509", map[string]any{"use": "x509-svid"}),
	))
	common := func(is Issuer) Issuer {
		is.Audience, is.JWKSFile, is.Algorithms, is.Leeway = audience, setB, []string{"ES256"}, 30*time.Second
		if is.MaxAge == 0 {
			is.MaxAge = 24 * time.Hour
		}
		return is
	}
	spent := map[string]bool{}
	v, err := New(Config{
		Now: func() time.Time { return now }, Logger: slog.New(slog.DiscardHandler),
		Spend: func(_ context.Context, use string, expires time.Time) (bool, error) {
			if !expires.After(now) {
				t.Errorf("%s is to be remembered until %v", use, expires)
			}
			if strings.Contains(use, "broken") {
				return false, errors.New("dial tcp 192.0.2.7:5432: connection refused")
			}
			fresh := !spent[use]
			spent[use] = true
			return fresh, nil
		},
		SignedOut: func(context.Context, Ref, string) (time.Time, error) { return time.Time{}, nil },
		Issuers: []Issuer{
			common(Issuer{
				URL: issPlain, Kind: PlainJWT, User: true, Agent: true, IDTokenClients: []string{"crm-agent", "web"}, OwnClients: []string{"writ"},
				UserMatch: map[string]string{"sid": "*"}, Match: map[string]string{"tenant": "{acme,acme-*}"},
			}),
			common(Issuer{
				URL: issOwnNames, Kind: PlainJWT, User: true, Agent: true, IDTokenClients: []string{"crm-agent"}, UserMatch: map[string]string{"scp": "*"},
				SubjectClaim: "oid", ClientClaim: "/act~1by/app~0id",
			}),
			common(Issuer{URL: issPlatform, Kind: PlainJWT, Agent: true, Service: true, Match: map[string]string{"/place/project": "acme", "groups": "w*"}}),
			common(Issuer{URL: issSPIRE, Kind: JWTSVID, Agent: true, Service: true, TrustDomain: "acme.example"}),
			common(Issuer{URL: issCluster, Kind: Kubernetes, Agent: true, Match: map[string]string{"/kubernetes.io/namespace": "agents"}}),
			common(Issuer{URL: issSelf, Kind: ClientAssertion, Agent: true}),
			common(Issuer{URL: issDialect, User: true, Agent: true, ClientClaim: "app", UserMatch: map[string]string{"sub": "*|*"}}),
			common(Issuer{URL: issClockOut, Kind: PlainJWT, Agent: true, MaxAge: 5 * time.Minute}),
			{
				URL: issA, User: true, Agent: true, Audience: audience, Algorithms: []string{"ES256"},
				JWKSFile: file("a", jwks(jwk(k.ec, "ec", nil))),
			},
		},
		Agents: []Agent{{Ref: Ref{issA, "crm-agent"}, Identities: []Ref{
			{issSPIRE, "spiffe://acme.example/crm"}, {issCluster, "system:serviceaccount:agents:crm"}, {issSelf, issSelf}, {issPlain, "crm-m2m"},
		}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// bare takes away what only RFC 9068's tokens have.
func bare(iss string) edit {
	return func(f *forged) {
		of(iss, es256("ec", keys().ecB))(f)
		f.header["typ"] = "JWT"
		for _, name := range []string{"client_id", "jti"} {
			f.claims[name] = absent
		}
	}
}

// plain is a user's token of issPlain, through the client crm-agent.
func plain(edits ...edit) []edit {
	return append([]edit{bare(issPlain), claim("azp", "crm-agent"), claim("sid", "s1"), claim("tenant", "acme")}, edits...)
}

func ownNames(edits ...edit) []edit {
	return append([]edit{
		bare(issOwnNames), claim("sub", "pairwise"), claim("oid", "alice"), claim("scp", "writ"),
		claim("act/by", map[string]any{"app~id": "crm-agent"}),
	}, edits...)
}

func platform(edits ...edit) []edit {
	return append([]edit{
		bare(issPlatform), claim("sub", "job-7"), claim("place", map[string]any{"project": "acme"}), claim("groups", []string{"x", "workers"}),
	}, edits...)
}

func svid(edits ...edit) []edit {
	return append([]edit{
		bare(issSPIRE), by(es256("svid", keys().ecB)), claim("iss", absent), claim("sub", "spiffe://acme.example/crm"), claim("iat", absent),
	}, edits...)
}

func cluster(edits ...edit) []edit {
	return append([]edit{
		bare(issCluster), head("typ", absent), claim("sub", "system:serviceaccount:agents:crm"),
		claim("kubernetes.io", inNamespace("agents", "crm")),
	}, edits...)
}

func inNamespace(namespace, account string) map[string]any {
	return map[string]any{"namespace": namespace, "serviceaccount": map[string]any{"name": account, "uid": "u"}, "pod": map[string]any{"name": "p"}}
}

func assertion(edits ...edit) []edit {
	return append([]edit{bare(issSelf), claim("sub", issSelf), claim("jti", "one")}, edits...)
}

func dialect(edits ...edit) []edit {
	return append([]edit{of(issDialect, es256("ec", keys().ecB)), claim("sub", "auth|alice"), claim("app", "crm-agent")}, edits...)
}

// TestProfilesAccept has the honest tokens of every kind.
func TestProfilesAccept(t *testing.T) {
	for _, tt := range []struct {
		name        string
		edits       []edit
		agent, user Ref
	}{
		{"jwt, a user's", plain(), Ref{issPlain, "crm-agent"}, Ref{issPlain, "alice"}},
		{"jwt without typ", plain(head("typ", absent)), Ref{issPlain, "crm-agent"}, Ref{issPlain, "alice"}},
		{"jwt, client_id before azp", plain(claim("azp", absent), claim("client_id", "crm-agent")), Ref{issPlain, "crm-agent"}, Ref{issPlain, "alice"}},
		{"jwt, match by the other arm", plain(claim("tenant", "acme-eu")), Ref{issPlain, "crm-agent"}, Ref{issPlain, "alice"}},
		{"jwt, a client's own, by user_match", plain(claim("sid", absent), claim("sub", "uuid-of-service-account")), Ref{issPlain, "crm-agent"}, Ref{}},
		{"jwt, a client's own, by its sub", plain(claim("sub", "crm-agent")), Ref{issPlain, "crm-agent"}, Ref{}},
		{"jwt, a client's own, without sub", plain(claim("sid", absent), claim("sub", absent)), Ref{issPlain, "crm-agent"}, Ref{}},
		{"jwt, another identity of an agent", plain(claim("azp", "crm-m2m"), claim("sid", absent)), Ref{issA, "crm-agent"}, Ref{}},
		{"jwt, a user through another identity", plain(claim("azp", "crm-m2m")), Ref{issA, "crm-agent"}, Ref{issPlain, "alice"}},
		{"claims of its own", ownNames(), Ref{issOwnNames, "crm-agent"}, Ref{issOwnNames, "alice"}},
		{"claims of its own, a client's own", ownNames(claim("scp", absent)), Ref{issOwnNames, "crm-agent"}, Ref{}},
		{"claims of its own, a client's own with a sub alone", ownNames(claim("scp", absent), claim("oid", absent), claim("sub", "crm-agent")), Ref{issOwnNames, "crm-agent"}, Ref{}},
		{"a platform's", platform(), Ref{issPlatform, "job-7"}, Ref{}},
		{"a platform's, with a client", platform(claim("azp", "other")), Ref{issPlatform, "job-7"}, Ref{}},
		{"jwt_svid without iss", svid(), Ref{issA, "crm-agent"}, Ref{}},
		{"jwt_svid with iss", svid(claim("iss", issSPIRE)), Ref{issA, "crm-agent"}, Ref{}},
		{"jwt_svid, typ JOSE", svid(head("typ", "JOSE")), Ref{issA, "crm-agent"}, Ref{}},
		{"jwt_svid, no typ", svid(head("typ", absent)), Ref{issA, "crm-agent"}, Ref{}},
		{"jwt_svid under a key for signatures", svid(by(es256("ec", keys().ecB))), Ref{issA, "crm-agent"}, Ref{}},
		{"jwt_svid of a workload with no entry", svid(claim("sub", "spiffe://acme.example/hr")), Ref{issSPIRE, "spiffe://acme.example/hr"}, Ref{}},
		{"kubernetes", cluster(), Ref{issA, "crm-agent"}, Ref{}},
		{"private_key_jwt", assertion(), Ref{issA, "crm-agent"}, Ref{}},
		{"private_key_jwt, typ of its own", assertion(head("typ", "client-authentication+jwt")), Ref{issA, "crm-agent"}, Ref{}},
		{"dialect of RFC 9068", dialect(), Ref{issDialect, "crm-agent"}, Ref{issDialect, "auth|alice"}},
		{"dialect of RFC 9068, a client's own", dialect(claim("sub", "crm-agent@clients")), Ref{issDialect, "crm-agent"}, Ref{}},
		{"max_age, just young enough", []edit{bare(issClockOut), claim("iat", at(-299*time.Second))}, Ref{issClockOut, "alice"}, Ref{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := callerOf(profiles(t), t.Context(), forge(tt.edits...), "")
			if err != nil {
				t.Fatal(err)
			}
			user := Ref{}
			if c.User != nil {
				user = c.User.Ref
			}
			if c.Agent.Ref != tt.agent || user != tt.user {
				t.Errorf("agent %v, user %v; want %v, %v", c.Agent.Ref, user, tt.agent, tt.user)
			}
		})
	}
}

// TestNegative05Profiles: every kind refuses what only seems to be of it.
func TestNegative05Profiles(t *testing.T) {
	const (
		noMatch   = "does not match what its issuer's profile wants of it"
		noClient  = "names no client that it was issued to"
		event     = "is a security event, not an access token"
		notPlain  = "is an access token (typ at+jwt), and its issuer is configured for jwt"
		notSVID   = "is of no SPIFFE ID of its trust domain"
		notSA     = "is not a projected service account token of Kubernetes"
		notItsOwn = "has a sub that is not its iss, as a client's own assertion has"
		unknownID = "is an ID token of a client that Writ does not know"
	)
	sub := func(v any) edit { return claim("sub", v) }
	refusesBy(t, profiles(t), []badToken{
		{"ID token as bearer", plain(claim("aud", "crm-agent"), claim("azp", absent)), notAccess},
		{"ID token for Writ's own client as bearer", plain(claim("aud", "writ"), claim("azp", absent)), unknownID},
		{"ID token for a client and Writ as bearer", plain(claim("aud", []string{"crm-agent", audience})), unknownID},
		{"ID token of an unlisted client", plain(claim("aud", "stranger"), claim("azp", "stranger")), notMeant},
		{"access token with scope, for a client", plain(claim("aud", "crm-agent"), claim("scope", "openid")), "is not an ID token, though its header lets it seem one"},
		{"at+jwt of an issuer of jwt", plain(head("typ", "at+jwt")), notPlain},
		{"logout token", plain(claim("events", map[string]any{})), event},
		{"logout token by its typ", plain(head("typ", "logout+jwt")), notKind},
		{"security event", plain(head("typ", "secevent+jwt")), notKind},
		{"ID-JAG", plain(head("typ", "oauth-id-jag+jwt")), notKind},
		{"client assertion of an issuer of jwt", plain(head("typ", "client-authentication+jwt")), notKind},
		{"JOSE of an issuer of jwt", plain(head("typ", "JOSE")), notKind},
		{"typ null", plain(head("typ", nil)), notKind},
		{"no client", plain(claim("azp", absent)), noClient},
		{"azp a list", plain(claim("azp", []string{"crm-agent"})), noClient},
		{"azp empty", plain(claim("azp", "")), noClient},
		{"client with a line end", plain(claim("azp", "crm\n")), noClient},
		{"azp and client_id that differ", plain(claim("client_id", "web")), twoClients},
		{"azp and client_id both lists", platform(claim("azp", []string{"a"}), claim("client_id", []string{"a"})), twoClients},
		{"azp and client_id both objects", ownNames(claim("azp", map[string]any{}), claim("client_id", map[string]any{})), twoClients},
		{"azp null, client_id", plain(claim("azp", nil), claim("client_id", 5)), noClient},
		{"sub absent, though a user's", plain(sub(absent)), "has no usable sub"},
		{"sub null, a client's own", plain(sub(nil), claim("sid", absent)), "has no usable sub"},
		{"sub empty, a client's own", plain(sub(""), claim("sid", absent)), "has no usable sub"},
		{"sub absent, a platform's", platform(sub(absent), claim("azp", "job-7")), "has no usable sub"},
		{"its own subject claim absent", ownNames(claim("oid", absent)), "has no usable oid"},
		{"its own subject claim absent, a client's own", ownNames(claim("oid", absent), claim("scp", absent)), "has no usable oid"},
		{"its own client claim absent", ownNames(claim("act/by", absent), claim("azp", "crm-agent")), noClient},
		{"its own client claim no object", ownNames(claim("act/by", "crm-agent")), noClient},
		{"its own client claim by the escaped name", ownNames(claim("act/by", map[string]any{"app~0id": "crm-agent"})), noClient},
		{"no match", plain(claim("tenant", "evil")), noMatch},
		{"match only by its beginning", plain(claim("tenant", "acme.evil")), noMatch},
		{"match on no claim", plain(claim("tenant", absent)), noMatch},
		{"match on null", plain(claim("tenant", nil)), noMatch},
		{"match on an object", plain(claim("tenant", map[string]any{"acme": "acme"})), noMatch},
		{"match on an empty text", ownNames(claim("scp", ""), claim("act", map[string]any{"sub": "bot"})), "has an actor but no user: its sub is its client or its actor"},
		{"match on a list in a list", plain(claim("tenant", []any{[]string{"acme"}})), noMatch},
		{"match on an empty list", plain(claim("tenant", []string{})), noMatch},
		{"match by pointer, another value", platform(claim("place", map[string]any{"project": "evil"})), noMatch},
		{"match by pointer, no object", platform(claim("place", "acme")), noMatch},
		{"match by pointer, a claim of that name", platform(claim("place", absent), claim("/place/project", "acme")), noMatch},
		{"match on a list, none of it", platform(claim("groups", []any{"x", 5, nil})), noMatch},
		{"a platform's with an actor", platform(claim("act", map[string]any{"sub": "bot"})), "has an actor but no user: its sub is its client or its actor"},
		{"a user's token with an actor of another issuer", plain(claim("act", map[string]any{"sub": "bot", "iss": issA})), "has an act that names no actor of its issuer"},
		{"for somebody else", plain(claim("aud", "https://other.example")), notMeant},
		{"signed by issuer A", plain(by(es256("ec", keys().ec))), noKey},

		{"jwt_svid of another trust domain", svid(sub("spiffe://evil.example/crm")), "has no iss"},
		{"jwt_svid of a subdomain", svid(sub("spiffe://x.acme.example/crm")), "has no iss"},
		{"jwt_svid of another trust domain, with iss", svid(claim("iss", issSPIRE), sub("spiffe://evil.example/crm")), notSVID},
		{"jwt_svid of no SPIFFE ID", svid(claim("iss", issSPIRE), sub("crm")), notSVID},
		{"jwt_svid with a port", svid(claim("iss", issSPIRE), sub("spiffe://acme.example:443/crm")), notSVID},
		{"jwt_svid with dots in its path", svid(sub("spiffe://acme.example/../crm")), "has no iss"},
		{"jwt_svid with a query", svid(claim("iss", issSPIRE), sub("spiffe://acme.example/crm?x")), notSVID},
		{"jwt_svid in upper case", svid(sub("SPIFFE://acme.example/crm")), "has no iss"},
		{"jwt_svid, iss null", svid(claim("iss", nil)), "has no iss"},
		{"jwt_svid, iss empty", svid(claim("iss", "")), "has no iss"},
		{"jwt_svid that names another issuer", svid(claim("iss", issPlatform), claim("iat", now.Unix())), noMatch},
		{"jwt_svid, typ at+jwt", svid(head("typ", "at+jwt")), "is an access token (typ at+jwt), and its issuer is configured for jwt_svid"},
		{"jwt_svid under the key of certificates", svid(by(es256("x509", keys().ecB))), noKey},
		{"jwt_svid signed by issuer A", svid(by(es256("ec", keys().ec))), noKey},
		{"jwt_svid without exp", svid(claim("exp", absent)), "has no usable exp"},
		{"jwt_svid without iat, good for longer than max_age", svid(claim("exp", at(25*time.Hour))), "is good for longer than the 24h0m0s that its issuer's profile allows"},
		{"jwt_svid for somebody else", svid(claim("aud", "spiffe://acme.example/other")), notMeant},
		{"a key for SVIDs signs another kind", plain(by(es256("svid", keys().ecB))), noKey},
		{"no iss, no SPIFFE ID", plain(claim("iss", absent)), "has no iss"},

		{"kubernetes, another namespace", cluster(sub("system:serviceaccount:default:crm"), claim("kubernetes.io", inNamespace("default", "crm"))), noMatch},
		{"kubernetes, sub of another namespace", cluster(sub("system:serviceaccount:default:crm")), notSA},
		{"kubernetes, sub of another account", cluster(sub("system:serviceaccount:agents:hr")), notSA},
		{"kubernetes, a user", cluster(sub("alice")), notSA},
		{"kubernetes, a node", cluster(sub("system:node:agents:crm")), notSA},
		{"kubernetes, one colon more", cluster(sub("system:serviceaccount:agents:crm:x")), notSA},
		{"kubernetes, a line end", cluster(sub("system:serviceaccount:agents:crm\n")), notSA},
		{"kubernetes without its claim", cluster(claim("kubernetes.io", absent)), notSA},
		{"kubernetes, its claim a string", cluster(claim("kubernetes.io", "agents")), notSA},
		{"kubernetes, a legacy token", cluster(claim("exp", absent)), "has no usable exp"},
		{"kubernetes for its own API", cluster(claim("aud", "https://kubernetes.default.svc")), notMeant},

		{"private_key_jwt about another", assertion(sub("crm-agent")), notItsOwn},
		{"private_key_jwt without sub", assertion(sub(absent)), notItsOwn},
		{"private_key_jwt without jti", assertion(claim("jti", absent)), "has no usable jti"},
		{"private_key_jwt for its provider", assertion(claim("aud", issA)), notMeant},
		{"private_key_jwt that lives too long", assertion(claim("exp", at(5*time.Minute+time.Second))), "lives longer than the 5m0s that an assertion may"},
		{"private_key_jwt, too old", assertion(claim("iat", at(-5*time.Minute)), claim("exp", at(time.Second))), "lives longer than the 5m0s that an assertion may"},
		{"private_key_jwt with another's key", assertion(by(es256("ec", keys().ec))), noKey},

		{"dialect without its client claim", dialect(claim("app", absent)), "has no usable app"},
		{"dialect, client claim empty", dialect(claim("app", "")), "has no usable app"},
		{"dialect, client claim a list", dialect(claim("app", []string{"crm-agent"})), "has no usable app"},
		{"dialect, user_match on an empty sub", dialect(sub("")), "has no usable sub"},

		{"max_age reached", []edit{bare(issClockOut), claim("iat", at(-5*time.Minute))}, "is older than the 5m0s that its issuer's profile allows"},
		{"max_age, an old token with a new exp", []edit{bare(issClockOut), claim("iat", at(-48*time.Hour)), claim("exp", at(time.Minute))}, "is older than the 5m0s that its issuer's profile allows"},
		{"max_age, no iat", []edit{bare(issClockOut), claim("iat", absent)}, "has no usable iat"},
	})
}

// TestProfilesSubjectToken: users' tokens that agents bring, by any of their
// identities.
func TestProfilesSubjectToken(t *testing.T) {
	const (
		notIssued = "was not issued to the agent that brings it"
		itself    = "names no user: its sub is its client"
		noMatch   = "does not match what its issuer's profile wants of it"
	)
	userOfA := []edit{claim("client_id", "crm-agent")}
	id := func(edits ...edit) []edit {
		return append(plain(claim("aud", "crm-agent"), claim("azp", absent), claim("sid", absent)), edits...)
	}
	m2m := plain(claim("azp", "crm-agent"), claim("sid", absent))
	for _, tt := range []struct {
		name            string
		bearer, subject []edit
		want            string // reason; "" when alice is the user
	}{
		{"workload, its client's user", cluster(), userOfA, ""},
		{"SVID, its client's user", svid(), userOfA, ""},
		{"assertion, its client's user", assertion(), userOfA, ""},
		{"ID token", m2m, id(), ""},
		{"user of its own names", ownNames(claim("scp", absent)), ownNames(), ""},

		{"another workload", cluster(claim("sub", "system:serviceaccount:agents:hr"), claim("kubernetes.io", inNamespace("agents", "hr"))), userOfA, notIssued},
		{"another SPIFFE ID", svid(claim("sub", "spiffe://acme.example/hr")), userOfA, notIssued},
		{"SPIFFE ID that only begins alike", svid(claim("sub", "spiffe://acme.example/crm2")), userOfA, notIssued},
		{"user of another client", cluster(), []edit{claim("client_id", "web")}, notIssued},
		{"client of the same name elsewhere", cluster(), plain(), notIssued},
		{"a client's own", cluster(), []edit{own("crm-agent")}, itself},
		{"a client's own, by user_match", m2m, m2m, itself},
		{"a client's own, without sub", m2m, plain(claim("sid", absent), claim("sub", absent)), itself},
		{"a workload's", cluster(), cluster(), "is of an issuer that may not speak for users"},
		{"an assertion", cluster(), assertion(), "is of an issuer that may not speak for users"},
		{"ID token that does not match", m2m, id(claim("tenant", "evil")), noMatch},
		{"ID token without what is matched", m2m, id(claim("tenant", absent)), noMatch},
		{"ID token for Writ's own client", m2m, id(claim("aud", "writ")), "is an ID token of a client that Writ does not know"},
		{"ID token about its client", m2m, id(claim("sub", "crm-agent")), itself},
		{"ID token without its own subject claim", ownNames(claim("scp", absent)), ownNames(claim("aud", "crm-agent"), claim("scp", absent), claim("oid", absent)), "has no usable oid"},
		{"ID token, its own subject claim with a line end", ownNames(claim("scp", absent)), ownNames(claim("aud", "crm-agent"), claim("scp", absent), claim("oid", "ali\nce")), "has no usable oid"},
		{"ID token of its own names about its client", ownNames(claim("scp", absent)), ownNames(claim("aud", "crm-agent"), claim("scp", absent), claim("sub", "crm-agent")), itself},
	} {
		t.Run(tt.name, func(t *testing.T) {
			v := profiles(t)
			bearer, subject := forge(tt.bearer...), forge(tt.subject...)
			c, err := callerOf(v, t.Context(), bearer, subject)
			switch {
			case tt.want != "":
				checkRefusal(t, err, "the subject_token "+tt.want, bearer, subject)
				refusedOverHTTP(t, profiles(t), bearer, subject, "the subject_token "+tt.want)
			case err != nil:
				t.Fatal(err)
			case c.User == nil || c.User.ID != "alice":
				t.Errorf("user = %v, want alice", c.User)
			}
		})
	}
}

// TestAssertionOnce: a client's own assertion is good once, whoever brings it, and
// what is not known to be fresh is refused without a word about why.
func TestAssertionOnce(t *testing.T) {
	v := profiles(t)
	token := forge(assertion()...)
	c, err := callerOf(v, t.Context(), token, "")
	if err != nil {
		t.Fatal(err)
	}
	_, err = callerOf(v, t.Context(), token, "")
	checkRefusal(t, err, "the bearer token was used before; sign a new one, with a new jti, for each request", token)
	_, err = callerOf(v, t.Context(), forge(assertion(claim("exp", at(2*time.Minute)))...), "")
	checkRefusal(t, err, "the bearer token was used before; sign a new one, with a new jti, for each request")
	if _, err := v.Again(t.Context(), c); err != nil {
		t.Errorf("Again = %v: a held request goes on with what it was begun with", err)
	}
	if _, err := callerOf(v, t.Context(), forge(assertion(claim("jti", "two"))...), ""); err != nil {
		t.Errorf("a second assertion: %v", err)
	}
	_, err = callerOf(v, t.Context(), forge(assertion(claim("jti", "acts"), claim("act", map[string]any{"sub": "bot"}))...), "")
	checkRefusal(t, err, "the bearer token has an actor but no user: its sub is its client or its actor")
	// A forged one uses nothing up.
	_, _ = callerOf(v, t.Context(), forge(assertion(claim("jti", "three"), by(es256("ec", keys().ec)))...), "")
	if _, err := callerOf(v, t.Context(), forge(assertion(claim("jti", "three"))...), ""); err != nil {
		t.Errorf("after a forged one of the same jti: %v", err)
	}
	_, err = callerOf(v, t.Context(), forge(assertion(claim("jti", "broken"))...), "")
	if err == nil || fault.Is(err, fault.InvalidToken) {
		t.Errorf("a store that is away: %v, want an error that is not the token's", err)
	}
}

// TestPlatformService: a service's own token.
func TestPlatformService(t *testing.T) {
	v := profiles(t)
	for _, tt := range []struct {
		name  string
		edits []edit
		want  Ref // zero when refused
	}{
		{"a platform's", platform(), Ref{issPlatform, "job-7"}},
		{"SVID", svid(), Ref{issSPIRE, "spiffe://acme.example/crm"}},
		{"of an issuer that speaks for no services", cluster(), Ref{}},
		{"with an actor", platform(claim("act", map[string]any{"sub": "x"})), Ref{}},
		{"a user's", plain(), Ref{}},
		{"ID token", plain(claim("aud", "web"), claim("azp", absent)), Ref{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := v.Service(t.Context(), Presented{Token: forge(tt.edits...)})
			if got.Ref != tt.want || (err == nil) != (tt.want != Ref{}) || err != nil && !fault.Is(err, fault.InvalidToken) {
				t.Errorf("Service = %v, %v; want %v", got, err, tt.want)
			}
		})
	}
}

// TestProofWhileStoreIsAway: what can't be known to be fresh is no bad token, and the
// answer does not name the store.
func TestProofWhileStoreIsAway(t *testing.T) {
	k := keys()
	thumb := must((&jose.JSONWebKey{Key: k.ecOld.Public()}).Thumbprint(crypto.SHA256))
	token := forge(claim("cnf", map[string]any{"jkt": base64.RawURLEncoding.EncodeToString(thumb)}))
	proof := func(jti string) string {
		return forge(by(es256("", k.ecOld)), head("typ", "dpop+jwt"), head("jwk", jwk(k.ecOld, "", nil)), func(f *forged) {
			f.claims = map[string]any{
				"jti": jti, "htm": "POST", "htu": audience + "/decide", "iat": now.Unix(),
				"ath": base64.RawURLEncoding.EncodeToString(digest([]byte(token))),
			}
		})
	}
	v := profiles(t)
	p := Presented{Token: token, DPoP: true, Proofs: []string{proof("one")}, Method: "POST", URL: audience + "/decide"}
	if _, err := v.Caller(t.Context(), p); err != nil {
		t.Fatalf("an honest proof: %v", err)
	}
	v.proofs.Store = once(func(context.Context, string, time.Time) (bool, error) {
		return true, errors.New("store.internal: away")
	})
	p.Proofs = []string{proof("two")}
	_, err := v.Caller(t.Context(), p)
	if _, isFault := errors.AsType[*fault.Error](err); err == nil || isFault {
		t.Errorf("Caller = %v, want an error that is nobody's fault", err)
	}
}

// TestNegative10Nonce: where the profile wants a nonce, a proof without a current one
// is asked for it, and with one is good.
func TestNegative10Nonce(t *testing.T) {
	k := keys()
	thumb := must((&jose.JSONWebKey{Key: k.ecOld.Public()}).Thumbprint(crypto.SHA256))
	token := forge(of(issBound, es256("ec", k.ecB)), claim("cnf", map[string]any{"jkt": base64.RawURLEncoding.EncodeToString(thumb)}))
	v, _ := world(t)
	v.proofs.Store = once(func(context.Context, string, time.Time) (bool, error) { return true, nil })
	ask := func(nonce any) error {
		proof := forge(by(es256("", k.ecOld)), head("typ", "dpop+jwt"), head("jwk", jwk(k.ecOld, "", nil)), func(f *forged) {
			f.claims = map[string]any{
				"jti": "x", "htm": "POST", "htu": audience + "/decide", "iat": now.Unix(), "nonce": nonce,
				"ath": base64.RawURLEncoding.EncodeToString(digest([]byte(token))),
			}
		})
		_, err := v.Caller(t.Context(), Presented{Token: token, DPoP: true, Proofs: []string{proof}, Method: "POST", URL: audience + "/decide"})
		return err
	}
	for name, nonce := range map[string]any{"none": absent, "made up": "x", "empty": "", "a number": 5, "cut": v.Nonce()[1:]} {
		if err := ask(nonce); !fault.Is(err, fault.UseDPoPNonce) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := ask(v.Nonce()); err != nil {
		t.Errorf("the current one: %v", err)
	}
}
