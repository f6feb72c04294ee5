package sqlstore

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
)

const (
	defaultConnections = 16
	urgentConnections  = 4                // besides
	connectTimeout     = 5 * time.Second  // to the server, and for one of the connections to be free
	statementTimeout   = 10 * time.Second // one statement, waiting for a lock included; the server ends it
	idleTimeout        = 5 * time.Second  // between two statements of a transaction; less than others wait for it
	maxAttempts        = 10               // of a transaction that the server told to begin again
	minVersion         = 160000           // server_version_num
)

// postgres is the engine of several replicas.
type postgres struct {
	store  *Store
	config *pgx.ConnConfig
	db     *sql.DB
	urgent *sql.DB          // of what must not wait for the others
	fixed  func() time.Time // tests set the clock
	log    *slog.Logger
	clock  atomic.Pointer[reading]

	stop     context.CancelFunc // of the listener
	listener sync.WaitGroup
}

// reading is one look at the server's clock. Between two looks the monotonic clock
// of this machine goes on, whatever its wall clock is set to.
type reading struct{ server, local time.Time }

func openPostgres(ctx context.Context, cfg Config, store *Store) (engine, error) {
	c, err := pgx.ParseConfig(cfg.URL)
	if err != nil {
		return nil, errors.New("the URL is not one of PostgreSQL") // its text may hold a password
	}
	if cfg.Password != "" {
		c.Password = cfg.Password
	}
	c.ConnectTimeout = connectTimeout
	if c.ValidateConnect == nil { // a standby could only refuse; of several hosts, find the one that writes
		c.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
	}
	for name, value := range map[string]string{
		"application_name":                    "writ",
		"timezone":                            "UTC",
		"statement_timeout":                   strconv.FormatInt(statementTimeout.Milliseconds(), 10),
		"idle_in_transaction_session_timeout": strconv.FormatInt(idleTimeout.Milliseconds(), 10),
	} {
		if _, set := c.RuntimeParams[name]; !set {
			c.RuntimeParams[name] = value
		}
	}
	dialer := &net.Dialer{Timeout: connectTimeout, KeepAliveConfig: net.KeepAliveConfig{
		Enable: true, Idle: 10 * time.Second, Interval: 5 * time.Second, Count: 3,
	}}
	c.DialFunc = dialer.DialContext
	e := &postgres{store: store, config: c, db: stdlib.OpenDB(*c), urgent: stdlib.OpenDB(*c), fixed: cfg.Now, log: cfg.Logger, stop: func() {}}
	n := cfg.Connections
	if n == 0 {
		n = defaultConnections
	}
	for db, n := range map[*sql.DB]int{e.db: n, e.urgent: urgentConnections} {
		db.SetMaxOpenConns(n)
		db.SetMaxIdleConns(n)
		db.SetConnMaxIdleTime(5 * time.Minute)
		db.SetConnMaxLifetime(time.Hour) // so that a failover is followed in the end, whatever the network hides
	}
	if err := e.checkVersion(ctx); err != nil {
		return nil, errors.Join(err, e.db.Close(), e.urgent.Close())
	}
	if !cfg.Tool {
		return e, nil
	}
	e.log = nil // a tool is over before it could miss a message
	return e, nil
}

func (e *postgres) checkVersion(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	var n int
	if err := e.db.QueryRowContext(ctx, `SELECT current_setting('server_version_num')::int`).Scan(&n); err != nil {
		return fmt.Errorf("connect to %s: %w", e, err)
	}
	if n < minVersion {
		return fmt.Errorf("%s is PostgreSQL %d; Writ needs 16 or later", e, n/10000)
	}
	t, _, err := e.tx(ctx, "BEGIN")
	if err != nil {
		return err
	}
	t.end()
	return nil
}

// String names the store, without its secrets.
func (e *postgres) String() string {
	return fmt.Sprintf("postgres://%s/%s", net.JoinHostPort(e.config.Host, strconv.Itoa(int(e.config.Port))), e.config.Database)
}

