package sqlstore

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/writsec/writ/internal/approval"
	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/minter"
	"github.com/writsec/writ/internal/session"
)

func (f *fixture) log() audit.LogStore { return For[audit.LogTx](f.Store) }

func (f *fixture) sequence() {
	f.t.Helper()
	s := &audit.Sequencer{Store: f.log(), Logger: quiet}
	for more := true; more; {
		var err error
		if more, err = s.Step(f.ctx); err != nil {
			f.t.Fatal(err)
		}
	}
}

func (f *fixture) append(n int) {
	f.t.Helper()
	f.in(func(tx *Tx) error {
		for i := range n {
			e := audit.Entry{Kind: audit.SessionOpened, User: alice, Agent: bot, Session: fmt.Sprint("ses_", i%3), Detail: map[string]any{"n": i}}
			if err := audit.Append(f.ctx, tx, e); err != nil {
				return err
			}
		}
		return nil
	})
}

// wantWhole recomputes the tree from the entries and holds it to the checkpoint.
func (f *fixture) wantWhole() (head audit.Head, entries []audit.Sequenced) {
	f.t.Helper()
	vkeys := []string{}
	keys, err := f.ListKeys(f.ctx)
	if err != nil {
		f.t.Fatal(err)
	}
	for _, k := range keys {
		if k.Purpose == CheckpointKey {
			vkeys = append(vkeys, k.ID)
		}
	}
	err = f.View(f.ctx, func(tx *Tx) (err error) {
		if head, err = audit.HeadOf(f.ctx, tx); err != nil {
			return err
		}
		entries, err = tx.LogEntries(f.ctx, audit.Query{Limit: 100_000})
		return err
	})
	if err != nil {
		f.t.Fatal(err)
	}
	var stored []tlog.Hash
	read := tlog.HashReaderFunc(func(is []int64) (out []tlog.Hash, err error) {
		for _, i := range is {
			out = append(out, stored[i])
		}
		return out, nil
	})
	for i, e := range entries {
		if e.Index != int64(i) {
			f.t.Fatalf("entry %d has index %d", i, e.Index)
		}
		hs, err := tlog.StoredHashes(int64(i), e.Record, read)
		if err != nil {
			f.t.Fatal(err)
		}
		stored = append(stored, hs...)
	}
	c, err := audit.OpenCheckpoint(head.Checkpoint, vkeys...)
	if err != nil {
		f.t.Fatal(err)
	}
	root, err := tlog.TreeHash(int64(len(entries)), read)
	if err != nil || c.Root != root || c.Size != int64(len(entries)) || c.Size != head.Size || c.Origin != head.Origin {
		f.t.Errorf("checkpoint %+v, want %d entries with root %v (%v)", c, len(entries), root, err)
	}
	return head, entries
}

