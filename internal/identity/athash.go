package identity

import (
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"encoding/base64"
	"strings"

	"github.com/go-jose/go-jose/v4"
)

// AccessTokenHashed checks at_hash (OpenID Connect Core §3.1.3.6) of an ID token that
// IDToken has verified: its header can be trusted for the algorithm.
func AccessTokenHashed(idToken, accessToken string, hash any) bool {
	jws, err := jose.ParseSignedCompact(idToken, []jose.SignatureAlgorithm{
		jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512, jose.ES256, jose.ES384, jose.ES512, jose.EdDSA,
	})
	want, ok := hash.(string)
	if err != nil || !ok || accessToken == "" {
		return false
	}
	var sum []byte
	switch alg := jws.Signatures[0].Header.Algorithm; {
	case strings.HasSuffix(alg, "256"):
		s := sha256.Sum256([]byte(accessToken))
		sum = s[:]
	case strings.HasSuffix(alg, "384"):
		s := sha512.Sum384([]byte(accessToken))
		sum = s[:]
	default:
		s := sha512.Sum512([]byte(accessToken))
		sum = s[:]
	}
	got := base64.RawURLEncoding.EncodeToString(sum[:len(sum)/2])
	return subtle.ConstantTimeCompare([]byte(got), []byte(want)) == 1
}
