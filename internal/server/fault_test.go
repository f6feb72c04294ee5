package server_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/writsec/writ/client"
	"github.com/writsec/writ/internal/config"
	"github.com/writsec/writ/internal/minter"
	"github.com/writsec/writ/internal/revocation"
	"github.com/writsec/writ/internal/server"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/storetest"
	"github.com/writsec/writ/internal/telemetry"
	"github.com/writsec/writ/test/postgres"
)

// pick is the number for the form of a fault test: the long one is for WRIT_CHAOS=full.
func pick(short, long int) int {
	if os.Getenv("WRIT_CHAOS") == "full" {
		return long
	}
	return short
}

const faultPolicy = `package writ

credential["db"] := {"minter": "db", "ttl": "5m", "scope": {"groups": ["crm_ro"]}}

credential["api"] := {"minter": "api", "ttl": "5m", "scope": {"scopes": ["crm.read"]}}

decision := {"effect": "allow", "reasons": [{"code": "ok", "message": "Fine"}], "credential": credential[input.intent.action]}
`

// installation is what replicas of one Writ have in common: an issuer, and a store.
type installation struct {
	t   *testing.T
	dir string
	key jose.JSONWebKey
	cfg config.Config
}

// install configures Writ by its own reader.
func install(t *testing.T, store string, minters string) *installation {
	t.Helper()
	in := &installation{t: t, dir: t.TempDir()}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	in.key = jose.JSONWebKey{Key: key, KeyID: "k"}
	jwks, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k", Algorithm: "ES256", Use: "sig"}}})
	if err != nil {
		t.Fatal(err)
	}
	in.write("jwks.json", string(jwks))
	in.write("root.key", base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{1}, 32)))
	in.write("crm.secret", strings.Repeat("s", 43))
	in.write("policies/writ.rego", faultPolicy)
	in.write("writ.yaml", `external_url: https://writ.example.com
store: `+store+`
root_key_file: root.key
policy: {path: policies, deadline: 5s}
leases: {per_session: 5000, per_user: 5000, per_agent: 20000}
issuers:
  - issuer: https://idp.example.com
    speaks_for: [user, agent, operator]
    audience: https://writ.example.com
    algorithms: [ES256]
    jwks_file: jwks.json
    operator: {claim: role, value: operator, clients: [console]}
services: [{id: crm, secret_file: crm.secret, audience: 'urn:crm'}]
minters:
  api: {max_ttl: 5m, jwt: {audience: 'urn:crm', scopes: [crm.read], checks: introspection}}
`+minters)
	if in.cfg, err = config.Load(filepath.Join(in.dir, "writ.yaml")); err != nil {
		t.Fatal(err)
	}
	in.cfg.Listen, in.cfg.OpsListen = "127.0.0.1:0", "127.0.0.1:0"
	return in
}

func (in *installation) write(name, text string) {
	in.t.Helper()
	path := filepath.Join(in.dir, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
		in.t.Fatal(err)
	}
}

// run starts a replica, which stops with the test.
func (in *installation) run() (s *server.Server, url string) {
	in.t.Helper()
	s, stop := start(in.t, in.cfg)
	in.t.Cleanup(func() {
		if err := stop(); err != nil {
			in.t.Error(err)
		}
	})
	return s, "http://" + s.Addr().String()
}

func (in *installation) token(user, agent, role string) string {
	now := time.Now()
	return signed(in.t, in.key, map[string]any{
		"iss": "https://idp.example.com", "aud": "https://writ.example.com", "sub": user, "client_id": agent, "role": role, "jti": rand.Text(),
		"iat": now.Unix(), "exp": now.Add(time.Hour).Unix(),
	})
}

// agent is one that acts for a user.
func (in *installation) agent(at, user string) *client.Client {
	return client.New(at, client.StaticToken(in.token(user, "crm-agent", "")))
}

// post sends what a service or an operator sends, and reads the answer into out.
func post(at, path, kind, body string, auth func(*http.Request), out any) error {
	req, err := http.NewRequestWithContext(context.Background(), http.MethodPost, at+path, strings.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", kind)
	auth(req)
	res, err := faultHTTP.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", path, res.Status)
	}
	if out == nil {
		return nil
	}
	return json.NewDecoder(res.Body).Decode(out)
}

