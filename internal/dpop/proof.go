package dpop

import (
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/go-jose/go-jose/v4"

	"github.com/writsec/writ/internal/strictjson"
)

const (
	maxProof = 8 << 10 // bytes, before anything is parsed
	maxJTI   = 256     // bytes
	minRSA   = 2048    // bits (RFC 7518 §3.3); go-jose takes at most 4096
)

// Algorithms are those that a proof may be signed by, all asymmetric: the value of
// dpop_signing_alg_values_supported (RFC 9449 §5.1).
func Algorithms() []string {
	out := make([]string, len(algorithms))
	for i, a := range algorithms {
		out[i] = string(a)
	}
	return out
}

var algorithms = []jose.SignatureAlgorithm{
	jose.ES256, jose.ES384, jose.ES512, jose.EdDSA,
	jose.PS256, jose.PS384, jose.PS512, jose.RS256, jose.RS384, jose.RS512,
}

// proof is one that is well formed; nothing in it is verified yet. claims are of
// the very bytes that the signature is checked over.
type proof struct {
	raw    string
	alg    jose.SignatureAlgorithm
	claims map[string]any
}

// parse refuses everything that an honest client does not send, before any key is
// touched.
func parse(values []string) (proof, error) {
	if len(values) != 1 {
		return proof{}, fmt.Errorf("was sent %d times, expected once", len(values))
	}
	p := proof{raw: values[0]}
	if len(p.raw) > maxProof {
		return proof{}, fmt.Errorf("is longer than %d bytes", maxProof)
	}
	parts := strings.Split(p.raw, ".")
	if len(parts) != 3 {
		return proof{}, errors.New("is not a signed JWT in compact form")
	}
	header, err := object(parts[0])
	if err != nil {
		return proof{}, fmt.Errorf("has a malformed header: %w", err)
	}
	if err := p.checkHeader(header); err != nil {
		return proof{}, err
	}
	if p.claims, err = object(parts[1]); err != nil {
		return proof{}, fmt.Errorf("has a malformed payload: %w", err)
	}
	if _, err := segment(parts[2]); err != nil {
		return proof{}, fmt.Errorf("has a malformed signature: %w", err)
	}
	return p, nil
}

func (p *proof) checkHeader(header map[string]any) error {
	typ := strings.ToLower(text(header, "typ"))
	if strings.TrimPrefix(typ, "application/") != "dpop+jwt" { // RFC 7515 §4.1.9
		return errors.New("is not of the typ dpop+jwt")
	}
	p.alg = jose.SignatureAlgorithm(text(header, "alg"))
	if !slices.Contains(algorithms, p.alg) {
		return errors.New("is signed by an algorithm that Writ does not accept")
	}
	// The key is the one in jwk and no other, and extensions are not known here.
	for _, name := range []string{"crit", "jku", "x5u", "x5c", "b64", "zip"} {
		if _, ok := header[name]; ok {
			return fmt.Errorf("has %s in its header, which Writ refuses", name)
		}
	}
	jwk, ok := header["jwk"].(map[string]any)
	if !ok {
		return errors.New("has no jwk in its header")
	}
	return checkJWK(jwk, p.alg)
}

// public are the members of a key by its type (RFC 7518 §6, RFC 8037 §2).
var public = map[string][]string{"EC": {"x", "y"}, "OKP": {"x"}, "RSA": {"n", "e"}}

// checkJWK refuses a key that is not public, or not for signatures by alg. The
// numbers in it are go-jose's to check.
func checkJWK(jwk map[string]any, alg jose.SignatureAlgorithm) error {
	for _, name := range []string{"d", "p", "q", "dp", "dq", "qi", "oth", "k", "priv"} {
		if _, ok := jwk[name]; ok {
			return errors.New("has a private or symmetric key in its jwk")
		}
	}
	for _, name := range []string{"jku", "x5u", "x5c"} {
		if _, ok := jwk[name]; ok {
			return fmt.Errorf("has %s in its jwk, which Writ refuses", name)
		}
	}
	members, ok := public[text(jwk, "kty")]
	if !ok {
		return errors.New("has a jwk of a kty that Writ does not accept")
	}
	for _, name := range members {
		if b, err := segment(text(jwk, name)); err != nil || len(b) == 0 {
			return fmt.Errorf("has no usable %s in its jwk", name)
		}
	}
	if a, ok := jwk["alg"]; ok && a != string(alg) {
		return errors.New("has a jwk for another alg")
	}
	use, used := jwk["use"]
	ops, listed := jwk["key_ops"]
	list, _ := ops.([]any)
	if (used && use != "sig") || (listed && !slices.Contains(list, any("verify"))) {
		return errors.New("has a jwk that is not for signatures")
	}
	return nil
}

