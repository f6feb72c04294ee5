package sqlstore

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/fault"
)

// Tx is one transaction. Its methods serve the interfaces that the domain packages
// declare; each is documented there.
type Tx struct {
	tx     *sql.Tx
	seal   sealer
	now    time.Time
	topics []string
}

// Now is the one time of this transaction.
func (t *Tx) Now() time.Time { return t.now }

// Notify wakes those who watch the topic, after the commit.
func (t *Tx) Notify(topic string) { t.topics = append(t.topics, topic) }

// exec runs a statement and returns how many rows it changed.
func (t *Tx) exec(ctx context.Context, op, query string, args ...any) (int64, error) {
	res, err := t.tx.ExecContext(ctx, query, args...)
	if err != nil {
		return 0, unavailable(op, err)
	}
	n, err := res.RowsAffected()
	return n, unavailable(op, err)
}

// change runs a statement that must change one row; otherwise it returns stale.
func (t *Tx) change(ctx context.Context, stale error, op, query string, args ...any) error {
	n, err := t.exec(ctx, op, query, args...)
	if err == nil && n != 1 {
		return stale
	}
	return err
}

type scanner interface{ Scan(dest ...any) error }

// one reads a single row; no row is fault.NotFound.
func one[T any](ctx context.Context, t *Tx, op string, scan func(scanner) (T, error), query string, args ...any) (T, error) {
	v, err := scan(t.tx.QueryRowContext(ctx, query, args...))
	if errors.Is(err, sql.ErrNoRows) {
		return v, fault.New(fault.NotFound, "no such record")
	}
	return v, unavailable(op, err)
}

// some reads rows.
func some[T any](ctx context.Context, t *Tx, op string, scan func(scanner) (T, error), query string, args ...any) ([]T, error) {
	rows, err := t.tx.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, unavailable(op, err)
	}
	defer rows.Close()
	var out []T
	for rows.Next() {
		v, err := scan(rows)
		if err != nil {
			return nil, unavailable(op, err)
		}
		out = append(out, v)
	}
	return out, unavailable(op, rows.Err())
}

// AppendAudit writes an entry with the transaction's time.
func (t *Tx) AppendAudit(ctx context.Context, e audit.Entry) error {
	_, err := t.exec(ctx, "append audit entry", `
		INSERT INTO audit (at, kind, request_id, user_issuer, user_subject, agent_issuer, agent_subject,
		  operator_issuer, operator_subject, session, decision, approval, lease, detail)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)`,
		micros(t.now), e.Kind, e.RequestID, e.User.Issuer, e.User.ID, e.Agent.Issuer, e.Agent.ID,
		e.Operator.Issuer, e.Operator.ID, e.Session, e.Decision, e.Approval, e.Lease, asJSON(e.Detail))
	return err
}

// Audit lists the entries after seq, oldest first.
func (t *Tx) Audit(ctx context.Context, after int64, limit int) ([]audit.Entry, error) {
	return some(ctx, t, "list audit entries", func(r scanner) (e audit.Entry, err error) {
		err = r.Scan(&e.Seq, timeOf(&e.At), &e.Kind, &e.RequestID, &e.User.Issuer, &e.User.ID, &e.Agent.Issuer, &e.Agent.ID,
			&e.Operator.Issuer, &e.Operator.ID, &e.Session, &e.Decision, &e.Approval, &e.Lease, jsonOf(&e.Detail))
		return e, err
	}, `SELECT seq, at, kind, request_id, user_issuer, user_subject, agent_issuer, agent_subject,
		  operator_issuer, operator_subject, session, decision, approval, lease, detail
		FROM audit WHERE seq > $1 ORDER BY seq LIMIT $2`, after, limit)
}

func micros(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMicro()
}

// scanFunc makes a closure a sql.Scanner.
type scanFunc func(src any) error

func (f scanFunc) Scan(src any) error { return f(src) }

func timeOf(t *time.Time) sql.Scanner {
	return scanFunc(func(src any) error {
		us, ok := src.(int64)
		if !ok {
			return fmt.Errorf("a time is a %T", src)
		}
		*t = time.Time{}
		if us != 0 {
			*t = time.UnixMicro(us).UTC()
		}
		return nil
	})
}

func durationOf(d *time.Duration) sql.Scanner {
	return scanFunc(func(src any) error {
		us, ok := src.(int64)
		if !ok {
			return fmt.Errorf("a duration is a %T", src)
		}
		*d = time.Duration(us) * time.Microsecond
		return nil
	})
}

// jsonOf reads JSON; numbers in free-form parts stay exact.
func jsonOf(v any) sql.Scanner {
	return scanFunc(func(src any) error {
		var text []byte
		switch s := src.(type) {
		case string:
			text = []byte(s)
		case []byte:
			text = s
		default:
			return fmt.Errorf("a JSON text is a %T", src)
		}
		dec := json.NewDecoder(bytes.NewReader(text))
		dec.UseNumber()
		return dec.Decode(v)
	})
}

// sealedOf opens a sealed column into v. The row's id must be scanned before it.
func (t *Tx) sealedOf(v *[]byte, column string, row *string) sql.Scanner {
	return scanFunc(func(src any) (err error) {
		b, ok := src.([]byte)
		if !ok && src != nil {
			return fmt.Errorf("%s of %s: %w", column, *row, errRootKey)
		}
		*v, err = t.seal.open(b, column, *row)
		return err
	})
}

// asJSON writes a value of ours, which always has a JSON form.
func asJSON(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("sqlstore: %T has no JSON form: %v", v, err))
	}
	return string(b)
}
