package intent_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"math/big"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/intent"
	"github.com/writsec/writ/internal/strictjson"
)

func act() intent.Act {
	return intent.Act{
		User:    identity.Ref{Issuer: "https://idp.example", ID: "alice"},
		Agent:   identity.Ref{Issuer: "https://idp.example", ID: "crm-agent"},
		Session: "ses_0",
		Intent: intent.Intent{
			Action:     "crm.opportunity.read",
			Parameters: map[string]any{"quarter": "Q3", "limit": json.Number("10"), "tags": []any{"a", nil, true}},
			Purpose:    "Summarise the pipeline",
		},
		Resource: intent.Resource{Type: "postgres", ID: "crm", Properties: map[string]any{"tables": []any{"opportunities"}}},
		Context:  map[string]any{"channel": "chat"},
	}
}

func hash(t testing.TB, a intent.Act) string {
	t.Helper()
	h, err := a.Hash()
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// TestHashVectors fixes the hash by the very bytes that go into it. Approvals and
// tokens out in the world carry it: a change needs another v.
func TestHashVectors(t *testing.T) {
	unicode := act()
	unicode.Resource.ID = "Angebot <für> 見積書 🚀 \u2028"
	unicode.Intent.Parameters = map[string]any{"\ufb33": json.Number("1"), "\U0001f600": json.Number("2"), "é": json.Number("3"), "e\u0301": json.Number("4")}
	numbers := act()
	numbers.Intent.Parameters = map[string]any{"a": json.Number("19.99"), "b": json.Number("9007199254740992"), "c": json.Number("1e+21"), "d": json.Number("5e-7"), "e": json.Number("0"), "f": json.Number("-1.5")}
	for _, tt := range []struct {
		name      string
		act       intent.Act
		canonical string
		want      string
	}{
		{
			"usual", act(),
			`{"action":"crm.opportunity.read","agent":{"iss":"https://idp.example","sub":"crm-agent"},"context":{"channel":"chat"},"parameters":{"limit":10,"quarter":"Q3","tags":["a",null,true]},"resource":{"id":"crm","properties":{"tables":["opportunities"]},"type":"postgres"},"session":"ses_0","user":{"iss":"https://idp.example","sub":"alice"},"v":1}`,
			"sha256:550d70db133131377f8352b1eab9f62c284c3d2e894ac5e58e3086d22cc759fe",
		},
		{
			"nothing", intent.Act{},
			`{"action":"","agent":{"iss":"","sub":""},"context":{},"parameters":{},"resource":{"id":"","properties":{},"type":""},"session":"","user":{"iss":"","sub":""},"v":1}`,
			"sha256:e24a06af8a259a6e583cb42d0bdf7a6a8627d15711114251a090a4147aed7763",
		},
		{
			// RFC 8785 §3.2.3 sorts by UTF-16, where the emoji comes before U+FB33.
			"Unicode", unicode,
			`{"action":"crm.opportunity.read","agent":{"iss":"https://idp.example","sub":"crm-agent"},"context":{"channel":"chat"},"parameters":{"` + "e\u0301" + `":4,"é":3,"` + "\U0001f600" + `":2,"` + "\ufb33" + `":1},"resource":{"id":"Angebot <für> 見積書 🚀 ` + "\u2028" + `","properties":{"tables":["opportunities"]},"type":"postgres"},"session":"ses_0","user":{"iss":"https://idp.example","sub":"alice"},"v":1}`,
			"sha256:176b9f5d9e8d4159c27700e1d89c6f1a86b6864085ad9e9f1be0b129846b6c49",
		},
		{
			"numbers", numbers,
			`{"action":"crm.opportunity.read","agent":{"iss":"https://idp.example","sub":"crm-agent"},"context":{"channel":"chat"},"parameters":{"a":19.99,"b":9007199254740992,"c":1e+21,"d":5e-7,"e":0,"f":-1.5},"resource":{"id":"crm","properties":{"tables":["opportunities"]},"type":"postgres"},"session":"ses_0","user":{"iss":"https://idp.example","sub":"alice"},"v":1}`,
			"sha256:1e75657fe673082cf896d880e086c10d7402f4fadcb266619003daf6cd74d2d1",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := hash(t, tt.act)
			sum := sha256.Sum256([]byte(tt.canonical))
			if of := "sha256:" + hex.EncodeToString(sum[:]); got != of {
				t.Errorf("Hash = %s, but its canonical form has %s", got, of)
			}
			if got != tt.want {
				t.Errorf("Hash = %s, want %s", got, tt.want)
			}
		})
	}
}

