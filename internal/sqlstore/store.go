// Package sqlstore keeps Writ's state in SQL: in SQLite on one machine, in
// PostgreSQL for several replicas, by the same statements. All of a step's writes,
// and its audit entries, are one transaction; time is the transaction's; and values
// that could be used against anyone are encrypted before they reach a column.
package sqlstore

import (
	"context"
	"database/sql"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"strings"
	"time"

	"github.com/pressly/goose/v3"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/telemetry"
)

//go:embed migrations/*.sql
var migrations embed.FS

// Config opens a Store.
type Config struct {
	// URL is sqlite:PATH, whose file and folder are made if they don't exist, or
	// postgres://….
	URL string
	// Password of the PostgreSQL role; "" where the server wants none.
	Password string
	Root     RootKey
	// Relaxed commits to SQLite without waiting for the disk: they survive a killed
	// process, not a power loss.
	Relaxed bool
	// Connections bounds those to PostgreSQL; 0 is the default, 16.
	Connections int
	// Tool opens the store beside a running Writ, for one command: nothing is
	// migrated and no work taken over.
	Tool bool
	// Now is the clock of the transactions. nil: the process's clock for SQLite, the
	// server's for PostgreSQL.
	Now     func() time.Time
	Metrics *telemetry.Metrics // nil: none
	Logger  *slog.Logger
}

// Store is the state of one Writ, or of all replicas that share a database.
type Store struct {
	engine
	*dialect
	seal    *sealer
	hub     *hub
	metrics *telemetry.Metrics
}

// engine is what differs between the databases beyond the text of a statement.
type engine interface {
	// update runs f in a transaction and commits if it returns nil. f may run again.
	update(ctx context.Context, f func(*Tx) error) error
	// begin starts a transaction that only reads one state.
	begin(ctx context.Context) (q querier, now time.Time, end func(), err error)
	// Now is the store's clock: the one that transactions have.
	Now() time.Time
	// admin is for migrations, before the first transaction; done closes it.
	admin() (db *sql.DB, done func())
	// start begins the engine's own work.
	start(ctx context.Context) error
	Close() error
	fmt.Stringer // without secrets
}

// Open opens the database, brings its schema up to date and makes sure that the
// root key is the one it was written under.
func Open(ctx context.Context, cfg Config) (_ *Store, err error) {
	s := &Store{hub: newHub(), metrics: cfg.Metrics}
	defer func() {
		if err != nil && s.engine != nil {
			_ = s.Close()
		}
	}()
	if path, ok := strings.CutPrefix(cfg.URL, "sqlite:"); ok {
		s.dialect = &sqliteDialect
		s.engine, err = openSQLite(ctx, cfg, path, s)
	} else {
		s.dialect = &postgresDialect
		s.engine, err = openPostgres(ctx, cfg, s)
	}
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if err := s.migrate(ctx, cfg); err != nil {
		return nil, err
	}
	if s.seal, err = s.unlock(ctx, cfg.Root); err != nil {
		return nil, fmt.Errorf("open store %s: %w", s.engine, err)
	}
	return s, s.start(ctx)
}

// migrate brings the schema up to date; of replicas that start at once one does it,
// while the others wait. A tool changes nothing.
func (s *Store) migrate(ctx context.Context, cfg Config) error {
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return fmt.Errorf("migrate store: %w", err)
	}
	db, done := s.admin()
	defer done()
	p, err := s.gooseProvider(db, translated{files, s.types}, cfg.Logger)
	if err != nil {
		return fmt.Errorf("migrate store: %w", err)
	}
	if cfg.Tool {
		pending, err := p.HasPending(ctx)
		if err == nil && pending {
			err = errors.New("its schema is of an older version: start writ serve of this version once")
		}
		if err != nil {
			return fmt.Errorf("open store: %w", err)
		}
		return nil
	}
	if _, err := p.Up(ctx); err != nil {
		return fmt.Errorf("migrate store: %w", err)
	}
	return nil
}

func (s *Store) gooseProvider(db *sql.DB, files fs.FS, log *slog.Logger) (*goose.Provider, error) {
	options := []goose.ProviderOption{goose.WithSlog(log)}
	if s.locker != nil {
		locker, err := s.locker()
		if err != nil {
			return nil, err
		}
		options = append(options, goose.WithSessionLocker(locker))
	}
	return goose.NewProvider(s.goose, db, files, options...)
}

// translated shows the migrations with the column types of a dialect.
type translated struct {
	fs.FS
	types *strings.Replacer
}

