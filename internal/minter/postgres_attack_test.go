package minter_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/minter"
)

// An agent may hold what it can against its own end.
func TestPostgresResistance(t *testing.T) {
	t.Parallel()
	g := newTarget(t, func(b *minter.Bootstrap) { b.Harden = false })
	for _, c := range []struct {
		name string
		do   []string
	}{
		{"alters its own role in an open transaction", []string{`BEGIN`, `ALTER ROLE CURRENT_USER PASSWORD 'another'`}},
		{"alters its own role", []string{`ALTER ROLE CURRENT_USER PASSWORD 'another'`, `ALTER ROLE CURRENT_USER SET work_mem = '1MB'`}},
		{"locks what Writ might lock", []string{`SELECT pg_advisory_lock(hashtextextended(session_user::text, 0))`, `BEGIN`, `LOCK TABLE orders IN ACCESS SHARE MODE`}},
		{"owns a temporary table", []string{`CREATE TEMP TABLE x (i int)`, `INSERT INTO x VALUES (1)`}},
		{"owns a large object", []string{`SELECT lo_from_bytea(0, 'x')`}},
		{"leaves its defaults", []string{`ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC`}},
		{"has no timeouts", []string{`SET statement_timeout = 0`, `SET idle_in_transaction_session_timeout = 0`, `BEGIN`, `SELECT 1`}},
	} {
		l := g.lease(g.ro)
		s := g.mint(t, l)
		conn := login(t, s)
		for _, statement := range c.do {
			if err := exec(t, conn, statement); err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
		}
		started := time.Now()
		g.unmake(t, l)
		if took := time.Since(started); took > 4*time.Second {
			t.Errorf("%s: took %v", c.name, took)
		}
		if conn.Ping(t.Context()) == nil {
			t.Errorf("%s: its session goes on", c.name)
		}
	}
	if n := value[int](t, g, `SELECT count(*) FROM pg_largeobject_metadata`); n != 0 {
		t.Errorf("%d large objects are left", n)
	}
}

// Many that resist at once are no harder.
func TestPostgresManyResist(t *testing.T) {
	t.Parallel()
	g := newTarget(t)
	var ls []lease.Lease
	for range 40 {
		l := g.lease(g.ro)
		c := login(t, g.mint(t, l))
		if err := errors.Join(exec(t, c, `BEGIN`), exec(t, c, `ALTER ROLE CURRENT_USER PASSWORD 'another'`)); err != nil {
			t.Fatal(err)
		}
		ls = append(ls, l)
	}
	started := time.Now()
	g.unmake(t, ls...)
	if took := time.Since(started); took > 4*time.Second {
		t.Errorf("took %v", took)
	}
}

