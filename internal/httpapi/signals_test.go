package httpapi_test

import (
	"crypto/rand"
	"encoding/json"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/go-jose/go-jose/v4"

	"github.com/writsec/writ/internal/dev"
)

const (
	caep = "https://schemas.openid.net/secevent/caep/event-type/"
	risc = "https://schemas.openid.net/secevent/risc/event-type/"
)

func init() {
	openapi3filter.RegisterBodyDecoder("application/secevent+jwt", openapi3filter.FileBodyDecoder)
}

// signed is a token of the provider, of any kind; a member that is nil is left out.
func signed(t *testing.T, typ string, claims, changes obj) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: idpKey}, (&jose.SignerOptions{}).WithType(jose.ContentType(typ)))
	if err != nil {
		t.Fatal(err)
	}
	for name, v := range changes {
		claims[name] = v
		if v == nil {
			delete(claims, name)
		}
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	token, err := jws.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	w.secret(token, "a token that a test signed")
	return token
}

// loggedIn is a user's token through sales-agent, of one login, issued a while ago.
func loggedIn(t *testing.T, user, sid string) string {
	t.Helper()
	now := time.Now()
	return signed(t, "at+jwt", obj{
		"iss": w.dev.IDP.Issuer(), "aud": dev.Audience, "sub": user, "client_id": "sales-agent", "jti": rand.Text(), "sid": sid,
		"iat": now.Add(-10 * time.Second).Unix(), "exp": now.Add(time.Minute).Unix(), "groups": []string{"sales"},
	}, nil)
}

// serviceToken is an access token of the provider.
func serviceToken(t *testing.T, claims obj) string {
	t.Helper()
	now := time.Now()
	return signed(t, "at+jwt", obj{
		"iss": w.dev.IDP.Issuer(), "aud": dev.Audience, "jti": rand.Text(), "iat": now.Unix(), "exp": now.Add(time.Minute).Unix(),
	}, claims)
}

func logoutClaims(sub, sid string) obj {
	now := time.Now()
	claims := obj{
		"iss": w.dev.IDP.Issuer(), "aud": "writ", "iat": now.Unix(), "exp": now.Add(2 * time.Minute).Unix(), "jti": rand.Text(),
		"events": obj{"http://schemas.openid.net/event/backchannel-logout": obj{}},
	}
	if sub != "" {
		claims["sub"] = sub
	}
	if sid != "" {
		claims["sid"] = sid
	}
	return claims
}

func logout(t *testing.T, token string, bad bool) answer {
	t.Helper()
	return call{method: "POST", path: "/backchannel-logout", body: url.Values{"logout_token": {token}}, loose: bad}.send(t)
}

func eventClaims(event string, subject obj) obj {
	return obj{
		"iss": w.dev.IDP.Issuer(), "aud": dev.Audience, "iat": time.Now().Unix(), "jti": rand.Text(), "sub_id": subject,
		"events": obj{event: obj{"event_timestamp": time.Now().Unix()}},
	}
}

func signal(t *testing.T, token string, bad bool) answer {
	t.Helper()
	return call{
		method: "POST", path: "/signals", body: []byte(token), loose: bad,
		header: http.Header{"Content-Type": {"application/secevent+jwt"}},
	}.send(t)
}

func issSub(sub string) obj {
	return obj{"format": "iss_sub", "iss": w.dev.IDP.Issuer(), "sub": sub}
}

