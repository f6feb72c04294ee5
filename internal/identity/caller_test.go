package identity

import (
	"net/http"
	"testing"
	"time"

	"github.com/writsec/writ/internal/fault"
)

// subjectOf is a user's token that an agent brings as subject_token.
type subjectOf struct {
	name    string
	bearer  []edit // the agent's own token; crm-agent's when nil
	subject []edit
	want    string // reason; "" when alice is the user
}

func TestSubjectToken(t *testing.T) {
	k := keys()
	act := func(sub string) edit { return claim("act", map[string]any{"sub": sub}) }
	mayAct := func(v any) edit { return claim("may_act", v) }
	web := claim("client_id", "web")
	b := es256("ec", k.ecB)
	const (
		notIssued = "was not issued to the agent that brings it"
		noActor   = "has an act that names no actor"
		noMayAct  = "has a may_act that names no actor"
		itself    = "names no user: its sub is its client"
		itsActor  = "names no user: its sub is its actor"
	)
	rows := []subjectOf{
		{"issued to the agent", nil, nil, ""},
		{"another client, act the agent", nil, []edit{web, act("crm-agent")}, ""},
		{"another client, may_act the agent", nil, []edit{web, mayAct(map[string]any{"sub": "crm-agent"})}, ""},
		{"may_act with its issuer", nil, []edit{web, mayAct(map[string]any{"sub": "crm-agent", "iss": issA})}, ""},
		{"issued to the agent, may_act another", nil, []edit{mayAct(map[string]any{"sub": "bot"})}, ""},
		{"ID token of the agent", nil, []edit{asIDToken("crm-agent")}, ""},
		{"ID token with azp", nil, []edit{asIDToken("crm-agent"), claim("azp", "crm-agent")}, ""},
		{"ID token for two clients, azp the agent", nil, []edit{asIDToken(""), claim("aud", []string{"web", "crm-agent"}), claim("azp", "crm-agent")}, ""},
		{"ID token of another client, may_act the agent", nil, []edit{asIDToken("web"), mayAct(map[string]any{"sub": "crm-agent"})}, ""},
		{"ID token that says typ ID", nil, []edit{asIDToken("crm-agent"), claim("typ", "ID")}, ""},
		{"ID token without typ", nil, []edit{asIDToken("crm-agent"), head("typ", absent)}, ""},

		{"agent B with agent A's token", []edit{own("agent-b")}, nil, notIssued},
		{"agent B with what A may act for", []edit{own("agent-b")}, []edit{web, mayAct(map[string]any{"sub": "crm-agent"})}, notIssued},
		{"agent B with A's ID token", []edit{own("agent-b")}, []edit{asIDToken("crm-agent")}, notIssued},
		{"the client, when an actor is named", []edit{own("web")}, []edit{web, act("crm-agent")}, notIssued},
		{"the inner actor", nil, []edit{web, claim("act", map[string]any{"sub": "bot", "act": map[string]any{"sub": "crm-agent"}})}, notIssued},
		{"same name at another issuer", []edit{of(issBots, b), own("crm-agent")}, nil, notIssued},
		{"another issuer's client of the same name", nil, []edit{of(issB, b)}, notIssued},
		{"another issuer lets it act", nil, []edit{of(issB, b), mayAct(map[string]any{"sub": "crm-agent"})}, notIssued},
		{"of an issuer that may not speak for users", nil, []edit{of(issBots, b)}, "is of an issuer that may not speak for users"},
		{"an agent's own", nil, []edit{own("crm-agent")}, itself},
		{"another agent's own", nil, []edit{own("bot"), mayAct(map[string]any{"sub": "crm-agent"})}, itself},
		{"its sub is its actor", nil, []edit{web, claim("sub", "crm-agent"), act("crm-agent")}, itsActor},
		{"its sub is who may act", nil, []edit{web, claim("sub", "crm-agent"), mayAct(map[string]any{"sub": "crm-agent"})}, itsActor},
		{"ID token about its client", nil, []edit{asIDToken("crm-agent"), claim("sub", "crm-agent")}, itself},
		{"act of another issuer", nil, []edit{claim("act", map[string]any{"sub": "crm-agent", "iss": issB})}, notIssued},
		{"act null", nil, []edit{claim("act", nil)}, noActor},
		{"may_act of another issuer", nil, []edit{web, mayAct(map[string]any{"sub": "crm-agent", "iss": issB})}, notIssued},
		{"a chain of five actors", nil, []edit{claim("act", chain(5))}, noActor},
		{"a chain of four actors", nil, []edit{claim("act", chain(4))}, ""},
		{"a malformed actor inside", nil, []edit{claim("act", map[string]any{"sub": "crm-agent", "act": "bot"})}, noActor},
		{"may_act a string", nil, []edit{mayAct("crm-agent")}, noMayAct},
		{"may_act a list", nil, []edit{mayAct([]string{"crm-agent"})}, noMayAct},
		{"ID token of an unlisted client", []edit{own("stranger")}, []edit{asIDToken("stranger")}, "is an ID token of a client that Writ does not know"},
		{"ID token also for an unlisted client", nil, []edit{asIDToken(""), claim("aud", []string{"crm-agent", "stranger"}), claim("azp", "crm-agent")}, "is an ID token of a client that Writ does not know"},
		{"ID token with azp outside aud", nil, []edit{asIDToken("web"), claim("azp", "crm-agent")}, "is an ID token of a client that Writ does not know"},
		{"ID token with azp null", nil, []edit{asIDToken("crm-agent"), claim("azp", nil)}, "is an ID token of a client that Writ does not know"},
		{"ID token with azp a list", nil, []edit{asIDToken("crm-agent"), claim("azp", []string{"crm-agent"})}, "is an ID token of a client that Writ does not know"},
		{"ID token for two clients, no azp", nil, []edit{asIDToken(""), claim("aud", []string{"web", "crm-agent"})}, "has several audiences and no azp"},
		{"ID token without aud", nil, []edit{asIDToken("crm-agent"), claim("aud", absent)}, "has no usable aud"},
		{"ID token without sub", nil, []edit{asIDToken("crm-agent"), claim("sub", absent)}, "has no usable sub"},
		{"ID token of an issuer that lists none", []edit{of(issB, b), own("crm-agent")}, []edit{of(issB, b), asIDToken("crm-agent")}, "is an ID token of a client that Writ does not know"},
		{"access token for somebody else", nil, []edit{claim("aud", "https://other.example")}, notMeant},
		{"expired", nil, []edit{claim("exp", at(-time.Second))}, "is expired"},
		{"ID-JAG", nil, []edit{head("typ", "oauth-id-jag+jwt")}, notKind},
		{"logout token", nil, []edit{asIDToken("crm-agent"), claim("events", map[string]any{})}, "is a security event, not an ID token"},
		{"bound to a key", nil, []edit{claim("cnf", map[string]any{"jkt": "x"})}, bound},
		{"signed by another issuer", nil, []edit{by(es256("ec", k.ecB))}, noKey},
		{"garbage", nil, []edit{whole(func(string) string { return "alice" })}, notCompact},
	}
	v, log := world(t)
	for _, tt := range rows {
		t.Run(tt.name, func(t *testing.T) {
			if tt.bearer == nil {
				tt.bearer = []edit{own("crm-agent")}
			}
			bearer, subject := forge(tt.bearer...), forge(tt.subject...)
			c, err := callerOf(v, t.Context(), bearer, subject)
			if tt.want != "" {
				checkRefusal(t, err, "the subject_token "+tt.want, bearer, subject)
				refusedOverHTTP(t, v, bearer, subject, "the subject_token "+tt.want)
				if c.User != nil || c.Agent.ID != "" {
					t.Errorf("a refusal comes with caller %v", c)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if c.User == nil || c.User.Ref != (Ref{issA, "alice"}) || c.Agent.Ref != (Ref{issA, "crm-agent"}) {
				t.Errorf("caller = %v", c)
			}
		})
	}
	checkSilent(t, "the log", log.String())
}

func TestTwoUsers(t *testing.T) {
	v, _ := world(t)
	for name, subject := range map[string]string{
		"another": forge(claim("sub", "bob")),
		"same":    forge(),
		"garbage": "x",
	} {
		t.Run(name, func(t *testing.T) {
			bearer := forge()
			_, err := callerOf(v, t.Context(), bearer, subject)
			const want = "the subject_token is one too many: the bearer token names the user already"
			checkRefusal(t, err, want, bearer)
			refusedOverHTTP(t, v, bearer, subject, want)
		})
	}
}

// TestBadBearerGoodSubject: the subject_token never makes up for the bearer.
func TestBadBearerGoodSubject(t *testing.T) {
	v, _ := world(t)
	for name, tt := range map[string]struct{ bearer, want string }{
		"none":    {"", notCompact},
		"expired": {forge(own("crm-agent"), claim("exp", at(-1*time.Second))), "is expired"},
		"ID":      {forge(asIDToken("crm-agent")), notAccess},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := callerOf(v, t.Context(), tt.bearer, forge())
			checkRefusal(t, err, "the bearer token "+tt.want, tt.bearer)
			refusedOverHTTP(t, v, tt.bearer, forge(), "the bearer token "+tt.want)
		})
	}
}

