package identity

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/writsec/writ/internal/jws"
)

const (
	// MaxName bounds a sub, client_id or jti, in bytes.
	MaxName = 512
	// maxLife bounds what exp can promise, from iat on.
	maxLife = 400 * 24 * time.Hour
	// maxAssertion bounds the life of what agents sign themselves.
	maxAssertion = 5 * time.Minute
	// maxActors bounds a chain of delegations (RFC 8693 §4.1).
	maxActors = 4
)

// kindOf tells what a token of the issuer is, by typ and, where issuers know no
// typ of their own for access tokens, by whom it is meant for: a client of the
// issuer, or Writ. Configuration keeps the two apart.
func (is *issuer) kindOf(t jws.Token, claims map[string]any) (Kind, error) {
	typ, present := t.Type()
	switch {
	case typ == "at+jwt":
		if is.Kind != AccessToken {
			return "", fmt.Errorf("is an access token (typ at+jwt), and its issuer is configured for %s", is.Kind)
		}
		return AccessToken, nil
	case typ == "client-authentication+jwt" && is.Kind == ClientAssertion, typ == "jose" && is.Kind == JWTSVID:
		return is.Kind, nil
	case present && typ != "jwt":
		return "", errors.New("is neither an access token (typ at+jwt) nor an ID token (typ JWT)")
	case is.Kind == AccessToken:
		return idToken, nil
	}
	aud, _ := audiences(claims)
	toClient := func(a string) bool { return slices.Contains(is.IDTokenClients, a) || slices.Contains(is.OwnClients, a) }
	if slices.ContainsFunc(aud, toClient) {
		return idToken, nil
	}
	return is.Kind, nil
}

var errUnmatched = errors.New("does not match what its issuer's profile wants of it")

// check holds the claims of a token to its kind, and reads out subject and client.
func (is *issuer) check(kind Kind, claims map[string]any) (subject, client string, err error) {
	subject, client = stringClaim(claims, is.subjectClaim()), is.client(claims)
	switch kind {
	case idToken:
		client, err = is.checkForClient(claims, subject)
	case AccessToken:
		err = is.checkAccessToken(claims, subject, client)
	case PlainJWT:
		if is.clientsOwn(claims, client) {
			subject = client
		}
		err = is.checkPlain(claims, subject, client)
	case JWTSVID:
		err = is.checkSVID(subject)
	case Kubernetes:
		err = checkServiceAccount(claims, subject)
	case ClientAssertion:
		err = checkAssertion(claims, is.URL)
	}
	if err != nil {
		return "", "", err
	}
	if kind != idToken {
		if err := checkAudience(claims, is.Audience); err != nil {
			return "", "", err
		}
	}
	if !is.match.matches(claims) {
		return "", "", errUnmatched
	}
	return subject, client, nil
}

func (is *issuer) subjectClaim() string {
	if is.SubjectClaim != "" {
		return is.SubjectClaim
	}
	return "sub"
}

// client is the OAuth client that a token was issued to: the configured claim, or
// client_id, or azp where there is none.
func (is *issuer) client(claims map[string]any) string {
	if is.ClientClaim == "" && is.Kind != AccessToken && claims["client_id"] == nil {
		return stringClaim(claims, "azp")
	}
	return stringClaim(claims, is.clientClaim())
}

func (is *issuer) clientClaim() string {
	if is.ClientClaim != "" {
		return is.ClientClaim
	}
	return "client_id"
}

// namesTwoClients says that azp and client_id are both there and not one name.
func namesTwoClients(claims map[string]any) bool {
	azp, hasAZP := claims["azp"]
	id, hasID := claims["client_id"]
	if !hasAZP || !hasID {
		return false
	}
	name, ok := azp.(string) // lists and objects have no ==
	return !ok || id != name
}

// clientsOwn says that a token lacks the subject claim because it is a client's own:
// it has no sub at all, or one that names the client. A user's token is never so.
func (is *issuer) clientsOwn(claims map[string]any, client string) bool {
	if claimAt(claims, is.subjectClaim()) != nil {
		return false
	}
	sub, present := claims["sub"]
	if present {
		return sub == client
	}
	return is.SubjectClaim == "" && is.User && !is.userMatch.matches(claims)
}

