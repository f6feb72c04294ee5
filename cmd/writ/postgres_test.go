package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/alecthomas/kong"
	"github.com/google/go-cmp/cmp"

	"github.com/writsec/writ/internal/config"
	"github.com/writsec/writ/internal/minter"
)

const postgresConfig = `  crm-db:
    max_ttl: 2m
    postgres:
      url: postgres://writ_minter@127.0.0.1:1/crm
      password_file: password
      groups: [crm_ro]
      tenants: required
      search_path: [crm]
`

func parsePostgres(t *testing.T, args ...string) postgresBootstrapCmd {
	t.Helper()
	var c struct {
		Postgres postgresCmd `cmd:""`
	}
	if _, err := kong.Must(&c).Parse(append([]string{"postgres", "bootstrap"}, args...)); err != nil {
		t.Fatal(err)
	}
	return c.Postgres.Bootstrap
}

func TestPostgresBootstrapFlags(t *testing.T) {
	b := newBench(t)
	file := b.write("db.yaml", benchConfig+postgresConfig)
	b.write("password", "the account's\n")
	want := minter.Bootstrap{
		Database: "crm", Schema: "writ", Owner: "writ_owner", Account: "writ_minter", Groups: []string{"crm_ro"}, Tenants: "required", MaxTTL: 2 * time.Minute,
		ConnectionLimit: 3, StatementTimeout: 30 * time.Second, TransactionTimeout: time.Minute, SearchPath: []string{"crm"}, Harden: true,
	}
	for _, c := range []struct {
		name   string
		args   []string
		change func(*minter.Bootstrap)
	}{
		{"the configuration", []string{"--config", file}, func(*minter.Bootstrap) {}},
		{"one of it", []string{"--config", file, "--minter", "crm-db"}, func(*minter.Bootstrap) {}},
		{"with its password", []string{"--config", file, "--with-password"}, func(b *minter.Bootstrap) { b.Password = "the account's" }},
		{"flags before it", []string{"--config", file, "--owner", "o", "--max-ttl", "1m", "--statement-timeout", "0s", "--group", "a", "--group", "b", "--no-harden"}, func(b *minter.Bootstrap) {
			b.Owner, b.MaxTTL, b.StatementTimeout, b.Groups, b.Harden = "o", time.Minute, 0, []string{"a", "b"}, false
		}},
		{"flags alone", []string{"--group", "a"}, func(b *minter.Bootstrap) {
			b.Database, b.Tenants, b.MaxTTL, b.Groups, b.SearchPath = "", "none", 5*time.Minute, []string{"a"}, nil
		}},
	} {
		got, err := parsePostgres(t, c.args...).bootstrap()
		want := want
		c.change(&want)
		if diff := cmp.Diff(want, got); diff != "" || err != nil {
			t.Errorf("%s: %v\n%s", c.name, err, diff)
		}
		if text, err := minter.BootstrapSQL(got); err != nil || strings.Contains(text, "the account's") {
			t.Errorf("%s: %v, or the password stands in it", c.name, err)
		}
	}
	for want, args := range map[string][]string{
		"no postgres minter \"crm\"": {"--config", file, "--minter", "crm"},
		"has no postgres minter":     {"--config", b.path("writ.yaml")},
		"need --config":              {"--group", "a", "--with-password"},
		"choose one by --minter":     {"--config", b.write("two.yaml", benchConfig+postgresConfig+strings.Replace(postgresConfig, "crm-db", "other", 1))},
	} {
		if _, err := parsePostgres(t, args...).bootstrap(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", args, err, want)
		}
	}
}

func TestPostgresDoctorUnreachable(t *testing.T) {
	b := newBench(t)
	b.write("password", "the account's\n")
	file := b.write("db.yaml", benchConfig+postgresConfig)
	cfg, err := config.Load(file)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	failed, err := examine(t.Context(), &out, "crm-db", cfg.Minters["crm-db"])
	if failed != 1 || err != nil || !strings.HasPrefix(out.String(), "crm-db\n  fail  can't connect: ") || !strings.Contains(out.String(), "        mend: check the address") || strings.Contains(out.String(), "the account's") {
		t.Errorf("%d, %v:\n%s", failed, err, out.String())
	}
	if err := (postgresDoctorCmd{Config: file}).Run(t.Context()); err == nil || err.Error() != "1 findings to mend" {
		t.Error(err)
	}
}
