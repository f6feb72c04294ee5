package sqlstore

import (
	"context"
	"fmt"
	"time"

	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/session"
)

const sessionColumns = `id, version, user_issuer, user_subject, user_claims, agent_issuer, agent_subject,
	task, envelope, labels, counters, started_at, ends_at, ended_at, end_reason, scope, idle_at`

// sessionRead is what a session is read by.
var sessionRead = sessionColumns + `, ` + signedOut("sessions.user_issuer", "sessions.user_subject", "sessions.user_sid") +
	`, ` + signedOut("sessions.agent_issuer", "sessions.agent_subject", "CAST(NULL AS TEXT)")

func scanSession(r scanner) (s session.Session, err error) {
	err = r.Scan(&s.ID, &s.Version, &s.User.Issuer, &s.User.ID, jsonOf(&s.User.Claims), &s.Agent.Issuer, &s.Agent.ID,
		jsonOf(&s.Task), jsonOf(&s.Envelope), jsonOf(&s.Labels), jsonOf(&s.Counters),
		timeOf(&s.StartedAt), timeOf(&s.EndsAt), timeOf(&s.EndedAt), &s.EndReason,
		&s.Scope, timeOf(&s.IdleAt), timeOf(&s.SignedOut), timeOf(&s.AgentSignedOut))
	return s, err
}

// InsertSession implements session.Tx.
func (t *Tx) InsertSession(ctx context.Context, s session.Session) error {
	if err := t.Guard(ctx); err != nil {
		return err
	}
	return t.insert(ctx, "insert session", `INSERT INTO sessions (`+sessionColumns+`, user_sid)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18)`,
		s.ID, s.Version, s.User.Issuer, s.User.ID, asJSON(s.User.Claims), s.Agent.Issuer, s.Agent.ID,
		asJSON(s.Task), asJSON(s.Envelope), asJSON(s.Labels), asJSON(s.Counters),
		micros(s.StartedAt), micros(s.EndsAt), micros(s.EndedAt), s.EndReason, s.Scope, micros(s.IdleAt), s.User.Login())
}

// Session implements session.Tx.
func (t *Tx) Session(ctx context.Context, id string) (session.Session, error) {
	var version int64
	s, err := one(ctx, t, "read session", func(r scanner) (session.Session, error) {
		return scanSession(scanMore{r, &version})
	}, `SELECT `+sessionRead+`, COALESCE((SELECT scopes.version FROM scopes WHERE scopes.scope = sessions.scope), 0)
		FROM sessions WHERE id = $1`+t.kept(), id)
	s.ScopeVersion = version
	if err == nil && s.Scope == "" { // of a binary that had no scopes
		s.Scope = session.ScopeOf(s.User.Ref, s.Agent)
		s.ScopeVersion, err = t.ScopeVersion(ctx, s.Scope)
	}
	return s, err
}

// scanMore scans one column more than it is asked for.
type scanMore struct {
	scanner
	last any
}

// Scan implements scanner.
func (s scanMore) Scan(dest ...any) error { return s.scanner.Scan(append(dest, s.last)...) }

// UpdateSession implements session.Tx.
func (t *Tx) UpdateSession(ctx context.Context, s session.Session, touch bool) error {
	if t.shareSession != "" {
		t.guarded = true
		if _, err := t.exec(ctx, "share session", t.shareSession, s.ID); err != nil {
			return err
		}
	}
	return t.change(ctx, session.ErrChanged, "update session", `
		UPDATE sessions SET version = version + $1, labels = $2, counters = $3, envelope = $4, idle_at = $5, ended_at = $6, end_reason = $7
		WHERE id = $8 AND version = $9 AND ended_at = 0`,
		flag(touch), asJSON(s.Labels), asJSON(s.Counters), asJSON(s.Envelope), micros(s.IdleAt), micros(s.EndedAt), s.EndReason, s.ID, s.Version)
}

// CheckSession implements session.Tx. Decisions that change nothing need not wait for
// one another.
func (t *Tx) CheckSession(ctx context.Context, s session.Session) error {
	t.guarded = true
	_, ok, err := found(one(ctx, t, "check session", func(r scanner) (n int, err error) { return n, r.Scan(&n) },
		t.sharedCheck, s.ID, s.Version, s.Scope, s.ScopeVersion))
	if err == nil && !ok {
		return session.ErrChanged
	}
	return err
}

