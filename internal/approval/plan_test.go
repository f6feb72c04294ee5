package approval

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/intent"
	"github.com/writsec/writ/internal/policy"
)

func act(action, typ, id string) intent.Act {
	return intent.Act{
		Intent:   intent.Intent{Action: action, Purpose: "PURPOSE", Parameters: map[string]any{"p": "PARAMETER"}},
		Resource: intent.Resource{Type: typ, ID: id},
	}
}

// Policy's words come first where the provider can show them; where not, they are
// left out whole.
func TestMessageInPolicysWords(t *testing.T) {
	t.Parallel()
	pay := act("pay", "account", "main")
	for _, c := range []struct {
		name, words, want string
		limits            Limits
	}{
		{"fits", `Pay 90.00 EUR to "ACME"`, `Pay 90.00 EUR to "ACME" [pay on account "main"] (code CODE)`, Limits{MaxLength: 80}},
		{"too long", strings.Repeat("x", 80), `pay on account "main" (code CODE)`, Limits{MaxLength: 80}},
		{"not ASCII", "Pay 90 €", `pay on account "main" (code CODE)`, Limits{MaxLength: 80}},
		{"a line end", "Pay 90\n[approve]", `pay on account "main" (code CODE)`, Limits{MaxLength: 80}},
		{"a forged end", `Pay 1 [pay on account "x"] (code CODE)`, `pay on account "main" (code CODE)`, Limits{MaxLength: 80}},
		{"portable", "Pay", "pay#account#main#CODE", Limits{MaxLength: 80, Portable: true}},
	} {
		if got, display := c.limits.message(pay, c.words, "CODE"); got != c.want || display != DisplaySummary {
			t.Errorf("%s: %q (%s), want %q", c.name, got, display, c.want)
		}
	}
}

// Of Writ's own questions policy's words are all that a person needs to read. Without
// them the message is as of any act, and whoever asks sees that they are missing.
func TestMessageOfReservedAct(t *testing.T) {
	t.Parallel()
	widen := act("writ.envelope.widen", "writ.session", "ses_1")
	for words, want := range map[string]string{
		"Widen the session: do a": "Widen the session: do a (code CODE)",
		"Widen [x":                `writ.envelope.widen on writ.session "ses_1" (code CODE)`,
		strings.Repeat("x", 80):   `writ.envelope.widen on writ.session "ses_1" (code CODE)`,
	} {
		if got, _ := (Limits{MaxLength: 80}).message(widen, words, "CODE"); got != want {
			t.Errorf("%q: %q, want %q", words, got, want)
		}
	}
}

func TestMessage(t *testing.T) {
	t.Parallel()
	text, portable := Limits{MaxLength: 60}, Limits{MaxLength: 40, Portable: true}
	for _, c := range []struct {
		name    string
		limits  Limits
		act     intent.Act
		want    string
		display string
	}{
		{"text", text, act("hr.offboard", "employee", "E 17"), `hr.offboard on employee "E 17" (code CODE)`, DisplaySummary},
		{"text, exactly the limit", text, act("hr.offboard", "employee", strings.Repeat("x", 22)),
			`hr.offboard on employee "` + strings.Repeat("x", 22) + `" (code CODE)`, DisplaySummary},
		{"text, without the type", text, act("hr.offboard", "employee", strings.Repeat("x", 23)),
			`hr.offboard on "` + strings.Repeat("x", 23) + `" (code CODE)`, DisplaySummary},
		{"text, too long", text, act("hr.offboard", "employee", strings.Repeat("x", 50)), "CODE", DisplayCode},
		{"text, not ASCII", text, act("hr.offboard", "employee", "Zoë"), "CODE", DisplayCode},
		{"text, control character", text, act("hr.offboard", "employee", "a\nb"), "CODE", DisplayCode},
		{"text, a quote could end the id", text, act("hr.offboard", "employee", `E17" (code XXXX)`), "CODE", DisplayCode},
		{"portable", portable, act("hr.offboard", "employee", "E17"), "hr.offboard#employee#E17#CODE", DisplaySummary},
		{"portable, without the type", portable, act("hr.offboard", "employee_of_the_company", "E17"), "hr.offboard#E17#CODE", DisplaySummary},
		{"portable, too long", portable, act("hr.offboard", "employee", strings.Repeat("x", 40)), "CODE", DisplayCode},
		{"portable, a space", portable, act("hr.offboard", "employee", "E 17"), "CODE", DisplayCode},
		{"portable, a type that is not", portable, act("hr.offboard", "urn:employee", "E17"), "hr.offboard#E17#CODE", DisplaySummary},
		{"portable, a slash", portable, act("hr.offboard", "employee", "a/b"), "CODE", DisplayCode},
		// "a#b" could be read as a resource b of type a.
		{"portable, the separator in the id", portable, act("pay", "x", "account#E17"), "CODE", DisplayCode},
		{"the CIBA default", Limits{MaxLength: 20, Portable: true}, act("hr.offboard", "employee", "E17"), "hr.offboard#E17#CODE", DisplaySummary},
		{"no room", Limits{MaxLength: 4, Portable: true}, act("a", "b", "c"), "CODE", DisplayCode},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			got, display := c.limits.message(c.act, "", "CODE")
			if got != c.want || display != c.display {
				t.Errorf("%q (%s), want %q (%s)", got, display, c.want, c.display)
			}
			if len(got) > c.limits.MaxLength {
				t.Errorf("%d bytes, limit %d", len(got), c.limits.MaxLength)
			}
			if strings.Contains(got, "PURPOSE") || strings.Contains(got, "PARAMETER") {
				t.Errorf("%q has words of the agent's", got)
			}
		})
	}
}

