// Package config reads Writ's one YAML file. It is strict: an unknown key, a
// wrong type or an impossible value is an error with file, line, key and what
// was expected, and every such error of a file is reported at once. Secrets are
// never in the file, only the names of the files that hold them.
package config

import (
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Config is the whole configuration of `writ serve`.
type Config struct {
	// Listen is the address of the API, host:port.
	Listen string `yaml:"listen"`
	// OpsListen is the address of /livez, /readyz and /metrics.
	OpsListen string `yaml:"ops_listen"`
	// ExternalURL is where callers reach the API. It is the issuer of the tokens
	// that Writ mints.
	ExternalURL string `yaml:"external_url"`
	// TLS serves HTTPS. Without it, Listen must be loopback or BehindProxy true.
	TLS *TLS `yaml:"tls"`
	// BehindProxy states that a proxy terminates TLS in front of Listen.
	BehindProxy bool `yaml:"behind_proxy"`
	// ProxyClientCert states that this proxy passes the TLS client's certificate in the
	// header Client-Cert (RFC 9440), and lets no such header of a client through.
	ProxyClientCert bool `yaml:"proxy_client_cert"`
	// Store is where state lives: sqlite:PATH, or postgres://… for several replicas.
	Store string `yaml:"store"`
	// StorePasswordFile holds the password of the PostgreSQL role.
	StorePasswordFile string `yaml:"store_password_file"`
	// StoreConnections bounds the connections to PostgreSQL.
	StoreConnections int `yaml:"store_connections"`
	// Durability of a commit to SQLite: disk, or os, which survives a killed process
	// but not a power loss.
	Durability string `yaml:"durability"`
	// RootKeyFile holds 32 random bytes in base64. They encrypt every other key.
	RootKeyFile string `yaml:"root_key_file"`

	Policy    Policy            `yaml:"policy"`
	Sessions  Sessions          `yaml:"sessions"`
	Issuers   []Issuer          `yaml:"issuers"`
	Agents    []AgentEntry      `yaml:"agents"`
	Minters   map[string]Minter `yaml:"minters"`
	Services  []Service         `yaml:"services"`
	Signing   Signing           `yaml:"signing"`
	Leases    Leases            `yaml:"leases"`
	Approvals Approvals         `yaml:"approvals"`
	Audit     Audit             `yaml:"audit"`
	Retention Retention         `yaml:"retention"`
	Log       Log               `yaml:"log"`
}

// TLS names a certificate chain and its key, both PEM.
type TLS struct {
	CertFile string `yaml:"cert_file"`
	KeyFile  string `yaml:"key_file"`
	// ClientCerts asks clients for a certificate, for tokens that are bound to one.
	ClientCerts bool `yaml:"client_certs"`
}

// Policy says where the Rego comes from and how it is asked.
type Policy struct {
	// Path is a directory of Rego and data, or a bundle file (.tar.gz).
	Path string `yaml:"path"`
	// Query is the one document that a decision evaluates.
	Query string `yaml:"query"`
	// AdminQuery is the document that says what an operator may do.
	AdminQuery string `yaml:"admin_query"`
	// Deadline bounds one evaluation.
	Deadline time.Duration `yaml:"deadline"`
	// Reload is how often Path is checked for a change; zero never.
	Reload time.Duration `yaml:"reload"`
	// Signature, when set, refuses a bundle that it does not verify.
	Signature *Signature `yaml:"signature"`
}

// Signature verifies a bundle by OPA's bundle signing.
type Signature struct {
	// PublicKeyFile is a PEM public key.
	PublicKeyFile string `yaml:"public_key_file"`
	// Algorithm is the JWS algorithm, such as ES256.
	Algorithm string `yaml:"algorithm"`
	// KeyID is the keyid that the bundle was signed under.
	KeyID string `yaml:"key_id"`
}

// Sessions bounds how long sessions live and how they start.
type Sessions struct {
	// OpenOnDecide lets POST /decide without a session open one.
	OpenOnDecide bool `yaml:"open_on_decide"`
	// DefaultAge is the life of a session whose opener names none.
	DefaultAge time.Duration `yaml:"default_age"`
	// MaxAge is the longest life that an opener can ask for.
	MaxAge time.Duration `yaml:"max_age"`
	// Idle is how long a session lives without a decision; zero, as long as its age.
	Idle time.Duration `yaml:"idle"`
	// Window is how long labels and counters stay on a pair of user and agent.
	Window time.Duration `yaml:"window"`
}

// Issuer is an identity provider that Writ believes, and about whom.
type Issuer struct {
	// Issuer is the exact iss of its tokens.
	Issuer string `yaml:"issuer"`
	// SpeaksFor lists the principals that it may name.
	SpeaksFor []Principal `yaml:"speaks_for"`
	// Token is the kind of its tokens: access_token (default), jwt, jwt_svid, kubernetes
	// or private_key_jwt.
	Token string `yaml:"token"`
	// TrustDomain is whose JWT-SVIDs it issues.
	TrustDomain string `yaml:"trust_domain"`
	// Audience is what its tokens must be meant for: Writ.
	Audience string `yaml:"audience"`
	// Algorithms lists the JWS algorithms it may sign with.
	Algorithms []string `yaml:"algorithms"`
	// JWKSFile holds its keys, for a Writ that can't reach it. By default they are
	// found by OpenID Connect discovery.
	JWKSFile string `yaml:"jwks_file"`
	// JWKSURL is where its keys are, for an issuer without discovery.
	JWKSURL string `yaml:"jwks_url"`
	// Claims names claims that are not the standard ones.
	Claims Claims `yaml:"claims"`
	// Match holds claims to globs: a token that does not match is refused.
	Match map[string]string `yaml:"match"`
	// UserMatch tells the tokens of users from those that clients have of their own.
	UserMatch map[string]string `yaml:"user_match"`
	// MaxAge is how long after iat a token is good at most.
	MaxAge time.Duration `yaml:"max_age"`
	// SenderConstraint, when set, wants tokens bound to a key by dpop or mtls.
	SenderConstraint []string `yaml:"sender_constraint"`
	// DPoPNonce wants a nonce of Writ's in DPoP proofs.
	DPoPNonce bool `yaml:"dpop_nonce"`
	// IDTokenClients lists the clients whose ID tokens are believed as subject_token.
	IDTokenClients []string `yaml:"id_token_clients"`
	// ClockLeeway is how far its clock may differ when iat and nbf are checked.
	ClockLeeway time.Duration `yaml:"clock_leeway"`
	// Operator says which of its subjects are operators.
	Operator *Operators `yaml:"operator"`
	// CIBA reaches its users out of band.
	CIBA *CIBA `yaml:"ciba"`
	// Signals takes its security events.
	Signals *Signals `yaml:"signals"`
	// SignIn lets its users sign in on Writ's own pages.
	SignIn *SignIn `yaml:"sign_in"`
}

// Signals makes Writ a receiver of security events (Shared Signals, RFC 8935).
type Signals struct {
	// Audience is what the events must be meant for.
	Audience string `yaml:"audience"`
	// Subjects is the issuer whose subjects they are about, by default the transmitter.
	Subjects string `yaml:"subjects"`
}

// Principal is a kind of identity.
type Principal string

// The principals that an issuer can speak for.
const (
	User     Principal = "user"
	Agent    Principal = "agent"
	Operator Principal = "operator"
	// ServicePrincipal is a resource server that shows a token of its own.
	ServicePrincipal Principal = "service"
)

// UnmarshalText accepts the four kinds only.
func (p *Principal) UnmarshalText(b []byte) error {
	switch v := Principal(b); v {
	case User, Agent, Operator, ServicePrincipal:
		*p = v
		return nil
	}
	return fmt.Errorf("is %q, expected user, agent, operator or service", b)
}

// AgentEntry is what Writ has to know of an agent besides its tokens.
type AgentEntry struct {
	// Issuer and ID are what policies know it as.
	Issuer string `yaml:"issuer"`
	ID     string `yaml:"id"`
	// Identities are others of the same agent, such as its service account.
	Identities []Subject `yaml:"identities"`
	// RedirectURIs lists where a sign-in that it asked for may end.
	RedirectURIs []string `yaml:"redirect_uris"`
}

// Claims names claims; one that begins with a slash is a JSON pointer.
type Claims struct {
	// Subject names whom a token is about, by default sub.
	Subject string `yaml:"subject"`
	// Client names the OAuth client that a token was issued to, by default client_id or
	// else azp.
	Client string `yaml:"client"`
}

// Operators are the subjects whose token has a claim that equals the value, or is
// a list that holds it.
type Operators struct {
	Claim string `yaml:"claim"`
	Value string `yaml:"value"`
	// Clients lists the OAuth clients that operators use. It is needed where the
	// issuer speaks for agents too: an agent acting for an operator is no operator.
	Clients []string `yaml:"clients"`
}

// CIBA makes Writ a client of an issuer's backchannel authentication endpoint.
type CIBA struct {
	ClientID         string `yaml:"client_id"`
	ClientSecretFile string `yaml:"client_secret_file"`
	// ClientAuth is client_secret_basic (default) or client_secret_post.
	ClientAuth string `yaml:"client_auth"`
	// LoginHint is a template of the hint that names the user, such as "{sub}".
	LoginHint string `yaml:"login_hint"`
	// Algorithms lists the JWS algorithms of its ID tokens.
	Algorithms []string `yaml:"id_token_algorithms"`
	// BindingMessage is what the provider can show.
	BindingMessage BindingMessage `yaml:"binding_message"`
	// Timeout bounds one request to the provider. A provider may hold a poll, for
	// which CIBA Core §10.1 advises 30 s.
	Timeout time.Duration `yaml:"timeout"`
}

// BindingMessage describes the text that a provider shows on the phone.
type BindingMessage struct {
	// MaxLength is in characters.
	MaxLength int `yaml:"max_length"`
	// Charset is portable (letters, digits and +._#-) or text (printable ASCII).
	Charset string `yaml:"charset"`
}

// SignIn makes Writ a client of an issuer's authorization endpoint (OpenID Connect
// Core §3.1), with the redirect URI ExternalURL/callback.
type SignIn struct {
	ClientID         string `yaml:"client_id"`
	ClientSecretFile string `yaml:"client_secret_file"`
	// ClientAuth is client_secret_basic (default) or client_secret_post.
	ClientAuth string `yaml:"client_auth"`
	// Scopes are asked for; openid is one of them.
	Scopes []string `yaml:"scopes"`
}

// Minter makes credentials of one kind for one target. The kind is the one block that
// stands.
type Minter struct {
	// MaxTTL is the longest that a credential can live.
	MaxTTL time.Duration `yaml:"max_ttl"`
	// MaxActive is how many may be out at a time; zero is no bound.
	MaxActive int `yaml:"max_active"`
	// JWT makes access tokens that Writ signs.
	JWT *JWTMinter `yaml:"jwt"`
	// OAuth gets tokens of a target's own authorization server.
	OAuth *OAuth `yaml:"oauth"`
	// Postgres makes roles of a database.
	Postgres *Postgres `yaml:"postgres"`
}

// kinds lists the blocks that stand.
func (m Minter) kinds() (set []string) {
	if m.JWT != nil {
		set = append(set, "jwt")
	}
	if m.OAuth != nil {
		set = append(set, "oauth")
	}
	if m.Postgres != nil {
		set = append(set, "postgres")
	}
	return set
}

// JWTMinter makes access tokens (RFC 9068) for one resource server.
type JWTMinter struct {
	// Audience is the resource server that the credential is for.
	Audience string `yaml:"audience"`
	// Scopes is the most that a credential can carry.
	Scopes []string `yaml:"scopes"`
	// EnforcesDetails states that the audience checks authorization_details, which
	// makes the credential good for the exact act only.
	EnforcesDetails bool `yaml:"enforces_details"`
	// Checks states how the audience learns that a token was revoked before its time:
	// introspection of every token, status_list, or none.
	Checks string `yaml:"checks"`
}

// Leases bounds how many credentials may be out at a time; zero is no bound.
type Leases struct {
	PerSession int `yaml:"per_session"`
	PerUser    int `yaml:"per_user"`
	PerAgent   int `yaml:"per_agent"`
}

// Service is a resource server that may introspect tokens of its own audience.
type Service struct {
	ID         string `yaml:"id"`
	SecretFile string `yaml:"secret_file"`
	// Subject is whom its token names, instead of a secret.
	Subject  *Subject `yaml:"subject"`
	Audience string   `yaml:"audience"`
}

// Subject names one principal.
type Subject struct {
	Issuer string `yaml:"issuer"`
	ID     string `yaml:"id"`
}

// Approvals bounds the out-of-band approvals.
type Approvals struct {
	// ExpiresIn is how long a prompt stays open where policy says nothing.
	ExpiresIn time.Duration `yaml:"expires_in"`
	// UseWithin is how long a given approval can be used.
	UseWithin time.Duration `yaml:"use_within"`
	// MaxWait is the longest that a request is held for an answer.
	MaxWait time.Duration `yaml:"max_wait"`
	// MaxPending is how many prompts one person can have open at a time.
	MaxPending int `yaml:"max_pending"`
}

// Audit sets what the record keeps and where its heads are copied to.
type Audit struct {
	// Inputs says how much of what a decision was made on is kept; the first rule
	// whose pattern matches the action is in force, and without one all is kept.
	Inputs []InputRule `yaml:"inputs"`
	// Copies are second places for the signed heads of the log.
	Copies Copies `yaml:"copies"`
}

// InputRule says what is kept of the decisions on some actions.
type InputRule struct {
	// Actions are globs with "." as the separator, such as hr.**.
	Actions []string `yaml:"actions"`
	// Keep is whole, redacted or none.
	Keep string `yaml:"keep"`
}

// Copies names the second places.
type Copies struct {
	// Every is how often a head that is new is copied.
	Every time.Duration `yaml:"every"`
	// File is appended to; it should be on another machine.
	File string `yaml:"file"`
	// URL takes the heads by POST.
	URL string `yaml:"url"`
	// URLTokenFile holds the bearer token for URL.
	URLTokenFile string `yaml:"url_token_file"`
}

// Retention says how long records are kept that the log has too.
type Retention struct {
	// Records are ended sessions with their decisions, approvals and leases; zero
	// keeps them for ever.
	Records time.Duration `yaml:"records"`
	// Inputs are what decisions were made on; zero keeps them for ever.
	Inputs time.Duration `yaml:"inputs"`
}

// Log sets what is logged.
type Log struct {
	// Level is debug, info, warn or error.
	Level string `yaml:"level"`
}

// Default returns the values of the keys that a file leaves out.
func Default() Config {
	return Config{
		Listen:     "127.0.0.1:8180",
		OpsListen:  "127.0.0.1:8181",
		Durability: "disk", StoreConnections: 16,
		Policy:   Policy{Query: "data.writ.decision", AdminQuery: "data.writ.admin", Deadline: 100 * time.Millisecond},
		Sessions: Sessions{DefaultAge: time.Hour, MaxAge: 8 * time.Hour, Idle: 30 * time.Minute, Window: 24 * time.Hour},
		Leases:   Leases{PerSession: 100, PerUser: 500, PerAgent: 10_000},
		Approvals: Approvals{
			ExpiresIn: 5 * time.Minute, UseWithin: 2 * time.Minute,
			MaxWait: 2 * time.Minute, MaxPending: 5,
		},
		Audit: Audit{Copies: Copies{Every: time.Minute}},
		Log:   Log{Level: "info"},

		Signing: Signing{Algorithm: "ES256", RotateEvery: 30 * 24 * time.Hour},
	}
}

func (i *Issuer) setDefaults() {
	i.Token, i.ClockLeeway, i.MaxAge = "access_token", 30*time.Second, 24*time.Hour
}

func (m *Minter) setDefaults() { m.MaxTTL = 5 * time.Minute }

func (m *JWTMinter) setDefaults() { m.Checks = "none" }

func (c *CIBA) setDefaults() {
	c.ClientAuth, c.LoginHint, c.Timeout = "client_secret_basic", "{sub}", 40*time.Second
	c.BindingMessage = BindingMessage{MaxLength: 20, Charset: "portable"}
}

func (s *SignIn) setDefaults() {
	s.ClientAuth, s.Scopes = "client_secret_basic", []string{"openid"}
}

// Load reads and checks a file. File names in it are relative to its folder. The
// error joins every *Error found.
func Load(path string) (Config, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return Config{}, &Error{File: path, Text: "cannot be read: " + reason(err)}
	}
	return parse(path, data)
}

