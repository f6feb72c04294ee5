package httpapi

import (
	"context"
	"encoding/json"
	"net/http"

	"github.com/writsec/writ/internal/audit"
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

func (a *API) checkpoint(w http.ResponseWriter, r *http.Request) error {
	if err := a.operator(r, "audit.checkpoint.read", func(*params) {}); err != nil {
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
	maxIndex       = 1 << 62
)

// entryView is an entry as it was hashed, with its index.
type entryView struct {
	Index int64           `json:"index"`
	Entry json.RawMessage `json:"entry"`
}

func (a *API) entries(w http.ResponseWriter, r *http.Request) error {
	var q audit.Query
	err := a.operator(r, "audit.entries.read", func(p *params) {
		q.From, _ = p.number("from", 0, maxIndex)
		q.Limit = p.limit(defaultEntries, maxEntries)
		q.Kind, q.Session, q.Decision = audit.Kind(p.text("kind")), p.text("session"), p.text("decision")
		q.User, q.Agent = p.ref("user"), p.ref("agent")
	})
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

func (a *API) proof(w http.ResponseWriter, r *http.Request) error {
	var index, from int64
	var ofEntry bool
	err := a.operator(r, "audit.proof.read", func(p *params) {
		var grown bool
		index, ofEntry = p.number("index", 0, maxIndex)
		from, grown = p.number("from", 0, maxIndex)
		if ofEntry == grown {
			p.fail("index", "expected either index, of an entry, or from, the size of an earlier checkpoint")
		}
	})
	if err != nil {
		return err
	}
	var out any
	err = a.Evidence.View(r.Context(), func(tx EvidenceTx) (err error) {
		if ofEntry {
			out, err = audit.Prove(r.Context(), tx, index)
		} else {
			out, err = audit.ProveSince(r.Context(), tx, from)
		}
		return err
	})
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, out)
}