// A session that is busy, or whose client does not read, ends all the same.
func TestPostgresBusySessions(t *testing.T) {
	t.Parallel()
	g := newTarget(t)
	var leases []lease.Lease
	var ended sync.WaitGroup
	for _, work := range []string{`SELECT pg_sleep(600)`, `SELECT count(*) FROM generate_series(1, 1e12::bigint)`} {
		l := g.lease(g.ro)
		leases = append(leases, l)
		c := login(t, g.mint(t, l))
		ended.Go(func() {
			if err := exec(t, c, work); err == nil {
				t.Error("the work was done")
			}
		})
	}
	l := g.lease(g.ro)
	leases = append(leases, l)
	deaf := login(t, g.mint(t, l))
	deaf.PgConn().Frontend().SendQuery(&pgproto3.Query{String: deafQuery}) // nobody reads the answer
	if err := deaf.PgConn().Frontend().Flush(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
	for _, u := range g.unmake(t, leases...) {
		if u.Seen["sessions"] != 1 {
			t.Errorf("seen: %v", u.Seen)
		}
	}
	ended.Wait()
}

// A mint that is stalled before its commit, here by hand, holds up the end of its own
// lease, and of no other.
func TestFault03StalledMint(t *testing.T) {
	t.Parallel()
	g := newTarget(t)
	stalled, other := g.lease(g.ro), g.lease(g.ro)
	g.mint(t, other)
	c, err := pgx.Connect(t.Context(), g.url)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close(context.Background()) }()
	begin := func(l lease.Lease) {
		if err := exec(t, c, `BEGIN`); err != nil {
			t.Fatal(err)
		}
		_, err := c.Exec(t.Context(), `SELECT writ.mint($1, $2, $3, NULL, '1 min', clock_timestamp() + interval '1 min')`, "writ_"+l.ID, aVerifier, []string{g.ro})
		if err != nil {
			t.Fatal(err)
		}
	}
	begin(stalled)
	done := make(chan []lease.Unmade)
	go func() {
		out, err := g.Unmake(context.Background(), []lease.Lease{stalled, other})
		if err != nil {
			t.Error(err)
		}
		done <- out
	}()
	for started := time.Now(); value[bool](t, g, `SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)`, "writ_"+other.ID); time.Sleep(10 * time.Millisecond) {
		if time.Since(started) > 3*time.Second {
			t.Fatal("the other lease waits for it")
		}
	}
	if err := exec(t, c, `COMMIT`); err != nil {
		t.Fatal(err)
	}
	out := <-done
	if len(out) != 2 || out[0].Err != nil || out[1].Err != nil {
		t.Errorf("%v", out)
	}
	g.gone(t, stalled)

	// One that never gets to its commit is told of, and tried again by the engine.
	begin(g.lease(g.ro))
	_ = exec(t, c, `ROLLBACK`)
	stuck := g.lease(g.ro)
	begin(stuck)
	out, err = g.Unmake(t.Context(), []lease.Lease{stuck})
	if err != nil || len(out) != 1 {
		t.Fatal(out, err)
	}
	wantError(t, out[0].Err, "can't be disarmed: canceling statement due to lock timeout")
	_ = exec(t, c, `ROLLBACK`)
	g.unmake(t, stuck)
	err = g.try(stuck)
	wantError(t, err, "the lease has ended")
}

// Deadlines are the target's own clock's, whatever ours says.
func TestPostgresLateMint(t *testing.T) {
	t.Parallel()
	g := newTarget(t)
	g.mint(t, g.lease(g.ro)) // knows the clock now
	for _, skew := range []time.Duration{-10 * time.Minute, 10 * time.Minute} {
		minter.SkewClock(g.Postgres, skew) // as if the target's clock had been set since
		g.mint(t, g.lease(g.ro))
	}
	l := g.lease(g.ro)
	call := func(deadline string) error {
		c, err := pgx.Connect(t.Context(), g.config.URL)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close(context.Background()) }()
		_, err = c.Exec(t.Context(), `SELECT writ.mint($1, $2, $3, NULL, '1 min', `+deadline+`)`, "writ_"+l.ID, aVerifier, []string{g.ro})
		return err
	}
	denied(t, call(`clock_timestamp() - interval '1 ms'`), "WR003")
	denied(t, call(`NULL`), "WR003")

	// It waits for the group past its deadline: nothing may be left.
	c, err := pgx.Connect(t.Context(), g.url)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close(context.Background()) }()
	if err := errors.Join(exec(t, c, `BEGIN`), exec(t, c, `GRANT `+g.ro+` TO `+g.rw)); err != nil {
		t.Fatal(err)
	}
	var rollback sync.WaitGroup
	rollback.Go(func() {
		time.Sleep(500 * time.Millisecond)
		_, _ = c.Exec(context.Background(), `ROLLBACK`)
	})
	denied(t, call(`clock_timestamp() + interval '200 ms'`), "WR003")
	rollback.Wait()
	g.gone(t, l)
}

const (
	aVerifier = "SCRAM-SHA-256$4096:MTIzNDU2Nzg5MDEyMzQ1Ng==$QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVphYmNkZWY=:QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVphYmNkZWY="
	deafQuery = `SELECT repeat('x', 1000) FROM generate_series(1, 1000000)`
)

func (g *target) try(l lease.Lease) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_, err := g.Mint(ctx, lease.Order{Lease: l})
	return err
}