func TestLogGrows(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		for range 2 { // the second time there is one already
			if err := audit.OpenLog(f.ctx, f.log(), "writ.example"); err != nil {
				t.Fatal(err)
			}
		}
		head, entries := f.wantWhole()
		if len(entries) != 0 || !strings.HasPrefix(head.Origin, "writ.example/audit/") {
			t.Errorf("an empty log: %+v", head)
		}
		total := 1
		for _, n := range []int{0, 1, 1, 254, 300, 7} { // over the edges of tiles and batches
			f.append(n)
			f.sequence()
			total += n
			if _, entries := f.wantWhole(); len(entries) != total {
				t.Fatalf("%d entries, want %d", len(entries), total)
			}
		}
		_, entries = f.wantWhole()
		if e, err := audit.ParseRecord(entries[0].Record); err != nil || e.Kind != audit.LogOpened || !e.At.Equal(noon) {
			t.Errorf("the first entry is %+v (%v)", e, err)
		}
		if e, err := audit.ParseRecord(entries[3].Record); err != nil || e.User != alice || e.Agent != bot || e.Session == "" {
			t.Errorf("an entry is %+v (%v)", e, err)
		}
		left := must(f, func(tx *Tx) (Load, error) { return tx.Load(f.ctx) })
		same(t, Load{}, left)

		list := func(q audit.Query) (n int) {
			if q.Limit == 0 {
				q.Limit = 1000
			}
			return len(must(f, func(tx *Tx) ([]audit.Sequenced, error) { return tx.LogEntries(f.ctx, q) }))
		}
		for _, c := range []struct {
			q    audit.Query
			want int
		}{
			{audit.Query{Limit: 7}, 7}, {audit.Query{From: int64(total) - 2}, 2}, {audit.Query{From: 5, To: 9}, 4},
			{audit.Query{Kind: audit.LogOpened}, 1}, {audit.Query{User: alice}, total - 1}, {audit.Query{User: bot}, 0},
			{audit.Query{Agent: bot, Kind: audit.LogOpened}, 0}, {audit.Query{Session: "ses_1", User: alice}, list(audit.Query{Session: "ses_1"})},
			{audit.Query{Decision: "dec_x"}, 0}, {audit.Query{User: identity.Ref{Issuer: "https://other.example", ID: "alice"}}, 0},
		} {
			if got := list(c.q); got != c.want {
				t.Errorf("%+v lists %d, want %d", c.q, got, c.want)
			}
		}

		// What is pruned leaves its hashes: the proofs of the rest go on.
		f.in(func(tx *Tx) error { _, err := tx.PruneLog(f.ctx, 200); return err })
		f.append(3)
		f.sequence()
		err := f.View(f.ctx, func(tx *Tx) error {
			if _, err := audit.Prove(f.ctx, tx, 199); !fault.Is(err, fault.NotFound) {
				t.Errorf("an entry that is gone: %v", err)
			}
			p, err := audit.Prove(f.ctx, tx, 300)
			if err != nil {
				return err
			}
			_, err = p.Verify(f.verifiers()...)
			return err
		})
		if err != nil {
			t.Error(err)
		}
	})
}

func (f *fixture) verifiers() (out []string) {
	f.t.Helper()
	keys, err := f.ListKeys(f.ctx)
	if err != nil {
		f.t.Fatal(err)
	}
	for _, k := range keys {
		if k.Purpose == CheckpointKey {
			out = append(out, k.ID)
		}
	}
	return out
}

// Several replicas append and sequence at once; nothing is lost, nothing twice.
func TestSequencersShareTheWork(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		if err := audit.OpenLog(f.ctx, f.log(), "h"); err != nil {
			t.Fatal(err)
		}
		done := make(chan error)
		const writers, each = 4, 60
		ctx, stop := context.WithCancel(f.ctx)
		for range writers {
			go func() {
				var err error
				for i := 0; i < each && err == nil; i++ {
					err = f.Update(f.ctx, func(tx *Tx) error {
						return audit.Append(f.ctx, tx, audit.Entry{Kind: audit.SessionOpened, Detail: map[string]any{"i": i}})
					})
				}
				done <- err
			}()
			go func() {
				s := &audit.Sequencer{Store: f.log(), Logger: quiet}
				var err error
				for ctx.Err() == nil && err == nil {
					_, err = s.Step(f.ctx)
				}
				done <- err
			}()
		}
		for i := range 2 * writers {
			if i == writers {
				stop()
			}
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		}
		stop()
		f.sequence()
		if _, entries := f.wantWhole(); len(entries) != writers*each+1 {
			t.Errorf("%d entries", len(entries))
		}
	})
}

