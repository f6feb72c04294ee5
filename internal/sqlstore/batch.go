package sqlstore

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"slices"

	"github.com/writsec/writ/internal/fault"
)

// maxBatch bounds how many updates share a commit, so that none waits long for
// strangers.
const maxBatch = 64

// job is one update that waits for its turn.
type job struct {
	ctx   context.Context
	run   func(*Tx) error
	err   error
	panic any
	tx    *Tx
	done  chan struct{} // closed once err stands
	lead  chan struct{} // receives when it is this one's turn to lead

	taken, gone bool // under sqlite.mu; gone: its caller left before it was taken
}

// update implements engine. A commit waits for the disk, so concurrent updates
// share one: whoever finds the writer free leads, takes what waits by then, runs it
// in one transaction, each behind a savepoint of its own, and commits for all.
func (e *sqlite) update(ctx context.Context, f func(*Tx) error) error {
	j := &job{ctx: ctx, run: f, done: make(chan struct{}), lead: make(chan struct{}, 1)}
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return unavailable(ctx, "begin", errors.New("the store is closed"))
	}
	e.waiting = append(e.waiting, j)
	lead := !e.leading
	e.leading = true
	e.mu.Unlock()
	if !lead {
		select {
		case <-j.done:
		case <-j.lead:
			lead = true
		case <-ctx.Done():
			if e.leave(j) {
				return fmt.Errorf("begin: %w", context.Cause(ctx))
			}
			select {
			case <-j.done:
			case <-j.lead:
				lead = true
			}
		}
	}
	if lead {
		e.take()
		e.passOn()
		<-j.done // it was in the batch, or is the first of the next
	}
	if j.panic != nil {
		panic(j.panic)
	}
	return j.err
}

// leave takes back a job that nobody has taken yet.
func (e *sqlite) leave(j *job) bool {
	e.mu.Lock()
	j.gone = !j.taken
	if j.gone {
		e.waiting = slices.DeleteFunc(e.waiting, func(w *job) bool { return w == j })
	}
	e.mu.Unlock()
	if j.gone {
		select {
		case <-j.lead: // chosen in the same moment
			e.passOn()
		default:
		}
	}
	return j.gone
}

// passOn lets the first that still waits lead, or frees the writer.
func (e *sqlite) passOn() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.waiting) > 0 {
		e.waiting[0].lead <- struct{}{}
		return
	}
	e.leading = false
}

// take runs one batch.
func (e *sqlite) take() {
	e.mu.Lock()
	n := min(len(e.waiting), maxBatch)
	batch := slices.Clone(e.waiting[:n])
	for _, j := range batch {
		j.taken = true
	}
	e.waiting = append([]*job(nil), e.waiting[n:]...)
	e.mu.Unlock()
	if m := e.store.metrics; m != nil && len(batch) > 0 {
		m.BatchSize.Observe(float64(len(batch)))
	}

	// A failure of the database may have undone the work of others too: what shared a
	// transaction with it runs again, alone.
	if len(batch) > 1 && !e.runAll(batch) {
		for _, j := range batch {
			e.runAll([]*job{j})
		}
	} else if len(batch) == 1 {
		e.runAll(batch)
	}
	for _, j := range batch {
		if j.err == nil && j.panic == nil {
			e.store.hub.wake(j.tx.topics)
		}
		close(j.done)
	}
}

// runAll runs jobs in one transaction and sets what came of each. It reports false,
// with nothing committed, where the database failed.
func (e *sqlite) runAll(batch []*job) bool {
	fail := func(err error) bool {
		for _, j := range batch {
			j.err, j.panic = unavailable(j.ctx, "commit", err), nil
		}
		return false
	}
	if err := e.connect(); err != nil {
		return fail(err)
	}
	// The statements run under no caller's context: one that leaves must not undo what
	// the others did.
	if err := e.exec("BEGIN IMMEDIATE"); err != nil {
		e.drop()
		return fail(err)
	}
	kept := 0
	for _, j := range batch {
		j.err, j.panic = nil, nil
		if len(batch) > 1 {
			if err := e.exec("SAVEPOINT job"); err != nil {
				e.abort()
				return fail(err)
			}
		}
		e.run(j)
		if j.err == nil && j.panic == nil {
			kept++
			continue
		}
		if fault.Is(j.err, fault.Unavailable) {
			e.abort()
			if len(batch) > 1 {
				return fail(j.err)
			}
			return false
		}
		if len(batch) > 1 {
			if err := errors.Join(e.exec("ROLLBACK TO job"), e.exec("RELEASE job")); err != nil {
				e.abort()
				return fail(err)
			}
		}
	}
	if kept == 0 {
		e.abort()
		return true
	}
	if err := e.exec("COMMIT"); err != nil {
		e.abort()
		return fail(err)
	}
	return true
}

// run runs one job in the open transaction.
func (e *sqlite) run(j *job) {
	defer func() { j.panic = recover() }()
	j.tx = &Tx{q: e, dialect: e.store.dialect, seal: e.store.seal, now: e.Now(), write: true}
	j.err = j.run(j.tx)
	if err := context.Cause(j.ctx); j.err == nil && err != nil {
		j.err = fmt.Errorf("commit: %w", err) // nobody waits for it any more
	}
}

// connect opens the writer's connection. SQLite would open what it can't write to
// read it, and go on to do only that when it could be written again.
func (e *sqlite) connect() (err error) {
	if e.conn != nil {
		return nil
	}
	if err := writable(e.path); err != nil {
		return err
	}
	e.conn, err = e.write.Conn(context.Background())
	return err
}

func (e *sqlite) exec(query string) error {
	_, err := e.ExecContext(context.Background(), query)
	return err
}

// abort ends the transaction without a trace. A connection that can't do even that
// is given up.
func (e *sqlite) abort() {
	if e.exec("ROLLBACK") != nil {
		e.drop()
	}
}

// drop gives the connection up, and with it whatever was open on it.
func (e *sqlite) drop() {
	for _, s := range e.stmts {
		_ = s.Close()
	}
	clear(e.stmts)
	if e.conn != nil {
		_ = e.conn.Raw(func(any) error { return driver.ErrBadConn })
		_ = e.conn.Close()
		e.conn = nil
	}
}

// prepare returns a statement that stays prepared on the connection.
func (e *sqlite) prepare(query string) (*sql.Stmt, error) {
	if s, ok := e.stmts[query]; ok {
		return s, nil
	}
	s, err := e.conn.PrepareContext(context.Background(), query)
	if err == nil {
		e.stmts[query] = s
	}
	return s, err
}

// ExecContext implements querier.
func (e *sqlite) ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error) {
	s, err := e.prepare(query) //nolint:sqlclosecheck // it stays for the next; drop closes it
	if err != nil {
		return nil, err
	}
	return s.ExecContext(context.WithoutCancel(ctx), args...)
}

// QueryContext implements querier.
func (e *sqlite) QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error) {
	s, err := e.prepare(query) //nolint:sqlclosecheck // as above
	if err != nil {
		return nil, err
	}
	return s.QueryContext(context.WithoutCancel(ctx), args...)
}
