package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/decision"
	"github.com/writsec/writ/internal/policy"
	"github.com/writsec/writ/internal/server"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/telemetry"
)

type policyCmd struct {
	Replay policyReplayCmd `cmd:"" help:"Decide an earlier decision again, on what it was made on."`
}

type policyReplayCmd struct {
	configFile
	Decision string `arg:"" help:"The decision's id."`
	Policies string `type:"path" placeholder:"PATH" help:"Directory or bundle to ask; by default the one of the configuration, as it is now."`
}

// Run shows what was decided, and what the policies say now of the same input.
func (c policyReplayCmd) Run(ctx context.Context) error {
	s, cfg, err := c.open(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = s.Close() }()
	var record decision.Record
	var input audit.Input
	err = s.View(ctx, func(tx *sqlstore.Tx) (err error) {
		if record, err = tx.Decision(ctx, c.Decision); err != nil {
			return fmt.Errorf("decision %s: %w", c.Decision, err)
		}
		if input, err = tx.Input(ctx, c.Decision); err != nil {
			return fmt.Errorf("what decision %s was made on (audit.inputs may say to keep none): %w", c.Decision, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if input.Kept != audit.KeepWhole {
		return fmt.Errorf("what decision %s was made on is kept %s; only whole inputs can be decided again", c.Decision, input.Kept)
	}
	if c.Policies != "" {
		if cfg.Policy.Path, err = filepath.Abs(c.Policies); err != nil {
			return err
		}
		cfg.Policy.Signature = nil // these are for trying out
	}
	engine, err := server.NewPolicy(cfg.Policy, func(context.Context, policy.Version, error) error { return nil },
		telemetry.NewMetrics(), telemetry.NewTextLogger(os.Stderr, 8))
	if err != nil {
		return err
	}
	if err := engine.Load(ctx); err != nil {
		return err
	}
	now, err := engine.Replay(ctx, input.JSON)
	if err != nil {
		return err
	}
	type side struct {
		Decision policy.Effect   `json:"decision"`
		Reasons  []policy.Reason `json:"reasons"`
		Policy   policy.Version  `json:"policy"`
	}
	then := side{record.Answer.Decision, record.Answer.Reasons, record.Answer.Policy}
	out := json.NewEncoder(os.Stdout)
	out.SetIndent("", "  ")
	out.SetEscapeHTML(false)
	return out.Encode(struct {
		DecisionID string          `json:"decision_id"`
		At         string          `json:"at"`
		Then       side            `json:"then"`
		Now        side            `json:"now"`
		Same       bool            `json:"same"`
		Input      json.RawMessage `json:"input"`
	}{
		record.ID, record.At.Format("2006-01-02T15:04:05.000000Z"), then, side{now.Effect, now.Reasons, now.Policy},
		then.Decision == now.Effect, input.JSON,
	})
}
