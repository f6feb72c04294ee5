package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

const boundIssuer = "https://bound.example"

// boundTokens is an issuer whose keys are in a file and whose tokens have to be bound to
// a TLS client certificate.
func boundTokens(t *testing.T, w *writ) (sign func(claims map[string]any) string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	set, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k", Use: "sig"}}})
	if err != nil {
		t.Fatal(err)
	}
	w.write("jwks.json", string(set))
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "k"}},
		(&jose.SignerOptions{}).WithType("at+jwt"))
	if err != nil {
		t.Fatal(err)
	}
	return func(claims map[string]any) string {
		all := map[string]any{
			"iss": boundIssuer, "aud": w.url, "sub": "alice", "client_id": "sales-agent", "groups": []string{"sales"},
			"jti": rand.Text(), "iat": time.Now().Unix(), "exp": time.Now().Add(time.Minute).Unix(),
		}
		for name, v := range claims {
			all[name] = v
		}
		payload, err := json.Marshal(all)
		if err != nil {
			t.Fatal(err)
		}
		jws, err := signer.Sign(payload)
		if err != nil {
			t.Fatal(err)
		}
		token, err := jws.CompactSerialize()
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
}

// A token that is bound to a certificate is good over a connection with that very
// certificate, and nowhere else; what is minted on it is bound to it too.
func TestMutualTLS(t *testing.T) {
	t.Parallel()
	cert, key, pool := certificate(t)
	w := install(t, shared, with("tls.cert_file", "tls.crt"), with("tls.key_file", "tls.key"), with("tls.client_certs", true), func(s settings) {
		url := "https://" + s["listen"].(string)
		s["external_url"] = url
		s["issuers"] = append(s["issuers"].([]any), map[string]any{
			"issuer": boundIssuer, "speaks_for": []string{"user", "agent"}, "audience": url, "algorithms": []string{"ES256"},
			"jwks_file": "jwks.json", "sender_constraint": []string{"mtls"},
		})
	})
	w.write("tls.crt", cert)
	w.write("tls.key", key)
	w.url = "https://" + strings.TrimPrefix(w.url, "http://")
	sign := boundTokens(t, w)
	w.http.Transport = &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, ForceAttemptHTTP2: true}
	w.start()

	mine, theirs := clientCert(t), clientCert(t)
	with := func(token string, certs ...tls.Certificate) client {
		other := w.in(t)
		transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, Certificates: certs}, ForceAttemptHTTP2: true}
		t.Cleanup(transport.CloseIdleConnections)
		other.http = &http.Client{Transport: transport, Timeout: time.Minute}
		return client{other, token}
	}
	sum := sha256.Sum256(mine.Certificate[0])
	print := base64.RawURLEncoding.EncodeToString(sum[:])
	token := sign(map[string]any{"cnf": map[string]any{"x5t#S256": print}})
	agent := with(token, mine)
	session := agent.open()
	a := agent.must(allow, "read_opportunity", readOpportunity(session))
	if seen := w.introspect("crm", a.Credential.Secret.Token); !reflect.DeepEqual(seen["cnf"], map[string]any{"x5t#S256": print}) {
		t.Errorf("introspection: %v", seen)
	}
	for name, thief := range map[string]client{
		"no certificate":         with(token),
		"another certificate":    with(token, theirs),
		"an unbound token":       with(sign(nil), mine),
		"bound to something new": with(sign(map[string]any{"cnf": map[string]any{"kid": "x"}}), mine),
	} {
		t.Run(name, func(t *testing.T) {
			thief.refused(thief.call(http.MethodPost, "/decide", readOpportunity(session)), http.StatusUnauthorized, "invalid_token")
		})
	}
	// What a proxy would say is not believed from a client.
	spoofed := with(token)
	header := "Client-Cert:" + base64.StdEncoding.EncodeToString(mine.Certificate[0]) + ":"
	name, value, _ := strings.Cut(header, ":")
	spoofed.refused(spoofed.call(http.MethodPost, "/decide", readOpportunity(session), name, ":"+value), http.StatusUnauthorized, "invalid_token")
}

// Behind a proxy that terminates TLS, the certificate comes in a header.
func TestProxyClientCert(t *testing.T) {
	t.Parallel()
	w := install(t, shared, with("behind_proxy", true), with("proxy_client_cert", true), func(s settings) {
		s["issuers"] = append(s["issuers"].([]any), map[string]any{
			"issuer": boundIssuer, "speaks_for": []string{"user", "agent"}, "audience": s["external_url"], "algorithms": []string{"ES256"},
			"jwks_file": "jwks.json",
		})
	})
	sign := boundTokens(t, w)
	w.start()
	mine, theirs := clientCert(t), clientCert(t)
	sum := sha256.Sum256(mine.Certificate[0])
	agent := client{w, sign(map[string]any{"cnf": map[string]any{"x5t#S256": base64.RawURLEncoding.EncodeToString(sum[:])}})}
	header := func(c tls.Certificate) string { return ":" + base64.StdEncoding.EncodeToString(c.Certificate[0]) + ":" }
	ask := func(header ...string) response {
		return agent.call(http.MethodPost, "/sessions", map[string]any{}, header...)
	}
	if r := ask("Client-Cert", header(mine)); r.status != http.StatusCreated {
		t.Errorf("%d %s", r.status, r.body)
	}
	agent.refused(ask(), http.StatusUnauthorized, "invalid_token")
	agent.refused(ask("Client-Cert", header(theirs)), http.StatusUnauthorized, "invalid_token")
	for _, bad := range []string{"x", "::", ":AAAA:", header(mine)[1:], strings.Repeat("A", 20<<10)} {
		agent.refused(ask("Client-Cert", bad), http.StatusBadRequest, "invalid_request")
	}
}

// clientCert is an agent's, signed by itself.
func clientCert(t *testing.T) tls.Certificate {
	t.Helper()
	cert, key, _ := certificate(t)
	pair, err := tls.X509KeyPair([]byte(cert), []byte(key))
	if err != nil {
		t.Fatal(err)
	}
	return pair
}
