package strictjson_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/strictjson"
)

type body struct {
	Name  string          `json:"name"`
	Count int             `json:"count"`
	List  []string        `json:"list"`
	Inner struct{ A any } `json:"inner"`
	Free  map[string]any  `json:"free"`
	Flag  bool            `json:"flag"`
	Maybe *string         `json:"maybe"`
}

func TestDecodeRefuses(t *testing.T) {
	for _, tt := range []struct{ name, in, pointer, detail string }{
		{"duplicate member", `{"name":"a","name":"b"}`, "/name", "duplicate member"},
		{"duplicate, escaped", `{"name":"a","n\u0061me":"b"}`, "/name", "duplicate member"},
		{"duplicate, nested", `{"free":{"x":{"y":1,"y":2}}}`, "/free/x/y", "duplicate member"},
		{"unknown member", `{"nome":"a"}`, "/nome", "unknown member"},
		{"unknown, by case", `{"Name":"a"}`, "/Name", "unknown member"},
		{"wrong type", `{"name":5}`, "/name", "is a number, expected a string"},
		{"string for object", `{"free":"x"}`, "/free", "is a string, expected an object"},
		{"array of wrong type", `{"list":["a",1]}`, "/list/1", "is a number, expected a string"},
		{"null string", `{"name":null}`, "/name", "is null, expected a string"},
		{"null object", `{"free":null}`, "/free", "is null, expected an object"},
		{"null array", `{"list":null}`, "/list", "is null, expected an array"},
		{"null in array", `{"list":["a",null]}`, "/list/1", "is null, expected a string"},
		{"null boolean", `{"flag":null}`, "/flag", "is null, expected a boolean"},
		{"null number", `{"count":null}`, "/count", "is null, expected a whole number"},
		{"null struct", `{"inner":null}`, "/inner", "is null, expected an object"},
		{"null pointer", `{"maybe":null}`, "/maybe", "is null, expected a string"},
		{"null itself", `null`, "", "is null, expected an object"},
		{"number for pointer", `{"maybe":1}`, "/maybe", "is a number, expected a string"},
		{"fraction for integer", `{"count":1.5}`, "/count", "expected a whole number"},
		{"over integer", `{"count":9223372036854775808}`, "/count", "expected a whole number"},
		{"trailing data", `{"name":"a"} {}`, "", "text after the end"},
		{"not an object", `[]`, "", "is an array, expected an object"},
		{"not JSON", `{"name":}`, "/name", "not JSON"},
		{"empty", ``, "", "empty or cut short"},
		{"cut", `{"name":"a"`, "", "cut short"},
		{"invalid UTF-8", "{\"name\":\"\xff\"}", "/name", "not JSON"},
		{"lone surrogate", `{"name":"\ud800"}`, "/name", "not JSON"},
		{"inexact integer", `{"free":{"amount":9007199254740993}}`, "/free/amount", "send a string"},
		{"inexact in array", `{"free":{"a":[1,0.1000000000000000055]}}`, "/free/a/1", "send a string"},
		{"overflow", `{"free":{"a":1e400}}`, "/free/a", "send a string"},
		{"underflow", `{"free":{"a":1e-999999999}}`, "/free/a", "send a string"},
		{"exponent out of reach", `{"free":{"a":0e99999999999999999999}}`, "/free/a", "send a string"},
		{"deep", `{"free":{"a":` + strings.Repeat("[", 100) + strings.Repeat("]", 100) + `}}`, "", "nested deeper"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var b body
			err := strictjson.Decode([]byte(tt.in), &b)
			f, ok := errors.AsType[*fault.Error](err)
			if !ok || f.Code != fault.InvalidRequest || len(f.Fields) != 1 {
				t.Fatalf("Decode = %v, want one invalid field", err)
			}
			if !strings.HasPrefix(f.Fields[0].Pointer, tt.pointer) || (tt.pointer != "" && f.Fields[0].Pointer != tt.pointer) {
				t.Errorf("pointer = %q, want %q", f.Fields[0].Pointer, tt.pointer)
			}
			if !strings.Contains(f.Fields[0].Detail, tt.detail) {
				t.Errorf("detail = %q, want %q in it", f.Fields[0].Detail, tt.detail)
			}
		})
	}
}

func TestDecodeKeepsFreeNulls(t *testing.T) {
	var b body
	if err := strictjson.Decode([]byte(`{"free":{"a":null,"b":[null]},"inner":{"A":null}}`), &b); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]any{"a": nil, "b": []any{nil}}, b.Free); diff != "" {
		t.Error(diff)
	}
}

func TestDecodeBoundsThePointer(t *testing.T) {
	var b body
	for name, in := range map[string]string{
		"long name":   `{"` + strings.Repeat("x", 60_000) + `":1}`,
		"long nested": `{"free":{"` + strings.Repeat("x", 60_000) + `":1e400}}`,
	} {
		f, ok := errors.AsType[*fault.Error](strictjson.Decode([]byte(in), &b))
		if !ok || len(f.Fields) != 1 || len(f.Error()) > 1000 {
			t.Errorf("%s: not refused, or repeated", name)
		}
	}
}

func TestDecodeNumbers(t *testing.T) {
	var b body
	in := `{"free":{"a":19.99,"b":1.0,"c":-0,"d":1e3,"e":9007199254740992,"f":0.10,"g":[{"h":5e-7}],"i":1E21}}`
	if err := strictjson.Decode([]byte(in), &b); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{
		"a": json.Number("19.99"), "b": json.Number("1"), "c": json.Number("0"), "d": json.Number("1000"),
		"e": json.Number("9007199254740992"), "f": json.Number("0.1"),
		"g": []any{map[string]any{"h": json.Number("5e-7")}}, "i": json.Number("1e+21"),
	}
	if diff := cmp.Diff(want, b.Free); diff != "" {
		t.Error(diff)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"name":"a","free":{"x":[1,2,{"y":null}]}}`))
	f.Add([]byte(`{"free":{"x":1e-999999999}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var b body
		if err := strictjson.Decode(data, &b); err != nil {
			if !fault.Is(err, fault.InvalidRequest) {
				t.Fatalf("%v is not an invalid request", err)
			}
			return
		}
		// What was accepted must survive a round trip unchanged, or two readers
		// could see two different things.
		out, err := json.Marshal(b.Free)
		if err != nil {
			t.Fatal(err)
		}
		var again map[string]any
		if b.Free == nil {
			return
		}
		var wrapped struct {
			Free map[string]any `json:"free"`
		}
		if err := strictjson.Decode([]byte(`{"free":`+string(out)+`}`), &wrapped); err != nil {
			t.Fatalf("%s: %v", out, err)
		}
		again = wrapped.Free
		if diff := cmp.Diff(b.Free, again); diff != "" {
			t.Fatal(diff)
		}
	})
}
