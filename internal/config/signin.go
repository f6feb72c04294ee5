package config

import (
	"fmt"
	"net/url"
	"slices"
	"strings"
)

func (s SignIn) check(fail failFunc, key string) {
	fail.required(key+"client_id", s.ClientID)
	fail.secret(key+"client_secret_file", s.ClientSecretFile)
	fail.oneOf(key+"client_auth", s.ClientAuth, "client_secret_basic", "client_secret_post")
	if !slices.Contains(s.Scopes, "openid") {
		fail(key+"scopes", "does not list openid, without which nobody says who signed in")
	}
	for i, scope := range s.Scopes {
		if scope == "" || strings.ContainsFunc(scope, func(r rune) bool { return r <= ' ' || r > '~' || r == '"' || r == '\\' }) {
			fail(fmt.Sprintf("%sscopes[%d]", key, i), "is %q, which is no scope", scope)
		}
	}
}

// redirectURI wants what RFC 9700 §2.1 leaves: https, or http on this machine.
func (fail failFunc) redirectURI(key, v string) {
	u, err := url.Parse(v)
	switch {
	case err != nil || u.Hostname() == "" || (u.Scheme != "https" && u.Scheme != "http"):
		fail(key, "is %q, expected an https URL", v)
	case u.Scheme == "http" && !Loopback(u.Host):
		fail(key, "is %q, expected https: plain http is for loopback only", v)
	case u.User != nil || strings.Contains(v, "#"):
		fail(key, "is %q, expected a URL without user and fragment", v)
	case strings.ContainsFunc(v, func(r rune) bool { return r <= ' ' || r > '~' }):
		fail(key, "is %q, expected visible ASCII characters only", v)
	}
}
