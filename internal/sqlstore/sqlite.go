package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/gofrs/flock"
	_ "modernc.org/sqlite" // the driver "sqlite"
)

// readers bounds the connections that only read.
const readers = 8

// sqlite is the engine of one machine: one writer, whose turns are shared (see
// batch.go), and a pool of readers beside it.
type sqlite struct {
	store *Store
	path  string
	lock  *flock.Flock // nil for a tool
	now   func() time.Time

	write *sql.DB // one connection
	read  *sql.DB

	mu      sync.Mutex // of the three below
	waiting []*job
	leading bool
	closed  bool

	// For the leader alone:
	conn  *sql.Conn
	stmts map[string]*sql.Stmt
}

func openSQLite(_ context.Context, cfg Config, path string, store *Store) (_ engine, err error) {
	e := &sqlite{store: store, path: path, now: cfg.Now, stmts: map[string]*sql.Stmt{}}
	if e.now == nil {
		e.now = time.Now
	}
	if err := makePrivate(path, cfg.Tool); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = e.Close()
		}
	}()
	if !cfg.Tool {
		e.lock = flock.New(path + ".lock")
		switch locked, err := e.lock.TryLock(); {
		case err != nil:
			return nil, fmt.Errorf("lock: %w", err)
		case !locked:
			return nil, fmt.Errorf("another Writ uses %s", path)
		}
	}
	synchronous := "FULL"
	if cfg.Relaxed {
		synchronous = "NORMAL"
	}
	common := "_pragma=busy_timeout(5000)&_pragma=journal_mode(WAL)&_pragma=foreign_keys(1)&_pragma=synchronous(" + synchronous + ")&"
	if e.write, err = sql.Open("sqlite", sqliteDSN(path, common+"_txlock=immediate")); err != nil {
		return nil, err
	}
	e.write.SetMaxOpenConns(1)
	if e.read, err = sql.Open("sqlite", sqliteDSN(path, common+"_pragma=query_only(1)")); err != nil {
		return nil, err
	}
	e.read.SetMaxOpenConns(readers)
	e.read.SetMaxIdleConns(readers)
	if m := cfg.Metrics; m != nil {
		m.Listening.Set(1) // there is nobody else to listen to
	}
	return e, nil
}

// makePrivate makes what is missing: the database holds personal data, so it is the
// owner's alone from its first byte.
func makePrivate(path string, exists bool) error {
	flags := os.O_RDWR
	if !exists {
		flags |= os.O_CREATE
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
	}
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

func sqliteDSN(path, query string) string {
	u := url.URL{Scheme: "file", Opaque: (&url.URL{Path: path}).EscapedPath()}
	return u.String() + "?" + query
}

// String names the store.
func (e *sqlite) String() string { return e.path }

func (e *sqlite) admin() (*sql.DB, func()) { return e.write, func() {} }

// Now implements engine.
func (e *sqlite) Now() time.Time { return e.now().UTC().Truncate(time.Microsecond) }

// start makes work due that a killed process had taken: the lock says that it is
// gone. A poll still waits for its interval, and a second more, since it was sent
// after its time was recorded.
func (e *sqlite) start(ctx context.Context) error {
	if e.lock == nil {
		return nil
	}
	return e.store.Update(ctx, func(tx *Tx) error {
		_, err := tx.exec(ctx, "recover store", `
			UPDATE approvals SET due_at = CASE state WHEN 'pending' THEN min(polled_at + interval_us + 1000000, expires_at) ELSE 0 END
			WHERE state IN ('requesting', 'redeemed') OR state = 'pending' AND polling = 1`)
		return err
	})
}

func (e *sqlite) begin(ctx context.Context) (querier, time.Time, func(), error) {
	tx, err := e.read.BeginTx(ctx, &sql.TxOptions{ReadOnly: true})
	if err != nil {
		return nil, time.Time{}, nil, err
	}
	return tx, e.Now(), func() { _ = tx.Rollback() }, nil // nothing to lose
}

// busy reports whether the writer is at work; afterwards it takes no more.
func (e *sqlite) busy() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed = true
	return e.leading
}

// Close releases the database.
func (e *sqlite) Close() error {
	var errs []error
	if e.read != nil {
		errs = append(errs, e.read.Close())
	}
	for e.busy() { // a leader goes on to the end of its batch
		time.Sleep(time.Millisecond)
	}
	e.drop()
	if e.write != nil {
		errs = append(errs, e.write.Close())
	}
	if e.lock != nil {
		errs = append(errs, e.lock.Unlock())
	}
	return errors.Join(errs...)
}
