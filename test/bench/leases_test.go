package bench

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/writsec/writ/internal/config"
	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/minter"
	"github.com/writsec/writ/internal/server"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/test/postgres"
)

// size is how much is measured.
type size struct {
	rounds  int
	callers []int
	mints   func(callers int) int // in a round
	alone   int                   // leases that are released one by one
	crowd   int                   // leases with open sessions that the kill switch meets
	fsync   string
}

var (
	smoke = size{1, []int{4}, func(int) int { return 12 }, 3, 20, "off"}
	full  = size{5, []int{1, 8, 32}, func(callers int) int { return min(640, 160*callers) }, 200, 1000, "on"}
)

const (
	targetConnections = 8 // for minting, as by default
	hands             = 2 // that unmake, of one replica
	batch             = 100
	cover             = time.Minute // for what should take seconds
)

// TestLeases measures roles of a PostgreSQL target that are minted through POST /decide
// and revoked, beside what the same server does in the same minutes when the same SQL is
// sent to it without Writ ("functions"), and when a superuser makes and drops such roles
// ("plain"). Without WRIT_BENCH=full it only shows that it still works.
func TestLeases(t *testing.T) {
	n := smoke
	if os.Getenv("WRIT_BENCH") == "full" {
		n = full
	}
	pg, err := postgres.Start(t.Context(), postgres.Options{Settings: map[string]string{
		"max_connections": fmt.Sprint(n.crowd + 150), "reserved_connections": "8", "fsync": n.fsync, "full_page_writes": n.fsync, "shared_buffers": "128MB",
	}})
	must(t, err)
	t.Cleanup(func() { _ = pg.Stop() })
	out := &report{size: n}
	bare := newBare(t, pg)
	for _, store := range []string{"sqlite", "postgres"} {
		t.Run(store, func(t *testing.T) {
			l := newLeases(t, pg, store)
			for round := range n.rounds {
				for _, callers := range n.callers {
					l.round(t, out, bare, callers, round)
				}
			}
			l.ways(t, out, n)
			l.releaseAlone(t, out, n.alone)
			l.killSwitch(t, out, n.crowd)
		})
	}
	out.print(t)
}

// leases is a Writ with a target.
type leases struct {
	*world
	store  string
	admin  *pgxpool.Pool // superuser at the target
	issued sync.Map      // lease ids, of a round
}

func newLeases(t *testing.T, pg *postgres.Server, store string) *leases {
	t.Helper()
	target := "crm_" + store
	m := newTarget(t, pg, target)
	if store == "postgres" {
		execute(t, pg.DSN("postgres"), `CREATE DATABASE writ`)
	}
	l := &leases{store: store, admin: open(t, pg.DSN(target), 2)}
	l.world = start(t, func(dir string, c *config.Config) {
		c.Store = "sqlite:" + filepath.Join(dir, "writ.db")
		if store == "postgres" {
			c.Store = pg.DSN("writ")
		}
		c.Policy.Path = policies(t, target)
		c.Minters = map[string]config.Minter{"crm": m}
		c.Leases = config.Leases{PerSession: 100_000, PerUser: 100_000, PerAgent: 100_000}
		c.Issuers[0].SpeaksFor = append(c.Issuers[0].SpeaksFor, config.Operator)
		c.Issuers[0].Operator = &config.Operators{Claim: "groups", Value: "security", Clients: []string{"console"}}
	})
	return l
}

// newTarget makes a database whose roles a minter makes.
func newTarget(t *testing.T, pg *postgres.Server, name string) config.Minter {
	t.Helper()
	execute(t, pg.DSN("postgres"), `CREATE DATABASE `+name)
	u, err := url.Parse(pg.DSN(name))
	must(t, err)
	u.User = url.User(name + "_minter")
	m := config.Minter{MaxTTL: 30 * time.Minute, MaxActive: 100_000, Postgres: &config.Postgres{
		URL: u.String(), Groups: []string{name + "_ro"}, Tenants: minter.TenantsNone, Connections: targetConnections,
		Schema: "writ", Owner: name + "_owner", ConnectionLimit: 3, StatementTimeout: 30 * time.Second, TransactionTimeout: time.Minute,
	}}
	text, err := minter.BootstrapSQL(server.PostgresBootstrap(m))
	must(t, err)
	execute(t, pg.DSN(name), text)
	return m
}

