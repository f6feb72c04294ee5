package minter

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/lease"
)

// Finding is one thing that Doctor looked at.
type Finding struct {
	Level Level
	Text  string
	Mend  string // "" where there is nothing to mend
}

// Level is how bad a finding is.
type Level string

// The levels.
const (
	FindingOK   Level = "ok"
	FindingWarn Level = "warn" // worth knowing; Writ's promises hold
	FindingFail Level = "fail" // a promise does not hold
)

const bootstrapAgain = "run what `writ postgres bootstrap` prints"

// maxCatalog is how large a catalog of roles may get, in bytes.
const maxCatalog = 50 << 20

// Doctor examines a target as Writ's account, and makes and ends a credential there.
// want is how the configuration would prepare it. It goes as far as it can.
func (m *Postgres) Doctor(ctx context.Context, want Bootstrap) []Finding {
	d := &doctor{m: m, want: want}
	cfg, err := m.poolConfig()
	if err == nil {
		d.c, err = pgx.ConnectConfig(ctx, cfg.ConnConfig)
	}
	if err != nil {
		d.fail("check the address, the password file and pg_hba.conf", "can't connect: %v", targetError(err))
		return d.found
	}
	defer func() { _ = d.c.Close(context.WithoutCancel(ctx)) }()
	if !d.server(ctx) || !d.functions(ctx) {
		return d.found
	}
	for _, look := range []func(context.Context) error{d.account, d.public, d.groups, d.settings, d.capacity, d.databases, d.existing, d.dryRun} {
		if err := look(ctx); err != nil {
			d.fail(bootstrapAgain, "an examination ended early: %v", targetError(err))
		}
	}
	return d.found
}

type doctor struct {
	m     *Postgres
	want  Bootstrap
	c     *pgx.Conn
	facts facts
	found []Finding
}

type facts struct {
	Settings struct {
		Tenants            string   `json:"tenants"`
		ConnectionLimit    int      `json:"connection_limit"`
		StatementTimeout   int64    `json:"statement_timeout"`
		TransactionTimeout int64    `json:"transaction_timeout"`
		SearchPath         []string `json:"search_path"`
		MaxTTL             float64  `json:"max_ttl"`
	} `json:"settings"`
	Groups     []string `json:"groups"`
	Tombstones int      `json:"tombstones"`
	Due        int      `json:"due"`
	Owner      string   `json:"owner"`
}

func (d *doctor) ok(format string, args ...any) {
	d.found = append(d.found, Finding{FindingOK, fmt.Sprintf(format, args...), ""})
}

func (d *doctor) warn(mend, format string, args ...any) {
	d.found = append(d.found, Finding{FindingWarn, fmt.Sprintf(format, args...), mend})
}

func (d *doctor) fail(mend, format string, args ...any) {
	d.found = append(d.found, Finding{FindingFail, fmt.Sprintf(format, args...), mend})
}

