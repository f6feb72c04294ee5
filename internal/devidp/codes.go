package devidp

import (
	"net/http"
	"time"
)

const (
	maxCodes     = 256
	codeLifetime = time.Minute // RFC 6749 §4.1.2 allows ten
)

var errBusy = &oauthError{
	status: http.StatusServiceUnavailable, Code: "temporarily_unavailable", Description: "too much is waiting already",
}

// codeGrant is what an authorization code stands for.
type codeGrant struct {
	clientID    string
	user        User
	redirectURI string
	scope       string
	nonce       string
	challenge   string // PKCE, S256
	acr         string
	authTime    time.Time
}

func (g codeGrant) expired(now time.Time) bool { return !now.Before(g.authTime.Add(codeLifetime)) }

func (s *state) addCode(g codeGrant) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.codes) >= maxCodes {
		now := time.Now()
		for code, old := range s.codes {
			if old.expired(now) {
				delete(s.codes, code)
			}
		}
	}
	if len(s.codes) >= maxCodes {
		return "", errBusy
	}
	if s.codes == nil {
		s.codes = map[string]codeGrant{}
	}
	code := newSecret()
	s.codes[code] = g
	return code, nil
}

// takeCode spends the code, whoever presents it and however wrongly: after a
// first showing a code is either used or known to the wrong party.
func (s *state) takeCode(code string) (codeGrant, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	g, ok := s.codes[code]
	delete(s.codes, code)
	return g, ok && !g.expired(time.Now())
}
