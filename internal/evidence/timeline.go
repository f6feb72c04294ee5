package evidence

import (
	"fmt"
	"strings"
	"unicode"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/identity"
)

// Line says in one line for people when what happened, and by whom. Texts of
// strangers are bounded and can't break out of it.
func Line(index int64, e audit.Entry) string {
	return fmt.Sprintf("%s  #%d  %s  %s", e.At.UTC().Format("2006-01-02T15:04:05.000Z"), index, who(e), what(e))
}

// who did it, or whom it concerns.
func who(e audit.Entry) string {
	switch {
	case !e.Operator.IsZero():
		return "operator " + name(e.Operator)
	case e.User.IsZero() && e.Agent.IsZero():
		return "writ"
	case e.Agent.IsZero():
		return name(e.User)
	case e.User.IsZero():
		return name(e.Agent)
	case e.User.Issuer == e.Agent.Issuer:
		return word(e.User.ID) + " via " + name(e.Agent)
	default:
		return name(e.User) + " via " + name(e.Agent)
	}
}

func name(r identity.Ref) string { return word(r.ID) + " (" + word(r.Issuer) + ")" }

// phrases say what a kind is.
var phrases = map[audit.Kind]string{
	audit.SessionOpened:       "session opened",
	audit.SessionEnded:        "session ended",
	audit.SignedOut:           "signed out by the issuer",
	audit.SignInOpened:        "sign-in opened",
	audit.SignInSignedIn:      "signed in",
	audit.SignInConsented:     "consented to the session",
	audit.SignInDeclined:      "declined the session",
	audit.SignInCompleted:     "sign-in completed",
	audit.SessionEnvelope:     "envelope changed",
	audit.DecisionAllow:       "allowed",
	audit.DecisionDeny:        "denied",
	audit.DecisionRequireCIBA: "approval required for",
	audit.DecisionReissued:    "credential issued again",
	audit.DecisionOutcome:     "outcome of the act",
	audit.ApprovalOpened:      "approval opened",
	audit.ApprovalAsking:      "approval: asking the provider",
	audit.ApprovalPrompted:    "approval: the person is asked",
	audit.ApprovalAnswered:    "approval: an answer came",
	audit.ApprovalApproved:    "approval given",
	audit.ApprovalConsumed:    "approval used",
	audit.ApprovalClosed:      "approval closed",
	audit.LeaseIntent:         "credential about to be made",
	audit.LeaseActive:         "credential made",
	audit.LeaseRenewed:        "credential made good for longer",
	audit.LeaseUsed:           "credential seen in use",
	audit.LeaseRevoking:       "credential ended, not seen to be gone yet",
	audit.LeaseRevoked:        "credential revoked",
	audit.OrphanFound:         "credential found that no lease knows",
	audit.OrphanDisarmed:      "such a credential disarmed",
	audit.OrphanGone:          "such a credential is gone",
	audit.ServiceRevoked:      "token revoked by a service",
	audit.PolicyActivated:     "policy activated",
	audit.PolicyRefused:       "policy refused",
	audit.OperatorRevoked:     "kill switch pulled",
	audit.RevocationGone:      "all that a kill switch ended is gone",
	audit.RevocationLifted:    "freeze lifted",
	audit.OperatorRead:        "evidence read",
	audit.OperatorRefused:     "request refused",
	audit.KeyAdded:            "key added",
	audit.KeysRewrapped:       "keys put under another root key",
	audit.LogOpened:           "log begun",
	audit.LogRestored:         "log goes on after a restore from backup",
	audit.LogPruned:           "older entries archived",
}

