package sqlstore

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"time"

	"github.com/writsec/writ/internal/fault"
)

// Tx is one transaction. Its methods serve the interfaces that the domain packages
// declare; each is documented there.
type Tx struct {
	q querier
	*dialect
	seal   *sealer
	now    time.Time
	write  bool
	topics []string
	// guarded says that the transaction shares the lock of all.
	guarded bool
	fixed   bool // tests set the clock

	// pipe sends statements, and the commit, in one round trip; nil where there is no
	// way to go. waiting is what has not been sent yet.
	pipe    func(ctx context.Context, statements []statement, commit bool) (op string, err error)
	waiting []statement
}

// statement is one whose result nobody waits for.
type statement struct {
	op, query string
	args      []any
}

// querier runs statements.
type querier interface {
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

// answerTimeout ends a statement whose server is not there to end it.
const answerTimeout = statementTimeout + 2*time.Second

// kept is the suffix of a SELECT that, in an Update, keeps what it reads as it is.
func (t *Tx) kept() string {
	if t.write {
		return t.lock
	}
	return ""
}

// claimed is the suffix of a SELECT that, in an Update, takes rows that nobody else
// is at.
func (t *Tx) claimed() string {
	if t.write {
		return t.claim
	}
	return ""
}

// alone waits until no other transaction holds the named lock, and holds it until
// the commit.
func (t *Tx) alone(ctx context.Context, name string) error {
	if !t.write || t.mutex == "" {
		return nil
	}
	_, err := t.exec(ctx, "wait for "+name, t.mutex, name)
	return err
}

// Guard implements lease.Tx: it keeps out, until the commit, those who hold all.
func (t *Tx) Guard(ctx context.Context) error {
	if t.guarded || !t.write || t.shareAll == "" {
		return nil
	}
	t.guarded = true
	_, err := t.exec(ctx, "share all", t.shareAll)
	return err
}

// HoldAll waits for those who share the lock of all, keeps new ones out until the
// commit, and returns the time from when on it does.
func (t *Tx) HoldAll(ctx context.Context) (time.Time, error) {
	if t.holdAll == "" {
		return t.now, nil
	}
	if _, err := t.exec(ctx, "hold all", t.holdAll); err != nil {
		return time.Time{}, err
	}
	if t.fixed {
		return t.now, nil
	}
	return one(ctx, t, "read clock", func(r scanner) (at time.Time, err error) { return at, r.Scan(timeOf(&at)) }, clockQuery)
}

// Now is the one time of this transaction.
func (t *Tx) Now() time.Time { return t.now }

// Notify wakes those who watch the topic, after the commit.
func (t *Tx) Notify(topic string) { t.topics = append(t.topics, topic) }

// insert runs a statement of which only a failure matters, at the latest with the
// commit.
func (t *Tx) insert(ctx context.Context, op, query string, args ...any) error {
	if t.pipe == nil {
		_, err := t.exec(ctx, op, query, args...)
		return err
	}
	t.waiting = append(t.waiting, statement{op, query, args})
	return nil
}

// flush sends what waits.
func (t *Tx) flush(ctx context.Context, commit bool) error {
	if len(t.waiting) == 0 && !commit {
		return nil
	}
	waiting := t.waiting
	t.waiting = nil
	op, err := t.pipe(ctx, waiting, commit)
	return unavailable(ctx, op, err)
}

// exec runs a statement and returns how many rows it changed.
func (t *Tx) exec(ctx context.Context, op, query string, args ...any) (int64, error) {
	if err := t.flush(ctx, false); err != nil {
		return 0, err
	}
	bound, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	res, err := t.q.ExecContext(bound, query, args...)
	if err != nil {
		return 0, unavailable(ctx, op, err)
	}
	n, err := res.RowsAffected()
	return n, unavailable(ctx, op, err)
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
func one[T any](ctx context.Context, t *Tx, op string, scan func(scanner) (T, error), query string, args ...any) (v T, err error) {
	all, err := some(ctx, t, op, scan, query, args...)
	if err == nil && len(all) == 0 {
		err = fault.New(fault.NotFound, "no such record")
	}
	if err != nil {
		return v, err
	}
	return all[0], nil
}

// some reads rows.
func some[T any](ctx context.Context, t *Tx, op string, scan func(scanner) (T, error), query string, args ...any) ([]T, error) {
	if err := t.flush(ctx, false); err != nil {
		return nil, err
	}
	bound, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	rows, err := t.q.QueryContext(bound, query, args...)
	if err != nil {
		return nil, unavailable(ctx, op, err)
	}
	defer rows.Close()
	var out []T
	for rows.Next() {
		v, err := scan(rows)
		if err != nil {
			return nil, unavailable(ctx, op, err)
		}
		out = append(out, v)
	}
	return out, unavailable(ctx, op, rows.Err())
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

// asJSON writes a value of ours, which always has a JSON form.
func asJSON(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("sqlstore: %T has no JSON form: %v", v, err))
	}
	return string(b)
}
