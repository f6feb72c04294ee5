package sqlstore

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/writsec/writ/internal/lease"
)

const leaseColumns = `id, state, session, decision, user_issuer, user_subject, agent_issuer, agent_subject, intent_hash,
	grant_json, created_at, expires_at, ended_at, end_reason, policy, mint_deadline, gone_at, revocation, due_at, attempts, last_error`

func scanLease(r scanner) (l lease.Lease, err error) {
	err = r.Scan(&l.ID, &l.State, &l.Session, &l.Decision, &l.User.Issuer, &l.User.ID, &l.Agent.Issuer, &l.Agent.ID, &l.IntentHash,
		jsonOf(&l.Grant), timeOf(&l.CreatedAt), timeOf(&l.ExpiresAt), timeOf(&l.EndedAt), &l.EndReason,
		&l.Policy, timeOf(&l.MintDeadline), timeOf(&l.GoneAt), &l.Revocation, timeOf(&l.DueAt), &l.Attempts, &l.LastError)
	return l, err
}

// leaseRead is what a lease is read by.
const leaseRead = leaseColumns + `, CASE WHEN ended_at = 0 AND ` + leaseHalted + ` THEN 1 ELSE 0 END`

func scanLeaseRead(r scanner) (lease.Lease, error) {
	var halted int64
	l, err := scanLease(scanMore{r, &halted})
	l.Halted = halted == 1
	return l, err
}

// leaseHalted is whether an operator has stopped what leases has a row of.
const leaseHalted = `EXISTS (SELECT 1 FROM revocations WHERE revocations.active = 1
	AND (revocations.frozen = 1 OR revocations.at >= leases.created_at) AND ` + inScope + `)`

// inScope is whether a lease is in the scope of a revocation.
const inScope = `(revocations.scope, revocations.value, revocations.issuer) IN (VALUES ('all', '', ''),
	('decision', leases.decision, ''), ('session', leases.session, ''), ('minter', leases.minter, ''), ('policy', leases.policy, ''),
	('user', leases.user_subject, leases.user_issuer), ('agent', leases.agent_subject, leases.agent_issuer))`

// Admit implements lease.Tx.
func (t *Tx) Admit(ctx context.Context, l lease.Lease, since time.Time, limits lease.Limits) (lease.Admission, error) {
	if err := t.Guard(ctx); err != nil {
		return lease.Admission{}, err
	}
	a, near, err := t.admit(ctx, l, since, limits)
	if err != nil || a != (lease.Admission{}) || len(near) == 0 {
		return a, err
	}
	// Others may be adding to what is nearly full. Whoever comes so close waits for them,
	// always in the same order.
	for _, quota := range near {
		if err := t.alone(ctx, "quota "+quota); err != nil {
			return a, err
		}
	}
	a, _, err = t.admit(ctx, l, since, limits)
	return a, err
}

// quotaMargin is how many leases replicas can be adding at a time that don't see one
// another yet.
const quotaMargin = 64

func (t *Tx) admit(ctx context.Context, l lease.Lease, since time.Time, limits lease.Limits) (a lease.Admission, near []string, err error) {
	var halt string
	quotas := []struct {
		name, scope, where string
		limit, n           int
	}{
		{"session", l.Session, `session = $1 AND ended_at = 0`, limits.PerSession, 0},
		{"user", l.User.String(), `user_subject = $3 AND user_issuer = $4 AND ended_at = 0`, limits.PerUser, 0},
		{"agent", l.Agent.String(), `agent_subject = $5 AND agent_issuer = $6 AND ended_at = 0`, limits.PerAgent, 0},
		{"minter", l.Minter, `minter = $7 AND gone_at = 0`, limits.PerMinter[l.Minter], 0},
	}
	query := strings.Builder{}
	// Every parameter has a place whichever quotas there are.
	query.WriteString(`SELECT COALESCE((SELECT id FROM revocations WHERE active = 1 AND (frozen = 1 OR at >= $9)
		AND (scope, value, issuer) IN (VALUES ('all', '', ''), ('session', $1, ''), ('decision', $2, ''), ('user', $3, $4),
		  ('agent', $5, $6), ('minter', $7, ''), ('policy', $8, '')) LIMIT 1), '')`)
	dest := []any{&halt}
	for i := range quotas {
		q := &quotas[i]
		if q.limit > 0 {
			fmt.Fprintf(&query, `, (SELECT count(*) FROM (SELECT 1 FROM leases WHERE %s LIMIT %d) AS part)`, q.where, q.limit)
			dest = append(dest, &q.n)
		}
	}
	args := []any{l.Session, l.Decision, l.User.ID, l.User.Issuer, l.Agent.ID, l.Agent.Issuer, l.Minter, l.Policy, micros(since)}
	if _, err = one(ctx, t, "admit lease", func(r scanner) (struct{}, error) { return struct{}{}, r.Scan(dest...) }, query.String(), args...); err != nil {
		return a, nil, err
	}
	a.Halt = halt
	for _, q := range quotas {
		switch {
		case q.limit == 0:
		case q.n >= q.limit && a.Full == "":
			a.Full = q.name
		case q.n+quotaMargin >= q.limit:
			near = append(near, q.name+" "+q.scope)
		}
	}
	return a, near, nil
}