func TestRestore(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		if err := audit.OpenLog(f.ctx, f.log(), "writ.example"); err != nil {
			t.Fatal(err)
		}
		s := f.session()
		a, l := f.approval(s, "h"), f.lease(s, noon.Add(time.Hour))
		yes := f.approval(s, "h2")
		yes.State, yes.AuthReqID, yes.Answer = approval.Approved, "secret", []byte("secret")
		f.in(func(tx *Tx) error {
			if err := tx.PutReplay(f.ctx, bot, "k", dr("d", "dec"), ""); err != nil {
				return err
			}
			return tx.UpdateApproval(f.ctx, &yes)
		})
		f.append(5)
		f.sequence()
		before, _ := f.wantWhole()

		for name, outside := range map[string]string{
			"the same":    before.Checkpoint,
			"another log": strings.Replace(before.Checkpoint, before.Origin, "other.example/audit/1", 1),
		} {
			if why, err := audit.Behind(f.ctx, f.log(), outside); why != "" || err != nil {
				t.Errorf("%s: %q, %v", name, why, err)
			}
		}
		size := fmt.Sprintf("\n%d\n", before.Size)
		for name, c := range map[string]struct{ outside, want string }{
			"longer":    {strings.Replace(before.Checkpoint, size, fmt.Sprintf("\n%d\n", before.Size+7), 1), "only"},
			"rewritten": {strings.Replace(before.Checkpoint, size, fmt.Sprintf("\n%d\n", before.Size-1), 1), "not those"},
		} {
			if why, err := audit.Behind(f.ctx, f.log(), c.outside); !strings.Contains(why, c.want) || err != nil {
				t.Errorf("%s: %q, %v", name, why, err)
			}
		}

		f.clock.Add(time.Minute)
		for range 2 { // two replicas find it out; one acts
			if err := audit.Restore(f.ctx, For[audit.RestoreTx](f.Store), "writ.example", before.Origin, "outside", "test"); err != nil {
				t.Fatal(err)
			}
		}
		f.sequence()
		after, entries := f.wantWhole()
		last, err := audit.ParseRecord(entries[len(entries)-1].Record)
		if err != nil || last.Kind != audit.LogRestored || last.Detail["outside_checkpoint"] != "outside" || last.Detail["previous_origin"] != before.Origin ||
			fmt.Sprintf("%v %v %v", last.Detail["leases"], last.Detail["approvals"], last.Detail["sessions"]) != "1 2 1" {
			t.Errorf("the last entry is %+v (%v)", last, err)
		}
		if after.Origin == before.Origin || after.Size != before.Size+1 {
			t.Errorf("went on as %s with %d entries", after.Origin, after.Size)
		}
		got := must(f, func(tx *Tx) (session.Session, error) { return tx.Session(f.ctx, s.ID) })
		if got.EndReason != "restored" || got.Version != 2 {
			t.Errorf("session %+v", got)
		}
		for _, id := range []string{a.ID, yes.ID} {
			got := must(f, func(tx *Tx) (approval.Approval, error) { return tx.Approval(f.ctx, id) })
			if got.State != approval.Cancelled || got.AuthReqID != "" || got.Answer != nil {
				t.Errorf("approval %+v", got)
			}
		}
		if got := must(f, func(tx *Tx) (lease.Lease, error) { return tx.Lease(f.ctx, l.ID) }); got.State != lease.Revoked || got.EndReason != "restored" {
			t.Errorf("lease %+v", got)
		}
		if _, found, _ := replayOf(f, "k"); found {
			t.Error("an idempotency key is remembered")
		}
	})
}

func replayOf(f *fixture, key string) (digest string, found bool, err error) {
	err = f.View(f.ctx, func(tx *Tx) error {
		r, ok, err := tx.Replay(f.ctx, bot, key)
		digest, found = r.Digest, ok
		return err
	})
	return digest, found, err
}