// TestNegative09SignedOut: a token that was good, and is in the cache, is refused from
// the sign-out of its subject on.
func TestNegative09SignedOut(t *testing.T) {
	for name, c := range map[string]struct {
		send func(t *testing.T, user, login string) answer
		want int // the answer's status
		both bool
	}{
		"logout of a login": {func(t *testing.T, _, login string) answer {
			return logout(t, signed(t, "logout+jwt", logoutClaims("", login), nil), false)
		}, 200, false},
		"logout of a login of a user": {func(t *testing.T, user, login string) answer {
			return logout(t, signed(t, "logout+jwt", logoutClaims(user, login), nil), false)
		}, 200, false},
		"logout of a user": {func(t *testing.T, user, login string) answer {
			return logout(t, signed(t, "logout+jwt", logoutClaims(user, ""), nil), false)
		}, 200, true},
		"session-revoked of a session": {func(t *testing.T, user, login string) answer {
			return signal(t, signed(t, "secevent+jwt", eventClaims(caep+"session-revoked", obj{
				"format": "complex", "user": issSub(user), "session": obj{"format": "opaque", "id": login},
			}), nil), false)
		}, 202, false},
		"session-revoked of a user": {func(t *testing.T, user, login string) answer {
			return signal(t, signed(t, "secevent+jwt", eventClaims(caep+"session-revoked", issSub(user)), nil), false)
		}, 202, true},
		"credential-change": {func(t *testing.T, user, login string) answer {
			return signal(t, signed(t, "secevent+jwt", eventClaims(caep+"credential-change", issSub(user)), nil), false)
		}, 202, true},
		"account-disabled": {func(t *testing.T, user, login string) answer {
			return signal(t, signed(t, "secevent+jwt", eventClaims(risc+"account-disabled", issSub(user)), nil), false)
		}, 202, true},
		"account-disabled, subject inside": {func(t *testing.T, user, login string) answer {
			c := eventClaims(risc+"account-disabled", nil)
			c["events"] = obj{risc + "account-disabled": obj{"subject": issSub(user)}}
			return signal(t, signed(t, "secevent+jwt", c, obj{"sub_id": nil}), false)
		}, 202, true},
	} {
		t.Run(name, func(t *testing.T) {
			user := "user-" + rand.Text()
			login := "login-" + rand.Text()
			one, two := loggedIn(t, user, login), loggedIn(t, user, login+"-two")
			sessionOne, sessionTwo := open(t, one), open(t, two)
			lease := decide(t, one, read(sessionOne)).decided(t, "allow", "").str("credential", "lease")
			if got := c.send(t, user, login); got.status != c.want {
				t.Fatalf("%d %s", got.status, got.raw)
			}
			// The agent still sees its session by its own name, and it is over.
			fresh := loggedIn2(t, user)
			if got := get(t, fresh, "/sessions/"+sessionOne); got.str("status") != "ended" || got.str("end_reason") != "the user was signed out" {
				t.Errorf("%s", got.raw)
			}
			if got := (call{method: "DELETE", path: "/leases/" + lease, token: fresh}).send(t); got.str("end_reason") != "session_ended" {
				t.Errorf("%s", got.raw)
			}
			for _, path := range []string{"/decide", "/sessions"} {
				body := any(obj{})
				if path == "/decide" {
					body = read(sessionOne)
				}
				got := call{method: "POST", path: path, token: one, body: body}.send(t)
				got.refused(t, 401, "invalid_token", "-")
				if !strings.Contains(got.str("detail"), "signed out") {
					t.Errorf("%s: %s", path, got.raw)
				}
			}
			got := decideAny(t, two, sessionTwo)
			if c.both {
				got.refused(t, 401, "invalid_token", "-")
			} else {
				got.decided(t, "allow", "")
			}
			// Who signs in again is believed again.
			decide(t, fresh, read(open(t, fresh))).decided(t, "allow", "")
		})
	}
}

// loggedIn2 is a token of the same user and a new login, from after any sign-out.
func loggedIn2(t *testing.T, user string) string {
	t.Helper()
	now := time.Now()
	return signed(t, "at+jwt", obj{
		"iss": w.dev.IDP.Issuer(), "aud": dev.Audience, "sub": user, "client_id": "sales-agent", "jti": rand.Text(), "sid": "login-3",
		"iat": now.Add(2 * time.Second).Unix(), "exp": now.Add(time.Minute).Unix(), "groups": []string{"sales"},
	}, nil)
}

func decideAny(t *testing.T, token, session string) answer {
	t.Helper()
	return call{method: "POST", path: "/decide", token: token, body: read(session)}.send(t)
}

// TestSignOutTwice: a repetition is heard and changes nothing, also when the user has
// signed in since; what Writ does not act on is heard as well.
func TestSignOutTwice(t *testing.T) {
	user := "user-" + rand.Text()
	event := signed(t, "secevent+jwt", eventClaims(caep+"session-revoked", issSub(user)), nil)
	if got := signal(t, event, false); got.status != 202 {
		t.Fatalf("%s", got.raw)
	}
	fresh := loggedIn2(t, user)
	session := open(t, fresh)
	if got := signal(t, event, false); got.status != 202 {
		t.Fatalf("%s", got.raw)
	}
	decide(t, fresh, read(session)).decided(t, "allow", "")
	for _, event := range []string{caep + "assurance-level-change", "https://schemas.openid.net/secevent/ssf/event-type/verification", "x"} {
		if got := signal(t, signed(t, "secevent+jwt", eventClaims(event, issSub(user)), nil), false); got.status != 202 {
			t.Errorf("%s: %s", event, got.raw)
		}
	}
	decide(t, fresh, read(session)).decided(t, "allow", "")
}

