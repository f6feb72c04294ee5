package revocation

import (
	"context"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/session"
)

// SignOut ends what an issuer says is over: the sessions of a user, or of one login of
// theirs, that were begun before, with their approvals and leases. Tokens from before
// are not believed any more. The same word again changes nothing.
func (r *Revoker) SignOut(ctx context.Context, o identity.SignOut) error {
	// In a transaction of its own, and first: it waits for the sessions that are being
	// opened, so that the second sees them, and later ones are refused by it.
	err := r.insist(ctx, func(ctx context.Context, tx Tx) error {
		if _, err := tx.HoldAll(ctx); err != nil {
			return err
		}
		return tx.PutSignOut(ctx, o)
	})
	if err != nil {
		return err
	}
	var t toll
	err = r.update(ctx, func(ctx context.Context, tx Tx) error {
		t = newToll()
		fresh, err := tx.Spend(ctx, "signal:"+identity.Ref{Issuer: o.Transmitter, ID: o.ID}.String(), o.Until)
		if err != nil || !fresh {
			return err
		}
		if o.User.ID != "" {
			if _, err := tx.EndSignIns(ctx, o.User, identity.Ref{}, false); err != nil {
				return err
			}
		}
		sessions, err := sessionsBefore(ctx, tx, o)
		if err != nil {
			return err
		}
		for _, s := range sessions {
			if err := t.end(ctx, tx, s, "the user was signed out", lease.End{Reason: lease.EndSession}); err != nil {
				return err
			}
		}
		return audit.Append(ctx, tx, audit.Entry{Kind: audit.SignedOut, User: o.User, Detail: map[string]any{
			"event": o.Event, "transmitter": o.Transmitter, "id": o.ID, "login": o.Login, "before": o.Before,
			"sessions": t.sessions, "leases": t.leases(),
		}})
	})
	if err == nil {
		r.count(t)
	}
	return err
}

// allSessions is more than an account has.
const allSessions = 1 << 20

// sessionsBefore lists the sessions that a sign-out ends.
func sessionsBefore(ctx context.Context, tx Tx, o identity.SignOut) ([]session.Session, error) {
	if o.Login != "" {
		return over(tx.LoginSessions(ctx, o.User, o.Login))
	}
	// Accounts can be agents', too.
	asUser, err := over(tx.LiveSessions(ctx, o.User, identity.Ref{}, false, tx.Now(), allSessions))
	if err != nil {
		return nil, err
	}
	asAgent, err := over(tx.LiveSessions(ctx, identity.Ref{}, o.User, false, tx.Now(), allSessions))
	return append(asUser, asAgent...), err
}

// over keeps the sessions whose sign-out, which is in the store by now, is after their
// user's token.
func over(all []session.Session, err error) (out []session.Session, _ error) {
	for _, s := range all {
		if s.IsSignedOut() {
			out = append(out, s)
		}
	}
	return out, err
}
