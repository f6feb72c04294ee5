package minter

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/strictjson"
)

// recall is what is kept of the tokens of a lease: they are revoked by showing them.
// Where nothing revokes them, none is kept, but still when they end: a lease without
// a recall is one whose token never arrived.
type recall struct {
	Tokens []recalled `json:"tokens,omitempty"`
	// Until is when all of them have ended by themselves, in seconds since 1970; zero:
	// nobody knows.
	Until int64 `json:"until,omitempty"`
}

type recalled struct {
	Token string `json:"token"`
	Hint  string `json:"hint"` // token_type_hint
}

func (t recalled) form() map[string]string {
	return map[string]string{"token": t.Token, "token_type_hint": t.Hint}
}

func (r recall) String() string {
	b, err := json.Marshal(r)
	if err != nil {
		return "" // of strings and a number it does not fail
	}
	return string(b)
}

// recall keeps a refresh token too, before the access token, which may end with it. How
// long a refresh token is good nobody knows, nor what lives maxLife or longer.
func (m *OAuth) recall(a answer, l lease.Lease, received time.Time) (r recall) {
	if m.Revocation != nil {
		if a.refresh != "" {
			r.Tokens = append(r.Tokens, recalled{a.refresh, "refresh_token"})
		}
		if a.token != "" {
			r.Tokens = append(r.Tokens, recalled{a.token, "access_token"})
		}
	}
	life, known := a.life, a.life > 0 && a.life < maxLife
	switch {
	case life > 0:
	case m.EndsWithAssertion:
		life, known = max(0, l.ExpiresAt.Sub(received)), true
	default:
		life, known = m.TokenTTL, m.TokenTTL > 0
	}
	if known && a.refresh == "" {
		r.Until = received.Add(life + time.Second - 1).Unix()
	}
	return r
}

// undo tries to end what can't be used. If it fails, Unmake goes on.
func (m *OAuth) undo(ctx context.Context, kept string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
	defer cancel()
	var r recall
	if kept == "" || json.Unmarshal([]byte(kept), &r) != nil {
		return
	}
	for _, t := range r.Tokens {
		_, _ = m.revoke(ctx, t, r)
	}
}

const unmakers = 8 // revocations under way at one target

// Unmake implements lease.Target. It knows of a token only what it can see: that the
// target revoked it, that introspection says so, or that its time is over.
func (m *OAuth) Unmake(ctx context.Context, leases []lease.Lease) ([]lease.Unmade, error) {
	out := make([]lease.Unmade, len(leases))
	var away, answered atomic.Int32
	var g errgroup.Group
	g.SetLimit(unmakers)
	for i, l := range leases {
		r, seen, err := m.byTime(l)
		if seen != "" || err != nil {
			out[i] = unmade(seen, err)
			continue
		}
		g.Go(func() error {
			if answered.Load() == 0 && away.Load() >= unmakers { // the rest need not wait for the same
				out[i] = unmade("", errAway)
				return nil
			}
			seen, err := m.revokeAll(ctx, r)
			if _, down := errors.AsType[unavailable](err); down {
				away.Add(1)
			} else {
				answered.Add(1)
			}
			out[i] = unmade(seen, err)
			return nil
		})
	}
	_ = g.Wait() // none fails
	for _, u := range out {
		if _, down := errors.AsType[unavailable](u.Err); !down {
			return out, nil
		}
	}
	if len(out) > 0 {
		return nil, out[0].Err
	}
	return out, nil
}

func unmade(seen string, err error) lease.Unmade {
	if err != nil {
		return lease.Unmade{Err: fmt.Errorf("unmake oauth: %w", err)}
	}
	return lease.Unmade{Seen: map[string]any{"end": seen}}
}

var errAway = unavailable{errors.New("the target could not be used")}

// How the end of a token was seen.
const (
	seenExpired      = "expired"
	seenRevoked      = "revoked"      // the target's answer to the revocation
	seenIntrospected = "introspected" // and it says so when asked
	// leftToExpire is no end: nothing can be done about a token that ends with its lease.
	leftToExpire = "left_to_expire"
)