func TestAbsentIsEmpty(t *testing.T) {
	absent, empty := act(), act()
	absent.Intent.Parameters, absent.Resource.Properties, absent.Context = nil, nil, nil
	empty.Intent.Parameters, empty.Resource.Properties, empty.Context = map[string]any{}, map[string]any{}, map[string]any{}
	if hash(t, absent) != hash(t, empty) {
		t.Error("leaving a member out is another act than sending {}")
	}
	null := act()
	null.Intent.Parameters = map[string]any{"a": nil}
	if hash(t, null) == hash(t, empty) {
		t.Error("a member that is null is the same as none")
	}
}

func TestPurposeIsNotInTheHash(t *testing.T) {
	a := act()
	a.Intent.Purpose = "something else"
	if hash(t, a) != hash(t, act()) {
		t.Error("rewording the purpose makes another act")
	}
}

// TestEveryMemberCounts changes one member at a time; two members never make up
// for each other.
func TestEveryMemberCounts(t *testing.T) {
	seen := map[string]string{hash(t, act()): "nothing"}
	for name, change := range map[string]func(*intent.Act){
		"user":                   func(a *intent.Act) { a.User.ID = "bob" },
		"user's issuer":          func(a *intent.Act) { a.User.Issuer = "https://other.example" },
		"agent":                  func(a *intent.Act) { a.Agent.ID = "hr-agent" },
		"agent's issuer":         func(a *intent.Act) { a.Agent.Issuer = "https://other.example" },
		"user and agent swapped": func(a *intent.Act) { a.User, a.Agent = a.Agent, a.User },
		"session":                func(a *intent.Act) { a.Session = "ses_1" },
		"action":                 func(a *intent.Act) { a.Intent.Action = "crm.opportunity.update" },
		"resource type":          func(a *intent.Act) { a.Resource.Type = "mysql" },
		"resource id":            func(a *intent.Act) { a.Resource.ID = "hr" },
		"type and id swapped":    func(a *intent.Act) { a.Resource.Type, a.Resource.ID = a.Resource.ID, a.Resource.Type },
		"property":               func(a *intent.Act) { a.Resource.Properties["tables"] = []any{"accounts"} },
		"property more":          func(a *intent.Act) { a.Resource.Properties["x"] = "y" },
		"property's shape":       func(a *intent.Act) { a.Resource.Properties["tables"] = "opportunities" },
		"parameter":              func(a *intent.Act) { a.Intent.Parameters["quarter"] = "Q4" },
		"parameter more":         func(a *intent.Act) { a.Intent.Parameters["x"] = nil },
		"parameter less":         func(a *intent.Act) { delete(a.Intent.Parameters, "quarter") },
		"number":                 func(a *intent.Act) { a.Intent.Parameters["limit"] = json.Number("11") },
		"number as text":         func(a *intent.Act) { a.Intent.Parameters["limit"] = "10" },
		"order in a list":        func(a *intent.Act) { a.Intent.Parameters["tags"] = []any{nil, "a", true} },
		"context":                func(a *intent.Act) { a.Context["channel"] = "mail" },
		"context in parameters":  func(a *intent.Act) { a.Intent.Parameters["channel"], a.Context = "chat", nil },
		"composed and decomposed": func(a *intent.Act) {
			a.Resource.ID = "caf\u00e9"
		},
		"decomposed": func(a *intent.Act) { a.Resource.ID = "cafe\u0301" },
	} {
		a := act()
		change(&a)
		h := hash(t, a)
		if other, dup := seen[h]; dup {
			t.Errorf("changing %s makes the same act as changing %s", name, other)
		}
		seen[h] = name
	}
	// The list above is worth little if a field is new.
	for typ, n := range map[reflect.Type]int{
		reflect.TypeFor[intent.Act](): 6, reflect.TypeFor[intent.Intent](): 3, reflect.TypeFor[intent.Resource](): 3, reflect.TypeFor[identity.Ref](): 2,
	} {
		if typ.NumField() != n {
			t.Errorf("%v has %d fields; is the new one in the hash and in this test?", typ, typ.NumField())
		}
	}
}

// TestHashRefuses what would be changed on its way into the hash.
func TestHashRefuses(t *testing.T) {
	for name, v := range map[string]any{
		"inexact number":         json.Number("9007199254740993"),
		"another spelling":       json.Number("1.0"),
		"not a number":           json.Number("x"),
		"a string as a number":   json.Number(`"1"`),
		"empty number":           json.Number(""),
		"overflow":               json.Number("1e400"),
		"float64":                1.5,
		"int64":                  int64(1)<<53 + 1,
		"NaN":                    math.NaN(),
		"invalid UTF-8":          "\xff",
		"invalid UTF-8 in a key": map[string]any{"\xff": "x"},
		"deep":                   []any{map[string]any{"a": []any{json.Number("1.0")}}},
		"struct":                 struct{ A string }{"x"},
		"raw JSON":               json.RawMessage("1"),
	} {
		t.Run(name, func(t *testing.T) {
			for _, a := range []intent.Act{
				{Context: map[string]any{"x": v}},
				{Intent: intent.Intent{Parameters: map[string]any{"x": v}}},
				{Resource: intent.Resource{Properties: map[string]any{"x": v}}},
			} {
				if h, err := a.Hash(); err == nil {
					t.Errorf("Hash = %s, want an error", h)
				}
			}
		})
	}
	if h, err := (intent.Act{User: identity.Ref{ID: "\xff"}}).Hash(); err == nil {
		t.Errorf("user not UTF-8: Hash = %s, want an error", h)
	}
}