// HoldSession implements revocation.Tx.
func (t *Tx) HoldSession(ctx context.Context, id string) error {
	return t.hold(ctx, `id = $1`, id)
}

// hold waits for the decisions under way in some sessions, and keeps new ones out
// until the commit.
func (t *Tx) hold(ctx context.Context, where string, args ...any) error {
	if t.holdSessions == "" {
		return nil
	}
	if err := t.Guard(ctx); err != nil { // in the order that decisions have
		return err
	}
	_, err := t.exec(ctx, "hold sessions", fmt.Sprintf(t.holdSessions, where), args...)
	return err
}

// LiveSessions implements revocation.Tx.
func (t *Tx) LiveSessions(ctx context.Context, user, agent identity.Ref, all bool, until time.Time, limit int) ([]session.Session, error) {
	where, args := `FALSE`, []any{micros(t.now), micros(until)}
	switch {
	case !user.IsZero():
		where, args = `user_subject = $3 AND user_issuer = $4`, append(args, user.ID, user.Issuer)
	case !agent.IsZero():
		where, args = `agent_subject = $3 AND agent_issuer = $4`, append(args, agent.ID, agent.Issuer)
	case all:
		where = `TRUE`
	}
	where = fmt.Sprintf(`ended_at = 0 AND ends_at > $1 AND started_at <= $2 AND %s ORDER BY id LIMIT %d`, where, limit)
	if err := t.hold(ctx, where, args...); err != nil {
		return nil, err
	}
	return some(ctx, t, "list sessions", scanSession, `SELECT `+sessionRead+` FROM sessions WHERE `+where+t.kept(), args...)
}

// DueSessions implements revocation.Tx: first those whose time is over, then the idle
// ones, each found by an index of its own.
func (t *Tx) DueSessions(ctx context.Context, limit int) ([]session.Session, error) {
	over, err := some(ctx, t, "list due sessions", scanSession, `SELECT `+sessionRead+` FROM sessions
		WHERE ended_at = 0 AND ends_at <= $1 ORDER BY ends_at LIMIT $2`+t.claimed(), micros(t.now), limit)
	if err != nil || len(over) == limit {
		return over, err
	}
	idle, err := some(ctx, t, "list idle sessions", scanSession, `SELECT `+sessionRead+` FROM sessions
		WHERE ended_at = 0 AND idle_at > 0 AND idle_at <= $1 AND ends_at > $1 ORDER BY idle_at LIMIT $2`+t.claimed(),
		micros(t.now), limit-len(over))
	return append(over, idle...), err
}

// ForgetSessions implements revocation.Tx.
func (t *Tx) ForgetSessions(ctx context.Context, before time.Time, limit int) (int64, error) {
	ids, err := some(ctx, t, "list old sessions", func(r scanner) (id string, err error) { return id, r.Scan(&id) }, `
		SELECT id FROM sessions WHERE ended_at > 0 AND ended_at < $1
		  AND NOT EXISTS (SELECT 1 FROM leases WHERE leases.session = sessions.id AND leases.state <> 'revoked')
		  AND NOT EXISTS (SELECT 1 FROM approvals WHERE approvals.session = sessions.id AND approvals.state IN `+openStates+`)
		ORDER BY ended_at LIMIT $2`+t.claimed(), micros(before), limit)
	if err != nil {
		return 0, err
	}
	left := 5000 // rows to delete in this transaction
	for i, id := range ids {
		for _, table := range []string{"leases", "approvals", "decisions"} {
			n, err := t.exec(ctx, "forget "+table, `DELETE FROM `+table+` WHERE id IN (SELECT id FROM `+table+` WHERE session = $1 LIMIT $2)`, id, left)
			if err != nil {
				return 0, err
			}
			if left -= int(n); left <= 0 {
				return int64(max(i, limit)), nil // the rest is for the next one
			}
		}
		if _, err := t.exec(ctx, "forget session", `DELETE FROM sessions WHERE id = $1`, id); err != nil {
			return 0, err
		}
	}
	return int64(len(ids)), nil
}

// ForgetInputs implements revocation.Tx.
func (t *Tx) ForgetInputs(ctx context.Context, before time.Time, limit int) (int64, error) {
	return t.exec(ctx, "forget inputs", `DELETE FROM inputs WHERE decision IN
		(SELECT decision FROM inputs WHERE at < $1 ORDER BY at LIMIT $2)`, micros(before), limit)
}
