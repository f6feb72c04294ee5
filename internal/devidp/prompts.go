package devidp

import (
	"errors"
	"slices"
	"time"
)

// Status is where a prompt stands.
type Status string

// The statuses; all but Pending are final.
const (
	Pending  Status = "pending"
	Approved Status = "approved"
	Denied   Status = "denied"
	Expired  Status = "expired"
)

// Prompt is one question on a user's phone. Its ID is of no use at the token
// endpoint.
type Prompt struct {
	ID         string
	User       string // User.ID
	Client     string // who asks
	Message    string // the binding message, may be empty
	ACRValues  []string
	Status     Status
	CreatedAt  time.Time
	ExpiresAt  time.Time
	AnsweredAt time.Time // zero until approved or denied
}

// The reasons for which Answer refuses.
var (
	ErrUnknownPrompt = errors.New("no such prompt")
	ErrPromptEnded   = errors.New("prompt has been answered or has expired")
)

const (
	maxPrompts = 128
	// pollBackoff is what slow_down adds to the interval, for good (CIBA Core §11).
	pollBackoff = 5 * time.Second
	// pollGrace forgives a poll that was sent in time but travelled faster than
	// the one before.
	pollGrace = 100 * time.Millisecond
)

// prompt is a Prompt and the asking client's side of it. state.mu guards it.
type prompt struct {
	Prompt
	authReqID string
	user      User
	scope     string
	interval  time.Duration
	polledAt  time.Time
	redeemed  bool
}

func (q *prompt) expired(now time.Time) bool { return !now.Before(q.ExpiresAt) }

// live holds while somebody waits for the prompt: the user's answer or the
// client's poll can still change it.
func (q *prompt) live(now time.Time) bool {
	return !q.redeemed && q.Status != Denied && !q.expired(now)
}

// view is what the phone shows.
func (q *prompt) view(now time.Time) Prompt {
	v := q.Prompt
	if v.Status == Pending && q.expired(now) {
		v.Status = Expired
	}
	return v
}

// addPrompt forgets the oldest prompt that has ended if there are too many.
func (s *state) addPrompt(q *prompt) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.prompts) >= maxPrompts {
		now := time.Now()
		i := slices.IndexFunc(s.prompts, func(old *prompt) bool { return !old.live(now) })
		if i < 0 {
			return errBusy
		}
		s.prompts = slices.Delete(s.prompts, i, i+1)
	}
	s.prompts = append(s.prompts, q)
	return nil
}

// poll returns an approved prompt once (CIBA Core §11).
func (s *state) poll(clientID, authReqID string) (prompt, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.prompts, func(q *prompt) bool { return sameSecret(q.authReqID, authReqID) })
	if i < 0 || s.prompts[i].Client != clientID || s.prompts[i].redeemed {
		return prompt{}, badRequest("invalid_grant", "the auth_req_id is unknown, used or another client's")
	}
	q, now := s.prompts[i], time.Now()
	switch {
	case q.Status == Denied:
		return prompt{}, badRequest("access_denied", "the user denied the request")
	case q.expired(now):
		return prompt{}, badRequest("expired_token", "the auth_req_id has expired")
	case q.Status == Approved:
		q.redeemed = true
		return *q, nil
	}
	tooFast := now.Sub(q.polledAt) < q.interval-pollGrace
	q.polledAt = now
	if tooFast {
		q.interval += pollBackoff
		return prompt{}, badRequest("slow_down", "polls must be five seconds further apart from now on")
	}
	return prompt{}, badRequest("authorization_pending", "the user has not answered yet")
}

func (s *state) answer(id string, approve bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.prompts, func(q *prompt) bool { return q.ID == id })
	if i < 0 {
		return ErrUnknownPrompt
	}
	q, now := s.prompts[i], time.Now()
	if q.view(now).Status != Pending {
		return ErrPromptEnded
	}
	q.Status, q.AnsweredAt = Denied, now
	if approve {
		q.Status = Approved
	}
	return nil
}

// Prompts are the remembered prompts, oldest first.
func (p *Provider) Prompts() []Prompt {
	p.state.mu.Lock()
	defer p.state.mu.Unlock()
	now := time.Now()
	views := make([]Prompt, 0, len(p.state.prompts))
	for _, q := range p.state.prompts {
		views = append(views, q.view(now))
	}
	return views
}

// Answer does what a tap on the phone does.
func (p *Provider) Answer(id string, approve bool) error {
	return p.state.answer(id, approve)
}
