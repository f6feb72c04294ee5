package minter_test

import (
	"bytes"
	"context"
	"maps"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/minter"
	"github.com/writsec/writ/test/postgres"
)

// logged is what a server has logged.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// ownServer asks for passwords, logs all it can, and has few connections, but for other
// settings.
func ownServer(t *testing.T, settings map[string]string) (*target, *logged) {
	t.Helper()
	log := &logged{}
	all := map[string]string{
		"fsync": "off", "max_connections": "30", "superuser_reserved_connections": "3", "reserved_connections": "4",
		"log_statement": "all", "log_min_messages": "debug1", "log_min_error_statement": "debug1", "log_min_duration_statement": "0", "log_connections": "on",
	}
	maps.Copy(all, settings)
	s, err := postgres.Start(t.Context(), postgres.Options{Version: serverVersion(t), Log: log, Settings: all})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Stop() })
	sqlAt(t, s.DSN("postgres"), `CREATE DATABASE crm`)
	g := describe()
	g.url = s.DSN("crm")
	hba := value[string](t, g, `SHOW hba_file`)
	g.sql(t, `COPY (SELECT * FROM (VALUES ('host all postgres 127.0.0.1/32 trust'), ('host all all 127.0.0.1/32 scram-sha-256')) v) TO '`+hba+`'`, `SELECT pg_reload_conf()`)
	g.sql(t, `REVOKE CONNECT ON DATABASE postgres, template1 FROM PUBLIC`)
	g.prepare(t)
	return g, log
}

// serverVersion is that of the server which the tests share, so that one run is on one
// version.
func serverVersion(t *testing.T) int {
	t.Helper()
	dsn := os.Getenv(postgres.SharedEnv)
	if dsn == "" {
		return 0
	}
	return value[int](t, &target{url: dsn}, `SELECT current_setting('server_version_num')::int / 10000`)
}