// policies are the sample ones, but that reading an opportunity takes a role of a target.
func policies(t *testing.T, target string) string {
	t.Helper()
	dir := t.TempDir()
	must(t, os.CopyFS(dir, os.DirFS("../../policies")))
	path := filepath.Join(dir, "writ/rules/crm/crm.rego")
	must(t, os.Remove(filepath.Join(dir, "writ/rules/crm/crm_test.rego"))) // of the others
	text, err := os.ReadFile(path)
	must(t, err)
	was := `"scope": {"scopes": ["crm:read"]}`
	if !strings.Contains(string(text), was) {
		t.Fatalf("%s has no %s", path, was)
	}
	text = []byte(strings.ReplaceAll(string(text), was, fmt.Sprintf(`"scope": {"groups": [%q]}`, target+"_ro")))
	must(t, os.WriteFile(path, text, 0o600))
	return dir
}

// round measures once what is to be compared, in an order that changes from round to
// round.
func (l *leases) round(t *testing.T, out *report, b *bare, callers, round int) {
	n := out.mints(callers)
	parts := []func(){
		func() {
			l.mint(t, out.at(l.store, "mint", "writ", callers), callers, n)
			out.at(l.store, "revoke", "writ", callers).rate(n, l.untilGone(t, n, func() { l.release(t, callers) }))
		},
		func() {
			roles := b.roles(n)
			out.at(l.store, "mint", "functions", callers).run(callers, n, func(_, i int) { b.mint(t, roles[i]) })
			out.at(l.store, "revoke", "functions", callers).rate(n, b.unmake(t, roles))
		},
		func() {
			roles := b.roles(n)
			out.at(l.store, "mint", "plain", callers).run(callers, n, func(_, i int) { b.create(t, roles[i]) })
			out.at(l.store, "revoke", "plain", callers).rate(n, spread(hands, n, func(_, i int) { b.drop(t, roles[i]) }))
		},
	}
	for i := range parts {
		parts[(i+round)%len(parts)]()
	}
}

type answer struct {
	Decision   string `json:"decision"`
	Credential struct {
		Lease  string            `json:"lease"`
		Secret map[string]string `json:"secret"`
	} `json:"credential"`
}

// mint asks for credentials; each caller has a session of its own.
func (l *leases) mint(t *testing.T, s *series, callers, n int) (made []answer) {
	made = make([]answer, n)
	s.run(callers, n, func(caller, i int) {
		l.post(t, "/decide", l.bodies["allow"][caller], &made[i])
		if made[i].Credential.Secret["password"] == "" {
			t.Errorf("no credential: %q", made[i].Decision)
		}
		l.issued.Store(made[i].Credential.Lease, true)
	})
	return made
}

// untilGone does something that ends n leases, and measures until all were seen to be
// gone at their target, as the store says.
func (l *leases) untilGone(t *testing.T, n int, end func()) time.Duration {
	t.Helper()
	begin := time.Now()
	end()
	for l.living(t) > 0 {
		if t.Failed() || time.Since(begin) > cover {
			t.Fatalf("%d leases of %d are not gone after %v", l.living(t), n, cover)
		}
		time.Sleep(5 * time.Millisecond)
	}
	took := time.Since(begin)
	if left := roles(t, l.admin); left > 0 {
		t.Errorf("%d roles are there still", left)
	}
	return took
}

func (l *leases) living(t *testing.T) (n int) {
	var load sqlstore.Load
	must(t, l.server.Store().View(t.Context(), func(tx *sqlstore.Tx) (err error) {
		load, err = tx.Load(t.Context())
		return err
	}))
	for _, c := range load.Leases {
		n += c.Count
	}
	return n
}

func roles(t *testing.T, admin *pgxpool.Pool) (n int) {
	must(t, admin.QueryRow(t.Context(), `SELECT count(*) FROM pg_roles r WHERE rolname ~ '^writ_lea_'
		AND EXISTS (SELECT FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid WHERE m.member = r.oid AND g.rolname = current_database() || '_ro')`).Scan(&n))
	return n
}

// release ends each lease by itself.
func (l *leases) release(t *testing.T, callers int) {
	var ids []string
	l.issued.Range(func(k, _ any) bool { ids = append(ids, k.(string)); return true })
	l.issued.Clear()
	spread(callers, len(ids), func(_, i int) { l.call(t, "DELETE", "/leases/"+ids[i], l.token, nil, &struct{}{}) })
}