// checkTimes holds exp, nbf and iat to now. exp gets no leeway: a token is never
// good for longer than its issuer said.
func (is *issuer) checkTimes(claims map[string]any, now time.Time) error {
	exp, ok := TimeClaim(claims, "exp")
	if !ok {
		return errors.New("has no usable exp")
	}
	if !now.Before(exp) {
		return errors.New("is expired")
	}
	if _, present := claims["nbf"]; present {
		nbf, ok := TimeClaim(claims, "nbf")
		if !ok {
			return errors.New("has no usable nbf")
		}
		if now.Add(is.Leeway).Before(nbf) {
			return errors.New("is not valid yet")
		}
	}
	iat, ok := TimeClaim(claims, "iat")
	if _, present := claims["iat"]; !present && is.Kind == JWTSVID { // which need have none
		if is.MaxAge > 0 && exp.Sub(now) > is.MaxAge {
			return fmt.Errorf("is good for longer than the %v that its issuer's profile allows", is.MaxAge)
		}
		iat, ok = now, true
	}
	if !ok {
		return errors.New("has no usable iat")
	}
	if now.Add(is.Leeway).Before(iat) {
		return errors.New("was issued in the future")
	}
	if exp.Sub(iat) > maxLife {
		return errors.New("has an exp beyond reason")
	}
	longest := is.MaxAge
	if is.Kind == ClientAssertion {
		if exp.Sub(iat) > maxAssertion {
			return fmt.Errorf("lives longer than the %v that an assertion may", maxAssertion)
		}
		longest = maxAssertion
	}
	if longest > 0 && now.Sub(iat) >= longest {
		return fmt.Errorf("is older than the %v that its issuer's profile allows", longest)
	}
	return nil
}

// TimeClaim reads a NumericDate (RFC 7519 §2) of a sane size.
func TimeClaim(claims map[string]any, name string) (time.Time, bool) {
	n, ok := claims[name].(json.Number)
	if !ok {
		return time.Time{}, false
	}
	f, err := n.Float64()
	if err != nil || f <= 0 || f > 1<<40 {
		return time.Time{}, false
	}
	return time.UnixMicro(int64(f * 1e6)).UTC(), true
}

// checkAccessToken holds a token to RFC 9068 §2.2 and §4.
func (is *issuer) checkAccessToken(claims map[string]any, subject, client string) error {
	if !Usable(subject) {
		return fmt.Errorf("has no usable %s", is.subjectClaim())
	}
	if !Usable(client) {
		return fmt.Errorf("has no usable %s", is.clientClaim())
	}
	for _, name := range []string{"sub", "client_id", "jti"} {
		if !Usable(stringClaim(claims, name)) {
			return fmt.Errorf("has no usable %s", name)
		}
	}
	if namesTwoClients(claims) {
		return errors.New("has azp and client_id that differ")
	}
	return nil
}

// checkPlain holds a token to what can be asked of any.
func (is *issuer) checkPlain(claims map[string]any, subject, client string) error {
	if _, ok := claims["events"]; ok {
		return errors.New("is a security event, not an access token")
	}
	// Nor an ID token or another kind, of an issuer that tells them apart otherwise.
	_, atHash := claims["at_hash"]
	_, codeHash := claims["c_hash"]
	if typ := claims["typ"]; atHash || codeHash || typ == "ID" || typ == "Refresh" || typ == "Logout" {
		return errors.New("is of another kind than an access token")
	}
	if !Usable(subject) {
		return fmt.Errorf("has no usable %s", is.subjectClaim())
	}
	if is.User && !Usable(client) { // otherwise nothing tells a user's token from a client's own
		return errors.New("names no client that it was issued to")
	}
	if namesTwoClients(claims) {
		return errors.New("has azp and client_id that differ")
	}
	return nil
}

// checkSVID holds a token to the JWT-SVID standard §3.
func (is *issuer) checkSVID(subject string) error {
	id, err := spiffeid.FromString(subject)
	if err != nil || id.TrustDomain().Name() != is.TrustDomain || !Usable(subject) {
		return errors.New("is of no SPIFFE ID of its trust domain")
	}
	return nil
}

var serviceAccount = regexp.MustCompile(`^system:serviceaccount:([a-z0-9.-]{1,253}):([a-z0-9.-]{1,253})$`)

