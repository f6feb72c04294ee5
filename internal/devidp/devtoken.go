package devidp

import (
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

const maxTokenLifetime = 24 * time.Hour

// tokenOrder asks for a token without any sign-in.
type tokenOrder struct {
	kind        string // access: the user's, issued to the agent; id: the same sign-in's ID token; agent: the agent's own
	user, agent string
	ttl         time.Duration
	act         bool // the access token also names the agent in `act` (RFC 8693 §4.1)
}

// AccessToken is the access token that the agent would get if the user signed
// in to it. A ttl of zero means five minutes.
func (p *Provider) AccessToken(user, agent string, ttl time.Duration) (string, error) {
	return p.fill(tokenOrder{user: user, agent: agent, ttl: ttl})
}

// devToken prints a token for a pasted command line; the parameters are the
// fields of tokenOrder:
//
//	curl -H "Authorization: Bearer $(curl -s "$ISSUER/dev/token?user=alice&agent=sales-agent&ttl=1h")" …
func (p *Provider) devToken(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	order, err := parseTokenOrder(r.URL.Query())
	var token string
	if err == nil {
		token, err = p.fill(order)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = io.WriteString(w, token) //nolint:gosec // G705: a JWT of our own, as text/plain
}

func parseTokenOrder(q url.Values) (tokenOrder, error) {
	order := tokenOrder{
		kind:  q.Get("kind"),
		user:  q.Get("user"),
		agent: q.Get("agent"),
		act:   q.Get("act") == "true",
	}
	if ttl := q.Get("ttl"); ttl != "" {
		var err error
		if order.ttl, err = time.ParseDuration(ttl); err != nil {
			return tokenOrder{}, fmt.Errorf("ttl: %w", err)
		}
	}
	return order, nil
}

func (p *Provider) fill(order tokenOrder) (string, error) {
	if order.ttl == 0 {
		order.ttl = tokenLifetime
	}
	if order.ttl < time.Second || order.ttl > maxTokenLifetime {
		return "", fmt.Errorf("ttl %v is not between 1s and %v", order.ttl, maxTokenLifetime)
	}
	agent, err := p.knownAgent(order.agent)
	if err != nil {
		return "", err
	}
	if order.kind == "agent" {
		return p.agentToken(agent, order.ttl)
	}
	user, err := p.knownUser(order.user)
	if err != nil {
		return "", err
	}
	switch order.kind {
	case "", "access":
		var act *actor
		if order.act {
			act = &actor{Subject: agent.ID}
		}
		return p.userToken(agent, user, strings.Join(scopes, " "), order.ttl, act)
	case "id":
		return p.tokens.signID(idClaims{
			registered: registered{Subject: user.ID, Audience: agent.ID},
			profile:    profileOf(user),
			AuthTime:   time.Now().Unix(),
			ACR:        grantedACR(""),
		}, order.ttl)
	default:
		return "", fmt.Errorf("unknown kind %q; known: access, id, agent", order.kind)
	}
}

func (p *Provider) user(id string) (User, bool) {
	i := slices.IndexFunc(p.users, func(u User) bool { return u.ID == id })
	if i < 0 {
		return User{}, false
	}
	return p.users[i], true
}

func (p *Provider) knownUser(id string) (User, error) {
	if u, ok := p.user(id); ok {
		return u, nil
	}
	var known []string
	for _, u := range p.users {
		known = append(known, u.ID)
	}
	return User{}, fmt.Errorf("unknown user %q; known: %s", id, strings.Join(known, ", "))
}

// knownAgent leaves out Writ's own client: nobody acts for a user by it.
func (p *Provider) knownAgent(id string) (client, error) {
	var known []string
	for _, c := range p.clients {
		if !c.may(grantCredentials) {
			continue
		}
		if c.ID == id {
			return c, nil
		}
		known = append(known, c.ID)
	}
	return client{}, fmt.Errorf("unknown agent %q; known: %s", id, strings.Join(known, ", "))
}
