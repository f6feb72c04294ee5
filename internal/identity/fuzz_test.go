package identity

import (
	"encoding/base64"
	"errors"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/go-jose/go-jose/v4"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/jws"
)

// FuzzParse holds what jws.Parse accepts to what the rest relies on: one spelling,
// one meaning, and the same token that go-jose sees.
func FuzzParse(f *testing.F) {
	for _, edits := range [][]edit{
		nil,
		{asIDToken("web")},
		{own("crm-agent")},
		{by(unsigned)},
		{head("crit", []string{"exp"})},
		{head("typ", "application/at+jwt")},
		{head("typ", "logout+jwt")},
		{payload(second(`"sub":"mallory"`))},
		{payload(second(`"x":{"y":[1e400,null,true]}`))},
		{claim("aud", []any{audience, 5})},
		{whole(func(s string) string { return s + "=" })},
		{whole(func(s string) string { return s + "\n" })},
		{whole(func(s string) string { return s + ".x.y" })},
		{whole(func(string) string { return `{"payload":"a.b.c"}` })},
	} {
		f.Add(forge(edits...))
	}
	f.Fuzz(func(t *testing.T, token string) {
		p, err := jws.Parse(token)
		if err == nil {
			_, err = p.Claims()
		}
		if err != nil {
			if !utf8.ValidString(err.Error()) || len(err.Error()) > 200 {
				t.Fatalf("reason %q", err)
			}
			return
		}
		if len(token) > jws.MaxSize || p.Raw != token {
			t.Fatalf("accepted %q as %+v", token, p)
		}
		parts := strings.Split(token, ".")
		for _, part := range parts {
			b, err := base64.RawURLEncoding.DecodeString(part)
			if err != nil || base64.RawURLEncoding.EncodeToString(b) != part {
				t.Fatalf("%q is not the one spelling of its bytes", part)
			}
		}
		// go-jose must not see another algorithm or other bytes than parse did.
		theirs, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{"ES256", "RS256", "none", "HS256"})
		if err != nil {
			return
		}
		if theirs.Signatures[0].Header.Algorithm != p.Algorithm {
			t.Fatalf("go-jose reads alg %q, parse %q", theirs.Signatures[0].Header.Algorithm, p.Algorithm)
		}
		if base64.RawURLEncoding.EncodeToString(theirs.UnsafePayloadWithoutVerification()) != parts[1] {
			t.Fatal("go-jose reads another payload")
		}
	})
}

// FuzzCaller signs whatever claims come and brings them as bearer or as subject_token.
// Nothing may panic, a refusal is the token's fault and tells nothing of it, and whoever
// is believed has a name.
func FuzzCaller(f *testing.F) {
	own := plain(claim("sid", absent))
	for _, edits := range [][]edit{
		nil, {asIDToken("web")}, {head("typ", "logout+jwt")}, {payload(second(`"sub":"mallory"`))}, {claim("act", chain(5))},
		{claim("act", chain(2))}, plain(), own, plain(claim("aud", "crm-agent"), claim("azp", absent)), ownNames(),
		ownNames(claim("aud", "crm-agent"), claim("scp", absent), claim("oid", absent)), platform(),
		platform(claim("azp", []any{}), claim("client_id", []any{})), svid(), svid(claim("iss", issSPIRE)), cluster(), assertion(), dialect(),
		dialect(claim("app", absent)), plain(claim("may_act", map[string]any{"sub": "crm-agent"})),
	} {
		var header, payload string
		for i, part := range strings.SplitN(forge(edits...), ".", 3)[:2] {
			b, err := base64.RawURLEncoding.DecodeString(part)
			if err != nil {
				f.Fatal(err)
			}
			if i == 0 {
				header = string(b)
			} else {
				payload = string(b)
			}
		}
		f.Add(header, payload)
	}
	v := profiles(f)
	sign := func(key signer, header, payload string) string {
		input := base64.RawURLEncoding.EncodeToString([]byte(header)) + "." + base64.RawURLEncoding.EncodeToString([]byte(payload))
		return input + "." + base64.RawURLEncoding.EncodeToString(key.sign([]byte(input)))
	}
	agent := forge(own...)
	f.Fuzz(func(t *testing.T, header, payload string) {
		key := es256("", keys().ecB)
		if strings.Contains(payload, `"`+issA+`"`) {
			key = es256("", keys().ec)
		}
		token := sign(key, header, payload)
		for _, p := range []Presented{{Token: token}, {Token: agent, Subject: token}, {Token: token, Subject: token}} {
			c, err := v.Caller(t.Context(), p)
			if err != nil {
				if f, ok := errors.AsType[*fault.Error](err); !ok || f.Code != fault.InvalidToken {
					t.Fatalf("error = %v, want an invalid_token", err)
				}
				if len(err.Error()) > 200 || !Usable(err.Error()) || strings.Contains(err.Error(), marker) {
					t.Fatalf("error = %q", err)
				}
				for part := range strings.SplitSeq(token, ".") {
					if len(part) > 8 && strings.Contains(err.Error(), part) {
						t.Fatalf("the error repeats the token: %q", err)
					}
				}
				continue
			}
			if !Usable(c.Agent.Issuer) || !Usable(c.Agent.ID) || c.User != nil && (!Usable(c.User.ID) || !Usable(c.User.Issuer) || c.User.Ref == c.Agent.Ref) {
				t.Fatalf("caller %+v of %s", c, payload)
			}
		}
		_, _ = v.Operator(t.Context(), Presented{Token: token})
		_, _ = v.Service(t.Context(), Presented{Token: token})
		_, _ = v.IDToken(t.Context(), issPlain, "writ", token)
	})
}

