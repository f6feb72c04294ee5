package sqlstore

import (
	"context"

	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/session"
)

const sessionColumns = `id, version, user_issuer, user_subject, user_claims, agent_issuer, agent_subject,
	task, envelope, labels, counters, started_at, ends_at, ended_at, end_reason`

func scanSession(r scanner) (s session.Session, err error) {
	err = r.Scan(&s.ID, &s.Version, &s.User.Issuer, &s.User.ID, jsonOf(&s.User.Claims), &s.Agent.Issuer, &s.Agent.ID,
		jsonOf(&s.Task), jsonOf(&s.Envelope), jsonOf(&s.Labels), jsonOf(&s.Counters),
		timeOf(&s.StartedAt), timeOf(&s.EndsAt), timeOf(&s.EndedAt), &s.EndReason)
	return s, err
}

// InsertSession implements session.Tx.
func (t *Tx) InsertSession(ctx context.Context, s session.Session) error {
	_, err := t.exec(ctx, "insert session", `INSERT INTO sessions (`+sessionColumns+`)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)`,
		s.ID, s.Version, s.User.Issuer, s.User.ID, asJSON(s.User.Claims), s.Agent.Issuer, s.Agent.ID,
		asJSON(s.Task), asJSON(s.Envelope), asJSON(s.Labels), asJSON(s.Counters),
		micros(s.StartedAt), micros(s.EndsAt), micros(s.EndedAt), s.EndReason)
	return err
}

// Session implements session.Tx.
func (t *Tx) Session(ctx context.Context, id string) (session.Session, error) {
	return one(ctx, t, "read session", scanSession, `SELECT `+sessionColumns+` FROM sessions WHERE id = $1`, id)
}

// UpdateSession implements session.Tx.
func (t *Tx) UpdateSession(ctx context.Context, s session.Session, touch bool) error {
	step := 0
	if touch {
		step = 1
	}
	return t.change(ctx, session.ErrChanged, "update session", `
		UPDATE sessions SET version = version + $1, labels = $2, counters = $3, ended_at = $4, end_reason = $5
		WHERE id = $6 AND version = $7 AND ended_at = 0`,
		step, asJSON(s.Labels), asJSON(s.Counters), micros(s.EndedAt), s.EndReason, s.ID, s.Version)
}

// LiveSessions implements revocation.Tx.
func (t *Tx) LiveSessions(ctx context.Context, user, agent identity.Ref, all bool) ([]session.Session, error) {
	where, args := `FALSE`, []any{micros(t.now)}
	switch {
	case !user.IsZero():
		where, args = `user_subject = $2 AND user_issuer = $3`, append(args, user.ID, user.Issuer)
	case !agent.IsZero():
		where, args = `agent_subject = $2 AND agent_issuer = $3`, append(args, agent.ID, agent.Issuer)
	case all:
		where = `TRUE`
	}
	return some(ctx, t, "list sessions", scanSession,
		`SELECT `+sessionColumns+` FROM sessions WHERE ended_at = 0 AND ends_at > $1 AND `+where+` ORDER BY id`, args...)
}

// DueSessions implements revocation.Tx.
func (t *Tx) DueSessions(ctx context.Context, limit int) ([]session.Session, error) {
	return some(ctx, t, "list due sessions", scanSession, `SELECT `+sessionColumns+` FROM sessions
		WHERE ended_at = 0 AND ends_at <= $1 ORDER BY ends_at LIMIT $2`, micros(t.now), limit)
}
