package e2e

import (
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"

	"github.com/writsec/writ/test/idp"
)

// resourceServer verifies tokens offline, as any RFC 9068 resource server would: it
// knows Writ's address and its own audience and nothing else.
func resourceServer(t *testing.T, issuer, audience string) *oidc.IDTokenVerifier {
	t.Helper()
	res, err := http.Get(issuer + "/.well-known/oauth-authorization-server") // RFC 8414 §3
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	var metadata struct {
		Issuer  string `json:"issuer"`
		JWKSURI string `json:"jwks_uri"`
	}
	if err := json.NewDecoder(res.Body).Decode(&metadata); err != nil {
		t.Fatal(err)
	}
	if metadata.Issuer != issuer {
		t.Fatalf("metadata of %q at %q", metadata.Issuer, issuer)
	}
	return oidc.NewVerifier(issuer, oidc.NewRemoteKeySet(t.Context(), metadata.JWKSURI),
		&oidc.Config{ClientID: audience, SupportedSigningAlgs: []string{"ES256"}})
}

func TestDecide(t *testing.T) {
	// Once with the sample policies as they stand, whose tests have to pass first.
	w := start(t, shared, with("policy.path", samplePolicies(t)))
	t.Parallel() // only now: the tests keep all cores busy

	t.Run("sign-in to release", func(t *testing.T) {
		t.Parallel()
		w := w.in(t)
		alice := w.as("alice", idp.SalesAgent)
		session := alice.open()
		ask := readOpportunity(session)
		ask.Intent.Parameters = map[string]any{"quarter": "Q3"}
		before := time.Now().Truncate(time.Second)
		a := alice.must(allow, "read_opportunity", ask, "X-Request-ID", "sign-in-to-release")
		c := a.Credential
		if c.Kind != "jwt" || c.Revocability != "introspect" || c.Precision != "exact" {
			t.Errorf("credential %+v", c)
		}

		verified, err := resourceServer(t, w.url, audience("crm")).Verify(t.Context(), c.Secret.Token)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := resourceServer(t, w.url, audience("hr")).Verify(t.Context(), c.Secret.Token); err == nil {
			t.Error("another audience accepts the token")
		}
		jws, err := jose.ParseSignedCompact(c.Secret.Token, []jose.SignatureAlgorithm{jose.ES256})
		if err != nil {
			t.Fatal(err)
		}
		if typ := jws.Signatures[0].Header.ExtraHeaders[jose.HeaderType]; typ != "at+jwt" {
			t.Errorf("typ %v", typ)
		}
		var claims map[string]any
		if err := verified.Claims(&claims); err != nil {
			t.Fatal(err)
		}
		iat, exp := time.Unix(int64(claims["iat"].(float64)), 0), time.Unix(int64(claims["exp"].(float64)), 0)
		if iat.Before(before) || exp.Sub(iat) > 5*time.Minute || !exp.Equal(c.ExpiresAt) {
			t.Errorf("iat %v, exp %v, expires_at %v", iat, exp, c.ExpiresAt)
		}
		details := claims["authorization_details"].([]any)[0].(map[string]any)
		if hash, _ := details["intent_hash"].(string); !strings.HasPrefix(hash, "sha256:") {
			t.Errorf("intent_hash %q", hash)
		}
		delete(details, "intent_hash")
		delete(claims, "iat")
		delete(claims, "exp")
		want := map[string]any{
			"iss": w.url, "aud": audience("crm"), "sub": shared.Issuer + "#alice",
			"sub_id": map[string]any{"format": "iss_sub", "iss": shared.Issuer, "sub": "alice"},
			"act":    map[string]any{"iss": shared.Issuer, "sub": idp.SalesAgent}, "client_id": idp.SalesAgent,
			"jti": c.Lease, "sid": session, "scope": "crm:read",
			"authorization_details": []any{map[string]any{
				"type": "writ_intent", "actions": []any{"crm.opportunity.read"}, "identifier": "opp-42",
				"resource":   map[string]any{"type": "crm.opportunity", "id": "opp-42"},
				"parameters": map[string]any{"quarter": "Q3"},
			}},
		}
		if diff := cmp.Diff(want, claims); diff != "" {
			t.Errorf("claims (-want +got)\n%s", diff)
		}

		live := w.introspect("crm", c.Secret.Token)
		if live["active"] != true || live["jti"] != c.Lease || live["scope"] != "crm:read" || live["sub"] != want["sub"] {
			t.Errorf("introspection %v", live)
		}
		// Its own audience only, and nobody learns why.
		if diff := cmp.Diff(map[string]any{"active": false}, w.introspect("hr", c.Secret.Token)); diff != "" {
			t.Errorf("introspection by another service (-want +got)\n%s", diff)
		}
		alice.refused(w.introspectAs("crm-api", "wrong", c.Secret.Token), http.StatusUnauthorized, "invalid_client")

		second := alice.must(allow, "read_opportunity", readOpportunity(session)).Credential
		// Nobody else can release it, and then its holder does.
		bob := w.as("bob", idp.HRAgent)
		bob.refused(bob.call(http.MethodDelete, "/leases/"+c.Lease, nil), http.StatusNotFound, "not_found")
		if r := alice.call(http.MethodDelete, "/leases/"+c.Lease, nil); r.status != http.StatusOK {
			t.Errorf("release: %d %s", r.status, r.body)
		}
		if w.active("crm", c.Secret.Token) || !w.active("crm", second.Secret.Token) {
			t.Error("release ended the wrong tokens")
		}
		if r := alice.call(http.MethodDelete, "/sessions/"+session, nil); r.status != http.StatusOK {
			t.Errorf("end session: %d %s", r.status, r.body)
		}
		if w.active("crm", second.Secret.Token) {
			t.Error("the token outlived its session")
		}
		r := alice.call(http.MethodPost, "/decide", readOpportunity(session))
		alice.refused(r, http.StatusConflict, "session_ended")

		// The log ties request and decision together.
		if !slices.ContainsFunc(w.log(), func(l line) bool {
			return l.RequestID == "sign-in-to-release" && l.Decision == a.DecisionID
		}) {
			t.Error("no line of the log has the request's id and the decision's")
		}
	})

	t.Run("deny with reason and advice", func(t *testing.T) {
		t.Parallel()
		w := w.in(t)
		alice := w.as("alice", idp.SalesAgent)
		alice.must(deny, "not_granted", q(alice.open(), "payments.transfer.create", "payments.account", "main"))
		carol := w.as("carol", idp.FinanceAgent)
		pay := q(carol.open(), "payments.transfer.create", "payments.account", "main")
		pay.Intent.Parameters = map[string]any{"amount": 1000001, "currency": "EUR", "creditor": "ACME"}
		a := carol.must(deny, "over_hard_limit", pay)
		if a.Advice["max_amount"] != 1e6 {
			t.Errorf("advice %v", a.Advice)
		}
	})

	t.Run("agent's own token", func(t *testing.T) {
		t.Parallel()
		w := w.in(t)
		user, _, err := shared.UserToken(t.Context(), "alice", idp.SalesAgent)
		if err != nil {
			t.Fatal(err)
		}
		sales, hr := client{w, agentToken(t, shared, idp.SalesAgent)}, client{w, agentToken(t, shared, idp.HRAgent)}

		opened := sales.call(http.MethodPost, "/sessions", map[string]any{"subject_token": user})
		session := read[struct{ Session string }](t, opened, http.StatusCreated).Session
		sales.must(allow, "read_opportunity", readOpportunity(session)) // the session knows the user
		withUser := readOpportunity(session)
		withUser.SubjectToken = user
		sales.must(allow, "read_opportunity", withUser)

		// Without a user there is nobody to act for.
		sales.refused(sales.call(http.MethodPost, "/sessions", map[string]any{}), http.StatusUnauthorized, "invalid_token")
		// Agent B can bring neither what was issued to agent A, nor its session.
		hr.refused(hr.call(http.MethodPost, "/sessions", map[string]any{"subject_token": user}), http.StatusUnauthorized, "invalid_token")
		hr.refused(hr.call(http.MethodPost, "/decide", withUser), http.StatusUnauthorized, "invalid_token")
		hr.refused(hr.call(http.MethodPost, "/decide", readOpportunity(session)), http.StatusNotFound, "not_found")
		hr.refused(hr.call(http.MethodGet, "/sessions/"+session, nil), http.StatusNotFound, "not_found")
		// Nor can another user's token of the same agent.
		mallory := w.as("bob", idp.SalesAgent)
		mallory.refused(mallory.call(http.MethodPost, "/decide", readOpportunity(session)), http.StatusNotFound, "not_found")
	})

	t.Run("bad tokens", func(t *testing.T) {
		t.Parallel()
		w := w.in(t)
		good, idToken, err := shared.UserToken(t.Context(), "alice", idp.SalesAgent)
		if err != nil {
			t.Fatal(err)
		}
		cut := strings.LastIndex(good, ".")
		minted := client{w, good}
		credential := minted.must(allow, "read_opportunity", readOpportunity(minted.open())).Credential
		for name, token := range map[string]string{
			"none": "", "garbage": "x", "unsigned": good[:cut+1], "an ID token": idToken,
			"altered signature": good[:cut+1] + strings.Repeat("A", len(good)-cut-1),
			"unknown key":       forged(t, shared, "unknown-key"),
			"Writ's own":        credential.Secret.Token,
		} {
			c := client{w, token}
			r := c.call(http.MethodPost, "/decide", readOpportunity("ses_x"))
			c.refused(r, http.StatusUnauthorized, "invalid_token")
			if r.header.Get("WWW-Authenticate") == "" {
				t.Errorf("%s: no WWW-Authenticate", name)
			}
		}
	})

	t.Run("kill switch", func(t *testing.T) {
		t.Parallel()
		w := w.in(t)
		dave := w.as("dave", idp.HRAgent)
		session := dave.open()
		token, _, err := shared.UserToken(t.Context(), "olga", opsConsole)
		if err != nil {
			t.Fatal(err)
		}
		operator := client{w, token}
		scope := map[string]any{"session": session, "reason": "test"}
		dave.refused(dave.call(http.MethodPost, "/revocations", scope), http.StatusForbidden, "forbidden")
		// An agent that an operator uses is no operator.
		agent := w.as("olga", idp.HRAgent)
		agent.refused(agent.call(http.MethodPost, "/revocations", scope), http.StatusForbidden, "forbidden")

		held := dave.hold(offboard(session, "e-kill-switch"), 30)
		w.prompt("e-kill-switch")
		type result struct{ Sessions int }
		if done := read[result](t, operator.call(http.MethodPost, "/revocations", scope), http.StatusOK); done.Sessions != 1 {
			t.Errorf("revoked %+v", done)
		}
		if h := <-held; h.err != nil || h.status != http.StatusConflict {
			t.Errorf("the held call got %d %v: %s", h.status, h.err, h.body)
		}
	})
}

// forged is a token of the issuer that another key signed.
func forged(t *testing.T, p *idp.IdP, kid string) string {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: key, KeyID: kid}},
		(&jose.SignerOptions{}).WithType("at+jwt"))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now().Unix()
	payload, err := json.Marshal(map[string]any{
		"iss": p.Issuer, "aud": p.Resource, "sub": "alice", "client_id": idp.SalesAgent, "jti": kid, "iat": now, "exp": now + 60,
	})
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
