// Package bench measures the decision path from a client's point of view.
package bench

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"database/sql"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/writsec/writ/internal/config"
	"github.com/writsec/writ/internal/server"
	"github.com/writsec/writ/test/postgres"
)

const (
	issuer   = "https://idp.example"
	audience = "https://writ.example"
)

// BenchmarkDecide asks the real server over HTTP, on loopback, in this process: the
// clients use the same cores. Each client has a session of its own.
func BenchmarkDecide(b *testing.B) {
	pg, err := postgres.Start(b.Context(), postgres.Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = pg.Stop() })
	for _, store := range []struct {
		name   string
		change func(dir string, c *config.Config)
	}{
		{"sqlite-disk", func(dir string, c *config.Config) { c.Store = "sqlite:" + filepath.Join(dir, "writ.db") }},
		{"sqlite-os", func(dir string, c *config.Config) {
			c.Store, c.Durability = "sqlite:"+filepath.Join(dir, "writ.db"), "os"
		}},
		{"postgres", func(_ string, c *config.Config) { c.Store = pg.DSN("postgres") }},
	} {
		b.Run(store.name, func(b *testing.B) {
			w := start(b, store.change)
			for _, effect := range []string{"allow", "deny"} {
				for _, clients := range []int{1, 8, 64} {
					b.Run(fmt.Sprintf("%s/clients=%d", effect, clients), func(b *testing.B) { w.measure(b, effect, clients) })
				}
			}
		})
	}
}

type world struct {
	url, token string
	server     *server.Server
	sign       func(user, client, group string) (token string)
	client     *http.Client
	bodies     map[string][][]byte // by effect: one for each session
}

const maxClients = 64

func start(b testing.TB, change func(dir string, c *config.Config)) *world {
	b.Helper()
	dir := b.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(b, err)
	jwks, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k", Algorithm: "ES256", Use: "sig"}}})
	must(b, err)
	must(b, os.WriteFile(filepath.Join(dir, "jwks.json"), jwks, 0o600))
	must(b, os.WriteFile(filepath.Join(dir, "root.key"), []byte(base64.StdEncoding.EncodeToString(make([]byte, 32))), 0o600))

	c := config.Default()
	c.Listen, c.OpsListen, c.ExternalURL = "127.0.0.1:0", "127.0.0.1:0", "http://127.0.0.1:1"
	c.RootKeyFile, c.Policy.Path, c.Policy.Deadline = filepath.Join(dir, "root.key"), "../../policies", 5*time.Second
	c.Issuers = []config.Issuer{{
		Issuer: issuer, SpeaksFor: []config.Principal{config.User, config.Agent}, Audience: audience,
		Algorithms: []string{"ES256"}, JWKSFile: filepath.Join(dir, "jwks.json"),
	}}
	c.Minters = map[string]config.Minter{"crm": {MaxTTL: 5 * time.Minute, JWT: &config.JWTMinter{Audience: "urn:crm:api", Scopes: []string{"crm:read", "crm:write"}}}}
	change(dir, &c)
	ctx, stop := context.WithCancel(context.Background())
	s, err := server.New(ctx, c, false, slog.New(slog.DiscardHandler))
	must(b, err)
	done := make(chan error)
	go func() { done <- s.Run(ctx) }()
	b.Cleanup(func() {
		stop()
		must(b, <-done)
	})

	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "k"}}, (&jose.SignerOptions{}).WithType("at+jwt"))
	must(b, err)
	sign := func(user, client, group string) string {
		now := time.Now()
		token, err := jwt.Signed(signer).Claims(map[string]any{
			"iss": issuer, "aud": audience, "sub": user, "client_id": client, "groups": []string{group},
			"iat": now.Unix(), "exp": now.Add(time.Hour).Unix(), "jti": "1",
		}).Serialize()
		must(b, err)
		return token
	}
	w := &world{
		url: "http://" + s.Addr().String(), server: s, sign: sign, token: sign("alice", "sales-agent", "sales"), bodies: map[string][][]byte{},
		client: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: maxClients}, Timeout: 30 * time.Second},
	}
	for range maxClients {
		var opened struct {
			Session string `json:"session"`
		}
		w.post(b, "/sessions", []byte(`{}`), &opened)
		for effect, act := range map[string]string{
			"allow": `"intent":{"action":"crm.opportunity.read","parameters":{"quarter":"Q3"}},"resource":{"type":"crm.opportunity","id":"opp-42"}`,
			"deny":  `"intent":{"action":"payments.transfer.create","parameters":{"amount":500}},"resource":{"type":"payments.account","id":"main"}`,
		} {
			w.bodies[effect] = append(w.bodies[effect], fmt.Appendf(nil, `{"session":%q,%s}`, opened.Session, act))
		}
	}
	return w
}

func (w *world) post(b testing.TB, path string, body []byte, out any) {
	w.call(b, http.MethodPost, path, w.token, body, out)
}

