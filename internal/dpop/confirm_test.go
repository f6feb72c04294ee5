package dpop

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"
	"time"
)

var (
	jktA = digest([]byte("a"))
	x5tA = digest([]byte("b"))
)

func TestConfirmation(t *testing.T) {
	for _, tt := range []struct {
		name string
		cnf  any
		want Confirmation // zero: refused
	}{
		{"DPoP", map[string]any{"jkt": jktA}, Confirmation{JKT: jktA}},
		{"mTLS", map[string]any{"x5t#S256": x5tA}, Confirmation{X5T: x5tA}},
		{"both", map[string]any{"jkt": jktA, "x5t#S256": x5tA}, Confirmation{jktA, x5tA}},
		{"null", nil, Confirmation{}},
		{"text", jktA, Confirmation{}},
		{"list", []any{map[string]any{"jkt": jktA}}, Confirmation{}},
		{"empty", map[string]any{}, Confirmation{}},
		{"jwk", map[string]any{"jwk": map[string]any{"kty": "EC"}}, Confirmation{}},
		{"kid", map[string]any{"kid": jktA}, Confirmation{}},
		{"unknown", map[string]any{"osc": jktA}, Confirmation{}},
		{"by case", map[string]any{"JKT": jktA}, Confirmation{}},
		{"SHA-1", map[string]any{"x5t": jktA}, Confirmation{}},
		{"known beside unknown", map[string]any{"jkt": jktA, "jwe": "x"}, Confirmation{}},
		{"known beside null", map[string]any{"jkt": jktA, "x5t#S256": nil}, Confirmation{}},
		{"known beside malformed", map[string]any{"jkt": jktA, "x5t#S256": "x"}, Confirmation{}},
		{"empty jkt", map[string]any{"jkt": ""}, Confirmation{}},
		{"jkt is a number", map[string]any{"jkt": json.Number("1")}, Confirmation{}},
		{"short jkt", map[string]any{"jkt": jktA[:42]}, Confirmation{}},
		{"padded jkt", map[string]any{"jkt": jktA + "="}, Confirmation{}},
		{"jkt with a line end", map[string]any{"jkt": jktA + "\n"}, Confirmation{}},
		{"jkt of another spelling", map[string]any{"jkt": strings.Repeat("A", 42) + "B"}, Confirmation{}},
		{"jkt in base64", map[string]any{"jkt": strings.Repeat("+", 42) + "A"}, Confirmation{}},
		{"jkt in hex", map[string]any{"jkt": strings.Repeat("a0", 32)}, Confirmation{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := ParseConfirmation(map[string]any{"cnf": tt.cnf})
			if tt.want == (Confirmation{}) {
				if err == nil || err.Error() != "is bound in a way that Writ can't check" || c.Bound() {
					t.Errorf("%+v %v", c, err)
				}
				return
			}
			if err != nil || c != tt.want || !c.Bound() {
				t.Errorf("%+v %v", c, err)
			}
			// What is minted is read back the same.
			b, err := json.Marshal(map[string]any{"cnf": c})
			if err != nil {
				t.Fatal(err)
			}
			var claims map[string]any
			if err := json.Unmarshal(b, &claims); err != nil {
				t.Fatal(err)
			}
			if again, err := ParseConfirmation(claims); err != nil || again != c {
				t.Errorf("%s: %+v %v", b, again, err)
			}
		})
	}
	c, err := ParseConfirmation(map[string]any{"sub": "alice"})
	if err != nil || c.Bound() {
		t.Errorf("unbound: %+v %v", c, err)
	}
	if b, err := json.Marshal(struct {
		C Confirmation `json:"cnf,omitzero"`
	}{}); err != nil || string(b) != "{}" {
		t.Errorf("%s %v", b, err)
	}
}

