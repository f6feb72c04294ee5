package signin_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/signin"
)

// fake is a provider that can be made to say what no honest one does.
type fake struct {
	url    string
	key    *ecdsa.PrivateKey
	claims map[string]any // over the good ones; nil takes one away
	form   url.Values     // of the last token request
	basic  bool           // it came with an Authorization header
	meta   map[string]any
}

func newFake(t *testing.T) *fake {
	t.Helper()
	f := &fake{}
	var err error
	if f.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter, v any) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(v)
	}
	mux.HandleFunc("GET /.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
		m := map[string]any{
			"issuer": f.url, "jwks_uri": f.url + "/jwks", "authorization_endpoint": f.url + "/auth", "token_endpoint": f.url + "/token",
		}
		maps.Copy(m, f.meta)
		answer(w, m)
	})
	mux.HandleFunc("GET /jwks", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: f.key.Public(), KeyID: "k", Algorithm: "ES256", Use: "sig"}}})
	})
	mux.HandleFunc("POST /token", func(w http.ResponseWriter, r *http.Request) {
		_ = r.ParseForm()
		f.form = r.PostForm
		_, _, f.basic = r.BasicAuth()
		sum := sha256.Sum256([]byte("the access token"))
		claims := map[string]any{
			"iss": f.url, "sub": "alice", "aud": "writ", "iat": time.Now().Unix(), "exp": time.Now().Unix() + 60,
			"at_hash": base64.RawURLEncoding.EncodeToString(sum[:16]), "nonce": r.PostFormValue("code"),
		}
		for name, v := range f.claims {
			if claims[name] = v; v == nil {
				delete(claims, name)
			}
		}
		signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: f.key, KeyID: "k"}}, nil)
		if err != nil {
			t.Error(err)
			return
		}
		raw, err := jwt.Signed(signer).Claims(claims).Serialize()
		if err != nil {
			t.Error(err)
			return
		}
		answer(w, map[string]any{"access_token": "the access token", "token_type": "Bearer", "id_token": raw})
	})
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	f.url = server.URL
	return f
}

// visit makes the fake the provider of a world, and comes back from it.
func (f *fake) visit(t *testing.T, w *world, post bool) *visit {
	t.Helper()
	client := identity.NewHTTPClient(5 * time.Second)
	t.Cleanup(client.CloseIdleConnections)
	verifier, err := identity.New(identity.Config{
		Issuers: []identity.Issuer{{URL: f.url, User: true, Algorithms: []string{"ES256"}}},
		HTTP:    client, Now: time.Now, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	w.Providers = []*signin.Provider{{
		Issuer: f.url, ClientID: "writ", ClientSecret: "s:%&", AuthInBody: post, Scopes: []string{"openid"}, HTTP: client, Verifier: verifier,
	}}
	v := w.start(w.open(signin.Ask{}))
	v.answer = fakeAnswer(t, v.to)
	return v
}

// fakeAnswer is what a fake says to an authorization request. Its codes are the nonces
// that they stand for.
func fakeAnswer(t *testing.T, to string) url.Values {
	t.Helper()
	u, err := url.Parse(to)
	if err != nil {
		t.Fatal(err)
	}
	return url.Values{"state": {u.Query().Get("state")}, "code": {u.Query().Get("nonce")}}
}

func TestIDToken(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		claims map[string]any
		text   string // "": accepted
	}{
		"good":                       {nil, ""},
		"no at_hash":                 {map[string]any{"at_hash": nil}, ""},
		"at_hash of another token":   {map[string]any{"at_hash": "AAAAAAAAAAAAAAAAAAAAAA"}, "at_hash"},
		"at_hash that is no string":  {map[string]any{"at_hash": 1}, "malformed"},
		"no nonce":                   {map[string]any{"nonce": nil}, "nonce"},
		"an empty nonce":             {map[string]any{"nonce": ""}, "nonce"},
		"a nonce that is a list":     {map[string]any{"nonce": []string{"x"}}, "malformed"},
		"the client as its own user": {map[string]any{"sub": "writ"}, "names no user"},
		"no sub":                     {map[string]any{"sub": nil}, "no usable sub"},
		"a sub with a line end":      {map[string]any{"sub": "alice\nadmin"}, "no usable sub"},
		"for another client":         {map[string]any{"aud": "crm"}, "does not know"},
		"for us and another":         {map[string]any{"aud": []string{"writ", "crm"}, "azp": "writ"}, "does not know"},
		"of another issuer":          {map[string]any{"iss": "https://evil.example"}, "Writ does not know"},
		"expired":                    {map[string]any{"exp": time.Now().Unix() - 1}, "expired"},
		"a logout token":             {map[string]any{"events": map[string]any{}}, "security event"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w, f := newWorld(t), newFake(t)
			f.claims = tt.claims
			v := f.visit(t, w, false)
			err := v.back()
			if tt.text != "" {
				want(t, err, fault.Forbidden, tt.text)
				if s := w.stored(v.ticket.ID); s.State != signin.Started {
					t.Errorf("and yet %s", s.State)
				}
			} else if err != nil {
				t.Error(err)
			}
		})
	}
}

// The secret goes where the configuration says, in one way only, and PKCE with it.
func TestClientAuthentication(t *testing.T) {
	t.Parallel()
	for _, post := range []bool{false, true} {
		w, f := newWorld(t), newFake(t)
		if err := f.visit(t, w, post).back(); err != nil {
			t.Fatal(err)
		}
		if f.basic == post || f.form.Has("client_secret") != post || len(f.form.Get("code_verifier")) != 43 || f.form.Get("redirect_uri") != external+"/callback" {
			t.Errorf("post %t: header %t, form %v", post, f.basic, f.form)
		}
	}
}

func TestStrangeMetadata(t *testing.T) {
	t.Parallel()
	for name, meta := range map[string]map[string]any{
		"of another issuer": {"issuer": "https://evil.example"},
		"no endpoints":      {"authorization_endpoint": nil, "token_endpoint": nil},
		"script":            {"authorization_endpoint": "javascript:alert(1)"},
		"no host":           {"authorization_endpoint": "https:///auth"},
		"a file":            {"token_endpoint": "file:///etc/passwd"},
	} {
		w, f := newWorld(t), newFake(t)
		f.meta = meta
		ticket := w.open(signin.Ask{})
		client := identity.NewHTTPClient(5 * time.Second)
		w.Providers = []*signin.Provider{{Issuer: f.url, ClientID: "writ", HTTP: client}}
		if _, _, to, err := w.Start(t.Context(), token(ticket), ""); err == nil || to != "" {
			t.Errorf("%s: leads to %q", name, to)
		}
		client.CloseIdleConnections()
		if s := w.stored(ticket.ID); s.State != signin.Opened {
			t.Errorf("%s: it is %s", name, s.State)
		}
	}
}