func TestOperator(t *testing.T) {
	v, _ := world(t)
	b := es256("ec", keys().ecB)
	console := claim("client_id", "console")
	groups := func(v any) edit { return claim("groups", v) }
	for _, tt := range []struct {
		name  string
		edits []edit
		want  fault.Code // "" when it is an operator's
	}{
		{"claim a string", []edit{of(issOps, b), claim("role", "security")}, ""},
		{"claim a list", []edit{of(issOps, b), claim("role", []string{"x", "security"})}, ""},
		{"of a listed client", []edit{console, groups([]string{"writ-operators"})}, ""},
		{"of an agent", []edit{groups([]string{"writ-operators"})}, fault.Forbidden},
		{"of an agent through the console", []edit{console, groups("writ-operators"), claim("act", map[string]any{"sub": "bot"})}, fault.Forbidden},
		{"with a null act", []edit{console, groups("writ-operators"), claim("act", nil)}, fault.Forbidden},
		{"no claim", []edit{of(issOps, b)}, fault.Forbidden},
		{"claim null", []edit{of(issOps, b), claim("role", nil)}, fault.Forbidden},
		{"another value", []edit{of(issOps, b), claim("role", "security2")}, fault.Forbidden},
		{"value in another case", []edit{of(issOps, b), claim("role", "Security")}, fault.Forbidden},
		{"value among words", []edit{of(issOps, b), claim("role", "audit security")}, fault.Forbidden},
		{"list of others", []edit{of(issOps, b), claim("role", []any{"x", 5, nil, map[string]any{}, []any{"security"}})}, fault.Forbidden},
		{"claim an object", []edit{of(issOps, b), claim("role", map[string]any{"security": true})}, fault.Forbidden},
		{"issuer that speaks for no operators", []edit{of(issB, b), claim("groups", "writ-operators"), claim("role", "security")}, fault.Forbidden},
		{"claim of another operator issuer", []edit{of(issOps, b), groups("writ-operators")}, fault.Forbidden},
		{"signed out since", []edit{console, claim("sub", "signed-out"), groups("writ-operators"), claim("iat", at(-2*time.Second))}, fault.InvalidToken},
		{"of a login that is over", []edit{console, claim("sid", "signed-out"), groups("writ-operators"), claim("iat", at(-2*time.Second))}, fault.InvalidToken},
		{"of a new login", []edit{console, claim("sub", "signed-out"), groups("writ-operators"), claim("iat", at(0))}, ""},
		{"ID token", []edit{asIDToken("web"), groups("writ-operators")}, fault.InvalidToken},
		{"expired", []edit{console, groups("writ-operators"), claim("exp", at(0))}, fault.InvalidToken},
		{"for somebody else", []edit{console, groups("writ-operators"), claim("aud", "x")}, fault.InvalidToken},
		{"garbage", []edit{whole(func(string) string { return "a.b.c" })}, fault.InvalidToken},
	} {
		t.Run(tt.name, func(t *testing.T) {
			token := forge(tt.edits...)
			p, err := operatorOf(v, t.Context(), token)
			if tt.want != "" {
				status, _ := OverHTTP.Operate(v, token)
				if want := map[fault.Code]int{fault.Forbidden: http.StatusForbidden, fault.InvalidToken: http.StatusUnauthorized}[tt.want]; status != want {
					t.Errorf("/audit/checkpoint answers %d, want %d", status, want)
				}
				if !fault.Is(err, tt.want) || p.ID != "" {
					t.Errorf("Operator = %v, %v; want %s", p, err, tt.want)
				}
				return
			}
			if err != nil || p.ID == "" {
				t.Errorf("Operator = %v, %v; want one", p, err)
			}
		})
	}
}