func TestInputs(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		in := audit.Input{Decision: "dec_1", Kept: audit.KeepRedacted, JSON: []byte(`{"user":{"id":"ü"}}`)}
		f.in(func(tx *Tx) error { return tx.PutInput(f.ctx, in) })
		same(t, in, must(f, func(tx *Tx) (audit.Input, error) { return tx.Input(f.ctx, "dec_1") }))
		if _, err := read(f, func(tx *Tx) (audit.Input, error) { return tx.Input(f.ctx, "dec_2") }); !fault.Is(err, fault.NotFound) {
			t.Error(err)
		}
		forget := func(before time.Time) (n int64) {
			f.in(func(tx *Tx) (err error) { n, err = tx.ForgetInputs(f.ctx, before, 10); return err })
			return n
		}
		if n := forget(noon); n != 0 {
			t.Errorf("%d forgotten before their time", n)
		}
		if n := forget(noon.Add(time.Second)); n != 1 {
			t.Errorf("%d forgotten", n)
		}
	})
}

func TestForgetSessions(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		old, busy, young := f.session(), f.session(), f.session()
		l := f.lease(old, noon.Add(time.Hour))
		f.lease(busy, noon.Add(time.Hour))
		a := f.approval(old, "h")
		f.in(func(tx *Tx) error {
			if _, err := tx.EndLeases(f.ctx, lease.Selection{ID: l.ID}, lease.End{Reason: "released"}, 1); err != nil {
				return err
			}
			if err := approval.Close(f.ctx, tx, &a, approval.Cancelled, ""); err != nil {
				return err
			}
			for _, s := range []session.Session{old, busy} {
				if err := session.End(f.ctx, tx, s, session.Cause{Reason: "over"}); err != nil {
					return err
				}
			}
			return nil
		})
		f.clock.Add(time.Hour)
		f.in(func(tx *Tx) error { return session.End(f.ctx, tx, young, session.Cause{Reason: "over"}) })
		var n int64
		f.in(func(tx *Tx) (err error) {
			n, err = tx.ForgetSessions(f.ctx, noon.Add(time.Minute), 10)
			return err
		})
		if n != 1 {
			t.Errorf("%d forgotten, want one: another has a lease, the third is young", n)
		}
		for id, want := range map[string]bool{old.ID: false, busy.ID: true, young.ID: true} {
			_, err := read(f, func(tx *Tx) (session.Session, error) { return tx.Session(f.ctx, id) })
			if fault.Is(err, fault.NotFound) == want {
				t.Errorf("session kept: %v, want %v", !want, want)
			}
		}
		if _, err := read(f, func(tx *Tx) (lease.Lease, error) { return tx.Lease(f.ctx, l.ID) }); !fault.Is(err, fault.NotFound) {
			t.Errorf("its lease stayed: %v", err)
		}
	})
}

// dying is a transaction whose process ends at the call named.
type dying struct {
	audit.LogTx
	at string
}

var errDied = errors.New("died")

func (d dying) Sequence(ctx context.Context, es []audit.Sequenced) error {
	return d.then("sequence", d.LogTx.Sequence(ctx, es))
}

func (d dying) PutTile(ctx context.Context, level int, n int64, data []byte) error {
	return d.then("tile", d.LogTx.PutTile(ctx, level, n, data))
}

func (d dying) PutHead(ctx context.Context, h audit.Head) error {
	return d.then("head", d.LogTx.PutHead(ctx, h))
}

func (d dying) then(at string, err error) error {
	if err == nil && at == d.at {
		return errDied
	}
	return err
}

type dyingStore struct {
	audit.LogStore
	at string
}

func (d dyingStore) Update(ctx context.Context, f func(audit.LogTx) error) error {
	return d.LogStore.Update(ctx, func(tx audit.LogTx) error { return f(dying{tx, d.at}) })
}

// A sequencer that dies in the middle leaves what was there before it.
func TestSequencingIsAllOrNothing(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		if err := audit.OpenLog(f.ctx, f.log(), "h"); err != nil {
			t.Fatal(err)
		}
		f.append(3)
		for _, at := range []string{"sequence", "tile", "head"} {
			if _, err := (&audit.Sequencer{Store: dyingStore{f.log(), at}, Logger: quiet}).Step(f.ctx); !errors.Is(err, errDied) {
				t.Fatalf("%s: %v", at, err)
			}
			if head, entries := f.wantWhole(); len(entries) != 0 || head.Size != 0 {
				t.Errorf("%s: %d entries stayed", at, len(entries))
			}
		}
		f.sequence()
		if _, entries := f.wantWhole(); len(entries) != 4 {
			t.Errorf("%d entries", len(entries))
		}
	})
}