// verify checks the signature and returns the thumbprint of its key.
func (p proof) verify() (thumbprint string, err error) {
	jws, err := jose.ParseSignedCompact(p.raw, []jose.SignatureAlgorithm{p.alg})
	if err != nil || jws.Signatures[0].Header.JSONWebKey == nil {
		return "", errors.New("has a jwk that is no key")
	}
	jwk := jws.Signatures[0].Header.JSONWebKey
	switch key := jwk.Key.(type) {
	case *ecdsa.PublicKey, ed25519.PublicKey:
	case *rsa.PublicKey:
		if key.N.BitLen() < minRSA {
			return "", fmt.Errorf("has an RSA key of fewer than %d bits", minRSA)
		}
	default:
		return "", errors.New("has a jwk that is no key")
	}
	if _, err := jws.Verify(jwk.Key); err != nil {
		return "", errors.New("has a signature that its jwk does not verify")
	}
	sum, err := jwk.Thumbprint(crypto.SHA256)
	if err != nil {
		return "", errors.New("has a jwk that is no key")
	}
	return base64.RawURLEncoding.EncodeToString(sum), nil
}

// absolute is an http or https URL without query and fragment: scheme, host, port
// and path. It spells cases out, as those of Unicode would let ſ be an s.
var absolute = regexp.MustCompile(`^([Hh][Tt][Tt][Pp][Ss]?)://([0-9A-Za-z._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]*)?(/[!-\[\]-~]*)?$`)

// target is the one form of a URL in which htu is compared (RFC 9449 §4.3, check 9,
// which ignores query and fragment). Scheme and host lose their case, the scheme its
// port, and no path is /. Nothing else is taken to be equal, so that no two
// resources ever are.
func target(url string) (string, bool) {
	url, _, _ = strings.Cut(url, "#")
	url, _, _ = strings.Cut(url, "?")
	m := absolute.FindStringSubmatch(url)
	if m == nil {
		return "", false
	}
	scheme, host, port, path := strings.ToLower(m[1]), strings.ToLower(m[2]), m[3], cmp.Or(m[4], "/")
	if port == ":" || port == map[string]string{"https": ":443", "http": ":80"}[scheme] {
		port = ""
	}
	return scheme + "://" + host + port + path, true
}

// issuedAt reads iat, a NumericDate (RFC 7519 §2) of a sane size.
func issuedAt(claims map[string]any) (time.Time, bool) {
	n, ok := claims["iat"].(json.Number)
	if !ok {
		return time.Time{}, false
	}
	f, err := n.Float64()
	if err != nil || f <= 0 || f > 1<<40 {
		return time.Time{}, false
	}
	return time.UnixMicro(int64(f * 1e6)).UTC(), true
}

func usable(jti string) bool {
	hidden := func(r rune) bool { return !unicode.IsPrint(r) }
	return jti != "" && len(jti) <= maxJTI && !strings.ContainsFunc(jti, hidden)
}

// text is a member that is a string, or "".
func text(m map[string]any, name string) string {
	s, _ := m[name].(string)
	return s
}

// segment decodes base64url in its one canonical form, so that a proof has one
// spelling. The decoder by itself skips line ends.
func segment(s string) ([]byte, error) {
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	if err != nil || strings.ContainsAny(s, "\r\n") {
		return nil, errors.New("is not base64url")
	}
	return b, nil
}

func object(s string) (map[string]any, error) {
	b, err := segment(s)
	if err != nil {
		return nil, err
	}
	return strictjson.Object(b)
}