// LoadStore reads a file for what only works on the store: whatever else is wrong in it,
// or missing beside it, is no hindrance. It holds the kill switch.
func LoadStore(path string) (Config, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return Config{}, &Error{File: path, Text: "cannot be read: " + reason(err)}
	}
	d := &decoder{file: path, lines: map[string]int{}}
	cfg := Default()
	if d.decode(data, &cfg) {
		cfg.fill(filepath.Dir(path))
		cfg.checkStore(d.failKey)
		cfg.checkRootKey(d.failKey)
	}
	d.errs = slices.DeleteFunc(d.errs, func(e *Error) bool {
		key, _, _ := strings.Cut(e.Key, "[")
		return e.Key != "" && !slices.Contains([]string{"store", "store_password_file", "store_connections", "durability", "root_key_file", "agents"}, key)
	})
	return cfg, d.err()
}

func parse(path string, data []byte) (Config, error) {
	d := &decoder{file: path, lines: map[string]int{}}
	cfg := Default()
	if d.decode(data, &cfg) {
		cfg.fill(filepath.Dir(path))
		cfg.check(d.failKey)
	}
	return cfg, d.err()
}

// Secret reads a file that holds one secret and drops the line end after it.
func Secret(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("read secret: %w", err)
	}
	for len(b) > 0 && (b[len(b)-1] == '\n' || b[len(b)-1] == '\r') {
		b = b[:len(b)-1]
	}
	if len(b) == 0 {
		return "", fmt.Errorf("read secret: %s is empty", path)
	}
	return string(b), nil
}

// rootKeySize is in bytes.
const rootKeySize = 32

// RootKey reads a file that holds the root key, 32 bytes in base64.
func RootKey(path string) (key [rootKeySize]byte, err error) {
	text, err := Secret(path)
	if err != nil {
		return key, err
	}
	raw, err := base64.StdEncoding.DecodeString(text)
	if err != nil || len(raw) != rootKeySize {
		return key, fmt.Errorf("read secret: %s does not hold %d random bytes in base64 (make them with: head -c %d /dev/urandom | base64)",
			path, rootKeySize, rootKeySize)
	}
	return [rootKeySize]byte(raw), nil
}

// reason drops the path that an *os.PathError repeats.
func reason(err error) string {
	if p, ok := errors.AsType[*os.PathError](err); ok {
		return p.Err.Error()
	}
	return err.Error()
}