// The properties below start from text, as requests do: JSON in any spelling,
// through strictjson, into the hash.

// value draws a JSON value as nil, bool, string, *big.Rat (a number that is an
// IEEE double), []any or map[string]any: what it means, apart from its spelling.
func value(depth int) *rapid.Generator[any] {
	return rapid.Custom(func(t *rapid.T) any {
		kinds := 5
		if depth == 0 {
			kinds = 3
		}
		switch rapid.IntRange(0, kinds).Draw(t, "kind") {
		case 0:
			return rapid.SampledFrom([]any{nil, true, false}).Draw(t, "literal")
		case 1:
			return text().Draw(t, "string")
		case 2, 3:
			return number().Draw(t, "number")
		case 4:
			return rapid.SliceOfN(value(depth-1), 0, 3).Draw(t, "list")
		default:
			return object(depth-1).Draw(t, "object")
		}
	})
}

func object(depth int) *rapid.Generator[map[string]any] {
	return rapid.MapOfN(text(), value(depth), 0, 3)
}

func text() *rapid.Generator[string] {
	return rapid.OneOf(
		rapid.SampledFrom([]string{"", "a", "b", "1", "true", "null", "é", "e\u0301", "\u2028", "<", "\"", "\\", "\x00", "\U0001f600", "\ufb33", "{}"}),
		rapid.StringN(0, 4, -1),
	)
}

func number() *rapid.Generator[*big.Rat] {
	return rapid.Custom(func(t *rapid.T) *big.Rat {
		f := rapid.OneOf(
			rapid.SampledFrom([]float64{0, 1, -1, 0.5, 1e21, 1e-7, 9007199254740992, -9007199254740992, 123456789, 1e20}),
			rapid.Map(rapid.Int64Range(-1<<53, 1<<53), func(i int64) float64 { return float64(i) }),
			rapid.Map(rapid.Int64Range(-1<<20, 1<<20), func(i int64) float64 { return float64(i) / 64 }),
		).Draw(t, "float")
		r, _ := new(big.Rat).SetString(strconv.FormatFloat(f, 'g', -1, 64))
		return r
	})
}

// spell writes a value as JSON in some spelling of many.
func spell(t *rapid.T, v any) string {
	space := func() string { return rapid.SampledFrom([]string{"", "", " ", "\n\t"}).Draw(t, "space") }
	switch v := v.(type) {
	case nil:
		return "null"
	case bool:
		return strconv.FormatBool(v)
	case string:
		return spellString(t, v)
	case *big.Rat:
		return spellNumber(t, v)
	case []any:
		var parts []string
		for _, e := range v {
			parts = append(parts, space()+spell(t, e)+space())
		}
		return "[" + strings.Join(parts, ",") + "]"
	case map[string]any:
		names := rapid.Permutation(slices.Sorted(maps.Keys(v))).Draw(t, "order")
		var parts []string
		for _, name := range names {
			parts = append(parts, space()+spellString(t, name)+space()+":"+space()+spell(t, v[name]))
		}
		return "{" + strings.Join(parts, ",") + space() + "}"
	}
	panic(fmt.Sprintf("%T", v))
}

func spellString(t *rapid.T, s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		escape := r < 0x20 || r == '"' || r == '\\' || rapid.Bool().Draw(t, "escape")
		switch {
		case !escape:
			b.WriteRune(r)
		case r > 0xffff:
			r -= 0x10000
			fmt.Fprintf(&b, `\u%04X\u%04x`, 0xd800+r>>10, 0xdc00+r&0x3ff)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
	}
	b.WriteByte('"')
	return b.String()
}

func spellNumber(t *rapid.T, r *big.Rat) string {
	plain := r.FloatString(30)
	plain = strings.TrimRight(plain, "0")
	whole, fraction, _ := strings.Cut(plain, ".")
	switch rapid.IntRange(0, 3).Draw(t, "spelling") {
	case 0: // as it is, perhaps with zeros behind
		zeros := strings.Repeat("0", rapid.IntRange(0, 3).Draw(t, "zeros"))
		if fraction+zeros == "" {
			return whole
		}
		return whole + "." + fraction + zeros
	case 1: // with an exponent of nothing
		s := whole
		if fraction != "" {
			s += "." + fraction
		}
		return s + rapid.SampledFrom([]string{"e0", "E+00", "e-0"}).Draw(t, "exponent")
	case 2: // all digits before an exponent
		sign := ""
		if strings.HasPrefix(whole, "-") {
			sign, whole = "-", whole[1:]
		}
		digits := strings.TrimLeft(whole+fraction, "0")
		if digits == "" {
			return sign + "0"
		}
		return fmt.Sprintf("%s%se-%d", sign, digits, len(fraction))
	default:
		f, _ := r.Float64()
		return strconv.FormatFloat(f, 'e', -1, 64)
	}
}