// list is the one column of a query.
func (d *doctor) list(ctx context.Context, query string, args ...any) ([]string, error) {
	rows, err := d.c.Query(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// none wants a query that finds nothing.
func (d *doctor) none(ctx context.Context, level Level, ok, text, mend, query string, args ...any) error {
	found, err := d.list(ctx, query, args...)
	switch {
	case err != nil:
		return err
	case len(found) == 0:
		d.ok("%s", ok)
	default:
		d.found = append(d.found, Finding{level, text + ": " + strings.Join(found, ", "), mend})
	}
	return nil
}

func (d *doctor) server(ctx context.Context) bool {
	var (
		number  int
		version string
		standby bool
		now     time.Time
	)
	err := d.c.QueryRow(ctx, `SELECT current_setting('server_version_num')::int, current_setting('server_version'), pg_is_in_recovery(), clock_timestamp()`).
		Scan(&number, &version, &standby, &now)
	if err == nil {
		err = supported(number, version)
	}
	switch {
	case err != nil:
		d.fail("upgrade the server", "%v", targetError(err))
		return false
	case standby:
		d.fail("name the primary in url", "the server is a standby")
		return false
	}
	d.ok("PostgreSQL %s", version)
	if skew := time.Since(now).Abs(); skew > time.Minute {
		d.warn("set both clocks by NTP", "the server's clock and ours differ by %v; no promise depends on it", skew.Round(time.Second))
	}
	if d.c.PgConn().Conn().RemoteAddr().Network() == "tcp" && d.m.at.TLSConfig == nil && !strings.HasPrefix(d.c.PgConn().Conn().RemoteAddr().String(), "127.") {
		d.warn("add sslmode=verify-full to url", "the connection is not encrypted")
	}
	return true
}

func (d *doctor) functions(ctx context.Context) bool {
	var version int
	if err := d.c.QueryRow(ctx, `SELECT `+d.m.fn("version")+`()`).Scan(&version); err != nil {
		d.fail(bootstrapAgain, "Writ's functions are missing, or the account may not call them: %v", targetError(err))
		return false
	}
	switch {
	case version < PostgresVersion:
		d.fail(bootstrapAgain, "Writ's functions are of version %d, expected %d", version, PostgresVersion)
		return false
	case version > PostgresVersion:
		d.warn("upgrade Writ", "Writ's functions are of version %d, later than this Writ's %d", version, PostgresVersion)
	default:
		d.ok("Writ's functions are of version %d", version)
	}
	var text []byte
	err := d.c.QueryRow(ctx, `SELECT `+d.m.fn("facts")+`()::text`).Scan(&text)
	if err == nil {
		err = json.Unmarshal(text, &d.facts)
	}
	if err != nil {
		d.fail(bootstrapAgain, "Writ's functions do not work: %v", targetError(err))
	}
	return err == nil
}

// account looks for power that the account has beside Writ's functions.
func (d *doctor) account(ctx context.Context) error {
	const take = "take it away: who has the account's password has it too"
	err := d.none(ctx, FindingFail, "the account has no attributes of power", "the account has attributes of power", take,
		`SELECT a FROM pg_roles, LATERAL (VALUES ('SUPERUSER', rolsuper), ('CREATEROLE', rolcreaterole), ('CREATEDB', rolcreatedb),
			('REPLICATION', rolreplication), ('BYPASSRLS', rolbypassrls)) v (a, has) WHERE rolname = session_user AND has`)
	if err != nil {
		return err
	}
	err = d.none(ctx, FindingFail, "the account is a member of no role but pg_use_reserved_connections", "the account is a member of roles", take,
		`SELECT rolname::text FROM pg_roles WHERE pg_has_role(session_user, oid, 'MEMBER') AND rolname NOT IN (session_user, 'pg_use_reserved_connections') LIMIT 10`)
	if err != nil {
		return err
	}
	err = d.none(ctx, FindingFail, "the account can reach no data", "the account can reach data", take,
		`SELECT c.oid::regclass::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		  WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname !~ '^pg_toast'
		    AND has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE') LIMIT 10`)
	if err != nil {
		return err
	}
	err = d.none(ctx, FindingFail, "the account can create nothing", "the account can create things in", take,
		`SELECT 'database ' || current_database() WHERE has_database_privilege(current_database(), 'CREATE')
		 UNION ALL SELECT 'schema ' || nspname FROM pg_namespace WHERE has_schema_privilege(oid, 'CREATE')`)
	if err != nil {
		return err
	}
	return d.none(ctx, FindingFail, "the account can call no function of the owner's own", "the account can call", bootstrapAgain,
		`SELECT proname::text FROM pg_proc WHERE pronamespace = to_regnamespace($1) AND proname <> ALL ($2) AND has_function_privilege(oid, 'EXECUTE') LIMIT 10`,
		quoted(d.m.Schema), accountFunctions)
}

// public looks for what an agent can do because everybody can.
func (d *doctor) public(ctx context.Context) error {
	err := d.none(ctx, FindingFail, "PUBLIC can create nothing here", "PUBLIC can create things in schemas, and so can agents", "REVOKE CREATE ON SCHEMA … FROM PUBLIC",
		`SELECT nspname::text FROM pg_namespace WHERE has_schema_privilege('public', oid, 'CREATE')
		 UNION ALL SELECT 'any new one' WHERE has_database_privilege('public', current_database(), 'CREATE')`)
	if err != nil {
		return err
	}
	err = d.none(ctx, FindingWarn, "PUBLIC can make no temporary tables", "PUBLIC can make temporary tables, and so can agents, in",
		"REVOKE TEMPORARY ON DATABASE … FROM PUBLIC, and grant it to those who need it",
		`SELECT current_database()::text WHERE has_database_privilege('public', current_database(), 'TEMPORARY')`)
	if err != nil {
		return err
	}
	return d.none(ctx, FindingWarn, "PUBLIC can make no large objects", "PUBLIC can make large objects, and so can agents, by",
		"REVOKE EXECUTE ON FUNCTION … FROM PUBLIC, as a superuser",
		`SELECT oid::regprocedure::text FROM pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace AND proname IN ('lo_creat', 'lo_create', 'lo_from_bytea', 'lo_import')
		    AND has_function_privilege('public', oid, 'EXECUTE')`)
}

func (d *doctor) groups(ctx context.Context) error {
	for _, g := range d.m.Groups {
		if !slices.Contains(d.facts.Groups, g) {
			d.fail(bootstrapAgain, "group %s is in the configuration, but the target does not grant it", g)
		}
	}
	for _, g := range d.facts.Groups {
		if !slices.Contains(d.m.Groups, g) {
			d.warn(bootstrapAgain, "group %s is granted by the target, but is not in the configuration", g)
		}
		bad, err := d.list(ctx, `WITH RECURSIVE up AS (
			SELECT to_regrole($1)::oid AS oid UNION SELECT m.roleid FROM pg_auth_members m JOIN up ON m.member = up.oid)
			SELECT r.rolname::text FROM up JOIN pg_roles r USING (oid)
			 WHERE r.rolsuper OR r.rolcreaterole OR r.rolreplication OR r.rolbypassrls OR r.rolcanlogin OR r.rolname ~ '^pg_'`, quoted(g))
		if err != nil {
			return err
		}
		var exists, connects bool
		var admins int
		err = d.c.QueryRow(ctx, `SELECT r IS NOT NULL, r IS NOT NULL AND has_database_privilege(r::oid, current_database(), 'CONNECT'), (SELECT count(*) FROM pg_auth_members m
			WHERE m.roleid = r AND m.admin_option AND NOT m.inherit_option AND NOT m.set_option AND m.member IN (SELECT oid FROM pg_roles WHERE rolname = ANY ($2)))
			FROM to_regrole($1) r`, quoted(g), makers(d.facts.Owner)).Scan(&exists, &connects, &admins)
		switch {
		case err != nil:
			return err
		case !exists:
			d.fail(bootstrapAgain, "group %s does not exist", g)
		case len(bad) > 0:
			d.fail("REVOKE it from the group", "group %s is or leads to %s, which is more than rights on data", g, strings.Join(bad, ", "))
		case admins < postgresMakers:
			d.fail(bootstrapAgain, "group %s can't be granted by all of %s's makers, or they have its rights themselves", g, d.facts.Owner)
		case !connects:
			d.fail("GRANT CONNECT ON DATABASE … TO "+quoted(g), "group %s can't connect to this database", g)
		default:
			d.ok("group %s can be granted, and leads nowhere else", g)
		}
	}
	return nil
}

func (d *doctor) settings(context.Context) error {
	s, w := d.facts.Settings, d.want
	if s.Tenants != w.Tenants {
		d.fail(bootstrapAgain, "tenants are %s at the target, %s in the configuration", s.Tenants, w.Tenants)
	}
	if have := time.Duration(s.MaxTTL * float64(time.Second)); have < w.MaxTTL {
		d.fail(bootstrapAgain, "max_ttl is %v at the target, %v in the configuration", have, w.MaxTTL)
	}
	if s.ConnectionLimit != w.ConnectionLimit || s.StatementTimeout != w.StatementTimeout.Milliseconds() ||
		s.TransactionTimeout != w.TransactionTimeout.Milliseconds() || !slices.Equal(s.SearchPath, w.SearchPath) {
		d.warn(bootstrapAgain, "what roles start with (connection_limit, timeouts, search_path) differs from the configuration")
	} else {
		d.ok("what roles start with is as in the configuration")
	}
	return nil
}

// capacity looks for what could keep revocation from its work.
func (d *doctor) capacity(ctx context.Context) error {
	var uses, sees bool
	var reserved, prepared int
	var large int64
	err := d.c.QueryRow(ctx, `SELECT pg_has_role(session_user, 'pg_use_reserved_connections', 'USAGE'), pg_has_role($1::name, 'pg_read_all_stats', 'USAGE'),
		current_setting('reserved_connections')::int, current_setting('max_prepared_transactions')::int,
		(SELECT max(pg_total_relation_size(c)) FROM unnest('{pg_authid, pg_auth_members, pg_shdepend, pg_db_role_setting}'::regclass[]) c)`, d.facts.Owner).
		Scan(&uses, &sees, &reserved, &prepared, &large)
	if err != nil {
		return err
	}
	switch {
	case !uses:
		d.fail("GRANT pg_use_reserved_connections TO "+quoted(d.want.Account)+" WITH INHERIT TRUE", "agents that take all connections could hold up revocation: the account may not use those in reserve")
	case reserved == 0:
		d.warn("set reserved_connections to 4 for each replica of Writ and restart the server", "agents that take all connections could hold up revocation: none are in reserve")
	default:
		d.ok("%d connections are in reserve for Writ", reserved)
	}
	if !sees {
		d.fail("GRANT pg_read_all_stats TO "+quoted(d.facts.Owner)+" WITH INHERIT TRUE, SET FALSE", "the owner does not see since when and whence sessions are open")
	}
	if prepared > 0 {
		d.fail("set max_prepared_transactions to 0 and restart the server",
			"an agent can prepare a transaction in which it altered its own role: without a session, it would hold up revocation for ever")
	} else {
		d.ok("transactions can't be prepared")
	}
	if large > maxCatalog {
		d.warn("VACUUM the shared catalogs more often (autovacuum)", "a catalog of roles has %d MB", large>>20)
	}
	return nil
}

// databases looks where else an agent could get to: DROP OWNED reaches one database only.
func (d *doctor) databases(ctx context.Context) error {
	return d.none(ctx, FindingFail, "agents can connect to no other database of this server", "agents can connect to other databases of this server too",
		"REVOKE CONNECT ON DATABASE … FROM PUBLIC: what names a lease's role there, Writ can't drop",
		`SELECT datname::text FROM pg_database b WHERE datallowconn AND datname <> current_database()
		    AND (has_database_privilege('public', b.oid, 'CONNECT') OR EXISTS (
		      SELECT FROM pg_roles r WHERE r.rolname = ANY ($1) AND has_database_privilege(r.oid, b.oid, 'CONNECT'))) ORDER BY 1 LIMIT 20`, d.facts.Groups)
}

func (d *doctor) existing(ctx context.Context) error {
	var roles, armed, strangers int
	err := d.c.QueryRow(ctx, `SELECT count(DISTINCT role), count(DISTINCT role) FILTER (WHERE armed),
		(SELECT count(*) FROM pg_roles WHERE rolname ~ $1 AND rolname NOT IN (SELECT role FROM `+d.m.fn("survey")+`())) FROM `+d.m.fn("survey")+`()`, leaseRole).Scan(&roles, &armed, &strangers)
	if err != nil {
		return err
	}
	d.ok("%d roles of leases, %d of them armed; %d tombstones", roles, armed, d.facts.Tombstones)
	if strangers > 0 {
		d.warn("see whether another Writ works on this server", "%d roles are named like leases, but were not made here", strangers)
	}
	if d.facts.Due > 0 {
		d.warn("they go with the next revocations; if not, look for errors of Writ's", "%d tombstones are older than they need be", d.facts.Due)
	}
	return nil
}

// dryRun makes a credential of each group, uses it, and ends it.
func (d *doctor) dryRun(ctx context.Context) error {
	for _, g := range d.m.Groups {
		now := time.Now()
		scope := map[string]any{"groups": []string{g}}
		if d.m.Tenants == TenantsRequired {
			scope["tenant"] = "writ doctor"
		}
		l := lease.Lease{ID: id.New(id.Lease), CreatedAt: now, ExpiresAt: now.Add(time.Minute), Grant: lease.Grant{Scope: scope}}
		made, err := d.m.Mint(ctx, lease.Order{Lease: l})
		if err != nil {
			d.fail(bootstrapAgain, "a credential of group %s can't be made: %v", g, err)
		} else {
			d.use(ctx, g, made.Secret)
		}
		out, err := d.m.Unmake(context.WithoutCancel(ctx), []lease.Lease{l})
		if err == nil {
			err = out[0].Err
		}
		if err != nil {
			d.fail("see what the error names; the role can't log in any more unless disarming failed", "the credential of group %s can't be ended: %v", g, err)
			continue
		}
		d.ok("the credential of group %s has ended, and was seen to", g)
		if c, err := d.login(ctx, made.Secret["dsn"]); made.Secret != nil && err == nil {
			_ = c.Close(ctx)
			d.fail("see who else makes roles of these names", "a credential works after its end")
		}
	}
	return nil
}

func (d *doctor) use(ctx context.Context, group string, s lease.Secret) {
	u, err := url.Parse(s["dsn"])
	if err != nil {
		d.fail("check agent_host and agent_port", "the DSN that agents get can't be read")
		return
	}
	u.User = url.UserPassword(s["username"], "not "+s["password"])
	if c, err := d.login(ctx, u.String()); err == nil {
		_ = c.Close(ctx)
		d.fail("use scram-sha-256 in pg_hba.conf", "the server lets in a lease's role with a wrong password")
	}
	c, err := d.login(ctx, s["dsn"])
	if err != nil {
		d.fail("check agent_host, agent_port and pg_hba.conf; a pooler must know roles by auth_query", "a credential can't log in: %v", targetError(err))
		return
	}
	defer func() { _ = c.Close(context.WithoutCancel(ctx)) }()
	var user string
	if err := c.QueryRow(ctx, `SELECT session_user`).Scan(&user); err != nil || user != s["username"] {
		d.fail("let no pooler change the user", "a credential is logged in as %q, not as itself: %v", user, err)
		return
	}
	const table = "writ_doctor_may_not"
	for _, act := range []string{`CREATE TABLE public.` + table + ` (i int)`, `CREATE SCHEMA ` + table, `CREATE ROLE ` + table, `SET ROLE ` + quoted(group)} {
		_, err := c.Exec(ctx, `BEGIN; `+act+`; ROLLBACK`)
		if pg, is := errors.AsType[*pgconn.PgError](err); !is || pg.Code != "42501" {
			d.fail(bootstrapAgain, "a credential of group %s can %s: %v", group, act, err)
		}
		_, _ = c.Exec(ctx, `ROLLBACK`)
	}
	d.ok("a credential of group %s logs in, and can create nothing and become nobody", group)
}

func (d *doctor) login(ctx context.Context, dsn string) (*pgx.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	u, err := url.Parse(dsn)
	if err != nil {
		return nil, errors.New("the DSN can't be read")
	}
	if d.m.CAFile != "" {
		q := u.Query()
		q.Set("sslrootcert", d.m.CAFile)
		u.RawQuery = q.Encode()
	}
	cfg, err := pgx.ParseConfig(u.String())
	if err != nil {
		return nil, errors.New("the DSN can't be read")
	}
	cfg.DefaultQueryExecMode = pgx.QueryExecModeSimpleProtocol
	return pgx.ConnectConfig(ctx, cfg)
}