// admin has connections whose statements may take as long as an index on a large
// table does, but which don't queue before others for a lock.
func (e *postgres) admin() (*sql.DB, func()) {
	c := e.config.Copy()
	c.RuntimeParams["statement_timeout"], c.RuntimeParams["idle_in_transaction_session_timeout"] = "0", "0"
	c.RuntimeParams["lock_timeout"] = "5000"
	db := stdlib.OpenDB(*c)
	return db, func() { _ = db.Close() }
}

// Now implements engine: the server's clock, as of the last transaction and the
// time since.
func (e *postgres) Now() time.Time {
	if e.fixed != nil {
		return e.fixed().UTC().Truncate(time.Microsecond)
	}
	r := e.clock.Load()
	return r.server.Add(time.Since(r.local)).Truncate(time.Microsecond)
}

// clockQuery is in microseconds since 1970.
const clockQuery = `SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint`

// conn waits for a free connection, but not for ever.
func (e *postgres) conn(ctx context.Context) (*sql.Conn, error) {
	wait, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	db := e.db
	if ctx.Value(urgent{}) != nil {
		db = e.urgent
	}
	return db.Conn(wait)
}

// pgTx is a transaction on a connection of its own. It speaks to the server below
// database/sql where that saves a round trip: many transactions are little else.
type pgTx struct {
	*sql.Conn
	over bool
}

// raw runs f on the connection.
func (t *pgTx) raw(f func(*pgx.Conn) error) error {
	return t.Raw(func(driver any) error { return f(driver.(*stdlib.Conn).Conn()) })
}

// tx starts a transaction and reads the clock in the same breath.
func (e *postgres) tx(ctx context.Context, begin string) (_ *pgTx, now time.Time, err error) {
	c, err := e.conn(ctx)
	if err != nil {
		return nil, now, err
	}
	t := &pgTx{Conn: c}
	bound, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	start := time.Now()
	var us int64
	err = t.raw(func(c *pgx.Conn) error {
		results, err := c.PgConn().Exec(bound, begin+"; "+clockQuery).ReadAll()
		if err != nil {
			return err
		}
		us, err = strconv.ParseInt(string(results[len(results)-1].Rows[0][0]), 10, 64)
		return err
	})
	if err != nil {
		t.end()
		return nil, now, err
	}
	now = time.UnixMicro(us).UTC()
	e.clock.Store(&reading{server: now, local: start.Add(time.Since(start) / 2)})
	if e.fixed != nil {
		now = e.Now()
	}
	return t, now, nil
}

// end rolls back what was not committed and gives the connection back, or up.
func (t *pgTx) end() {
	if !t.over {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		_ = t.Raw(func(c any) error {
			if _, err := c.(*stdlib.Conn).Conn().PgConn().Exec(ctx, "ROLLBACK").ReadAll(); err != nil {
				return driver.ErrBadConn
			}
			return nil
		})
	}
	_ = t.Close()
}

// send runs statements in one round trip, and with them the commit.
func (t *pgTx) send(ctx context.Context, statements []statement, commit bool) (op string, err error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	var batch pgx.Batch
	for _, s := range statements {
		batch.Queue(s.query, s.args...)
	}
	if commit {
		batch.Queue("COMMIT")
	}
	return op, t.raw(func(c *pgx.Conn) error {
		results := c.SendBatch(ctx, &batch)
		for _, s := range statements {
			if _, err := results.Exec(); err != nil {
				op = s.op
				return errors.Join(err, results.Close())
			}
		}
		op = "commit"
		if commit {
			tag, err := results.Exec()
			if err == nil && tag.String() != "COMMIT" { // of what had failed before
				err = pgx.ErrTxCommitRollback
			}
			if err != nil {
				return errors.Join(err, results.Close())
			}
			t.over = true
		}
		return results.Close()
	})
}