// same compares what two values mean.
func same(a, b any) bool {
	switch a := a.(type) {
	case *big.Rat:
		r, ok := b.(*big.Rat)
		return ok && a.Cmp(r) == 0
	case []any:
		l, ok := b.([]any)
		return ok && slices.EqualFunc(a, l, same)
	case map[string]any:
		m, ok := b.(map[string]any)
		return ok && maps.EqualFunc(a, m, same)
	}
	if _, list := b.([]any); list {
		return false
	}
	if _, object := b.(map[string]any); object {
		return false
	}
	return a == b
}

// meaning is an act before it is spelled.
type meaning struct {
	names                           [8]string
	parameters, properties, context map[string]any
}

func drawMeaning(t *rapid.T) meaning {
	var m meaning
	for i := range m.names {
		m.names[i] = rapid.SampledFrom([]string{"", "a", "b", "ab", "é", "e\u0301"}).Draw(t, "name")
	}
	m.parameters, m.properties, m.context = object(2).Draw(t, "parameters"), object(1).Draw(t, "properties"), object(1).Draw(t, "context")
	return m
}

func (m meaning) equal(o meaning) bool {
	return m.names == o.names && same(m.parameters, o.parameters) && same(m.properties, o.properties) && same(m.context, o.context)
}

// hash spells the act, reads it as a request is read, and hashes it.
func (m meaning) hash(t *rapid.T) string {
	var body struct {
		Parameters map[string]any `json:"parameters"`
		Properties map[string]any `json:"properties"`
		Context    map[string]any `json:"context"`
		Purpose    string         `json:"purpose"`
	}
	whole := spell(t, map[string]any{
		"parameters": m.parameters, "properties": m.properties, "context": m.context, "purpose": text().Draw(t, "purpose"),
	})
	if err := strictjson.Decode([]byte(whole), &body); err != nil {
		t.Fatalf("%s: %v", whole, err)
	}
	h, err := intent.Act{
		User: identity.Ref{Issuer: m.names[0], ID: m.names[1]}, Agent: identity.Ref{Issuer: m.names[2], ID: m.names[3]},
		Session:  m.names[4],
		Intent:   intent.Intent{Action: m.names[5], Parameters: body.Parameters, Purpose: body.Purpose},
		Resource: intent.Resource{Type: m.names[6], ID: m.names[7], Properties: body.Properties},
		Context:  body.Context,
	}.Hash()
	if err != nil {
		t.Fatalf("%s: %v", whole, err)
	}
	return h
}

// TestSameActSameHash: order of members, spelling of numbers and strings, space
// and purpose make no difference.
func TestSameActSameHash(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := drawMeaning(t)
		if a, b := m.hash(t), m.hash(t); a != b {
			t.Fatalf("%v has the hashes %s and %s", m, a, b)
		}
	})
}

// TestOtherActOtherHash: the second act is often close to the first, where a
// confusion would be.
func TestOtherActOtherHash(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a := drawMeaning(t)
		b := a
		switch rapid.IntRange(0, 5).Draw(t, "change") {
		case 0:
			b.names[rapid.IntRange(0, 7).Draw(t, "which")] = text().Draw(t, "name")
		case 1:
			i, j := rapid.IntRange(0, 7).Draw(t, "i"), rapid.IntRange(0, 7).Draw(t, "j")
			b.names[i], b.names[j] = b.names[j], b.names[i]
		case 2:
			b.parameters = changed(t, a.parameters)
		case 3:
			b.context = changed(t, a.context)
		case 4:
			b.parameters, b.context, b.properties = a.context, a.properties, a.parameters
		default:
			b = drawMeaning(t)
		}
		if equal := a.equal(b); equal != (a.hash(t) == b.hash(t)) {
			t.Fatalf("%v\n%v\nare the same: %v, but have the same hash: %v", a, b, equal, !equal)
		}
	})
}

func changed(t *rapid.T, m map[string]any) map[string]any {
	m = maps.Clone(m)
	if len(m) > 0 && rapid.Bool().Draw(t, "change one") {
		m[rapid.SampledFrom(slices.Sorted(maps.Keys(m))).Draw(t, "which")] = value(1).Draw(t, "other")
		return m
	}
	m[text().Draw(t, "name")] = value(1).Draw(t, "more")
	return m
}