// ways measures the other ways to end many leases.
func (l *leases) ways(t *testing.T, out *report, n size) {
	operator := l.sign("op", "console", "security")
	for range n.rounds {
		for _, way := range []struct {
			name string
			end  func(sessions []string)
		}{
			{"session end", func(sessions []string) {
				spread(8, len(sessions), func(_, i int) { l.call(t, "DELETE", "/sessions/"+sessions[i], l.token, nil, &struct{}{}) })
			}},
			{"kill switch", func([]string) {
				l.call(t, "POST", "/revocations", operator, []byte(`{"minter":"crm","freeze":false}`), &struct{}{})
			}},
		} {
			sessions := l.sessions(t, 16)
			l.mint(t, &series{}, 8, n.mints(8))
			out.at(l.store, way.name, "writ", 0).rate(n.mints(8), l.untilGone(t, n.mints(8), func() { way.end(sessions) }))
		}
	}
	l.issued.Clear()
}

// sessions opens new ones for those that mint from now on.
func (l *leases) sessions(t *testing.T, n int) (ids []string) {
	l.bodies["allow"] = nil
	for range n {
		var opened struct {
			Session string `json:"session"`
		}
		l.post(t, "/sessions", []byte(`{}`), &opened)
		ids = append(ids, opened.Session)
		l.bodies["allow"] = append(l.bodies["allow"], fmt.Appendf(nil, `{"session":%q,"intent":{"action":"crm.opportunity.read"},"resource":{"type":"crm.opportunity","id":"opp-42"}}`, opened.Session))
	}
	return ids
}

// releaseAlone measures how long it takes until one lease is gone, with nothing else to do.
func (l *leases) releaseAlone(t *testing.T, out *report, n int) {
	l.sessions(t, 1)
	s := out.at(l.store, "one release until gone", "writ", 1)
	for range n {
		l.mint(t, &series{}, 1, 1)
		took := l.untilGone(t, 1, func() { l.release(t, 1) })
		s.took = append(s.took, took)
	}
}

// killSwitch measures the end of leases that are all in use.
func (l *leases) killSwitch(t *testing.T, out *report, n int) {
	l.sessions(t, 16)
	made := l.mint(t, &series{}, 8, n)
	conns := make([]*pgx.Conn, n)
	spread(8, n, func(_, i int) {
		c, err := pgx.Connect(t.Context(), made[i].Credential.Secret["dsn"])
		if err == nil {
			_, err = c.Exec(t.Context(), `SELECT 1`)
		}
		if err != nil {
			t.Errorf("log in: %v", err)
		}
		conns[i] = c
	})
	if t.Failed() {
		t.FailNow()
	}
	var lastSession, lastRole time.Duration
	operator := l.sign("op", "console", "security")
	begin := time.Now()
	var all sync.WaitGroup
	var last atomic.Int64
	for _, c := range conns { // as the agents see it
		all.Go(func() {
			_, err := c.WaitForNotification(t.Context())
			if err == nil {
				t.Error("a notification, expected the end")
			}
			for d := int64(time.Since(begin)); ; {
				if was := last.Load(); was >= d || last.CompareAndSwap(was, d) {
					break
				}
			}
			_ = c.Close(context.Background())
		})
	}
	var answered time.Duration
	all.Go(func() { // as the target sees it
		for lastRole == 0 && time.Since(begin) < cover {
			var sessions int
			must(t, l.admin.QueryRow(t.Context(), `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND (usename ~ '^writ_lea_' OR usename IS NULL)`).Scan(&sessions))
			if sessions == 0 && lastSession == 0 {
				lastSession = time.Since(begin)
			}
			if lastSession > 0 && roles(t, l.admin) == 0 {
				lastRole = time.Since(begin)
			}
			time.Sleep(20 * time.Millisecond)
		}
	})
	gone := l.untilGone(t, n, func() {
		l.call(t, "POST", "/revocations", operator, []byte(`{"agent":{"iss":"`+issuer+`","sub":"sales-agent"},"freeze":true}`), &struct{}{})
		answered = time.Since(begin)
	})
	all.Wait()
	out.kills = append(out.kills, kill{l.store, n, answered, time.Duration(last.Load()), lastSession, lastRole, gone})
	if lastSession == 0 || lastSession > 10*time.Second || time.Duration(last.Load()) > 10*time.Second {
		t.Errorf("the last session ended after %v, expected 10 s at most", lastSession)
	}
	if gone > 30*time.Second || lastRole == 0 {
		t.Errorf("the last lease was gone after %v, expected 30 s at most", gone)
	}
}

