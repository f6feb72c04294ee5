package minter

import (
	_ "embed" // the SQL
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"text/template"
	"time"

	"github.com/jackc/pgx/v5"
)

// PostgresVersion is the version of Writ's functions at a target.
const PostgresVersion = 1

// Bootstrap says how a target is to be prepared.
type Bootstrap struct {
	Database string   // refuses to run in another; "" any
	Schema   string   // of Writ's functions
	Owner    string   // owns them, and every lease's role
	Account  string   // is who Writ logs in as
	Password string   // of the account, as a verifier in the SQL; "" it has one, or gets it by hand
	Groups   []string // that leases can be given
	Tenants  string
	MaxTTL   time.Duration
	// ConnectionLimit, the timeouts (zero is none) and SearchPath are what a lease's
	// role starts with.
	ConnectionLimit    int
	StatementTimeout   time.Duration
	TransactionTimeout time.Duration
	SearchPath         []string
	// Harden takes from PUBLIC what would make agents owners of something.
	Harden bool
}

// ownFunctions are the owner's; groups may call tenant.
var ownFunctions = append([]string{"have", "inherit", "terminate", "unblock", "tenant"}, accountFunctions...)

// accountFunctions are for Writ's account.
var accountFunctions = []string{"mint", "disarm", "kill", "reap", "remains", "survey", "purge", "facts", "version"}

//go:embed postgres/bootstrap.sql
var bootstrapText string

var bootstrapSQL = template.Must(template.New("bootstrap").Funcs(template.FuncMap{
	"id":   quoted,
	"lit":  literal,
	"lits": func(list []string) string { return strings.Join(mapStrings(list, literal), ", ") },
	"funcs": func(schema string) string {
		return strings.Join(mapStrings(ownFunctions, func(f string) string { return quoted(schema) + "." + f }), ", ")
	},
	"ms": func(d time.Duration) int64 { return d.Milliseconds() },
}).Parse(bootstrapText))

func quoted(name string) string { return pgx.Identifier{name}.Sanitize() }

// literal quotes a text as SQL. Backslashes mean nothing in it, as by default since
// PostgreSQL 9.1; whoever turned that off can't have one in a name.
func literal(text string) string { return "'" + strings.ReplaceAll(text, "'", "''") + "'" }

func mapStrings(list []string, f func(string) string) []string {
	out := make([]string, len(list))
	for i, v := range list {
		out[i] = f(v)
	}
	return out
}

// postgresMakers is how many roles share the work: each one's grows with the number of
// roles that it has made and that are still there.
const postgresMakers = 64

// makers are the roles that make the roles of leases.
func makers(owner string) []string {
	out := make([]string, postgresMakers)
	for i := range out {
		out[i] = fmt.Sprintf("%s_%d", owner, i)
	}
	return out
}

// leaseRole is the pattern of lease roles; nothing else is touched at a target.
const leaseRole = `^writ_lea_[0-9a-v]{26}$`

var leaseRoles = regexp.MustCompile(leaseRole)

// BootstrapSQL is what makes a database a target: for its administrator to read and run.
func BootstrapSQL(b Bootstrap) (string, error) {
	names := slices.Concat([]string{b.Schema, b.Owner, b.Account}, makers(b.Owner), b.Groups)
	for _, name := range append(names, b.SearchPath...) {
		if err := PostgresName(name); err != nil {
			return "", err
		}
	}
	for _, name := range names[1:] {
		if leaseRoles.MatchString(name) || strings.HasPrefix(name, "pg_") {
			return "", fmt.Errorf("%q can't be the name of an owner, account or group", name)
		}
	}
	switch {
	case len(b.Groups) == 0:
		return "", errors.New("no groups: expected those that leases can be given")
	case !slices.Contains([]string{TenantsRequired, TenantsOptional, TenantsNone}, b.Tenants):
		return "", fmt.Errorf("tenants are %q, expected required, optional or none", b.Tenants)
	case b.MaxTTL < time.Second || b.ConnectionLimit < 1 || b.StatementTimeout < 0 || b.TransactionTimeout < 0:
		return "", errors.New("max_ttl, connection_limit or a timeout is out of range")
	}
	var verifier string
	if b.Password != "" {
		if strings.ContainsFunc(b.Password, func(r rune) bool { return r < ' ' || r > '~' }) {
			return "", errors.New("the account's password has other characters than printable ASCII: set it by hand, or choose another")
		}
		var err error
		if verifier, err = scramVerifier(b.Password); err != nil {
			return "", err
		}
	}
	var out strings.Builder
	err := bootstrapSQL.Execute(&out, struct {
		Bootstrap
		Version  int
		Pattern  string
		Verifier string
		Makers   int
	}{b, PostgresVersion, leaseRole, verifier, postgresMakers})
	return out.String(), err
}

// PostgresName says what is wrong with a name for SQL. All names are quoted; these can
// also stand in comments and within other quotes.
func PostgresName(name string) error {
	if !sqlName.MatchString(name) {
		return fmt.Errorf("%q is no plain SQL name, expected a letter or _, then letters, digits, _ and -, 63 at most", name)
	}
	return nil
}

var sqlName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_-]{0,62}$`)
