package policy

import (
	"encoding/json"
	"fmt"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/writsec/writ/internal/identity"
)

// Claims that were parsed before are the same input.
func TestParsedClaims(t *testing.T) {
	in := Input{User: identity.Principal{Ref: identity.Ref{Issuer: "i", ID: "u"}, Claims: someClaims()}}
	plain, err := ast.InterfaceToValue(in.evaluable())
	if err != nil {
		t.Fatal(err)
	}
	in.User.Parsed = ParseClaims(in.User.Claims)
	parsed, err := ast.InterfaceToValue(in.evaluable())
	if err != nil {
		t.Fatal(err)
	}
	if plain.Compare(parsed) != 0 {
		t.Errorf("%v\n%v", plain, parsed)
	}
	if _, isValue := in.Document()["user"].(map[string]any)["claims"].(ast.Value); isValue {
		t.Error("what is kept of the input must be JSON")
	}
}

func someClaims() map[string]any {
	claims := map[string]any{"groups": []any{"sales", "emea"}, "n": json.Number("12"), "null": nil, "o": map[string]any{"a": true}}
	for i := range 20 {
		claims[fmt.Sprintf("claim_%d", i)] = "some text of the usual length"
	}
	return claims
}

func BenchmarkInput(b *testing.B) {
	in := Input{User: identity.Principal{Ref: identity.Ref{Issuer: "i", ID: "u"}, Claims: someClaims()}}
	for _, parsed := range []bool{false, true} {
		if parsed {
			in.User.Parsed = ParseClaims(in.User.Claims)
		}
		b.Run(fmt.Sprintf("parsed=%v", parsed), func(b *testing.B) {
			for b.Loop() {
				if _, err := ast.InterfaceToValue(in.evaluable()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
