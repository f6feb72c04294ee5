package revocation

import (
	"context"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/session"
)

// SignOut ends what an issuer says is over: the sessions of a user, or of one login of
// theirs, that were begun before, with their approvals and leases. Tokens from before
// are not believed any more. The same word again changes nothing.
func (r *Revoker) SignOut(ctx context.Context, o identity.SignOut) error {
	// In a transaction of its own, and first: a session that is being opened meanwhile,
	// which the second does not see, is dead by this from its first decision on.
	err := r.update(ctx, func(ctx context.Context, tx Tx) error { return tx.PutSignOut(ctx, o) })
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
			if err := t.end(ctx, tx, s, "the user was signed out", identity.Ref{}); err != nil {
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

// sessionsBefore lists the sessions that a sign-out ends.
func sessionsBefore(ctx context.Context, tx Tx, o identity.SignOut) ([]session.Session, error) {
	if o.Login != "" {
		return over(tx.LoginSessions(ctx, o.User, o.Login))
	}
	// Accounts can be agents', too.
	asUser, err := over(tx.LiveSessions(ctx, o.User, identity.Ref{}, false))
	if err != nil {
		return nil, err
	}
	asAgent, err := over(tx.LiveSessions(ctx, identity.Ref{}, o.User, false))
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
