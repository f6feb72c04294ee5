// Command writ is a decision point for AI agents.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"

	"github.com/alecthomas/kong"

	"github.com/writsec/writ/internal/config"
	"github.com/writsec/writ/internal/server"
	"github.com/writsec/writ/internal/telemetry"
)

type cli struct {
	Serve    serveCmd    `cmd:"" help:"Run Writ."`
	Dev      devCmd      `cmd:"" help:"Run Writ with an embedded OpenID provider on loopback, to try it out."`
	Demo     demoCmd     `cmd:"" help:"Play the whole story on this machine and exit."`
	Policy   policyCmd   `cmd:"" help:"Try policies on earlier decisions."`
	Keys     keysCmd     `cmd:"" help:"List and rotate keys."`
	Postgres postgresCmd `cmd:"" help:"Prepare and examine the databases that postgres minters work on."`
	Audit    auditCmd    `cmd:"" help:"Show, export, prove and archive the log."`
	Lease    leaseCmd    `cmd:"" help:"List leases, and revoke them whatever else is broken."`
	Version  versionCmd  `cmd:"" help:"Print the version."`
}

// exitUsage is for what the caller can mend: flags and configuration.
const exitUsage = 2

func main() { os.Exit(run()) }

func run() (exit int) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var c cli
	parser := kong.Must(&c, kong.Name("writ"),
		kong.Description("Writ is a decision point for AI agents: it decides by policy, asks a human where that is due, and mints the credential for just that action."),
		kong.BindTo(ctx, (*context.Context)(nil)))
	k, err := parser.Parse(os.Args[1:])
	if err != nil {
		parser.Errorf("%s", err)
		return exitUsage
	}
	if err := k.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "writ:", err)
		if _, bad := errors.AsType[*config.Error](err); bad {
			return exitUsage
		}
		return 1
	}
	return 0
}

type serveCmd struct {
	Config   string `required:"" placeholder:"FILE" help:"Configuration file (YAML)."`
	Restored bool   `help:"The store comes from a backup: end all that it would revive. Where audit.copies.file is set, Writ sees that by itself."`
}

func (s *serveCmd) Run(ctx context.Context) error {
	cfg, err := config.Load(s.Config)
	if err != nil {
		return err
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(cfg.Log.Level)); err != nil {
		return err
	}
	log := telemetry.NewLogger(os.Stdout, level)
	stopTracing, err := telemetry.Setup(ctx, log)
	if err != nil {
		return err
	}
	defer stopTracing()
	srv, err := server.New(ctx, cfg, s.Restored, log)
	if stopped(ctx, err) {
		return nil
	}
	if err != nil {
		return err
	}
	return srv.Run(ctx)
}

// stopped tells a start that was told to stop from one that failed.
func stopped(ctx context.Context, err error) bool {
	return errors.Is(err, context.Canceled) && ctx.Err() != nil
}

type versionCmd struct{}

func (versionCmd) Run(k *kong.Context) error {
	version, revision := "devel", ""
	if info, ok := debug.ReadBuildInfo(); ok {
		if v := info.Main.Version; v != "" && v != "(devel)" {
			version = v
		}
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				revision = " " + s.Value
			}
		}
	}
	_, err := fmt.Fprintln(k.Stdout, "writ "+version+revision+" "+runtime.Version())
	return err
}
