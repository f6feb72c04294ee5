package minter_test

import (
	"context"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/writsec/writ/internal/lease"
)

func TestPostgresLife(t *testing.T) {
	t.Parallel()
	g := newTarget(t)
	l := g.lease(g.ro)
	l.Scope["tenant"] = "acme"
	s := g.mint(t, l)
	c := login(t, s)
	var user, path string
	var rows, id int
	if err := c.QueryRow(t.Context(), `SELECT session_user, current_setting('search_path'), (SELECT count(*) FROM orders), (SELECT max(id) FROM orders)`).Scan(&user, &path, &rows, &id); err != nil {
		t.Fatal(err)
	}
	if user != "writ_"+l.ID || user != s["username"] || path != "public" || rows != 1 || id != 1 {
		t.Errorf("%s sees %d rows up to %d by %s", user, rows, id, path)
	}
	for _, attempt := range []string{
		`INSERT INTO notes VALUES (1)`, `CREATE TABLE x (i int)`, `CREATE TEMP TABLE x (i int)`, `SELECT lo_create(0)`, `SELECT lo_from_bytea(0, 'x')`,
		`SELECT * FROM writ.lease`, `SELECT writ.survey()`, `SELECT writ.inherit(session_user)`, `SET ROLE ` + g.ro, `SET ROLE ` + g.bootstrap.Owner,
		`SET SESSION AUTHORIZATION ` + g.bootstrap.Owner, `GRANT ` + g.ro + ` TO ` + g.bootstrap.Account, `COPY orders TO PROGRAM 'cat'`,
	} {
		denied(t, exec(t, c, attempt), "42501")
	}
	if err := exec(t, c, `SET app.tenant = 'umbrella'`); err != nil {
		t.Error(err)
	}
	if err := c.QueryRow(t.Context(), `SELECT count(*) FROM orders WHERE tenant = 'umbrella'`).Scan(&rows); err != nil || rows != 0 {
		t.Errorf("another tenant's: %d, %v", rows, err)
	}
	seen, err := g.Survey(t.Context())
	if err != nil || len(seen) != 1 || seen[0].Lease != l.ID || !seen[0].Armed || len(seen[0].Uses) != 1 || seen[0].Uses[0].From != "127.0.0.1" || time.Since(seen[0].Uses[0].Since) > time.Minute {
		t.Errorf("survey: %+v, %v", seen, err)
	}

	out := g.unmake(t, l)
	if out[0].Seen["role"] != user || out[0].Seen["sessions"] != 1 {
		t.Errorf("seen: %v", out[0].Seen)
	}
	if err := c.Ping(t.Context()); err == nil {
		t.Error("the session goes on")
	}
	if _, err := pgx.Connect(t.Context(), s["dsn"]); err == nil {
		t.Error("logged in afterwards")
	}
	g.unmake(t, l) // again
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	_, err = g.Mint(ctx, lease.Order{Lease: l})
	wantError(t, err, "the lease has ended")
	g.gone(t, l)
}
