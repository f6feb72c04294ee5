// Package vectors runs Wycheproof's JSON Web Signatures through what Writ verifies
// tokens with. It is a module of its own, so that the vectors are no dependency of Writ.
package vectors

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"slices"
	"testing"

	"github.com/c2sp/wycheproof"

	"github.com/writsec/writ/internal/jws"
)

// Reasons to refuse what the file calls valid.
const (
	symmetric = "HS256: whoever can verify could sign as well, so Writ never verifies it"
	otherAlg  = "the key is published for another algorithm than the token's (RFC 7517 §4.4); RFC 7520 calls its figures by names that its key lacks"
	spelling  = "a character that base64url has not; the file wants it skipped, and then a token has many spellings"
)

// stricter lists every vector that Writ refuses and the file calls valid. There is
// none that Writ accepts and the file calls invalid.
var stricter = map[int]string{
	1: symmetric, 348: symmetric, 352: symmetric, 357: symmetric, 358: symmetric, 359: symmetric, 376: symmetric, 377: symmetric,
	346: otherAlg, 347: otherAlg, 350: otherAlg, 351: otherAlg,
	372: spelling, 373: spelling,
}

// joseAccepts lists the invalid vectors that go-jose by itself lets pass, as reference
// of what package jws adds.
var joseAccepts = map[string][]int{
	"a PSS salt that is not as long as the hash":     {281, 282, 283, 284, 285, 286},
	"another algorithm than the key's":               {332, 334, 336, 338, 340},
	"a key for encryption, by its use or by key_ops": {353, 354, 355, 356},
}

type file struct {
	NumberOfTests int
	TestGroups    []struct {
		Comment         string
		Public, Private json.RawMessage
		Tests           []vector
	}
}

type vector struct {
	ID      int `json:"tcId"`
	Comment string
	JWS     json.RawMessage
	Result  string // valid or invalid
}

// token is the vector in compact form, or its JSON as it is.
func (v vector) token() string {
	var compact string
	if json.Unmarshal(v.JWS, &compact) == nil {
		return compact
	}
	return string(v.JWS)
}

func TestJSONWebSignatures(t *testing.T) {
	data, err := fs.ReadFile(wycheproof.TestVectors, "json_web_signature_test.json")
	if err != nil {
		t.Fatal(err)
	}
	var f file
	if err := json.Unmarshal(data, &f); err != nil {
		t.Fatal(err)
	}
	var valid, invalid, accepted int
	refused := map[int]bool{}
	for _, g := range f.TestGroups {
		key := g.Public
		if key == nil { // symmetric
			key = g.Private
		}
		keys, err := jws.ParseKeys(fmt.Appendf(nil, `{"keys":[%s]}`, key))
		if err != nil {
			t.Fatalf("%s: %v", g.Comment, err)
		}
		for _, v := range g.Tests {
			want, ok := v.Result == "valid", false
			if token, err := jws.Parse(v.token()); err == nil {
				ok, _ = keys.Verify(token, jws.Algorithms)
			}
			reason, differs := stricter[v.ID]
			switch {
			case ok && !want:
				t.Errorf("%d (%s, %s) is accepted, and must not be", v.ID, g.Comment, v.Comment)
			case ok && differs:
				t.Errorf("%d (%s, %s) is accepted, and must not be: %s", v.ID, g.Comment, v.Comment, reason)
			case !ok && want && !differs:
				t.Errorf("%d (%s, %s) is refused, and must not be", v.ID, g.Comment, v.Comment)
			}
			if want {
				valid++
			} else {
				invalid++
				refused[v.ID] = !ok
			}
			if ok {
				accepted++
			}
		}
	}
	got := [...]int{f.NumberOfTests, invalid, valid, accepted}
	if want := [...]int{401, 355, 46, 46 - len(stricter)}; got != want || len(stricter) != 14 {
		t.Errorf("vectors, invalid, valid, accepted = %v, want %v", got, want)
	}
	listed := 0
	for what, ids := range joseAccepts {
		listed += len(ids)
		if slices.ContainsFunc(ids, func(id int) bool { return !refused[id] }) {
			t.Errorf("%s: one of %v is not refused", what, ids)
		}
	}
	if listed != 15 {
		t.Errorf("%d vectors that go-jose accepts are listed, want 15", listed)
	}
}
