package minter_test

import (
	"crypto"
	"encoding/base64"
	"encoding/json"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"

	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/intent"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/minter"
	"github.com/writsec/writ/internal/sqlstore"
)

var es256 = minter.Rotation{Algorithm: "ES256", Life: time.Hour}

const (
	issuer   = "https://writ.example"
	audience = "https://crm.example"
)

func openStore(t *testing.T, path string) *sqlstore.Store {
	t.Helper()
	return openStoreAt(t, path, time.Now)
}

func openStoreAt(t *testing.T, path string, now func() time.Time) *sqlstore.Store {
	t.Helper()
	s, err := sqlstore.Open(t.Context(), sqlstore.Config{URL: "sqlite:" + path, Now: now, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newKeys(t *testing.T) *minter.Keys {
	t.Helper()
	s := openStore(t, filepath.Join(t.TempDir(), "writ.db"))
	defer func() { _ = s.Close() }()
	k, err := minter.LoadKeys(t.Context(), s, es256)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func newMinter(k *minter.Keys) *minter.JWT {
	return &minter.JWT{Name: "crm", Issuer: issuer, Audience: audience, Scopes: []string{"crm.read", "crm.write"}, MaxTTL: 5 * time.Minute, Keys: k}
}

func scopes(s ...any) map[string]any { return map[string]any{"scopes": s} }

func TestPlan(t *testing.T) {
	t.Parallel()
	read := scopes("crm.read")
	for _, c := range []struct {
		name   string
		change func(*minter.JWT)
		want   lease.Want
		grant  lease.Grant // Scope, TTL, Revocability, Precision
		code   string
	}{
		{"plain", nil, lease.Want{Scope: read, TTL: time.Minute}, lease.Grant{TTL: time.Minute, Revocability: "expiry", Precision: "coarse"}, ""},
		{"longer than the minter grants", nil, lease.Want{Scope: read, TTL: time.Hour}, lease.Grant{TTL: 5 * time.Minute, Revocability: "expiry", Precision: "coarse"}, ""},
		{"a second", nil, lease.Want{Scope: read, TTL: time.Second}, lease.Grant{TTL: time.Second, Revocability: "expiry", Precision: "coarse"}, ""},
		{"less than a second", nil, lease.Want{Scope: read, TTL: time.Second - 1}, lease.Grant{}, "credential_ttl"},
		{"no time", nil, lease.Want{Scope: read}, lease.Grant{}, "credential_ttl"},
		{"revocability that is there", func(m *minter.JWT) { m.Checks = minter.CheckIntrospection }, lease.Want{Scope: read, TTL: time.Minute, Revocability: "introspect"},
			lease.Grant{TTL: time.Minute, Revocability: "introspect", Precision: "coarse"}, ""},
		{"revocability that is not", nil, lease.Want{Scope: read, TTL: time.Minute, Revocability: "introspect"}, lease.Grant{}, "credential_revocability"},
		{"a status list", func(m *minter.JWT) { m.Checks = minter.CheckStatusList }, lease.Want{Scope: read, TTL: time.Minute, Revocability: "status"},
			lease.Grant{TTL: time.Minute, Revocability: "status", Precision: "coarse"}, ""},
		{"more than a status list", func(m *minter.JWT) { m.Checks = minter.CheckStatusList }, lease.Want{Scope: read, TTL: time.Minute, Revocability: "introspect"}, lease.Grant{}, "credential_revocability"},
		{"more than a status list needs", func(m *minter.JWT) { m.Checks = minter.CheckIntrospection }, lease.Want{Scope: read, TTL: time.Minute, Revocability: "status"},
			lease.Grant{TTL: time.Minute, Revocability: "introspect", Precision: "coarse"}, ""},
		{"instant", func(m *minter.JWT) { m.Checks = minter.CheckIntrospection }, lease.Want{Scope: read, TTL: time.Minute, Revocability: "instant"}, lease.Grant{}, "credential_revocability"},
		{"precision that is there", func(m *minter.JWT) { m.EnforcesDetails = true }, lease.Want{Scope: read, TTL: time.Minute, Precision: "exact"},
			lease.Grant{TTL: time.Minute, Revocability: "expiry", Precision: "exact"}, ""},
		{"precision that is not", nil, lease.Want{Scope: read, TTL: time.Minute, Precision: "exact"}, lease.Grant{}, "credential_precision"},
		{"a scope beyond the grant", nil, lease.Want{Scope: scopes("crm.read", "crm.admin"), TTL: time.Minute}, lease.Grant{}, "credential_scope"},
		{"a scope in two", nil, lease.Want{Scope: scopes("crm.read crm.admin"), TTL: time.Minute}, lease.Grant{}, "credential_scope"},
		{"no scope", nil, lease.Want{Scope: scopes(), TTL: time.Minute}, lease.Grant{}, "credential_scope"},
		{"nothing", nil, lease.Want{TTL: time.Minute}, lease.Grant{}, "credential_scope"},
		{"another member", nil, lease.Want{Scope: map[string]any{"scopes": []any{"crm.read"}, "tables": []any{}}, TTL: time.Minute}, lease.Grant{}, "credential_scope"},
		{"not a list", nil, lease.Want{Scope: map[string]any{"scopes": "crm.read"}, TTL: time.Minute}, lease.Grant{}, "credential_scope"},
		{"not a text", nil, lease.Want{Scope: scopes(7), TTL: time.Minute}, lease.Grant{}, "credential_scope"},
	} {
		m := newMinter(nil)
		if c.change != nil {
			c.change(m)
		}
		got, refusal := m.Plan(c.want)
		if c.code != "" {
			if refusal == nil || refusal.Code != c.code || refusal.Message == "" {
				t.Errorf("%s: refused %+v, want %s", c.name, refusal, c.code)
			}
			continue
		}
		c.grant.Minter, c.grant.Kind, c.grant.Scope, c.grant.Renewable, c.grant.Binds = "crm", "jwt", map[string]any{"scopes": []string{"crm.read"}}, true, true
		if d := cmp.Diff(c.grant, got); d != "" || refusal != nil {
			t.Errorf("%s: %v (-want +got):\n%s", c.name, refusal, d)
		}
	}
}

func granted(now time.Time) (lease.Lease, intent.Act) {
	act := intent.Act{
		User: identity.Ref{Issuer: "https://idp.example", ID: "alice"}, Agent: identity.Ref{Issuer: "https://idp.example", ID: "crm-agent"}, Session: "ses_1",
		Intent:   intent.Intent{Action: "crm.opportunity.update", Purpose: "never in it", Parameters: map[string]any{"amount": json.Number("12.50"), "note": "<b>"}},
		Resource: intent.Resource{Type: "postgres", ID: "crm", Properties: map[string]any{"tables": []any{"opportunities"}}},
	}
	l := lease.Lease{
		ID: "lea_1", State: lease.Active, Session: "ses_1", Decision: "dec_1", User: act.User, Agent: act.Agent, IntentHash: "sha256:ab",
		Grant:     lease.Grant{Minter: "crm", Kind: "jwt", Scope: map[string]any{"scopes": []string{"crm.read", "crm.write"}}},
		CreatedAt: now, ExpiresAt: now.Add(time.Minute).Truncate(time.Second),
	}
	return l, act
}

func mint(t *testing.T, m *minter.JWT, l lease.Lease, act intent.Act) string {
	t.Helper()
	made, err := m.Mint(t.Context(), lease.Order{Lease: l, Act: act})
	if err != nil {
		t.Fatal(err)
	}
	secret := made.Secret
	if len(secret) != 2 || secret["token_type"] != "Bearer" {
		t.Errorf("secret has %d members, type %q", len(secret), secret["token_type"])
	}
	return secret["token"]
}

// DESIGN.md (Leases) lists the claims; RFC 9068 §2.2, RFC 9396 and RFC 9493 shape
// them.
func TestClaimsAreExactlyThese(t *testing.T) {
	t.Parallel()
	l, act := granted(time.Unix(1_700_000_000, 900e6))
	s := openStoreAt(t, filepath.Join(t.TempDir(), "writ.db"), func() time.Time { return l.CreatedAt.Add(7 * time.Second) })
	defer func() { _ = s.Close() }()
	keys, err := minter.LoadKeys(t.Context(), s, es256)
	if err != nil {
		t.Fatal(err)
	}
	token := mint(t, newMinter(keys), l, act) // renewed: its lease is older
	raw, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[1])
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	dec := json.NewDecoder(strings.NewReader(string(raw)))
	dec.UseNumber()
	if err := dec.Decode(&got); err != nil {
		t.Fatal(err)
	}
	agent := map[string]any{"iss": "https://idp.example", "sub": "crm-agent"}
	want := map[string]any{
		"iss": issuer, "aud": audience, "sub": "https://idp.example#alice",
		"sub_id": map[string]any{"format": "iss_sub", "iss": "https://idp.example", "sub": "alice"},
		"act":    agent, "client_id": "crm-agent", "iat": json.Number("1700000007"), "exp": json.Number("1700000060"),
		"jti": "lea_1", "sid": "ses_1", "scope": "crm.read crm.write",
		"authorization_details": []any{map[string]any{
			"type": "writ_intent", "actions": []any{"crm.opportunity.update"}, "identifier": "crm",
			"resource":   map[string]any{"type": "postgres", "id": "crm", "properties": map[string]any{"tables": []any{"opportunities"}}},
			"parameters": map[string]any{"amount": json.Number("12.50"), "note": "<b>"}, "intent_hash": "sha256:ab",
		}},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if exp := time.Unix(1_700_000_060, 0); exp.After(l.ExpiresAt) {
		t.Error("the token outlives its lease")
	}
}

// A resource server that knows nothing of Writ but its JWKS.
func TestResourceServerVerifiesOffline(t *testing.T) {
	t.Parallel()
	keys := newKeys(t)
	l, act := granted(time.Now())
	token := mint(t, newMinter(keys), l, act)
	published, err := json.Marshal(keys.JWKS())
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(published), `"d":`) {
		t.Fatal("the private key is published")
	}
	var set jose.JSONWebKeySet
	if err := json.Unmarshal(published, &set); err != nil || len(set.Keys) != 1 {
		t.Fatal(err, len(set.Keys))
	}
	key := set.Keys[0]
	thumbprint, err := key.Thumbprint(crypto.SHA256) // RFC 7638
	if err != nil || key.KeyID != base64.RawURLEncoding.EncodeToString(thumbprint) || key.Algorithm != "ES256" || key.Use != "sig" {
		t.Errorf("key %s %s %s, %v", key.KeyID, key.Algorithm, key.Use, err)
	}
	verify := func(aud string, now time.Time) error {
		v := oidc.NewVerifier(issuer, &oidc.StaticKeySet{PublicKeys: []crypto.PublicKey{key.Key}}, &oidc.Config{
			ClientID: aud, SupportedSigningAlgs: []string{"ES256"}, Now: func() time.Time { return now },
		})
		got, err := v.Verify(t.Context(), token)
		if err == nil && (got.Subject != "https://idp.example#alice" || !got.Expiry.Equal(l.ExpiresAt)) {
			t.Errorf("%+v", got)
		}
		return err
	}
	if err := verify(audience, time.Now()); err != nil {
		t.Error(err)
	}
	if err := verify("https://other.example", time.Now()); err == nil {
		t.Error("good for another audience")
	}
	if err := verify(audience, l.ExpiresAt.Add(time.Millisecond)); err == nil {
		t.Error("good after its lease")
	}
	header, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil || header.Signatures[0].Header.ExtraHeaders["typ"] != "at+jwt" || header.Signatures[0].Header.KeyID != key.KeyID {
		t.Errorf("header %+v, %v", header.Signatures[0].Header, err)
	}
}

func TestKeyStaysAcrossRestarts(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "writ.db")
	load := func() *minter.Keys {
		s := openStore(t, path)
		defer func() { _ = s.Close() }()
		k, err := minter.LoadKeys(t.Context(), s, es256)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	first := load()
	l, act := granted(time.Now())
	token := mint(t, newMinter(first), l, act)
	second := load()
	if a, b := first.JWKS().Keys[0].KeyID, second.JWKS().Keys[0].KeyID; a != b || len(second.JWKS().Keys) != 1 {
		t.Errorf("key %s, then %s", a, b)
	}
	if _, id, ok := second.Claims(token, audience); !ok || id != "lea_1" {
		t.Error("the token is not known any more")
	}
}

// A lease that comes back from the store has its scopes as JSON gives them.
func TestMintFromAStoredLease(t *testing.T) {
	t.Parallel()
	m := newMinter(newKeys(t))
	l, act := granted(time.Now())
	l.Scope = scopes("crm.read")
	act.Intent.Parameters, act.Resource.Properties = nil, nil
	all, _, ok := m.Keys.Claims(mint(t, m, l, act), audience)
	if !ok || all["scope"] != "crm.read" {
		t.Errorf("%v", all)
	}
	detail := all["authorization_details"].([]any)[0].(map[string]any)
	if d := cmp.Diff(map[string]any{}, detail["parameters"]); d != "" {
		t.Error(d)
	}
	l.Scope = map[string]any{}
	if _, err := m.Mint(t.Context(), lease.Order{Lease: l, Act: act}); err == nil {
		t.Error("minted without scopes")
	}
}

func TestEdDSA(t *testing.T) {
	t.Parallel()
	s := openStore(t, filepath.Join(t.TempDir(), "writ.db"))
	defer func() { _ = s.Close() }()
	keys, err := minter.LoadKeys(t.Context(), s, minter.Rotation{Algorithm: "EdDSA"})
	if err != nil {
		t.Fatal(err)
	}
	l, act := granted(time.Now())
	token := mint(t, newMinter(keys), l, act)
	key := keys.JWKS().Keys[0]
	if key.Algorithm != "EdDSA" || !key.IsPublic() {
		t.Errorf("published %+v", key)
	}
	v := oidc.NewVerifier(issuer, &oidc.StaticKeySet{PublicKeys: []crypto.PublicKey{key.Key}}, &oidc.Config{
		ClientID: audience, SupportedSigningAlgs: []string{"EdDSA"},
	})
	if _, err := v.Verify(t.Context(), token); err != nil {
		t.Error(err)
	}
	if _, id, ok := keys.Claims(token, audience); !ok || id != l.ID {
		t.Error("its own token is refused")
	}
	if _, err := minter.LoadKeys(t.Context(), s, minter.Rotation{Algorithm: "HS256"}); err == nil {
		t.Error("a key for an algorithm that is none of ours")
	}
}

func TestClaimsOfWhatIsNotOurs(t *testing.T) {
	t.Parallel()
	keys, others := newKeys(t), newKeys(t)
	l, act := granted(time.Now())
	token := mint(t, newMinter(keys), l, act)
	parts := strings.Split(token, ".")
	foreign := mint(t, newMinter(others), l, act)
	jsonForm := `{"payload":"` + parts[1] + `","protected":"` + parts[0] + `","signature":"` + parts[2] + `"}`
	none := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none","typ":"at+jwt"}`))
	for name, c := range map[string]struct{ token, audience string }{
		"another audience": {token, "https://other.example"},
		"no audience":      {token, ""},
		"another's key":    {foreign, audience},
		"altered":          {parts[0] + "." + parts[1] + "x." + parts[2], audience},
		"unsigned":         {none + "." + parts[1] + ".", audience},
		"JSON form":        {jsonForm, audience},
		"nothing":          {"", audience},
		"words":            {"not a token", audience},
	} {
		if all, id, ok := keys.Claims(c.token, c.audience); ok || all != nil || id != "" {
			t.Errorf("%s: %v %q", name, all, id)
		}
	}
	if _, id, ok := keys.Claims(token, audience); !ok || id != "lea_1" {
		t.Error("ours is refused")
	}
}