var faultHTTP = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 32}}

func asCRM(r *http.Request) { r.SetBasicAuth("crm", strings.Repeat("s", 43)) }

// active asks as the resource server does.
func active(at, token string) (bool, error) {
	var out struct{ Active bool }
	err := post(at, "/introspect", "application/x-www-form-urlencoded", url.Values{"token": {token}}.Encode(), asCRM, &out)
	return out.Active, err
}

// killAll is the kill switch.
func (in *installation) killAll(at string) (id string, leases int, err error) {
	operator := "Bearer " + in.token("olga", "console", "operator")
	var out struct {
		ID     string
		Leases int
	}
	err = post(at, "/revocations", "application/json", `{"all": true, "reason": "drill"}`, func(r *http.Request) { r.Header.Set("Authorization", operator) }, &out)
	return out.ID, out.Leases, err
}

// crmTarget is a PostgreSQL with room for many sessions, and how Writ mints there.
func crmTarget(t *testing.T, sessions int) (superuser, minters string, prepare func(config.Config)) {
	t.Helper()
	pg, err := postgres.Start(t.Context(), postgres.Options{Settings: map[string]string{
		"fsync": "off", "max_connections": fmt.Sprint(sessions + 100), "reserved_connections": "10",
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = pg.Stop() })
	superuser = pg.DSN("crm")
	run := func(dsn, statements string) {
		c, err := pgx.Connect(context.Background(), dsn)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close(context.Background()) }()
		if _, err := c.PgConn().Exec(context.Background(), statements).ReadAll(); err != nil {
			t.Fatal(err)
		}
	}
	run(pg.DSN("postgres"), `CREATE DATABASE crm`)
	u, err := url.Parse(superuser)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.User("writ_minter")
	minters = `  db: {max_ttl: 5m, postgres: {url: '` + u.String() + `', groups: [crm_ro]}}
`
	return superuser, minters, func(c config.Config) {
		text, err := minter.BootstrapSQL(server.PostgresBootstrap(c.Minters["db"]))
		if err != nil {
			t.Fatal(err)
		}
		run(superuser, text)
		run(superuser, `CREATE TABLE orders (id int); GRANT USAGE ON SCHEMA public TO crm_ro; GRANT SELECT ON orders TO crm_ro`)
	}
}