// FuzzEvent signs whatever claims come and brings them as a logout token and as a
// security event. Nothing may panic, a refusal tells nothing of the token, and who is
// signed out has a name at an issuer that was allowed to speak about them.
func FuzzEvent(f *testing.F) {
	user := `{"format":"iss_sub","iss":"` + issA + `","sub":"alice"}`
	for _, typ := range []string{"logout+jwt", "secevent+jwt", "JWT"} {
		for _, payload := range []string{
			`{"iss":"` + issA + `","aud":"writ","iat":1772600767,"exp":1772600800,"jti":"1","sub":"alice","events":{"` + EventLogout + `":{}}}`,
			`{"iss":"` + issA + `","aud":"writ","iat":1772600767,"exp":1772600800,"jti":"1","sid":"s","events":{"` + EventLogout + `":{}}}`,
			`{"iss":"` + issA + `","aud":"signals","iat":1772600767,"jti":"1","sub_id":` + user + `,"events":{"` + caep + `session-revoked":{}}}`,
			`{"iss":"` + issA + `","aud":"signals","iat":1772600767,"jti":"1","sub_id":{"format":"complex","user":` + user + `,"session":{"format":"opaque","id":"s"}},"events":{"` + caep + `session-revoked":{}}}`,
			`{"iss":"` + issA + `","aud":"signals","iat":1772600767,"jti":"1","events":{"` + risc + `account-disabled":{"subject":` + user + `}}}`,
			`{"iss":"` + issA + `","aud":["signals",5],"iat":1,"jti":"1","sub_id":[],"events":{"x":null}}`,
			`{"iss":"` + issA + `","events":[]}`,
		} {
			f.Add(typ, payload)
		}
	}
	v, _ := world(f)
	v.issuers[issA].OwnClients = []string{"writ"}
	v.issuers[issA].Signals = Signals{Audience: "signals", Subjects: issA}
	f.Fuzz(func(t *testing.T, typ, payload string) {
		header := render(map[string]any{"alg": "ES256", "kid": "ec", "typ": typ})
		input := base64.RawURLEncoding.EncodeToString([]byte(header)) + "." + base64.RawURLEncoding.EncodeToString([]byte(payload))
		token := input + "." + base64.RawURLEncoding.EncodeToString(es256("ec", keys().ec).sign([]byte(input)))
		check := func(o SignOut, ends bool, err error) {
			if err != nil {
				if !fault.Is(err, fault.InvalidRequest) || len(err.Error()) > 250 || strings.Contains(err.Error(), input[len(input)/2:]) {
					t.Fatalf("error = %q", err)
				}
				return
			}
			if ends && (o.User.Issuer != issA || o.User.ID == "" && o.Login == "" || !Usable(o.ID) || o.Before.IsZero() || o.Before.After(now.Add(30*time.Second))) {
				t.Fatalf("%+v of %s", o, payload)
			}
		}
		o, err := v.Logout(t.Context(), token)
		check(o, true, err)
		o, ends, err := v.SecurityEvent(t.Context(), token)
		check(o, ends, err)
	})
}
