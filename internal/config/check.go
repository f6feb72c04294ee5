package config

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// signatureAlgorithms are the asymmetric JWS algorithms that Writ verifies.
var signatureAlgorithms = []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}

// fill resolves file names against dir and sets defaults inside lists, which
// Default can't.
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
	abs(&c.RootKeyFile)
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
		if is.ClockLeeway == 0 {
			is.ClockLeeway = 30 * time.Second
		}
		if b := is.CIBA; b != nil {
			abs(&b.ClientSecretFile)
			if b.ClientAuth == "" {
				b.ClientAuth = "client_secret_basic"
			}
			if b.LoginHint == "" {
				b.LoginHint = "{sub}"
			}
			if len(b.Algorithms) == 0 {
				b.Algorithms = is.Algorithms
			}
			if b.BindingMessage.MaxLength == 0 {
				b.BindingMessage.MaxLength = 20
			}
			if b.BindingMessage.Charset == "" {
				b.BindingMessage.Charset = "portable"
			}
			if b.Timeout == 0 {
				b.Timeout = 40 * time.Second
			}
		}
	}
	for name, m := range c.Minters {
		if m.MaxTTL == 0 {
			m.MaxTTL = 5 * time.Minute
		}
		c.Minters[name] = m
	}
	for i := range c.Services {
		abs(&c.Services[i].SecretFile)
	}
}

