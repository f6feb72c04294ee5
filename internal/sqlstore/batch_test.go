package sqlstore

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/session"
	"github.com/writsec/writ/internal/telemetry"
)

// hold keeps the writer busy until let go, so that what comes meanwhile is one batch.
func (f *fixture) hold() (release func()) {
	held, free := make(chan struct{}), make(chan struct{})
	var g sync.WaitGroup
	g.Go(func() {
		f.in(func(*Tx) error {
			close(held)
			<-free
			return nil
		})
	})
	<-held
	return func() { close(free); g.Wait() }
}

// queued waits until n updates wait for the writer.
func (f *fixture) queued(n int) {
	e := f.engine.(*sqlite)
	for {
		e.mu.Lock()
		got := len(e.waiting)
		e.mu.Unlock()
		if got >= n {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// In one batch some succeed, some fail, one panics and one's caller leaves: each gets
// its own end, and only what succeeded stays.
func TestBatchKeepsEachApart(t *testing.T) {
	f := newSQLite(t)
	f.metrics = telemetry.NewMetrics()
	release := f.hold()
	boom := errors.New("boom")
	gone, leave := context.WithCancel(f.ctx)
	var g sync.WaitGroup
	var mu sync.Mutex
	ends := map[string]int{}
	end := func(what string) {
		mu.Lock()
		defer mu.Unlock()
		ends[what]++
	}
	write := func(tx *Tx, kind string) error { return audit.Append(f.ctx, tx, audit.Entry{Kind: audit.Kind(kind)}) }
	for i := range 12 {
		g.Go(func() {
			defer func() {
				if v := recover(); v != nil {
					end(fmt.Sprint("panic ", v))
				}
			}()
			ctx := f.ctx
			if i == 7 {
				ctx = gone
			}
			err := f.Update(ctx, func(tx *Tx) error {
				switch i {
				case 3, 4:
					return errors.Join(write(tx, "lost"), boom)
				case 5:
					_ = write(tx, "lost")
					panic("bug")
				case 7:
					return write(tx, "lost")
				}
				return write(tx, "kept")
			})
			switch {
			case err == nil:
				end("ok")
			case errors.Is(err, boom):
				end("boom")
			case errors.Is(err, context.Canceled):
				end("left")
			default:
				end(err.Error())
			}
		})
	}
	f.queued(12)
	leave()
	for { // until the one that left is out of the queue's way
		mu.Lock()
		n := ends["left"]
		mu.Unlock()
		if n == 1 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	release()
	g.Wait()
	same(t, map[string]int{"ok": 8, "boom": 2, "panic bug": 1, "left": 1}, ends)
	kinds := map[audit.Kind]int{}
	for _, e := range must(f, func(tx *Tx) ([]audit.Entry, error) { return tx.Unsequenced(f.ctx, 100) }) {
		kinds[e.Kind]++
	}
	same(t, map[audit.Kind]int{"kept": 8}, kinds)
	// And the writer is free.
	f.in(func(tx *Tx) error { return write(tx, "after") })
}

// A failure of the database undoes the whole batch; then each is tried alone, so that
// one that can't be done takes no other with it.
func TestBatchAfterAFailureOfTheDatabase(t *testing.T) {
	f := newSQLite(t)
	if err := f.raw().Exec(`CREATE TRIGGER fail BEFORE INSERT ON audit WHEN NEW.kind = 'bad' BEGIN SELECT RAISE(ROLLBACK, 'no'); END`); err != nil {
		t.Fatal(err)
	}
	release := f.hold()
	var g sync.WaitGroup
	var runs sync.Map
	for i := range 10 {
		g.Go(func() {
			n := 0
			err := f.Update(f.ctx, func(tx *Tx) error {
				n++
				kind := audit.Kind("good")
				if i == 4 {
					kind = "bad"
				}
				return audit.Append(f.ctx, tx, audit.Entry{Kind: kind})
			})
			runs.Store(i, n)
			if (err != nil) != (i == 4) || err != nil && !fault.Is(err, fault.Unavailable) {
				t.Errorf("%d: %v", i, err)
			}
		})
	}
	f.queued(10)
	release()
	g.Wait()
	if es := must(f, func(tx *Tx) ([]audit.Entry, error) { return tx.Unsequenced(f.ctx, 100) }); len(es) != 9 {
		t.Errorf("%d stayed, want 9", len(es))
	}
	if n, _ := runs.Load(4); n != 2 {
		t.Errorf("the bad one ran %v times", n)
	}
}

func TestWaitingCallersLeave(t *testing.T) {
	f := newSQLite(t)
	release := f.hold()
	var g sync.WaitGroup
	for i := range 50 {
		g.Go(func() {
			ctx, cancel := context.WithTimeout(f.ctx, time.Duration(i%5)*time.Millisecond)
			defer cancel()
			err := f.Update(ctx, func(*Tx) error { return nil })
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%v", err)
			}
		})
	}
	g.Wait() // while the writer is held
	release()
	f.in(func(*Tx) error { return nil })
}

// Callers that leave at any moment never block the others, nor leave half a step.
func TestLeavingRaces(t *testing.T) {
	f := newSQLite(t)
	s := f.session()
	var g sync.WaitGroup
	var mu sync.Mutex
	done := int64(0)
	for range 8 {
		g.Go(func() {
			for i := range 60 {
				ctx, cancel := context.WithTimeout(f.ctx, time.Duration(i%7)*300*time.Microsecond)
				err := f.Update(ctx, func(tx *Tx) error {
					got, err := tx.Session(ctx, s.ID)
					if err != nil {
						return err
					}
					return session.Settle(ctx, tx, got, session.Settings{Window: time.Hour}, session.Settlement{Marks: session.Marks{Counters: map[string]int64{"n": 1}}})
				})
				cancel()
				if err == nil {
					mu.Lock()
					done++
					mu.Unlock()
				} else if !errors.Is(err, context.DeadlineExceeded) {
					t.Error(err)
				}
			}
		})
	}
	g.Wait()
	got := must(f, func(tx *Tx) (session.Session, error) { return tx.Session(f.ctx, s.ID) })
	if got.Counters["n"] != done {
		t.Errorf("%d were told that it is done, %d are", done, got.Counters["n"])
	}
}