// The functions take from nobody, not even Writ's account, what they should not.
func TestPostgresFunctionsRefuse(t *testing.T) {
	t.Parallel()
	g := newTarget(t, func(b *minter.Bootstrap) { b.Tenants = minter.TenantsRequired })
	c, err := pgx.Connect(t.Context(), g.config.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close(context.Background()) }()
	good := "writ_" + id.New(id.Lease)
	for _, m := range []struct {
		name, role, verifier string
		groups               []string
		tenant               any
		ttl                  string
	}{
		{"the superuser", "postgres", aVerifier, []string{g.ro}, "a", "1 min"},
		{"the owner", g.bootstrap.Owner, aVerifier, []string{g.ro}, "a", "1 min"},
		{"a name that goes on", good + "x", aVerifier, []string{g.ro}, "a", "1 min"},
		{"a name with a line end", good + "\n", aVerifier, []string{g.ro}, "a", "1 min"},
		{"a password in clear", good, "password", []string{g.ro}, "a", "1 min"},
		{"an MD5 password", good, "md5" + strings.Repeat("0", 32), []string{g.ro}, "a", "1 min"},
		{"SQL in the verifier", good, aVerifier + "' SUPERUSER --", []string{g.ro}, "a", "1 min"},
		{"the owner as a group", good, aVerifier, []string{g.bootstrap.Owner}, "a", "1 min"},
		{"a maker as a group", good, aVerifier, []string{g.bootstrap.Owner + "_0"}, "a", "1 min"},
		{"a group of the server's", good, aVerifier, []string{g.ro, "pg_read_server_files"}, "a", "1 min"},
		{"a group twice", good, aVerifier, []string{g.ro, g.ro}, "a", "1 min"},
		{"no group", good, aVerifier, []string{}, "a", "1 min"},
		{"no groups at all", good, aVerifier, nil, "a", "1 min"},
		{"no tenant", good, aVerifier, []string{g.ro}, nil, "1 min"},
		{"an empty tenant", good, aVerifier, []string{g.ro}, "", "1 min"},
		{"too long", good, aVerifier, []string{g.ro}, "a", "61 min"},
		{"no time", good, aVerifier, []string{g.ro}, "a", "0"},
	} {
		_, err := c.Exec(t.Context(), `SELECT writ.mint($1, $2, $3, $4, $5::text::interval, clock_timestamp() + interval '5 s')`, m.role, m.verifier, m.groups, m.tenant, m.ttl)
		denied(t, err, "WR001")
	}
	for _, f := range []string{"disarm", "reap"} {
		var problem string
		if err := c.QueryRow(t.Context(), `SELECT problem FROM writ.`+f+`(ARRAY['postgres'])`).Scan(&problem); err != nil || problem != "is not named after a lease" {
			t.Errorf("%s: %s, %v", f, problem, err)
		}
	}
	var n int
	if err := c.QueryRow(t.Context(), `SELECT count(*) FROM writ.kill(ARRAY['postgres', $1]) WHERE role IS NOT NULL`, g.bootstrap.Account).Scan(&n); err != nil || n != 0 {
		t.Errorf("kill: %d, %v", n, err)
	}
	for _, attempt := range []string{
		`CREATE ROLE x`, `SELECT * FROM orders`, `SELECT * FROM writ.lease`, `DELETE FROM writ.groups`, `CREATE TABLE x (i int)`, `CREATE TEMP TABLE x (i int)`, `CREATE SCHEMA x`,
		`SELECT writ.maker_0(ARRAY['ALTER ROLE postgres PASSWORD NULL'])`, `SELECT writ.have('` + good + `', 'DROP TABLE orders')`, `SELECT writ.inherit('` + good + `')`,
		`SELECT writ.terminate('` + good + `')`, `SELECT writ.tenant()`, `SET ROLE ` + g.bootstrap.Owner, `SET ROLE ` + g.bootstrap.Owner + `_0`, `SET ROLE ` + g.ro,
		`GRANT ` + g.ro + ` TO CURRENT_USER`, `COPY (SELECT 1) TO PROGRAM 'cat'`, `ALTER FUNCTION writ.tenant() OWNER TO CURRENT_USER`,
	} {
		denied(t, exec(t, c, attempt), "42501")
	}
	// A temporary object must not stand in for what the functions use.
	g.sql(t, `GRANT TEMPORARY ON DATABASE `+value[string](t, g, `SELECT current_database()::text`)+` TO `+g.bootstrap.Account)
	if err := errors.Join(exec(t, c, `CREATE TEMP TABLE pg_roles (rolname name, oid oid, rolcanlogin bool)`), exec(t, c, `SET search_path = pg_temp, public`)); err != nil {
		t.Fatal(err)
	}
	l := g.lease(g.ro)
	l.Scope["tenant"] = "acme"
	g.mint(t, l)
	if err := c.QueryRow(t.Context(), `SELECT count(*) FROM writ.survey()`).Scan(&n); err != nil || n != 1 {
		t.Errorf("survey: %d, %v", n, err)
	}
	g.unmake(t, l)
}

