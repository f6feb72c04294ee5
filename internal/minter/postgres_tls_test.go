package minter_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/minter"
)

// selfSigned is a certificate and its key, PEM, for an address.
func selfSigned(t *testing.T, ip string) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "db"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.ParseIP(ip)}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}))
}

// Writ and its agents make the server prove who it is.
func TestPostgresTLS(t *testing.T) {
	t.Parallel()
	g, _ := ownServer(t, nil)
	serve := func(ip string) (ca string) {
		cert, key := selfSigned(t, ip)
		for name, text := range map[string]string{"server.crt": cert, "server.key": key} {
			g.sql(t, `COPY (SELECT unnest(string_to_array($$`+strings.TrimSpace(text)+`$$, E'\n'))) TO PROGRAM 'umask 077; cat > `+name+`'`)
		}
		g.sql(t, `ALTER SYSTEM SET ssl = on`, `SELECT pg_reload_conf()`)
		time.Sleep(300 * time.Millisecond)
		ca = filepath.Join(t.TempDir(), "ca.pem")
		if err := os.WriteFile(ca, []byte(cert), 0o600); err != nil {
			t.Fatal(err)
		}
		return ca
	}
	open := func(ca string) *minter.Postgres {
		return g.open(t, func(c *minter.PostgresConfig) {
			c.CAFile, c.URL = ca, with(c.URL, func(u *url.URL) { u.RawQuery = "sslmode=verify-full" })
		})
	}
	ca := serve("127.0.0.1")
	m := open(ca)
	l := g.lease(g.ro)
	made, err := m.Mint(t.Context(), lease.Order{Lease: l})
	if err != nil {
		t.Fatal(err)
	}
	s := made.Secret
	if s["sslmode"] != "verify-full" || !strings.Contains(s["dsn"], "sslmode=verify-full") || !strings.HasPrefix(s["ca"], "-----BEGIN CERTIFICATE-----") {
		t.Errorf("sslmode %s", s["sslmode"])
	}
	if _, err := pgx.Connect(t.Context(), s["dsn"]); err == nil {
		t.Error("logged in without the CA")
	}
	login(t, lease.Secret{"dsn": s["dsn"] + "&sslrootcert=" + url.QueryEscape(ca)})
	for _, f := range m.Doctor(t.Context(), g.bootstrap) {
		if f.Level != minter.FindingOK {
			t.Errorf("%+v", f)
		}
	}
	g.unmake(t, l)

	for name, other := range map[string]string{"another name": serve("192.0.2.1"), "another CA": ca} {
		if _, err := open(other).Survey(t.Context()); err == nil || !strings.Contains(err.Error(), "x509") && !strings.Contains(err.Error(), "tls") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