// A real Writ with leases at a real PostgreSQL, each with an open session that does what
// it can to stay: then somebody pulls the kill switch.
func TestFault05KillSwitch(t *testing.T) {
	n := pick(60, 1000)
	superuser, minters, prepare := crmTarget(t, n)
	in := install(t, storetest.Database(t, "server", migrated), minters)
	prepare(in.cfg)
	s, at := in.run()
	ctx := t.Context()

	// One session for ten leases, one user for fifty.
	held := make([]*pgx.Conn, n)
	tokens := make([]string, n/10)
	dsns := make([]string, n)
	sessions := make([]string, n/10)
	agents := make([]*client.Client, n/10)
	for i := range sessions {
		agents[i] = in.agent(at, fmt.Sprint("user-", i/5))
		opened, err := agents[i].OpenSession(ctx, client.SessionRequest{})
		if err != nil {
			t.Fatal(err)
		}
		sessions[i] = opened.ID
	}
	var next atomic.Int64
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				if i%10 == 0 {
					d, err := agents[i/10].Decide(ctx, request(sessions[i/10], "api", i))
					if err != nil || d.Credential == nil {
						t.Errorf("%+v, %v", d, err)
						return
					}
					tokens[i/10] = d.Credential.Secret["token"]
				}
				d, err := agents[i/10].Decide(ctx, request(sessions[i/10], "db", i))
				if err != nil || d.Credential == nil {
					t.Errorf("%+v, %v", d, err)
					return
				}
				dsns[i] = d.Credential.Secret["dsn"]
				if held[i], err = pgx.Connect(ctx, dsns[i]); err != nil {
					t.Error(err)
					return
				}
				if err := stay(ctx, held[i], i); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	if t.Failed() {
		t.FailNow()
	}
	watch, err := pgx.Connect(ctx, superuser)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = watch.Close(context.Background()) }()
	there := func() (sessions, roles int) {
		err := watch.QueryRow(ctx, `SELECT (SELECT count(*) FROM pg_stat_activity WHERE usename LIKE 'writ\_lea\_%'), (SELECT count(*) FROM pg_roles WHERE rolname LIKE 'writ\_lea\_%')`).Scan(&sessions, &roles)
		if err != nil {
			t.Fatal(err)
		}
		return sessions, roles
	}
	if sessions, roles := there(); sessions != n || roles != n {
		t.Fatalf("%d sessions of %d roles", sessions, roles)
	}
	if ok, err := active(at, tokens[0]); !ok || err != nil {
		t.Fatal("introspection does not know the token", err)
	}

	// Agents go on: they log in again, and ask for more; and a gateway asks about a token.
	pulled := time.Now()
	since := func() time.Duration { return time.Since(pulled) }
	var refused, lastActive, lastGranted atomic.Int64
	stop := make(chan struct{})
	var storm sync.WaitGroup
	again := func(every time.Duration, f func(i int)) {
		storm.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				case <-time.After(every):
					f(i)
				}
			}
		})
	}
	again(5*time.Millisecond, func(i int) {
		switch ok, err := active(at, tokens[i%len(tokens)]); {
		case err != nil:
			t.Error(err)
		case ok:
			lastActive.Store(int64(since()))
		}
	})
	for w := range 3 {
		again(time.Millisecond, func(i int) {
			c, err := pgx.Connect(context.Background(), dsns[(w+3*i)%n])
			if err == nil {
				_ = c.Close(context.Background())
			}
		})
	}
	again(20*time.Millisecond, func(i int) {
		d, err := agents[i%len(agents)].Decide(context.Background(), request(sessions[i%len(sessions)], "api", n+i))
		if err == nil && d.Credential != nil {
			lastGranted.Store(int64(since()))
		} else {
			refused.Add(1)
		}
	})

	id, leases, err := in.killAll(at)
	answered := since()
	if err != nil {
		t.Fatal(err)
	}
	var lastSession, lastRole time.Duration
	for since() < time.Minute {
		sessions, roles := there()
		if sessions > 0 {
			lastSession = since()
		}
		if roles == 0 {
			break
		}
		lastRole = since()
		time.Sleep(10 * time.Millisecond)
	}
	time.Sleep(200 * time.Millisecond)
	close(stop)
	storm.Wait()
	if sessions, roles := there(); sessions != 0 || roles != 0 {
		t.Errorf("%d sessions and %d roles are left", sessions, roles)
	}
	for i, c := range held {
		if c.Ping(ctx) == nil {
			t.Errorf("session %d goes on", i)
		}
		_ = c.Close(context.Background())
		if _, err := pgx.Connect(ctx, dsns[i]); err == nil {
			t.Errorf("lease %d logs in", i)
		}
	}
	revoker := revocation.Revoker{Store: sqlstore.For[revocation.Tx](s.Store()), Metrics: telemetry.NewMetrics()}
	var p revocation.Progress
	for p.GoneAt.IsZero() && since() < time.Minute {
		if p, err = revoker.Progress(ctx, id); err != nil {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	refusal := time.Duration(max(lastActive.Load(), lastGranted.Load()))
	t.Logf("fault 05: kill switch over %d roles with an open session each, %d tokens and %d agent sessions: answered after %v, "+
		"last token good or lease granted at %v, last database session seen at %v, last role at %v; by the record %d of %d leases gone, the last %v after it",
		n, len(tokens), p.Sessions, ms(answered), ms(refusal), ms(lastSession), ms(lastRole), p.Gone, p.Leases, ms(p.LastGoneAt.Sub(p.At)))
	if refusal > time.Second || lastSession > 10*time.Second || lastRole > 30*time.Second {
		t.Error("too slow: expected 1 s, 10 s and 30 s")
	}
	if leases < n+len(tokens) || p.Leases != p.Gone || p.GoneAt.IsZero() || p.Sessions != len(sessions) || refused.Load() == 0 {
		t.Errorf("%d leases in the answer, %+v, %d refused", leases, p, refused.Load())
	}
}

func ms(d time.Duration) time.Duration { return d.Round(time.Millisecond) }

func request(session, action string, i int) client.Request {
	return client.Request{Session: session, Intent: client.Intent{Action: action}, Resource: client.Resource{Type: "crm", ID: fmt.Sprint(i)}}
}

// stay has a session do one of what could make it hard to end.
func stay(ctx context.Context, c *pgx.Conn, i int) error {
	do := [][]string{
		{`SELECT * FROM orders`},
		{`SET statement_timeout = 0`, `SET idle_in_transaction_session_timeout = 0`, `BEGIN`, `LOCK TABLE orders IN ACCESS SHARE MODE`},
		{`BEGIN`, `ALTER ROLE CURRENT_USER PASSWORD 'another'`},
		{`PREPARE p AS SELECT * FROM orders`, `SELECT pg_advisory_lock(hashtextextended(session_user::text, 0))`},
	}[i%4]
	for _, role := range []string{"crm_ro", "writ_owner", "writ_owner_0"} {
		_, err := c.Exec(ctx, `SET ROLE `+role)
		if pg, is := errors.AsType[*pgconn.PgError](err); !is || pg.Code != "42501" {
			return fmt.Errorf("SET ROLE %s: %w", role, err)
		}
	}
	for _, statement := range do {
		if _, err := c.Exec(ctx, statement); err != nil {
			return fmt.Errorf("%s: %w", statement, err)
		}
	}
	return nil
}

// Two replicas on one store. Whatever one of them has cached, what the other revoked is
// good for nothing with it from the answer on.
func TestFault13StaleCache(t *testing.T) {
	in := install(t, storetest.Database(t, "server", migrated), "")
	_, a := in.run()
	_, b := in.run()
	ctx := t.Context()
	rounds := pick(24, 1000)
	var uses, stale, late, sawAlive atomic.Int64
	for round := range rounds {
		agent := in.agent(a, "alice")
		opened, err := agent.OpenSession(ctx, client.SessionRequest{})
		if err != nil {
			t.Fatal(err)
		}
		d, err := agent.Decide(ctx, request(opened.ID, "api", round))
		if err != nil || d.Credential == nil {
			t.Fatalf("%+v, %v", d, err)
		}
		token := d.Credential.Secret["token"]
		var revokedAt atomic.Int64 // after the answer; zero before
		stop := make(chan struct{})
		var hammer sync.WaitGroup
		for range 3 {
			hammer.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					revoked, sent := revokedAt.Load(), time.Now().UnixNano()
					ok, err := active(b, token)
					uses.Add(1)
					switch {
					case err != nil:
						t.Error(err)
						return
					case ok && revoked != 0:
						stale.Add(1)
						if sent-revoked > int64(time.Second) {
							late.Add(1)
						}
					case ok:
						sawAlive.Add(1)
					}
				}
			})
		}
		time.Sleep(20 * time.Millisecond)
		switch round % 4 {
		case 0:
			_, err = agent.Release(ctx, d.Credential.Lease)
		case 1:
			_, err = agent.EndSession(ctx, opened.ID)
		case 2:
			err = post(a, "/revoke", "application/x-www-form-urlencoded", url.Values{"token": {token}}.Encode(), asCRM, nil)
		case 3:
			_, _, err = in.killAll(a)
		}
		if err != nil {
			t.Fatal(err)
		}
		revokedAt.Store(time.Now().UnixNano())
		linger := 30 * time.Millisecond
		if round == 0 {
			linger = 1200 * time.Millisecond
		}
		time.Sleep(linger)
		close(stop)
		hammer.Wait()
	}
	t.Logf("fault 13: %d revocations at one replica, %d introspections at the other: %d said active before, %d after the answer, %d a second after it",
		rounds, uses.Load(), sawAlive.Load(), stale.Load(), late.Load())
	if stale.Load() > 0 || sawAlive.Load() < int64(rounds) {
		t.Error("stale, or never good")
	}
}

// migrated fills the template of stores.
func migrated(ctx context.Context, url string) error {
	s, err := sqlstore.Open(ctx, sqlstore.Config{URL: url, Root: sqlstore.RootKey(bytes.Repeat([]byte{1}, 32)), Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	return s.Close()
}