// Whatever one role of a batch resists with, the others end.
func TestPostgresBadRoleInBatch(t *testing.T) {
	t.Parallel()
	g := newTarget(t)
	var ls []lease.Lease
	for range 20 {
		l := g.lease(g.ro)
		g.mint(t, l)
		ls = append(ls, l)
	}
	other := newTarget(t)
	bad := "writ_" + ls[7].ID
	other.sql(t, `CREATE SCHEMA `+bad+` AUTHORIZATION `+bad) // in another database: DROP OWNED does not get there
	g.sql(t, `CREATE TABLE hers (i int); ALTER TABLE hers OWNER TO writ_`+ls[8].ID+`; CREATE VIEW ours AS SELECT * FROM hers`)
	started := time.Now()
	out, err := g.Unmake(t.Context(), ls)
	if err != nil || time.Since(started) > 3*time.Second {
		t.Fatalf("%v after %v", err, time.Since(started))
	}
	for i, u := range out {
		switch i {
		case 7:
			wantError(t, u.Err, "can't be dropped: role \""+bad+"\" cannot be dropped because some objects depend on it")
			if value[bool](t, g, `SELECT rolcanlogin FROM pg_roles WHERE rolname = $1`, bad) {
				t.Error("it can log in")
			}
		case 8:
			wantError(t, u.Err, "can't be dropped: cannot drop table public.hers because other objects depend on it")
		default:
			if u.Err != nil {
				t.Error(u.Err)
			}
			g.gone(t, ls[i])
		}
	}
	other.sql(t, `DROP SCHEMA `+bad)
	g.sql(t, `DROP VIEW ours`)
	g.unmake(t, ls...)
}

// Where a whole statement fails for one role, each is tried by itself.
func TestPostgresStatementFails(t *testing.T) {
	t.Parallel()
	g := newTarget(t)
	ls := g.leases(5)
	for _, l := range ls {
		g.mint(t, l)
	}
	g.sql(t, `CREATE OR REPLACE FUNCTION writ.remains(p_roles text[]) RETURNS TABLE (role text, problem text) LANGUAGE plpgsql AS $$ BEGIN
		IF 'writ_`+ls[2].ID+`' = ANY (p_roles) THEN RAISE EXCEPTION 'broken'; END IF; END $$`)
	out, err := g.Unmake(t.Context(), ls)
	if err != nil || len(out) != len(ls) {
		t.Fatal(out, err)
	}
	for i, u := range out {
		if i == 2 {
			wantError(t, u.Err, "the target says: broken (SQLSTATE P0001)")
		} else if u.Err != nil {
			t.Error(u.Err)
		}
	}
	// A target that can't be used is one for all.
	g.sql(t, `CREATE OR REPLACE FUNCTION writ.remains(p_roles text[]) RETURNS TABLE (role text, problem text) LANGUAGE plpgsql AS $$ BEGIN
		RAISE EXCEPTION 'shutting down' USING ERRCODE = '57P01'; END $$`)
	if out, err := g.Unmake(t.Context(), ls); err == nil || out != nil {
		t.Errorf("%v, %v", out, err)
	}
}

// Replicas may end the same leases at once, in any order.
func TestPostgresConcurrentUnmake(t *testing.T) {
	t.Parallel()
	g := newTarget(t)
	for range 3 {
		var ls []lease.Lease
		for range 30 {
			l := g.lease(g.ro, g.rw)
			s := g.mint(t, l)
			if len(ls) < 10 {
				login(t, s)
			}
			ls = append(ls, l)
		}
		var all sync.WaitGroup
		for range 4 {
			m := g.open(t, nil)
			order := make([]lease.Lease, len(ls))
			for i, j := range rand.Perm(len(ls)) {
				order[i] = ls[j]
			}
			all.Go(func() {
				out, err := m.Unmake(context.Background(), order)
				if err != nil {
					t.Error(err)
				}
				for _, u := range out {
					if u.Err != nil {
						t.Error(u.Err)
					}
				}
			})
		}
		all.Wait()
		for _, l := range ls {
			g.gone(t, l)
		}
	}
}

