package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/alecthomas/kong"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/config"
	"github.com/writsec/writ/internal/evidence"
	"github.com/writsec/writ/internal/sqlstore"
)

type auditVerifyCmd struct {
	Files       []string `arg:"" optional:"" type:"existingfile" help:"Archives and exports, each going on where the one before ended."`
	Config      string   `placeholder:"FILE" help:"Verify the log in the store of this configuration instead."`
	Proof       string   `placeholder:"FILE" type:"existingfile" help:"Verify the proof of one entry instead."`
	Incident    string   `placeholder:"FILE" type:"existingfile" help:"Verify an incident instead."`
	Consistency string   `placeholder:"FILE" type:"existingfile" help:"Verify instead the proof that a log only grew since an older checkpoint."`
	Older       string   `placeholder:"FILE" type:"existingfile" help:"The older checkpoint."`

	Key    []string `required:"" sep:"none" placeholder:"VKEY" help:"Verifier key, kept apart from what is verified (writ audit key prints it). Repeat it for several."`
	Copies []string `sep:"none" type:"existingfile" placeholder:"FILE" help:"Checkpoints that left the machine. Repeat it for several places. With --config, audit.copies.file is taken without asking."`
}

// Validate is called by kong.
func (c *auditVerifyCmd) Validate() error {
	n := min(len(c.Files), 1)
	for _, other := range []string{c.Config, c.Proof, c.Incident, c.Consistency} {
		if other != "" {
			n++
		}
	}
	switch {
	case n != 1:
		return errors.New("expected one of: files, --config, --proof, --incident, --consistency")
	case (c.Older != "") != (c.Consistency != ""):
		return errors.New("--consistency and --older go together")
	case len(c.Copies) > 0 && len(c.Files) == 0 && c.Config == "":
		return errors.New("--copies goes with files or --config")
	case len(c.Key) == 0:
		return errors.New("--key is needed: a verifier key that does not come from what is verified")
	}
	_, err := evidence.NewVerifier(evidence.Options{Verifiers: c.Key})
	return err
}

func (c *auditVerifyCmd) Run(ctx context.Context, k *kong.Context) error {
	switch {
	case c.Config != "":
		return c.store(ctx, k.Stdout)
	case c.Proof != "":
		return c.proof(k.Stdout)
	case c.Incident != "":
		return c.incident(k.Stdout)
	case c.Consistency != "":
		return c.consistency(k.Stdout)
	default:
		return c.files(k.Stdout)
	}
}

func (c *auditVerifyCmd) files(w io.Writer) error {
	copies, closeAll, err := openCopies(c.Copies)
	if err != nil {
		return err
	}
	defer closeAll()
	v, err := evidence.NewVerifier(evidence.Options{Verifiers: c.Key, Copies: copies})
	if err != nil {
		return err
	}
	for _, path := range c.Files {
		if err := readFile(path, func(r io.Reader) error { return v.Read(r) }); err != nil {
			return err
		}
	}
	return show(w, v.Report(), len(copies) > 0)
}

func (c *auditVerifyCmd) store(ctx context.Context, w io.Writer) error {
	return logStore{c.Config}.with(ctx, func(store *sqlstore.Store, cfg config.Config) error {
		copies, closeAll, err := openCopies(withCopies(c.Copies, cfg))
		if err != nil {
			return err
		}
		defer closeAll()
		r, err := evidence.VerifyStore(ctx, evidenceOf(store), evidence.Options{Verifiers: c.Key, Copies: copies})
		if err != nil {
			return err
		}
		err = store.View(ctx, func(tx *sqlstore.Tx) error {
			load, err := tx.Load(ctx)
			if load.Unsequenced > 0 {
				r.Notes = append(r.Notes, fmt.Sprintf("%d entries wait to be put into the log, and are in no proof yet", load.Unsequenced))
			}
			return err
		})
		if err != nil {
			return err
		}
		return show(w, r, len(copies) > 0)
	})
}

// withCopies adds the file that the configuration names, once there is one.
func withCopies(paths []string, cfg config.Config) []string {
	if file := cfg.Audit.Copies.File; file != "" && len(paths) == 0 {
		if _, err := os.Stat(file); err == nil {
			return []string{file}
		}
	}
	return paths
}

