package httpapi

import (
	"context"
	"encoding/json"
	"net/http"
	"net/url"
	"strconv"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
)

// EvidenceStore reads the log, and records who did.
type EvidenceStore interface {
	View(ctx context.Context, f func(EvidenceTx) error) error
	Update(ctx context.Context, f func(EvidenceTx) error) error
}

// EvidenceTx is what evidence needs of a transaction.
type EvidenceTx interface {
	audit.Tx
	audit.EvidenceTx
}

// reading verifies the caller as an operator, reads the parameters of the request, of
// which each may stand once, and records what is looked at: nothing else that stands
// in the URL, where some put tokens.
func (a *API) reading(r *http.Request, names ...string) (url.Values, error) {
	token, err := bearer(r)
	if err != nil {
		return nil, err
	}
	operator, err := a.Identity.Operator(r.Context(), token)
	if err != nil {
		a.Metrics.TokensRefused.WithLabelValues("operator").Inc()
		return nil, err
	}
	form, err := query(r, names...)
	if err != nil {
		return nil, err
	}
	detail := map[string]any{"path": r.URL.Path}
	if len(form) > 0 {
		detail["query"] = form.Encode()
	}
	return form, a.Evidence.Update(r.Context(), func(tx EvidenceTx) error {
		return audit.Append(r.Context(), tx, audit.Entry{Kind: audit.OperatorRead, Operator: operator.Ref, Detail: detail})
	})
}

func (a *API) checkpoint(w http.ResponseWriter, r *http.Request) error {
	if _, err := a.reading(r); err != nil {
		return err
	}
	var head audit.Head
	err := a.Evidence.View(r.Context(), func(tx EvidenceTx) (err error) {
		head, err = audit.HeadOf(r.Context(), tx)
		return err
	})
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = w.Write([]byte(head.Checkpoint)) // the client is gone if this fails
	return nil
}

const (
	defaultEntries = 100
	maxEntries     = 1000
)

// entryView is an entry as it was hashed, with its index.
type entryView struct {
	Index int64           `json:"index"`
	Entry json.RawMessage `json:"entry"`
}

func (a *API) entries(w http.ResponseWriter, r *http.Request) error {
	form, err := a.reading(r, "from", "limit", "kind", "session", "decision", "user_iss", "user_sub", "agent_iss", "agent_sub")
	if err != nil {
		return err
	}
	q, err := entryQuery(form)
	if err != nil {
		return err
	}
	out := struct {
		Entries []entryView `json:"entries"`
		// Next is the from of the next page; absent at the end.
		Next *int64 `json:"next,omitempty"`
		Size int64  `json:"size"`
	}{Entries: []entryView{}}
	err = a.Evidence.View(r.Context(), func(tx EvidenceTx) error {
		head, err := audit.HeadOf(r.Context(), tx)
		if err != nil {
			return err
		}
		out.Size = head.Size
		list, err := tx.LogEntries(r.Context(), q)
		for _, e := range list {
			out.Entries = append(out.Entries, entryView{e.Index, e.Record})
		}
		if len(list) == q.Limit {
			next := list[len(list)-1].Index + 1
			out.Next = &next
		}
		return err
	})
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, out)
}

func entryQuery(form url.Values) (q audit.Query, err error) {
	if q.From, err = number(form, "from", 0, 0, 1<<62); err != nil {
		return q, err
	}
	limit, err := number(form, "limit", defaultEntries, 1, maxEntries)
	if err != nil {
		return q, err
	}
	q.Limit = int(limit)
	q.Kind, q.Session, q.Decision = audit.Kind(form.Get("kind")), form.Get("session"), form.Get("decision")
	if q.User, err = refOf(form, "user"); err != nil {
		return q, err
	}
	q.Agent, err = refOf(form, "agent")
	return q, err
}

func (a *API) proof(w http.ResponseWriter, r *http.Request) error {
	form, err := a.reading(r, "index", "from")
	if err != nil {
		return err
	}
	if form.Has("index") == form.Has("from") {
		return fault.Invalid("index", "expected either index, of an entry, or from, the size of an earlier checkpoint")
	}
	var out any
	err = a.Evidence.View(r.Context(), func(tx EvidenceTx) error {
		if form.Has("index") {
			index, err := number(form, "index", 0, 0, 1<<62)
			if err != nil {
				return err
			}
			out, err = audit.Prove(r.Context(), tx, index)
			return err
		}
		from, err := number(form, "from", 0, 0, 1<<62)
		if err != nil {
			return err
		}
		out, err = audit.ProveSince(r.Context(), tx, from)
		return err
	})
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, out)
}

// maxParameter is in bytes.
const maxParameter = 1024

func query(r *http.Request, names ...string) (url.Values, error) {
	form, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, fault.New(fault.InvalidRequest, "the query of the URL is malformed")
	}
	known := map[string]bool{}
	for _, n := range names {
		known[n] = true
	}
	for name, values := range form {
		if !known[name] {
			return nil, fault.Invalid(name[:min(len(name), 64)], "is not a parameter of this route")
		}
		if len(values) != 1 || values[0] == "" || len(values[0]) > maxParameter {
			return nil, fault.Invalid(name, "expected one value of at most %d bytes", maxParameter)
		}
	}
	return form, nil
}

func number(form url.Values, name string, absent, least, most int64) (int64, error) {
	if !form.Has(name) {
		return absent, nil
	}
	n, err := strconv.ParseInt(form.Get(name), 10, 64)
	if err != nil || n < least || n > most {
		return 0, fault.Invalid(name, "expected a whole number from %d to %d", least, most)
	}
	return n, nil
}

func refOf(form url.Values, name string) (identity.Ref, error) {
	ref := identity.Ref{Issuer: form.Get(name + "_iss"), ID: form.Get(name + "_sub")}
	if !ref.IsZero() && (ref.Issuer == "" || ref.ID == "") {
		return ref, fault.Invalid(name+"_iss", "expected %s_iss and %s_sub together", name, name)
	}
	return ref, nil
}