func TestPostgresSurveyAndDisarm(t *testing.T) {
	t.Parallel()
	g, other := newTarget(t), newTarget(t) // on one server
	a, b := g.lease(g.ro), g.lease(g.ro)
	session := login(t, g.mint(t, a))
	s := g.mint(t, b)
	theirs := other.lease(other.ro)
	other.mint(t, theirs)
	seen, err := g.Survey(t.Context())
	if err != nil || len(seen) != 2 || seen[0].Lease != a.ID || seen[1].Lease != b.ID || len(seen[1].Uses) != 0 || len(seen[0].Uses) != 1 {
		t.Fatalf("%+v, %v", seen, err)
	}
	if err := g.Disarm(t.Context(), []string{seen[0].Name, seen[1].Name}); err != nil {
		t.Fatal(err)
	}
	if session.Ping(t.Context()) == nil {
		t.Error("the session goes on")
	}
	if _, err := pgx.Connect(t.Context(), s["dsn"]); err == nil {
		t.Error("logged in")
	}
	seen, err = g.Survey(t.Context())
	if err != nil || len(seen) != 2 || seen[0].Armed || seen[1].Armed {
		t.Errorf("%+v, %v", seen, err)
	}
	for _, name := range []string{"postgres", g.bootstrap.Owner, "writ_lea_x", a.ID} {
		wantError(t, g.Disarm(t.Context(), []string{name}), "is not named after a lease")
	}
	// Another Writ's leases are not ours to end.
	wantError(t, g.Disarm(t.Context(), []string{"writ_" + theirs.ID}), "can't be disarmed")
	login(t, other.mint(t, theirs))
	g.unmake(t, a, b)
	other.unmake(t, theirs)
}

func TestPostgresPurge(t *testing.T) {
	t.Parallel()
	g := newTarget(t)
	old, young, alive := g.lease(g.ro), g.lease(g.ro), g.lease(g.ro)
	g.mint(t, alive)
	for _, l := range []lease.Lease{old, young} {
		g.mint(t, l)
		g.unmake(t, l)
	}
	g.sql(t, `UPDATE writ.lease SET ended_at = ended_at - interval '121 min' WHERE role = 'writ_`+old.ID+`'`,
		`UPDATE writ.lease SET ended_at = ended_at - interval '70 min' WHERE role = 'writ_`+young.ID+`'`)
	if n := value[int64](t, g, `SELECT writ.purge(10)`); n != 1 {
		t.Errorf("%d were purged", n)
	}
	wantError(t, g.try(young), "has ended")
}

// Bootstrapping again changes settings and leaves leases alone; an older version is
// brought up.
func TestPostgresBootstrapAgain(t *testing.T) {
	t.Parallel()
	g := newTarget(t)
	l := g.lease(g.ro)
	l.Scope["tenant"] = "acme"
	c := login(t, g.mint(t, l))
	g.sql(t, `CREATE OR REPLACE FUNCTION writ.version() RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 0'; DROP FUNCTION writ.survey()`)
	old := g.open(t, nil)
	_, err := old.Survey(t.Context())
	wantError(t, err, fmt.Sprintf("has version 0 of Writ's functions, expected %d", minter.PostgresVersion))

	g.bootstrap.Groups, g.bootstrap.ConnectionLimit = []string{g.ro}, 1
	g.sql(t, g.bootstrapSQL(t))
	g.sql(t, g.bootstrapSQL(t))
	var n int
	if err := c.QueryRow(t.Context(), `SELECT count(*) FROM orders`).Scan(&n); err != nil || n != 1 {
		t.Errorf("the lease sees %d rows, %v", n, err)
	}
	wantError(t, g.try(g.lease(g.rw)), "a group is not in the list")
	single := g.lease(g.ro)
	s := g.mint(t, single)
	login(t, s)
	if _, err := pgx.Connect(t.Context(), s["dsn"]); err == nil || !strings.Contains(err.Error(), "too many connections") {
		t.Error(err)
	}
	g.unmake(t, l, single)
}

