package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/writsec/writ/client"
)

// queryAcme asks for the rows of one tenant. Without a session, Writ opens one.
func queryAcme(session string) client.Request {
	return client.Request{
		Session: session, Intent: client.Intent{Action: "crm.database.query", Purpose: "Summarise the pipeline"},
		Resource: client.Resource{Type: "crm.tenant", ID: "acme"},
	}
}

// role is a credential for the database, and a connection that is open with it.
type role struct {
	lease, name string
	conn        *pgx.Conn
}

func (s *story) login(session string) (*role, error) {
	d, err := s.alice.Decide(s.ctx, queryAcme(session))
	if err != nil {
		return nil, err
	}
	if err := expect(d, client.Allow, "query_database"); err != nil {
		return nil, err
	}
	c := d.Credential
	s.aside(fmt.Sprintf("allow: a login role in the group crm_ro, for tenant acme, that lives %s", time.Until(c.ExpiresAt).Round(time.Second)))
	conn, err := pgx.Connect(s.ctx, c.Secret["dsn"])
	if err != nil {
		return nil, err
	}
	return &role{c.Lease, c.Secret["username"], conn}, nil
}

func (s *story) query() (came string, err error) {
	if s.role, err = s.login(s.sales.ID); err != nil {
		return "", err
	}
	const deals = `SELECT a.name || ', ' || o.stage || ', EUR ' || o.amount FROM crm.opportunities o JOIN crm.accounts a ON a.id = o.account`
	rows, err := list(s.ctx, s.role.conn, deals+` ORDER BY o.id`)
	if err != nil {
		return "", err
	}
	for _, r := range rows {
		s.aside("reads: " + r)
	}
	all, err := list(s.ctx, s.admin, deals)
	if err == nil && (len(rows) != 2 || len(all) != 3) {
		err = fmt.Errorf("the agent sees %d of %d rows, expected 2 of 3", len(rows), len(all))
	}
	return fmt.Sprintf("%d of %d rows: what is not acme's is not there for it", len(rows), len(all)), err
}

func list(ctx context.Context, c *pgx.Conn, query string) ([]string, error) {
	rows, err := c.Query(ctx, query)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

func (s *story) write() (string, error) {
	_, err := s.role.conn.Exec(s.ctx, `UPDATE crm.opportunities SET amount = 1`)
	refused, ok := errors.AsType[*pgconn.PgError](err)
	if !ok || refused.Code != "42501" { // insufficient_privilege
		return "", fmt.Errorf("an UPDATE did not end in a refusal but in: %w", err)
	}
	return "PostgreSQL itself refuses: " + refused.Error(), nil
}

func (s *story) releaseRole() (string, error) {
	since := time.Now()
	if _, err := s.alice.Release(s.ctx, s.role.lease); err != nil {
		return "", err
	}
	return s.gone(s.role, since)
}

// gone waits for the end of a role and of its open connection.
func (s *story) gone(r *role, since time.Time) (string, error) {
	_, err := r.conn.WaitForNotification(s.ctx) // there are none: it reads what the server says last
	_ = r.conn.Close(s.ctx)                     // by the server already
	last, ok := errors.AsType[*pgconn.PgError](err)
	if !ok || last.Code != "57P01" { // admin_shutdown
		return "", fmt.Errorf("the open connection did not end by the server but: %w", err)
	}
	for {
		var there bool
		if err := s.admin.QueryRow(s.ctx, `SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)`, r.name).Scan(&there); err != nil {
			return "", err
		}
		if !there {
			return fmt.Sprintf("%s; the role is gone, %s after the call", last.Error(), time.Since(since).Round(time.Millisecond)), nil
		}
		time.Sleep(5 * time.Millisecond)
	}
}