// bare is a target without a Writ.
type bare struct {
	account, super *pgxpool.Pool
	group          string
}

func newBare(t *testing.T, pg *postgres.Server) *bare {
	t.Helper()
	m := newTarget(t, pg, "bare")
	u, err := url.Parse(pg.DSN("bare"))
	must(t, err)
	u.RawQuery += "&default_query_exec_mode=simple_protocol" // several statements in one round trip
	return &bare{account: open(t, m.Postgres.URL, targetConnections), super: open(t, u.String(), targetConnections), group: m.Postgres.Groups[0]}
}

func open(t *testing.T, dsn string, connections int32) *pgxpool.Pool {
	t.Helper()
	c, err := pgxpool.ParseConfig(dsn)
	must(t, err)
	c.MaxConns = connections
	pool, err := pgxpool.NewWithConfig(t.Context(), c)
	must(t, err)
	t.Cleanup(pool.Close)
	return pool
}

func execute(t *testing.T, dsn, text string) {
	t.Helper()
	c, err := pgx.Connect(t.Context(), dsn)
	must(t, err)
	defer c.Close(t.Context())
	if _, err := c.PgConn().Exec(t.Context(), text).ReadAll(); err != nil {
		t.Fatal(err)
	}
}

const aVerifier = "SCRAM-SHA-256$4096:AAAAAAAAAAAAAAAAAAAAAA==$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="

func (b *bare) roles(n int) (out []string) {
	for range n {
		out = append(out, "writ_"+id.New(id.Lease))
	}
	return out
}

func (b *bare) mint(t *testing.T, role string) {
	var at time.Time
	err := b.account.QueryRow(t.Context(), `SELECT writ.mint($1, $2, $3, $4, $5, $6)`,
		role, aVerifier, []string{b.group}, nil, 5*time.Minute, time.Now().Add(time.Minute)).Scan(&at)
	if err != nil {
		t.Error(err)
	}
}

// unmake takes the steps of verified revocation, in batches, from as many connections as
// one replica does.
func (b *bare) unmake(t *testing.T, roles []string) time.Duration {
	batches := slices.Collect(slices.Chunk(roles, batch))
	return spread(hands, len(batches), func(_, i int) {
		c, err := b.account.Acquire(t.Context())
		must(t, err)
		defer c.Release()
		for _, step := range []string{
			`SELECT pid::text FROM writ.kill($1)`, `SELECT problem FROM writ.disarm($1)`, `SELECT pid::text FROM writ.kill($1)`,
			`SELECT problem FROM writ.reap($1)`, `SELECT problem FROM writ.remains($1)`,
		} {
			rows, err := c.Query(t.Context(), step, batches[i])
			must(t, err)
			problems, err := pgx.CollectRows(rows, pgx.RowTo[*string])
			must(t, err)
			for _, p := range problems {
				if p != nil && !strings.Contains(step, "kill") {
					t.Errorf("%s: %s", step, *p)
				}
			}
		}
	})
}

func (b *bare) create(t *testing.T, role string) {
	b.run(t, `BEGIN; CREATE ROLE %[1]s LOGIN PASSWORD '`+aVerifier+`' VALID UNTIL 'tomorrow' CONNECTION LIMIT 3; ALTER ROLE %[1]s SET statement_timeout = 30000;
		ALTER ROLE %[1]s SET idle_in_transaction_session_timeout = 60000; GRANT %[2]s TO %[1]s; COMMIT`, role, b.group)
}

func (b *bare) drop(t *testing.T, role string) {
	b.run(t, `BEGIN; ALTER ROLE %[1]s NOLOGIN; COMMIT; SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '%[1]s'; BEGIN; DROP ROLE %[1]s; COMMIT`, role)
}

func (b *bare) run(t *testing.T, text string, args ...any) {
	if _, err := b.super.Exec(t.Context(), fmt.Sprintf(text, args...)); err != nil {
		t.Error(err)
	}
}

// spread has callers do n things, and measures that.
func spread(callers, n int, f func(caller, i int)) time.Duration {
	var next atomic.Int64
	var all sync.WaitGroup
	begin := time.Now()
	for caller := range callers {
		all.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				f(caller, i)
			}
		})
	}
	all.Wait()
	return time.Since(begin)
}

