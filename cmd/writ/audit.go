package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/alecthomas/kong"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/config"
	"github.com/writsec/writ/internal/evidence"
	"github.com/writsec/writ/internal/server"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/telemetry"
)

type auditCmd struct {
	Verify     auditVerifyCmd     `cmd:"" help:"Prove a log, one entry of it, an incident, or that a log only grew. Exits with 0 if all is proven, with 1 if not."`
	Tail       auditTailCmd       `cmd:"" help:"Show the latest entries."`
	Export     auditExportCmd     `cmd:"" help:"Write entries to a file."`
	Incident   auditIncidentCmd   `cmd:"" help:"Write all about a session, a user or an agent to one file that proves itself."`
	Proof      auditProofCmd      `cmd:"" help:"Print the proof of one entry, or that the log only grew."`
	Key        auditKeyCmd        `cmd:"" help:"Print the keys that verify checkpoints."`
	Checkpoint auditCheckpointCmd `cmd:"" help:"Print the signed head of the log."`
	Archive    auditArchiveCmd    `cmd:"" help:"Move old entries out of the store into a verified file."`
}

// logStore opens the store of a configuration, beside a Writ that may be running.
type logStore struct {
	Config string `required:"" placeholder:"FILE" help:"Configuration file (YAML) of the Writ whose log it is."`
}

func (l logStore) open(ctx context.Context) (*sqlstore.Store, config.Config, error) {
	cfg, err := config.LoadStore(l.Config)
	if err != nil {
		return nil, cfg, err
	}
	store, err := server.OpenStoreTool(ctx, cfg, telemetry.NewTextLogger(os.Stderr, slog.LevelWarn))
	return store, cfg, err
}

// with runs f on the store.
func (l logStore) with(ctx context.Context, f func(*sqlstore.Store, config.Config) error) (err error) {
	store, cfg, err := l.open(ctx)
	if err != nil {
		return err
	}
	defer func() {
		if closing := store.Close(); err == nil {
			err = closing
		}
	}()
	return f(store, cfg)
}

// evidenceOf is the store as package evidence reads it.
func evidenceOf(s *sqlstore.Store) evidence.Store { return sqlstore.For[evidence.Tx](s) }

// checkpointKeys lists the keys that the store's checkpoints are signed by.
func checkpointKeys(ctx context.Context, store *sqlstore.Store) (out []sqlstore.Key, err error) {
	keys, err := store.ListKeys(ctx)
	for _, k := range keys {
		if k.Purpose == sqlstore.CheckpointKey {
			out = append(out, k)
		}
	}
	return out, err
}

func verifiersOf(ctx context.Context, store *sqlstore.Store) (out []string, err error) {
	keys, err := checkpointKeys(ctx, store)
	for _, k := range keys {
		out = append(out, k.ID)
	}
	return out, err
}

// openCopies opens files of checkpoints. close closes them.
func openCopies(paths []string) (out []io.Reader, closeAll func(), err error) {
	var files []*os.File
	closeAll = func() {
		for _, f := range files {
			_ = f.Close() // was read only
		}
	}
	for _, p := range paths {
		f, err := os.Open(p)
		if err != nil {
			closeAll()
			return nil, nil, fmt.Errorf("open copied checkpoints: %w", err)
		}
		files = append(files, f)
		out = append(out, f)
	}
	return out, closeAll, nil
}

// writeTo writes a file that is whole or not there, or, for "-", to the output.
func writeTo(k *kong.Context, path string, write func(io.Writer) error) error {
	if path == "-" {
		return write(k.Stdout)
	}
	return evidence.WriteFile(path, write)
}

// printJSON prints a document in one line, entries in it to the byte.
func printJSON(k *kong.Context, v any) error {
	text, err := evidence.JSON(v)
	if err == nil {
		_, err = fmt.Fprintf(k.Stdout, "%s\n", text)
	}
	return err
}

type auditKeyCmd struct{ logStore }

