// Package strictjson reads JSON from strangers. It refuses whatever two readers
// could understand differently: duplicate members, unknown members, a null where
// any other type is due, a number in the place of a string, invalid UTF-8, text
// after the value, and numbers that have no exact canonical form.
package strictjson

import (
	stdjson "encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/writsec/writ/internal/fault"
)

// maxDepth bounds nesting, so that no reader behind this one has to recurse
// deeper than that.
const maxDepth = 64

var unmarshalers = json.JoinUnmarshalers(
	json.UnmarshalFromFunc(func(dec *jsontext.Decoder, v *any) error {
		if dec.StackDepth() > maxDepth {
			return fmt.Errorf("nested deeper than %d levels", maxDepth)
		}
		if dec.PeekKind() != '0' {
			return errors.ErrUnsupported
		}
		raw, err := dec.ReadValue()
		if err != nil {
			return err
		}
		n, err := exactNumber(raw)
		if err != nil {
			return err
		}
		*v = n
		return nil
	}),
	json.UnmarshalFromFunc(refuseNull),
)

// refuseNull keeps null from silently meaning the zero value. A member that has
// no value is left out. It sees a pointer to every value but those of type any,
// which the function before it took.
func refuseNull(dec *jsontext.Decoder, v any) error {
	if _, free := v.(*any); free || dec.PeekKind() != 'n' {
		return errors.ErrUnsupported
	}
	return fmt.Errorf("is null, expected %s; leave the member out instead", article(typeName(reflect.TypeOf(v).Elem())))
}

// Decode reads exactly one JSON value into v, which must be a pointer to a
// struct. Members of type any hold nil, bool, string, encoding/json.Number (in
// canonical form), []any and map[string]any. The error is a fault.InvalidRequest
// that points at the first thing that is wrong.
func Decode(data []byte, v any) error {
	err := json.Unmarshal(data, v, json.RejectUnknownMembers(true), json.WithUnmarshalers(unmarshalers))
	if err == nil {
		return nil
	}
	pointer, detail := explain(err)
	f := fault.Invalid(shorten(pointer), "%s", detail)
	f.Detail = "the body is not valid"
	return f
}

// maxPointer bounds what of a stranger's member names is repeated to them and to
// the log.
const maxPointer = 512

// shorten makes an overlong pointer one to an enclosing value.
func shorten(pointer string) string {
	if len(pointer) <= maxPointer {
		return pointer
	}
	return pointer[:strings.LastIndexByte(pointer[:maxPointer], '/')]
}

// Object reads one JSON object of any members, as strictly as Decode but for
// numbers, which may be of any form: tokens come from issuers that know nothing
// of canonical numbers.
func Object(data []byte) (map[string]any, error) {
	var m map[string]any
	loose := json.UnmarshalFromFunc(func(dec *jsontext.Decoder, v *any) error {
		if dec.StackDepth() > maxDepth {
			return fmt.Errorf("nested deeper than %d levels", maxDepth)
		}
		if dec.PeekKind() != '0' {
			return errors.ErrUnsupported
		}
		raw, err := dec.ReadValue()
		if err != nil {
			return err
		}
		*v = stdjson.Number(raw)
		return nil
	})
	if err := json.Unmarshal(data, &m, json.WithUnmarshalers(loose)); err != nil {
		_, detail := explain(err)
		return nil, errors.New(detail)
	}
	if m == nil {
		return nil, errors.New("is null, expected an object")
	}
	return m, nil
}

// explain turns a decoder's error into a JSON pointer and a sentence. The
// offending value itself is left out: it may be a token.
func explain(err error) (pointer, detail string) {
	if syn, ok := errors.AsType[*jsontext.SyntacticError](err); ok {
		pointer = string(syn.JSONPointer)
		switch {
		case errors.Is(syn.Err, io.ErrUnexpectedEOF):
			return pointer, "the body is empty or cut short"
		case errors.Is(syn.Err, jsontext.ErrDuplicateName):
			return pointer, "duplicate member"
		case strings.Contains(syn.Err.Error(), "after top-level value"):
			return pointer, "text after the end of the JSON value"
		}
		return pointer, fmt.Sprintf("not JSON: %v (at byte %d)", syn.Err, syn.ByteOffset)
	}
	if sem, ok := errors.AsType[*json.SemanticError](err); ok {
		pointer = string(sem.JSONPointer)
		switch {
		case errors.Is(sem.Err, json.ErrUnknownName):
			return pointer, "unknown member"
		case sem.Err != nil && sem.JSONKind == 0:
			return pointer, sem.Err.Error()
		case sem.GoType != nil && sem.JSONKind != 0:
			return pointer, fmt.Sprintf("is %s, expected %s", article(kindName(sem.JSONKind)), article(typeName(sem.GoType)))
		case sem.Err != nil:
			return pointer, sem.Err.Error()
		}
	}
	return "", "not JSON"
}

func kindName(k jsontext.Kind) string {
	switch k {
	case 'n':
		return "null"
	case 't', 'f':
		return "boolean"
	case '"':
		return "string"
	case '0':
		return "number"
	case '{':
		return "object"
	case '[':
		return "array"
	}
	return "value"
}

func typeName(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Pointer:
		return typeName(t.Elem())
	case reflect.Struct, reflect.Map:
		return "object"
	case reflect.Slice:
		return "array"
	case reflect.Bool:
		return "boolean"
	case reflect.String:
		return "string"
	default:
		return "whole number"
	}
}

func article(noun string) string {
	switch noun {
	case "null":
		return noun
	case "object", "array":
		return "an " + noun
	}
	return "a " + noun
}
