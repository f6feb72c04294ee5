package minter_test

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/minter"
)

func groups(g ...any) map[string]any { return map[string]any{"groups": g} }

func tenant(name any, g ...any) map[string]any { return map[string]any{"groups": g, "tenant": name} }

func TestPostgresPlan(t *testing.T) {
	t.Parallel()
	ro := groups("crm_ro")
	for _, c := range []struct {
		name    string
		tenants string
		want    lease.Want
		scope   map[string]any
		ttl     time.Duration
		code    string
	}{
		{"plain", "optional", lease.Want{Scope: ro, TTL: time.Minute}, map[string]any{"groups": []string{"crm_ro"}}, time.Minute, ""},
		{"longer than the minter grants", "none", lease.Want{Scope: ro, TTL: time.Hour}, map[string]any{"groups": []string{"crm_ro"}}, 5 * time.Minute, ""},
		{"two groups", "none", lease.Want{Scope: groups("crm_rw", "crm_ro"), TTL: time.Minute}, map[string]any{"groups": []string{"crm_ro", "crm_rw"}}, time.Minute, ""},
		{"tenant", "required", lease.Want{Scope: tenant("acme", "crm_ro"), TTL: time.Minute}, map[string]any{"groups": []string{"crm_ro"}, "tenant": "acme"}, time.Minute, ""},
		{"tenant that may be", "optional", lease.Want{Scope: tenant("acme", "crm_ro"), TTL: time.Minute}, map[string]any{"groups": []string{"crm_ro"}, "tenant": "acme"}, time.Minute, ""},
		{"instant", "none", lease.Want{Scope: ro, TTL: time.Minute, Revocability: "instant"}, map[string]any{"groups": []string{"crm_ro"}}, time.Minute, ""},
		{"back from the store", "none", lease.Want{Scope: map[string]any{"groups": []string{"crm_ro"}}, TTL: time.Minute}, map[string]any{"groups": []string{"crm_ro"}}, time.Minute, ""},
		{"no tenant", "required", lease.Want{Scope: ro, TTL: time.Minute}, nil, 0, "credential_scope"},
		{"tenant in vain", "none", lease.Want{Scope: tenant("acme", "crm_ro"), TTL: time.Minute}, nil, 0, "credential_scope"},
		{"empty tenant", "optional", lease.Want{Scope: tenant("", "crm_ro"), TTL: time.Minute}, nil, 0, "credential_scope"},
		{"tenant that is no text", "optional", lease.Want{Scope: tenant(json.Number("5"), "crm_ro"), TTL: time.Minute}, nil, 0, "credential_scope"},
		{"long tenant", "optional", lease.Want{Scope: tenant(strings.Repeat("a", 201), "crm_ro"), TTL: time.Minute}, nil, 0, "credential_scope"},
		{"tenant with a zero byte", "optional", lease.Want{Scope: tenant("a\x00", "crm_ro"), TTL: time.Minute}, nil, 0, "credential_scope"},
		{"another group", "none", lease.Want{Scope: groups("crm_ro", "pg_monitor"), TTL: time.Minute}, nil, 0, "credential_scope"},
		{"a group twice", "none", lease.Want{Scope: groups("crm_ro", "crm_ro"), TTL: time.Minute}, nil, 0, "credential_scope"},
		{"a group in another case", "none", lease.Want{Scope: groups("CRM_RO"), TTL: time.Minute}, nil, 0, "credential_scope"},
		{"no group", "none", lease.Want{Scope: groups(), TTL: time.Minute}, nil, 0, "credential_scope"},
		{"no groups", "none", lease.Want{Scope: map[string]any{}, TTL: time.Minute}, nil, 0, "credential_scope"},
		{"nothing", "none", lease.Want{TTL: time.Minute}, nil, 0, "credential_scope"},
		{"a group that is no text", "none", lease.Want{Scope: groups("crm_ro", 5), TTL: time.Minute}, nil, 0, "credential_scope"},
		{"groups that are no list", "none", lease.Want{Scope: map[string]any{"groups": "crm_ro"}, TTL: time.Minute}, nil, 0, "credential_scope"},
		{"another member", "none", lease.Want{Scope: map[string]any{"groups": []any{"crm_ro"}, "tables": []any{}}, TTL: time.Minute}, nil, 0, "credential_scope"},
		{"less than a second", "none", lease.Want{Scope: ro, TTL: time.Second - 1}, nil, 0, "credential_ttl"},
		{"for the exact act", "none", lease.Want{Scope: ro, TTL: time.Minute, Precision: "exact"}, nil, 0, "credential_precision"},
	} {
		m := &minter.Postgres{PostgresConfig: minter.PostgresConfig{Name: "crm-db", Groups: []string{"crm_ro", "crm_rw"}, Tenants: c.tenants, MaxTTL: 5 * time.Minute}}
		got, refusal := m.Plan(c.want)
		if c.code != "" {
			if refusal == nil || refusal.Code != c.code || refusal.Message == "" {
				t.Errorf("%s: refused %+v, want %s", c.name, refusal, c.code)
			}
			continue
		}
		want := lease.Grant{Minter: "crm-db", Kind: "postgres", Scope: c.scope, TTL: c.ttl, Revocability: "instant", Precision: "coarse", Outside: true, Renewable: true}
		if d := cmp.Diff(want, got); d != "" || refusal != nil {
			t.Errorf("%s: %v (-want +got):\n%s", c.name, refusal, d)
		}
	}
}

