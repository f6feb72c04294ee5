package policy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/writsec/writ/bundles"
)

// Effect is the outcome of a decision.
type Effect string

// The effects.
const (
	Allow       Effect = "allow"
	Deny        Effect = "deny"
	RequireCIBA Effect = "require_ciba"
)

// Reason says why, to a program and to a person.
type Reason struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

// The reasons of a deny that policy did not give.
const (
	ReasonUndefined     = "policy_undefined"      // the query has no result
	ReasonError         = "policy_error"          // evaluation failed
	ReasonTimeout       = "policy_timeout"        // evaluation took longer than the deadline
	ReasonInvalidOutput = "policy_invalid_output" // the result breaks the schema
)

// Result is what policy said, held to bundles/schemas/decision.json.
type Result struct {
	Effect      Effect           `json:"effect"`
	Reasons     []Reason         `json:"reasons"`
	Credential  *Credential      `json:"credential"`
	Approval    []Ask            `json:"approval"`
	Labels      []string         `json:"labels"`
	Counters    map[string]int64 `json:"counters"`
	Obligations []map[string]any `json:"obligations"`
	Advice      map[string]any   `json:"advice"`

	// Policy is the snapshot that said it.
	Policy Version `json:"-"`
}

// Version names a snapshot.
type Version struct {
	Revision string `json:"revision"`
	Digest   string `json:"digest"`
}

// Credential is what policy wants minted. It may only narrow what the minter's
// configuration grants.
type Credential struct {
	Minter       string         `json:"minter"`
	TTL          Duration       `json:"ttl"`
	Scope        map[string]any `json:"scope"`
	Revocability string         `json:"revocability"`
	Precision    string         `json:"precision"`
}

// Ask is one human answer that policy still wants.
type Ask struct {
	Code      string   `json:"code"`
	Approver  string   `json:"approver"`
	ACRValues []string `json:"acr_values"`
	ExpiresIn Duration `json:"expires_in"`
	Display   string   `json:"display"`
	Message   string   `json:"message"`
}

// Duration is a time.Duration written as "90s" or "5m".
type Duration time.Duration

// UnmarshalText parses Go's duration syntax.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return fmt.Errorf("duration: %w", err)
	}
	*d = Duration(v)
	return nil
}

func denied(code, message string) Result {
	return Result{Effect: Deny, Reasons: []Reason{{code, message}}}
}

// compileSchema reads one of bundles/schemas.
func compileSchema(name string) (*jsonschema.Schema, error) {
	raw, err := bundles.Schemas.ReadFile("schemas/" + name)
	if err != nil {
		return nil, err
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(raw))
	if err != nil {
		return nil, fmt.Errorf("schema %s: %w", name, err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource(name, doc); err != nil {
		return nil, fmt.Errorf("schema %s: %w", name, err)
	}
	return c.Compile(name)
}

// read holds a policy's answer to the schema.
func read[T any](schema *jsonschema.Schema, answer any) (r T, err error) {
	if err := schema.Validate(answer); err != nil {
		return r, err
	}
	raw, err := json.Marshal(answer)
	if err != nil {
		return r, fmt.Errorf("convert: %w", err)
	}
	if err := json.Unmarshal(raw, &r); err != nil {
		return r, fmt.Errorf("convert: %w", err)
	}
	return r, nil
}
