package evidence

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/identity"
)

// OCSFVersion is the version of the Open Cybersecurity Schema Framework that OCSF
// writes.
const OCSFVersion = "1.3.0"

// ExportOCSF writes the entries that match q, each as one JSON line: an OCSF event
// of the class API Activity. product is Writ's version. docs/audit.md has the
// mapping. It returns how many there were.
func ExportOCSF(ctx context.Context, store Store, w io.Writer, q audit.Query, product string) (n int, err error) {
	var stored tiles
	var head audit.Head
	err = store.View(ctx, func(tx Tx) error {
		if head, err = audit.HeadOf(ctx, tx); err != nil {
			return err
		}
		q.From, q.To, err = span(head, q.From, q.To)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("export log: %w", err)
	}
	lines := json.NewEncoder(w)
	lines.SetEscapeHTML(false)
	err = each(ctx, store, q, func(tx Tx, entries []audit.Sequenced) error {
		for _, e := range entries {
			hash, err := stored.leaf(ctx, tx, e.Index)
			if err != nil {
				return err
			}
			if tlog.RecordHash(e.Record) != hash {
				return fmt.Errorf("entry %d was changed: it is not what the tree has at its place", e.Index)
			}
			entry, err := audit.ParseRecord(e.Record)
			if err != nil {
				return fmt.Errorf("entry %d: %w", e.Index, err)
			}
			if err := lines.Encode(ocsfOf(head.Origin, product, e.Index, hash, entry)); err != nil {
				return err
			}
			n++
		}
		return stillThere(ctx, tx, q.From)
	})
	if err != nil {
		return n, fmt.Errorf("export log: %w", err)
	}
	return n, nil
}

// event is an OCSF event of the class API Activity (6003).
type event struct {
	CategoryUID  int            `json:"category_uid"`
	CategoryName string         `json:"category_name"`
	ClassUID     int            `json:"class_uid"`
	ClassName    string         `json:"class_name"`
	ActivityID   int            `json:"activity_id"`
	ActivityName string         `json:"activity_name"`
	TypeUID      int            `json:"type_uid"`
	TypeName     string         `json:"type_name"`
	SeverityID   int            `json:"severity_id"`
	Severity     string         `json:"severity"`
	StatusID     int            `json:"status_id"`
	Status       string         `json:"status"`
	StatusDetail string         `json:"status_detail,omitempty"`
	Time         int64          `json:"time"`
	Message      string         `json:"message"`
	Actor        actor          `json:"actor"`
	API          api            `json:"api"`
	Source       map[string]any `json:"src_endpoint"`
	HTTPRequest  *uid           `json:"http_request,omitempty"`
	Resources    []resource     `json:"resources,omitempty"`
	Metadata     metadata       `json:"metadata"`
	Unmapped     map[string]any `json:"unmapped"`
}

type uid struct {
	UID string `json:"uid"`
}

type actor struct {
	User    *ocsfUser `json:"user,omitempty"`
	Session *uid      `json:"session,omitempty"`
	AppName string    `json:"app_name,omitempty"`
	AppUID  string    `json:"app_uid,omitempty"`
}

type ocsfUser struct {
	UID    string `json:"uid"`
	Domain string `json:"domain"`
}

type api struct {
	Operation string  `json:"operation"`
	Service   service `json:"service"`
	Request   *uid    `json:"request,omitempty"`
}

type service struct {
	Name string `json:"name"`
}

type resource struct {
	Type string `json:"type"`
	UID  string `json:"uid"`
}

type metadata struct {
	Version        string  `json:"version"`
	Product        product `json:"product"`
	UID            string  `json:"uid"`
	EventCode      string  `json:"event_code"`
	LogName        string  `json:"log_name"`
	LogVersion     string  `json:"log_version"`
	Sequence       int64   `json:"sequence"`
	CorrelationUID string  `json:"correlation_uid,omitempty"`
}

type product struct {
	Name    string `json:"name"`
	Vendor  string `json:"vendor_name"`
	Version string `json:"version"`
}

const (
	ocsfCategory = 6
	ocsfClass    = 6003
)

func ocsfOf(origin, version string, index int64, hash tlog.Hash, e audit.Entry) event {
	m, known := ocsfKinds[e.Kind]
	if !known {
		m = mapping{activity: ocsfOther, severity: 1, status: 99}
	}
	out := event{
		CategoryUID: ocsfCategory, CategoryName: "Application Activity", ClassUID: ocsfClass, ClassName: "API Activity",
		ActivityID: m.activity, ActivityName: activities[m.activity],
		TypeUID: ocsfClass*100 + m.activity, TypeName: "API Activity: " + activities[m.activity],
		SeverityID: m.severity, Severity: severities[m.severity], StatusID: m.status, Status: statuses[m.status],
		Time: e.At.UnixMilli(), Message: who(e) + ": " + what(e), Actor: actorOf(e), Source: sourceOf(e),
		API:       api{Operation: string(e.Kind), Service: service{"writ"}},
		Resources: resourcesOf(e),
		Metadata: metadata{
			Version: OCSFVersion, Product: product{"Writ", "Writ", version}, UID: fmt.Sprintf("%s#%d", origin, index),
			EventCode: string(e.Kind), LogName: origin, LogVersion: "1", Sequence: index, CorrelationUID: e.Session,
		},
		Unmapped: map[string]any{"log_hash": hash.String()},
	}
	switch e.Kind {
	case audit.DecisionAllow, audit.DecisionDeny, audit.DecisionRequireCIBA:
		if action, ok := e.Detail["action"].(string); ok {
			out.API.Operation = action
		}
	case audit.DecisionOutcome:
		out.StatusID = map[string]int{"succeeded": 1, "failed": 2}[detail(e, "outcome")] // unknown: 0
		out.Status = statuses[out.StatusID]
	}
	if out.StatusID == 99 {
		out.Status = string(e.Kind)
	}
	for _, from := range []string{"reason", "error", "why", "state"} {
		if out.StatusDetail == "" {
			out.StatusDetail = detail(e, from)
		}
	}
	if codes := reasons(e); len(codes) > 0 {
		out.StatusDetail = strings.Join(codes, ", ")
	}
	if e.RequestID != "" {
		out.HTTPRequest, out.API.Request = &uid{e.RequestID}, &uid{e.RequestID}
	}
	if e.TraceID != "" {
		out.Unmapped["trace"] = e.TraceID
	}
	if len(e.Detail) > 0 {
		out.Unmapped["detail"] = e.Detail
	}
	if !e.Operator.IsZero() { // then these are not who did it, but whom it was done to
		for name, ref := range map[string]identity.Ref{"user": e.User, "agent": e.Agent} {
			if !ref.IsZero() {
				out.Unmapped[name] = ref
			}
		}
	}
	return out
}

func actorOf(e audit.Entry) (a actor) {
	user, agent := e.User, e.Agent
	if !e.Operator.IsZero() {
		user, agent = e.Operator, identity.Ref{}
	}
	if !user.IsZero() {
		a.User = &ocsfUser{user.ID, user.Issuer}
	}
	if !agent.IsZero() {
		a.AppName, a.AppUID = agent.ID, agent.String()
	}
	if e.Session != "" && e.Operator.IsZero() {
		a.Session = &uid{e.Session}
	}
	if a == (actor{}) {
		a.AppName = "writ"
	}
	return a
}

// sourceOf names the caller: an entry has no network address.
func sourceOf(e audit.Entry) map[string]any {
	for _, ref := range []identity.Ref{e.Operator, e.Agent, e.User} {
		if !ref.IsZero() {
			return map[string]any{"name": ref.ID, "uid": ref.String()}
		}
	}
	return map[string]any{"svc_name": "writ"}
}

func resourcesOf(e audit.Entry) (out []resource) {
	if r, ok := e.Detail["resource"].(map[string]any); ok {
		kind, _ := r["type"].(string)
		id, _ := r["id"].(string)
		out = append(out, resource{kind, id})
	}
	for _, r := range []resource{
		{"writ.session", e.Session}, {"writ.decision", e.Decision}, {"writ.approval", e.Approval}, {"writ.lease", e.Lease},
	} {
		if r.UID != "" {
			out = append(out, r)
		}
	}
	return out
}