func (e *postgres) begin(ctx context.Context) (querier, time.Time, func(), error) {
	t, now, err := e.tx(ctx, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
	if err != nil {
		return nil, now, nil, err
	}
	return t, now, t.end, nil
}

// update implements engine. Concurrent transactions share the server's commits by
// themselves.
func (e *postgres) update(ctx context.Context, f func(*Tx) error) error {
	for attempt := 1; ; attempt++ {
		err := e.once(ctx, f)
		pg, ok := errors.AsType[*pgconn.PgError](err)
		again := ok && (pg.Code == "40001" || pg.Code == "40P01") // serialization_failure, deadlock_detected
		if !again || attempt == maxAttempts {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(rand.N(time.Duration(attempt) * 10 * time.Millisecond)): //nolint:gosec // jitter
		}
	}
}

func (e *postgres) once(ctx context.Context, f func(*Tx) error) error {
	tx, now, err := e.tx(ctx, "BEGIN")
	if err != nil {
		return unavailable(ctx, "begin", err)
	}
	defer tx.end() // after a panic too
	t := &Tx{q: tx, dialect: e.store.dialect, seal: e.store.seal, now: now, write: true, pipe: tx.send, fixed: e.fixed != nil}
	if err := f(t); err != nil {
		return err
	}
	if len(t.topics) > 0 {
		t.waiting = append(t.waiting, statement{"notify", e.store.notify, []any{t.topics}})
	}
	if err := t.flush(ctx, true); err != nil {
		return err
	}
	e.store.hub.wake(t.topics)
	return nil
}

// start begins to listen, and returns once it does or has failed to for the first
// time.
func (e *postgres) start(ctx context.Context) error {
	if e.log == nil {
		return nil
	}
	listening, stop := context.WithCancel(context.WithoutCancel(ctx))
	e.stop = stop
	tried := make(chan struct{})
	e.listener.Go(func() { e.listen(listening, sync.OnceFunc(func() { close(tried) })) })
	select {
	case <-tried:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

const (
	pollEvery = time.Second     // while there is no listener
	pingEvery = 5 * time.Second // to notice that it is dead
)

// listen wakes watchers when other replicas commit. While the connection is lost it
// wakes them all every second, so that they look for themselves.
func (e *postgres) listen(ctx context.Context, tried func()) {
	defer tried()
	for first := true; ctx.Err() == nil; first = false {
		err := e.hear(ctx, func() {
			if first { // nobody can wait yet
				tried()
				return
			}
			e.store.hub.wakeAll() // what was sent meanwhile is lost
		})
		tried()
		if ctx.Err() != nil {
			return
		}
		if m := e.store.metrics; m != nil {
			m.Listening.Set(0)
		}
		e.log.WarnContext(ctx, "not listening to the store; polling", "error", err)
		e.store.hub.wakeAll()
		select {
		case <-ctx.Done():
		case <-time.After(pollEvery/2 + rand.N(pollEvery/2)): //nolint:gosec // jitter
		}
	}
}

func (e *postgres) hear(ctx context.Context, listening func()) error {
	dial, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	c, err := pgx.ConnectConfig(dial, e.config.Copy())
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer func() {
		bye, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = c.Close(bye)
	}()
	if _, err := c.Exec(dial, "LISTEN "+channel); err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	if m := e.store.metrics; m != nil {
		m.Listening.Set(1)
	}
	listening()
	for {
		wait, cancel := context.WithTimeout(ctx, pingEvery)
		n, err := c.WaitForNotification(wait)
		quiet := wait.Err() != nil
		cancel()
		switch {
		case err == nil:
			e.store.hub.wake([]string{n.Payload})
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case !quiet || c.IsClosed():
			return fmt.Errorf("wait: %w", err)
		default:
			ping, cancel := context.WithTimeout(ctx, connectTimeout)
			err := c.Ping(ping)
			cancel()
			if err != nil {
				return fmt.Errorf("ping: %w", err)
			}
		}
	}
}

// Close releases the database.
func (e *postgres) Close() error {
	e.stop()
	e.listener.Wait()
	return errors.Join(e.db.Close(), e.urgent.Close())
}
