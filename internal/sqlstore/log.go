package sqlstore

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/lease"
)

// AppendAudit implements audit.Tx.
func (t *Tx) AppendAudit(ctx context.Context, e audit.Entry) error {
	return t.insert(ctx, "append audit entry", `
		INSERT INTO audit (at, kind, request_id, trace_id, user_issuer, user_subject, agent_issuer, agent_subject,
		  operator_issuer, operator_subject, session, decision, approval, lease, detail)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)`,
		micros(t.now), e.Kind, e.RequestID, e.TraceID, e.User.Issuer, e.User.ID, e.Agent.Issuer, e.Agent.ID,
		e.Operator.Issuer, e.Operator.ID, e.Session, e.Decision, e.Approval, e.Lease, asJSON(e.Detail))
}

// Unsequenced implements audit.LogTx.
func (t *Tx) Unsequenced(ctx context.Context, limit int) ([]audit.Entry, error) {
	return some(ctx, t, "list audit entries", func(r scanner) (e audit.Entry, err error) {
		err = r.Scan(&e.Seq, timeOf(&e.At), &e.Kind, &e.RequestID, &e.TraceID, &e.User.Issuer, &e.User.ID, &e.Agent.Issuer, &e.Agent.ID,
			&e.Operator.Issuer, &e.Operator.ID, &e.Session, &e.Decision, &e.Approval, &e.Lease, jsonOf(&e.Detail))
		return e, err
	}, `SELECT seq, at, kind, request_id, trace_id, user_issuer, user_subject, agent_issuer, agent_subject,
		  operator_issuer, operator_subject, session, decision, approval, lease, detail
		FROM audit ORDER BY seq LIMIT $1`, limit)
}

// Load is how much is under way, on all replicas.
type Load struct {
	OpenApprovals, Unsequenced, Freezes int
	Leases                              []LeaseLoad
	Orphans                             map[string]int // by minter
}

// LeaseLoad counts the leases of a minter that are in a state.
type LeaseLoad struct {
	Minter       string
	State        lease.State
	Count, Stuck int
}

// Load counts what is under way.
func (t *Tx) Load(ctx context.Context) (Load, error) {
	l, err := one(ctx, t, "count load", func(r scanner) (l Load, err error) {
		return l, r.Scan(&l.OpenApprovals, &l.Freezes, &l.Unsequenced)
	}, `SELECT (SELECT count(*) FROM approvals WHERE state IN `+openStates+`),
		(SELECT count(*) FROM revocations WHERE active = 1 AND frozen = 1), (SELECT count(*) FROM audit)`)
	if err != nil {
		return l, err
	}
	l.Leases, err = some(ctx, t, "count leases", func(r scanner) (c LeaseLoad, err error) {
		return c, r.Scan(&c.Minter, &c.State, &c.Count, &c.Stuck)
	}, `SELECT minter, state, count(*), count(CASE WHEN `+fmt.Sprintf(stuck, 1)+` THEN 1 END) FROM leases WHERE gone_at = 0 AND state <> 'revoked' GROUP BY minter, state`,
		micros(t.now.Add(-lease.StuckAfter)))
	if err != nil {
		return l, err
	}
	orphans, err := t.Orphans(ctx, "")
	for _, o := range orphans {
		if l.Orphans == nil {
			l.Orphans = map[string]int{}
		}
		l.Orphans[o.Minter]++
	}
	return l, err
}

// SequenceLag is how long the oldest entry has waited for the log.
func (t *Tx) SequenceLag(ctx context.Context) (time.Duration, error) {
	oldest, waits, err := found(one(ctx, t, "read oldest audit entry", func(r scanner) (at time.Time, err error) { return at, r.Scan(timeOf(&at)) },
		`SELECT at FROM audit ORDER BY seq LIMIT 1`))
	if err != nil || !waits {
		return 0, err
	}
	return t.now.Sub(oldest), nil
}

const headColumns = `origin, size, checkpoint, at, pruned`

func scanHead(r scanner) (h audit.Head, err error) {
	err = r.Scan(&h.Origin, &h.Size, &h.Checkpoint, timeOf(&h.At), &h.Pruned)
	return h, err
}

// LockHead implements audit.LogTx.
func (t *Tx) LockHead(ctx context.Context) (audit.Head, bool, error) {
	return found(one(ctx, t, "lock log head", scanHead, `SELECT `+headColumns+` FROM log_head`+t.claimed()))
}