// told are the details that a line has, in this order.
var told = []struct {
	label string
	path  []string
}{
	{"outcome", []string{"outcome"}}, {"by", []string{"by"}}, {"code", []string{"code"}},
	{"state", []string{"state"}}, {"reason", []string{"reason"}}, {"why", []string{"why"}}, {"error", []string{"error"}},
	{"task", []string{"task", "text"}}, {"source", []string{"task", "source"}}, {"purpose", []string{"purpose"}}, {"message", []string{"message"}},
	{"approver", []string{"approver", "sub"}}, {"acr", []string{"acr"}},
	{"minter", []string{"minter"}}, {"scope", []string{"scope"}}, {"service", []string{"service"}}, {"active", []string{"active"}},
	{"count", []string{"count"}}, {"replaces", []string{"replaces"}}, {"path", []string{"path"}}, {"policy", []string{"policy", "revision"}},
	{"sessions", []string{"sessions"}}, {"leases", []string{"leases"}}, {"key", []string{"key"}}, {"origin", []string{"origin"}},
	{"revocation", []string{"revocation"}}, {"value", []string{"value"}}, {"frozen", []string{"frozen"}},
	{"name", []string{"name"}}, {"since", []string{"since"}}, {"last seen gone", []string{"last_gone_at"}},
	{"below", []string{"below"}}, {"file", []string{"file"}}, {"sha256", []string{"sha256"}},
}

func what(e audit.Entry) string {
	var b strings.Builder
	if phrase, known := phrases[e.Kind]; known {
		b.WriteString(phrase)
	} else {
		b.WriteString(word(string(e.Kind)))
	}
	if action := quoted(e, "action"); action != "" {
		b.WriteString(" " + action)
	}
	if kind := quoted(e, "resource", "type"); kind != "" {
		b.WriteString(" on " + kind + " " + quoted(e, "resource", "id"))
	}
	if codes := reasons(e); len(codes) > 0 {
		b.WriteString("; reasons " + strings.Join(codes, ", "))
	}
	for _, t := range told {
		if text := quoted(e, t.path...); text != "" {
			fmt.Fprintf(&b, "; %s %s", t.label, text)
		}
	}
	for _, id := range []string{e.Session, e.Decision, e.Approval, e.Lease} { // which is which shows in them
		if id != "" {
			b.WriteString("; " + word(id))
		}
	}
	return b.String()
}

// part returns a part of an entry's detail, nil where there is none.
func part(e audit.Entry, path ...string) any {
	var v any = e.Detail
	for _, name := range path {
		m, ok := v.(map[string]any)
		if !ok {
			return nil
		}
		v = m[name]
	}
	return v
}

// detail returns a part as text, "" where there is none.
func detail(e audit.Entry, path ...string) string {
	switch v := part(e, path...).(type) {
	case nil:
		return ""
	case string:
		return clean(v)
	default:
		text, err := JSON(v)
		if err != nil {
			return ""
		}
		return clean(string(text))
	}
}

// quoted is detail, for a line.
func quoted(e audit.Entry, path ...string) string {
	if s, ok := part(e, path...).(string); ok {
		return word(s)
	}
	return detail(e, path...)
}

// reasons are the codes of a decision's.
func reasons(e audit.Entry) (codes []string) {
	list, _ := e.Detail["reasons"].([]any)
	for _, r := range list {
		if m, ok := r.(map[string]any); ok {
			if code, ok := m["code"].(string); ok {
				codes = append(codes, word(code))
			}
		}
	}
	return codes
}

// word quotes a text that could be taken for more than one.
func word(s string) string {
	s = clean(s)
	plain := func(r rune) bool {
		return unicode.IsLetter(r) || unicode.IsDigit(r) || strings.ContainsRune("._:/@#+*-…", r)
	}
	if s == "" || strings.IndexFunc(s, func(r rune) bool { return !plain(r) }) < 0 {
		return s
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
}

// maxText bounds a text within a line, in characters.
const maxText = 200

// clean keeps a stranger's text within its line, and a terminal from obeying it.
func clean(s string) string {
	var b strings.Builder
	n := 0
	for _, r := range s {
		if n++; n > maxText {
			b.WriteRune('…')
			break
		}
		if !unicode.IsGraphic(r) {
			r = '·'
		}
		b.WriteRune(r)
	}
	return b.String()
}
