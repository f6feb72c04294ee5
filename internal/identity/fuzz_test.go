package identity

import (
	"encoding/base64"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/go-jose/go-jose/v4"

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