func (c *auditVerifyCmd) proof(w io.Writer) error {
	return readFile(c.Proof, func(r io.Reader) error {
		p, checkpoint, err := evidence.VerifyProof(r, c.Key)
		if err != nil {
			return notVerified(w, err.Error())
		}
		e, err := audit.ParseRecord(p.Entry)
		if err != nil {
			return notVerified(w, err.Error())
		}
		fmt.Fprintf(w, "verified: entry %d is in the log %s, by its checkpoint of %d entries\n  %s\n",
			p.Index, checkpoint.Origin, checkpoint.Size, evidence.Line(p.Index, e))
		return nil
	})
}

func (c *auditVerifyCmd) consistency(w io.Writer) error {
	older, err := os.ReadFile(c.Older)
	if err != nil {
		return fmt.Errorf("read the older checkpoint: %w", err)
	}
	return readFile(c.Consistency, func(r io.Reader) error {
		from, to, err := evidence.VerifyConsistency(r, strings.TrimRight(string(older), "\n")+"\n", c.Key)
		if err != nil {
			return notVerified(w, err.Error())
		}
		fmt.Fprintf(w, "verified: the log %s grew from %d to %d entries, and the first %d are unchanged\n", to.Origin, from.Size, to.Size, from.Size)
		return nil
	})
}

func (c *auditVerifyCmd) incident(w io.Writer) error {
	return readFile(c.Incident, func(r io.Reader) error {
		report, err := evidence.VerifyIncident(r, c.Key)
		if err != nil {
			return err
		}
		return showIncident(w, report)
	})
}

func showIncident(w io.Writer, r evidence.IncidentReport) error {
	if len(r.Problems) > 0 {
		return failed(w, r.Problems, r.Notes)
	}
	fmt.Fprintf(w, "verified: %d entries about %s, each in the log %s by its checkpoint of %d entries\n", r.Entries, r.About, r.Origin, r.To)
	notes(w, r.Notes)
	return nil
}

// show says to a person what was verified, and what confirms it.
func show(w io.Writer, r evidence.Report, copied bool) error {
	if len(r.Problems) > 0 {
		return failed(w, r.Problems, r.Notes)
	}
	n := r.To - r.From
	fmt.Fprintf(w, "verified: %d entries, %d to %d, of the log %s\n", n, r.From, r.To-1, r.Origin)
	fmt.Fprintf(w, "  signed       checkpoint of %d entries, root %s\n", r.Checkpoint.Size, r.Checkpoint.Root)
	if r.To < r.Checkpoint.Size {
		fmt.Fprintf(w, "  root         %s at %d entries\n", r.Root, r.To)
	}
	if n > 0 {
		fmt.Fprintf(w, "  time         %s to %s\n", r.First.Format(time.RFC3339), r.Last.Format(time.RFC3339))
	}
	switch {
	case !copied:
		fmt.Fprintln(w, "  copies       none were given: whoever has the signing key could have rewritten all of it")
	case r.Copies == 0:
		fmt.Fprintln(w, "  copies       none confirm it: whoever has the signing key could have rewritten all of it")
	case r.Covered < r.To:
		fmt.Fprintf(w, "  copies       %d agree, up to %d entries; the %d after these are confirmed by none\n", r.Copies, r.Covered, r.To-r.Covered)
	default:
		fmt.Fprintf(w, "  copies       %d agree, up to all %d entries\n", r.Copies, r.Covered)
	}
	notes(w, r.Notes)
	return nil
}

func notes(w io.Writer, lines []string) {
	for _, n := range lines {
		fmt.Fprintln(w, "  note        ", n)
	}
}

// failed prints one line for each problem.
func failed(w io.Writer, problems []evidence.Problem, more []string) error {
	var lines []string
	for _, p := range problems {
		lines = append(lines, p.String())
	}
	err := notVerified(w, lines...)
	notes(w, more)
	return err
}

func notVerified(w io.Writer, problems ...string) error {
	for _, p := range problems {
		fmt.Fprintln(w, "FAILED", p)
	}
	if len(problems) == 1 {
		return errors.New("not verified: 1 problem")
	}
	return fmt.Errorf("not verified: %d problems", len(problems))
}

// readFile runs f on a file.
func readFile(path string, f func(io.Reader) error) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }() // was read only
	return f(file)
}