func TestPostgresOwnServer(t *testing.T) {
	t.Parallel()
	g, log := ownServer(t, nil)

	t.Run("passwords", func(t *testing.T) {
		l := g.lease(g.rw)
		s := g.mint(t, l)
		c := login(t, s)
		if err := exec(t, c, `INSERT INTO notes VALUES (1)`); err != nil {
			t.Error(err)
		}
		wrong := with(s["dsn"], func(u *url.URL) { u.User = url.UserPassword(s["username"], "wrong") })
		_, err := pgx.Connect(t.Context(), wrong)
		denied(t, err, "28P01")
		again := g.mint(t, l) // the mint is tried again
		_, err = pgx.Connect(t.Context(), s["dsn"])
		denied(t, err, "28P01")
		login(t, again)
		until := value[time.Time](t, g, `SELECT rolvaliduntil FROM pg_roles WHERE rolname = $1`, s["username"])
		if d := time.Until(until); d < 4*time.Minute || d > 6*time.Minute {
			t.Errorf("valid for %v", d)
		}
		failed := g.lease("no such group")
		if g.try(failed) == nil {
			t.Error("minted for no group")
		}
		g.unmake(t, l)
		for _, secret := range []string{s["password"], again["password"], "SCRAM-SHA-256$"} {
			_, text, found := strings.Cut(log.String(), "INSERT INTO notes VALUES (1)") // after the bootstrap, by the superuser
			if !found || strings.Contains(text, secret) {
				t.Error("the log has a secret")
			}
		}
		if !strings.Contains(log.String(), `"writ"."mint"`) {
			t.Error("the log has no statements, so it proves nothing")
		}
	})

	t.Run("doctor finds nothing", func(t *testing.T) {
		for _, f := range g.Doctor(t.Context(), g.bootstrap) {
			if f.Level != minter.FindingOK {
				t.Errorf("%+v", f)
			}
		}
	})

	t.Run("doctor finds", func(t *testing.T) { doctorFinds(t, g) })

	// It has shown nothing yet, but can't be told from one that has just got in.
	t.Run("a handshake that does not go on", func(t *testing.T) {
		l := g.lease(g.ro)
		s := g.mint(t, l)
		var d net.Dialer
		c, err := d.DialContext(t.Context(), "tcp", net.JoinHostPort(s["host"], s["port"]))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		f := pgproto3.NewFrontend(c, c)
		f.Send(&pgproto3.StartupMessage{ProtocolVersion: pgproto3.ProtocolVersion30, Parameters: map[string]string{"user": s["username"], "database": "crm"}})
		if err := f.Flush(); err != nil {
			t.Fatal(err)
		}
		if m, err := f.Receive(); err != nil {
			t.Fatal(err)
		} else if _, ok := m.(*pgproto3.AuthenticationSASL); !ok {
			t.Fatalf("%T", m)
		}
		started := time.Now()
		g.unmake(t, l)
		if took := time.Since(started); took < 500*time.Millisecond || took > 4*time.Second {
			t.Errorf("took %v", took)
		}
	})

	t.Run("the target restarts", func(t *testing.T) {
		l := g.lease(g.ro)
		g.mint(t, l)
		g.sql(t, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '`+g.bootstrap.Account+`'`)
		for range 10 { // each connection that was ended may be met once
			if out, err := g.Unmake(t.Context(), []lease.Lease{l}); err == nil {
				if out[0].Err != nil {
					t.Error(out[0].Err)
				}
				break
			}
		}
		g.gone(t, l)
	})
}

// doctorFinds breaks a target in each way and wants doctor to say so.
func doctorFinds(t *testing.T, g *target) {
	account, owner := g.bootstrap.Account, g.bootstrap.Owner
	hba := value[string](t, g, `SHOW hba_file`)
	for _, c := range []struct {
		name, break_, mend string
		level              minter.Level
		want               string
	}{
		{"account that makes databases", `ALTER ROLE ` + account + ` CREATEDB`, `ALTER ROLE ` + account + ` NOCREATEDB`, "fail", "the account has attributes of power: CREATEDB"},
		{"account in a group", `GRANT ` + g.ro + ` TO ` + account, `REVOKE ` + g.ro + ` FROM ` + account, "fail", "the account is a member of roles: " + g.ro},
		{"account that reads", `GRANT USAGE ON SCHEMA public TO ` + account + `; GRANT SELECT ON orders TO ` + account, `REVOKE ALL ON orders FROM ` + account, "fail", "the account can reach data: orders"},
		{"account that calls makers", `GRANT EXECUTE ON FUNCTION writ.maker_3 TO ` + account, `REVOKE EXECUTE ON FUNCTION writ.maker_3 FROM ` + account, "fail", "the account can call: maker_3"},
		{"account without reserve", `REVOKE pg_use_reserved_connections FROM ` + account, `GRANT pg_use_reserved_connections TO ` + account + ` WITH INHERIT TRUE`, "fail", "the account may not use those in reserve"},
		{"creation by all", `GRANT CREATE ON SCHEMA public TO PUBLIC`, `REVOKE CREATE ON SCHEMA public FROM PUBLIC`, "fail", "PUBLIC can create things in schemas, and so can agents: public"},
		{"temporary tables of all", `GRANT TEMPORARY ON DATABASE crm TO PUBLIC`, `REVOKE TEMPORARY ON DATABASE crm FROM PUBLIC`, "warn", "PUBLIC can make temporary tables, and so can agents, in: crm"},
		{"large objects of all", `GRANT EXECUTE ON FUNCTION lo_create(oid) TO PUBLIC`, `REVOKE EXECUTE ON FUNCTION lo_create(oid) FROM PUBLIC`, "warn", "large objects, and so can agents, by: lo_create(oid)"},
		{"group with powers", `GRANT pg_read_server_files TO ` + g.ro, `REVOKE pg_read_server_files FROM ` + g.ro, "fail", "leads to pg_read_server_files"},
		{"group that logs in", `ALTER ROLE ` + g.ro + ` LOGIN`, `ALTER ROLE ` + g.ro + ` NOLOGIN`, "fail", "group " + g.ro + " is or leads to " + g.ro},
		{"group not in the list", `DELETE FROM writ.groups WHERE name = '` + g.ro + `'`, `INSERT INTO writ.groups VALUES ('` + g.ro + `')`, "fail", "group " + g.ro + " is in the configuration, but the target does not grant it"},
		{"group of one maker's too few", `REVOKE ` + g.rw + ` FROM ` + owner + `_5`, `GRANT ` + g.rw + ` TO ` + owner + `_5 WITH ADMIN TRUE, INHERIT FALSE, SET FALSE`, "fail", "group " + g.rw + " can't be granted by all"},
		{"makers with the group's rights", `GRANT ` + g.rw + ` TO ` + owner + `_5 WITH INHERIT TRUE`, `GRANT ` + g.rw + ` TO ` + owner + `_5 WITH INHERIT FALSE`, "fail", "or they have its rights themselves"},
		{"owner that sees little", `REVOKE pg_read_all_stats FROM ` + owner, `GRANT pg_read_all_stats TO ` + owner + ` WITH INHERIT TRUE, SET FALSE`, "fail", "the owner does not see"},
		{"settings that differ", `UPDATE writ.settings SET statement_timeout = 1`, `UPDATE writ.settings SET statement_timeout = 30000`, "warn", "what roles start with"},
		{"tenants that differ", `UPDATE writ.settings SET tenants = 'required'`, `UPDATE writ.settings SET tenants = 'optional'`, "fail", "tenants are required at the target, optional in the configuration"},
		{"short life", `UPDATE writ.settings SET max_ttl = '1 min'`, `UPDATE writ.settings SET max_ttl = '1 hour'`, "fail", "max_ttl is 1m0s at the target"},
		{"other databases", `GRANT CONNECT ON DATABASE postgres TO ` + g.ro, `REVOKE CONNECT ON DATABASE postgres FROM ` + g.ro, "fail", "agents can connect to other databases of this server too: postgres"},
		{"old functions", `CREATE OR REPLACE FUNCTION writ.version() RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 0'`, `CREATE OR REPLACE FUNCTION writ.version() RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 1'`, "fail", "are of version 0, expected 1"},
		{"no functions", `REVOKE USAGE ON SCHEMA writ FROM ` + account, `GRANT USAGE ON SCHEMA writ TO ` + account, "fail", "Writ's functions are missing, or the account may not call them"},
		{"no makers", `ALTER ROLE ` + owner + `_0 NOCREATEROLE; ALTER ROLE ` + owner + `_1 NOCREATEROLE` + manyMakers(owner, "NOCREATEROLE"), `ALTER ROLE ` + owner + `_0 CREATEROLE; ALTER ROLE ` + owner + `_1 CREATEROLE` + manyMakers(owner, "CREATEROLE"), "fail", "can't be made"},
		{"password of the account", `ALTER ROLE ` + account + ` PASSWORD 'x'`, `ALTER ROLE ` + account + ` PASSWORD 'minter''s own'`, "fail", "can't connect"},
		{"no passwords asked", `COPY (SELECT 'host all all 127.0.0.1/32 trust') TO '` + hba + `'; SELECT pg_reload_conf()`,
			`COPY (SELECT * FROM (VALUES ('host all postgres 127.0.0.1/32 trust'), ('host all all 127.0.0.1/32 scram-sha-256')) v) TO '` + hba + `'; SELECT pg_reload_conf()`, "fail", "lets in a lease's role with a wrong password"},
	} {
		for _, s := range strings.Split(c.break_, "; ") {
			g.sql(t, s)
		}
		if strings.Contains(c.break_, "reload") {
			time.Sleep(300 * time.Millisecond)
		}
		m := g.open(t, nil)
		found := false
		var all []string
		for _, f := range m.Doctor(t.Context(), g.bootstrap) {
			found = found || f.Level == c.level && strings.Contains(f.Text, c.want) && f.Mend != ""
			if f.Level != minter.FindingOK {
				all = append(all, string(f.Level)+" "+f.Text)
			}
		}
		m.Close()
		if !found {
			t.Errorf("%s: not found %q in:\n%s", c.name, c.want, strings.Join(all, "\n"))
		}
		for _, s := range strings.Split(c.mend, "; ") {
			g.sql(t, s)
		}
		if strings.Contains(c.break_, "reload") {
			time.Sleep(300 * time.Millisecond)
		}
	}
	for _, f := range g.Doctor(t.Context(), g.bootstrap) {
		if f.Level == minter.FindingFail {
			t.Errorf("in the end: %+v", f)
		}
	}
}

func manyMakers(owner, attribute string) (out string) {
	for i := 2; i < minter.PostgresMakers; i++ {
		out += "; ALTER ROLE " + owner + "_" + strconv.Itoa(i) + " " + attribute
	}
	return out
}

// An administrator who is no superuser, as clouds have them, can do all of it but what
// the documentation names.
func TestPostgresBootstrapWithoutSuperuser(t *testing.T) {
	t.Parallel()
	s, err := postgres.Start(t.Context(), postgres.Options{Version: serverVersion(t), Settings: map[string]string{"fsync": "off"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Stop() })
	g := describe()
	sqlAt(t, s.DSN("postgres"), `CREATE ROLE dba LOGIN CREATEROLE CREATEDB`, `GRANT pg_read_all_stats, pg_use_reserved_connections TO dba WITH ADMIN OPTION`)
	dba := with(s.DSN("postgres"), func(u *url.URL) { u.User = url.User("dba") })
	sqlAt(t, dba, `CREATE DATABASE crm`)
	g.url = with(dba, func(u *url.URL) { u.Path = "/crm" })
	text := g.bootstrapSQL(t)
	for range 2 {
		c, err := pgx.Connect(t.Context(), g.url)
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.PgConn().Exec(t.Context(), text).ReadAll()
		_ = c.Close(t.Context())
		if err != nil {
			t.Fatal(err)
		}
	}
	g.config = minter.PostgresConfig{
		Name: "crm-db", URL: with(g.url, func(u *url.URL) { u.User = url.User(g.bootstrap.Account) }), Password: "minter's own",
		Schema: "writ", Groups: g.bootstrap.Groups, Tenants: minter.TenantsOptional, Connections: 8, MaxTTL: 5 * time.Minute,
	}
	g.Postgres = g.open(t, nil)
	l := g.lease(g.ro)
	login(t, g.mint(t, l))
	g.url = s.DSN("crm")
	if n := value[int](t, g, `SELECT count(*) FROM pg_auth_members WHERE member = 'dba'::regrole AND (set_option OR inherit_option) AND roleid::regrole::text LIKE 'writ_owner%'`); n != 0 {
		t.Errorf("the administrator keeps %d memberships", n)
	}
	g.unmake(t, l)
}

// The server of an older PostgreSQL is refused with the reason, by the minter and by
// the bootstrap.
func TestPostgresTooOld(t *testing.T) {
	t.Parallel()
	wantError(t, minter.Supported(150018, "15.18"), "PostgreSQL 15.18 is too old, expected 16 or later")
	if err := minter.Supported(160000, "16.0"); err != nil {
		t.Error(err)
	}
	const bin = "/usr/lib/postgresql/15/bin"
	if _, err := os.Stat(filepath.Join(bin, "postgres")); err != nil || os.Getenv("WRIT_POSTGRES_15") == "" {
		t.Log("a server of 15 is not tried: set WRIT_POSTGRES_15=host:port of one that trusts postgres")
		return
	}
	dsn := "postgres://postgres@" + os.Getenv("WRIT_POSTGRES_15") + "/postgres?sslmode=disable"
	m, err := minter.NewPostgres(minter.PostgresConfig{Name: "old", URL: dsn, Schema: "writ", Groups: []string{"a"}, Tenants: "none", Connections: 1, MaxTTL: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	_, err = m.Survey(t.Context())
	wantError(t, err, "is too old")
	if found := m.Doctor(t.Context(), minter.Bootstrap{}); len(found) != 1 || found[0].Level != minter.FindingFail {
		t.Errorf("%+v", found)
	}
	c, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close(context.Background()) }()
	// psql sends one statement after the other, and the first refuses.
	first, _, _ := strings.Cut(describe().bootstrapSQL(t), "-- 2.")
	_, err = c.PgConn().Exec(t.Context(), first).ReadAll()
	wantError(t, err, "is too old")
}
