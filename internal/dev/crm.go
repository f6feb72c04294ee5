package dev

import (
	"context"
	"crypto/sha256"
	_ "embed" // the SQL
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/writsec/writ/internal/config"
	"github.com/writsec/writ/internal/minter"
	"github.com/writsec/writ/internal/server"
)

// Database is the CRM's: where the sample policies' minter crm-db makes roles.
type Database struct {
	// URL reaches it as who prepared it, a superuser. "" where it had been prepared
	// before, and the URL that was given is the minter's own account.
	URL string

	server string   // the URL that was given
	name   string   // of the database, and what the names of its roles begin with
	fresh  bool     // made by this very start
	groups []string // the same of its groups
}

const crmMinter = "crm-db"

// crmGroups are what the sample policies give: to read, and to change.
var crmGroups = []string{"crm_ro", "crm_rw"}

//go:embed crm.sql
var crmSQL string

// openCRM finds or makes the CRM's database at a server, and the minter of its roles.
func openCRM(ctx context.Context, dir, at string) (*Database, config.Minter, error) {
	m := config.Minter{MaxTTL: 5 * time.Minute, Postgres: &config.Postgres{
		Groups: crmGroups, Tenants: minter.TenantsRequired, Connections: 4, Schema: "writ", SearchPath: []string{"crm"},
		ConnectionLimit: 3, StatementTimeout: 30 * time.Second, TransactionTimeout: time.Minute,
	}}
	u, err := url.Parse(at)
	if err != nil || (u.Scheme != "postgres" && u.Scheme != "postgresql") || u.Hostname() == "" {
		return nil, m, errors.New("--postgres: expected postgres://USER:PASSWORD@HOST:PORT/DATABASE") // not quoted: it may hold a password
	}
	c, err := pgx.Connect(ctx, at)
	if err != nil {
		return nil, m, fmt.Errorf("connect to PostgreSQL: %w", err)
	}
	defer func() { _ = c.Close(ctx) }()
	var superuser bool
	if err := c.QueryRow(ctx, `SELECT rolsuper FROM pg_roles WHERE rolname = current_user`).Scan(&superuser); err != nil {
		return nil, m, fmt.Errorf("look at PostgreSQL: %w", err)
	}
	if !superuser {
		m.Postgres.URL = at // it had its writ postgres bootstrap
		return &Database{}, m, nil
	}

	// The names go by the folder's own secret: two folders never share a database, in
	// which each would take the other's leases for strangers.
	const passwordFile = "crm-db-password"
	password, err := secretFile(dir, passwordFile)
	if err != nil {
		return nil, m, err
	}
	d := &Database{server: at, name: fmt.Sprintf("writ_crm_%.4x", sha256.Sum256([]byte(password)))}
	d.URL = atDatabase(*u, u.User, d.name)
	m.Postgres.Owner = d.name
	m.Postgres.URL = atDatabase(*u, url.User(d.name+"_minter"), d.name)
	m.Postgres.PasswordFile = filepath.Join(dir, passwordFile)
	b := server.PostgresBootstrap(m)
	b.Password = password
	if err := d.prepare(ctx, c, b); err != nil {
		return nil, m, errors.Join(fmt.Errorf("prepare the CRM's database: %w", err), d.giveUp(ctx))
	}
	return d, m, nil
}

func atDatabase(u url.URL, user *url.Userinfo, name string) string {
	u.User, u.Path = user, "/"+name
	return u.String()
}

// prepare does what docs/postgres.md tells an administrator to do.
func (d *Database) prepare(ctx context.Context, server *pgx.Conn, b minter.Bootstrap) error {
	var exists bool
	if err := server.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)`, d.name).Scan(&exists); err != nil {
		return err
	}
	rows, err := server.Query(ctx, `SELECT rolname FROM pg_roles WHERE rolname = ANY ($1)`, b.Groups)
	if err != nil {
		return err
	}
	theirs, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	for _, g := range b.Groups {
		if !slices.Contains(theirs, g) {
			d.groups = append(d.groups, g)
		}
	}
	if d.fresh = !exists; d.fresh {
		if _, err := server.Exec(ctx, `CREATE DATABASE `+pgx.Identifier{d.name}.Sanitize()); err != nil {
			return err
		}
	}
	text, err := minter.BootstrapSQL(b)
	if err != nil {
		return err
	}
	c, err := pgx.Connect(ctx, d.URL)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close(ctx) }()
	for _, sql := range []string{text, crmSQL} {
		if _, err := c.PgConn().Exec(ctx, sql).ReadAll(); err != nil {
			return err
		}
	}
	return nil
}

// giveUp leaves nothing behind of a start that failed, and all of earlier ones.
func (d *Database) giveUp(ctx context.Context) error {
	if d == nil || !d.fresh {
		return nil
	}
	return d.Drop(context.WithoutCancel(ctx))
}

// Drop removes the database and its roles from the server, once Writ has stopped. It
// does nothing where they had been there before.
func (d *Database) Drop(ctx context.Context) error {
	if d.server == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	c, err := pgx.Connect(ctx, d.server)
	if err != nil {
		return fmt.Errorf("drop the CRM's database: %w", err)
	}
	defer func() { _ = c.Close(ctx) }()
	// Roles of leases, if any are left, before those that made them.
	rows, err := c.Query(ctx, `SELECT r.rolname FROM pg_roles r
		WHERE r.rolname ~ ('^' || $1 || '(_[0-9]+|_minter)?$') OR (r.rolname ^@ 'writ_lea_' AND EXISTS (
			SELECT FROM pg_auth_members m JOIN pg_roles maker ON maker.oid = m.member
			WHERE m.roleid = r.oid AND maker.rolname ~ ('^' || $1 || '_[0-9]+$')))
		ORDER BY r.rolname ^@ 'writ_lea_' DESC, r.rolname DESC`, d.name)
	if err != nil {
		return fmt.Errorf("drop the CRM's database: %w", err)
	}
	roles, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return fmt.Errorf("drop the CRM's database: %w", err)
	}
	drops := []string{`DROP DATABASE IF EXISTS ` + pgx.Identifier{d.name}.Sanitize() + ` WITH (FORCE)`}
	for _, r := range roles {
		drops = append(drops, `DROP ROLE IF EXISTS `+pgx.Identifier{r}.Sanitize())
	}
	for _, sql := range drops {
		if _, err := c.Exec(ctx, sql); err != nil {
			return fmt.Errorf("drop the CRM's database: %w", err)
		}
	}
	for _, g := range d.groups {
		// Another one may use it by now: then it is not ours any more.
		_, _ = c.Exec(ctx, `DROP ROLE IF EXISTS `+pgx.Identifier{g}.Sanitize())
	}
	return nil
}