// check reports every value that cannot work.
func (c *Config) check(fail func(key, format string, args ...any)) {
	required := func(key, v string) bool {
		if v == "" {
			fail(key, "is missing")
		}
		return v != ""
	}
	file := func(key, path string) {
		if !required(key, path) {
			return
		}
		if st, err := os.Stat(path); err != nil {
			fail(key, "names %s: %s", path, reason(err))
		} else if st.IsDir() {
			fail(key, "names %s, which is a folder, expected a file", path)
		}
	}
	positive := func(key string, d time.Duration) {
		if d <= 0 {
			fail(key, "is %v, expected more than zero", d)
		}
	}
	algorithms := func(key string, list []string) {
		if len(list) == 0 {
			fail(key, "is missing, expected a list of %s", strings.Join(signatureAlgorithms, ", "))
		}
		for i, a := range list {
			if !slices.Contains(signatureAlgorithms, a) {
				fail(fmt.Sprintf("%s[%d]", key, i), "is %q, expected one of %s", a, strings.Join(signatureAlgorithms, ", "))
			}
		}
	}
	oneOf := func(key, v string, of ...string) {
		if !slices.Contains(of, v) {
			fail(key, "is %q, expected one of %s", v, strings.Join(of, ", "))
		}
	}

	for key, addr := range map[string]string{"listen": c.Listen, "ops_listen": c.OpsListen} {
		if _, _, err := net.SplitHostPort(addr); err != nil {
			fail(key, "is %q, expected host:port", addr)
		}
	}
	if c.TLS != nil {
		file("tls.cert_file", c.TLS.CertFile)
		file("tls.key_file", c.TLS.KeyFile)
	} else if !c.BehindProxy && !Loopback(c.Listen) {
		fail("listen", "is %s, beyond loopback, without TLS: set tls, or behind_proxy: true if a proxy terminates TLS", c.Listen)
	}
	if required("external_url", c.ExternalURL) {
		checkURL(fail, "external_url", c.ExternalURL)
	}
	if path, ok := strings.CutPrefix(c.Store, "sqlite:"); required("store", c.Store) && (!ok || path == "") {
		fail("store", "is %q, expected sqlite:PATH", c.Store)
	}
	file("root_key_file", c.RootKeyFile)
	if required("policy.path", c.Policy.Path) {
		if _, err := os.Stat(c.Policy.Path); err != nil {
			fail("policy.path", "names %s: %s", c.Policy.Path, reason(err))
		}
	}
	positive("policy.deadline", c.Policy.Deadline)
	if c.Policy.Reload < 0 {
		fail("policy.reload", "is negative")
	}
	if s := c.Policy.Signature; s != nil {
		file("policy.signature.public_key_file", s.PublicKeyFile)
		algorithms("policy.signature.algorithm", []string{s.Algorithm})
		required("policy.signature.key_id", s.KeyID)
	}
	positive("sessions.default_age", c.Sessions.DefaultAge)
	positive("sessions.max_age", c.Sessions.MaxAge)
	if c.Sessions.DefaultAge > c.Sessions.MaxAge {
		fail("sessions.default_age", "is %v, more than sessions.max_age %v", c.Sessions.DefaultAge, c.Sessions.MaxAge)
	}
	positive("approvals.expires_in", c.Approvals.ExpiresIn)
	positive("approvals.use_within", c.Approvals.UseWithin)
	positive("approvals.max_wait", c.Approvals.MaxWait)
	if c.Approvals.MaxPending < 1 {
		fail("approvals.max_pending", "is %d, expected at least 1", c.Approvals.MaxPending)
	}
	oneOf("log.level", c.Log.Level, "debug", "info", "warn", "error")

	if len(c.Issuers) == 0 {
		fail("issuers", "is missing, expected at least one issuer of user tokens")
	}
	seen := map[string]bool{}
	for i, is := range c.Issuers {
		key := func(k string) string { return fmt.Sprintf("issuers[%d].%s", i, k) }
		if required(key("issuer"), is.Issuer) {
			checkURL(fail, key("issuer"), is.Issuer)
		}
		if seen[is.Issuer] {
			fail(key("issuer"), "stands a second time")
		}
		seen[is.Issuer] = true
		if len(is.SpeaksFor) == 0 {
			fail(key("speaks_for"), "is missing, expected a list of user, agent, operator")
		}
		required(key("audience"), is.Audience)
		algorithms(key("algorithms"), is.Algorithms)
		if is.JWKSFile != "" {
			file(key("jwks_file"), is.JWKSFile)
		}
		if is.ClockLeeway < 0 || is.ClockLeeway > 5*time.Minute {
			fail(key("clock_leeway"), "is %v, expected 0 to 5m", is.ClockLeeway)
		}
		if slices.Contains(is.SpeaksFor, Operator) {
			if is.Operator == nil {
				fail(key("operator"), "is missing: an issuer that speaks for operators needs the claim that marks them")
			} else {
				required(key("operator.claim"), is.Operator.Claim)
				required(key("operator.value"), is.Operator.Value)
				if len(is.Operator.Clients) == 0 && slices.Contains(is.SpeaksFor, Agent) {
					fail(key("operator.clients"), "is missing: this issuer speaks for agents too, and an agent acting for an operator is no operator; list the clients that operators use")
				}
			}
		}
		if b := is.CIBA; b != nil {
			required(key("ciba.client_id"), b.ClientID)
			file(key("ciba.client_secret_file"), b.ClientSecretFile)
			oneOf(key("ciba.client_auth"), b.ClientAuth, "client_secret_basic", "client_secret_post")
			algorithms(key("ciba.id_token_algorithms"), b.Algorithms)
			oneOf(key("ciba.binding_message.charset"), b.BindingMessage.Charset, "portable", "text")
			if b.BindingMessage.MaxLength < 4 || b.BindingMessage.MaxLength > 1000 {
				fail(key("ciba.binding_message.max_length"), "is %d, expected 4 to 1000", b.BindingMessage.MaxLength)
			}
			positive(key("ciba.timeout"), b.Timeout)
		}
	}
	for name, m := range c.Minters {
		key := func(k string) string { return "minters." + name + "." + k }
		oneOf(key("kind"), m.Kind, "jwt")
		if required(key("audience"), m.Audience) && m.Audience == c.ExternalURL {
			fail(key("audience"), "is Writ itself; a minted token must never be good for Writ")
		}
		positive(key("max_ttl"), m.MaxTTL)
	}
	ids := map[string]bool{}
	for i, s := range c.Services {
		key := func(k string) string { return fmt.Sprintf("services[%d].%s", i, k) }
		required(key("id"), s.ID)
		if ids[s.ID] {
			fail(key("id"), "stands a second time")
		}
		ids[s.ID] = true
		file(key("secret_file"), s.SecretFile)
		required(key("audience"), s.Audience)
	}
}

func checkURL(fail func(key, format string, args ...any), key, v string) {
	u, err := url.Parse(v)
	switch {
	case err != nil || u.Host == "" || (u.Scheme != "https" && u.Scheme != "http"):
		fail(key, "is %q, expected an https URL", v)
	case u.Scheme == "http" && !Loopback(u.Host):
		fail(key, "is %q, expected https: plain http is for loopback only", v)
	case u.RawQuery != "" || u.Fragment != "" || u.User != nil:
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
