package crash

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

const (
	audience   = "urn:writ:test"
	cibaClient = "writ"
)

// issuer signs tokens, and asks people by CIBA, all of whom say yes once told to. It
// lives in the test's process, which nobody kills.
type issuer struct {
	t    testing.TB
	url  string
	key  *ecdsa.PrivateKey
	jwks []byte

	mu      sync.Mutex
	yes     bool              // what people say; until then they say nothing
	prompts map[string]prompt // by auth_req_id
	asked   map[string]int    // prompts by binding message
}

type prompt struct {
	hint     string
	answered bool
}

func newIssuer(t testing.TB) *issuer {
	t.Helper()
	is := &issuer{t: t, prompts: map[string]prompt{}, asked: map[string]int{}}
	var err error
	if is.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: is.key.Public(), KeyID: "k", Algorithm: "ES256", Use: "sig"}}}
	if is.jwks, err = json.Marshal(set); err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	srv := httptest.NewServer(mux)
	t.Cleanup(srv.Close)
	is.url = srv.URL
	mux.HandleFunc("GET /.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusOK, map[string]any{
			"issuer": is.url, "token_endpoint": is.url + "/token", "backchannel_authentication_endpoint": is.url + "/bc",
		})
	})
	mux.HandleFunc("POST /bc", is.ask)
	mux.HandleFunc("POST /token", is.poll)
	return is
}

func answer(w http.ResponseWriter, status int, v map[string]any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v)
}

func (is *issuer) ask(w http.ResponseWriter, r *http.Request) {
	is.mu.Lock()
	defer is.mu.Unlock()
	id := rand.Text()
	is.prompts[id] = prompt{hint: r.FormValue("login_hint")}
	is.asked[r.FormValue("binding_message")]++
	answer(w, http.StatusOK, map[string]any{"auth_req_id": id, "expires_in": 300, "interval": 1})
}

func (is *issuer) poll(w http.ResponseWriter, r *http.Request) {
	is.mu.Lock()
	defer is.mu.Unlock()
	id := r.FormValue("auth_req_id")
	p, ok := is.prompts[id]
	switch {
	case !ok || p.answered:
		answer(w, http.StatusBadRequest, map[string]any{"error": "invalid_grant"})
	case !is.yes:
		answer(w, http.StatusBadRequest, map[string]any{"error": "authorization_pending"})
	default:
		p.answered = true
		is.prompts[id] = p
		now := time.Now().Unix()
		answer(w, http.StatusOK, map[string]any{
			"access_token": "test-only", "token_type": "Bearer",
			"id_token": is.sign("JWT", map[string]any{
				"iss": is.url, "aud": cibaClient, "sub": p.hint, "iat": now, "exp": now + 300, "auth_time": now,
				"urn:openid:params:jwt:claim:auth_req_id": id,
			}),
		})
	}
}

// sayYes makes everybody agree from now on.
func (is *issuer) sayYes() {
	is.mu.Lock()
	defer is.mu.Unlock()
	is.yes = true
}

// askedTwice lists messages that reached a person more than once.
func (is *issuer) askedTwice() (out []string) {
	is.mu.Lock()
	defer is.mu.Unlock()
	for message, n := range is.asked {
		if n > 1 {
			out = append(out, message)
		}
	}
	return out
}

func (is *issuer) sign(typ string, claims map[string]any) string {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: is.key, KeyID: "k"}},
		(&jose.SignerOptions{}).WithType(jose.ContentType(typ)))
	if err != nil {
		panic(err)
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		panic(err)
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		panic(err)
	}
	text, err := jws.CompactSerialize()
	if err != nil {
		panic(err)
	}
	return text
}

// token is an access token by which an agent acts for a user.
func (is *issuer) token(user, agent string) string {
	now := time.Now()
	return is.tokenAt(user, agent, now, now.Add(2*time.Hour))
}

func (is *issuer) tokenAt(user, agent string, from, to time.Time) string {
	return is.sign("at+jwt", map[string]any{
		"iss": is.url, "aud": audience, "sub": user, "client_id": agent, "jti": fmt.Sprint(rand.Text()),
		"iat": from.Unix(), "exp": to.Unix(),
	})
}