// byTime is what can be said of a lease without its target: "" where that has to be asked.
func (m *OAuth) byTime(l lease.Lease) (r recall, seen string, err error) {
	if l.Recall != "" {
		if err := json.Unmarshal([]byte(l.Recall), &r); err != nil {
			return r, "", errors.New("what was kept of the token can't be read")
		}
	}
	until := m.over(l, r)
	switch {
	case !until.IsZero() && !m.Now().Before(until):
		return r, seenExpired, nil
	case len(r.Tokens) > 0:
		return r, "", nil
	case until.IsZero():
		return r, "", errors.New("there is nothing to revoke the token by, and nobody knows how long it is good")
	case l.Revocability == lease.RevocableExpiry && !until.After(l.ExpiresAt):
		return r, leftToExpire, nil // the lease is not over before its time is
	}
	return r, "", later{until, "there is nothing to revoke the token by, and it can be good"}
}

func (m *OAuth) revokeAll(ctx context.Context, r recall) (seen string, err error) {
	for _, t := range r.Tokens {
		if seen, err = m.revoke(ctx, t, r); err != nil {
			return "", err
		}
	}
	return seen, nil
}

// over is when a lease's tokens have ended by themselves, zero where nobody knows. A
// token of which nothing was kept was made before the deadline, if at all.
func (m *OAuth) over(l lease.Lease, r recall) time.Time {
	if l.Recall != "" {
		if r.Until == 0 {
			return time.Time{}
		}
		return time.Unix(r.Until, 0).UTC()
	}
	deadline := l.MintDeadline
	if deadline.IsZero() {
		deadline = l.CreatedAt.Add(lease.MintTime)
	}
	until := l.ExpiresAt
	if made := deadline.Add(m.TokenTTL); made.After(until) {
		until = made
	}
	return until.UTC()
}

// revoke ends one token (RFC 7009 §2) and looks whether it has ended.
func (m *OAuth) revoke(ctx context.Context, t recalled, r recall) (seen string, err error) {
	if m.Revocation == nil {
		return "", errors.New("the minter has no revocation any more")
	}
	endpoint, err := m.endpoint(ctx, m.Revocation.Endpoint, func(md *oauthMetadata) string { return md.Revocation })
	if err != nil {
		return "", err
	}
	_, err = m.ask(ctx, &m.revoking, question{endpoint: endpoint, form: t.form()})
	if errors.Is(err, errNotJSON) {
		err = nil // the body of a success means nothing (RFC 7009 §2.2)
	}
	unknown := unknownToken(err)
	switch {
	case err != nil && !unknown:
		return "", fmt.Errorf("revoke: %w", err)
	case m.Introspection != "":
		return seenIntrospected, m.inactive(ctx, t)
	case unknown && r.Until > 0:
		return "", later{time.Unix(r.Until, 0).UTC(), "the target does not know the token, and has nothing to verify that by; it can be good"}
	case unknown:
		return "", fmt.Errorf("revoke: %w, and there is nothing to verify that by", err)
	}
	return seenRevoked, nil
}

// unknownToken says that a target knows no such token. By RFC 7009 it would have said
// 200; what it says instead may be about something else, such as a wrong address.
func unknownToken(err error) bool {
	r, ok := errors.AsType[refused](err)
	if !ok {
		return false
	}
	return r.status == http.StatusNotFound || r.status == http.StatusGone || r.status == http.StatusBadRequest && r.code == "invalid_token"
}

// inactive asks whether a token has ended (RFC 7662 §2).
func (m *OAuth) inactive(ctx context.Context, t recalled) error {
	body, err := m.ask(ctx, &m.revoking, question{endpoint: m.Introspection, form: t.form()})
	if err != nil {
		return fmt.Errorf("introspect: %w", err)
	}
	all, err := strictjson.Object(body)
	if err != nil {
		return errors.New("introspect: the target's answer is not one JSON object")
	}
	switch active, ok := all["active"].(bool); {
	case !ok:
		return errors.New("introspect: the target's answer does not say whether the token is active")
	case active:
		return errors.New("the target accepted the revocation, but still calls the token active")
	}
	return nil
}
