package crash

import (
	"bytes"
	"context"
	"database/sql"
	bigendian "encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	_ "github.com/jackc/pgx/v5/stdlib"

	"github.com/writsec/writ/client"
	"github.com/writsec/writ/test/postgres"
)

// points are where a replica is killed on the way of a credential: between any two
// steps that leave something behind, in the store or at the target.
var points = []struct {
	name        string
	atTarget    bool
	first, then string
	before      bool
}{
	{"before the intent is stored", false, "INSERT INTO leases", "", true},
	{"after the intent is stored", false, "INSERT INTO leases", "COMMIT", false},
	{"before the role is made", true, `"mint"(`, "", true},
	{"after the role is made", true, `"mint"(`, "", false},
	{"before it becomes active", false, "SET state = 'active', recall_sealed", "", true},
	{"before that is committed", false, "SET state = 'active', recall_sealed", "COMMIT", true},
	{"after it became active", false, "SET state = 'active', recall_sealed", "COMMIT", false},
	{"before it ends", false, "UPDATE leases SET ended_at", "", true},
	{"after it ended", false, "UPDATE leases SET ended_at", "COMMIT", false},
	{"after it was claimed", false, "UPDATE leases SET claim", "COMMIT", false},
	{"before it is disarmed", true, `"disarm"(`, "", true},
	{"after it is disarmed", true, `"disarm"(`, "", false},
	{"before its sessions are terminated", true, `"kill"(`, "", true},
	{"after its sessions are terminated", true, `"kill"(`, "", false},
	{"before the role is dropped", true, `"reap"(`, "", true},
	{"after the role is dropped", true, `"reap"(`, "", false},
	{"after that was seen", true, `"remains"(`, "", false},
	{"before that is stored", false, "SET state = 'revoked', gone_at", "", true},
	{"after that is stored", false, "SET state = 'revoked', gone_at", "COMMIT", false},
}

// wired is a replica whose ways to the store and to the target are listened to.
type wired struct {
	*replica
	store, target *tap
}

// bank is a site with a target: a database that agents get roles of.
type bank struct {
	*site
	server  *postgres.Server
	wired   []*wired
	target  *sql.DB
	records *sql.DB

	mu      sync.Mutex
	secrets []string
	used    int
}

const targetSchema = `
CREATE ROLE app_ro NOLOGIN;
CREATE TABLE public.orders (id int, tenant text);
INSERT INTO public.orders VALUES (1, 'a'), (2, 'b');
GRANT USAGE ON SCHEMA public TO app_ro;
GRANT SELECT ON public.orders TO app_ro;
CREATE ROLE writ_minter LOGIN NOINHERIT;
`

