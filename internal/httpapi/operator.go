package httpapi

import (
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/go-chi/chi/v5"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/policy"
)

// operator lets an operator's request pass, or not: the token is verified, read takes
// the parameters, policy is asked, and what became of it is recorded before anything is
// answered. What can't be recorded is refused. All routes of operators begin with it but
// revoking, which no policy may stand in the way of.
//
// It doesn't look at whether the log is stuck, as decisions do: the entry is safe in
// the queue, and operators are those who have to find out why.
func (a *API) operator(r *http.Request, action string, read func(p *params)) error {
	_, err := a.operatorAs(r, action, read)
	return err
}

// operatorAs is operator for those who act in the operator's name.
func (a *API) operatorAs(r *http.Request, action string, read func(p *params)) (identity.Principal, error) {
	token, err := a.bearer(r)
	if err != nil {
		return identity.Principal{}, err
	}
	operator, err := a.Identity.Operator(r.Context(), token)
	if err != nil {
		a.Metrics.TokensRefused.WithLabelValues("operator").Inc()
		return identity.Principal{}, err
	}
	p := newParams(r)
	read(p)
	answer, refusal := a.permit(r, operator, action, p)
	e := audit.Entry{
		Kind: audit.OperatorRead, Operator: operator.Ref,
		Detail: map[string]any{"path": chi.RouteContext(r.Context()).RoutePattern(), "action": action},
	}
	if record, named := p.asked["revocation"]; named && p.err == nil {
		e.Detail["revocation"] = record
	}
	if p.err == nil && len(p.form) > 0 { // only what is known: in others, some put tokens
		e.Detail["query"] = p.form.Encode()
	}
	if answer.Policy != (policy.Version{}) {
		e.Detail["policy"] = answer.Policy
	}
	if refusal != nil {
		e.Kind, e.Detail["reasons"] = audit.OperatorRefused, answer.Reasons
	}
	err = a.Evidence.Update(r.Context(), func(tx EvidenceTx) error { return audit.Append(r.Context(), tx, e) })
	if err != nil {
		return identity.Principal{}, err
	}
	return operator, refusal
}

// permit returns what policy said; the error is why the request may not go on, with
// its reasons in the answer.
func (a *API) permit(r *http.Request, operator identity.Principal, action string, p *params) (policy.AdminResult, error) {
	because := func(err error, message string) (policy.AdminResult, error) {
		return policy.AdminResult{Reasons: []policy.Reason{{Code: string(fault.CodeOf(err)), Message: message}}}, err
	}
	if err := p.done(); err != nil {
		return because(err, "the request is malformed")
	}
	answer, err := a.Policy.Admin(r.Context(), policy.AdminInput{
		Operator: operator, Action: action, Resource: p.asked, Time: a.Now(), IP: a.callerIP(r),
	})
	if err != nil {
		return because(err, "policy could not be asked")
	}
	if !answer.Allow {
		return answer, fault.New(fault.Forbidden, "%s", messages(answer.Reasons))
	}
	return answer, nil
}

func messages(reasons []policy.Reason) string {
	out := make([]string, len(reasons))
	for i, r := range reasons {
		out[i] = r.Message
	}
	return strings.Join(out, "; ")
}

// maxParameter is in bytes.
const maxParameter = 1024

// params reads the parameters of an operator's request, of which each may stand once.
// After the first that is wrong it reads nothing any more.
type params struct {
	form  url.Values
	known map[string]bool
	asked map[string]any // what policy is told of them
	err   error
}

func newParams(r *http.Request) *params {
	p := &params{known: map[string]bool{}, asked: map[string]any{}}
	var err error
	if p.form, err = url.ParseQuery(r.URL.RawQuery); err != nil {
		p.form, p.err = nil, fault.New(fault.InvalidRequest, "the query of the URL is malformed")
	}
	return p
}

// done returns what was wrong, once all that is known was read.
func (p *params) done() error {
	for name := range p.form {
		if !p.known[name] {
			p.fail(name[:min(len(name), 64)], "is not a parameter of this route")
		}
	}
	return p.err
}

func (p *params) fail(name, format string, args ...any) {
	if p.err == nil {
		p.err = fault.Invalid(name, format, args...)
	}
}

// take returns the one value of a parameter, "" where it is not there.
func (p *params) take(name string) string {
	p.known[name] = true
	values, there := p.form[name]
	switch {
	case p.err != nil || !there:
		return ""
	case len(values) != 1 || values[0] == "" || len(values[0]) > maxParameter || !plain(values[0]):
		p.fail(name, "expected one value of at most %d printable bytes", maxParameter)
		return ""
	}
	return values[0]
}

// plain says that a text may stand in a query, a policy and a log.
func plain(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) })
}

func (p *params) text(name string) string {
	v := p.take(name)
	if v != "" {
		p.asked[name] = v
	}
	return v
}

// oneOf reads one of some words.
func (p *params) oneOf(name string, words ...string) string {
	v := p.text(name)
	for _, w := range words {
		if v == w {
			return v
		}
	}
	if v != "" {
		p.fail(name, "expected one of %s", strings.Join(words, ", "))
	}
	return ""
}

// id reads the id of a record.
func (p *params) id(name string, kind id.Kind) string {
	v := p.text(name)
	if v != "" && !id.Valid(kind, v) {
		p.fail(name, "expected an id that begins with %s_", kind)
	}
	return v
}

// path reads the id of a record from the path. One that can't be is as good as unknown.
func (p *params) path(r *http.Request, name string, kind id.Kind) string {
	v := chi.URLParam(r, "id")
	if !id.Valid(kind, v) {
		if p.err == nil {
			p.err = fault.New(fault.NotFound, "no such %s", name)
		}
		return ""
	}
	p.asked[name] = v
	return v
}

// number reads a whole number; there is false where it is absent.
func (p *params) number(name string, least, most int64) (n int64, there bool) {
	v := p.take(name)
	if v == "" {
		return 0, false
	}
	n, err := strconv.ParseInt(v, 10, 64)
	if err != nil || n < least || n > most {
		p.fail(name, "expected a whole number from %d to %d", least, most)
		return 0, false
	}
	p.asked[name] = n
	return n, true
}

// limit reads how many are wanted.
func (p *params) limit(absent, most int) int {
	n, there := p.number("limit", 1, int64(most))
	if !there {
		n = int64(absent)
		p.asked["limit"] = n
	}
	return int(n)
}

// ref reads a principal, from NAME_iss and NAME_sub.
func (p *params) ref(name string) identity.Ref {
	ref := identity.Ref{Issuer: p.take(name + "_iss"), ID: p.take(name + "_sub")}
	switch {
	case p.err != nil || ref.IsZero():
	case ref.Issuer == "" || ref.ID == "":
		p.fail(name+"_iss", "expected %s_iss and %s_sub together", name, name)
	default:
		p.asked[name] = map[string]any{"iss": ref.Issuer, "sub": ref.ID}
	}
	return ref
}
