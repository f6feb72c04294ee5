package config

import (
	"bytes"
	"cmp"
	"encoding"
	"errors"
	"fmt"
	"io"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// Error is one thing that is wrong in a configuration file.
type Error struct {
	File string
	Line int    // of the key or, when that is missing, of what it is missing in; 0 for the whole file
	Key  string // dotted path, such as issuers[0].audience
	Text string
}

func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.File)
	if e.Line > 0 {
		fmt.Fprintf(&b, ":%d", e.Line)
	}
	if e.Key != "" {
		b.WriteString(": " + e.Key)
	}
	return b.String() + ": " + e.Text
}

// decoder fills a struct from a YAML tree. The yaml package's own strict mode
// names the line but neither the key nor what was expected.
type decoder struct {
	file  string
	lines map[string]int // key → line, for errors found after decoding
	errs  []*Error

	undecoded int // how many of errs were found while decoding
}

func (d *decoder) fail(line int, key, format string, args ...any) {
	d.errs = append(d.errs, &Error{File: d.file, Line: line, Key: key, Text: fmt.Sprintf(format, args...)})
}

// failKey reports an error at the line where key, or the nearest parent of it,
// stands. What could not be decoded has been reported already.
func (d *decoder) failKey(key, format string, args ...any) {
	for _, e := range d.errs[:d.undecoded] {
		rest, within := strings.CutPrefix(key, e.Key)
		if within && (rest == "" || rest[0] == '.' || rest[0] == '[') {
			return
		}
	}
	at := key
	for at != "" && d.lines[at] == 0 {
		at = at[:max(strings.LastIndexAny(at, ".["), 0)]
	}
	d.fail(d.lines[at], key, format, args...)
}

// err joins all errors in the order of their lines.
func (d *decoder) err() error {
	slices.SortStableFunc(d.errs, func(a, b *Error) int { return cmp.Compare(a.Line, b.Line) })
	var errs []error
	for _, e := range d.errs {
		errs = append(errs, e)
	}
	return errors.Join(errs...)
}

// decode reports whether the file is a tree at all, so that its values can be checked.
func (d *decoder) decode(data []byte, v any) bool {
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc, next yaml.Node
	err := dec.Decode(&doc)
	if err == nil {
		if err = dec.Decode(&next); err == nil {
			d.fail(next.Line, "", "holds a second YAML document, expected one")
			return false
		}
	}
	switch {
	case !errors.Is(err, io.EOF):
		line, text := syntaxError(err)
		d.fail(line, "", "is not YAML: %s", text)
		return false
	case len(doc.Content) == 0:
		d.fail(0, "", "is empty, expected a configuration such as docs/config.example.yaml")
		return false
	}
	d.value(doc.Content[0], "", reflect.ValueOf(v).Elem())
	d.undecoded = len(d.errs)
	return doc.Content[0].Kind == yaml.MappingNode
}

var yamlLine = regexp.MustCompile(`^line (\d+): `)

// syntaxError takes the line out of the yaml package's message.
func syntaxError(err error) (line int, text string) {
	text = strings.TrimPrefix(err.Error(), "yaml: ")
	if m := yamlLine.FindStringSubmatch(text); m != nil {
		line, _ = strconv.Atoi(m[1])
		text = text[len(m[0]):]
	}
	return line, text
}

// defaulter sets defaults that Default can't, being inside a list or a map.
type defaulter interface{ setDefaults() }

var textUnmarshaler = reflect.TypeFor[encoding.TextUnmarshaler]()

func (d *decoder) value(n *yaml.Node, key string, v reflect.Value) {
	if n.Kind == yaml.AliasNode {
		d.fail(n.Line, key, "is an alias; write the value out")
		return
	}
	d.lines[key] = n.Line
	if v.CanAddr() {
		if e, ok := v.Addr().Interface().(defaulter); ok {
			e.setDefaults()
		}
	}
	switch {
	case v.Type() == reflect.TypeFor[time.Duration]():
		dur, err := time.ParseDuration(n.Value)
		if n.Kind != yaml.ScalarNode || err != nil {
			d.wrongType(n, key, `a duration such as "30s" or "5m"`)
			return
		}
		v.SetInt(int64(dur))
	case v.CanAddr() && v.Addr().Type().Implements(textUnmarshaler):
		if n.Kind != yaml.ScalarNode {
			d.wrongType(n, key, "a string")
			return
		}
		if err := v.Addr().Interface().(encoding.TextUnmarshaler).UnmarshalText([]byte(n.Value)); err != nil {
			d.fail(n.Line, key, "%v", err)
		}
	case v.Kind() == reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		d.value(n, key, v.Elem())
	case v.Kind() == reflect.Struct:
		d.structure(n, key, v)
	case v.Kind() == reflect.Map:
		d.mapping(n, key, v)
	case v.Kind() == reflect.Slice:
		if n.Kind != yaml.SequenceNode {
			d.wrongType(n, key, "a list")
			return
		}
		v.Set(reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content)))
		for i, c := range n.Content {
			d.value(c, fmt.Sprintf("%s[%d]", key, i), v.Index(i))
		}
	default:
		d.scalar(n, key, v)
	}
}

