package sqlstore

import (
	"context"
	"fmt"
	"strings"

	"github.com/writsec/writ/internal/decision"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/session"
)

// search is a WHERE that grows. Pages are keyed by id, which sorts by age, so that a
// page costs the same wherever it begins and rows that come meanwhile move none.
type search struct {
	where []string
	args  []any
}

// add demands a condition, in which %d is the number of the value's parameter.
func (s *search) add(condition string, value any) {
	s.args = append(s.args, value)
	s.where = append(s.where, fmt.Sprintf(condition, len(s.args)))
}

// equal demands a value, if there is one.
func (s *search) equal(column, value string) {
	if value != "" {
		s.add(column+` = $%d`, value)
	}
}

func (s *search) who(column string, r identity.Ref) {
	s.equal(column+"_subject", r.ID)
	s.equal(column+"_issuer", r.Issuer)
}

// page ends the statement with the rows before an id, newest first.
func (s *search) page(before string, limit int) string {
	if before != "" {
		s.add(`id < $%d`, before)
	}
	where := ""
	if len(s.where) > 0 {
		where = ` WHERE ` + strings.Join(s.where, ` AND `)
	}
	s.args = append(s.args, limit)
	return where + fmt.Sprintf(` ORDER BY id DESC LIMIT $%d`, len(s.args))
}

// Sessions lists the sessions that match.
func (t *Tx) Sessions(ctx context.Context, q session.Query) ([]session.Session, error) {
	var s search
	s.who("user", q.User)
	s.who("agent", q.Agent)
	switch q.State {
	case session.Active:
		s.add(`ended_at = 0 AND ends_at > $%d`, micros(t.now))
	case session.Ended:
		s.add(`(ended_at > 0 OR ends_at <= $%d)`, micros(t.now))
	}
	return some(ctx, t, "search sessions", scanSession, `SELECT `+sessionRead+` FROM sessions`+s.page(q.Before, q.Limit), s.args...)
}

// Decisions lists the decisions that match.
func (t *Tx) Decisions(ctx context.Context, q decision.Query) ([]decision.Record, error) {
	var s search
	s.equal("session", q.Session)
	s.who("user", q.User)
	s.who("agent", q.Agent)
	s.equal("effect", string(q.Effect))
	return some(ctx, t, "search decisions", scanDecision, `SELECT `+decisionColumns+` FROM decisions`+s.page(q.Before, q.Limit), s.args...)
}
