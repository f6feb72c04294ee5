package config_test

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/writsec/writ/internal/config"
)

func TestPostgres(t *testing.T) {
	dir := folder(t)
	const least = "  db:\n    postgres:\n      url: postgres://writ_minter@127.0.0.1/crm\n      groups: [crm_ro]\n"
	with := func(block string) string { return edited(t, "minters:\n", "minters:\n"+block) }
	cfg, msg := load(t, dir, with(least))
	if msg != "" {
		t.Fatal(msg)
	}
	want := &config.Postgres{
		URL: "postgres://writ_minter@127.0.0.1/crm", Groups: []string{"crm_ro"}, Tenants: "none", Connections: 8, Schema: "writ", Owner: "writ_owner",
		ConnectionLimit: 3, StatementTimeout: 30 * time.Second, TransactionTimeout: time.Minute,
	}
	got := cfg.Minters["db"].Postgres
	if diff := cmp.Diff(want, got); diff != "" || got.Account() != "writ_minter" || got.Database() != "crm" {
		t.Error(diff)
	}

	line := func(l string) string { return least + "      " + l + "\n" }
	url := func(u string) string {
		return "  db:\n    postgres:\n      url: " + u + "\n      groups: [crm_ro]\n"
	}
	const at = "writ.yaml:19: minters.db.postgres."
	const beyond = "writ.yaml:17: minters.db.postgres.url: is beyond loopback: add sslmode=verify-full (and ca_file for a CA of your own), or say insecure: true"
	t.Setenv("PGSSLMODE", "verify-full") // agents do not have it
	for _, tt := range []struct{ name, block, want string }{
		{"verified", url("postgres://a@db.example/crm?sslmode=verify-full"), ""},
		{"insecure, and said so", url("postgres://a@db.example/crm") + "      insecure: true\n", ""},
		{"TLS that anybody can be", url("postgres://a@db.example/crm?sslmode=require"), beyond},
		{"TLS of any name", url("postgres://a@db.example/crm?sslmode=verify-ca"), beyond},
		{"TLS if it happens", url("postgres://a@db.example/crm"), beyond},
		{"no URL", "  db:\n    postgres:\n      groups: [crm_ro]\n", "writ.yaml:17: minters.db.postgres.url: is missing"},
		{"no database", url("postgres://a@127.0.0.1"), "writ.yaml:17: minters.db.postgres.url: names no account or no database, expected postgres://ACCOUNT@HOST:PORT/DATABASE"},
		{"password in the URL", url("postgres://a:b@127.0.0.1/crm"), "writ.yaml:17: minters.db.postgres.url: holds a password; put it into a file and name that as password_file"},
		{"password as a parameter", url("postgres://a@127.0.0.1/crm?password=b"), "writ.yaml:17: minters.db.postgres.url: holds a password; put it into a file and name that as password_file"},
		{"two servers", url("postgres://a@127.0.0.1,127.0.0.2/crm"), "writ.yaml:17: minters.db.postgres.url: names several hosts, expected one: a credential exists at one server"},
		{"another server behind the first", url("postgres://a@127.0.0.1/crm?host=db.example"), "writ.yaml:17: minters.db.postgres.url: names several hosts, expected one: a credential exists at one server"},
		{"another account in the query", url("postgres://a@127.0.0.1/crm?user=postgres"), "writ.yaml:17: minters.db.postgres.url: has the parameter user, expected postgres://ACCOUNT@HOST:PORT/DATABASE and nothing that overrides it"},
		{"another database in the query", url("postgres://a@127.0.0.1/crm?dbname=hr"), "writ.yaml:17: minters.db.postgres.url: has the parameter dbname, expected postgres://ACCOUNT@HOST:PORT/DATABASE and nothing that overrides it"},
		{"another port in the query", url("postgres://a@127.0.0.1/crm?port=1"), "writ.yaml:17: minters.db.postgres.url: has the parameter port, expected postgres://ACCOUNT@HOST:PORT/DATABASE and nothing that overrides it"},
		{"agents in clear", line("agent_host: db.prod.example"), at + "agent_host: is beyond loopback, and agents connect by url's sslmode: make that verify-full, or say insecure: true"},
		{"agents in clear, and said so", line("agent_host: db.prod.example\n      insecure: true"), ""},
		{"agents verify", url("postgres://a@127.0.0.1/crm?sslmode=verify-full") + "      agent_host: db.prod.example\n", ""},
		{"another scheme", url("mysql://a@127.0.0.1/crm"), "writ.yaml:17: minters.db.postgres.url: is not postgres://ACCOUNT@HOST:PORT/DATABASE"},
		{"a lease as the account", url("postgres://writ_lea_00000000000000000000000000@127.0.0.1/crm"), `writ.yaml:17: minters.db.postgres.url: is "writ_lea_00000000000000000000000000", which only a lease may be named`},
		{"no groups", "  db:\n    postgres:\n      url: postgres://a@127.0.0.1/crm\n", "writ.yaml:17: minters.db.postgres.groups: is missing, expected the roles that credentials can be members of"},
		{"PostgreSQL's group", "  db:\n    postgres:\n      url: postgres://a@127.0.0.1/crm\n      groups: [pg_monitor]\n", `writ.yaml:18: minters.db.postgres.groups[0]: is "pg_monitor", which is PostgreSQL's own`},
		{"SQL for a group", "  db:\n    postgres:\n      url: postgres://a@127.0.0.1/crm\n      groups: ['a\"; DROP']\n", `writ.yaml:18: minters.db.postgres.groups[0]: is "a\"; DROP", expected a name of letters, digits, _ and -`},
		{"group twice", "  db:\n    postgres:\n      url: postgres://a@127.0.0.1/crm\n      groups: [a, a]\n", "writ.yaml:18: minters.db.postgres.groups[1]: stands a second time"},
		{"empty password", line("password_file: empty"), at + "password_file: read secret: empty is empty"},
		{"CA not there", line("ca_file: none"), at + "ca_file: names none: no such file or directory"},
		{"tenants", line("tenants: some"), at + `tenants: is "some", expected one of required, optional, none`},
		{"agents' host with a port", line("agent_host: a:5\n      insecure: true"), at + `agent_host: is "a:5", expected a host without a port`},
		{"agents' port", line("agent_port: 65536"), at + "agent_port: is 65536, expected 0 to 65535"},
		{"no connections", line("connections: 0"), at + "connections: is 0, expected 1 to 100"},
		{"schema", line("schema: 'a.b'"), at + `schema: is "a.b", expected a name of letters, digits, _ and -`},
		{"owner", line("owner: pg_x"), at + `owner: is "pg_x", which is PostgreSQL's own`},
		{"no logins", line("connection_limit: 0"), at + "connection_limit: is 0, expected 1 to 1000"},
		{"half a millisecond", line("statement_timeout: 500us"), at + "statement_timeout: is 500µs, expected zero (none) to 24h in whole milliseconds"},
		{"search path", line("search_path: ['a, b']"), at + `search_path[0]: is "a, b", expected the name of a schema`},
		{"long", "  db:\n    max_ttl: 25h\n" + least[6:], "writ.yaml:16: minters.db.max_ttl: is 25h0m0s, expected 24h0m0s at most"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, got := load(t, dir, with(tt.block)); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}
