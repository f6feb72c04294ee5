package config

import (
	"crypto/tls"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// Postgres is a database whose roles a minter makes: one for each lease.
type Postgres struct {
	// URL is where Writ reaches it, and as which account.
	URL string `yaml:"url"`
	// PasswordFile holds the account's password.
	PasswordFile string `yaml:"password_file"`
	// CAFile is the PEM certificate of who signs the server's; agents are given it too.
	CAFile string `yaml:"ca_file"`
	// Insecure states that the server need not prove who it is, or that the network
	// does so. Credentials say the same to agents.
	Insecure bool `yaml:"insecure"`
	// Groups lists the roles that a credential can be a member of.
	Groups []string `yaml:"groups"`
	// Tenants says whether policy names a tenant: required, optional or none.
	Tenants string `yaml:"tenants"`
	// AgentHost and AgentPort are where agents reach it, where that differs.
	AgentHost string `yaml:"agent_host"`
	AgentPort int    `yaml:"agent_port"`
	// Connections bounds those for minting; revocation has four of its own.
	Connections int `yaml:"connections"`
	// Schema holds Writ's functions there.
	Schema string `yaml:"schema"`
	// Owner owns them.
	Owner string `yaml:"owner"`
	// ConnectionLimit, the timeouts and SearchPath are what a credential starts with.
	ConnectionLimit    int           `yaml:"connection_limit"`
	StatementTimeout   time.Duration `yaml:"statement_timeout"`
	TransactionTimeout time.Duration `yaml:"idle_in_transaction_timeout"`
	SearchPath         []string      `yaml:"search_path"`
}

func (p *Postgres) setDefaults() {
	p.Tenants, p.Connections, p.Schema, p.Owner = "none", 8, "writ", "writ_owner"
	p.ConnectionLimit, p.StatementTimeout, p.TransactionTimeout = 3, 30*time.Second, time.Minute
}

// Account is the role that URL names.
func (p *Postgres) Account() string {
	if u, err := url.Parse(p.URL); err == nil {
		return u.User.Username()
	}
	return ""
}

// Database is the one that URL names.
func (p *Postgres) Database() string {
	if u, err := url.Parse(p.URL); err == nil {
		return strings.TrimPrefix(u.Path, "/")
	}
	return ""
}

var (
	sqlName   = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_-]{0,62}$`)
	leaseName = regexp.MustCompile(`^writ_lea_[0-9a-v]{26}$`)
)

// maxPostgresTTL: more than a day of a role that a person could have is no lease.
const maxPostgresTTL = 24 * time.Hour

func (p *Postgres) check(fail failFunc, key string, maxTTL time.Duration) {
	p.checkURL(fail, key)
	if p.PasswordFile != "" {
		fail.secret(key+"password_file", p.PasswordFile)
	}
	if p.CAFile != "" {
		fail.file(key+"ca_file", p.CAFile)
	}
	if len(p.Groups) == 0 {
		fail(key+"groups", "is missing, expected the roles that credentials can be members of")
	}
	for i, g := range p.Groups {
		at := fmt.Sprintf("%sgroups[%d]", key, i)
		fail.role(at, g)
		if slices.Contains(p.Groups[:i], g) {
			fail(at, "stands a second time")
		}
	}
	fail.oneOf(key+"tenants", p.Tenants, "required", "optional", "none")
	if strings.ContainsAny(p.AgentHost, "/:@?# ") && !strings.Contains(p.AgentHost, "::") {
		fail(key+"agent_host", "is %q, expected a host without a port", p.AgentHost)
	}
	fail.within(key+"agent_port", p.AgentPort, 0, 65535)
	fail.within(key+"connections", p.Connections, 1, 100)
	fail.role(key+"schema", p.Schema)
	fail.role(key+"owner", p.Owner)
	if len(p.Owner) > 60 {
		fail(key+"owner", "is %q, expected 60 characters at most: roles are named after it", p.Owner)
	}
	fail.within(key+"connection_limit", p.ConnectionLimit, 1, 1000)
	fail.timeout(key+"statement_timeout", p.StatementTimeout)
	fail.timeout(key+"idle_in_transaction_timeout", p.TransactionTimeout)
	for i, s := range p.SearchPath {
		if !sqlName.MatchString(s) {
			fail(fmt.Sprintf("%ssearch_path[%d]", key, i), "is %q, expected the name of a schema", s)
		}
	}
	if maxTTL > maxPostgresTTL {
		fail(strings.TrimSuffix(key, "postgres.")+"max_ttl", "is %v, expected %v at most", maxTTL, maxPostgresTTL)
	}
}

func (p *Postgres) checkURL(fail failFunc, key string) {
	if !fail.required(key+"url", p.URL) {
		return
	}
	u, err := url.Parse(p.URL)
	if err != nil || (u.Scheme != "postgres" && u.Scheme != "postgresql") || u.Hostname() == "" {
		fail(key+"url", "is not postgres://ACCOUNT@HOST:PORT/DATABASE") // not quoted: it may hold a password
		return
	}
	if _, set := u.User.Password(); set || u.Query().Has("password") || u.Query().Has("passfile") {
		fail(key+"url", "holds a password; put it into a file and name that as password_file")
	}
	if p.Account() == "" || p.Database() == "" {
		fail(key+"url", "names no account or no database, expected postgres://ACCOUNT@HOST:PORT/DATABASE")
	} else {
		fail.role(key+"url", p.Account())
	}
	if p.CAFile != "" && u.Query().Has("sslrootcert") {
		fail(key+"url", "has sslrootcert beside ca_file, expected one of them")
	}
	for _, name := range []string{"user", "dbname", "database", "port"} {
		if u.Query().Has(name) {
			fail(key+"url", "has the parameter %s, expected postgres://ACCOUNT@HOST:PORT/DATABASE and nothing that overrides it", name)
			return
		}
	}
	if strings.Contains(u.Host, ",") || u.Query().Has("host") || u.Query().Has("hostaddr") || u.Query().Has("service") {
		fail(key+"url", "names several hosts, expected one: a credential exists at one server")
		return
	}
	if q := u.Query(); q.Get("sslmode") == "" { // agents are given no more than the URL says, so PGSSLMODE is not asked
		q.Set("sslmode", "prefer")
		u.RawQuery = q.Encode()
	}
	pg, err := pgconn.ParseConfig(u.String())
	switch {
	case err != nil:
		fail(key+"url", "can't be read by the PostgreSQL driver; check its parameters and the files that they name")
	case !p.Insecure && !proven(pg):
		fail(key+"url", "is beyond loopback: add sslmode=verify-full (and ca_file for a CA of your own), or say insecure: true")
	case !p.Insecure && p.AgentHost != "" && !Loopback(p.AgentHost) && u.Query().Get("sslmode") != "verify-full":
		fail(key+"agent_host", "is beyond loopback, and agents connect by url's sslmode: make that verify-full, or say insecure: true")
	}
}

// proven reports whether every way to the server is on this machine or makes it prove
// its very name.
func proven(c *pgconn.Config) bool {
	ok := func(host string, t *tls.Config) bool { return (t != nil && !t.InsecureSkipVerify) || Loopback(host) }
	return ok(c.Host, c.TLSConfig) && !slices.ContainsFunc(c.Fallbacks, func(f *pgconn.FallbackConfig) bool { return !ok(f.Host, f.TLSConfig) })
}

// role wants a name that is quoted easily and is not one that leases have.
func (fail failFunc) role(key, name string) {
	switch {
	case !sqlName.MatchString(name):
		fail(key, "is %q, expected a name of letters, digits, _ and -", name)
	case leaseName.MatchString(name):
		fail(key, "is %q, which only a lease may be named", name)
	case strings.HasPrefix(name, "pg_"):
		fail(key, "is %q, which is PostgreSQL's own", name)
	}
}

func (fail failFunc) timeout(key string, d time.Duration) {
	if d < 0 || d > 24*time.Hour || d%time.Millisecond != 0 {
		fail(key, "is %v, expected zero (none) to 24h in whole milliseconds", d)
	}
}

func (fail failFunc) within(key string, v, low, high int) {
	if v < low || v > high {
		fail(key, "is %d, expected %d to %d", v, low, high)
	}
}