// Head implements audit.LogTx.
func (t *Tx) Head(ctx context.Context) (audit.Head, bool, error) {
	if err := t.alone(ctx, "log head"); err != nil { // where there is none, there is no row to lock
		return audit.Head{}, false, err
	}
	return found(one(ctx, t, "read log head", scanHead, `SELECT `+headColumns+` FROM log_head`+t.kept()))
}

// PutHead implements audit.LogTx.
func (t *Tx) PutHead(ctx context.Context, h audit.Head) error {
	_, err := t.exec(ctx, "put log head", `
		INSERT INTO log_head (id, `+headColumns+`) VALUES (1, $1, $2, $3, $4, $5)
		ON CONFLICT (id) DO UPDATE SET origin = excluded.origin, size = excluded.size, checkpoint = excluded.checkpoint,
		  at = excluded.at, pruned = excluded.pruned`,
		h.Origin, h.Size, h.Checkpoint, micros(h.At), h.Pruned)
	return err
}

// rowsAtATime bounds the parameters of one statement.
const rowsAtATime = 64

// Sequence implements audit.LogTx.
func (t *Tx) Sequence(ctx context.Context, es []audit.Sequenced) error {
	for len(es) > 0 {
		n := min(len(es), rowsAtATime)
		var rows, seqs []string
		var args, taken []any
		for i, e := range es[:n] {
			rows = append(rows, placeholders(len(args)+1, 10))
			args = append(args, e.Index, micros(e.At), indexed(string(e.Kind)), indexed(e.User.Issuer), indexed(e.User.ID),
				indexed(e.Agent.Issuer), indexed(e.Agent.ID), indexed(e.Session), indexed(e.Decision), string(e.Record))
			seqs = append(seqs, fmt.Sprint("$", i+1))
			taken = append(taken, e.Seq)
		}
		_, err := t.exec(ctx, "sequence audit entries", `INSERT INTO log_entries
			(seq, at, kind, user_issuer, user_subject, agent_issuer, agent_subject, session, decision, entry) VALUES `+strings.Join(rows, ", "), args...)
		if err != nil {
			return err
		}
		gone, err := t.exec(ctx, "sequence audit entries", `DELETE FROM audit WHERE seq IN (`+strings.Join(seqs, ", ")+`)`, taken...)
		if err == nil && gone != int64(n) {
			err = fmt.Errorf("sequence audit entries: %d of %d vanished meanwhile", int64(n)-gone, n)
		}
		if err != nil {
			return err
		}
		es = es[n:]
	}
	return nil
}

// indexed is a value as the columns have it by which the log is searched: as it is,
// or its hash where it is longer than an index takes. One odd row must not hold up
// the log; the truth is in the entry.
func indexed(v string) string {
	if len(v) <= maxIndexed {
		return v
	}
	sum := sha256.Sum256([]byte(v))
	return "sha256:" + hex.EncodeToString(sum[:])
}

const maxIndexed = 512 // bytes

// placeholders is one row of parameters: ($first, …).
func placeholders(first, n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "%c$%d", "(,"[min(i, 1)], first+i)
	}
	return b.String() + ")"
}

// Tile implements audit.LogTx.
func (t *Tx) Tile(ctx context.Context, level int, n int64) ([]byte, error) {
	data, _, err := found(one(ctx, t, "read log tile", func(r scanner) (b []byte, err error) { return b, r.Scan(&b) },
		`SELECT data FROM log_tiles WHERE level = $1 AND n = $2`, level, n))
	return data, err
}

// PutTile implements audit.LogTx.
func (t *Tx) PutTile(ctx context.Context, level int, n int64, data []byte) error {
	return t.insert(ctx, "put log tile", `INSERT INTO log_tiles (level, n, data) VALUES ($1, $2, $3)
		ON CONFLICT (level, n) DO UPDATE SET data = excluded.data`, level, n, data)
}

// CheckpointKeys implements audit.LogTx.
func (t *Tx) CheckpointKeys(ctx context.Context) (out []string, err error) {
	keys, err := t.Keys(ctx, CheckpointKey)
	for _, k := range keys {
		out = append(out, string(k.Private))
	}
	return out, err
}

