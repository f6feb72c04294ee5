package client

import (
	"context"
	"net/http"
	"time"
)

// SignInRequired is the error of a session that needs its user first. Bring the user
// to URL, in a browser; then complete with the code that they bring back, or that comes
// to the redirect URI.
type SignInRequired struct {
	ID        string    `json:"id"`
	URL       string    `json:"url"` // whoever has it can start the sign-in: don't log it
	ExpiresAt time.Time `json:"expires_at"`
}

func (s *SignInRequired) Error() string { return "writ: the user has to sign in (" + s.ID + ")" }

// CompleteSignIn opens the session that the user consented to: its task and envelope are
// the user's word. An *Error with the code login_required says that they have not
// consented yet, forbidden that they declined, not_found that the sign-in is over.
func (c *Client) CompleteSignIn(ctx context.Context, id, code string) (*Session, error) {
	type signIn struct {
		ID   string `json:"id"`
		Code string `json:"code"`
	}
	s := new(Session)
	if err := c.call(ctx, http.MethodPost, "/sessions", nil, map[string]signIn{"sign_in": {id, code}}, s); err != nil {
		return nil, err
	}
	return s, nil
}
