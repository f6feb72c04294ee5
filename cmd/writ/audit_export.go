package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"time"

	"github.com/alecthomas/kong"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/config"
	"github.com/writsec/writ/internal/evidence"
	"github.com/writsec/writ/internal/sqlstore"
)

type auditExportCmd struct {
	logStore
	Out     string `required:"" placeholder:"FILE" help:"File to write; - is the output."`
	Format  string `enum:"jsonl,ocsf" default:"jsonl" help:"jsonl can be verified; ocsf is for a SIEM (OCSF API Activity)."`
	From    int64  `default:"-1" placeholder:"N" help:"Index of the first entry. Default: the first in the store."`
	To      int64  `placeholder:"N" help:"Index after the last entry. Default: to the end."`
	Session string `placeholder:"ID" help:"Only entries of this session. With ocsf; writ audit incident proves them."`
}

// Validate is called by kong.
func (c *auditExportCmd) Validate() error {
	if c.Session != "" && c.Format != "ocsf" {
		return errors.New("--session goes with --format ocsf: a verifiable export has no gaps; see writ audit incident")
	}
	return nil
}

func (c *auditExportCmd) Run(ctx context.Context, k *kong.Context) error {
	return c.with(ctx, func(store *sqlstore.Store, _ config.Config) error {
		if c.Format == "ocsf" {
			return c.ocsf(ctx, k, store)
		}
		vkeys, err := verifiersOf(ctx, store)
		if err != nil {
			return err
		}
		var h evidence.Header
		err = writeTo(k, c.Out, func(w io.Writer) error {
			h, err = evidence.Export(ctx, evidenceOf(store), w, c.From, c.To, vkeys)
			return err
		})
		if err == nil {
			fmt.Fprintf(k.Stderr, "wrote %d entries, %d to %d, of the log %s\nprove them with: writ audit verify %s --key VKEY\n",
				h.To-h.From, h.From, h.To-1, h.Origin, c.Out)
		}
		return err
	})
}

func (c *auditExportCmd) ocsf(ctx context.Context, k *kong.Context, store *sqlstore.Store) (err error) {
	n := 0
	err = writeTo(k, c.Out, func(w io.Writer) error {
		q := audit.Query{From: c.From, To: c.To, Session: c.Session}
		n, err = evidence.ExportOCSF(ctx, evidenceOf(store), w, q, moduleVersion())
		return err
	})
	if err == nil {
		fmt.Fprintf(k.Stderr, "wrote %d events\n", n)
	}
	return err
}

func moduleVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" && info.Main.Version != "(devel)" {
		return info.Main.Version
	}
	return "devel"
}

type auditIncidentCmd struct {
	logStore
	Out     string `required:"" placeholder:"FILE" help:"File to write."`
	Session string `xor:"about" required:"" placeholder:"ID" help:"About a session."`
	User    string `xor:"about" required:"" placeholder:"ISSUER#SUBJECT" help:"About a user, with all of their sessions."`
	Agent   string `xor:"about" required:"" placeholder:"ISSUER#SUBJECT" help:"About an agent, with all of its sessions."`

	about evidence.Subject
}

// Validate is called by kong.
func (c *auditIncidentCmd) Validate() error {
	c.about.Session = c.Session
	if c.User != "" {
		user, err := evidence.ParseRef(c.User)
		if err != nil {
			return fmt.Errorf("--user: %w", err)
		}
		c.about.User = &user
	}
	if c.Agent != "" {
		agent, err := evidence.ParseRef(c.Agent)
		if err != nil {
			return fmt.Errorf("--agent: %w", err)
		}
		c.about.Agent = &agent
	}
	return nil
}

func (c *auditIncidentCmd) Run(ctx context.Context, k *kong.Context) error {
	return c.with(ctx, func(store *sqlstore.Store, _ config.Config) error {
		vkeys, err := verifiersOf(ctx, store)
		if err != nil {
			return err
		}
		key, err := store.DigestKey(ctx)
		if err != nil {
			return fmt.Errorf("load digest key: %w", err)
		}
		keeper, err := audit.NewKeeper(key, nil)
		if err != nil {
			return err
		}
		err = evidence.WriteFile(c.Out, func(w io.Writer) error {
			_, err := evidence.WriteIncident(ctx, evidenceOf(store), w, evidence.Ask{
				About: c.about, Verifiers: vkeys, Now: store.Now(), Digest: keeper.Digest,
			})
			return err
		})
		if err != nil {
			return err
		}
		return readFile(c.Out, func(r io.Reader) error {
			report, err := evidence.VerifyIncident(r, vkeys)
			if err != nil {
				return err
			}
			return showIncident(k.Stdout, report)
		})
	})
}

type auditArchiveCmd struct {
	logStore
	Out    string   `required:"" placeholder:"FILE" help:"File to write, which must not exist."`
	Below  int64    `xor:"where" required:"" placeholder:"INDEX" help:"Archive the entries below this index."`
	Before string   `xor:"where" required:"" placeholder:"DATE" help:"Archive the entries before this day or time, such as 2026-01-31 or 2026-01-31T12:00:00Z."`
	Key    []string `sep:"none" placeholder:"VKEY" help:"Verifier keys. Default: the store's own, which find a changed row but no rewritten log."`
	Copies []string `sep:"none" type:"existingfile" placeholder:"FILE" help:"Checkpoints that left the machine. Default: audit.copies.file."`

	before time.Time
}

// Validate is called by kong.
func (c *auditArchiveCmd) Validate() (err error) {
	if c.Before == "" {
		return nil
	}
	for _, layout := range []string{time.DateOnly, time.RFC3339} {
		if c.before, err = time.Parse(layout, c.Before); err == nil {
			return nil
		}
	}
	return fmt.Errorf("--before: expected a day or a time, such as 2026-01-31 or 2026-01-31T12:00:00Z, not %q", c.Before)
}

func (c *auditArchiveCmd) Run(ctx context.Context, k *kong.Context) error {
	return c.with(ctx, func(store *sqlstore.Store, cfg config.Config) error {
		o := evidence.Options{Verifiers: c.Key}
		var err error
		if len(o.Verifiers) == 0 {
			if o.Verifiers, err = verifiersOf(ctx, store); err != nil {
				return err
			}
		}
		below := c.Below
		if c.Before != "" {
			if below, err = evidence.Before(ctx, evidenceOf(store), c.before); err != nil {
				return err
			}
		}
		copies, closeAll, err := openCopies(withCopies(c.Copies, cfg))
		if err != nil {
			return err
		}
		defer closeAll()
		o.Copies = copies
		a, err := evidence.Archive(ctx, evidenceOf(store), sqlstore.For[evidence.PruneTx](store), c.Out, below, o)
		if err != nil {
			return err
		}
		if err := show(k.Stdout, a.Report, len(copies) > 0); err != nil {
			return fmt.Errorf("%w: nothing was archived", err)
		}
		fmt.Fprintf(k.Stdout, "archived: they are in %s alone now; sha256 %s\n", c.Out, a.SHA256)
		return nil
	})
}
