package config_test

import (
	"bytes"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"

	"github.com/writsec/writ/internal/config"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// good is the least that Writ starts with; edits of it make the bad files.
const good = `external_url: https://writ.example
store: sqlite:writ.db
root_key_file: root.key
policy:
  path: policies
issuers:
  - issuer: https://idp.example
    speaks_for: [user, agent]
    audience: https://writ.example
    algorithms: [ES256]
    ciba:
      client_id: writ
      client_secret_file: secret
minters:
  crm:
    jwt:
      audience: https://crm.example
services:
  - id: crm-api
    secret_file: secret
    audience: https://crm.example
`

// folder is one with every file that good names.
func folder(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	rootKey := base64.StdEncoding.EncodeToString(make([]byte, 32)) + "\n"
	for name, text := range map[string]string{
		"root.key": rootKey, "secret": "x\n", "empty": "\n", "cert.pem": "x\n", "key.pem": "x\n", "jwks.json": "x\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "policies"), 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// load writes text as writ.yaml into the folder and reads it. Messages come back
// one per line, without the name of the folder.
func load(t testing.TB, dir, text string) (config.Config, string) {
	t.Helper()
	path := filepath.Join(dir, "writ.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Load(path)
	if err == nil {
		return cfg, ""
	}
	if _, ok := errors.AsType[*config.Error](err); !ok {
		t.Errorf("%v has no *config.Error, which makes the exit status", err)
	}
	return cfg, strings.ReplaceAll(err.Error(), dir+string(filepath.Separator), "")
}

func TestDefaults(t *testing.T) {
	dir := folder(t)
	got, msg := load(t, dir, good)
	if msg != "" {
		t.Fatal(msg)
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	want := config.Config{
		Listen: "127.0.0.1:8180", OpsListen: "127.0.0.1:8181", ExternalURL: "https://writ.example",
		Store: "sqlite:" + in("writ.db"), StoreConnections: 16, Durability: "disk", RootKeyFile: in("root.key"),
		Audit:     config.Audit{Copies: config.Copies{Every: time.Minute}},
		Policy:    config.Policy{Path: in("policies"), Query: "data.writ.decision", AdminQuery: "data.writ.admin", Deadline: 100 * time.Millisecond},
		Sessions:  config.Sessions{DefaultAge: time.Hour, MaxAge: 8 * time.Hour, Idle: 30 * time.Minute, Window: 24 * time.Hour},
		Approvals: config.Approvals{ExpiresIn: 5 * time.Minute, UseWithin: 2 * time.Minute, MaxWait: 2 * time.Minute, MaxPending: 5},
		Log:       config.Log{Level: "info"},
		Signing:   config.Signing{Algorithm: "ES256", RotateEvery: 720 * time.Hour},
		Issuers: []config.Issuer{{
			Issuer: "https://idp.example", SpeaksFor: []config.Principal{config.User, config.Agent},
			Token: "access_token", Audience: "https://writ.example", Algorithms: []string{"ES256"},
			MaxAge: 24 * time.Hour, ClockLeeway: 30 * time.Second,
			CIBA: &config.CIBA{
				ClientID: "writ", ClientSecretFile: in("secret"), ClientAuth: "client_secret_basic", LoginHint: "{sub}",
				Algorithms: []string{"ES256"}, BindingMessage: config.BindingMessage{MaxLength: 20, Charset: "portable"},
				Timeout: 40 * time.Second,
			},
		}},
		Minters:  map[string]config.Minter{"crm": {MaxTTL: 5 * time.Minute, JWT: &config.JWTMinter{Audience: "https://crm.example", Checks: "none"}}},
		Services: []config.Service{{ID: "crm-api", SecretFile: in("secret"), Audience: "https://crm.example"}},
		Leases:   config.Leases{PerSession: 100, PerUser: 500, PerAgent: 10000},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestValues(t *testing.T) {
	dir := folder(t)
	in := func(name string) string { return filepath.Join(dir, name) }
	for _, tt := range []struct {
		name, old, new string
		got            func(config.Config) any
		want           any
	}{
		{"absolute file", "root_key_file: root.key", "root_key_file: " + in("root.key"), func(c config.Config) any { return c.RootKeyFile }, in("root.key")},
		{"file in a folder above", "root_key_file: root.key", "root_key_file: policies/../root.key", func(c config.Config) any { return c.RootKeyFile }, in("root.key")},
		{"absolute store", "sqlite:writ.db", "sqlite:/var/lib/writ.db", func(c config.Config) any { return c.Store }, "sqlite:/var/lib/writ.db"},
		{"no leeway", "    audience: https://writ.example\n", "    audience: https://writ.example\n    clock_leeway: 0s\n", func(c config.Config) any { return c.Issuers[0].ClockLeeway }, time.Duration(0)},
		{"leeway", "    audience: https://writ.example\n", "    audience: https://writ.example\n    clock_leeway: 5m\n", func(c config.Config) any { return c.Issuers[0].ClockLeeway }, 5 * time.Minute},
		{"part of a mapping with defaults", "      client_id: writ\n", "      client_id: writ\n      binding_message: {max_length: 200}\n", func(c config.Config) any { return c.Issuers[0].CIBA.BindingMessage }, config.BindingMessage{MaxLength: 200, Charset: "portable"}},
		{"its own ID token algorithms", "      client_id: writ\n", "      client_id: writ\n      id_token_algorithms: [PS256]\n", func(c config.Config) any { return c.Issuers[0].CIBA.Algorithms }, []string{"PS256"}},
		{"bool", "policy:\n", "behind_proxy: True\npolicy:\n", func(c config.Config) any { return c.BehindProxy }, true},
		{"quoted string", "external_url: https://writ.example", `external_url: "https://writ.example"`, func(c config.Config) any { return c.ExternalURL }, "https://writ.example"},
		{"string that looks like a number", "id: crm-api", `id: "5"`, func(c config.Config) any { return c.Services[0].ID }, "5"},
		{"IPv6 loopback", "store:", "listen: \"[::1]:8180\"\nstore:", func(c config.Config) any { return c.Listen }, "[::1]:8180"},
		{"beyond loopback behind a proxy", "store:", "listen: :8180\nbehind_proxy: true\nstore:", func(c config.Config) any { return c.Listen }, ":8180"},
		{"beyond loopback with TLS", "store:", "listen: :8180\ntls: {cert_file: cert.pem, key_file: key.pem}\nstore:", func(c config.Config) any { return *c.TLS }, config.TLS{CertFile: in("cert.pem"), KeyFile: in("key.pem")}},
		{"issuer on loopback", "https://idp.example", "http://127.0.0.1:9000", func(c config.Config) any { return c.Issuers[0].Issuer }, "http://127.0.0.1:9000"},
		{"issuer with a slash at the end", "https://idp.example", "https://idp.example/", func(c config.Config) any { return c.Issuers[0].Issuer }, "https://idp.example/"},
		{"JWKS file", "    audience: https://writ.example\n", "    audience: https://writ.example\n    jwks_file: jwks.json\n", func(c config.Config) any { return c.Issuers[0].JWKSFile }, in("jwks.json")},
		{"CRLF", "store: sqlite:writ.db\n", "store: sqlite:writ.db\r\n", func(c config.Config) any { return c.Store }, "sqlite:" + in("writ.db")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg, msg := load(t, dir, edited(t, tt.old, tt.new))
			if msg != "" {
				t.Fatal(msg)
			}
			if diff := cmp.Diff(tt.want, tt.got(cfg)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func edited(t testing.TB, old, replacement string) string {
	t.Helper()
	if strings.Count(good, old) < 1 {
		t.Fatalf("%q is not in the good file", old)
	}
	return strings.Replace(good, old, replacement, 1)
}

// TestErrors holds every rule to its whole message: file, line, key and what was
// expected.
func TestErrors(t *testing.T) {
	dir := folder(t)
	const aud = "    audience: https://writ.example\n"
	const algs = "RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, ES512, EdDSA"
	for _, tt := range []struct{ name, old, new, want string }{
		// YAML
		{"unknown key", "store:", "sotre:", "writ.yaml:1: store: is missing\nwrit.yaml:2: sotre: unknown key, expected one of: agents, approvals, audit, behind_proxy, durability, external_url, issuers, leases, listen, log, minters, ops_listen, policy, proxy_client_cert, retention, root_key_file, services, sessions, signing, store, store_connections, store_password_file, tls"},
		{"key in another case", "      audience: https://crm.example\nservices", "      audience: https://crm.example\n      Scopes: []\nservices", "writ.yaml:18: minters.crm.jwt.Scopes: unknown key, expected one of: audience, checks, enforces_details, scopes"},
		{"key twice", "store: sqlite:writ.db\n", "store: sqlite:writ.db\nstore: x\n", "writ.yaml:3: store: stands a second time; first on line 2"},
		{"minter twice", "minters:\n", "minters:\n  crm: {jwt: {audience: a}}\n", "writ.yaml:16: minters.crm: stands a second time; first on line 15"},
		{"number for a string", "store: sqlite:writ.db", "store: 5", "writ.yaml:2: store: is 5, expected a string"},
		{"bool for a string", "client_id: writ", "client_id: true", "writ.yaml:12: issuers[0].ciba.client_id: is true, expected a string"},
		{"nothing for a string", "store: sqlite:writ.db", "store:", "writ.yaml:2: store: is nothing, expected a string"},
		{"list for a string", "store: sqlite:writ.db", "store: [x]", "writ.yaml:2: store: is a list, expected a string"},
		{"mapping for a string", "store: sqlite:writ.db", "store: {a: b}", "writ.yaml:2: store: is a mapping, expected a string"},
		{"date for a string", "client_id: writ", "client_id: 2026-01-01", "writ.yaml:12: issuers[0].ciba.client_id: is 2026-01-01, expected a string"},
		{"binary for a string", "client_id: writ", "client_id: !!binary aGk=", "writ.yaml:12: issuers[0].ciba.client_id: is aGk=, expected a string"},
		{"string for a list", "algorithms: [ES256]", "algorithms: ES256", "writ.yaml:10: issuers[0].algorithms: is a string, expected a list"},
		{"number in a list", "algorithms: [ES256]", "algorithms: [ES256, 5]", "writ.yaml:10: issuers[0].algorithms[1]: is 5, expected a string"},
		{"nothing for a list", "algorithms: [ES256]", "algorithms:", "writ.yaml:10: issuers[0].algorithms: is nothing, expected a list"},
		{"list for a mapping", "  path: policies", "  - path: policies", "writ.yaml:5: policy: is a list, expected a mapping"},
		{"string for a mapping", "  crm:\n    jwt:\n      audience: https://crm.example\n", "  crm: jwt\n", "writ.yaml:15: minters.crm: is a string, expected a mapping"},
		{"list of minters", "  crm:\n    jwt:\n      audience: https://crm.example\n", "  - jwt:\n", "writ.yaml:15: minters: is a list, expected a mapping"},
		{"nothing for a mapping", "store:", "tls:\nstore:", "writ.yaml:2: tls: is nothing, expected a mapping"},
		{"string for a bool", "store:", "behind_proxy: \"true\"\nstore:", `writ.yaml:2: behind_proxy: is "true", expected true or false`},
		{"yes for a bool", "store:", "behind_proxy: yes\nstore:", `writ.yaml:2: behind_proxy: is "yes", expected true or false`},
		{"number for a bool", "store:", "behind_proxy: 1\nstore:", "writ.yaml:2: behind_proxy: is 1, expected true or false"},
		{"list for a bool", "store:", "behind_proxy: [true]\nstore:", "writ.yaml:2: behind_proxy: is a list, expected true or false"},
		{"string for a number", "store:", "approvals: {max_pending: \"5\"}\nstore:", `writ.yaml:2: approvals.max_pending: is "5", expected a whole number`},
		{"fraction for a number", "store:", "approvals: {max_pending: 5.5}\nstore:", "writ.yaml:2: approvals.max_pending: is 5.5, expected a whole number"},
		{"octal for a number", "store:", "approvals: {max_pending: 010}\nstore:", "writ.yaml:2: approvals.max_pending: is 010, expected a whole number"},
		{"hexadecimal for a number", "store:", "approvals: {max_pending: 0x10}\nstore:", "writ.yaml:2: approvals.max_pending: is 0x10, expected a whole number"},
		{"too large a number", "store:", "approvals: {max_pending: 9223372036854775808}\nstore:", "writ.yaml:2: approvals.max_pending: is 9223372036854775808, expected a whole number"},
		{"number for a duration", "  path: policies", "  path: policies\n  deadline: 100", `writ.yaml:6: policy.deadline: is 100, expected a duration such as "30s" or "5m"`},
		{"word for a duration", "  path: policies", "  path: policies\n  deadline: soon", `writ.yaml:6: policy.deadline: is "soon", expected a duration such as "30s" or "5m"`},
		{"days for a duration", "  path: policies", "  path: policies\n  deadline: 1d", `writ.yaml:6: policy.deadline: is "1d", expected a duration such as "30s" or "5m"`},
		{"nothing for a duration", "  path: policies", "  path: policies\n  deadline:", `writ.yaml:6: policy.deadline: is nothing, expected a duration such as "30s" or "5m"`},
		{"list for a duration", "  path: policies", "  path: policies\n  deadline: [1s]", `writ.yaml:6: policy.deadline: is a list, expected a duration such as "30s" or "5m"`},
		{"unknown principal", "[user, agent]", "[user, robot]", `writ.yaml:8: issuers[0].speaks_for[1]: is "robot", expected user, agent, operator or service`},
		{"list for a principal", "[user, agent]", "[[user]]", "writ.yaml:8: issuers[0].speaks_for[0]: is a list, expected a string"},
		{"long value", "store: sqlite:writ.db", "behind_proxy: " + strings.Repeat("é", 100) + "\nstore: sqlite:writ.db", `writ.yaml:2: behind_proxy: is "` + strings.Repeat("é", 40) + `…", expected true or false`},
		{"alias", "      audience: https://crm.example\nservices", "      audience: &a https://crm.example\n      scopes: [*a]\nservices", "writ.yaml:18: minters.crm.jwt.scopes[0]: is an alias; write the value out"},
		{"merge key", "    jwt:\n", "    <<: {max_ttl: 1s}\n    jwt:\n", "writ.yaml:16: minters.crm: has a key that is not a plain word"},
		{"alias as a key", "store: sqlite:writ.db\n", "store: &listen sqlite:writ.db\n*listen : 127.0.0.1:1\n", "writ.yaml:3: has a key that is not a plain word"},
		{"list as a key", "store: sqlite:writ.db\n", "store: sqlite:writ.db\n? [listen]\n: x\n", "writ.yaml:3: has a key that is not a plain word"},
		{"number as a key", "  crm:\n", "  5:\n", "writ.yaml:15: minters: has a key that is not a plain word"},
		{"tab", "  path: policies", "\tpath: policies", "writ.yaml:5: is not YAML: found character that cannot start any token"},
		{"quote left open", "store: sqlite:writ.db", `store: "sqlite`, "writ.yaml:2: is not YAML: found unexpected end of stream"},
		{"wrong indentation", "    jwt:\n", "    max_ttl: 5m\n   jwt:\n", "writ.yaml:14: is not YAML: did not find expected key"},
		{"unknown anchor", "store: sqlite:writ.db", "store: *nothing", "writ.yaml: is not YAML: unknown anchor 'nothing' referenced"},
		{"second document", "minters:\n", "---\nminters:\n", "writ.yaml:14: holds a second YAML document, expected one"},
		{"second document that is no YAML", "minters:\n", "---\n\tminters:\n", "writ.yaml:15: is not YAML: found character that cannot start any token"},

		// Values
		{"no external_url", "external_url: https://writ.example\n", "", "writ.yaml:1: external_url: is missing"},
		{"external_url without scheme", "https://writ.example\n", "writ.example\n", `writ.yaml:1: external_url: is "writ.example", expected an https URL`},
		{"external_url with another scheme", "https://writ.example\n", "ftp://writ.example\n", `writ.yaml:1: external_url: is "ftp://writ.example", expected an https URL`},
		{"external_url without host", "https://writ.example\n", "https://:443\n", `writ.yaml:1: external_url: is "https://:443", expected an https URL`},
		{"external_url beyond loopback by http", "https://writ.example\n", "http://writ.example\n", `writ.yaml:1: external_url: is "http://writ.example", expected https: plain http is for loopback only`},
		{"external_url with a slash at the end", "https://writ.example\n", "https://writ.example/\n", `writ.yaml:1: external_url: is "https://writ.example/", expected no slash at the end`},
		{"external_url with a query", "https://writ.example\n", "https://writ.example?a\n", `writ.yaml:1: external_url: is "https://writ.example?a", expected a URL without user, query and fragment`},
		{"external_url with a user", "https://writ.example\n", "https://a:b@writ.example\n", `writ.yaml:1: external_url: is "https://a:b@writ.example", expected a URL without user, query and fragment`},
		{"listen without port", "store:", "listen: localhost\nstore:", `writ.yaml:2: listen: is "localhost", expected host:port`},
		{"listen with a port too large", "store:", "listen: localhost:65536\nstore:", `writ.yaml:2: listen: is "localhost:65536", expected host:port`},
		{"ops_listen without port", "store:", "ops_listen: \"localhost:\"\nstore:", `writ.yaml:2: ops_listen: is "localhost:", expected host:port`},
		{"listen beyond loopback", "store:", "listen: 0.0.0.0:8180\nstore:", `writ.yaml:2: listen: is "0.0.0.0:8180", beyond loopback, without TLS: set tls, or behind_proxy: true if a proxy terminates TLS`},
		{"listen anywhere", "store:", "listen: :8180\nstore:", `writ.yaml:2: listen: is ":8180", beyond loopback, without TLS: set tls, or behind_proxy: true if a proxy terminates TLS`},
		{"listen on a name that begins like loopback", "store:", "listen: 127.0.0.1.example.com:1\nstore:", `writ.yaml:2: listen: is "127.0.0.1.example.com:1", beyond loopback, without TLS: set tls, or behind_proxy: true if a proxy terminates TLS`},
		{"TLS without key", "store:", "tls: {cert_file: cert.pem}\nstore:", "writ.yaml:2: tls.key_file: is missing"},
		{"TLS without certificate", "store:", "tls: {key_file: key.pem}\nstore:", "writ.yaml:2: tls.cert_file: is missing"},
		{"no store", "store: sqlite:writ.db\n", "", "writ.yaml:1: store: is missing"},
		{"store of another kind", "sqlite:writ.db", "mysql:x", `writ.yaml:2: store: is not one of sqlite:PATH and postgres://USER@HOST:PORT/DATABASE`},
		{"password in the store", "sqlite:writ.db", "postgres://writ:hunter2@127.0.0.1/writ", "writ.yaml:2: store: holds a password; put it into a file and name that as store_password_file"},
		{"password in the store's query", "sqlite:writ.db", "postgres://writ@127.0.0.1/writ?password=hunter2", "writ.yaml:2: store: holds a password; put it into a file and name that as store_password_file"},
		{"store in clear", "sqlite:writ.db", "postgres://writ@db.example/writ", "writ.yaml:2: store: is beyond loopback: add sslmode=verify-full (and sslrootcert=FILE for a CA of your own)"},
		{"store in clear by its query", "sqlite:writ.db", "postgres://writ@127.0.0.1/writ?host=db.example&sslmode=require", "writ.yaml:2: store: is beyond loopback: add sslmode=verify-full (and sslrootcert=FILE for a CA of your own)"},
		{"a second host in clear", "sqlite:writ.db", "postgres://writ@localhost:5432,db2:5432/writ", "writ.yaml:2: store: is beyond loopback: add sslmode=verify-full (and sslrootcert=FILE for a CA of your own)"},
		{"a second host in clear by the query", "sqlite:writ.db", "postgres://writ@/writ?host=localhost:1,db2", "writ.yaml:2: store: is beyond loopback: add sslmode=verify-full (and sslrootcert=FILE for a CA of your own)"},
		{"unknown service", "sqlite:writ.db", "postgres:///writ?service=nowhere", "writ.yaml:2: store: can't be read by the PostgreSQL driver; check its parameters and the files that they name"},
		{"password for SQLite", "store:", "store_password_file: secret\nstore:", "writ.yaml:2: store_password_file: has no effect: SQLite has no password"},
		{"unknown durability", "store:", "durability: paper\nstore:", `writ.yaml:2: durability: is "paper", expected one of disk, os`},
		{"durability of PostgreSQL", "store: sqlite:writ.db", "durability: os\nstore: postgres://writ@localhost/writ", "writ.yaml:2: durability: is for SQLite; PostgreSQL has synchronous_commit"},
		{"one connection", "store: sqlite:writ.db", "store_connections: 1\nstore: postgres://writ@localhost/writ", "writ.yaml:2: store_connections: is 1, expected 2 to 1000"},
		{"unknown keep", "store:", "audit: {inputs: [{actions: [x], keep: some}]}\nstore:", `writ.yaml:2: audit.inputs[0].keep: is "some", expected one of whole, redacted, none`},
		{"bad pattern", "store:", "audit: {inputs: [{actions: ['[a'], keep: none}]}\nstore:", `writ.yaml:2: audit.inputs[0].actions[0]: is "[a", which is no pattern`},
		{"copies in clear", "store:", "audit: {copies: {url: 'http://evidence.example/x'}}\nstore:", `writ.yaml:2: audit.copies.url: is "http://evidence.example/x", expected https: plain http is for loopback only`},
		{"negative retention", "store:", "retention: {records: 1h}\nstore:", "writ.yaml:2: retention.records: is 1h0m0s, expected zero (for ever) or 24h and more: retries look for their decisions that long"},
		{"negative retention of inputs", "store:", "retention: {inputs: -1h}\nstore:", "writ.yaml:2: retention.inputs: is -1h0m0s, expected zero (for ever) or more"},
		{"copies without a pause", "store:", "audit: {copies: {every: 1ns}}\nstore:", "writ.yaml:2: audit.copies.every: is 1ns, expected 100ms or more"},
		{"store without path", "store: sqlite:writ.db", `store: "sqlite:"`, `writ.yaml:2: store: is "sqlite:", expected sqlite:PATH`},
		{"no root key", "root_key_file: root.key\n", "", "writ.yaml:1: root_key_file: is missing"},
		{"root key not there", "root.key", "none.key", "writ.yaml:3: root_key_file: names none.key: no such file or directory"},
		{"root key too short", "root.key", "secret", "writ.yaml:3: root_key_file: read secret: secret does not hold 32 random bytes in base64 (make them with: head -c 32 /dev/urandom | base64)"},
		{"root key a folder", "root.key", "policies", "writ.yaml:3: root_key_file: names policies, which is a folder, expected a file"},
		{"no policy", "  path: policies", "  query: data.writ.decision", "writ.yaml:5: policy.path: is missing"},
		{"policies not there", "path: policies", "path: none", "writ.yaml:5: policy.path: names none: no such file or directory"},
		{"query empty", "  path: policies", "  path: policies\n  query: \"\"", `writ.yaml:6: policy.query: is "", expected a document such as data.writ.decision`},
		{"admin query empty", "  path: policies", "  path: policies\n  admin_query: \"\"", `writ.yaml:6: policy.admin_query: is "", expected a document such as data.writ.admin`},
		{"query of input", "  path: policies", "  path: policies\n  query: input.user", `writ.yaml:6: policy.query: is "input.user", expected a document such as data.writ.decision`},
		{"no deadline", "  path: policies", "  path: policies\n  deadline: 0s", "writ.yaml:6: policy.deadline: is 0s, expected more than zero"},
		{"negative reload", "  path: policies", "  path: policies\n  reload: -1s", "writ.yaml:6: policy.reload: is -1s, expected zero (never) or more"},
		{"signature without anything", "  path: policies", "  path: policies\n  signature: {}", "writ.yaml:6: policy.signature.public_key_file: is missing\nwrit.yaml:6: policy.signature.algorithm: is missing, expected one of " + algs + "\nwrit.yaml:6: policy.signature.key_id: is missing"},
		{"signature by a shared secret", "  path: policies", "  path: policies\n  signature: {public_key_file: key.pem, algorithm: HS256, key_id: x}", `writ.yaml:6: policy.signature.algorithm: is "HS256", expected one of ` + algs},
		{"session without age", "store:", "sessions: {default_age: 0s}\nstore:", "writ.yaml:2: sessions.default_age: is 0s, expected more than zero"},
		{"session too old", "store:", "sessions: {default_age: 9h}\nstore:", "writ.yaml:2: sessions.default_age: is 9h0m0s, more than sessions.max_age 8h0m0s"},
		{"no max_age", "store:", "sessions: {default_age: -2s, max_age: -1s}\nstore:", "writ.yaml:2: sessions.default_age: is -2s, expected more than zero\nwrit.yaml:2: sessions.max_age: is -1s, expected more than zero"},
		{"approvals never", "store:", "approvals: {expires_in: 0s, use_within: 0s, max_wait: 0s, max_pending: 0}\nstore:", "writ.yaml:2: approvals.expires_in: is 0s, expected more than zero\nwrit.yaml:2: approvals.use_within: is 0s, expected more than zero\nwrit.yaml:2: approvals.max_wait: is 0s, expected more than zero\nwrit.yaml:2: approvals.max_pending: is 0, expected at least 1"},
		{"log level", "store:", "log: {level: trace}\nstore:", `writ.yaml:2: log.level: is "trace", expected one of debug, info, warn, error`},
		{"no issuers", good[strings.Index(good, "issuers:"):strings.Index(good, "minters:")], "", "writ.yaml:1: issuers: is missing, expected at least one issuer of user tokens"},
		{"no issuer in the list", good[strings.Index(good, "issuers:"):strings.Index(good, "minters:")], "issuers: []\n", "writ.yaml:6: issuers: is missing, expected at least one issuer of user tokens"},
		{"issuer without name", "  - issuer: https://idp.example\n    speaks_for", "  - speaks_for", "writ.yaml:7: issuers[0].issuer: is missing"},
		{"issuer with an empty fragment", "https://idp.example", "\"https://idp.example#\"", `writ.yaml:7: issuers[0].issuer: is "https://idp.example#", expected a URL without user, query and fragment`},
		{"issuer with an empty query", "https://idp.example", "https://idp.example?", `writ.yaml:7: issuers[0].issuer: is "https://idp.example?", expected a URL without user, query and fragment`},
		{"issuer beyond loopback by http", "https://idp.example", "http://localhost.example", `writ.yaml:7: issuers[0].issuer: is "http://localhost.example", expected https: plain http is for loopback only`},
		{"Writ as issuer", "https://idp.example", "https://writ.example", "writ.yaml:7: issuers[0].issuer: is Writ itself; a minted token must never be good for Writ"},
		{"issuer twice", "minters:\n", "  - {issuer: https://idp.example, speaks_for: [user], audience: a, algorithms: [ES256]}\nminters:\n", "writ.yaml:14: issuers[1].issuer: stands a second time"},
		{"issuer that speaks for nobody", "    speaks_for: [user, agent]\n", "", "writ.yaml:7: issuers[0].speaks_for: is missing, expected a list of user, agent, operator, service"},
		{"kind of token", aud, aud + "    token: saml\n", `writ.yaml:10: issuers[0].token: is "saml", expected one of access_token, jwt, jwt_svid, kubernetes, private_key_jwt`},
		{"people of a platform", aud, aud + "    token: kubernetes\n", "writ.yaml:8: issuers[0].speaks_for: lists people, but token is kubernetes, which only workloads have: expected agent, service"},
		{"SVIDs of no trust domain", "    speaks_for: [user, agent]\n" + aud, "    speaks_for: [agent]\n    token: jwt_svid\n" + aud, "writ.yaml:7: issuers[0].trust_domain: is missing"},
		{"trust domain as an ID", "    speaks_for: [user, agent]\n" + aud, "    speaks_for: [agent]\n    token: jwt_svid\n    trust_domain: spiffe://a\n" + aud, `writ.yaml:10: issuers[0].trust_domain: is "spiffe://a", expected a name such as example.org`},
		{"trust domain twice", "minters:\n", "  - {issuer: https://s.example, speaks_for: [agent], token: jwt_svid, trust_domain: a, audience: a, algorithms: [ES256]}\n  - {issuer: https://t.example, speaks_for: [agent], token: jwt_svid, trust_domain: a, audience: a, algorithms: [ES256]}\nminters:\n", "writ.yaml:15: issuers[2].trust_domain: stands a second time"},
		{"trust domain in vain", aud, aud + "    trust_domain: a\n", "writ.yaml:10: issuers[0].trust_domain: has no effect: token is access_token, not jwt_svid"},
		{"plain tokens of anybody", aud, aud + "    token: jwt\n", "writ.yaml:7: issuers[0].user_match: is missing: without it, a token that a client has of its own could pass for a user's"},
		{"user_match in vain", "    speaks_for: [user, agent]\n" + aud, "    speaks_for: [agent]\n" + aud + "    user_match: {sub: \"*\"}\n", "writ.yaml:10: issuers[0].user_match: has no effect: speaks_for does not list user"},
		{"match by no pattern", aud, aud + "    match: {a: \"[\"}\n", `writ.yaml:10: issuers[0].match: has "a": "[", expected a claim and a pattern such as "*"`},
		{"match by nothing", aud, aud + "    match: {a: \"\"}\n", `writ.yaml:10: issuers[0].match: has "a": "", expected a claim and a pattern such as "*"`},
		{"no age", aud, aud + "    max_age: 0s\n", "writ.yaml:10: issuers[0].max_age: is 0s, expected more than zero"},
		{"sender constraint", aud, aud + "    sender_constraint: [tls]\n", `writ.yaml:10: issuers[0].sender_constraint[0]: is "tls", expected one of dpop, mtls`},
		{"an ID token's client as audience", aud, aud + "    token: jwt\n    user_match: {a: b}\n    id_token_clients: [\"https://writ.example\"]\n", "writ.yaml:9: issuers[0].audience: is also a client of ID tokens: an ID token could pass for a token to Writ"},
		{"keys from two places", aud, aud + "    jwks_file: secret\n    jwks_url: https://a.example\n", "writ.yaml:11: issuers[0].jwks_url: stands beside jwks_file, expected one of them"},
		{"keys by http", aud, aud + "    jwks_url: http://a.example\n", `writ.yaml:10: issuers[0].jwks_url: is "http://a.example", expected https: plain http is for loopback only`},
		{"an assertion's issuer without keys", "    speaks_for: [user, agent]\n", "    speaks_for: [agent]\n    token: private_key_jwt\n", "writ.yaml:7: issuers[0].jwks_file: is missing, expected the agent's public keys, or their place as jwks_url"},
		{"service with two proofs", "    secret_file: secret\n    audience", "    secret_file: secret\n    subject: {issuer: a, id: b}\n    audience", "writ.yaml:21: services[0].subject: stands beside secret_file, expected one of them"},
		{"service of no issuer", "    secret_file: secret\n    audience", "    subject: {issuer: a}\n    audience", "writ.yaml:20: services[0].subject.id: is missing\nwrit.yaml:20: services[0].subject.issuer: is \"a\", expected one of issuers that speaks for service"},
		{"agent of no issuer", "minters:\n", "agents:\n  - {issuer: a, id: b}\nminters:\n", `writ.yaml:15: agents[0].issuer: is "a", expected one of issuers that speaks for agent`},
		{"agent that is nobody", "minters:\n", "agents:\n  - issuer: https://idp.example\n    identities: [{issuer: https://idp.example}]\nminters:\n", "writ.yaml:15: agents[0].id: is missing\nwrit.yaml:16: agents[0].identities[0].id: is missing\nwrit.yaml:16: agents[0].identities[0]: names what agents[0] names already"},
		{"identity of two agents", "minters:\n", "agents:\n  - {issuer: https://idp.example, id: a, identities: [{issuer: https://idp.example, id: b}]}\n  - {issuer: https://idp.example, id: b}\nminters:\n", "writ.yaml:16: agents[1]: names what agents[0].identities[0] names already"},
		{"certificates of clients without a proxy", "store:", "proxy_client_cert: true\nstore:", "writ.yaml:2: proxy_client_cert: has no effect: behind_proxy is false, and no client may say what its certificate is"},
		{"issuer without audience", aud, "", "writ.yaml:7: issuers[0].audience: is missing"},
		{"issuer without algorithms", "    algorithms: [ES256]\n", "    algorithms: []\n", "writ.yaml:10: issuers[0].algorithms: is missing, expected a list of " + algs},
		{"algorithm none", "[ES256]", "[none]", `writ.yaml:10: issuers[0].algorithms[0]: is "none", expected one of ` + algs},
		{"algorithm HS256", "[ES256]", "[ES256, HS256]", `writ.yaml:10: issuers[0].algorithms[1]: is "HS256", expected one of ` + algs},
		{"JWKS file not there", aud, aud + "    jwks_file: none\n", "writ.yaml:10: issuers[0].jwks_file: names none: no such file or directory"},
		{"empty ID token client", aud, aud + "    id_token_clients: [a, \"\"]\n", "writ.yaml:10: issuers[0].id_token_clients[1]: is empty"},
		{"negative leeway", aud, aud + "    clock_leeway: -1s\n", "writ.yaml:10: issuers[0].clock_leeway: is -1s, expected 0 to 5m"},
		{"large leeway", aud, aud + "    clock_leeway: 6m\n", "writ.yaml:10: issuers[0].clock_leeway: is 6m0s, expected 0 to 5m"},
		{"operators unmarked", "[user, agent]", "[user, operator]", "writ.yaml:7: issuers[0].operator: is missing: an issuer that speaks for operators needs the claim that marks them"},
		{"operators marked in vain", aud, aud + "    operator: {claim: a, value: b}\n", "writ.yaml:10: issuers[0].operator: has no effect: speaks_for does not list operator"},
		{"operators by no claim", "    speaks_for: [user, agent]\n", "    speaks_for: [operator]\n    operator: {}\n", "writ.yaml:9: issuers[0].operator.claim: is missing\nwrit.yaml:9: issuers[0].operator.value: is missing"},
		{"operators and agents of one issuer", "    speaks_for: [user, agent]\n", "    speaks_for: [agent, operator]\n    operator: {claim: a, value: b}\n", "writ.yaml:9: issuers[0].operator.clients: is missing: this issuer speaks for agents too, and an agent acting for an operator is no operator; list the clients that operators use"},
		{"empty operator client", "    speaks_for: [user, agent]\n", "    speaks_for: [agent, operator]\n    operator: {claim: a, value: b, clients: [\"\"]}\n", "writ.yaml:9: issuers[0].operator.clients[0]: is empty"},
		{"CIBA without client", "      client_id: writ\n", "", "writ.yaml:12: issuers[0].ciba.client_id: is missing"},
		{"CIBA without secret", "      client_secret_file: secret\n", "", "writ.yaml:12: issuers[0].ciba.client_secret_file: is missing"},
		{"CIBA client_auth", "      client_id: writ\n", "      client_id: writ\n      client_auth: none\n", `writ.yaml:13: issuers[0].ciba.client_auth: is "none", expected one of client_secret_basic, client_secret_post`},
		{"CIBA without hint", "      client_id: writ\n", "      client_id: writ\n      login_hint: \"\"\n", "writ.yaml:13: issuers[0].ciba.login_hint: is missing"},
		{"CIBA algorithm", "      client_id: writ\n", "      client_id: writ\n      id_token_algorithms: [HS256]\n", `writ.yaml:13: issuers[0].ciba.id_token_algorithms[0]: is "HS256", expected one of ` + algs},
		{"CIBA charset", "      client_id: writ\n", "      client_id: writ\n      binding_message: {charset: emoji}\n", `writ.yaml:13: issuers[0].ciba.binding_message.charset: is "emoji", expected one of portable, text`},
		{"CIBA message too short", "      client_id: writ\n", "      client_id: writ\n      binding_message: {max_length: 3}\n", "writ.yaml:13: issuers[0].ciba.binding_message.max_length: is 3, expected 4 to 1000"},
		{"CIBA message too long", "      client_id: writ\n", "      client_id: writ\n      binding_message: {max_length: 1001}\n", "writ.yaml:13: issuers[0].ciba.binding_message.max_length: is 1001, expected 4 to 1000"},
		{"CIBA without timeout", "      client_id: writ\n", "      client_id: writ\n      timeout: 0s\n", "writ.yaml:13: issuers[0].ciba.timeout: is 0s, expected more than zero"},
		{"minter of no kind", "    jwt:\n      audience: https://crm.example\n", "    max_ttl: 1m\n", "writ.yaml:16: minters.crm: says not what it makes, expected one of the blocks jwt, oauth, postgres"},
		{"minter as of before", "    jwt:\n", "    kind: jwt\n    jwt:\n", "writ.yaml:16: minters.crm.kind: unknown key, expected one of: jwt, max_active, max_ttl, oauth, postgres"},
		{"minter without audience", "    jwt:\n      audience: https://crm.example\n", "    jwt: {}\n", "writ.yaml:16: minters.crm.jwt.audience: is missing"},
		{"minter for Writ", "audience: https://crm.example\nservices", "audience: https://writ.example/\nservices", "writ.yaml:17: minters.crm.jwt.audience: is Writ itself; a minted token must never be good for Writ"},
		{"minter for Writ under its other name", "    audience: https://writ.example\n", "    audience: https://crm.example\n", "writ.yaml:17: minters.crm.jwt.audience: is Writ itself; a minted token must never be good for Writ"},
		{"minter with an empty scope", "    jwt:\n", "    jwt:\n      scopes: [\"\"]\n", "writ.yaml:17: minters.crm.jwt.scopes[0]: is empty"},
		{"minter whose audience checks otherwise", "    jwt:\n", "    jwt:\n      checks: maybe\n", `writ.yaml:17: minters.crm.jwt.checks: is "maybe", expected one of introspection, status_list, none`},
		{"minter whose audience can't introspect", "      audience: https://crm.example\nservices", "      audience: https://hr.example\n      checks: introspection\nservices", "writ.yaml:18: minters.crm.jwt.checks: is introspection, but no entry of services has this audience: nobody could introspect"},
		{"signing algorithm", "store:", "signing: {algorithm: RS256}\nstore:", `writ.yaml:2: signing.algorithm: is "RS256", expected one of ES256, EdDSA`},
		{"signing keys too fast", "store:", "signing: {rotate_every: 59m}\nstore:", "writ.yaml:2: signing.rotate_every: is 59m0s, expected zero (never by itself) or 1h0m0s to 8784h0m0s"},
		{"signing keys back in time", "store:", "signing: {rotate_every: -1h}\nstore:", "writ.yaml:2: signing.rotate_every: is -1h0m0s, expected zero (never by itself) or 1h0m0s to 8784h0m0s"},
		{"minter without TTL", "    jwt:\n", "    max_ttl: 0s\n    jwt:\n", "writ.yaml:16: minters.crm.max_ttl: is 0s, expected more than zero"},
		{"minter's name", "  crm:\n", "  Crm.x:\n", "writ.yaml:16: minters.Crm.x: is a name that no policy can write, expected lower-case letters, digits, _ and -"},
		{"service without id", "  - id: crm-api\n    secret_file", "  - secret_file", "writ.yaml:19: services[0].id: is missing"},
		{"service twice", "services:\n", "services:\n  - {id: crm-api, secret_file: secret, audience: a}\n", "writ.yaml:20: services[1].id: stands a second time"},
		{"two services without id", "  - id: crm-api\n    secret_file: secret\n    audience: https://crm.example\n", "  - {secret_file: secret, audience: a}\n  - {secret_file: secret, audience: b}\n", "writ.yaml:19: services[0].id: is missing\nwrit.yaml:20: services[1].id: is missing"},
		{"two issuers without name", "  - issuer: https://idp.example\n", "  - {speaks_for: [user], audience: a, algorithms: [ES256]}\n  -\n", "writ.yaml:7: issuers[0].issuer: is missing\nwrit.yaml:9: issuers[1].issuer: is missing"},
		{"service without secret", "    secret_file: secret\n    audience", "    audience", "writ.yaml:19: services[0].secret_file: is missing"},
		{"service with an empty secret", "    secret_file: secret\n    audience", "    secret_file: empty\n    audience", "writ.yaml:20: services[0].secret_file: read secret: empty is empty"},
		{"service without audience", "    secret_file: secret\n    audience: https://crm.example\n", "    secret_file: secret\n", "writ.yaml:19: services[0].audience: is missing"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, got := load(t, dir, edited(t, tt.old, tt.new))
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestNoFile(t *testing.T) {
	dir := folder(t)
	for path, want := range map[string]string{
		"none.yaml": "none.yaml: cannot be read: no such file or directory",
		"policies":  "policies: cannot be read: is a directory",
	} {
		_, err := config.Load(filepath.Join(dir, path))
		e, ok := errors.AsType[*config.Error](err)
		if !ok || strings.TrimPrefix(e.Error(), dir+"/") != want {
			t.Errorf("Load = %v, want %s", err, want)
		}
	}
}

func TestEmptyFiles(t *testing.T) {
	dir := folder(t)
	for name, tt := range map[string]struct{ text, want string }{
		"empty":         {"", "writ.yaml: is empty, expected a configuration such as docs/config.example.yaml"},
		"blank":         {"\n\n", "writ.yaml: is empty, expected a configuration such as docs/config.example.yaml"},
		"comment":       {"# nothing\n", "writ.yaml: is empty, expected a configuration such as docs/config.example.yaml"},
		"only a marker": {"---\n", "writ.yaml:2: is nothing, expected a mapping"},
		"null":          {"null\n", "writ.yaml:1: is nothing, expected a mapping"},
		"a word":        {"writ\n", "writ.yaml:1: is a string, expected a mapping"},
		"a list":        {"- a\n", "writ.yaml:1: is a list, expected a mapping"},
		"binary":        {"\x00\x01", "writ.yaml: is not YAML: control characters are not allowed"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, got := load(t, dir, tt.text); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

// TestVeryBadFile shows all that is wrong with one file at once, in the order of
// its lines, the same each time.
func TestVeryBadFile(t *testing.T) {
	text, err := os.ReadFile("testdata/bad.yaml")
	if err != nil {
		t.Fatal(err)
	}
	dir := folder(t)
	_, got := load(t, dir, string(text))
	got += "\n"
	const golden = "testdata/bad.golden"
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Error(diff)
	}
	for range 20 {
		if _, again := load(t, dir, string(text)); again+"\n" != got {
			t.Fatal("the messages change from one run to the next")
		}
	}
}

// TestExample holds docs/config.example.yaml to being valid and complete.
func TestExample(t *testing.T) {
	text, err := os.ReadFile("../../docs/config.example.yaml")
	if err != nil {
		t.Fatal(err)
	}
	dir := folder(t)
	names := regexp.MustCompile(`(?m)^( *(?:\w+_file|path): )([^ \n]+)`)
	for _, m := range names.FindAllStringSubmatch(string(text), -1) {
		path := filepath.Join(dir, m[2])
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		// Good as a root key, and as any secret.
		content := base64.StdEncoding.EncodeToString(make([]byte, 32))
		if strings.HasSuffix(path, "-key.pem") {
			content = privateKey(t)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cfg, msg := load(t, dir, string(text))
	if msg != "" {
		t.Fatal(msg)
	}

	var tree any
	if err := yaml.Unmarshal(text, &tree); err != nil {
		t.Fatal(err)
	}
	for _, missing := range absent("", reflect.TypeOf(cfg), tree) {
		t.Errorf("docs/config.example.yaml does not show %s", missing)
	}

	// Where a key has a default and its comment says nothing else, it shows that.
	least, msg := load(t, dir, good)
	if msg != "" {
		t.Fatal(msg)
	}
	for name, v := range map[string][2]any{
		"ops_listen":      {cfg.OpsListen, least.OpsListen},
		"policy.query":    {cfg.Policy.Query, least.Policy.Query},
		"policy.deadline": {cfg.Policy.Deadline, least.Policy.Deadline},
		"sessions":        {cfg.Sessions, least.Sessions},
		"approvals":       {cfg.Approvals, least.Approvals},
		"log":             {cfg.Log, least.Log},
		"signing":         {cfg.Signing, least.Signing},
		"token":           {cfg.Issuers[0].Token, least.Issuers[0].Token},
		"max_age":         {cfg.Issuers[0].MaxAge, least.Issuers[0].MaxAge},
		"clock_leeway":    {cfg.Issuers[0].ClockLeeway, least.Issuers[0].ClockLeeway},
		"client_auth":     {cfg.Issuers[0].CIBA.ClientAuth, least.Issuers[0].CIBA.ClientAuth},
		"login_hint":      {cfg.Issuers[0].CIBA.LoginHint, least.Issuers[0].CIBA.LoginHint},
		"binding_message": {cfg.Issuers[0].CIBA.BindingMessage, least.Issuers[0].CIBA.BindingMessage},
		"ciba.timeout":    {cfg.Issuers[0].CIBA.Timeout, least.Issuers[0].CIBA.Timeout},
		"max_ttl":         {cfg.Minters["crm"].MaxTTL, least.Minters["crm"].MaxTTL},
	} {
		if v[0] != v[1] {
			t.Errorf("the example shows %s as %v, the default is %v", name, v[0], v[1])
		}
	}
}

// absent walks the keys of a type along a YAML tree.
func absent(key string, typ reflect.Type, tree any) (missing []string) {
	switch typ.Kind() {
	case reflect.Pointer:
		return absent(key, typ.Elem(), tree)
	case reflect.Slice:
		list, _ := tree.([]any)
		if len(list) == 0 {
			return []string{key}
		}
		missing = absent(key+"[0]", typ.Elem(), list[0])
		for _, other := range list[1:] { // what one of them shows is shown
			also := absent(key+"[0]", typ.Elem(), other)
			missing = slices.DeleteFunc(missing, func(k string) bool {
				return !slices.ContainsFunc(also, func(m string) bool { return k == m || strings.HasPrefix(k, m+".") })
			})
		}
		return missing
	case reflect.Map:
		m, _ := tree.(map[string]any)
		var list []any
		for _, k := range slices.Sorted(maps.Keys(m)) {
			list = append(list, m[k])
		}
		return absent(key, reflect.SliceOf(typ.Elem()), list)
	case reflect.Struct:
		m, _ := tree.(map[string]any)
		for i := range typ.NumField() {
			name := typ.Field(i).Tag.Get("yaml")
			v, ok := m[name]
			if !ok || name == "" {
				missing = append(missing, fmt.Sprintf("%s.%s", key, name))
				continue
			}
			missing = append(missing, absent(key+"."+name, typ.Field(i).Type, v)...)
		}
	}
	return missing
}

func TestSecret(t *testing.T) {
	path := filepath.Join(t.TempDir(), "secret")
	for _, tt := range [][2]string{{"s", "s"}, {"s\n", "s"}, {"s\r\n", "s"}, {" s \n", " s "}, {"a\nb\n", "a\nb"}} {
		content, want := tt[0], tt[1]
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := config.Secret(path); got != want || err != nil {
			t.Errorf("Secret(%q) = %q, %v; want %q", content, got, err, want)
		}
	}
	for _, content := range []string{"", "\n", "\r\n\n"} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := config.Secret(path); err == nil {
			t.Errorf("Secret(%q) = nil, want an error", content)
		}
	}
	if _, err := config.Secret(path + "x"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Secret = %v, want os.ErrNotExist", err)
	}
}

func TestLoopback(t *testing.T) {
	for addr, want := range map[string]bool{
		"127.0.0.1:80": true, "127.9.9.9": true, "[::1]:80": true, "::1": true, "[::1]": true, "localhost": true, "localhost:1": true,
		"": false, ":80": false, "0.0.0.0:80": false, "[::]:80": false, "10.0.0.1:1": false, "localhost.example": false,
		"127.0.0.1.example": false, "1270.0.0.1": false, "127.1": false, "[::ffff:10.0.0.1]:1": false,
	} {
		if got := config.Loopback(addr); got != want {
			t.Errorf("Loopback(%q) = %v", addr, got)
		}
	}
}

func TestRootKey(t *testing.T) {
	good := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{7}, 32))
	for _, c := range []struct {
		name, text string
		ok         bool
	}{
		{"right", good, true},
		{"with a line end", good + "\r\n", true},
		{"short", base64.StdEncoding.EncodeToString(make([]byte, 31)), false},
		{"long", base64.StdEncoding.EncodeToString(make([]byte, 33)), false},
		{"not base64", strings.Repeat("!", 44), false},
		{"empty", "", false},
	} {
		path := filepath.Join(t.TempDir(), "root.key")
		if err := os.WriteFile(path, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		k, err := config.RootKey(path)
		if (err == nil) != c.ok || c.ok && k[31] != 7 {
			t.Errorf("%s: %v", c.name, err)
		}
		if err != nil && c.text != "" && strings.Contains(err.Error(), c.text) {
			t.Errorf("the error repeats the key: %v", err)
		}
	}
}
