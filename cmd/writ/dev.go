package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/writsec/writ/internal/dev"
	"github.com/writsec/writ/internal/telemetry"
)

type devCmd struct {
	Dir      string `default:".writ" type:"path" help:"Folder for data and sample policies."`
	Policies string `type:"existingdir" help:"Directory of Rego to use instead of the sample policies."`
	Port     uint16 `default:"8180" help:"Port of the API; the next two are for operations and for the OpenID provider. 0 takes any free ones."`
	Postgres string `env:"WRIT_POSTGRES" placeholder:"URL" help:"PostgreSQL server, of 16 or later, as a superuser: a CRM's database is made there, for credentials of the minter crm-db. Or a database that writ postgres bootstrap has prepared, as the minter's account."`
	Quiet    bool   `short:"q" help:"Log only what goes wrong."`
}

func (d *devCmd) Run(ctx context.Context) error {
	level := slog.LevelInfo
	if d.Quiet {
		level = slog.LevelWarn
	}
	at := func(i int) string {
		if d.Port == 0 {
			return "127.0.0.1:0"
		}
		return fmt.Sprintf("127.0.0.1:%d", int(d.Port)+i)
	}
	log := telemetry.NewTextLogger(os.Stderr, level)
	stopTracing, err := telemetry.Setup(ctx, log)
	if err != nil {
		return err
	}
	defer stopTracing()
	w, err := dev.New(ctx, dev.Config{
		Dir: d.Dir, Policies: d.Policies, Listen: at(0), OpsListen: at(1), IDPListen: at(2), Postgres: d.Postgres, Logger: log,
	})
	if stopped(ctx, err) {
		return nil
	}
	if err != nil {
		return err
	}
	fmt.Printf(devText, w.URL, w.Server.OpsAddr(), w.IDP.Issuer(), w.IDP.PhoneURL(), near(d.Dir), near(w.Policies),
		w.URL, w.IDP.Issuer(),
		w.URL, w.IDP.Issuer(),
		w.URL, w.IDP.Issuer(),
		w.URL, w.IDP.Issuer(),
		near(filepath.Join(d.Dir, "writ.yaml")))
	if w.Database != nil {
		fmt.Printf(devDatabaseText, w.URL, w.IDP.Issuer())
	}
	return w.Run(ctx)
}

// near writes a path below the working directory relative to it.
func near(path string) string {
	if cwd, err := os.Getwd(); err == nil {
		if rel, err := filepath.Rel(cwd, path); err == nil && filepath.IsLocal(rel) {
			return rel
		}
	}
	return path
}

const devText = `Writ is running for development. Everything is on loopback; stop it with Ctrl-C.

  API             %s
  operations      http://%s  (/livez /readyz /metrics)
  OpenID provider %s  (users alice, bob, carol, operator olga; no passwords)
  phone page      %s
  data            %s
  policies        %s  (edit them: they reload by themselves)

Try it. alice's agent reads the CRM, and gets a credential:

curl -s %s/decide -H 'Content-Type: application/json' -H "Authorization: Bearer $(curl -s '%s/dev/token?user=alice&agent=sales-agent')" -d '{"intent":{"action":"crm.opportunity.read","purpose":"Summarise the pipeline"},"resource":{"type":"crm.opportunity","id":"opp-42"}}'

It may not touch payments, and is told why:

curl -s %s/decide -H 'Content-Type: application/json' -H "Authorization: Bearer $(curl -s '%s/dev/token?user=alice&agent=sales-agent')" -d '{"intent":{"action":"payments.transfer.create","parameters":{"amount":500,"currency":"EUR","creditor":"ACME"}},"resource":{"type":"payments.account","id":"main"}}'

bob's agent offboards someone: approve it on the phone page within a minute, and the answer comes:

curl -s %s/decide -H 'Content-Type: application/json' -H 'Prefer: wait=60' -H "Authorization: Bearer $(curl -s '%s/dev/token?user=bob&agent=hr-agent')" -d '{"intent":{"action":"hr.employee.offboard"},"resource":{"type":"hr.employee","id":"e-1001"}}'

An agent without a user's token gets a link: open it in a browser, sign in and allow (docs/signin.md):

curl -s %s/sessions -H 'Content-Type: application/json' -H "Authorization: Bearer $(curl -s '%s/dev/token?kind=agent&agent=sales-agent')" -d '{"task":"Summarise the pipeline"}'

The agents are sales-agent, hr-agent and finance-agent; olga pulls the kill switch through ops-console (docs/operations.md).
See what was written down: writ audit tail --config %s (docs/audit.md has how to prove it).

`

const devDatabaseText = `alice's agent queries the CRM's database: the answer has a role that lives a minute, and its dsn for psql:

curl -s %s/decide -H 'Content-Type: application/json' -H "Authorization: Bearer $(curl -s '%s/dev/token?user=alice&agent=sales-agent')" -d '{"intent":{"action":"crm.database.query"},"resource":{"type":"crm.tenant","id":"acme"}}'

`
