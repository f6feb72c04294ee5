package sqlstore

import (
	"encoding/json"
	"errors"
	"testing"
	"time"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/session"
	"github.com/writsec/writ/internal/signin"
)

func TestSignIns(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		s := signin.SignIn{
			ID: id.New(id.SignIn), Version: 1, State: signin.Opened, Agent: bot, From: "192.0.2.7", TokenHash: "t",
			Spec: session.Spec{Task: "tidy", Age: time.Minute, Envelope: &session.Envelope{Actions: []string{"a"}}}, RedirectURI: "https://crm", AgentState: "s",
			OpenedAt: noon, ExpiresAt: noon.Add(time.Minute),
		}
		f.in(func(tx *Tx) error { return tx.InsertSignIn(f.ctx, s) })
		read := func(get func(tx *Tx) (signin.SignIn, error)) signin.SignIn { return must(f, get) }
		same(t, s, read(func(tx *Tx) (signin.SignIn, error) { return tx.SignIn(f.ctx, s.ID) }))
		same(t, s, read(func(tx *Tx) (signin.SignIn, error) { return tx.SignInByToken(f.ctx, "t") }))
		missing := func(get func(tx *Tx) (signin.SignIn, error)) {
			t.Helper()
			if err := f.View(f.ctx, func(tx *Tx) error { _, err := get(tx); return err }); !fault.Is(err, fault.NotFound) {
				t.Errorf("got %v", err)
			}
		}
		missing(func(tx *Tx) (signin.SignIn, error) { return tx.SignIn(f.ctx, "x") })
		missing(func(tx *Tx) (signin.SignIn, error) { return tx.SignInByToken(f.ctx, "") })
		missing(func(tx *Tx) (signin.SignIn, error) { return tx.SignInByState(f.ctx, "") }) // which most rows have

		old := s
		s.State, s.BrowserHash, s.StateHash, s.CodeHash, s.Issuer, s.WrongCodes, s.Session = signin.Consented, "b", "st", "c", "i", 3, "ses_1"
		s.User = identity.Principal{Ref: alice, Claims: map[string]any{"n": json.Number("12.50")}}
		s.ExpiresAt = noon.Add(time.Hour)
		f.in(func(tx *Tx) error { return tx.UpdateSignIn(f.ctx, &s) })
		if s.Version != 2 {
			t.Errorf("version %d", s.Version)
		}
		same(t, s, read(func(tx *Tx) (signin.SignIn, error) { return tx.SignInByState(f.ctx, "st") }))
		if err := f.Update(f.ctx, func(tx *Tx) error { return tx.UpdateSignIn(f.ctx, &old) }); !errors.Is(err, signin.ErrStale) || old.Version != 1 {
			t.Errorf("an update of what was read before: %v", err)
		}

		// One link, one state: never two of them.
		twin := s
		twin.ID = id.New(id.SignIn)
		if err := f.Update(f.ctx, func(tx *Tx) error { return tx.InsertSignIn(f.ctx, twin) }); err == nil {
			t.Error("two sign-ins with one link")
		}
		twin.TokenHash = "t2"
		if err := f.Update(f.ctx, func(tx *Tx) error { return tx.InsertSignIn(f.ctx, twin) }); err == nil {
			t.Error("two sign-ins with one state")
		}

		count := func(agent identity.Ref) int {
			return must(f, func(tx *Tx) (int, error) { return tx.CountOpenSignIns(f.ctx, agent) })
		}
		if count(bot) != 1 || count(alice) != 0 {
			t.Errorf("open: %d, %d", count(bot), count(alice))
		}
		s.State = signin.Completed
		f.in(func(tx *Tx) error { return tx.UpdateSignIn(f.ctx, &s) })
		if count(bot) != 0 {
			t.Error("a completed one counts as open")
		}
		forget := func(before time.Time) (n int64) {
			f.in(func(tx *Tx) (err error) { n, err = tx.ForgetSignIns(f.ctx, before, 10); return err })
			return n
		}
		if n := forget(s.ExpiresAt); n != 0 {
			t.Errorf("forgot %d that are not old", n)
		}
		if n := forget(s.ExpiresAt.Add(time.Microsecond)); n != 1 {
			t.Errorf("forgot %d", n)
		}
	})
}