// InsertLease implements lease.Tx.
func (t *Tx) InsertLease(ctx context.Context, l lease.Lease) error {
	return t.insert(ctx, "insert lease", `INSERT INTO leases (`+leaseColumns+`, minter, ending)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22, $23)`,
		l.ID, l.State, l.Session, l.Decision, l.User.Issuer, l.User.ID, l.Agent.Issuer, l.Agent.ID, l.IntentHash,
		asJSON(l.Grant), micros(l.CreatedAt), micros(l.ExpiresAt), micros(l.EndedAt), l.EndReason,
		l.Policy, micros(l.MintDeadline), micros(l.GoneAt), l.Revocation, micros(l.DueAt), l.Attempts, l.LastError, l.Minter, l.Ending())
}

// Lease implements lease.Tx.
func (t *Tx) Lease(ctx context.Context, id string) (lease.Lease, error) {
	return one(ctx, t, "read lease", scanLeaseRead, `SELECT `+leaseRead+` FROM leases WHERE id = $1`+t.kept(), id)
}

const recallColumn = "leases.recall"

// ActivateLease implements lease.Tx.
func (t *Tx) ActivateLease(ctx context.Context, id, recall string) error {
	return t.change(ctx, lease.ErrStale, "activate lease", `UPDATE leases SET state = 'active', recall_sealed = $1
		WHERE id = $2 AND state = 'intent' AND expires_at > $3 AND NOT `+leaseHalted,
		t.seal.seal([]byte(recall), recallColumn, id), id, micros(t.now))
}

// RecallLease implements lease.Tx.
func (t *Tx) RecallLease(ctx context.Context, id, recall string) error {
	_, err := t.exec(ctx, "recall lease", `UPDATE leases SET state = 'revoking', gone_at = 0, due_at = $1, claim = '', recall_sealed = $2,
		ending = CASE WHEN ending = 'expiry' THEN 'target_then_expiry' ELSE ending END
		WHERE id = $3 AND ended_at > 0`, micros(t.now), t.seal.seal([]byte(recall), recallColumn, id), id)
	return err
}

// ExtendLease implements lease.Tx.
func (t *Tx) ExtendLease(ctx context.Context, l lease.Lease) error {
	return t.change(ctx, lease.ErrStale, "extend lease", `UPDATE leases SET mint_deadline = $1, expires_at = $2, policy = $3, grant_json = $4
		WHERE id = $5 AND state = 'active' AND expires_at > $6 AND NOT `+leaseHalted,
		micros(l.MintDeadline), micros(l.ExpiresAt), l.Policy, asJSON(l.Grant), l.ID, micros(t.now))
}

// RevokedSince implements lease.Tx.
func (t *Tx) RevokedSince(ctx context.Context, l lease.Lease) (bool, error) {
	n, err := one(ctx, t, "look for revocations", func(r scanner) (n int, err error) { return n, r.Scan(&n) },
		`SELECT count(*) FROM leases, revocations WHERE leases.id = $1 AND revocations.at >= leases.created_at AND `+inScope, l.ID)
	return n > 0, err
}

// selected is a selection as a condition with parameters after those of args.
func selected(s lease.Selection, now time.Time, args []any) (string, []any) {
	arg := func(v any) string {
		args = append(args, v)
		return fmt.Sprintf("$%d", len(args))
	}
	where := `FALSE`
	switch {
	case s.ID != "":
		where = `id = ` + arg(s.ID)
	case s.Decision != "":
		where = `decision = ` + arg(s.Decision)
	case s.Session != "":
		where = `session = ` + arg(s.Session)
	case !s.User.IsZero():
		where = `user_subject = ` + arg(s.User.ID) + ` AND user_issuer = ` + arg(s.User.Issuer)
	case !s.Agent.IsZero():
		where = `agent_subject = ` + arg(s.Agent.ID) + ` AND agent_issuer = ` + arg(s.Agent.Issuer)
	case s.Minter != "":
		where = `gone_at = 0 AND minter = ` + arg(s.Minter)
	case s.Policy != "":
		where = `policy = ` + arg(s.Policy)
	case s.Due:
		where = `expires_at <= ` + arg(micros(now))
	case s.Overdue:
		where = `state = 'intent' AND mint_deadline <= ` + arg(micros(now))
	case s.All:
		where = `TRUE`
	}
	if !s.Until.IsZero() {
		where += ` AND created_at <= ` + arg(micros(s.Until))
	}
	return where, args
}

