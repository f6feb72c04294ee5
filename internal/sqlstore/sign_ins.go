package sqlstore

import (
	"context"
	"time"

	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/signin"
)

const signInColumns = `id, version, state, agent_issuer, agent_subject, opened_from, task, envelope, age_us, redirect_uri, agent_state,
	token_hash, browser_hash, state_hash, code_hash, issuer, user_issuer, user_subject, user_claims, wrong_codes, session,
	opened_at, expires_at`

func scanSignIn(r scanner) (s signin.SignIn, err error) {
	err = r.Scan(&s.ID, &s.Version, &s.State, &s.Agent.Issuer, &s.Agent.ID, &s.From, &s.Spec.Task, jsonOf(&s.Spec.Envelope), durationOf(&s.Spec.Age),
		&s.RedirectURI, &s.AgentState, &s.TokenHash, &s.BrowserHash, &s.StateHash, &s.CodeHash,
		&s.Issuer, &s.User.Issuer, &s.User.ID, jsonOf(&s.User.Claims), &s.WrongCodes, &s.Session, timeOf(&s.OpenedAt), timeOf(&s.ExpiresAt))
	return s, err
}

// InsertSignIn implements signin.Tx.
func (t *Tx) InsertSignIn(ctx context.Context, s signin.SignIn) error {
	return t.insert(ctx, "insert sign-in", `INSERT INTO sign_ins (`+signInColumns+`)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22, $23)`,
		s.ID, s.Version, s.State, s.Agent.Issuer, s.Agent.ID, s.From, s.Spec.Task, asJSON(s.Spec.Envelope), s.Spec.Age.Microseconds(),
		s.RedirectURI, s.AgentState, s.TokenHash, s.BrowserHash, s.StateHash, s.CodeHash,
		s.Issuer, s.User.Issuer, s.User.ID, asJSON(s.User.Claims), s.WrongCodes, s.Session, micros(s.OpenedAt), micros(s.ExpiresAt))
}

// SignIn implements signin.Tx.
func (t *Tx) SignIn(ctx context.Context, id string) (signin.SignIn, error) {
	return t.signIn(ctx, `id = $1`, id)
}

// SignInByToken implements signin.Tx.
func (t *Tx) SignInByToken(ctx context.Context, hash string) (signin.SignIn, error) {
	return t.signIn(ctx, `token_hash = $1`, hash)
}

// SignInByState implements signin.Tx.
func (t *Tx) SignInByState(ctx context.Context, hash string) (signin.SignIn, error) {
	return t.signIn(ctx, `state_hash = $1 AND state_hash <> ''`, hash)
}

func (t *Tx) signIn(ctx context.Context, where, value string) (signin.SignIn, error) {
	return one(ctx, t, "read sign-in", scanSignIn, `SELECT `+signInColumns+` FROM sign_ins WHERE `+where+t.kept(), value)
}

// UpdateSignIn implements signin.Tx.
func (t *Tx) UpdateSignIn(ctx context.Context, s *signin.SignIn) error {
	err := t.change(ctx, signin.ErrStale, "update sign-in", `
		UPDATE sign_ins SET version = version + 1, state = $1, browser_hash = $2, state_hash = $3, code_hash = $4, issuer = $5,
		  user_issuer = $6, user_subject = $7, user_claims = $8, wrong_codes = $9, session = $10, expires_at = $11
		WHERE id = $12 AND version = $13`,
		s.State, s.BrowserHash, s.StateHash, s.CodeHash, s.Issuer,
		s.User.Issuer, s.User.ID, asJSON(s.User.Claims), s.WrongCodes, s.Session, micros(s.ExpiresAt), s.ID, s.Version)
	if err == nil {
		s.Version++
	}
	return err
}

// CountOpenSignIns implements signin.Tx.
func (t *Tx) CountOpenSignIns(ctx context.Context, agent identity.Ref) (int, error) {
	if err := t.alone(ctx, "sign-ins of "+agent.String()); err != nil {
		return 0, err
	}
	return one(ctx, t, "count sign-ins", func(r scanner) (n int, err error) { return n, r.Scan(&n) },
		`SELECT count(*) FROM sign_ins WHERE agent_subject = $1 AND agent_issuer = $2 AND expires_at > $3
		  AND state NOT IN ('declined', 'completed')`, agent.ID, agent.Issuer, micros(t.now))
}

// ForgetSignIns implements revocation.Tx.
func (t *Tx) ForgetSignIns(ctx context.Context, before time.Time, limit int) (int64, error) {
	return t.exec(ctx, "forget sign-ins", `DELETE FROM sign_ins WHERE id IN
		(SELECT id FROM sign_ins WHERE expires_at < $1 ORDER BY expires_at LIMIT $2)`, micros(before), limit)
}

// EndSignIns implements revocation.Tx.
func (t *Tx) EndSignIns(ctx context.Context, user, agent identity.Ref, all bool) (int64, error) {
	where, args := `TRUE`, []any{micros(t.now)}
	switch {
	case !user.IsZero():
		where, args = `user_subject = $2 AND user_issuer = $3`, append(args, user.ID, user.Issuer)
	case !agent.IsZero():
		where, args = `agent_subject = $2 AND agent_issuer = $3`, append(args, agent.ID, agent.Issuer)
	case !all:
		return 0, nil
	}
	return t.exec(ctx, "end sign-ins", `UPDATE sign_ins SET version = version + 1, code_hash = '', expires_at = $1
		WHERE expires_at > $1 AND state NOT IN ('declined', 'completed') AND `+where, args...)
}
