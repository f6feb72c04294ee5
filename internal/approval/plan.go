package approval

import (
	"crypto/rand"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/intent"
	"github.com/writsec/writ/internal/policy"
)

// Display says from whom and how fully the approver learns the act.
const (
	DisplayFull    = "full"    // every parameter, from the provider or Writ itself
	DisplaySummary = "summary" // action and resource, in the binding message
	DisplayCode    = "code"    // only the short code
)

// ApproverUser is the one approver there is so far: the user the agent acts for.
const ApproverUser = "user"

// Refusal is why an ask cannot be put to anyone: the reason of a deny.
type Refusal struct{ Code, Message string }

// Limits is what a provider can show (CIBA Core §7.1, binding_message).
type Limits struct {
	MaxLength int
	// Portable allows letters, digits and +._#- only; otherwise printable ASCII.
	Portable bool
}

var portable = regexp.MustCompile(`^[A-Za-z0-9+._#-]+$`)

// fits reports whether the provider can show the text as it stands. Nothing is
// ever replaced to make it fit: the person would compare another text.
func (l Limits) fits(s string) bool {
	if len(s) > l.MaxLength {
		return false
	}
	if l.Portable {
		return portable.MatchString(s)
	}
	return !strings.ContainsFunc(s, func(r rune) bool { return r < 0x20 || r > 0x7e })
}

// message writes what the person sees, and says how much that is: policy's words
// for the act, where they fit, then action and resource. The agent's purpose is
// never in it, nor a resource id that could be read as another part of
// the message.
func (l Limits) message(act intent.Act, words, code string) (text, display string) {
	r := act.Resource
	var candidates []string
	switch {
	case l.Portable && !strings.Contains(r.ID, "#"):
		candidates = []string{
			strings.Join([]string{act.Intent.Action, r.Type, r.ID, code}, "#"),
			strings.Join([]string{act.Intent.Action, r.ID, code}, "#"),
		}
	case !l.Portable && !strings.Contains(r.ID, `"`):
		full := fmt.Sprintf(`%s on %s "%s"`, act.Intent.Action, r.Type, r.ID)
		if words != "" && !strings.ContainsAny(words, "[]") { // which would blur where they end
			candidates = append(candidates, fmt.Sprintf(`%s [%s] (code %s)`, words, full, code))
			if strings.HasPrefix(act.Intent.Action, intent.Reserved) { // Writ's own words for it say nothing to a person
				candidates[0] = fmt.Sprintf(`%s (code %s)`, words, code)
			}
		}
		candidates = append(candidates,
			fmt.Sprintf(`%s (code %s)`, full, code),
			fmt.Sprintf(`%s on "%s" (code %s)`, act.Intent.Action, r.ID, code))
	}
	for _, c := range candidates {
		if l.fits(c) {
			return c, DisplaySummary
		}
	}
	return code, DisplayCode
}

// Resolve turns policy's unmet asks into one prompt. expiresIn is the default life
// of a prompt.
func Resolve(asks []policy.Ask, act intent.Act, user identity.Principal, providers map[string]Provider, expiresIn time.Duration) (Plan, *Refusal) {
	merged, refusal := merge(asks, expiresIn)
	if refusal != nil {
		return Plan{}, refusal
	}
	p, ok := providers[user.Issuer]
	if !ok {
		return Plan{}, &Refusal{"approval_unavailable", "The user's identity provider is not set up for approvals (ciba)"}
	}
	hint, err := p.Hint(user)
	if err != nil {
		return Plan{}, &Refusal{"approver_unresolved", "The approver cannot be named to the identity provider: " + err.Error()}
	}
	code := newCode()
	message, display := p.Limits().message(act, merged.Message, code)
	if rank(display) < rank(merged.Display) {
		return Plan{}, &Refusal{"approval_display", fmt.Sprintf(
			"Policy wants the approver shown %q, but the identity provider can show only %q of this act", merged.Display, display)}
	}
	return Plan{
		Approver: merged.Approver, ApproverRef: user.Ref, Hint: hint, Message: message, Code: code,
		ACRValues: merged.ACRValues, ExpiresIn: time.Duration(merged.ExpiresIn),
	}, nil
}

// merge makes one ask out of several to the same person: the strictest of each.
func merge(asks []policy.Ask, expiresIn time.Duration) (policy.Ask, *Refusal) {
	out := policy.Ask{Approver: ApproverUser, Display: DisplayCode}
	for _, a := range asks {
		if a.Approver != ApproverUser {
			return out, &Refusal{"approver_unsupported", fmt.Sprintf("Policy asks for the approver %q; so far only %q can be asked", a.Approver, ApproverUser)}
		}
		if a.ExpiresIn > 0 && (out.ExpiresIn == 0 || a.ExpiresIn < out.ExpiresIn) {
			out.ExpiresIn = a.ExpiresIn
		}
		if out.Message != "" && a.Message != "" {
			out.Message += "; "
		}
		out.Message += a.Message
		display := a.Display
		if display == "" {
			display = DisplaySummary
		}
		if rank(display) > rank(out.Display) {
			out.Display = display
		}
		switch {
		case len(a.ACRValues) == 0:
		case len(out.ACRValues) == 0:
			out.ACRValues = a.ACRValues
		default:
			out.ACRValues = slices.DeleteFunc(slices.Clone(out.ACRValues), func(v string) bool {
				return !slices.Contains(a.ACRValues, v)
			})
			if len(out.ACRValues) == 0 {
				return out, &Refusal{"approval_unsatisfiable", "Policy asks for authentication contexts (acr) that exclude each other"}
			}
		}
	}
	if out.ExpiresIn == 0 {
		out.ExpiresIn = policy.Duration(expiresIn)
	}
	return out, nil
}

func rank(display string) int {
	return slices.Index([]string{DisplayCode, DisplaySummary, DisplayFull}, display)
}

// codeAlphabet leaves out what people confuse when they compare: 0 O, 1 I L, U V.
const codeAlphabet = "23456789ABCDEFGHJKMNPQRSTWXYZ"

// newCode makes the short text that both sides show. It is no secret: it lets the
// person tell this prompt from another.
func newCode() string {
	b := make([]byte, 4)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	for i := range b {
		b[i] = codeAlphabet[int(b[i])%len(codeAlphabet)]
	}
	return string(b)
}
