package config

import (
	"crypto/tls"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gobwas/glob"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/writsec/writ/internal/jws"
)

// signatureAlgorithms are the asymmetric JWS algorithms that Writ verifies.
var signatureAlgorithms = jws.Algorithms

// minterName is what a policy writes to choose a minter.
var minterName = regexp.MustCompile(`^[a-z][a-z0-9_-]{0,63}$`)

// minterKinds are the blocks that a minter can have.
var minterKinds = []string{"jwt", "oauth", "postgres"}

// fill resolves file names against dir and sets the defaults that follow from
// other values.
func (c *Config) fill(dir string) {
	abs := func(p *string) {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
	if path, ok := strings.CutPrefix(c.Store, "sqlite:"); ok && path != "" {
		abs(&path)
		c.Store = "sqlite:" + path
	}
	abs(&c.StorePasswordFile)
	abs(&c.RootKeyFile)
	abs(&c.Audit.Copies.File)
	abs(&c.Audit.Copies.URLTokenFile)
	abs(&c.Policy.Path)
	if c.Policy.Signature != nil {
		abs(&c.Policy.Signature.PublicKeyFile)
	}
	if c.TLS != nil {
		abs(&c.TLS.CertFile)
		abs(&c.TLS.KeyFile)
	}
	for i := range c.Issuers {
		is := &c.Issuers[i]
		abs(&is.JWKSFile)
		if b := is.CIBA; b != nil {
			abs(&b.ClientSecretFile)
			if len(b.Algorithms) == 0 {
				b.Algorithms = is.Algorithms
			}
		}
	}
	for i := range c.Issuers {
		if s := c.Issuers[i].SignIn; s != nil {
			abs(&s.ClientSecretFile)
		}
	}
	for _, m := range c.Minters {
		if m.Postgres != nil {
			abs(&m.Postgres.PasswordFile)
			abs(&m.Postgres.CAFile)
		}
	}
	for i := range c.Services {
		abs(&c.Services[i].SecretFile)
	}
	for _, m := range c.Minters {
		if m.OAuth != nil {
			m.OAuth.fill(abs, c.ExternalURL)
		}
	}
}

// failFunc reports that the value of a key cannot work.
type failFunc func(key, format string, args ...any)

// check reports every value that cannot work.
func (c *Config) check(fail failFunc) {
	fail.address("listen", c.Listen)
	fail.address("ops_listen", c.OpsListen)
	if c.TLS != nil {
		fail.file("tls.cert_file", c.TLS.CertFile)
		fail.file("tls.key_file", c.TLS.KeyFile)
	} else if !c.BehindProxy && !Loopback(c.Listen) {
		fail("listen", "is %q, beyond loopback, without TLS: set tls, or behind_proxy: true if a proxy terminates TLS", c.Listen)
	}
	if c.ProxyClientCert && !c.BehindProxy {
		fail("proxy_client_cert", "has no effect: behind_proxy is false, and no client may say what its certificate is")
	}
	fail.url("external_url", c.ExternalURL)
	if strings.HasSuffix(c.ExternalURL, "/") {
		fail("external_url", "is %q, expected no slash at the end", c.ExternalURL)
	}
	c.checkStore(fail)
	c.checkRootKey(fail)
	c.Policy.check(fail)
	fail.positive("sessions.default_age", c.Sessions.DefaultAge)
	fail.positive("sessions.max_age", c.Sessions.MaxAge)
	if c.Sessions.DefaultAge > c.Sessions.MaxAge {
		fail("sessions.default_age", "is %v, more than sessions.max_age %v", c.Sessions.DefaultAge, c.Sessions.MaxAge)
	}
	if c.Sessions.Idle < 0 {
		fail("sessions.idle", "is %v, expected zero (never) or more", c.Sessions.Idle)
	}
	if w := c.Sessions.Window; w < time.Minute || w > 366*24*time.Hour {
		fail("sessions.window", "is %v, expected 1m to 8784h; it cannot be off, since limits of policy would then be none", w)
	}
	fail.positive("approvals.expires_in", c.Approvals.ExpiresIn)
	fail.positive("approvals.use_within", c.Approvals.UseWithin)
	fail.positive("approvals.max_wait", c.Approvals.MaxWait)
	fail.count("leases.per_session", c.Leases.PerSession)
	fail.count("leases.per_user", c.Leases.PerUser)
	fail.count("leases.per_agent", c.Leases.PerAgent)
	if c.Approvals.MaxPending < 1 {
		fail("approvals.max_pending", "is %d, expected at least 1", c.Approvals.MaxPending)
	}
	c.Audit.check(fail)
	c.Signing.check(fail)
	if r := c.Retention.Records; r != 0 && r < 24*time.Hour {
		fail("retention.records", "is %v, expected zero (for ever) or 24h and more: retries look for their decisions that long", r)
	}
	fail.notNegative("retention.inputs", c.Retention.Inputs)
	fail.oneOf("log.level", c.Log.Level, "debug", "info", "warn", "error")

	if len(c.Issuers) == 0 {
		fail("issuers", "is missing, expected at least one issuer of user tokens")
	}
	seen, domains := map[string]bool{}, map[string]bool{}
	for i, is := range c.Issuers {
		key := fmt.Sprintf("issuers[%d].", i)
		is.check(fail, key)
		if seen[is.Issuer] {
			fail(key+"issuer", "stands a second time")
		}
		seen[is.Issuer] = is.Issuer != ""
		if domains[is.TrustDomain] {
			fail(key+"trust_domain", "stands a second time")
		}
		domains[is.TrustDomain] = is.TrustDomain != ""
		if is.Issuer != "" && is.Issuer == c.ExternalURL {
			fail(key+"issuer", "is Writ itself; a minted token must never be good for Writ")
		}
	}
	for i, is := range c.Issuers {
		if is.Signals != nil && is.Signals.Subjects != "" {
			c.checkSpeaker(fail, fmt.Sprintf("issuers[%d].signals.subjects", i), is.Signals.Subjects, User)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.Minters)) {
		c.checkMinter(fail, name, c.Minters[name])
	}
	ids := map[string]bool{}
	for i, s := range c.Services {
		key := fmt.Sprintf("services[%d].", i)
		fail.required(key+"id", s.ID)
		if ids[s.ID] {
			fail(key+"id", "stands a second time")
		}
		ids[s.ID] = s.ID != ""
		c.checkServiceProof(fail, key, s)
		if s.Subject != nil && slices.ContainsFunc(c.Services[:i], func(o Service) bool { return o.Subject != nil && *o.Subject == *s.Subject }) {
			fail(key+"subject", "stands a second time")
		}
		fail.required(key+"audience", s.Audience)
	}
	c.checkAgents(fail)
}

func (c *Config) checkStore(fail failFunc) {
	fail.oneOf("durability", c.Durability, "disk", "os")
	if !fail.required("store", c.Store) {
		return
	}
	if path, ok := strings.CutPrefix(c.Store, "sqlite:"); ok {
		if path == "" {
			fail("store", "is %q, expected sqlite:PATH", c.Store)
		}
		if c.StorePasswordFile != "" {
			fail("store_password_file", "has no effect: SQLite has no password")
		}
		return
	}
	u, err := url.Parse(c.Store)
	if err != nil || (u.Scheme != "postgres" && u.Scheme != "postgresql") {
		fail("store", "is not one of sqlite:PATH and postgres://USER@HOST:PORT/DATABASE") // not quoted: it may hold a password
		return
	}
	if _, set := u.User.Password(); set || u.Query().Has("password") {
		fail("store", "holds a password; put it into a file and name that as store_password_file")
	}
	if pg, err := pgconn.ParseConfig(c.Store); err != nil {
		fail("store", "can't be read by the PostgreSQL driver; check its parameters and the files that they name")
	} else if !guarded(pg) {
		fail("store", "is beyond loopback: add sslmode=verify-full (and sslrootcert=FILE for a CA of your own)")
	}
	if c.Durability != "disk" {
		fail("durability", "is for SQLite; PostgreSQL has synchronous_commit")
	}
	if c.StorePasswordFile != "" {
		fail.secret("store_password_file", c.StorePasswordFile)
	}
	if c.StoreConnections < 2 || c.StoreConnections > 1000 {
		fail("store_connections", "is %d, expected 2 to 1000", c.StoreConnections)
	}
}

// guarded reports whether every host that the driver may try is this machine or has
// to prove who it is. By default it would fall back to a connection in clear, and
// hosts come from more places than the URL's.
func guarded(c *pgconn.Config) bool {
	ok := func(host string, t *tls.Config) bool {
		proves := t != nil && (!t.InsecureSkipVerify || t.VerifyPeerCertificate != nil) // the latter is verify-ca
		return proves || strings.HasPrefix(host, "/") || Loopback(host)
	}
	for _, f := range c.Fallbacks {
		if !ok(f.Host, f.TLSConfig) {
			return false
		}
	}
	return ok(c.Host, c.TLSConfig)
}

const minCopyEvery = 100 * time.Millisecond

func (a Audit) check(fail failFunc) {
	for i, r := range a.Inputs {
		key := fmt.Sprintf("audit.inputs[%d].", i)
		if len(r.Actions) == 0 {
			fail(key+"actions", "is missing, expected patterns such as hr.**")
		}
		for j, p := range r.Actions {
			if _, err := glob.Compile(p, '.'); err != nil || p == "" {
				fail(fmt.Sprintf("%sactions[%d]", key, j), "is %q, which is no pattern", p)
			}
		}
		fail.oneOf(key+"keep", r.Keep, "whole", "redacted", "none")
	}
	if a.Copies.Every < minCopyEvery {
		fail("audit.copies.every", "is %v, expected %v or more", a.Copies.Every, minCopyEvery)
	}
	if a.Copies.URL != "" {
		fail.url("audit.copies.url", a.Copies.URL)
	}
	if a.Copies.URLTokenFile != "" {
		fail.secret("audit.copies.url_token_file", a.Copies.URLTokenFile)
	}
}

func (c *Config) checkRootKey(fail failFunc) {
	if fail.file("root_key_file", c.RootKeyFile) {
		if _, err := RootKey(c.RootKeyFile); err != nil {
			fail("root_key_file", "%v", err)
		}
	}
}

func (p Policy) check(fail failFunc) {
	if fail.required("policy.path", p.Path) {
		if _, err := os.Stat(p.Path); err != nil {
			fail("policy.path", "names %s: %s", p.Path, reason(err))
		}
	}
	if !strings.HasPrefix(p.Query, "data.") {
		fail("policy.query", "is %q, expected a document such as data.writ.decision", p.Query)
	}
	if !strings.HasPrefix(p.AdminQuery, "data.") {
		fail("policy.admin_query", "is %q, expected a document such as data.writ.admin", p.AdminQuery)
	}
	fail.positive("policy.deadline", p.Deadline)
	if p.Reload < 0 {
		fail("policy.reload", "is %v, expected zero (never) or more", p.Reload)
	}
	if s := p.Signature; s != nil {
		fail.file("policy.signature.public_key_file", s.PublicKeyFile)
		fail.oneOf("policy.signature.algorithm", s.Algorithm, signatureAlgorithms...)
		fail.required("policy.signature.key_id", s.KeyID)
	}
}

func (is Issuer) check(fail failFunc, key string) {
	switch {
	case len(is.SpeaksFor) > 0:
		fail.required(key+"audience", is.Audience)
	case is.Signals == nil: // else a transmitter of signals, which need speak for nobody
		fail(key+"speaks_for", "is missing, expected a list of user, agent, operator, service")
	}
	if is.Signals != nil {
		fail.required(key+"signals.audience", is.Signals.Audience)
	}
	fail.algorithms(key+"algorithms", is.Algorithms)
	is.checkKeys(fail, key)
	is.checkToken(fail, key)
	fail.noneEmpty(key+"id_token_clients", is.IDTokenClients)
	if is.ClockLeeway < 0 || is.ClockLeeway > 5*time.Minute {
		fail(key+"clock_leeway", "is %v, expected 0 to 5m", is.ClockLeeway)
	}
	speaks := slices.Contains(is.SpeaksFor, Operator)
	switch o := is.Operator; {
	case speaks && o == nil:
		fail(key+"operator", "is missing: an issuer that speaks for operators needs the claim that marks them")
	case !speaks && o != nil:
		fail(key+"operator", "has no effect: speaks_for does not list operator")
	case speaks:
		fail.required(key+"operator.claim", o.Claim)
		fail.required(key+"operator.value", o.Value)
		fail.noneEmpty(key+"operator.clients", o.Clients)
		if len(o.Clients) == 0 && slices.Contains(is.SpeaksFor, Agent) {
			fail(key+"operator.clients", "is missing: this issuer speaks for agents too, and an agent acting for an operator is no operator; list the clients that operators use")
		}
	}
	if b := is.CIBA; b != nil {
		b.check(fail, key+"ciba.")
		if !slices.Equal(b.Algorithms, is.Algorithms) {
			fail.algorithms(key+"ciba.id_token_algorithms", b.Algorithms)
		}
	}
	if s := is.SignIn; s != nil {
		if !slices.Contains(is.SpeaksFor, User) {
			fail(key+"sign_in", "has no effect: speaks_for does not list user")
		}
		s.check(fail, key+"sign_in.")
	}
}

// checkKeys wants one place that keys come from. Only discovery needs an issuer that is
// a URL.
func (is Issuer) checkKeys(fail failFunc, key string) {
	if is.JWKSFile == "" && is.JWKSURL == "" {
		fail.url(key+"issuer", is.Issuer)
		return
	}
	if fail.required(key+"issuer", is.Issuer) && strings.Contains(is.Issuer, "#") {
		fail(key+"issuer", "is %q, expected no fragment", is.Issuer)
	}
	switch {
	case is.JWKSFile != "" && is.JWKSURL != "":
		fail(key+"jwks_url", "stands beside jwks_file, expected one of them")
	case is.JWKSFile != "":
		fail.file(key+"jwks_file", is.JWKSFile)
	default:
		fail.url(key+"jwks_url", is.JWKSURL)
	}
}

// tokenKinds are the kinds of token that can stand for a caller. People have no tokens
// of the last three.
var tokenKinds = []string{"access_token", "jwt", "jwt_svid", "kubernetes", "private_key_jwt"}

func (is Issuer) checkToken(fail failFunc, key string) {
	fail.oneOf(key+"token", is.Token, tokenKinds...)
	speaks := func(p Principal) bool { return slices.Contains(is.SpeaksFor, p) }
	if slices.Contains(tokenKinds[2:], is.Token) && (speaks(User) || speaks(Operator)) {
		fail(key+"speaks_for", "lists people, but token is %s, which only workloads have: expected agent, service", is.Token)
	}
	if is.Token == "jwt_svid" {
		if fail.required(key+"trust_domain", is.TrustDomain) && strings.ContainsAny(is.TrustDomain, ":/") {
			fail(key+"trust_domain", "is %q, expected a name such as example.org", is.TrustDomain)
		}
	} else if is.TrustDomain != "" {
		fail(key+"trust_domain", "has no effect: token is %s, not jwt_svid", is.Token)
	}
	if is.Token == "jwt" && speaks(User) && len(is.UserMatch) == 0 {
		fail(key+"user_match", "is missing: without it, a token that a client has of its own could pass for a user's")
	}
	if len(is.UserMatch) > 0 && !speaks(User) {
		fail(key+"user_match", "has no effect: speaks_for does not list user")
	}
	if is.Token == "private_key_jwt" && is.JWKSFile == "" && is.JWKSURL == "" {
		fail(key+"jwks_file", "is missing, expected the agent's public keys, or their place as jwks_url")
	}
	fail.globs(key+"match", is.Match)
	fail.globs(key+"user_match", is.UserMatch)
	fail.positive(key+"max_age", is.MaxAge)
	for i, m := range is.SenderConstraint {
		fail.oneOf(fmt.Sprintf("%ssender_constraint[%d]", key, i), m, "dpop", "mtls")
	}
	// What a token is meant for tells Writ's own apart from those for a client.
	clients := slices.Clone(is.IDTokenClients)
	if is.CIBA != nil {
		clients = append(clients, is.CIBA.ClientID)
	}
	if is.SignIn != nil {
		clients = append(clients, is.SignIn.ClientID)
	}
	if slices.Contains(clients, is.Audience) && is.Token != "access_token" {
		fail(key+"audience", "is also a client of ID tokens: an ID token could pass for a token to Writ")
	}
}

// checkAgents keeps an identity from being two agents, and an agent from being another.
func (c *Config) checkAgents(fail failFunc) {
	taken := map[Subject]string{}
	claim := func(key string, s Subject) {
		if first, dup := taken[s]; dup {
			fail(key, "names what %s names already", first)
		}
		taken[s] = key
	}
	for i, a := range c.Agents {
		key := fmt.Sprintf("agents[%d]", i)
		c.checkSpeaker(fail, key+".issuer", a.Issuer, Agent)
		fail.required(key+".id", a.ID)
		claim(key, Subject{a.Issuer, a.ID})
		for j, uri := range a.RedirectURIs {
			fail.redirectURI(fmt.Sprintf("%s.redirect_uris[%d]", key, j), uri)
		}
		for j, s := range a.Identities {
			other := fmt.Sprintf("%s.identities[%d]", key, j)
			c.checkSpeaker(fail, other+".issuer", s.Issuer, Agent)
			fail.required(other+".id", s.ID)
			claim(other, s)
		}
	}
}

// checkSpeaker wants an issuer that is configured and speaks for p.
func (c *Config) checkSpeaker(fail failFunc, key, issuer string, p Principal) {
	speaks := func(is Issuer) bool { return is.Issuer == issuer && slices.Contains(is.SpeaksFor, p) }
	if !slices.ContainsFunc(c.Issuers, speaks) {
		fail(key, "is %q, expected one of issuers that speaks for %s", issuer, p)
	}
}

func (c *Config) checkServiceProof(fail failFunc, key string, s Service) {
	switch {
	case s.Subject == nil:
		fail.secret(key+"secret_file", s.SecretFile)
	case s.SecretFile != "":
		fail(key+"subject", "stands beside secret_file, expected one of them")
	default:
		fail.required(key+"subject.id", s.Subject.ID)
		c.checkSpeaker(fail, key+"subject.issuer", s.Subject.Issuer, ServicePrincipal)
	}
}

func (b CIBA) check(fail failFunc, key string) {
	fail.required(key+"client_id", b.ClientID)
	fail.secret(key+"client_secret_file", b.ClientSecretFile)
	fail.oneOf(key+"client_auth", b.ClientAuth, "client_secret_basic", "client_secret_post")
	fail.required(key+"login_hint", b.LoginHint)
	fail.oneOf(key+"binding_message.charset", b.BindingMessage.Charset, "portable", "text")
	if b.BindingMessage.MaxLength < 4 || b.BindingMessage.MaxLength > 1000 {
		fail(key+"binding_message.max_length", "is %d, expected 4 to 1000", b.BindingMessage.MaxLength)
	}
	fail.positive(key+"timeout", b.Timeout)
}

func (c *Config) checkMinter(fail failFunc, name string, m Minter) {
	key := "minters." + name
	if !minterName.MatchString(name) {
		fail(key, "is a name that no policy can write, expected lower-case letters, digits, _ and -")
	}
	switch set := m.kinds(); {
	case len(set) == 0:
		fail(key, "says not what it makes, expected one of the blocks %s", strings.Join(minterKinds, ", "))
	case len(set) > 1:
		fail(key, "has the blocks %s, expected one: a minter makes one kind", strings.Join(set, ", "))
	}
	fail.positive(key+".max_ttl", m.MaxTTL)
	fail.count(key+".max_active", m.MaxActive)
	if m.JWT != nil {
		c.checkJWT(fail, key+".jwt.", *m.JWT)
	}
	if m.OAuth != nil {
		c.checkOAuth(fail, key+".oauth.", m)
	}
	if m.Postgres != nil {
		m.Postgres.check(fail, key+".postgres.", m.MaxTTL)
	}
}

func (c *Config) checkJWT(fail failFunc, key string, m JWTMinter) {
	self := func(is Issuer) bool { return is.Audience == m.Audience }
	if fail.required(key+"audience", m.Audience) && (strings.TrimSuffix(m.Audience, "/") == c.ExternalURL || slices.ContainsFunc(c.Issuers, self)) {
		fail(key+"audience", "is Writ itself; a minted token must never be good for Writ")
	}
	fail.noneEmpty(key+"scopes", m.Scopes)
	fail.oneOf(key+"checks", m.Checks, "introspection", "status_list", "none")
	asks := func(s Service) bool { return s.Audience == m.Audience }
	if m.Checks == "introspection" && !slices.ContainsFunc(c.Services, asks) {
		fail(key+"checks", "is introspection, but no entry of services has this audience: nobody could introspect")
	}
}

func (fail failFunc) required(key, v string) bool {
	if v == "" {
		fail(key, "is missing")
	}
	return v != ""
}

func (fail failFunc) noneEmpty(key string, list []string) {
	for i, v := range list {
		if v == "" {
			fail(fmt.Sprintf("%s[%d]", key, i), "is empty")
		}
	}
}

func (fail failFunc) globs(key string, patterns map[string]string) {
	for _, name := range slices.Sorted(maps.Keys(patterns)) {
		if _, err := glob.Compile(patterns[name]); err != nil || name == "" || patterns[name] == "" {
			fail(key, "has %q: %q, expected a claim and a pattern such as \"*\"", name, patterns[name])
		}
	}
}

func (fail failFunc) file(key, path string) bool {
	if !fail.required(key, path) {
		return false
	}
	st, err := os.Stat(path)
	switch {
	case err != nil:
		fail(key, "names %s: %s", path, reason(err))
	case st.IsDir():
		fail(key, "names %s, which is a folder, expected a file", path)
	}
	return err == nil && !st.IsDir()
}

func (fail failFunc) secret(key, path string) {
	if fail.file(key, path) {
		if _, err := Secret(path); err != nil {
			fail(key, "%v", err)
		}
	}
}

func (fail failFunc) positive(key string, d time.Duration) {
	if d <= 0 {
		fail(key, "is %v, expected more than zero", d)
	}
}

func (fail failFunc) notNegative(key string, d time.Duration) {
	if d < 0 {
		fail(key, "is %v, expected zero (for ever) or more", d)
	}
}

func (fail failFunc) count(key string, n int) {
	if n < 0 || n > 1_000_000 {
		fail(key, "is %d, expected 0 to 1000000", n)
	}
}

func (fail failFunc) oneOf(key, v string, of ...string) {
	switch list := strings.Join(of, ", "); {
	case v == "":
		fail(key, "is missing, expected one of %s", list)
	case !slices.Contains(of, v):
		fail(key, "is %q, expected one of %s", v, list)
	}
}

func (fail failFunc) algorithms(key string, list []string) {
	if len(list) == 0 {
		fail(key, "is missing, expected a list of %s", strings.Join(signatureAlgorithms, ", "))
	}
	for i, a := range list {
		fail.oneOf(fmt.Sprintf("%s[%d]", key, i), a, signatureAlgorithms...)
	}
}

func (fail failFunc) address(key, v string) {
	_, port, err := net.SplitHostPort(v)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		fail(key, "is %q, expected host:port", v)
	}
}

func (fail failFunc) url(key, v string) {
	if !fail.required(key, v) {
		return
	}
	u, err := url.Parse(v)
	switch {
	case err != nil || u.Hostname() == "" || (u.Scheme != "https" && u.Scheme != "http"):
		fail(key, "is %q, expected an https URL", v)
	case u.Scheme == "http" && !Loopback(u.Host):
		fail(key, "is %q, expected https: plain http is for loopback only", v)
	case u.User != nil || strings.ContainsAny(v, "?#"):
		fail(key, "is %q, expected a URL without user, query and fragment", v)
	}
}

// Loopback reports whether a host, or host:port, is this machine only.
func Loopback(addr string) bool {
	host := addr
	if h, _, err := net.SplitHostPort(addr); err == nil {
		host = h
	}
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return err == nil && ip.IsLoopback()
}
