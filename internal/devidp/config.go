package devidp

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"slices"
	"time"
)

// Config says who exists and where to listen. Only Audience is required.
type Config struct {
	Listen       string            // host:port, default "127.0.0.1:0"; the host is a loopback IP or "localhost"
	Audience     string            // aud of the agents' access tokens: Writ's resource identifier
	Users        []User            // default DefaultUsers
	Agents       []Agent           // default DefaultAgents
	CIBAClient   Client            // Writ's own client; ID, Secret and RedirectURIs have defaults
	PollInterval time.Duration     // CIBA's interval, whole seconds; default 1s, to keep the dev loop quick
	Key          *ecdsa.PrivateKey // P-256; default a fresh one
	Logger       *slog.Logger      // default discards
}

// A User can sign in and has a phone. ID is the `sub` of every token.
type User struct {
	ID     string
	Name   string
	Email  string
	Groups []string
}

// A Client is a confidential OAuth client. Redirect URIs match exactly, but for
// the port of an http loopback one, which may be any (RFC 8252 §7.3).
type Client struct {
	ID           string
	Secret       string // random when empty
	RedirectURIs []string
}

// An Agent is a client that acts for users and may also get a token of its own.
type Agent Client

// DefaultUsers are alice of sales, bob of hr and carol of finance.
func DefaultUsers() []User {
	return []User{
		{ID: "alice", Name: "Alice Archer", Email: "alice@example.com", Groups: []string{"sales"}},
		{ID: "bob", Name: "Bob Baker", Email: "bob@example.com", Groups: []string{"hr"}},
		{ID: "carol", Name: "Carol Cole", Email: "carol@example.com", Groups: []string{"finance"}},
	}
}

// DefaultAgents are one agent for the work of each of DefaultUsers.
func DefaultAgents() []Agent {
	return []Agent{{ID: "sales-agent"}, {ID: "hr-agent"}, {ID: "finance-agent"}}
}

// defaultRedirectURIs let a client that names none receive codes on this machine.
var defaultRedirectURIs = []string{
	"http://127.0.0.1/callback", "http://[::1]/callback", "http://localhost/callback",
}

func (c Config) withDefaults() Config {
	if c.Listen == "" {
		c.Listen = "127.0.0.1:0"
	}
	if c.Users == nil {
		c.Users = DefaultUsers()
	}
	if c.Agents == nil {
		c.Agents = DefaultAgents()
	}
	if c.CIBAClient.ID == "" {
		c.CIBAClient.ID = "writ"
	}
	if c.PollInterval == 0 {
		c.PollInterval = time.Second
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	c.CIBAClient = c.CIBAClient.withDefaults()
	c.Agents = slices.Clone(c.Agents)
	for i, a := range c.Agents {
		c.Agents[i] = Agent(Client(a).withDefaults())
	}
	return c
}

func (c Client) withDefaults() Client {
	if c.Secret == "" {
		c.Secret = newSecret()
	}
	if c.RedirectURIs == nil {
		c.RedirectURIs = defaultRedirectURIs
	}
	return c
}

// validate wants defaults filled in.
func (c Config) validate() error {
	if c.Audience == "" {
		return errors.New("audience is empty: access tokens must name the resource they are for")
	}
	if c.PollInterval < time.Second || c.PollInterval%time.Second != 0 {
		return fmt.Errorf("poll interval %v: CIBA counts it in whole seconds, one or more", c.PollInterval)
	}
	if c.Key != nil && c.Key.Curve != elliptic.P256() {
		return errors.New("signing key is not on P-256, which ES256 needs")
	}

	// Users and clients share one name space: a token whose sub is a client_id
	// speaks for the client itself (RFC 9068 §5).
	names := map[string]bool{}
	claim := func(kind, id string) error {
		if id == "" || names[id] {
			return fmt.Errorf("%s id %q is empty or taken", kind, id)
		}
		names[id] = true
		return nil
	}
	for _, u := range c.Users {
		if err := claim("user", u.ID); err != nil {
			return err
		}
	}
	for _, client := range c.clients() {
		if err := claim("client", client.ID); err != nil {
			return err
		}
		for _, uri := range client.RedirectURIs {
			if err := checkRedirectURI(uri); err != nil {
				return fmt.Errorf("client %s: %w", client.ID, err)
			}
		}
	}
	return nil
}

// checkRedirectURI wants an absolute http(s) URI without a fragment (RFC 6749 §3.1.2).
func checkRedirectURI(uri string) error {
	u, err := url.Parse(uri)
	if err != nil {
		return fmt.Errorf("redirect URI: %w", err)
	}
	if (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" || u.User != nil || u.Fragment != "" {
		return fmt.Errorf("redirect URI %q is not an absolute http(s) one without user and fragment", uri)
	}
	return nil
}
