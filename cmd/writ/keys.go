package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"text/tabwriter"
	"time"

	"github.com/writsec/writ/internal/config"
	"github.com/writsec/writ/internal/minter"
	"github.com/writsec/writ/internal/server"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/telemetry"
)

type keysCmd struct {
	List   keysListCmd   `cmd:"" help:"List the keys in the store, without what is secret of them."`
	Rotate keysRotateCmd `cmd:"" help:"Add a key that takes over; all replicas follow by themselves."`
	Rewrap keysRewrapCmd `cmd:"" help:"Put the keys under another root key. Then change root_key_file and restart each replica."`
}

// configFile is the flag of commands that work on the store of a configuration.
type configFile struct {
	Config string `required:"" placeholder:"FILE" help:"Configuration file (YAML), of the Writ whose store it is."`
}

// open opens the store beside a Writ that may be running.
func (c configFile) open(ctx context.Context) (*sqlstore.Store, config.Config, error) {
	cfg, err := config.Load(c.Config)
	if err != nil {
		return nil, cfg, err
	}
	s, err := server.OpenStoreTool(ctx, cfg, telemetry.NewTextLogger(os.Stderr, slog.LevelWarn))
	return s, cfg, err
}

type keysListCmd struct{ configFile }

func (c keysListCmd) Run(ctx context.Context) error {
	s, _, err := c.open(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = s.Close() }()
	keys, err := s.ListKeys(ctx)
	if err != nil {
		return err
	}
	return listKeys(os.Stdout, keys, s.Now())
}

func listKeys(out io.Writer, keys []sqlstore.Key, now time.Time) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "PURPOSE\tSTATE\tACTIVE FROM\tBELIEVED UNTIL\tKEY")
	signs := signingNow(keys, now)
	for _, k := range keys {
		state, until := "active", "-"
		if !k.RetiredAt.IsZero() {
			until, state = k.RetiredAt.Format(time.RFC3339), "retiring"
		}
		switch {
		case !k.RetiredAt.IsZero() && !now.Before(k.RetiredAt):
			state = "retired"
		case now.Before(k.ActiveAt):
			state = "next"
		case k.ID == signs: // until its successor takes over
			state = "active"
		case k.Purpose == sqlstore.SigningKey:
			state = "retiring"
		}
		from := k.ActiveAt
		if from.IsZero() {
			from = k.CreatedAt
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", k.Purpose, state, from.Format(time.RFC3339), until, k.ID)
	}
	return w.Flush()
}

// signingNow is the id of the key that signs credentials, "" for none.
func signingNow(keys []sqlstore.Key, now time.Time) (id string) {
	var since time.Time
	for _, k := range keys {
		believed := k.RetiredAt.IsZero() || now.Before(k.RetiredAt)
		if k.Purpose == sqlstore.SigningKey && believed && !now.Before(k.ActiveAt) && !k.ActiveAt.Before(since) {
			id, since = k.ID, k.ActiveAt
		}
	}
	return id
}

type keysRotateCmd struct {
	configFile
	Purpose     string `arg:"" enum:"signing,checkpoint,data" help:"signing (credentials), checkpoint (the log) or data (encryption in the store)."`
	Compromised bool   `help:"Of signing: use the new key at once and believe the old ones no more. Tokens that they signed end."`
}

// checkpointLife gives everyone time to learn the new verifier key; until then both
// sign.
const checkpointLife = 30 * 24 * time.Hour

func (c keysRotateCmd) Run(ctx context.Context) error {
	if c.Compromised && c.Purpose != "signing" {
		return errors.New("--compromised is for signing keys; rotate the others and see docs/operations.md")
	}
	s, cfg, err := c.open(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = s.Close() }()
	switch c.Purpose {
	case "data":
		root, err := config.RootKey(cfg.RootKeyFile)
		if err != nil {
			return err
		}
		if err := s.RotateDataKey(ctx, root); err != nil {
			return err
		}
		fmt.Println("A new data key encrypts from a minute on; the old ones stay, to open what they encrypted.")
		return nil
	case "checkpoint":
		return rotateCheckpoint(ctx, s)
	}
	added, retire, err := minter.Rotate(ctx, s, server.RotationOf(cfg), c.Compromised)
	if err != nil {
		return err
	}
	fmt.Printf("Key %s signs credentials from %s on; the keys before it are believed until %s.\n",
		added.ID, added.ActiveAt.Format(time.RFC3339), retire.Format(time.RFC3339))
	return nil
}

func rotateCheckpoint(ctx context.Context, s *sqlstore.Store) error {
	verifier, err := s.RotateCheckpointKey(ctx, checkpointLife)
	if err != nil {
		return err
	}
	fmt.Printf("Checkpoints are signed by the new key too from now on, and by the old ones for %d days. Its verifier key:\n%s\n",
		int(checkpointLife.Hours())/24, verifier)
	return nil
}

type keysRewrapCmd struct {
	configFile
	NewRootKeyFile string `required:"" type:"existingfile" placeholder:"FILE" help:"Holds the new root key."`
}

func (c keysRewrapCmd) Run(ctx context.Context) error {
	next, err := config.RootKey(c.NewRootKeyFile)
	if err != nil {
		return err
	}
	s, cfg, err := c.open(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = s.Close() }()
	old, err := config.RootKey(cfg.RootKeyFile)
	if err != nil {
		return err
	}
	if old == next {
		return errors.New("the new root key is the one that is in use")
	}
	if err := s.Rewrap(ctx, old, next); err != nil {
		return err
	}
	fmt.Printf("The keys are under the new root key. Set root_key_file to %s and restart each replica; those that run go on until then.\n", c.NewRootKeyFile)
	return nil
}
