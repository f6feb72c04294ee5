package httpapi_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/writsec/writ/internal/dev"
)

// wallet is an agent with a key of its own.
type wallet struct {
	t   *testing.T
	key *ecdsa.PrivateKey
}

func newWallet(t *testing.T) wallet {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return wallet{t, key}
}

func (a wallet) thumbprint() string {
	sum, err := (&jose.JSONWebKey{Key: a.key.Public()}).Thumbprint(crypto.SHA256)
	if err != nil {
		a.t.Fatal(err)
	}
	return base64.RawURLEncoding.EncodeToString(sum)
}

// token is one that names alice and sales-agent, bound to the key.
func (a wallet) token() string {
	a.t.Helper()
	now := time.Now()
	return signed(a.t, "at+jwt", obj{
		"iss": w.dev.IDP.Issuer(), "aud": dev.Audience, "sub": "alice", "client_id": "sales-agent", "jti": rand.Text(),
		"iat": now.Unix(), "exp": now.Add(time.Minute).Unix(), "groups": []string{"sales"}, "cnf": obj{"jkt": a.thumbprint()},
	}, nil)
}

// proof is RFC 9449 §4.2's; a member that is nil is left out.
func (a wallet) proof(method, path, token string, changes obj) string {
	a.t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: a.key},
		(&jose.SignerOptions{EmbedJWK: true}).WithType("dpop+jwt"))
	if err != nil {
		a.t.Fatal(err)
	}
	ath := sha256.Sum256([]byte(token))
	claims := obj{
		"jti": rand.Text(), "htm": method, "htu": w.dev.URL + path, "iat": time.Now().Unix(),
		"ath": base64.RawURLEncoding.EncodeToString(ath[:]),
	}
	for name, v := range changes {
		claims[name] = v
		if v == nil {
			delete(claims, name)
		}
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		a.t.Fatal(err)
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		a.t.Fatal(err)
	}
	out, err := jws.CompactSerialize()
	if err != nil {
		a.t.Fatal(err)
	}
	return out
}

func dpopHeaders(token string, proofs ...string) http.Header {
	return http.Header{"Authorization": {"DPoP " + token}, "DPoP": proofs}
}