// series is one thing that is measured in each round.
type series struct {
	rates []float64 // a second, one for each round
	took  []time.Duration
}

func (s *series) run(callers, n int, f func(caller, i int)) {
	took := make([]time.Duration, n)
	s.rate(n, spread(callers, n, func(caller, i int) {
		begin := time.Now()
		f(caller, i)
		took[i] = time.Since(begin)
	}))
	s.took = append(s.took, took...)
}

func (s *series) rate(n int, d time.Duration) { s.rates = append(s.rates, float64(n)/d.Seconds()) }

func (s *series) ms(q float64) float64 {
	if len(s.took) == 0 {
		return 0
	}
	slices.Sort(s.took)
	return float64(s.took[int(q*float64(len(s.took)-1))].Microseconds()) / 1000
}

func median[T cmp.Ordered](list []T) (v T) {
	if len(list) > 0 {
		v = slices.Sorted(slices.Values(list))[len(list)/2]
	}
	return v
}

// share is the median, over the rounds, of what one did of the other.
func share(one, other *series) float64 {
	var out []float64
	for i := range min(len(one.rates), len(other.rates)) {
		out = append(out, 100*one.rates[i]/other.rates[i])
	}
	return median(out)
}

type place struct {
	store, what, how string
	callers          int
}

type kill struct {
	store                                             string
	leases                                            int
	answered, lastClosed, lastSession, lastRole, gone time.Duration
}

type report struct {
	size
	series map[place]*series
	kills  []kill
}

func (r *report) at(store, what, how string, callers int) *series {
	if r.series == nil {
		r.series = map[place]*series{}
	}
	p := place{store, what, how, callers}
	if r.series[p] == nil {
		r.series[p] = &series{}
	}
	return r.series[p]
}

func (r *report) print(t *testing.T) {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 1, ' ', tabwriter.Debug)
	defer func() { must(t, w.Flush()) }()
	stores := slices.Compact(slices.Sorted(func(yield func(string) bool) {
		for p := range maps.Keys(r.series) {
			if !yield(p.store) {
				return
			}
		}
	}))
	fmt.Fprintf(w, "a second, medians of %d rounds\n", r.rounds)
	fmt.Fprintln(w, "store\twhat\tcallers\t/decide\tfunctions\t%\tplain\t%\tp50 ms\tp99 ms\tfunctions p50\tp99\tp99 ratio\t")
	for _, store := range stores {
		for _, what := range []string{"mint", "revoke"} {
			for _, callers := range r.callers {
				writ, fn, plain := r.at(store, what, "writ", callers), r.at(store, what, "functions", callers), r.at(store, what, "plain", callers)
				fmt.Fprintf(w, "%s\t%s\t%d\t%.0f\t%.0f\t%.0f %%\t%.0f\t%.0f %%\t", store, what, callers,
					median(writ.rates), median(fn.rates), share(writ, fn), median(plain.rates), share(writ, plain))
				if what == "mint" {
					fmt.Fprintf(w, "%.1f\t%.1f\t%.1f\t%.1f\t%.1f\t", writ.ms(0.5), writ.ms(0.99), fn.ms(0.5), fn.ms(0.99), writ.ms(0.99)/fn.ms(0.99))
				}
				fmt.Fprintln(w)
			}
		}
		for _, way := range []string{"session end", "kill switch"} {
			fmt.Fprintf(w, "%s\trevoke, %s\t\t%.0f\t\n", store, way, median(r.at(store, way, "writ", 0).rates))
		}
		s := r.at(store, "one release until gone", "writ", 1)
		fmt.Fprintf(w, "%s\tone release until gone\t1\t\t\t\t\t\t%.1f\t%.1f\t\n", store, s.ms(0.5), s.ms(0.99))
	}
	fmt.Fprintln(w, "\nthe kill switch and leases with open sessions, seconds after its request\n"+
		"store\tleases\tanswered\tlast session dead (seen by agents)\t(by the target)\tlast role gone\tall revoked\t")
	for _, k := range r.kills {
		fmt.Fprintf(w, "%s\t%d\t%.2f\t%.2f\t%.2f\t%.2f\t%.2f\t\n", k.store, k.leases,
			k.answered.Seconds(), k.lastClosed.Seconds(), k.lastSession.Seconds(), k.lastRole.Seconds(), k.gone.Seconds())
	}
}