// AddCheckpointKey implements audit.LogTx.
func (t *Tx) AddCheckpointKey(ctx context.Context, signer, verifier string) error {
	return t.InsertKey(ctx, Key{ID: verifier, Purpose: CheckpointKey, ActiveAt: t.now, Private: []byte(signer)})
}

// LogEntries lists sequenced entries that match, from an index on.
func (t *Tx) LogEntries(ctx context.Context, q audit.Query) ([]audit.Sequenced, error) {
	where, args := []string{`seq >= $1`}, []any{q.From}
	add := func(column, v string) {
		args = append(args, indexed(v))
		// The second part tells SQLite that the partial index will do.
		where = append(where, fmt.Sprintf(`%s = $%d AND %s <> ''`, column, len(args), column))
	}
	for _, p := range []struct{ column, value string }{{"session", q.Session}, {"decision", q.Decision}, {"kind", string(q.Kind)}} {
		if p.value != "" {
			add(p.column, p.value)
		}
	}
	for _, p := range []struct {
		name string
		ref  identity.Ref
	}{{"user", q.User}, {"agent", q.Agent}} {
		if !p.ref.IsZero() {
			add(p.name+"_subject", p.ref.ID)
			add(p.name+"_issuer", p.ref.Issuer)
		}
	}
	if q.To > 0 {
		args = append(args, q.To)
		where = append(where, fmt.Sprintf(`seq < $%d`, len(args)))
	}
	args = append(args, q.Limit)
	return some(ctx, t, "list log entries", func(r scanner) (e audit.Sequenced, err error) {
		var text string
		if err := r.Scan(&e.Index, &text); err != nil {
			return e, err
		}
		e.Record = []byte(text)
		return e, nil
	}, `SELECT seq, entry FROM log_entries WHERE `+strings.Join(where, ` AND `)+fmt.Sprintf(` ORDER BY seq LIMIT $%d`, len(args)), args...)
}

// PruneLog drops the entries below an index, whose hashes stay.
func (t *Tx) PruneLog(ctx context.Context, below int64) (int64, error) {
	return t.exec(ctx, "prune log", `DELETE FROM log_entries WHERE seq < $1`, below)
}

// PutInput stores what a decision was made on.
func (t *Tx) PutInput(ctx context.Context, in audit.Input) error {
	return t.insert(ctx, "put decision input", `INSERT INTO inputs (decision, at, kept, input) VALUES ($1, $2, $3, $4)`,
		in.Decision, micros(t.now), in.Kept, string(in.JSON))
}

// Input returns what a decision was made on; fault.NotFound where it was not kept.
func (t *Tx) Input(ctx context.Context, decision string) (audit.Input, error) {
	return one(ctx, t, "read decision input", func(r scanner) (in audit.Input, err error) {
		var text string
		err = r.Scan(&in.Decision, &in.Kept, &text)
		in.JSON = []byte(text)
		return in, err
	}, `SELECT decision, kept, input FROM inputs WHERE decision = $1`, decision)
}

// EndEverything implements audit.RestoreTx.
func (t *Tx) EndEverything(ctx context.Context, reason string) (sessions, approvals, leases int64, err error) {
	now := micros(t.now)
	if sessions, err = t.exec(ctx, "end sessions", `UPDATE sessions SET version = version + 1, ended_at = $1, end_reason = $2
		WHERE ended_at = 0`, now, reason); err != nil {
		return 0, 0, 0, err
	}
	if approvals, err = t.exec(ctx, "end approvals", `UPDATE approvals SET version = version + 1, state = 'cancelled', reason = $1,
		polling = 0, auth_req_id_sealed = NULL, answer_sealed = NULL
		WHERE state = 'approved' OR state IN `+openStates, reason); err != nil {
		return 0, 0, 0, err
	}
	if leases, err = t.exec(ctx, "end leases", `UPDATE leases SET ended_at = $1, end_reason = $2, urgency = $3,
		due_at = $1,
		state = CASE WHEN ending = 'word' THEN 'revoked' ELSE 'revoking' END, gone_at = CASE WHEN ending = 'word' THEN CAST($1 AS BIGINT) ELSE 0 END
		WHERE ended_at = 0`, now, reason, lease.ByKill); err != nil {
		return 0, 0, 0, err
	}
	_, err = t.exec(ctx, "forget idempotency keys", `DELETE FROM replays`)
	return sessions, approvals, leases, err
}
