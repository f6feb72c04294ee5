package e2e

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/writsec/writ/test/idp"
)

func TestVersion(t *testing.T) {
	t.Parallel()
	code, stdout, stderr := command(t, "version")
	if code != 0 || !strings.HasPrefix(stdout, "writ ") || stderr != "" {
		t.Errorf("ended with %d: %q %q", code, stdout, stderr)
	}
}

func TestConfigurationErrors(t *testing.T) {
	t.Parallel()
	good := `listen: 127.0.0.1:20001
ops_listen: 127.0.0.1:20002
external_url: http://127.0.0.1:20001
store: sqlite:data/writ.db
root_key_file: root.key
policy:
  path: policies
  deadline: 100ms
issuers:
  - issuer: http://127.0.0.1:20003
    speaks_for: [user, agent]
    audience: urn:writ:test
    algorithms: [RS256]
    ciba:
      client_id: writ
      client_secret_file: ciba.secret
minters:
  crm:
    jwt:
      audience: urn:crm:api
      scopes: [crm:read]
services:
  - id: crm-api
    secret_file: crm.secret
    audience: urn:crm:api
`
	for name, test := range map[string]struct {
		old, replacement string
		line             int
		want             string
	}{
		"unknown key":         {"listen: 127.0.0.1:20001\n", "lisen: 127.0.0.1:20001\n", 1, "lisen: unknown key, expected one of: "},
		"unknown key inside":  {"    audience: urn:writ:test", "    audiance: urn:writ:test", 12, "issuers[0].audiance: unknown key"},
		"wrong type":          {"deadline: 100ms", "deadline: 100", 8, `policy.deadline: is 100, expected a duration`},
		"list for a string":   {"store: sqlite:data/writ.db", "store: [x]", 4, "store: is a list, expected a string"},
		"string for a list":   {"scopes: [crm:read]", "scopes: crm:read", 21, "expected a list"},
		"missing file":        {"client_secret_file: ciba.secret", "client_secret_file: none.secret", 16, "issuers[0].ciba.client_secret_file: names "},
		"missing key":         {"root_key_file: root.key\n", "", -1, "root_key_file: is missing"},
		"missing policies":    {"path: policies", "path: none", 7, "policy.path: names "},
		"key twice":           {"store: sqlite:data/writ.db", "store: sqlite:data/writ.db\nstore: x", 5, "store: stands a second time"},
		"beyond loopback":     {"listen: 127.0.0.1:20001", "listen: 0.0.0.0:20001", 1, "beyond loopback, without TLS"},
		"any address":         {"listen: 127.0.0.1:20001", "listen: :20001", 1, "beyond loopback, without TLS"},
		"issuer without TLS":  {"issuer: http://127.0.0.1:20003", "issuer: http://idp.example.test", 10, "plain http is for loopback only"},
		"symmetric algorithm": {"algorithms: [RS256]", "algorithms: [HS256]", 13, "expected one of RS256"},
		"no algorithm":        {"algorithms: [RS256]", "algorithms: [none]", 13, "expected one of RS256"},
		"unknown principal":   {"[user, agent]", "[user, robot]", 11, "expected user, agent, operator or service"},
		"credentials for Writ": {
			"      audience: urn:crm:api\n      scopes", "      audience: http://127.0.0.1:20001\n      scopes", 20, "must never be good for Writ",
		},
		"not YAML": {"policy:\n", "policy\n", 6, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := &writ{t: t, dir: t.TempDir()}
			for _, file := range []string{"root.key", "ciba.secret", "crm.secret", "policies/x.rego"} {
				w.write(file, "x")
			}
			if strings.Count(good, test.old) != 1 {
				t.Fatalf("%q is not once in the file", test.old)
			}
			w.write("writ.yaml", strings.Replace(good, test.old, test.replacement, 1))
			code, stdout, stderr := command(t, "serve", "--config", w.path("writ.yaml"))
			where := fmt.Sprintf("writ.yaml:%d: ", test.line)
			if test.line < 0 { // what is missing is on no line
				where = "writ.yaml:"
			}
			if code != 2 || !strings.Contains(stderr, where) || !strings.Contains(stderr, test.want) {
				t.Errorf("ended with %d, want 2 and %q\n%s%s", code, where+test.want, stdout, stderr)
			}
		})
	}
	t.Run("all at once", func(t *testing.T) {
		t.Parallel()
		w := &writ{t: t, dir: t.TempDir()}
		w.write("writ.yaml", good)
		code, _, stderr := command(t, "serve", "--config", w.path("writ.yaml"))
		if code != 2 || strings.Count(stderr, "no such file") != 4 {
			t.Errorf("ended with %d: %s", code, stderr)
		}
	})
	t.Run("no file", func(t *testing.T) {
		t.Parallel()
		code, _, stderr := command(t, "serve", "--config", "none.yaml")
		if code != 2 || !strings.Contains(stderr, "none.yaml: cannot be read: no such file") {
			t.Errorf("ended with %d: %s", code, stderr)
		}
	})
	t.Run("no flag", func(t *testing.T) {
		t.Parallel()
		code, _, stderr := command(t, "serve")
		if code != 2 || !strings.Contains(stderr, "--config") {
			t.Errorf("ended with %d: %s", code, stderr)
		}
	})
}