func (w *world) call(b testing.TB, method, path, token string, body []byte, out any) {
	req, err := http.NewRequest(method, w.url+path, bytes.NewReader(body))
	must(b, err)
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Content-Type", "application/json")
	res, err := w.client.Do(req)
	must(b, err)
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	must(b, err)
	if res.StatusCode >= 300 {
		b.Errorf("%s: %s", res.Status, answer)
		return
	}
	must(b, json.Unmarshal(answer, out))
}

func (w *world) measure(b *testing.B, effect string, clients int) {
	took := make([]time.Duration, b.N)
	var next sync.Mutex
	i := 0
	var g sync.WaitGroup
	b.ResetTimer()
	start := time.Now()
	for c := range clients {
		g.Go(func() {
			for {
				next.Lock()
				n := i
				i++
				next.Unlock()
				if n >= b.N {
					return
				}
				var answer struct {
					Decision string `json:"decision"`
				}
				begin := time.Now()
				w.post(b, "/decide", w.bodies[effect][c], &answer)
				took[n] = time.Since(begin)
				if answer.Decision != effect {
					b.Errorf("%q, want %q", answer.Decision, effect)
				}
			}
		})
	}
	g.Wait()
	b.StopTimer()
	elapsed := time.Since(start)
	slices.Sort(took)
	ms := func(q float64) float64 { return float64(took[int(q*float64(len(took)-1))].Microseconds()) / 1000 }
	b.ReportMetric(float64(b.N)/elapsed.Seconds(), "decisions/s")
	b.ReportMetric(ms(0.5), "p50-ms")
	b.ReportMetric(ms(0.99), "p99-ms")
}

func must(b testing.TB, err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// BenchmarkSize measures what one allow with a credential, its release and its
// outcome leave behind, by table.
func BenchmarkSize(b *testing.B) {
	pg, err := postgres.Start(b.Context(), postgres.Options{})
	must(b, err)
	b.Cleanup(func() { _ = pg.Stop() })
	b.Run("postgres", func(b *testing.B) {
		w := start(b, func(_ string, c *config.Config) { c.Store = pg.DSN("postgres") })
		db, err := sql.Open("pgx", pg.DSN("postgres"))
		must(b, err)
		defer func() { _ = db.Close() }()
		before := tableSizes(b, db)
		b.ResetTimer()
		for i := range b.N {
			w.act(b, i%maxClients)
		}
		b.StopTimer()
		for range 100 { // until all is in the log
			var n int
			must(b, db.QueryRow(`SELECT count(*) FROM audit`).Scan(&n))
			if n == 0 {
				break
			}
			time.Sleep(100 * time.Millisecond)
		}
		for table, size := range tableSizes(b, db) {
			if size > before[table] {
				b.ReportMetric(float64(size-before[table])/float64(b.N), table+"-B/op")
			}
		}
	})
	b.Run("sqlite", func(b *testing.B) {
		path := filepath.Join(b.TempDir(), "writ.db")
		w := start(b, func(_ string, c *config.Config) { c.Store = "sqlite:" + path })
		for i := range b.N {
			w.act(b, i%maxClients)
		}
		b.StopTimer()
		time.Sleep(time.Second)
		db, err := sql.Open("sqlite", "file:"+path)
		must(b, err)
		defer func() { _ = db.Close() }()
		var pages, size float64
		must(b, db.QueryRow(`PRAGMA page_count`).Scan(&pages))
		must(b, db.QueryRow(`PRAGMA page_size`).Scan(&size))
		b.ReportMetric(pages*size/float64(b.N), "file-B/op")
		var entry float64
		must(b, db.QueryRow(`SELECT avg(length(entry)) FROM log_entries`).Scan(&entry))
		b.ReportMetric(entry, "B/entry")
	})
}

// act is one allowed act, from its decision to its end.
func (w *world) act(b *testing.B, client int) {
	var answer struct {
		ID         string `json:"decision_id"`
		Credential struct {
			Lease string `json:"lease"`
		} `json:"credential"`
	}
	w.post(b, "/decide", w.bodies["allow"][client], &answer)
	w.post(b, "/decisions/"+answer.ID+"/outcome", []byte(`{"outcome":"succeeded"}`), &struct{}{})
	req, err := http.NewRequest(http.MethodDelete, w.url+"/leases/"+answer.Credential.Lease, nil)
	must(b, err)
	req.Header.Set("Authorization", "Bearer "+w.token)
	res, err := w.client.Do(req)
	must(b, err)
	_, _ = io.Copy(io.Discard, res.Body)
	must(b, res.Body.Close())
	if res.StatusCode != http.StatusOK {
		b.Error(res.Status)
	}
}

func tableSizes(b *testing.B, db *sql.DB) map[string]int64 {
	rows, err := db.Query(`SELECT relname, pg_total_relation_size(oid) FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace`)
	must(b, err)
	defer func() { _ = rows.Close() }()
	out := map[string]int64{}
	for rows.Next() {
		var name string
		var size int64
		must(b, rows.Scan(&name, &size))
		out[name] = size
	}
	must(b, rows.Err())
	return out
}
