package config

import (
	"net/url"
	"regexp"
	"slices"
	"strings"
)

// templateNames are what a template of an assertion can have in it.
var templateNames = []string{"{user}", "{user_issuer}", "{agent}", "{agent_issuer}", "{session}", "{lease}"}

var placeholder = regexp.MustCompile(`\{[^{}]*\}`)

// ExpandTemplate puts values into a template, in the place of the names that
// templateNames lists. A template that is one name gives its value as it is. In any
// other, values are escaped as in a query (RFC 3986 §2.1), so that none can pass for
// another: a user can't be named so that "agent:{agent}:user:{user}" reads like somebody
// else.
func ExpandTemplate(template string, value func(name string) string) string {
	if slices.Contains(templateNames, template) {
		return value(template)
	}
	return placeholder.ReplaceAllStringFunc(template, func(name string) string {
		if slices.Contains(templateNames, name) {
			return url.QueryEscape(value(name))
		}
		return name
	})
}

// separates reports whether a text has a character that no escaped value has. Those have
// letters, digits, - _ . ~, and + and % in place of the rest.
func separates(text string) bool {
	return strings.ContainsFunc(text, func(r rune) bool {
		return r != '%' && r != '+' && url.QueryEscape(string(r)) != string(r)
	})
}

// ambiguous reports whether two names of a template are so near that the end of the one
// value can be taken for the beginning of the other.
func ambiguous(template string) bool {
	between := placeholder.Split(template, -1)
	return len(between) > 2 && slices.ContainsFunc(between[1:len(between)-1], func(text string) bool { return !separates(text) })
}