// Open implements fs.FS.
func (t translated) Open(name string) (fs.File, error) {
	f, err := t.FS.Open(name)
	if err != nil || !strings.HasSuffix(name, ".sql") {
		return f, err
	}
	text, err := io.ReadAll(f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return translatedFile{f, strings.NewReader(t.types.Replace(string(text)))}, nil
}

type translatedFile struct {
	fs.File
	text io.Reader
}

// Read implements fs.File.
func (f translatedFile) Read(p []byte) (int, error) { return f.text.Read(p) }

// Ping reports whether the store can be written, by writing something that does not
// stay: a full disk can still be read.
func (s *Store) Ping(ctx context.Context) error {
	key := hex.EncodeToString(newSecret())
	return s.Update(ctx, func(tx *Tx) error {
		if err := tx.insert(ctx, "ping", `INSERT INTO replays (agent_issuer, agent_subject, key, digest, decision, at)
			VALUES ('', '', $1, '', '', $2)`, key, micros(tx.now)); err != nil {
			return err
		}
		_, err := tx.exec(ctx, "ping", `DELETE FROM replays WHERE agent_issuer = '' AND agent_subject = '' AND key = $1`, key)
		return err
	})
}

// Update runs f in a transaction that is committed if f returns nil. Then those who
// watch a topic that f notified are woken, on every replica. What one Update reads
// by id, or claims as due, stays as read until its end. f may run more than once,
// and must not use the store otherwise.
func (s *Store) Update(ctx context.Context, f func(*Tx) error) error {
	if err := context.Cause(ctx); err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	ctx, end := s.observe(ctx, "update")
	err := s.update(ctx, f)
	end(err)
	return err
}

// View runs f in a transaction that sees one state and changes nothing.
func (s *Store) View(ctx context.Context, f func(*Tx) error) (err error) {
	ctx, observed := s.observe(ctx, "view")
	defer func() { observed(err) }()
	q, now, end, err := s.begin(ctx)
	if err != nil {
		return unavailable(ctx, "begin", err)
	}
	defer end()
	return f(&Tx{q: q, dialect: s.dialect, seal: s.seal, now: now})
}

// observe measures a transaction and gives it a span.
func (s *Store) observe(ctx context.Context, kind string) (context.Context, func(error)) {
	ctx, span := telemetry.Start(ctx, "store "+kind)
	if s.metrics == nil {
		return ctx, func(err error) { telemetry.End(span, err) }
	}
	start := time.Now()
	return ctx, func(err error) {
		result := "ok"
		if fault.Is(err, fault.Unavailable) {
			result = "unavailable"
		}
		s.metrics.Transactions.WithLabelValues(kind, result).Observe(time.Since(start).Seconds())
		telemetry.End(span, err)
	}
}

// Watch returns a channel that receives after each commit, on any replica, that
// notified the topic, until stop is called. It may receive without cause.
func (s *Store) Watch(topic string) (wake <-chan struct{}, stop func()) { return s.hub.watch(topic) }

// For narrows a Store to the transactions that one package asks for. It panics if
// *Tx is not a T, which the first test finds.
func For[T any](s *Store) Narrow[T] {
	_ = any((*Tx)(nil)).(T)
	return Narrow[T]{Store: s}
}

// Narrow is a Store whose transactions are seen as T.
type Narrow[T any] struct {
	*Store
	urgent bool
}

// Urgent is for what must get through a flood of other updates: it has connections of its
// own.
func (n Narrow[T]) Urgent() Narrow[T] {
	n.urgent = true
	return n
}

// urgent marks the contexts of such updates.
type urgent struct{}

// Update is Store.Update.
func (n Narrow[T]) Update(ctx context.Context, f func(T) error) error {
	if n.urgent {
		ctx = context.WithValue(ctx, urgent{}, true)
	}
	return n.Store.Update(ctx, func(tx *Tx) error { return f(any(tx).(T)) })
}

// View is Store.View.
func (n Narrow[T]) View(ctx context.Context, f func(T) error) error {
	return n.Store.View(ctx, func(tx *Tx) error { return f(any(tx).(T)) })
}

// unavailable marks an error of the database as such, for the caller to retry. A
// caller that left is no fault of the database's, and a value that doesn't open
// won't open later either.
func unavailable(ctx context.Context, op string, err error) error {
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("%s: %w", op, errors.Join(context.Cause(ctx), err))
	case errors.Is(err, errRootKey):
		return fmt.Errorf("%s: %w", op, err)
	}
	if _, marked := errors.AsType[*fault.Error](err); marked {
		return err
	}
	return fault.Wrap(fault.Unavailable, fmt.Errorf("%s: %w", op, err), "the store cannot be used right now")
}