// TestBadEvents: nobody but the issuer ends anything, and nothing that it signed for
// another use passes for an event.
func TestBadEvents(t *testing.T) {
	user := "user-" + rand.Text()
	bearer := loggedIn(t, user, "login-"+user)
	session := open(t, bearer)
	revoked := caep + "session-revoked"
	past, future := time.Now().Add(-8*24*time.Hour).Unix(), time.Now().Add(time.Hour).Unix()
	for name, c := range map[string]struct {
		typ     string
		changes obj
		want    string
	}{
		"an access token":          {"at+jwt", nil, "typ logout+jwt"},
		"a security event":         {"secevent+jwt", nil, "typ logout+jwt"},
		"a nonce":                  {"logout+jwt", obj{"nonce": "n"}, "nonce"},
		"another audience":         {"logout+jwt", obj{"aud": "sales-agent"}, "Writ's client"},
		"no audience":              {"logout+jwt", obj{"aud": nil}, "Writ's client"},
		"no events":                {"logout+jwt", obj{"events": nil}, "logout event"},
		"another event":            {"logout+jwt", obj{"events": obj{revoked: obj{}}}, "logout event"},
		"two events":               {"logout+jwt", obj{"events": obj{revoked: obj{}, "http://schemas.openid.net/event/backchannel-logout": obj{}}}, "logout event"},
		"an event that is a text":  {"logout+jwt", obj{"events": obj{"http://schemas.openid.net/event/backchannel-logout": "x"}}, "logout event"},
		"nobody":                   {"logout+jwt", obj{"sub": nil, "sid": nil}, "sub or sid"},
		"a sub that is a list":     {"logout+jwt", obj{"sub": []string{user}, "sid": nil}, "sub or sid"},
		"a sub with a line end":    {"logout+jwt", obj{"sub": user + "\n"}, "sub or sid"},
		"no jti":                   {"logout+jwt", obj{"jti": nil}, "jti"},
		"no iat":                   {"logout+jwt", obj{"iat": nil}, "iat"},
		"no exp":                   {"logout+jwt", obj{"exp": nil}, "exp"},
		"expired":                  {"logout+jwt", obj{"exp": time.Now().Add(-time.Second).Unix()}, "expired"},
		"of the future":            {"logout+jwt", obj{"iat": future, "exp": future + 60}, "future"},
		"of an unknown issuer":     {"logout+jwt", obj{"iss": "https://evil.example"}, "does not know"},
		"an ID token of that user": {"JWT", obj{"events": nil}, "logout event"},
	} {
		t.Run("logout/"+name, func(t *testing.T) {
			got := logout(t, signed(t, c.typ, logoutClaims(user, "login-"+user), c.changes), true)
			got.refused(t, 400, "invalid_request", "-")
			if !strings.Contains(got.str("detail"), c.want) {
				t.Errorf("%s", got.raw)
			}
		})
	}
	for name, c := range map[string]struct {
		typ     string
		changes obj
		want    string
	}{
		"a logout token":             {"logout+jwt", nil, "typ secevent+jwt"},
		"no typ to speak of":         {"JWT", nil, "typ secevent+jwt"},
		"another audience":           {"secevent+jwt", obj{"aud": "writ"}, "not meant for"},
		"no iat":                     {"secevent+jwt", obj{"iat": nil}, "iat"},
		"of long ago":                {"secevent+jwt", obj{"iat": past}, "older"},
		"of the future":              {"secevent+jwt", obj{"iat": future}, "future"},
		"no jti":                     {"secevent+jwt", obj{"jti": nil}, "jti"},
		"no events":                  {"secevent+jwt", obj{"events": nil}, "exactly one"},
		"two events":                 {"secevent+jwt", obj{"events": obj{revoked: obj{}, risc + "account-disabled": obj{}}}, "exactly one"},
		"an event that is no object": {"secevent+jwt", obj{"events": obj{revoked: 1}}, "not an object"},
		"no subject":                 {"secevent+jwt", obj{"sub_id": nil}, "no usable subject"},
		"a subject by mail":          {"secevent+jwt", obj{"sub_id": obj{"format": "email", "email": "a@b.example"}}, "iss_sub"},
		"a subject of another":       {"secevent+jwt", obj{"sub_id": obj{"format": "iss_sub", "iss": "https://other.example", "sub": user}}, "may not speak about"},
		"a session of no form":       {"secevent+jwt", obj{"sub_id": obj{"format": "complex", "session": obj{"format": "x", "id": "y"}}}, "opaque"},
		"an account of no name": {"secevent+jwt", obj{
			"events": obj{risc + "account-disabled": obj{}}, "sub_id": obj{"format": "complex", "session": obj{"format": "opaque", "id": "login-1"}},
		}, "names no account"},
		"of an unknown issuer": {"secevent+jwt", obj{"iss": "https://evil.example"}, "does not know"},
	} {
		t.Run("signal/"+name, func(t *testing.T) {
			got := signal(t, signed(t, c.typ, eventClaims(revoked, issSub(user)), c.changes), true)
			got.refused(t, 400, "invalid_request", "-")
			if !strings.Contains(got.str("detail"), c.want) {
				t.Errorf("%s", got.raw)
			}
		})
	}
	good := signed(t, "secevent+jwt", eventClaims(revoked, issSub(user)), nil)
	forged := good[:strings.LastIndex(good, ".")+1] + strings.Repeat("A", 86)
	signal(t, forged, true).refused(t, 400, "invalid_request", "-")
	signal(t, "", true).refused(t, 400, "invalid_request", "-")
	signal(t, strings.Repeat("a", 20<<10), true).refused(t, 400, "invalid_request", "-")
	signal(t, strings.Repeat("a", 65<<10), true).refused(t, 413, "body_too_large", "-")
	call{method: "POST", path: "/backchannel-logout", body: url.Values{"x": {strings.Repeat("a", 65<<10)}}, loose: true}.send(t).refused(t, 413, "body_too_large", "-")
	call{method: "POST", path: "/backchannel-logout", body: url.Values{"logout_token": {"a", "b"}}, loose: true}.send(t).refused(t, 400, "invalid_request", "logout_token")
	call{method: "POST", path: "/signals", body: []byte(good), invalid: true}.send(t).refused(t, 415, "unsupported_media_type", "-")
	call{method: "POST", path: "/backchannel-logout", body: "{}", invalid: true}.send(t).refused(t, 415, "unsupported_media_type", "-")

	decide(t, bearer, read(session)).decided(t, "allow", "") // none of it did anything
}

