package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/writsec/writ/internal/config"
	"github.com/writsec/writ/internal/minter"
	"github.com/writsec/writ/internal/server"
)

type postgresCmd struct {
	Bootstrap postgresBootstrapCmd `cmd:"" help:"Print the SQL that makes a database a target of a postgres minter, for its administrator to read and run."`
	Doctor    postgresDoctorCmd    `cmd:"" help:"Examine targets, and make, use and end a credential at each. The exit status is 1 if a promise does not hold."`
}

type postgresBootstrapCmd struct {
	Config string `placeholder:"FILE" help:"Configuration file (YAML) that has the minter. What else is given here goes before it."`
	Minter string `placeholder:"NAME" help:"Minter in the configuration; may be left out if there is one of the kind."`

	Group            []string       `placeholder:"ROLE" help:"Role that leases can be given; may be repeated."`
	Database         string         `placeholder:"NAME" help:"Refuse to run in another database."`
	Schema           string         `placeholder:"NAME" help:"Schema of Writ's functions (writ)."`
	Owner            string         `placeholder:"ROLE" help:"Owner of Writ's functions (writ_owner). Each database of a server needs its own."`
	Account          string         `placeholder:"ROLE" help:"Role that Writ logs in as (writ_minter)."`
	Tenants          string         `placeholder:"HOW" help:"required, optional or none (none)."`
	MaxTTL           time.Duration  `placeholder:"TIME" help:"The longest life of a lease (5m)."`
	ConnectionLimit  int            `placeholder:"N" help:"Connections of one lease (3)."`
	StatementTimeout *time.Duration `placeholder:"TIME" help:"What sessions of leases start with (30s)."`
	IdleTimeout      *time.Duration `name:"idle-in-transaction-timeout" placeholder:"TIME" help:"What sessions of leases start with (1m)."`
	SearchPath       []string       `placeholder:"SCHEMA" help:"What sessions of leases start with."`
	WithPassword     bool           `help:"Set the account's password, as a SCRAM verifier, from password_file of the configuration."`
	Harden           bool           `negatable:"" default:"true" help:"Take from PUBLIC what would make agents owners of something."`
}

func (c postgresBootstrapCmd) Run() error {
	b, err := c.bootstrap()
	if err != nil {
		return err
	}
	text, err := minter.BootstrapSQL(b)
	if err == nil {
		_, err = io.WriteString(os.Stdout, text)
	}
	return err
}

func (c postgresBootstrapCmd) bootstrap() (minter.Bootstrap, error) {
	b := minter.Bootstrap{
		Schema: "writ", Owner: "writ_owner", Account: "writ_minter", Tenants: minter.TenantsNone, MaxTTL: 5 * time.Minute,
		ConnectionLimit: 3, StatementTimeout: 30 * time.Second, TransactionTimeout: time.Minute,
	}
	if c.Config != "" {
		cfg, err := config.Load(c.Config)
		if err != nil {
			return b, err
		}
		names, err := postgresMinters(cfg, c.Minter)
		if err != nil {
			return b, err
		}
		if len(names) != 1 {
			return b, fmt.Errorf("the configuration has the postgres minters %s; choose one by --minter", strings.Join(names, ", "))
		}
		m := cfg.Minters[names[0]]
		b = server.PostgresBootstrap(m)
		if c.WithPassword {
			if m.Postgres.PasswordFile == "" {
				return b, errors.New("--with-password: the minter has no password_file")
			}
			if b.Password, err = config.Secret(m.Postgres.PasswordFile); err != nil {
				return b, err
			}
		}
	} else if c.Minter != "" || c.WithPassword {
		return b, errors.New("--minter and --with-password need --config")
	}
	b.Harden = c.Harden
	set(&b.Database, c.Database)
	set(&b.Schema, c.Schema)
	set(&b.Owner, c.Owner)
	set(&b.Account, c.Account)
	set(&b.Tenants, c.Tenants)
	set(&b.MaxTTL, c.MaxTTL)
	set(&b.ConnectionLimit, c.ConnectionLimit)
	if c.StatementTimeout != nil {
		b.StatementTimeout = *c.StatementTimeout
	}
	if c.IdleTimeout != nil {
		b.TransactionTimeout = *c.IdleTimeout
	}
	if len(c.Group) > 0 {
		b.Groups = c.Group
	}
	if len(c.SearchPath) > 0 {
		b.SearchPath = c.SearchPath
	}
	return b, nil
}

// set overrides a value where a flag was given.
func set[T comparable](v *T, flag T) {
	var none T
	if flag != none {
		*v = flag
	}
}

// postgresMinters names the minters of the kind, or the one that is asked for.
func postgresMinters(cfg config.Config, only string) ([]string, error) {
	var names []string
	for _, name := range slices.Sorted(maps.Keys(cfg.Minters)) {
		if cfg.Minters[name].Postgres != nil && (only == "" || only == name) {
			names = append(names, name)
		}
	}
	switch {
	case len(names) > 0:
		return names, nil
	case only != "":
		return nil, fmt.Errorf("the configuration has no postgres minter %q", only)
	}
	return nil, errors.New("the configuration has no postgres minter")
}

type postgresDoctorCmd struct {
	Config string `required:"" placeholder:"FILE" help:"Configuration file (YAML)."`
	Minter string `placeholder:"NAME" help:"Examine this one only."`
}

func (c postgresDoctorCmd) Run(ctx context.Context) error {
	cfg, err := config.Load(c.Config)
	if err != nil {
		return err
	}
	names, err := postgresMinters(cfg, c.Minter)
	if err != nil {
		return err
	}
	failed := 0
	for _, name := range names {
		n, err := examine(ctx, os.Stdout, name, cfg.Minters[name])
		if err != nil {
			return err
		}
		failed += n
	}
	if failed > 0 {
		return fmt.Errorf("%d findings to mend", failed)
	}
	return nil
}

// examine prints what is found at one target, and counts what fails.
func examine(ctx context.Context, out io.Writer, name string, m config.Minter) (failed int, err error) {
	p, err := server.NewPostgres(name, m)
	if err != nil {
		return 0, err
	}
	defer p.Close()
	fmt.Fprintln(out, name)
	for _, f := range p.Doctor(ctx, server.PostgresBootstrap(m)) {
		fmt.Fprintf(out, "  %-4s  %s\n", f.Level, f.Text)
		if f.Mend != "" {
			fmt.Fprintf(out, "        mend: %s\n", f.Mend)
		}
		if f.Level == minter.FindingFail {
			failed++
		}
	}
	return failed, nil
}
