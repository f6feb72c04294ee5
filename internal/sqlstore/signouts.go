package sqlstore

import (
	"context"
	"time"

	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/session"
)

// signedOut is the latest sign-out of the user in issuer and subject or of their login
// in sid, each an SQL expression. A token that does not say of which login it is, is of
// any of its user's.
func signedOut(issuer, subject, sid string) string {
	return `COALESCE((SELECT MAX(b) FROM (
		SELECT before_at AS b FROM signouts WHERE signouts.issuer = ` + issuer + ` AND signouts.subject = ` + subject + ` AND signouts.sid = ''
		UNION ALL
		SELECT before_at AS b FROM signouts WHERE signouts.sid <> '' AND signouts.sid = ` + sid + ` AND signouts.issuer = ` + issuer + `
		UNION ALL
		SELECT before_at AS b FROM signouts WHERE signouts.issuer = ` + issuer + ` AND signouts.subject = ` + subject + ` AND signouts.subject <> ''
			AND ` + sid + ` = '') AS s), 0)`
}

var signedOutOf = `SELECT ` + signedOut("$1", "$2", "$3")

// SignedOut implements session.Tx.
func (t *Tx) SignedOut(ctx context.Context, user identity.Ref, sid string) (at time.Time, err error) {
	return one(ctx, t, "read sign-outs", func(r scanner) (at time.Time, err error) { return at, r.Scan(timeOf(&at)) },
		signedOutOf, user.Issuer, user.ID, sid)
}

// SignedOut is the same in a transaction of its own.
func (s *Store) SignedOut(ctx context.Context, user identity.Ref, sid string) (at time.Time, err error) {
	err = s.View(ctx, func(tx *Tx) (err error) {
		at, err = tx.SignedOut(ctx, user, sid)
		return err
	})
	return at, err
}

// PutSignOut implements revocation.Tx.
func (t *Tx) PutSignOut(ctx context.Context, s identity.SignOut) error {
	_, err := t.exec(ctx, "put sign-out", `INSERT INTO signouts (issuer, subject, sid, before_at, expires_at) VALUES ($1, $2, $3, $4, $5)
		ON CONFLICT (issuer, subject, sid) DO UPDATE SET
		  before_at  = CASE WHEN excluded.before_at > signouts.before_at THEN excluded.before_at ELSE signouts.before_at END,
		  expires_at = CASE WHEN excluded.expires_at > signouts.expires_at THEN excluded.expires_at ELSE signouts.expires_at END`,
		s.User.Issuer, s.User.ID, s.Login, micros(s.Before), micros(s.Until))
	return err
}

// LoginSessions implements revocation.Tx.
func (t *Tx) LoginSessions(ctx context.Context, user identity.Ref, sid string) ([]session.Session, error) {
	const where = `ended_at = 0 AND user_issuer = $2 AND (user_sid = $1 OR user_sid = '' AND user_subject = $3)`
	if err := t.hold(ctx, where, sid, user.Issuer, user.ID); err != nil {
		return nil, err
	}
	return some(ctx, t, "list sessions of a login", scanSession, `SELECT `+sessionRead+` FROM sessions WHERE `+where+` ORDER BY id`+t.kept(), sid, user.Issuer, user.ID)
}

// ForgetSignOuts implements revocation.Tx.
func (t *Tx) ForgetSignOuts(ctx context.Context, limit int) (int64, error) {
	return t.exec(ctx, "forget sign-outs", `DELETE FROM signouts WHERE (issuer, subject, sid) IN
		(SELECT issuer, subject, sid FROM signouts WHERE expires_at <= $1 ORDER BY expires_at LIMIT $2)`, micros(t.now), limit)
}