// TestNegative10Possession: a bound token is good with its proof alone, and what is
// minted on it is bound to the same key.
func TestNegative10Possession(t *testing.T) {
	agent, thief := newWallet(t), newWallet(t)
	token := agent.token()
	ask := func(header http.Header, session string) answer {
		t.Helper()
		return call{method: "POST", path: "/decide", header: header, body: read(session)}.send(t)
	}
	good := func() string { return agent.proof("POST", "/decide", token, nil) }
	a := ask(dpopHeaders(token, good()), "")
	a.decided(t, "allow", "")
	nonce := a.header.Get("DPoP-Nonce")
	if nonce == "" {
		t.Error("no nonce for the next proof")
	}
	if got := a.str("credential", "secret", "token_type"); got != "DPoP" {
		t.Errorf("token_type %q", got)
	}
	minted := a.str("credential", "secret", "token")
	payload, err := base64.RawURLEncoding.DecodeString(strings.Split(minted, ".")[1])
	if err != nil {
		t.Fatal(err)
	}
	var claims struct {
		Cnf map[string]string `json:"cnf"`
	}
	if err := json.Unmarshal(payload, &claims); err != nil || claims.Cnf["jkt"] != agent.thumbprint() {
		t.Errorf("minted with cnf %v, %v", claims.Cnf, err)
	}
	s := w.dev.Services["crm"]
	seen := call{method: "POST", path: "/introspect", body: url.Values{"token": {minted}, "client_id": {s.ID}, "client_secret": {s.Secret}}}.send(t)
	if seen.str("token_type") != "DPoP" || seen.str("cnf", "jkt") != agent.thumbprint() {
		t.Errorf("introspection: %s", seen.raw)
	}

	session := a.str("session")
	ask(dpopHeaders(token, agent.proof("POST", "/decide", token, obj{"nonce": nonce})), session).decided(t, "allow", "")
	used := good()
	ask(dpopHeaders(token, used), session).decided(t, "allow", "")

	unbound := alice(t)
	for name, c := range map[string]struct {
		header http.Header
		code   string
		says   string
	}{
		"as Bearer":                {http.Header{"Authorization": {"Bearer " + token}}, "invalid_token", "Authorization: DPoP"},
		"as Bearer with its proof": {http.Header{"Authorization": {"Bearer " + token}, "DPoP": {good()}}, "invalid_token", "Authorization: DPoP"},
		"without proof":            {dpopHeaders(token), "invalid_dpop_proof", "sent 0 times"},
		"with two proofs":          {dpopHeaders(token, good(), good()), "invalid_dpop_proof", "sent 2 times"},
		"the proof again":          {dpopHeaders(token, used), "invalid_dpop_proof", "used before"},
		"a thief's proof":          {dpopHeaders(token, thief.proof("POST", "/decide", token, nil)), "invalid_token", "another key"},
		"a proof for another URL":  {dpopHeaders(token, agent.proof("POST", "/sessions", token, nil)), "invalid_dpop_proof", "htu"},
		"for another method":       {dpopHeaders(token, agent.proof("GET", "/decide", token, nil)), "invalid_dpop_proof", "htm"},
		"for another token":        {dpopHeaders(token, agent.proof("POST", "/decide", unbound, nil)), "invalid_dpop_proof", "ath"},
		"for no token":             {dpopHeaders(token, agent.proof("POST", "/decide", token, obj{"ath": nil})), "invalid_dpop_proof", "ath"},
		"of before":                {dpopHeaders(token, agent.proof("POST", "/decide", token, obj{"iat": time.Now().Add(-2 * time.Minute).Unix()})), "invalid_dpop_proof", "iat"},
		"of after":                 {dpopHeaders(token, agent.proof("POST", "/decide", token, obj{"iat": time.Now().Add(2 * time.Minute).Unix()})), "invalid_dpop_proof", "iat"},
		"without id":               {dpopHeaders(token, agent.proof("POST", "/decide", token, obj{"jti": nil})), "invalid_dpop_proof", "jti"},
		"no proof but the token":   {dpopHeaders(token, token), "invalid_dpop_proof", "typ"},
		"an unbound token":         {dpopHeaders(unbound, agent.proof("POST", "/decide", unbound, nil)), "invalid_token", "not bound"},
	} {
		t.Run(name, func(t *testing.T) {
			got := call{method: "POST", path: "/decide", header: c.header, body: read(session), loose: true}.send(t)
			got.refused(t, 401, c.code, "-")
			if !strings.Contains(got.str("detail"), c.says) {
				t.Errorf("%s", got.raw)
			}
		})
	}
	// As subject_token it is the same: whoever brings it must hold its key.
	own := signed(t, "at+jwt", obj{
		"iss": w.dev.IDP.Issuer(), "aud": dev.Audience, "sub": "sales-agent", "client_id": "sales-agent", "jti": rand.Text(),
		"iat": time.Now().Unix(), "exp": time.Now().Add(time.Minute).Unix(),
	}, nil)
	got := call{method: "POST", path: "/sessions", token: own, body: obj{"subject_token": token}, loose: true}.send(t)
	got.refused(t, 401, "invalid_token", "-")
	if !strings.Contains(got.str("detail"), "another key") {
		t.Errorf("%s", got.raw)
	}
	if alive := look(t, session, agent); alive.str("status") != "active" {
		t.Errorf("%s", alive.raw)
	}
}

func look(t *testing.T, session string, a wallet) answer {
	t.Helper()
	token := a.token()
	path := "/sessions/" + session
	return call{method: "GET", path: path, header: dpopHeaders(token, a.proof("GET", path, token, nil))}.send(t)
}