// checkServiceAccount holds sub to what Kubernetes says in its own claim besides.
func checkServiceAccount(claims map[string]any, subject string) error {
	m := serviceAccount.FindStringSubmatch(subject)
	own, _ := claims["kubernetes.io"].(map[string]any)
	account, _ := own["serviceaccount"].(map[string]any)
	if m == nil || own["namespace"] != m[1] || account["name"] != m[2] {
		return errors.New("is not a projected service account token of Kubernetes")
	}
	return nil
}

// checkAssertion holds a token to RFC 7523 §3: agents vouch for themselves only.
func checkAssertion(claims map[string]any, iss string) error {
	if claims["sub"] != iss {
		return errors.New("has a sub that is not its iss, as a client's own assertion has")
	}
	if !Usable(stringClaim(claims, "jti")) {
		return errors.New("has no usable jti")
	}
	return nil
}

func checkAudience(claims map[string]any, audience string) error {
	aud, ok := audiences(claims)
	if !ok {
		return errors.New("has no usable aud")
	}
	if !slices.Contains(aud, audience) {
		return fmt.Errorf("is not meant for %s", audience)
	}
	return nil
}

// checkForClient holds an ID token that an agent brings, as its client, to the
// issuer's profile.
func (is *issuer) checkForClient(claims map[string]any, subject string) (client string, err error) {
	if client, err = checkIDToken(claims, is.IDTokenClients); err != nil {
		return "", err
	}
	if !Usable(subject) {
		return "", fmt.Errorf("has no usable %s", is.subjectClaim())
	}
	return client, nil
}

// checkIDToken holds a token to OpenID Connect Core §3.1.3.7 for one of clients,
// and returns that client.
func checkIDToken(claims map[string]any, clients []string) (client string, err error) {
	if !Usable(stringClaim(claims, "sub")) {
		return "", errors.New("has no usable sub")
	}
	// A logout token must never pass for an ID token (Back-Channel Logout §2.4).
	if _, ok := claims["events"]; ok {
		return "", errors.New("is a security event, not an ID token")
	}
	// Nor must an access token of an issuer that knows no at+jwt: these have a
	// scope, Keycloak's have a claim typ of their own (RFC 8725 §3.12).
	_, scope := claims["scope"]
	_, scp := claims["scp"]
	typ, typed := claims["typ"]
	if scope || scp || (typed && typ != "ID") {
		return "", errors.New("is not an ID token, though its header lets it seem one")
	}
	aud, ok := audiences(claims)
	if !ok {
		return "", errors.New("has no usable aud")
	}
	switch azp, present := claims["azp"]; {
	case present:
		client, _ = azp.(string)
	case len(aud) > 1:
		return "", errors.New("has several audiences and no azp")
	default:
		client = aud[0]
	}
	unknown := func(a string) bool { return !slices.Contains(clients, a) }
	if !slices.Contains(aud, client) || slices.ContainsFunc(aud, unknown) {
		return "", errors.New("is an ID token of a client that Writ does not know")
	}
	return client, nil
}

// actor reads the outermost act or may_act (RFC 8693 §4.1, §4.4), which is the only
// one that decides. It is zero where the claim is not there; ok is false when it is
// malformed or the chain is too long.
func actor(claims map[string]any, name, issuer string) (who Ref, ok bool) {
	raw, present := claims[name]
	if !present {
		return Ref{}, true
	}
	for depth := 0; present; depth++ {
		m, isObject := raw.(map[string]any)
		if !isObject || depth == maxActors {
			return Ref{}, false
		}
		iss, sub := issuer, stringClaim(m, "sub")
		if v, named := m["iss"]; named {
			iss, _ = v.(string)
		}
		if !Usable(sub) || !Usable(iss) {
			return Ref{}, false
		}
		if depth == 0 {
			who = Ref{iss, sub}
		}
		raw, present = m[name]
	}
	return who, true
}

// trustDomainOf is that of a JWT-SVID without iss, "" of any other token.
func trustDomainOf(claims map[string]any) string {
	sub := stringClaim(claims, "sub")
	if !strings.HasPrefix(sub, "spiffe://") {
		return ""
	}
	id, err := spiffeid.FromString(sub)
	if err != nil {
		return ""
	}
	return id.TrustDomain().Name()
}