// TestIDToken is about what an IdP answers Writ itself.
func TestIDToken(t *testing.T) {
	v, _ := world(t)
	k := keys()
	for _, tt := range []struct {
		name  string
		edits []edit
		want  string
	}{
		{"for Writ", []edit{asIDToken("writ")}, ""},
		{"for Writ, with azp", []edit{asIDToken("writ"), claim("azp", "writ")}, ""},
		{"for another client", []edit{asIDToken("web")}, "is an ID token of a client that Writ does not know"},
		{"for Writ and another", []edit{asIDToken(""), claim("aud", []string{"writ", "web"}), claim("azp", "writ")}, "is an ID token of a client that Writ does not know"},
		{"foreign azp", []edit{asIDToken("writ"), claim("azp", "web")}, "is an ID token of a client that Writ does not know"},
		{"of another issuer", []edit{asIDToken("writ"), of(issB, es256("ec", k.ecB))}, "is not an ID token of the issuer that was asked"},
		{"access token", nil, "is not an ID token of the issuer that was asked"},
		{"logout token", []edit{asIDToken("writ"), claim("events", map[string]any{})}, "is a security event, not an ID token"},
		{"expired", []edit{asIDToken("writ"), claim("exp", at(0))}, "is expired"},
		{"bad signature", []edit{asIDToken("writ"), by(es256("ec", k.ecB))}, noKey},
		{"no sub", []edit{asIDToken("writ"), claim("sub", absent)}, "has no usable sub"},
		{"garbage", []edit{whole(func(string) string { return "a.b" })}, notCompact},
	} {
		t.Run("Negative05/"+tt.name, func(t *testing.T) {
			claims, err := v.IDToken(t.Context(), issA, "writ", forge(tt.edits...))
			if tt.want == "" {
				if err != nil || claims["sub"] != "alice" {
					t.Errorf("IDToken = %v, %v", claims, err)
				}
				return
			}
			if err == nil || err.Error() != tt.want || claims != nil {
				t.Errorf("IDToken = %v, %v; want %q", claims, err, tt.want)
			}
		})
	}
	t.Run("own algorithms", func(t *testing.T) {
		if _, err := v.IDToken(t.Context(), issES, "crm-agent", forge(asIDToken("crm-agent"), of(issES, rs256("rsa", k.rsa)))); err != nil {
			t.Errorf("RS256, which ID tokens may have: %v", err)
		}
		if _, err := v.IDToken(t.Context(), issES, "crm-agent", forge(asIDToken("crm-agent"), of(issES, es256("ec", k.ec)))); err == nil {
			t.Error("ES256, which only access tokens may have, passed")
		}
		if _, err := callerOf(v, t.Context(), forge(of(issES, es256("ec", k.ec))), ""); err != nil {
			t.Errorf("access token by ES256: %v", err)
		}
	})
}

func TestRef(t *testing.T) {
	if got, want := (Ref{issA, "al#ice"}).String(), issA+"#al#ice"; got != want {
		t.Errorf("String = %q, want %q", got, want)
	}
	if !(Ref{}).IsZero() || (Ref{ID: "a"}).IsZero() {
		t.Error("IsZero is wrong")
	}
}

// chain is an act of so many actors, of whom the outermost is crm-agent.
func chain(n int) map[string]any {
	var act map[string]any
	for i := range n {
		next := map[string]any{"sub": "bot"}
		if i == n-1 {
			next["sub"] = "crm-agent"
		}
		if act != nil {
			next["act"] = act
		}
		act = next
	}
	return act
}
