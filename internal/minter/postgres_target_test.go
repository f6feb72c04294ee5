package minter_test

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/minter"
	"github.com/writsec/writ/internal/storetest"
)

func TestMain(m *testing.M) { os.Exit(storetest.Main(m)) }

// target is a database with Writ's functions and some data. Roles belong to the whole
// server, so each test has its own.
type target struct {
	*minter.Postgres
	url       string // as superuser
	config    minter.PostgresConfig
	bootstrap minter.Bootstrap
	ro, rw    string // groups
}

func noMigration(context.Context, string) error { return nil }

func newTarget(t testing.TB, change ...func(*minter.Bootstrap)) *target {
	t.Helper()
	g := describe(change...)
	// Runs last: the database, with what depends on these roles, is dropped before.
	var server string
	t.Cleanup(func() { g.drop(t, server) })
	g.url = storetest.Database(t, "minter", noMigration)
	server = with(g.url, func(u *url.URL) { u.Path = "/postgres" })
	g.prepare(t)
	return g
}

// drop removes the roles of a target, whose database is gone.
func (g *target) drop(t testing.TB, server string) {
	dropLeases(t, server, g.bootstrap.Owner)
	roles := []string{g.ro, g.rw, g.bootstrap.Account}
	for i := range minter.PostgresMakers {
		roles = append(roles, fmt.Sprintf("%s_%d", g.bootstrap.Owner, i))
	}
	for _, role := range append(roles, g.bootstrap.Owner) {
		sqlAt(t, server, `DROP ROLE IF EXISTS `+role)
	}
}

// describe names a target. Its roles belong to the whole server, so they are its own.
func describe(change ...func(*minter.Bootstrap)) *target {
	b := make([]byte, 5)
	_, _ = rand.Read(b)
	name := func(prefix string) string { return prefix + "_" + hex.EncodeToString(b) }
	g := &target{bootstrap: minter.Bootstrap{
		Schema: "writ", Owner: name("writ_owner"), Account: name("writ_minter"), Password: "minter's own",
		Tenants: minter.TenantsOptional, MaxTTL: time.Hour, ConnectionLimit: 5,
		StatementTimeout: 30 * time.Second, TransactionTimeout: time.Minute, SearchPath: []string{"public"}, Harden: true,
	}, ro: name("crm_ro"), rw: name("crm_rw")}
	g.bootstrap.Groups = []string{g.ro, g.rw}
	for _, f := range change {
		f(&g.bootstrap)
	}
	return g
}

// prepare makes the database at g.url a target with some data.
func (g *target) prepare(t testing.TB) {
	t.Helper()
	g.sql(t, g.bootstrapSQL(t))
	g.sql(t, `CREATE TABLE orders (id int PRIMARY KEY, tenant text NOT NULL);
		INSERT INTO orders VALUES (1, 'acme'), (2, 'umbrella');
		CREATE TABLE notes (id int PRIMARY KEY);
		GRANT USAGE ON SCHEMA public TO `+g.ro+`, `+g.rw+`;
		GRANT SELECT ON orders, notes TO `+g.ro+`, `+g.rw+`;
		GRANT INSERT ON notes TO `+g.rw+`;
		ALTER TABLE orders ENABLE ROW LEVEL SECURITY;
		CREATE POLICY lease ON orders FOR SELECT TO `+g.ro+` USING (tenant = (SELECT `+pgx.Identifier{g.bootstrap.Schema, "tenant"}.Sanitize()+`()))`)
	g.config = minter.PostgresConfig{
		Name: "crm-db", URL: with(g.url, func(u *url.URL) { u.User = url.User(g.bootstrap.Account) }), Password: g.bootstrap.Password,
		Schema: "writ", Groups: g.bootstrap.Groups, Tenants: g.bootstrap.Tenants, Connections: 8, MaxTTL: 5 * time.Minute,
	}
	g.Postgres = g.open(t, nil)
}