func TestBehindProxy(t *testing.T) {
	t.Parallel()
	var port string
	w := install(t, shared, with("behind_proxy", true), with("policy.path", "ip"), func(s settings) {
		_, port, _ = strings.Cut(s["listen"].(string), ":")
		s["listen"] = "0.0.0.0:" + port
	})
	w.write("ip/ip.rego", `package writ
decision := {"effect": "deny", "reasons": [{"code": "seen", "message": input.env.ip}]}`)
	w.start()
	alice := w.as("alice", idp.SalesAgent)
	session := alice.open()
	// Only what our own proxy added last can be believed.
	a := alice.must(deny, "seen", readOpportunity(session), "X-Forwarded-For", "198.51.100.7, 203.0.113.9")
	if a.Reasons[0].Message != "203.0.113.9" {
		t.Errorf("policy saw the address %s", a.Reasons[0].Message)
	}
}

// certificate makes a self-signed one for loopback.
func certificate(t *testing.T) (certPEM, keyPEM string, pool *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "writ test"},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, BasicConstraintsValid: true, IsCA: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	pool = x509.NewCertPool()
	pool.AppendCertsFromPEM(cert)
	return string(cert), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})), pool
}

func TestTLS(t *testing.T) {
	t.Parallel()
	cert, key, pool := certificate(t)
	w := install(t, shared, with("tls.cert_file", "tls.crt"), with("tls.key_file", "tls.key"), func(s settings) {
		s["external_url"] = "https://" + s["listen"].(string)
	})
	w.write("tls.crt", cert)
	w.write("tls.key", key)
	address := strings.TrimPrefix(w.url, "http://")
	w.url = "https://" + address
	w.http.Transport = &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, ForceAttemptHTTP2: true}
	w.start() // /readyz is plain

	alice := w.as("alice", idp.SalesAgent)
	alice.must(allow, "read_opportunity", readOpportunity(alice.open()))
	res, err := w.http.Get(w.url + "/.well-known/jwks.json")
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.ProtoMajor != 2 || res.TLS.Version < tls.VersionTLS12 {
		t.Errorf("%s over TLS %x", res.Proto, res.TLS.Version)
	}
	// Long polls over HTTP/2 too.
	bob := w.as("bob", idp.HRAgent)
	answered := bob.hold(offboard(bob.open(), "e-tls"), 30)
	w.answer(w.prompt("e-tls"), idp.Verdict{})
	wantHeld(t, answered, allow, "change_employment")

	old, err := tls.Dial("tcp", address, &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11})
	if err == nil {
		old.Close()
		t.Error("TLS 1.1 is accepted")
	}
	if conn, err := tls.Dial("tcp", address, &tls.Config{RootCAs: pool, MaxVersion: tls.VersionTLS12}); err != nil {
		t.Errorf("TLS 1.2: %v", err)
	} else {
		conn.Close()
	}
	plain, err := http.Get("http://" + address + "/.well-known/jwks.json")
	if err == nil {
		plain.Body.Close()
		if plain.StatusCode < 400 {
			t.Errorf("plain HTTP got %d", plain.StatusCode)
		}
	}
}