// No row can hold up the log, however long the names in it.
func TestOddRowsAreSequenced(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		if err := audit.OpenLog(f.ctx, f.log(), "h"); err != nil {
			t.Fatal(err)
		}
		long := make([]byte, 9000)
		for i := range long {
			long[i] = byte('a' + (i*i*7+i)%26)
		}
		who := identity.Ref{Issuer: "https://idp.example", ID: string(long)}
		f.in(func(tx *Tx) error {
			return audit.Append(f.ctx, tx, audit.Entry{Kind: audit.OperatorRevoked, User: who, Agent: who, Session: string(long), Decision: string(long)})
		})
		f.append(2)
		f.sequence()
		f.wantWhole()
		es := must(f, func(tx *Tx) ([]audit.Sequenced, error) {
			return tx.LogEntries(f.ctx, audit.Query{User: who, Agent: who, Session: string(long), Limit: 10})
		})
		if len(es) != 1 {
			t.Errorf("%d found", len(es))
		}
	})
}

// A store that is put back under a Writ that runs, by a failover that lost commits,
// say: whoever saw more notices, and revives nothing.
func TestStoreThatGoesBack(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		if err := audit.OpenLog(f.ctx, f.log(), "h"); err != nil {
			t.Fatal(err)
		}
		f.append(3)
		var seen []string
		s := &audit.Sequencer{Store: f.log(), Logger: quiet, WentBack: func(ctx context.Context, seenHead audit.Head, why string) error {
			seen = append(seen, why)
			return audit.Restore(ctx, For[audit.RestoreTx](f.Store), "h", seenHead.Origin, seenHead.Checkpoint, why)
		}}
		step := func(want int) {
			t.Helper()
			for more := true; more; {
				var err error
				if more, err = s.Step(f.ctx); err != nil {
					t.Fatal(err)
				}
			}
			if len(seen) != want {
				t.Fatalf("noticed %q, want %d", seen, want)
			}
		}
		step(0)
		old := must(f, func(tx *Tx) (audit.Head, error) { return audit.HeadOf(f.ctx, tx) })
		tile := must(f, func(tx *Tx) ([]byte, error) { return tx.Tile(f.ctx, 0, 0) })
		f.append(4)
		step(0)
		putBack := func() { // the store as it was at old
			f.in(func(tx *Tx) error {
				for _, q := range []string{`DELETE FROM log_entries WHERE seq >= 4`, `DELETE FROM audit`} {
					if _, err := tx.exec(f.ctx, "x", q); err != nil {
						return err
					}
				}
				if err := tx.PutTile(f.ctx, 0, 0, tile); err != nil {
					return err
				}
				return tx.PutHead(f.ctx, old)
			})
		}
		keys, err := minter.LoadKeys(f.ctx, f.Store, minter.Rotation{Algorithm: "ES256"})
		if err != nil {
			t.Fatal(err)
		}
		before := keys.Signer()
		l := f.lease(f.session(), noon.Add(time.Hour))
		putBack()
		step(1)
		if !strings.Contains(seen[0], "only 4") {
			t.Errorf("noticed %q", seen)
		}
		if got := must(f, func(tx *Tx) (lease.Lease, error) { return tx.Lease(f.ctx, l.ID) }); got.State != lease.Revoked {
			t.Error("a lease of a store that went back lives")
		}
		if err := keys.Refresh(f.ctx); err != nil || keys.Signer() == before || len(keys.JWKS().Keys) != 1 {
			t.Errorf("the signing keys of the backup are believed (%v)", err)
		}
		f.append(5)
		step(1)
		f.wantWhole()
	})
}
