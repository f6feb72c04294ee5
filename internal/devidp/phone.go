package devidp

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"time"
)

const (
	// idleRefresh is how soon a phone without a prompt looks again.
	idleRefresh = 2 * time.Second
	// shownAnswers is how many ended prompts a phone lists.
	shownAnswers = 5
)

type phonePage struct {
	CSRF    string
	Filter  string // a user's id, or empty for all
	Users   []User
	Pending []card
	Ended   []card // latest first
	Refresh int    // seconds
	Reload  string // this page's address
}

// card is a prompt as a person reads it.
type card struct {
	Prompt
	Name   string
	Left   string
	Action string
}

// showPhone lists the pending prompts and the last answered ones, of one user or
// of all. The page carries no script; it looks for prompts by reloading itself,
// but only while it has none: once there is something to answer it holds still,
// so that no reload comes between a finger and its button or makes a screen
// reader start over. It reloads then when the last prompt has expired.
func (p *Provider) showPhone(w http.ResponseWriter, r *http.Request) {
	filter := r.URL.Query().Get("user")
	if filter != "" {
		if _, err := p.knownUser(filter); err != nil {
			p.showMessage(w, r, http.StatusNotFound, fmt.Sprintf("No phone here: %v.", err))
			return
		}
	}
	p.render(w, r, "phone.html", page{}, p.phonePage(filter, p.csrf.token(w, r)))
}

func (p *Provider) phonePage(filter, csrfToken string) phonePage {
	shown := phonePage{CSRF: csrfToken, Filter: filter, Users: p.users, Reload: phonePath("", filter)}
	now, refresh := time.Now(), idleRefresh
	for _, q := range p.Prompts() {
		if filter != "" && q.User != filter {
			continue
		}
		c := card{Prompt: q, Name: p.nameOf(q.User), Action: phonePath(q.ID, filter)}
		if q.Status != Pending {
			shown.Ended = append(shown.Ended, c)
			continue
		}
		left := q.ExpiresAt.Sub(now)
		c.Left = inWords(left)
		shown.Pending = append(shown.Pending, c)
		refresh = max(refresh, left+time.Second)
	}
	slices.Reverse(shown.Ended)
	shown.Ended = shown.Ended[:min(len(shown.Ended), shownAnswers)]
	shown.Refresh = int(refresh / time.Second)
	return shown
}

// answerOnPhone takes a tap on Approve or Deny.
func (p *Provider) answerOnPhone(w http.ResponseWriter, r *http.Request) {
	if !p.csrf.valid(r) {
		p.showMessage(w, r, http.StatusForbidden, "This page is too old. Nothing was answered; go back to the phone and try again.")
		return
	}
	verdict := r.PostFormValue("verdict")
	if verdict != "approve" && verdict != "deny" {
		p.showMessage(w, r, http.StatusBadRequest, "The verdict must be approve or deny. Nothing was answered.")
		return
	}
	err := p.Answer(r.PathValue("prompt"), verdict == "approve")
	switch {
	case errors.Is(err, ErrUnknownPrompt):
		p.showMessage(w, r, http.StatusNotFound, "This prompt does not exist, or is long over.")
	case errors.Is(err, ErrPromptEnded):
		p.showMessage(w, r, http.StatusConflict, "Too late: this prompt has been answered or has expired.")
	default:
		p.log.InfoContext(r.Context(), "prompt answered on the phone page", slog.String("verdict", verdict))
		http.Redirect(w, r, phonePath("", r.URL.Query().Get("user")), http.StatusSeeOther)
	}
}

func phonePath(prompt, filter string) string {
	u := url.URL{Path: "/phone"}
	if prompt != "" {
		u.Path += "/" + prompt
	}
	if filter != "" {
		u.RawQuery = url.Values{"user": {filter}}.Encode()
	}
	return u.String()
}

func (p *Provider) nameOf(id string) string {
	if u, ok := p.user(id); ok && u.Name != "" {
		return u.Name
	}
	return id
}

// inWords is a duration to be read aloud.
func inWords(d time.Duration) string {
	seconds := int(d.Round(time.Second) / time.Second)
	if seconds < 60 {
		return fmt.Sprintf("%d s", seconds)
	}
	return fmt.Sprintf("%d min %d s", seconds/60, seconds%60)
}
