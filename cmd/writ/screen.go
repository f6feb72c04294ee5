package main

import (
	"fmt"
	"os"
	"strings"
	"text/tabwriter"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/identity"
)

// screen writes the demo for people; colours only on a terminal.
type screen struct {
	out                      *os.File
	bold, dim, good, bad, no string
}

func newScreen(out *os.File) *screen {
	s := &screen{out: out}
	if st, err := out.Stat(); err == nil && st.Mode()&os.ModeCharDevice != 0 && os.Getenv("NO_COLOR") == "" {
		s.bold, s.dim, s.good, s.bad, s.no = "\033[1m", "\033[2m", "\033[32m", "\033[31m", "\033[0m"
	}
	return s
}

func (s *screen) title(text string) { fmt.Fprintf(s.out, "%s%s%s\n\n", s.bold, text, s.no) }

func (s *screen) begin(letter rune, scene string) {
	fmt.Fprintf(s.out, "%s(%c) %s%s\n", s.bold, letter, scene, s.no)
}

func (s *screen) note(text string) { fmt.Fprintf(s.out, "\n%s%s%s\n", s.dim, text, s.no) }

func (s *screen) aside(text string) { fmt.Fprintf(s.out, "          %s%s%s\n", s.dim, text, s.no) }

func (s *screen) outcome(came string, err error) {
	if err != nil {
		fmt.Fprintf(s.out, "    %sFAIL%s  %v\n", s.bad, s.no, err)
		return
	}
	fmt.Fprintf(s.out, "    %sok%s    %s\n", s.good, s.no, came)
}

// rowsShown are enough to see what an entry is like.
const rowsShown = 24

// table shows the last audit entries, one line each, and the head that commits to all.
func (s *screen) table(letter rune, entries []audit.Sequenced, head audit.Head) error {
	fmt.Fprintf(s.out, "\n%s(%c) What Writ wrote down, each entry in the transaction of what it records:%s\n", s.bold, letter, s.no)
	w := tabwriter.NewWriter(s.out, 0, 0, 2, ' ', 0)
	if earlier := len(entries) - rowsShown; earlier > 0 {
		fmt.Fprintf(s.out, "%s… %d entries before%s\n", s.dim, earlier, s.no)
		entries = entries[earlier:]
	}
	for _, sequenced := range entries {
		e, err := audit.ParseRecord(sequenced.Record)
		if err != nil {
			return err
		}
		fmt.Fprintf(w, "%d\t%s\t%s\t%s\n", sequenced.Index, e.Kind, who(e), what(e))
	}
	_ = w.Flush() // a screen that is gone shows nothing
	fmt.Fprintf(s.out, "\n%sThe signed head of the Merkle tree over them; altering any would change its third line:%s\n%s", s.dim, s.no, head.Checkpoint)
	fmt.Fprintf(s.out, "\n%sNext: writ dev (in the checkout, make dev) runs the same parts for you to call.%s\n", s.dim, s.no)
	return nil
}

func who(e audit.Entry) string {
	var names []string
	for _, r := range []identity.Ref{e.User, e.Agent, e.Operator} {
		if r.ID != "" {
			names = append(names, r.ID)
		}
	}
	return strings.Join(names, " / ")
}

// what picks the detail that tells the most.
func what(e audit.Entry) string {
	d := e.Detail
	if action, ok := d["action"].(string); ok {
		text := action
		if r, ok := d["resource"].(map[string]any); ok {
			text += fmt.Sprintf(" %v", r["id"])
		}
		if reasons, ok := d["reasons"].([]any); ok && len(reasons) > 0 {
			if r, ok := reasons[0].(map[string]any); ok {
				text += fmt.Sprintf(" (%v)", r["code"])
			}
		}
		return text
	}
	if scope, ok := d["scope"].(map[string]any); ok {
		if groups, ok := scope["groups"]; ok {
			return fmt.Sprint("groups ", groups, ", tenant ", scope["tenant"])
		}
		return fmt.Sprint("scope ", scope["scopes"])
	}
	for _, key := range []string{"outcome", "service", "origin", "message", "reason", "state", "acr", "provider"} {
		if v, ok := d[key].(string); ok && v != "" {
			return v
		}
	}
	if p, ok := d["policy"].(map[string]any); ok {
		return fmt.Sprint("revision ", p["revision"])
	}
	return ""
}