func TestMerge(t *testing.T) {
	t.Parallel()
	ask := func(f func(*policy.Ask)) policy.Ask {
		a := policy.Ask{Approver: ApproverUser}
		f(&a)
		return a
	}
	life := func(d time.Duration) policy.Ask {
		return ask(func(a *policy.Ask) { a.ExpiresIn = policy.Duration(d) })
	}
	acr := func(v ...string) policy.Ask { return ask(func(a *policy.Ask) { a.ACRValues = v }) }
	show := func(d string) policy.Ask { return ask(func(a *policy.Ask) { a.Display = d }) }
	want := func(display string, d time.Duration, acr ...string) policy.Ask {
		return policy.Ask{Approver: ApproverUser, Display: display, ExpiresIn: policy.Duration(d), ACRValues: acr}
	}
	for _, c := range []struct {
		name    string
		asks    []policy.Ask
		want    policy.Ask
		refusal string
	}{
		{"one plain ask", []policy.Ask{life(0)}, want(DisplaySummary, 5*time.Minute), ""},
		{"policy's shorter life", []policy.Ask{life(time.Minute)}, want(DisplaySummary, time.Minute), ""},
		{"policy's longer life", []policy.Ask{life(time.Hour)}, want(DisplaySummary, time.Hour), ""}, // was cut to the default
		{"the shorter life of two", []policy.Ask{life(time.Hour), life(0), life(10 * time.Minute)}, want(DisplaySummary, 10*time.Minute), ""},
		{"code alone", []policy.Ask{show(DisplayCode)}, want(DisplayCode, 5*time.Minute), ""},
		{"the fuller display of two", []policy.Ask{show(DisplayCode), show(DisplayFull), show("")}, want(DisplayFull, 5*time.Minute), ""},
		{"summary over code", []policy.Ask{show(DisplayCode), show("")}, want(DisplaySummary, 5*time.Minute), ""},
		{"acr of one", []policy.Ask{life(0), acr("phr"), life(0)}, want(DisplaySummary, 5*time.Minute, "phr"), ""},
		{"acr that both accept", []policy.Ask{acr("a", "b", "c"), acr("c", "b")}, want(DisplaySummary, 5*time.Minute, "b", "c"), ""},
		{"acr that exclude each other", []policy.Ask{acr("a"), acr("b")}, policy.Ask{}, "approval_unsatisfiable"},
		{"another approver", []policy.Ask{life(0), {Approver: "manager"}}, policy.Ask{}, "approver_unsupported"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			got, refusal := merge(c.asks, 5*time.Minute)
			if refusal != nil || c.refusal != "" {
				if refusal == nil || refusal.Code != c.refusal {
					t.Errorf("refused %+v, want %q", refusal, c.refusal)
				}
				return
			}
			if d := cmp.Diff(c.want, got); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}
	t.Run("leaves the asks as they are", func(t *testing.T) {
		t.Parallel()
		asks := []policy.Ask{acr("a", "b"), acr("b")}
		if _, r := merge(asks, time.Minute); r != nil || !cmp.Equal(asks[0].ACRValues, []string{"a", "b"}) {
			t.Errorf("%v %v", asks, r)
		}
	})
}

type stubProvider struct {
	Provider
	limits Limits
	err    error
}

func (s stubProvider) Limits() Limits                          { return s.limits }
func (s stubProvider) Hint(identity.Principal) (string, error) { return "hint", s.err }
func (s stubProvider) Discard(context.Context, []byte)         {}

func TestResolve(t *testing.T) {
	t.Parallel()
	user := identity.Principal{Ref: identity.Ref{Issuer: "https://idp.example", ID: "alice"}}
	with := func(s stubProvider) map[string]Provider { return map[string]Provider{user.Issuer: s} }
	wide := stubProvider{limits: Limits{MaxLength: 100}}
	ask := policy.Ask{Approver: ApproverUser}
	for _, c := range []struct {
		name      string
		ask       policy.Ask
		providers map[string]Provider
		refusal   string
	}{
		{"fits", ask, with(wide), ""},
		{"no provider", ask, nil, "approval_unavailable"},
		{"provider of another issuer", ask, map[string]Provider{"https://other.example": wide}, "approval_unavailable"},
		{"no hint", ask, with(stubProvider{limits: wide.limits, err: errors.New("no claim")}), "approver_unresolved"},
		{"shows too little", ask, with(stubProvider{limits: Limits{MaxLength: 8}}), "approval_display"},
		{"code is enough", policy.Ask{Approver: ApproverUser, Display: DisplayCode}, with(stubProvider{limits: Limits{MaxLength: 8}}), ""},
		{"nothing shows all", policy.Ask{Approver: ApproverUser, Display: DisplayFull}, with(wide), "approval_display"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			plan, refusal := Resolve([]policy.Ask{c.ask}, act("hr.offboard", "employee", "E17"), user, c.providers, time.Minute)
			if c.refusal != "" {
				if refusal == nil || refusal.Code != c.refusal {
					t.Errorf("refused %+v, want %s", refusal, c.refusal)
				}
				return
			}
			if refusal != nil || plan.ApproverRef != user.Ref || plan.Hint != "hint" || plan.ExpiresIn != time.Minute ||
				!strings.Contains(plan.Message, plan.Code) {
				t.Errorf("%+v %v", plan, refusal)
			}
		})
	}
}