func newBank(t *testing.T, replicas int) *bank {
	t.Helper()
	server, err := postgres.Start(t.Context(), postgres.Options{Settings: map[string]string{
		"log_statement": "all", "max_connections": "200", "log_min_error_statement": "error",
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	b := &bank{server: server, records: open(t, server.DSN("postgres")), target: nil}
	execute(t, b.records, `CREATE DATABASE bank`)
	b.target = open(t, server.DSN("bank"))
	execute(t, b.target, targetSchema)

	address := fmt.Sprintf("127.0.0.1:%d", server.Port())
	b.site = newSite(t, server.DSN("postgres"), 0)
	for i := range replicas {
		w := &wired{store: newTap(t, address), target: newTap(t, address)}
		b.store = at(t, server.DSN("postgres"), w.store.Addr().String(), "")
		b.minters = fmt.Sprintf("minters: {db: {max_ttl: 1m, postgres: {url: '%s', groups: [app_ro], agent_host: 127.0.0.1, agent_port: %d}}}",
			at(t, server.DSN("bank"), w.target.Addr().String(), "writ_minter"), server.Port())
		w.replica = b.add(fmt.Sprint("r", i))
		w.tolerates = true
		b.wired = append(b.wired, w)
	}
	b.store = server.DSN("postgres")
	bootstrap := exec.Command(binary, "postgres", "bootstrap", "--config", b.replicas[0].config)
	text, err := bootstrap.Output()
	if err != nil {
		t.Fatalf("bootstrap: %v", err)
	}
	execute(t, b.target, string(text))
	return b
}

// at is a DSN with another address, and another user.
func at(t testing.TB, dsn, address, user string) string {
	t.Helper()
	u, err := url.Parse(dsn)
	if err != nil {
		t.Fatal(err)
	}
	u.Host = address
	if user != "" {
		u.User = url.User(user)
	}
	return u.String()
}

func open(t testing.TB, dsn string) *sql.DB {
	t.Helper()
	db, err := sql.Open("pgx", dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	return db
}

func execute(t testing.TB, db *sql.DB, statements string) {
	t.Helper()
	c, err := db.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	err = c.Raw(func(driver any) error {
		conn := driver.(interface{ Conn() *pgx.Conn }).Conn()
		_, err := conn.PgConn().Exec(t.Context(), statements).ReadAll()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// agent asks for credentials, uses them, and gives back most of them.
func (b *bank) agent(l *load, i int, rng *rand.Rand) {
	c := &loadClient{load: l, rng: rng, token: b.is.token(fmt.Sprint("user-", i), fmt.Sprint("agent-", i%3))}
	for !l.stopped() {
		session, ok := c.open()
		for range 5 {
			if !ok || l.stopped() {
				return
			}
			c.pause()
			r := c.question(session, "query")
			d, decided := c.decide(r)
			if !decided {
				return
			}
			if d.Credential == nil {
				c.unexpectedly("decision %s has no credential: %v", d.ID, d.Reasons)
				continue
			}
			b.use(c, d.Credential)
			if rng.IntN(4) > 0 {
				call(c, "release lease", func(ctx context.Context, w *client.Client) (*client.Lease, error) {
					l, err := w.Release(ctx, d.Credential.Lease)
					if p, is := errors.AsType[*client.Error](err); is && p.Status == 404 { // its session was forgotten
						err = nil
					}
					return l, err
				})
			}
		}
		if rng.IntN(2) == 0 {
			call(c, "end session", func(ctx context.Context, w *client.Client) (*client.Session, error) {
				return w.EndSession(ctx, session)
			})
		}
	}
}

// use logs in. A credential that was replaced by a retry, or has ended, can't.
func (b *bank) use(c *loadClient, cred *client.Credential) {
	b.mu.Lock()
	b.secrets = append(b.secrets, cred.Secret["password"])
	b.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, cred.Secret["dsn"])
	if err != nil {
		return
	}
	var n int
	if err := conn.QueryRow(ctx, `SELECT count(*) FROM orders`).Scan(&n); err == nil && n == 2 {
		b.mu.Lock()
		b.used++
		b.mu.Unlock()
	}
	if c.rng.IntN(2) == 0 {
		_ = conn.Close(ctx)
	} // else it stays open, and somebody has to end it
}

// left says what is not as it must be in the end: roles, and leases that are not gone.
func (b *bank) left() error {
	var roles, known []string
	rows(b.site, b.target, `SELECT rolname FROM pg_roles WHERE rolname LIKE 'writ\_lea\_%'`, func(scan func(...any)) {
		var name string
		scan(&name)
		roles = append(roles, name)
	})
	rows(b.site, b.records, `SELECT id || ' ' || state || ' ' || end_reason || ' ' || last_error FROM leases WHERE state <> 'revoked'`, func(scan func(...any)) {
		var name string
		scan(&name)
		known = append(known, name)
	})
	if len(roles)+len(known) > 0 {
		return fmt.Errorf("%d roles, %d leases that are not gone: %v %v", len(roles), len(known), roles[:min(3, len(roles))], known[:min(3, len(known))])
	}
	return nil
}

// strangers are roles that no lease knows as alive: there must be none at any moment.
func (b *bank) strangers() (out []string) {
	// First the roles: a lease is stored before its role is made, and gone after it.
	var roles []string
	rows(b.site, b.target, `SELECT rolname FROM pg_roles WHERE rolname LIKE 'writ\_lea\_%'`, func(scan func(...any)) {
		var name string
		scan(&name)
		roles = append(roles, strings.TrimPrefix(name, "writ_"))
	})
	for _, id := range roles {
		var state string
		err := b.records.QueryRow(`SELECT state FROM leases WHERE id = $1`, id).Scan(&state)
		if errors.Is(err, sql.ErrNoRows) {
			out = append(out, id)
		}
	}
	return out
}

// TestFault01KillAtEveryPoint kills one of three replicas at each point of the way of a
// credential, while agents use them. In the end there are no roles without a lease and
// no lease that is not gone, and no secret is found anywhere.
func TestFault01KillAtEveryPoint(t *testing.T) {
	rounds := 1
	if full() {
		rounds = 10
	}
	t.Logf("-chaos.seed=%d", *seed)
	rng := rand.New(rand.NewPCG(*seed, 1))
	b := newBank(t, 3)
	b.start()
	l := newLoad(b.site)
	l.patience = time.Minute
	for i := range 6 {
		source := source(rng)
		l.clients.Go(func() { b.agent(l, i, source) })
	}
	kills := 0
	for round := range rounds {
		for _, p := range points {
			victim := b.wired[rng.IntN(len(b.wired))]
			where := victim.store
			if p.atTarget {
				where = victim.target
			}
			trap := &trap{first: p.first, then: p.then, before: p.before, spring: func() { victim.kill() }}
			where.arm(trap)
			select {
			case <-trap.done:
				kills++
			case <-time.After(30 * time.Second):
				where.disarm()
				t.Fatalf("round %d: nobody came by %q within 30 s", round, p.name)
			}
			if found := b.strangers(); len(found) > 0 {
				t.Errorf("killed %s: roles without a lease: %v", p.name, found)
			}
			sleep(rng, 300*time.Millisecond)
			victim.start()
		}
	}
	l.stop()
	// By policy leases live for 6 seconds; the rest is the time to resolve them.
	within(t, 36*time.Second, b.left)
	b.stop()
	found := b.grep()
	for _, u := range l.unexpected {
		t.Errorf("unexpected: %s", u)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.used < 10 {
		t.Errorf("credentials were used %d times only", b.used)
	}
	fmt.Printf("leases kills=%d points=%d minted=%d used=%d secrets found=%d\n", kills, len(points), len(b.secrets), b.used, found)
	if found > 0 {
		t.Errorf("%d secrets found", found)
	}
}

// grep looks for every secret that was given out: in what replicas logged, in the log of
// PostgreSQL, which has every statement, in both databases' files and in their WAL.
func (b *bank) grep() (found int) {
	b.t.Helper()
	var dir string
	if err := b.records.QueryRow(`SHOW data_directory`).Scan(&dir); err != nil {
		b.t.Fatal(err)
	}
	execute(b.t, b.records, `CHECKPOINT`)
	texts := map[string][]byte{"the log of PostgreSQL": []byte(b.server.Log())}
	for _, r := range b.replicas {
		texts["the log of "+r.name] = r.out.bytes()
		if _, metrics, err := r.probe("/metrics", time.Second); err == nil {
			texts["the metrics of "+r.name] = []byte(metrics)
		}
	}
	for _, root := range []string{filepath.Dir(dir), b.dir} {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			data, err := os.ReadFile(path)
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			texts[path] = data
			return err
		})
		if err != nil {
			b.t.Fatal(err)
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	byStart := map[uint64][]string{} // the first eight bytes: there are many, and much text
	for _, secret := range b.secrets {
		key := bigendian.BigEndian.Uint64([]byte(secret))
		byStart[key] = append(byStart[key], secret)
	}
	control := 0
	for where, text := range texts {
		if bytes.Contains(text, []byte("SCRAM-SHA-256")) {
			control++
		}
		if n := search(text, byStart); n > 0 {
			b.t.Errorf("%s has %d secrets", where, n)
			found += n
		}
	}
	if search([]byte("password="+b.secrets[0]+" "), byStart) != 1 {
		b.t.Error("the search does not find what is there")
	}
	if control == 0 {
		b.t.Error("the verifiers were not found either: the search looks in the wrong places")
	}
	return found
}

func search(text []byte, byStart map[uint64][]string) (found int) {
	var last uint64
	for i, c := range text {
		last = last<<8 | uint64(c)
		for _, secret := range byStart[last] {
			if bytes.HasPrefix(text[i-7:], []byte(secret)) {
				found++
			}
		}
	}
	return found
}
