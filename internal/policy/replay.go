package policy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/writsec/writ/internal/fault"
)

// Replay evaluates an input that was kept of an earlier decision, at the time that it
// was made.
func (e *Engine) Replay(ctx context.Context, input []byte) (Result, error) {
	s := e.current.Load()
	if s == nil {
		return Result{}, fault.New(fault.NotReady, "no policies are loaded")
	}
	d := json.NewDecoder(bytes.NewReader(input))
	d.UseNumber()
	var doc map[string]any
	if err := d.Decode(&doc); err != nil {
		return Result{}, fmt.Errorf("read kept input: %w", err)
	}
	if _, ok := doc["recent"]; !ok { // of a version that had none
		doc["recent"] = map[string]any{"window": "0s", "labels": []any{}, "counters": map[string]any{}}
	}
	env, _ := doc["env"].(map[string]any)
	text, _ := env["time"].(string)
	at, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		return Result{}, errors.New("read kept input: it has no env.time")
	}
	r := e.evaluate(ctx, s, doc, at)
	r.Policy = s.Version
	return r, nil
}