func (d *decoder) scalar(n *yaml.Node, key string, v reflect.Value) {
	switch v.Kind() {
	case reflect.String:
		// A bare 5 or true where text belongs is usually a slip.
		if n.Kind != yaml.ScalarNode || n.Tag != "!!str" {
			d.wrongType(n, key, "a string")
			return
		}
		v.SetString(n.Value)
	case reflect.Bool:
		b, err := strconv.ParseBool(n.Value)
		if n.Tag != "!!bool" || err != nil {
			d.wrongType(n, key, "true or false")
			return
		}
		v.SetBool(b)
	case reflect.Int:
		i, err := strconv.ParseInt(n.Value, 10, 0)
		// 010 is eight to some readers, ten to others.
		if n.Tag != "!!int" || err != nil || strconv.FormatInt(i, 10) != n.Value {
			d.wrongType(n, key, "a whole number")
			return
		}
		v.SetInt(i)
	default:
		panic("config: no rule for a field of type " + v.Type().String())
	}
}

func (d *decoder) structure(n *yaml.Node, key string, v reflect.Value) {
	if n.Kind != yaml.MappingNode {
		d.wrongType(n, key, "a mapping")
		return
	}
	fields := map[string]reflect.Value{}
	var names []string
	for i := range v.NumField() {
		name := v.Type().Field(i).Tag.Get("yaml")
		fields[name] = v.Field(i)
		names = append(names, name)
	}
	slices.Sort(names)
	d.each(n, key, func(k, c *yaml.Node, path string) {
		f, ok := fields[k.Value]
		if !ok {
			d.fail(k.Line, path, "unknown key, expected one of: %s", strings.Join(names, ", "))
			return
		}
		d.value(c, path, f)
	})
}

func (d *decoder) mapping(n *yaml.Node, key string, v reflect.Value) {
	if n.Kind != yaml.MappingNode {
		d.wrongType(n, key, "a mapping")
		return
	}
	v.Set(reflect.MakeMap(v.Type()))
	d.each(n, key, func(k, c *yaml.Node, path string) {
		e := reflect.New(v.Type().Elem()).Elem()
		d.value(c, path, e)
		v.SetMapIndex(reflect.ValueOf(k.Value), e)
	})
}

func (d *decoder) each(n *yaml.Node, key string, f func(k, v *yaml.Node, path string)) {
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k := n.Content[i]
		if k.Kind != yaml.ScalarNode || k.Tag != "!!str" {
			d.fail(k.Line, key, "has a key that is not a plain word")
			continue
		}
		path := k.Value
		if key != "" {
			path = key + "." + k.Value
		}
		if line, dup := seen[k.Value]; dup {
			d.fail(k.Line, path, "stands a second time; first on line %d", line)
			continue
		}
		seen[k.Value] = k.Line
		f(k, n.Content[i+1], path)
	}
}

func (d *decoder) wrongType(n *yaml.Node, key, want string) {
	got := map[yaml.Kind]string{yaml.MappingNode: "a mapping", yaml.SequenceNode: "a list"}[n.Kind]
	switch {
	case got != "":
	case n.Tag == "!!null":
		got = "nothing"
	case n.Tag == "!!str" && (want == "a list" || want == "a mapping"):
		got = "a string"
	case n.Tag == "!!str":
		got = fmt.Sprintf("%q", clip(n.Value))
	default:
		got = clip(n.Value)
	}
	d.fail(n.Line, key, "is %s, expected %s", got, want)
}

// clip keeps a message readable.
func clip(s string) string {
	const most = 40
	if r := []rune(s); len(r) > most {
		return string(r[:most]) + "…"
	}
	return s
}