// EndLeases implements lease.Tx.
func (t *Tx) EndLeases(ctx context.Context, s lease.Selection, e lease.End, limit int) ([]lease.Lease, error) {
	lock := t.kept()
	if s.Due || s.Overdue {
		lock = t.claimed()
	}
	where, args := selected(s, t.now, []any{micros(t.now), e.Reason, e.Revocation, e.Urgency(), limit})
	// One row is found by its id. Where all that lives is few rows by PostgreSQL's
	// statistics, which may be those of a quiet hour, it would look through all of that
	// instead; it can't where the condition is not that of the indexes of what lives.
	const lives = `ended_at <= 0`
	alive := `ended_at = 0`
	if s.ID != "" {
		alive = lives
	}
	return some(ctx, t, "end leases", scanLease, `WITH part AS MATERIALIZED (
		  SELECT id FROM leases WHERE `+alive+` AND `+where+` ORDER BY expires_at, id LIMIT $5`+lock+`)
		UPDATE leases SET ended_at = $1, end_reason = $2, revocation = $3, urgency = $4,
		due_at = $1,
		state = CASE WHEN ending = 'word' OR ending = 'expiry' AND expires_at <= $1 THEN 'revoked' ELSE 'revoking' END,
		gone_at = CASE WHEN ending = 'word' OR ending = 'expiry' AND expires_at <= $1 THEN CAST($1 AS BIGINT) ELSE 0 END
		WHERE `+lives+` AND id IN (SELECT id FROM part) RETURNING `+leaseColumns, args...)
}

// ClaimLeases implements lease.WorkTx.
func (t *Tx) ClaimLeases(ctx context.Context, minter, claim string, lapse time.Duration, freshFirst bool, limit int) ([]lease.Lease, error) {
	order := `urgency, attempts`
	if freshFirst {
		order = `attempts, urgency`
	}
	const due = ` FROM leases WHERE state = 'revoking' AND ending IN ('target', 'target_then_expiry') AND minter = $1 AND due_at <= $2`
	attempts, there, err := found(one(ctx, t, "look for due leases", func(r scanner) (n int, err error) { return n, r.Scan(&n) },
		`SELECT attempts`+due+` ORDER BY `+order+` LIMIT 1`, minter, micros(t.now)))
	if err != nil || !there {
		return nil, err
	}
	return some(ctx, t, "claim leases", func(r scanner) (lease.Lease, error) {
		var sealed []byte
		l, err := scanLease(scanMore{r, &sealed})
		if err != nil {
			return l, err
		}
		recall, err := t.seal.open(sealed, recallColumn, l.ID)
		l.Recall = string(recall)
		return l, err
	}, `WITH part AS MATERIALIZED (SELECT id`+due+` AND attempts = $3 ORDER BY urgency, due_at LIMIT $4`+t.claimed()+`)
		UPDATE leases SET claim = $5, due_at = $6 WHERE id IN (SELECT id FROM part) RETURNING `+leaseColumns+`, recall_sealed`,
		minter, micros(t.now), attempts, max(1, limit>>min(2*attempts, 30)), claim, micros(t.now.Add(lapse)))
}

// GoneLeases implements lease.WorkTx.
func (t *Tx) GoneLeases(ctx context.Context, claim string, ids []string) ([]string, error) {
	return eachPart(ids, func(in string, args []any) ([]string, error) {
		n := len(args)
		return some(ctx, t, "mark leases gone", scanText, fmt.Sprintf(`UPDATE leases SET state = 'revoked', gone_at = $%d, claim = '',
			recall_sealed = NULL, last_error = '' WHERE claim = $%d AND state = 'revoking' AND id IN (%s) RETURNING id`, n+1, n+2, in),
			append(args, micros(t.now), claim)...)
	})
}

// PostponeLease implements lease.WorkTx.
func (t *Tx) PostponeLease(ctx context.Context, claim, id string, until time.Time, failure string) error {
	return t.insert(ctx, "postpone lease", `UPDATE leases SET due_at = $1, attempts = attempts + 1, last_error = $2, claim = ''
		WHERE claim = $3 AND id = $4`, micros(until), failure, claim, id)
}