// RFC 7677 §3 has the password and the salt of this one; the server has its own.
func TestScramVerifier(t *testing.T) {
	t.Parallel()
	salt, _ := base64.StdEncoding.DecodeString("W22ZaJ0SNY7soEsUEjb6gQ==")
	got, err := minter.ScramVerifierOf("pencil", salt, 4096)
	if want := "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU="; got != want || err != nil {
		t.Errorf("%s, %v", got, err)
	}
	g := newTarget(t)
	g.sql(t, `ALTER ROLE `+g.ro+` PASSWORD 'from the server'`)
	theirs := value[string](t, g, `SELECT rolpassword FROM pg_authid WHERE rolname = $1`, g.ro)
	parts := strings.FieldsFunc(theirs, func(r rune) bool { return r == '$' || r == ':' })
	iterations, _ := strconv.Atoi(parts[1])
	salt, _ = base64.StdEncoding.DecodeString(parts[2])
	if ours, err := minter.ScramVerifierOf("from the server", salt, iterations); err != nil || ours != theirs {
		t.Errorf("%s is not %s", ours, theirs)
	}
}

func TestPostgresSecret(t *testing.T) {
	t.Parallel()
	g := newTarget(t)
	l := g.lease(g.ro)
	s := g.mint(t, l)
	u, err := url.Parse(s["dsn"])
	password, _ := u.User.Password()
	if err != nil || u.User.Username() != s["username"] || password != s["password"] || u.Hostname() != s["host"] || u.Port() != s["port"] || u.Path != "/"+s["database"] ||
		s["sslmode"] != "disable" || len(s["password"]) != 32 || s["username"] != "writ_"+l.ID || s["ca"] != "" {
		t.Errorf("%d members, %v", len(s), err)
	}
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, []byte("nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := g.config
	c.CAFile = ca
	_, err = minter.NewPostgres(c)
	wantError(t, err, "holds no PEM certificate")
	if err := os.WriteFile(ca, []byte(aCertificate), 0o600); err != nil {
		t.Fatal(err)
	}
	m := g.open(t, func(c *minter.PostgresConfig) { c.CAFile, c.AgentHost, c.AgentPort = ca, "db.example.com", 6432 })
	made, err := m.Mint(t.Context(), lease.Order{Lease: l})
	if err != nil {
		t.Fatal(err)
	}
	if s := made.Secret; s["ca"] != aCertificate || s["host"] != "db.example.com" || !strings.Contains(s["dsn"], "@db.example.com:6432/") {
		t.Errorf("host %s, port %s", s["host"], s["port"])
	}
	g.unmake(t, l)
}

// What goes wrong at the target is told without what stood in the statement.
func TestPostgresErrors(t *testing.T) {
	t.Parallel()
	g := newTarget(t)
	g.sql(t, `REVOKE `+g.ro+` FROM `+g.bootstrap.Owner+`_0`+others(g.bootstrap.Owner))
	err := g.try(g.lease(g.ro))
	if _, is := errors.AsType[*pgconn.PgError](err); is || err == nil || strings.Contains(err.Error(), "SCRAM") {
		t.Errorf("%v", err)
	}
	wantError(t, err, "SQLSTATE 42501")
	if seen, err := g.Survey(t.Context()); err != nil || len(seen) != 0 {
		t.Errorf("left: %v, %v", seen, err)
	}
	down := g.open(t, func(c *minter.PostgresConfig) { c.URL = with(c.URL, func(u *url.URL) { u.Host = "127.0.0.1:1" }) })
	if out, err := down.Unmake(t.Context(), []lease.Lease{g.lease(g.ro)}); err == nil || out != nil || strings.Contains(err.Error(), g.config.Password) {
		t.Errorf("%v, %v", out, err)
	}
}

func others(owner string) (out string) {
	for i := 1; i < minter.PostgresMakers; i++ {
		out += ", " + owner + "_" + strconv.Itoa(i)
	}
	return out
}

func TestBootstrapNames(t *testing.T) {
	t.Parallel()
	for _, change := range []func(*minter.Bootstrap){
		func(b *minter.Bootstrap) { b.Schema = "writ; DROP" },
		func(b *minter.Bootstrap) { b.Owner = `a"b` },
		func(b *minter.Bootstrap) { b.Account = "" },
		func(b *minter.Bootstrap) { b.Account = "pg_monitor" },
		func(b *minter.Bootstrap) { b.Groups = []string{"a\n"} },
		func(b *minter.Bootstrap) { b.Groups = []string{"$writ$"} },
		func(b *minter.Bootstrap) { b.Groups = nil },
		func(b *minter.Bootstrap) { b.Groups = []string{"writ_lea_00000000000000000000000000"} },
		func(b *minter.Bootstrap) { b.SearchPath = []string{"a, b"} },
		func(b *minter.Bootstrap) { b.Owner = strings.Repeat("a", 62) },
		func(b *minter.Bootstrap) { b.Tenants = "'; DROP" },
		func(b *minter.Bootstrap) { b.ConnectionLimit = 0 },
		func(b *minter.Bootstrap) { b.MaxTTL = 0 },
		func(b *minter.Bootstrap) { b.Password = "Käse" },
	} {
		b := describe(change).bootstrap
		if text, err := minter.BootstrapSQL(b); err == nil || text != "" {
			t.Errorf("%+v passes", b)
		}
	}
}

const aCertificate = `-----BEGIN CERTIFICATE-----
MIIBdjCCARugAwIBAgIUDfU2mKq7dnd1eelDlbEbvYDk7GcwCgYIKoZIzj0EAwIw
DzENMAsGA1UEAwwEdGVzdDAgFw0yNjExMjUxMzUyMzVaGA8yMTI2MTEwMTEzNTIz
NVowDzENMAsGA1UEAwwEdGVzdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABF3I
A1nQu10Nl2lygiy1rUg5Cg+jUMJQ4a/gYTfUo+O+pPrCc84Bn3wtWGgECwn62QFw
QalT73GoknRlXNC9UeujUzBRMB0GA1UdDgQWBBRhocu7/OCrRFOYJ9rbnSKoZfR+
8jAfBgNVHSMEGDAWgBRhocu7/OCrRFOYJ9rbnSKoZfR+8jAPBgNVHRMBAf8EBTAD
AQH/MAoGCCqGSM49BAMCA0kAMEYCIQCvXj1rjhrJVMVCbMrVO8FfVAdXY61mEGOO
sQFvVqHm+AIhALpnU8Hu7dsVS93zFx9H4Cz8ksqeuk8VGwrbo0oNjfpN
-----END CERTIFICATE-----
`