func TestCode(t *testing.T) {
	t.Parallel()
	seen, letters := map[string]bool{}, map[rune]int{}
	for range 5000 {
		c := newCode()
		if len(c) != 4 || strings.ContainsAny(c, "01OILUV") || strings.Trim(c, codeAlphabet) != "" {
			t.Fatalf("code %q", c)
		}
		seen[c] = true
		for _, r := range c {
			letters[r]++
		}
	}
	if len(seen) < 4900 {
		t.Errorf("only %d of 5000 codes differ", len(seen))
	}
	for _, r := range codeAlphabet { // 690 each, were it exactly even
		if letters[r] < 500 || letters[r] > 900 {
			t.Errorf("%q came %d times of 20000", r, letters[r])
		}
	}
}

func TestUsable(t *testing.T) {
	t.Parallel()
	now := time.Unix(1000, 0)
	for _, c := range []struct {
		state  State
		hash   string
		expiry time.Duration
		code   string
		ok     bool
	}{
		{Approved, "h", time.Second, "", true},
		{Approved, "h", 0, "approval_expired", false},
		{Approved, "other", time.Second, "approval_mismatch", false},
		{Pending, "other", time.Second, "approval_mismatch", false},
		{Created, "h", time.Second, "", false},
		{Requesting, "h", time.Second, "", false},
		{Pending, "h", time.Second, "", false},
		{Redeemed, "h", time.Second, "", false},
		{Consumed, "h", time.Second, "approval_consumed", false},
		{Denied, "h", time.Second, "approval_denied", false},
		{Expired, "h", time.Second, "approval_expired", false},
		{Failed, "h", time.Second, "approval_failed", false},
		{Cancelled, "h", time.Second, "approval_cancelled", false},
		{StartUnknown, "h", time.Second, "approval_failed", false},
		{OutcomeLost, "h", time.Second, "approval_failed", false},
		{"", "h", time.Second, "approval_failed", false},
	} {
		a := Approval{State: c.state, IntentHash: c.hash, ExpiresAt: now.Add(c.expiry)}
		code, message, ok := a.Usable(now, "h")
		if code != c.code || ok != c.ok || (code == "") != (message == "") {
			t.Errorf("%s: %q, %q, %v; want %q, %v", c.state, code, message, ok, c.code, c.ok)
		}
	}
}

func TestStatus(t *testing.T) {
	t.Parallel()
	for s, want := range map[State]string{
		Created: "pending", Requesting: "pending", Pending: "pending", Redeemed: "pending", Approved: "approved",
		Consumed: "consumed", Denied: "denied", Expired: "expired", Failed: "failed", Cancelled: "cancelled",
		StartUnknown: "failed", OutcomeLost: "failed",
	} {
		if got := (Approval{State: s}).Status(); got != want {
			t.Errorf("%s shows as %q, want %q", s, got, want)
		}
	}
}

func TestBackoff(t *testing.T) {
	t.Parallel()
	for failures := 1; failures < 100; failures++ {
		if d := backoff(failures); d < time.Second/2 || d > maxBackoff {
			t.Errorf("%v after %d failures", d, failures)
		}
	}
}
