package session

import (
	"context"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
)

// Store runs transactions.
type Store interface {
	Update(ctx context.Context, f func(Tx) error) error
	View(ctx context.Context, f func(Tx) error) error
}

// Manager opens and shows sessions.
type Manager struct {
	Store    Store
	Settings Settings
}

// Open opens a session for the caller's agent and user.
func (m *Manager) Open(ctx context.Context, c identity.Caller, spec Spec) (Session, error) {
	if err := spec.Check(m.Settings); err != nil {
		return Session{}, err
	}
	if c.User == nil {
		return Session{}, fault.New(fault.InvalidToken, "the tokens name no user: bring the user's token as subject_token")
	}
	var s Session
	err := m.Store.Update(ctx, func(tx Tx) error {
		s = New(*c.User, c.Agent.Ref, spec, m.Settings, tx.Now())
		return Open(ctx, tx, s, c.Agent)
	})
	return s, err
}

// Get returns a session of the caller's, and whether it lives.
func (m *Manager) Get(ctx context.Context, c identity.Caller, sessionID string) (s Session, alive bool, err error) {
	err = m.Store.View(ctx, func(tx Tx) (err error) {
		s, err = Find(ctx, tx, sessionID, c)
		alive = s.Alive(tx.Now())
		return err
	})
	return s, alive, err
}