// A session whose role somebody else dropped can't be terminated by us, and is told of
// until it ends.
func TestPostgresGhost(t *testing.T) {
	t.Parallel()
	g := newTarget(t)
	l := g.lease(g.ro)
	c := login(t, g.mint(t, l))
	g.sql(t, `DROP ROLE writ_`+l.ID)
	out, err := g.Unmake(t.Context(), []lease.Lease{l})
	if err != nil {
		t.Fatal(err)
	}
	wantError(t, out[0].Err, fmt.Sprintf("is gone, but its session with the process id %d is not", c.PgConn().PID()))
	denied(t, exec(t, c, `SELECT * FROM orders`), "42501")
	_ = c.Close(t.Context())
	g.unmake(t, l)
}

// Names need not be plain.
func TestPostgresNames(t *testing.T) {
	t.Parallel()
	g := newTarget(t, func(b *minter.Bootstrap) {
		b.Schema, b.Tenants, b.SearchPath = "Writ-2", "required", []string{"Order", "public"}
	})
	m := g.open(t, func(c *minter.PostgresConfig) { c.Schema = "Writ-2" })
	l := g.lease(g.ro)
	l.Scope["tenant"] = "acme's"
	made, err := m.Mint(t.Context(), lease.Order{Lease: l})
	if err != nil {
		t.Fatal(err)
	}
	var path, tenant string
	if err := login(t, made.Secret).QueryRow(t.Context(), `SELECT current_setting('search_path'), "Writ-2".tenant()`).Scan(&path, &tenant); err != nil || path != `"Order", public` || tenant != "acme's" {
		t.Errorf("%s, %s, %v", path, tenant, err)
	}
	if out, err := m.Unmake(t.Context(), []lease.Lease{l}); err != nil || out[0].Err != nil || out[0].Seen["sessions"] != 1 {
		t.Error(out, err)
	}
}

// A crash may take a mint back, but not an end, whatever the administrator set.
func TestPostgresDurability(t *testing.T) {
	t.Parallel()
	g := newTarget(t)
	l := g.lease(g.ro)
	role := "writ_" + l.ID
	for _, set := range []string{"off", "local", "on", "remote_apply"} {
		c, err := pgx.Connect(t.Context(), g.url)
		if err != nil {
			t.Fatal(err)
		}
		call := func(statement string, args ...any) (got string) {
			if err := errors.Join(exec(t, c, `BEGIN`), exec(t, c, `SET LOCAL synchronous_commit = `+set)); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Exec(t.Context(), statement, args...); err != nil {
				t.Fatal(err)
			}
			if err := c.QueryRow(t.Context(), `SHOW synchronous_commit`).Scan(&got); err != nil {
				t.Fatal(err)
			}
			_ = exec(t, c, `ROLLBACK`)
			return got
		}
		want := map[string]string{"off": "on", "local": "on", "on": "on", "remote_apply": "remote_apply"}[set]
		mint := call(`SELECT writ.mint($1, $2, $3, NULL, '1 min', clock_timestamp() + interval '5 s')`, role, aVerifier, []string{g.ro})
		disarm, reap := call(`SELECT writ.disarm(ARRAY[$1])`, role), call(`SELECT writ.reap(ARRAY[$1])`, role)
		if mint != "off" || disarm != want || reap != want {
			t.Errorf("%s: mint commits with %s, disarm with %s, reap with %s", set, mint, disarm, reap)
		}
		_ = c.Close(t.Context())
	}
}

// An agent names another's role in an open transaction, for which it needs no right, and so
// holds a lock on it.
func TestPostgresAgentHoldsAnothersRole(t *testing.T) {
	t.Parallel()
	g := newTarget(t)
	attacker, victim := g.lease(g.ro), g.lease(g.ro)
	a := login(t, g.mint(t, attacker))
	defer func() { _ = a.Close(context.Background()) }()
	g.mint(t, victim)
	for _, statement := range []string{`SET idle_in_transaction_session_timeout = 0`, `BEGIN`, `ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO writ_` + victim.ID} {
		if err := exec(t, a, statement); err != nil {
			t.Fatal(err)
		}
	}
	var err error
	for range 5 { // as the worker does
		out, unmakeErr := g.Unmake(t.Context(), []lease.Lease{victim})
		if err = errors.Join(unmakeErr, out[0].Err); err == nil {
			break
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := exec(t, a, `SELECT 1`); err == nil {
		t.Error("whoever stood in the way goes on")
	}
	g.end(t, []lease.Lease{attacker})
}
