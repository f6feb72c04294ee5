// Package intent is what an agent says it wants to do, and the hash that binds an
// approval and a credential to exactly that.
package intent

import (
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/writsec/writ/internal/fault"
)

// Intent is the act that an agent declares. All of it is the agent's claim.
type Intent struct {
	// Action is dotted, such as crm.opportunity.read.
	Action string `json:"action"`
	// Parameters of the action; numbers are canonical json.Number.
	Parameters map[string]any `json:"parameters,omitempty"`
	// Purpose is for people and the log. It is attacker-influenced text and never
	// part of the hash.
	Purpose string `json:"purpose,omitempty"`
}

// Resource is what the act is done to, in AuthZEN's shape.
type Resource struct {
	Type       string         `json:"type"`
	ID         string         `json:"id"`
	Properties map[string]any `json:"properties,omitempty"`
}

// Reserved is how the actions begin that only Writ itself asks policy about.
const Reserved = "writ."

const (
	maxName    = 128
	maxID      = 512
	maxPurpose = 2048
)

var (
	actionPattern = regexp.MustCompile(`^[a-z][a-z0-9_-]*(\.[a-z0-9_-]+)*$`)
	typePattern   = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_.:-]*$`)
)

// Check holds the intent to its grammar.
func (i Intent) Check() error {
	switch {
	case i.Action == "":
		return fault.Invalid("/intent/action", "is missing")
	case len(i.Action) > maxName || !actionPattern.MatchString(i.Action):
		return fault.Invalid("/intent/action", "expected dotted lower-case words, such as crm.opportunity.read, of at most %d characters", maxName)
	case utf8.RuneCountInString(i.Purpose) > maxPurpose:
		return fault.Invalid("/intent/purpose", "is longer than %d characters", maxPurpose)
	}
	return nil
}

// Check holds the resource to its grammar. Characters that are invisible or
// change how text is read are refused: a person may have to recognise the id.
func (r Resource) Check() error {
	switch {
	case r.Type == "":
		return fault.Invalid("/resource/type", "is missing")
	case len(r.Type) > maxName || !typePattern.MatchString(r.Type):
		return fault.Invalid("/resource/type", "expected letters, digits and _.:- starting with a letter, at most %d characters", maxName)
	case r.ID == "":
		return fault.Invalid("/resource/id", "is missing")
	case len(r.ID) > maxID || strings.ContainsFunc(r.ID, unreadable) || strings.TrimSpace(r.ID) != r.ID:
		return fault.Invalid("/resource/id", "expected at most %d bytes of visible text, without space around it", maxID)
	}
	return nil
}

// unreadable says that a character leaves no trace on a screen, or moves others.
// Some of these count as letters or marks: fillers, joiners, variation selectors.
func unreadable(c rune) bool {
	const brailleBlank = '\u2800'
	return c == utf8.RuneError || c == brailleBlank || !unicode.IsPrint(c) ||
		unicode.In(c, unicode.Other_Default_Ignorable_Code_Point, unicode.Variation_Selector)
}
