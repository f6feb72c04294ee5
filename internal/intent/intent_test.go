package intent_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/intent"
)

func TestIntentCheck(t *testing.T) {
	for _, tt := range []struct{ name, action, purpose, pointer string }{
		{"dotted", "crm.opportunity.read", "", ""},
		{"one word", "read", "", ""},
		{"digits, dash, underscore", "s3.get-object_v2.2", "", ""},
		{"as long as may be", strings.Repeat("a", 128), "", ""},
		{"purpose as long as may be", "a", strings.Repeat("é", 2048), ""},
		{"no action", "", "", "/intent/action"},
		{"too long", strings.Repeat("a", 129), "", "/intent/action"},
		{"upper case", "crm.Read", "", "/intent/action"},
		{"digit first", "3d.print", "", "/intent/action"},
		{"dot first", ".read", "", "/intent/action"},
		{"dot last", "read.", "", "/intent/action"},
		{"two dots", "crm..read", "", "/intent/action"},
		{"space", "crm read", "", "/intent/action"},
		{"line end", "crm.read\n", "", "/intent/action"},
		{"slash", "crm/read", "", "/intent/action"},
		{"wildcard", "crm.*", "", "/intent/action"},
		{"Cyrillic", "сrm.read", "", "/intent/action"},
		{"purpose too long", "a", strings.Repeat("é", 2049), "/intent/purpose"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			checkPointer(t, intent.Intent{Action: tt.action, Purpose: tt.purpose}.Check(), tt.pointer)
		})
	}
}

func TestResourceCheck(t *testing.T) {
	type resource = intent.Resource
	for _, tt := range []struct {
		name    string
		r       resource
		pointer string
	}{
		{"plain", resource{Type: "postgres", ID: "crm"}, ""},
		{"URN as type", resource{Type: "urn:x.Y_z-1", ID: "a"}, ""},
		{"URL as id", resource{Type: "url", ID: "https://a.example/b?c=d#e"}, ""},
		{"words in other scripts", resource{Type: "doc", ID: "Angebot für Jürgen – 見積書 نص ไทย ₂"}, ""},
		{"emoji", resource{Type: "doc", ID: "🚀"}, ""},
		{"as long as may be", resource{Type: strings.Repeat("a", 128), ID: strings.Repeat("é", 256)}, ""},
		{"no type", resource{ID: "a"}, "/resource/type"},
		{"type too long", resource{Type: strings.Repeat("a", 129), ID: "a"}, "/resource/type"},
		{"type with a digit first", resource{Type: "1a", ID: "a"}, "/resource/type"},
		{"type with a space", resource{Type: "a b", ID: "a"}, "/resource/type"},
		{"type with a line end", resource{Type: "a\n", ID: "a"}, "/resource/type"},
		{"type not ASCII", resource{Type: "dоc", ID: "a"}, "/resource/type"},
		{"no id", resource{Type: "a"}, "/resource/id"},
		{"id too long", resource{Type: "a", ID: strings.Repeat("é", 256) + "a"}, "/resource/id"},
		{"id of a space", resource{Type: "a", ID: " "}, "/resource/id"},
		{"space before", resource{Type: "a", ID: " a"}, "/resource/id"},
		{"space behind", resource{Type: "a", ID: "a "}, "/resource/id"},
	} {
		t.Run(tt.name, func(t *testing.T) { checkPointer(t, tt.r.Check(), tt.pointer) })
	}
}

// TestUnreadable: no character that a person can't see, or that lets text be read
// in another way than it is, comes into an id.
func TestUnreadable(t *testing.T) {
	for name, c := range map[string]string{
		"NUL": "\x00", "tab": "\t", "line end": "\n", "carriage return": "\r", "escape": "\x1b", "DEL": "\x7f", "C1 control": "\u0085", "CSI": "\u009b",
		"soft hyphen": "\u00ad", "no-break space": "\u00a0", "ideographic space": "\u3000", "em space": "\u2003",
		"line separator": "\u2028", "paragraph separator": "\u2029",
		"zero-width space": "\u200b", "zero-width non-joiner": "\u200c", "zero-width joiner": "\u200d", "word joiner": "\u2060", "byte order mark": "\ufeff",
		"left-to-right mark": "\u200e", "right-to-left mark": "\u200f", "Arabic letter mark": "\u061c",
		"left-to-right embedding": "\u202a", "right-to-left embedding": "\u202b", "pop": "\u202c", "left-to-right override": "\u202d", "right-to-left override": "\u202e",
		"left-to-right isolate": "\u2066", "right-to-left isolate": "\u2067", "first strong isolate": "\u2068", "pop isolate": "\u2069",
		"combining grapheme joiner": "\u034f", "Hangul filler": "\u3164", "Hangul choseong filler": "\u115f", "half-width Hangul filler": "\uffa0",
		"Khmer inherent vowel": "\u17b4", "Mongolian variation selector": "\u180b", "variation selector 16": "\ufe0f", "variation selector 17": "\U000e0100",
		"tag letter": "\U000e0041", "Braille blank": "\u2800", "invisible times": "\u2062", "interlinear anchor": "\ufff9",
		"private use": "\ue000", "noncharacter": "\ufffe", "unassigned": "\u0378", "replacement character": "\ufffd", "invalid UTF-8": "\xff", "surrogate": "\xed\xa0\x80",
	} {
		t.Run(name, func(t *testing.T) {
			checkPointer(t, intent.Resource{Type: "a", ID: "pay" + c + "roll"}.Check(), "/resource/id")
		})
	}
}

func checkPointer(t *testing.T, err error, pointer string) {
	t.Helper()
	if pointer == "" {
		if err != nil {
			t.Errorf("Check = %v", err)
		}
		return
	}
	f, ok := errors.AsType[*fault.Error](err)
	if !ok || f.Code != fault.InvalidRequest || len(f.Fields) != 1 || f.Fields[0].Pointer != pointer {
		t.Errorf("Check = %v, want %s to be refused", err, pointer)
	}
}