// workload is a token of a user through a client of its own, of a login if there is one.
func workload(t *testing.T, user, client, sid string, issued time.Duration) string {
	t.Helper()
	at := time.Now().Add(issued)
	claims := obj{
		"iss": w.dev.IDP.Issuer(), "aud": dev.Audience, "sub": user, "client_id": client, "jti": rand.Text(),
		"iat": at.Unix(), "exp": at.Add(time.Minute).Unix(),
	}
	if sid != "" {
		claims["sid"] = sid
	}
	return signed(t, "at+jwt", claims, nil)
}

// TestAgentSignedOut: accounts can be agents', too, and their users' tokens don't make
// up for it.
func TestAgentSignedOut(t *testing.T) {
	agent := "agent-" + rand.Text()
	old := workload(t, "alice", agent, "", -10*time.Second)
	session := open(t, old)
	if got := signal(t, signed(t, "secevent+jwt", eventClaims(risc+"account-disabled", issSub(agent)), nil), false); got.status != 202 {
		t.Fatalf("%s", got.raw)
	}
	call{method: "POST", path: "/sessions", token: old, body: obj{}}.send(t).refused(t, 401, "invalid_token", "-")
	decideAny(t, old, session).refused(t, 401, "invalid_token", "-")
	fresh := workload(t, "alice", agent, "", 2*time.Second)
	if got := get(t, fresh, "/sessions/"+session); got.str("status") != "ended" {
		t.Errorf("%s", got.raw)
	}
	open(t, fresh)
}

// TestSignOutOfALoginThatTokensDoNotName: where access tokens have no sid, a logout of
// one login of a user ends all that might be of it.
func TestSignOutOfALoginThatTokensDoNotName(t *testing.T) {
	user := "user-" + rand.Text()
	nameless, other := workload(t, user, "sales-agent", "", -10*time.Second), workload(t, user, "sales-agent", user+"-2", -10*time.Second)
	session, another := open(t, nameless), open(t, other)
	if got := logout(t, signed(t, "logout+jwt", logoutClaims(user, user+"-1"), nil), false); got.status != 200 {
		t.Fatalf("%s", got.raw)
	}
	decideAny(t, nameless, session).refused(t, 401, "invalid_token", "-")
	if got := get(t, other, "/sessions/"+another); got.str("status") != "active" {
		t.Errorf("another login's: %s", got.raw)
	}
}
