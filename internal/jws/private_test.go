package jws_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"github.com/writsec/writ/internal/jws"
)

func TestParsePrivateKey(t *testing.T) {
	t.Parallel()
	block := func(kind string, der []byte, err error) string {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	pkcs8 := func(key crypto.PrivateKey, err error) string {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		return block("PRIVATE KEY", der, err)
	}
	big, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	sec1, err := x509.MarshalECPrivateKey(ec)
	for name, c := range map[string]struct{ text, alg, want string }{
		"RSA":          {pkcs8(big, nil), "RS256", ""},
		"RSA, PKCS #1": {block("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(big), nil), "RS256", ""},
		"P-256":        {pkcs8(ec, nil), "ES256", ""},
		"P-256, SEC 1": {block("EC PRIVATE KEY", sec1, err), "ES256", ""},
		"P-256, openssl ecparam": {
			block("EC PARAMETERS", []byte{6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7}, nil) + block("EC PRIVATE KEY", sec1, err), "ES256", "",
		},
		"P-384":     {pkcs8(ecdsa.GenerateKey(elliptic.P384(), rand.Reader)), "ES384", ""},
		"P-521":     {pkcs8(ecdsa.GenerateKey(elliptic.P521(), rand.Reader)), "", "another kind"},
		"Ed25519":   {pkcs8(ed, nil), "", "another kind"},
		"weak":      {pkcs8(small, nil), "", "1024 bits"},
		"nothing":   {"", "", "no private key in PEM"},
		"no key":    {block("CERTIFICATE", []byte("secret words"), nil), "", "no private key in PEM"},
		"words":     {"secret words", "", "no private key in PEM"},
		"encrypted": {block("ENCRYPTED PRIVATE KEY", []byte("secret words"), nil), "", "unencrypted"},
	} {
		key, err := jws.ParsePrivateKey([]byte(c.text))
		if c.want != "" {
			if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "secret") {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if err != nil || key.Algorithm != c.alg || key.KeyID == "" {
			t.Errorf("%s: %s %s, %v", name, key.Algorithm, key.KeyID, err)
			continue
		}
		if _, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.SignatureAlgorithm(key.Algorithm), Key: key}, nil); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
