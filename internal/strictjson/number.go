package strictjson

import (
	"encoding/json"
	"errors"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json/jsontext"
)

var errInexact = errors.New(`is not exactly representable as an IEEE 754 double; send a string`)

// exactNumber returns the RFC 8785 form of a JSON number and refuses a number
// whose canonical form denotes another one. Two different numbers therefore
// never have the same canonical form, which is what an intent hash needs: 19.99
// passes, 9007199254740993 (canonically …992) does not. See
// docs/decisions/0002-exact-numbers.md.
func exactNumber(raw []byte) (json.Number, error) {
	f, err := strconv.ParseFloat(string(raw), 64)
	if err != nil {
		return "", errInexact
	}
	canonical := jsontext.Value(strconv.AppendFloat(nil, f, 'g', -1, 64))
	if err := canonical.Canonicalize(); err != nil {
		return "", errInexact
	}
	want, ok := parseDecimal(string(raw))
	if !ok {
		return "", errInexact
	}
	got, ok := parseDecimal(string(canonical))
	if !ok || got != want {
		return "", errInexact
	}
	return json.Number(canonical), nil
}

// decimal is a number as sign × 0.digits × 10^exp, without superfluous zeros, so
// that equal numbers are equal values. It is compared as text because arithmetic
// on "1e-999999999" would take the exponent's size in memory.
type decimal struct {
	negative bool
	digits   string
	exp      int
}

func parseDecimal(s string) (decimal, bool) {
	var d decimal
	s, d.negative = strings.CutPrefix(s, "-")
	if i := strings.IndexAny(s, "eE"); i >= 0 {
		exp, err := strconv.Atoi(s[i+1:])
		if err != nil {
			return d, false
		}
		d.exp, s = exp, s[:i]
	}
	whole, fraction, _ := strings.Cut(s, ".")
	d.exp += len(whole)
	digits := whole + fraction
	trimmed := strings.TrimLeft(digits, "0")
	d.exp -= len(digits) - len(trimmed)
	d.digits = strings.TrimRight(trimmed, "0")
	if d.digits == "" {
		return decimal{}, true // zero has neither sign nor exponent
	}
	return d, true
}