func (c *auditKeyCmd) Run(ctx context.Context, k *kong.Context) error {
	return c.with(ctx, func(store *sqlstore.Store, _ config.Config) error {
		keys, err := checkpointKeys(ctx, store)
		for _, key := range keys {
			until := ""
			if !key.RetiredAt.IsZero() {
				until = "  until " + key.RetiredAt.Format(time.RFC3339)
			}
			fmt.Fprintf(k.Stdout, "%s  since %s%s\n", key.ID, key.ActiveAt.Format(time.RFC3339), until)
		}
		return err
	})
}

type auditCheckpointCmd struct{ logStore }

func (c *auditCheckpointCmd) Run(ctx context.Context, k *kong.Context) error {
	return c.with(ctx, func(store *sqlstore.Store, _ config.Config) error {
		return store.View(ctx, func(tx *sqlstore.Tx) error {
			head, err := audit.HeadOf(ctx, tx)
			if err == nil {
				_, err = io.WriteString(k.Stdout, head.Checkpoint)
			}
			return err
		})
	})
}

type auditProofCmd struct {
	logStore
	Index *int64 `arg:"" optional:"" help:"Index of the entry."`
	Since *int64 `placeholder:"SIZE" help:"Prove instead that the log begins with what it was at this size, which an older checkpoint has."`
}

// Validate is called by kong.
func (c *auditProofCmd) Validate() error {
	if (c.Index == nil) == (c.Since == nil) {
		return fmt.Errorf("expected either the index of an entry or --since")
	}
	return nil
}

func (c *auditProofCmd) Run(ctx context.Context, k *kong.Context) error {
	return c.with(ctx, func(store *sqlstore.Store, _ config.Config) error {
		var proof any
		err := store.View(ctx, func(tx *sqlstore.Tx) (err error) {
			if c.Since != nil {
				proof, err = audit.ProveSince(ctx, tx, *c.Since)
			} else {
				proof, err = audit.Prove(ctx, tx, *c.Index)
			}
			return err
		})
		if err != nil {
			return err
		}
		return printJSON(k, proof)
	})
}

type auditTailCmd struct {
	logStore
	N      int  `short:"n" default:"20" help:"How many of the latest entries."`
	Follow bool `short:"f" help:"Go on with those to come."`
	JSON   bool `help:"Print entries as they were hashed."`
}

// Validate is called by kong.
func (c *auditTailCmd) Validate() error {
	if c.N < 0 {
		return fmt.Errorf("-n can't be negative")
	}
	return nil
}

const (
	tailPage  = 500
	tailEvery = 500 * time.Millisecond
)

func (c *auditTailCmd) Run(ctx context.Context, k *kong.Context) error {
	return c.with(ctx, func(store *sqlstore.Store, _ config.Config) error {
		var next int64
		err := store.View(ctx, func(tx *sqlstore.Tx) error {
			head, err := audit.HeadOf(ctx, tx)
			next = max(head.Size-int64(c.N), head.Pruned)
			return err
		})
		for err == nil {
			var n int
			if n, next, err = c.page(ctx, k, store, next); err != nil || n == tailPage {
				continue
			}
			if !c.Follow {
				return nil
			}
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(tailEvery):
			}
		}
		if stopped(ctx, err) {
			return nil
		}
		return err
	})
}

// page prints some entries and returns how many, and the index after them.
func (c *auditTailCmd) page(ctx context.Context, k *kong.Context, store *sqlstore.Store, next int64) (int, int64, error) {
	var list []audit.Sequenced
	err := store.View(ctx, func(tx *sqlstore.Tx) (err error) {
		list, err = tx.LogEntries(ctx, audit.Query{From: next, Limit: tailPage})
		return err
	})
	var b strings.Builder
	for _, s := range list {
		next = s.Index + 1
		if e, err := audit.ParseRecord(s.Record); c.JSON || err != nil {
			text, err := evidence.JSON(struct {
				Index int64           `json:"index"`
				Entry json.RawMessage `json:"entry"`
			}{s.Index, s.Record})
			if err != nil {
				return 0, 0, fmt.Errorf("entry %d: %w", s.Index, err)
			}
			fmt.Fprintf(&b, "%s\n", text)
		} else {
			fmt.Fprintln(&b, evidence.Line(s.Index, e))
		}
	}
	if err == nil {
		_, err = io.WriteString(k.Stdout, b.String())
	}
	return len(list), next, err
}