func TestOperations(t *testing.T) {
	t.Parallel()
	w := start(t, shared)
	nobody := client{w, ""}
	for _, route := range []string{"/livez", "/readyz", "/metrics"} {
		if r := nobody.call(http.MethodGet, w.ops+route, nil); r.status != http.StatusOK {
			t.Errorf("%s: %d %s", route, r.status, r.body)
		}
		nobody.refused(nobody.call(http.MethodGet, route, nil), http.StatusNotFound, "not_found")
	}
	if r := nobody.call(http.MethodPost, w.ops+"/decide", map[string]any{}); r.status != http.StatusNotFound {
		t.Errorf("/decide on the operations listener: %d", r.status)
	}
	alice := w.as("alice", idp.SalesAgent)
	alice.must(allow, "read_opportunity", readOpportunity(alice.open()))
	if n := w.metric(`writ_decisions_total{effect="allow"}`); n != 1 {
		t.Errorf("writ_decisions_total counts %v allows", n)
	}
}

func TestStopWithHeldCalls(t *testing.T) {
	t.Parallel()
	w := start(t, shared)
	bob := w.as("bob", idp.HRAgent)
	ask := offboard(bob.open(), "e-stop-held")
	answered := bob.hold(ask, 60)
	p := w.prompt("e-stop-held")
	a := bob.must(requireCIBA, confirm, ask).Approval
	looked := make(chan held, 1)
	go func() {
		r, err := bob.try(http.MethodGet, "/approvals/"+a.ID+"?wait=60s", nil)
		looked <- held{r, err}
	}()

	// A call whose body is on its way keeps Writ draining.
	conn, err := net.Dial("tcp", strings.TrimPrefix(w.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	body, err := json.Marshal(readOpportunity(ask.Session))
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "POST /decide HTTP/1.1\r\nHost: writ\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		bob.token, len(body), body[:10])
	time.Sleep(200 * time.Millisecond)

	began := time.Now()
	w.signal(syscall.SIGTERM)
	within(t, 5*time.Second, func() error {
		r, err := client{w, ""}.try(http.MethodGet, w.ops+"/readyz", nil)
		if err == nil && r.status != http.StatusServiceUnavailable {
			err = fmt.Errorf("readyz %d while stopping", r.status)
		}
		return err
	})
	wantHeld(t, answered, requireCIBA, confirm)
	if h := <-looked; h.err != nil || read[approval](t, h.response, http.StatusOK).Status != "pending" {
		t.Errorf("the look was answered %d %v: %s", h.status, h.err, h.body)
	}
	if _, err := conn.Write(body[10:]); err != nil {
		t.Fatal(err)
	}
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatalf("the call in flight got no answer: %v", err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		t.Errorf("the call in flight got %d", res.StatusCode)
	}
	if code := w.wait(10 * time.Second); code != 0 {
		t.Errorf("ended with %d", code)
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("stopping took %v", took)
	}

	w.start() // and goes on where it stopped
	w.answer(p, idp.Verdict{})
	if got := bob.status(a, 30*time.Second); got.Status != "approved" {
		t.Errorf("status %+v", got)
	}
	bob.must(allow, "change_employment", ask.approvedBy(a))
	if n := w.prompts("e-stop-held"); n != 1 {
		t.Errorf("%d prompts", n)
	}
}