func (g *target) bootstrapSQL(t testing.TB) string {
	t.Helper()
	text, err := minter.BootstrapSQL(g.bootstrap)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func with(dsn string, change func(*url.URL)) string {
	u, err := url.Parse(dsn)
	if err != nil {
		panic(err) // the launcher's
	}
	change(u)
	return u.String()
}

func (g *target) open(t testing.TB, change func(*minter.PostgresConfig)) *minter.Postgres {
	t.Helper()
	c := g.config
	if change != nil {
		change(&c)
	}
	m, err := minter.NewPostgres(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return m
}

func sqlAt(t testing.TB, url string, statements ...string) {
	t.Helper()
	c, err := pgx.Connect(context.Background(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close(context.Background()) }()
	for _, s := range statements {
		// The simple protocol takes several statements at once.
		if _, err := c.PgConn().Exec(context.Background(), s).ReadAll(); err != nil {
			t.Fatalf("%v in %.2000s", err, s)
		}
	}
}

// sql runs statements as the superuser.
func (g *target) sql(t testing.TB, statements ...string) { t.Helper(); sqlAt(t, g.url, statements...) }

// value is one value of a query by the superuser.
func value[T any](t testing.TB, g *target, query string, args ...any) T {
	t.Helper()
	c, err := pgx.Connect(context.Background(), g.url)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close(context.Background()) }()
	var v T
	if err := c.QueryRow(context.Background(), query, args...).Scan(&v); err != nil {
		t.Fatalf("%v in %s", err, query)
	}
	return v
}

// dropLeases removes the roles that a test left, with brute force.
func dropLeases(t testing.TB, server, owner string) {
	c, err := pgx.Connect(context.Background(), server)
	if err != nil {
		t.Error(err)
		return
	}
	defer func() { _ = c.Close(context.Background()) }()
	rows, _ := c.Query(context.Background(), `SELECT rolname FROM pg_roles r JOIN pg_auth_members m ON m.roleid = r.oid
		WHERE pg_get_userbyid(m.member) LIKE $1 || '%' AND rolname LIKE 'writ_lea_%'`, owner)
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Error(err)
	}
	for _, n := range names {
		if _, err := c.Exec(context.Background(), `DROP ROLE `+n); err != nil {
			t.Error(err)
		}
	}
}

func (g *target) lease(groups ...any) lease.Lease {
	now := time.Now()
	return lease.Lease{
		ID: id.New(id.Lease), CreatedAt: now, ExpiresAt: now.Add(5 * time.Minute),
		Grant: lease.Grant{Minter: "crm-db", Kind: "postgres", Outside: true, Scope: map[string]any{"groups": groups}},
	}
}

func (g *target) mint(t testing.TB, l lease.Lease) lease.Secret {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	made, err := g.Mint(ctx, lease.Order{Lease: l})
	if err != nil {
		t.Fatal(err)
	}
	return made.Secret
}

func login(t testing.TB, s lease.Secret) *pgx.Conn {
	t.Helper()
	c, err := pgx.Connect(t.Context(), s["dsn"])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close(context.Background()) })
	return c
}

// unmake ends leases, of which none may resist.
func (g *target) unmake(t testing.TB, ls ...lease.Lease) []lease.Unmade {
	t.Helper()
	out, err := g.Unmake(t.Context(), ls)
	if err != nil {
		t.Fatal(err)
	}
	for i, u := range out {
		if u.Err != nil {
			t.Errorf("%s: %v", ls[i].ID, u.Err)
		}
		g.gone(t, ls[i])
	}
	return out
}

func (g *target) gone(t testing.TB, l lease.Lease) {
	t.Helper()
	if value[bool](t, g, `SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1) OR EXISTS (SELECT FROM pg_stat_activity a JOIN writ.lease l ON a.usesysid = l.oid WHERE l.role = $1)`,
		"writ_"+l.ID) {
		t.Errorf("%s: something is left", l.ID)
	}
}

// denied wants an SQLSTATE.
func denied(t testing.TB, err error, code string) {
	t.Helper()
	if pg, is := errors.AsType[*pgconn.PgError](err); !is || pg.Code != code {
		t.Errorf("%v, want SQLSTATE %s", err, code)
	}
}

func wantError(t testing.TB, err error, part string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), part) {
		t.Errorf("%v, want %q", err, part)
	}
}

func exec(t testing.TB, c *pgx.Conn, statement string) error {
	t.Helper()
	_, err := c.Exec(t.Context(), statement)
	return err
}
