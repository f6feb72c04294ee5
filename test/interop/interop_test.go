package interop_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/writsec/writ/client"
	"github.com/writsec/writ/internal/config"
	"github.com/writsec/writ/internal/dev"
	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/intent"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/minter"
	"github.com/writsec/writ/test/interop"
)

const (
	audience = "urn:crm:api"
	action   = "crm.opportunity.read"
)

// writ is a running one whose CRM reads status lists, and who has a key of each
// algorithm.
type writ struct {
	*dev.Dev
	t    *testing.T
	keys map[string]*minter.Keys // by algorithm, each signing
}

// early lets the next key sign before its time.
type early struct{ minter.KeyStore }

func (e early) SigningKeys(ctx context.Context) ([]minter.StoredKey, error) {
	keys, err := e.KeyStore.SigningKeys(ctx)
	for i := range keys {
		keys[i].ActiveAt = keys[i].ActiveAt.Add(-minter.KeyLead)
	}
	return keys, err
}

func start(t *testing.T) *writ {
	t.Helper()
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	d, err := dev.New(ctx, dev.Config{
		Dir: t.TempDir(), Policies: "../../policies", Listen: "127.0.0.1:0", OpsListen: "127.0.0.1:0", IDPListen: "127.0.0.1:0",
		Logger: slog.New(slog.DiscardHandler),
		Change: func(c *config.Config) {
			c.Policy.Deadline = 5 * time.Second // the machine may be busy
			c.Minters["crm"].JWT.Checks = "status_list"
		},
	})
	if err != nil {
		stop()
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	w := &writ{Dev: d, t: t, keys: map[string]*minter.Keys{}}
	store := d.Server.Store()
	r := minter.Rotation{Algorithm: "EdDSA", Life: time.Hour}
	now, err := minter.LoadKeys(t.Context(), store, minter.Rotation{Algorithm: "ES256", Life: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := minter.Rotate(t.Context(), store, r, false); err != nil {
		t.Fatal(err)
	}
	next, err := minter.LoadKeys(t.Context(), early{store}, r)
	if err != nil {
		t.Fatal(err)
	}
	w.keys["ES256"], w.keys["EdDSA"] = now, next
	// Writ itself follows within moments; verifiers then find both keys.
	for end := time.Now().Add(20 * time.Second); bytes.Count(w.get("/.well-known/jwks.json"), []byte(`"kid"`)) < 2; {
		if time.Now().After(end) {
			t.Fatal("the next key is not published")
		}
		time.Sleep(20 * time.Millisecond)
	}
	return w
}

func (w *writ) get(path string) []byte {
	w.t.Helper()
	res, err := http.Get(w.URL + path) //nolint:noctx // a test of its own
	if err != nil {
		w.t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		w.t.Fatal(res.Status, err)
	}
	return body
}

// ask gets a token as alice's agent does. Asking again by the same key is a retry.
func (w *writ) ask(key string) string {
	w.t.Helper()
	res, err := http.Get(w.IDP.Issuer() + "/dev/token?user=alice&agent=sales-agent") //nolint:noctx // as above
	if err != nil {
		w.t.Fatal(err)
	}
	defer res.Body.Close()
	token, err := io.ReadAll(res.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	c := client.New(w.URL, client.StaticToken(string(token)))
	a, err := c.Decide(w.t.Context(), client.Request{
		Intent: client.Intent{Action: action}, Resource: client.Resource{Type: "crm.opportunity", ID: "opp-42"}, IdempotencyKey: key,
	})
	if err != nil || a.Credential == nil || a.Credential.Revocability != "status" {
		w.t.Fatalf("%+v %v", a, err)
	}
	return a.Credential.Secret["token"]
}

func (w *writ) revoke(token string) {
	w.t.Helper()
	s := w.Services["crm"]
	res, err := http.PostForm(w.URL+"/revoke", url.Values{"token": {token}, "client_id": {s.ID}, "client_secret": {s.Secret}}) //nolint:noctx // as above
	if err != nil {
		w.t.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		w.t.Fatal(res.Status)
	}
}

// sign mints past Writ's door, to have what it would not give.
func (w *writ) sign(algorithm, issuer, aud string, expires time.Time) string {
	w.t.Helper()
	m := minter.JWT{Issuer: issuer, Audience: aud, Keys: w.keys[algorithm]}
	who := identity.Ref{Issuer: w.IDP.Issuer(), ID: "alice"}
	made, err := m.Mint(w.t.Context(), lease.Order{
		Lease: lease.Lease{
			ID: id.New(id.Lease), Session: "ses_1", User: who, Agent: who, CreatedAt: expires.Add(-time.Minute), ExpiresAt: expires,
			Grant: lease.Grant{Scope: map[string]any{"scopes": []string{"crm:read"}}},
		},
		Act: intent.Act{User: who, Agent: who, Intent: intent.Intent{Action: action}, Resource: intent.Resource{Type: "crm.opportunity", ID: "opp-42"}},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return made.Secret["token"]
}

// forge signs a token's claims, changed or not, by something that is no key of Writ's.
func forge(t *testing.T, token string, header map[string]any, key any, algorithm jose.SignatureAlgorithm) string {
	t.Helper()
	payload, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[1])
	if err != nil {
		t.Fatal(err)
	}
	o := &jose.SignerOptions{}
	for name, v := range header {
		o.WithHeader(jose.HeaderKey(name), v)
	}
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: algorithm, Key: key}, o)
	if err != nil {
		t.Fatal(err)
	}
	jws, err := s.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	out, err := jws.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// tampered has other claims under the same signature.
func tampered(t *testing.T, token string) string {
	t.Helper()
	parts := strings.Split(token, ".")
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil || !bytes.Contains(payload, []byte("opp-42")) {
		t.Fatal(err)
	}
	parts[1] = base64.RawURLEncoding.EncodeToString(bytes.ReplaceAll(payload, []byte("opp-42"), []byte("opp-43")))
	return strings.Join(parts, ".")
}

func TestStockLibrariesVerify(t *testing.T) {
	w := start(t)
	const good = "good for " + action
	asked, ended := w.ask("1"), w.ask("2")
	w.revoke(ended)
	soon := time.Now().Add(time.Minute)
	tokens := map[string]string{
		"as asked": asked, "revoked": ended, "replaced by a retry": w.ask("3"), "of the retry": w.ask("3"),
		"a status list": string(w.get("/status/1")),
	}
	want := map[string]string{
		"as asked": good, "revoked": "revoked", "replaced by a retry": "revoked", "of the retry": good, "a status list": "refused",
	}
	stranger, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for algorithm, keys := range w.keys {
		signed := w.sign(algorithm, w.URL, audience, soon)
		public, err := json.Marshal(keys.JWKS())
		if err != nil {
			t.Fatal(err)
		}
		header := map[string]any{"typ": "at+jwt", "kid": keys.Signer()}
		unsigned, _ := json.Marshal(map[string]any{"alg": "none", "typ": "at+jwt", "kid": keys.Signer()})
		for name, token := range map[string]string{
			"expired":             w.sign(algorithm, w.URL, audience, time.Now().Add(-time.Minute)),
			"for another":         w.sign(algorithm, w.URL, "urn:hr:api", soon),
			"from another":        w.sign(algorithm, "https://writ.example", audience, soon),
			"tampered":            tampered(t, signed),
			"signature cut":       signed[:len(signed)-6],
			"unsigned":            base64.RawURLEncoding.EncodeToString(unsigned) + "." + strings.Split(signed, ".")[1] + ".",
			"by a stranger":       forge(t, signed, header, stranger, jose.ES256),
			"by the public key":   forge(t, signed, header, public, jose.HS256),
			"of a key unknown":    forge(t, signed, map[string]any{"typ": "at+jwt", "kid": "nobody's"}, stranger, jose.ES256),
			"with key in header":  forge(t, signed, map[string]any{"typ": "at+jwt", "jwk": jose.JSONWebKey{Key: stranger.Public()}}, stranger, jose.ES256),
			"nothing of the kind": "not.a.token",
		} {
			tokens[name+", "+algorithm], want[name+", "+algorithm] = token, "refused"
		}
		tokens[algorithm], want[algorithm] = signed, good
	}
	input, err := json.Marshal(map[string]any{"issuer": w.URL, "audience": audience, "tokens": tokens})
	if err != nil {
		t.Fatal(err)
	}
	check := func(t *testing.T, got map[string]string) {
		t.Helper()
		for name := range tokens {
			if !strings.HasPrefix(got[name], want[name]) {
				t.Errorf("a token %s is %q, want %s", name, got[name], want[name])
			}
		}
	}
	t.Run("Node", func(t *testing.T) { check(t, run(t, input, nodeReady(t), "run.mjs")) })
	t.Run("Python", func(t *testing.T) { check(t, run(t, input, pythonReady(t), "run.py")) })
	t.Run("Go", func(t *testing.T) {
		v := &interop.Verifier{Issuer: w.URL, Audience: audience}
		got := map[string]string{}
		for name, token := range tokens {
			var c struct {
				Details []struct {
					Actions []string `json:"actions"`
				} `json:"authorization_details"`
			}
			switch err := v.Verify(t.Context(), token, &c); {
			case errors.Is(err, interop.ErrRevoked):
				got[name] = "revoked"
			case err != nil:
				got[name] = "refused: " + err.Error()
			default:
				got[name] = "good for " + c.Details[0].Actions[0]
			}
		}
		check(t, got)
	})
}

// run has another language verify what the input holds.
func run(t *testing.T, input []byte, command string, args ...string) (results map[string]string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, command, args...)
	cmd.Env = append(os.Environ(), "PYTHONDONTWRITEBYTECODE=1")
	cmd.Stdin = bytes.NewReader(input)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err == nil {
		err = json.Unmarshal(out, &results)
	}
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", command, args, err, out, errs.String())
	}
	return results
}

// What the docs show is what is tested.
func TestDocsShowTheseFiles(t *testing.T) {
	doc, err := os.ReadFile("../../docs/tokens.md")
	if err != nil {
		t.Fatal(err)
	}
	for file, language := range map[string]string{"verify.mjs": "js", "verify.py": "python", "verify.go": "go"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Contains(doc, []byte("```"+language+"\n"+string(text)+"```\n")) {
			t.Errorf("docs/tokens.md does not show %s as it is", file)
		}
	}
}