func TestConfirmed(t *testing.T) {
	for _, tt := range []struct {
		name string
		c    Confirmation
		by   Held
		want bool
	}{
		{"DPoP", Confirmation{JKT: jktA}, Held{JKT: jktA}, true},
		{"DPoP over mTLS", Confirmation{JKT: jktA}, Held{JKT: jktA, X5T: x5tA}, true},
		{"mTLS", Confirmation{X5T: x5tA}, Held{X5T: x5tA}, true},
		{"both", Confirmation{jktA, x5tA}, Held{jktA, x5tA}, true},
		{"nothing held", Confirmation{JKT: jktA}, Held{}, false},
		{"another key", Confirmation{JKT: jktA}, Held{JKT: x5tA}, false},
		{"a certificate for a key", Confirmation{JKT: jktA}, Held{X5T: jktA}, false},
		{"a key for a certificate", Confirmation{X5T: x5tA}, Held{JKT: x5tA}, false},
		{"one of two", Confirmation{jktA, x5tA}, Held{JKT: jktA}, false},
		{"other of two", Confirmation{jktA, x5tA}, Held{X5T: x5tA}, false},
		{"crossed", Confirmation{jktA, x5tA}, Held{x5tA, jktA}, false},
		{"unbound", Confirmation{}, Held{}, false},
		{"unbound, with a key", Confirmation{}, Held{jktA, x5tA}, false},
	} {
		if got := tt.c.Confirmed(tt.by); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}

func certificate() []byte {
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	return must(x509.CreateCertificate(rand.Reader, c, c, p256.Public(), p256))
}

func TestParseClientCert(t *testing.T) {
	der := certificate()
	std := base64.StdEncoding.EncodeToString
	honest := ":" + std(der) + ":"
	for _, values := range [][]string{{honest}, {"  " + honest + " "}} {
		cert, err := ParseClientCert(values)
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(der)
		if got := CertThumbprint(cert); got != b64(sum[:]) {
			t.Errorf("thumbprint %s", got)
		}
	}
	const malformed = "is not one certificate in base64 between colons"
	for _, tt := range []struct {
		name   string
		values []string
		want   string
	}{
		{"none", nil, "was sent 0 times, expected once"},
		{"two", []string{honest, honest}, "was sent 2 times, expected once"},
		{"two in one", []string{honest + ", " + honest}, malformed},
		{"two in one sequence", []string{":" + std(append(der, der...)) + ":"}, malformed},
		{"too long", []string{":" + strings.Repeat("A", maxClientCert) + ":"}, "is longer than 16384 bytes"},
		{"empty", []string{""}, malformed},
		{"colon", []string{":"}, malformed},
		{"empty sequence", []string{"::"}, malformed},
		{"no colons", []string{std(der)}, malformed},
		{"no end", []string{":" + std(der)}, malformed},
		{"parameter", []string{honest + ";a=1"}, malformed},
		{"list", []string{"(" + honest + ")"}, malformed},
		{"base64url", []string{":" + base64.URLEncoding.EncodeToString([]byte{0x30, 0xff, 0xfe}) + ":"}, malformed},
		{"line end", []string{":" + std(der)[:8] + "\r\n" + std(der)[8:] + ":"}, malformed},
		{"space inside", []string{": " + std(der) + ":"}, malformed},
		{"bytes after", []string{":" + std(append(der, 0)) + ":"}, malformed},
		{"cut", []string{":" + std(der[:len(der)-1]) + ":"}, malformed},
		{"PEM", []string{":" + std(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})) + ":"}, malformed},
	} {
		if _, err := ParseClientCert(tt.values); err == nil || err.Error() != tt.want {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

func FuzzClientCert(f *testing.F) {
	f.Add(":" + base64.StdEncoding.EncodeToString(certificate()) + ":")
	f.Add("::")
	f.Add(":MA==:;a")
	f.Fuzz(func(t *testing.T, value string) {
		cert, err := ParseClientCert([]string{value})
		if err != nil {
			return
		}
		if want := ":" + base64.StdEncoding.EncodeToString(cert.Raw) + ":"; strings.Trim(value, " ") != want {
			t.Fatalf("%q is not the one spelling of its certificate", value)
		}
	})
}