// LeaveToTime implements lease.WorkTx.
func (t *Tx) LeaveToTime(ctx context.Context, claim, id string) error {
	return t.insert(ctx, "leave lease to its time", `UPDATE leases SET ending = 'expiry', due_at = expires_at, last_error = '', claim = '',
		recall_sealed = NULL WHERE claim = $1 AND id = $2`, claim, id)
}

// DropClaim implements lease.WorkTx.
func (t *Tx) DropClaim(ctx context.Context, claim, failure string, theirs bool) error {
	return t.insert(ctx, "drop claim", `UPDATE leases SET due_at = $1, attempts = attempts + $2, last_error = $3, claim = ''
		WHERE claim = $4 AND claim <> ''`, micros(t.now), flag(theirs), failure, claim)
}

// AbandonLease implements lease.Tx.
func (t *Tx) AbandonLease(ctx context.Context, id string) error {
	return t.change(ctx, lease.ErrStale, "abandon lease", `UPDATE leases SET state = 'revoked', gone_at = $1, claim = '', recall_sealed = NULL
		WHERE id = $2 AND state = 'revoking'`, micros(t.now), id)
}

// PassLeases implements lease.WorkTx.
func (t *Tx) PassLeases(ctx context.Context, limit int) ([]lease.Lease, error) {
	// A replica of the version before ends leases without a thought of targets.
	if _, err := t.exec(ctx, "take over ended leases", `UPDATE leases SET due_at = $1,
		state = CASE WHEN ending = 'word' THEN state ELSE 'revoking' END, gone_at = CASE WHEN ending = 'word' THEN ended_at ELSE 0 END
		WHERE state = 'revoked' AND gone_at = 0`, micros(t.now)); err != nil {
		return nil, err
	}
	return some(ctx, t, "pass leases", scanLease, `WITH part AS MATERIALIZED (
		  SELECT id FROM leases WHERE state = 'revoking' AND ending = 'expiry' AND expires_at <= $1 ORDER BY expires_at LIMIT $2`+t.claimed()+`)
		UPDATE leases SET state = 'revoked', gone_at = $1, recall_sealed = NULL WHERE id IN (SELECT id FROM part) RETURNING `+leaseColumns, micros(t.now), limit)
}

// LoseOutcomes implements lease.Tx.
func (t *Tx) LoseOutcomes(ctx context.Context, decisions []string) ([]string, error) {
	return eachPart(decisions, func(in string, args []any) ([]string, error) {
		return some(ctx, t, "lose outcomes", scanText, `UPDATE decisions SET outcome = 'unknown', outcome_by = 'writ'
			WHERE outcome = '' AND id IN (`+in+`) RETURNING id`, args...)
	})
}

func scanText(r scanner) (s string, err error) { return s, r.Scan(&s) }

// eachPart runs a statement for parts of a list, of a few sizes only: each statement
// stays prepared.
func eachPart(ids []string, run func(in string, args []any) ([]string, error)) (out []string, err error) {
	for len(ids) > 0 {
		size := 1
		for _, s := range []int{512, 64, 8} {
			if len(ids) > s/8 {
				size = s
				break
			}
		}
		part := ids[:min(size, len(ids))]
		ids = ids[len(part):]
		args, in := make([]any, size), make([]string, size)
		for i := range size {
			args[i], in[i] = part[min(i, len(part)-1)], fmt.Sprintf("$%d", i+1)
		}
		some, err := run(strings.Join(in, ", "), args)
		if err != nil {
			return nil, err
		}
		out = append(out, some...)
	}
	return out, nil
}

// Leases lists the leases that match.
func (t *Tx) Leases(ctx context.Context, q lease.Query) ([]lease.Lease, error) {
	var s search
	s.equal("session", q.Session)
	s.equal("decision", q.Decision)
	s.equal("minter", q.Minter)
	s.equal("revocation", q.Revocation)
	s.who("user", q.User)
	s.who("agent", q.Agent)
	s.equal("state", string(q.State))
	if q.Stuck {
		s.add(stuck, micros(t.now.Add(-lease.StuckAfter)))
	}
	return some(ctx, t, "search leases", scanLeaseRead, `SELECT `+leaseRead+` FROM leases`+s.page(q.Before, q.Limit), s.args...)
}

// stuck is whether the end of a lease should have been seen by then.
const stuck = `(state = 'revoking' AND ended_at <= $%[1]d AND (ending = 'target' OR expires_at <= $%[1]d))`
