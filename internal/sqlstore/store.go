// Package sqlstore keeps Writ's state in SQL. All of a step's writes, and its
// audit entries, are one transaction; time is the transaction's; and values that
// could be used against anyone are encrypted before they reach a column.
package sqlstore

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/gofrs/flock"
	"github.com/pressly/goose/v3"
	_ "modernc.org/sqlite" // the driver "sqlite"

	"github.com/writsec/writ/internal/fault"
)

//go:embed migrations/sqlite/*.sql
var migrations embed.FS

// Config opens a Store.
type Config struct {
	// Path of the SQLite database. It and its folder are made if they don't exist.
	Path string
	Root RootKey
	// Now is the clock of this store's transactions.
	Now    func() time.Time
	Logger *slog.Logger
}

// Store is the state of one Writ.
type Store struct {
	write *sql.DB // one connection: SQLite has one writer
	read  *sql.DB
	lock  *flock.Flock
	seal  sealer
	now   func() time.Time
	hub   *hub
}

// readers bounds the connections that only read.
const readers = 8

// Open opens the database, brings its schema up to date and makes sure that the
// root key is the one it was written under.
func Open(ctx context.Context, cfg Config) (_ *Store, err error) {
	seal, err := newSealer(cfg.Root)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(cfg.Path), 0o700); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	// The database holds personal data: it is the owner's alone from its first byte.
	f, err := os.OpenFile(cfg.Path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if err := f.Close(); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	s := &Store{seal: seal, now: cfg.Now, hub: newHub(), lock: flock.New(cfg.Path + ".lock")}
	defer func() {
		if err != nil {
			_ = s.Close()
		}
	}()
	switch locked, err := s.lock.TryLock(); {
	case err != nil:
		return nil, fmt.Errorf("open store: lock: %w", err)
	case !locked:
		return nil, fmt.Errorf("open store: another Writ uses %s", cfg.Path)
	}
	if s.write, err = sql.Open("sqlite", dsn(cfg.Path, "_txlock=immediate")); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	s.write.SetMaxOpenConns(1)
	if s.read, err = sql.Open("sqlite", dsn(cfg.Path, "_pragma=query_only(1)")); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	s.read.SetMaxOpenConns(readers)
	if err := migrate(ctx, s.write, cfg.Logger); err != nil {
		return nil, err
	}
	if err := s.checkRootKey(ctx); err != nil {
		return nil, fmt.Errorf("open store %s: %w", cfg.Path, err)
	}
	return s, s.recover(ctx)
}

func dsn(path, extra string) string {
	u := url.URL{Scheme: "file", Opaque: (&url.URL{Path: path}).EscapedPath()}
	return u.String() + "?_pragma=busy_timeout(5000)&_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)&_pragma=foreign_keys(1)&" + extra
}

func migrate(ctx context.Context, db *sql.DB, log *slog.Logger) error {
	files, err := fs.Sub(migrations, "migrations/sqlite")
	if err != nil {
		return fmt.Errorf("migrate store: %w", err)
	}
	p, err := goose.NewProvider(goose.DialectSQLite3, db, files, goose.WithSlog(log))
	if err != nil {
		return fmt.Errorf("migrate store: %w", err)
	}
	if _, err := p.Up(ctx); err != nil {
		return fmt.Errorf("migrate store: %w", err)
	}
	return nil
}

// recover makes work due that a killed process had taken: the lock says that it is
// gone. A poll still waits for its interval, and a second more, since it was sent
// after its time was recorded.
func (s *Store) recover(ctx context.Context) error {
	_, err := s.write.ExecContext(ctx, `
		UPDATE approvals SET due_at = CASE state WHEN 'pending' THEN min(polled_at + interval_us + 1000000, expires_at) ELSE 0 END
		WHERE state IN ('requesting', 'redeemed') OR state = 'pending' AND polling = 1`)
	if err != nil {
		return fmt.Errorf("recover store: %w", err)
	}
	return nil
}

// Close releases the database.
func (s *Store) Close() error {
	var errs []error
	if s.read != nil {
		errs = append(errs, s.read.Close())
	}
	if s.write != nil {
		errs = append(errs, s.write.Close())
	}
	return errors.Join(append(errs, s.lock.Unlock())...)
}

// Ping reports whether the store can be read.
func (s *Store) Ping(ctx context.Context) error {
	return unavailable("ping", s.read.PingContext(ctx))
}

// Update runs f in a transaction that is committed if f returns nil. Then those who
// watch a topic that f notified are woken.
func (s *Store) Update(ctx context.Context, f func(*Tx) error) error {
	tx, err := s.write.BeginTx(ctx, nil)
	if err != nil {
		return unavailable("begin", err)
	}
	// After a commit it does nothing; after a panic it gives the one writer back.
	defer func() { _ = tx.Rollback() }()
	t := &Tx{tx: tx, seal: s.seal, now: s.time()}
	if err := f(t); err != nil {
		return err
	}
	if err := tx.Commit(); err != nil {
		return unavailable("commit", err)
	}
	s.hub.wake(t.topics)
	return nil
}

// View runs f in a transaction that sees one state and changes nothing.
func (s *Store) View(ctx context.Context, f func(*Tx) error) error {
	tx, err := s.read.BeginTx(ctx, &sql.TxOptions{ReadOnly: true})
	if err != nil {
		return unavailable("begin", err)
	}
	defer func() { _ = tx.Rollback() }() // nothing to lose
	return f(&Tx{tx: tx, seal: s.seal, now: s.time()})
}

// Watch returns a channel that receives after each commit that notified the topic,
// until stop is called.
func (s *Store) Watch(topic string) (wake <-chan struct{}, stop func()) { return s.hub.watch(topic) }

func (s *Store) time() time.Time { return s.now().UTC().Truncate(time.Microsecond) }

// For narrows a Store to the transactions that one package asks for. It panics if
// *Tx is not a T, which the first test finds.
func For[T any](s *Store) Narrow[T] {
	_ = any((*Tx)(nil)).(T)
	return Narrow[T]{s}
}

// Narrow is a Store whose transactions are seen as T.
type Narrow[T any] struct{ *Store }

// Update is Store.Update.
func (n Narrow[T]) Update(ctx context.Context, f func(T) error) error {
	return n.Store.Update(ctx, func(tx *Tx) error { return f(any(tx).(T)) })
}

// View is Store.View.
func (n Narrow[T]) View(ctx context.Context, f func(T) error) error {
	return n.Store.View(ctx, func(tx *Tx) error { return f(any(tx).(T)) })
}

// unavailable marks an error of the database as such, for the caller to retry. A
// value that doesn't open won't open later either.
func unavailable(op string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded), errors.Is(err, errRootKey):
		return fmt.Errorf("%s: %w", op, err)
	}
	return fault.Wrap(fault.Unavailable, fmt.Errorf("%s: %w", op, err), "the store cannot be used right now")
}
