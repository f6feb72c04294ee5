package minter_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/minter"
	"github.com/writsec/writ/internal/storetest"
)

// pick is the number for the form of a fault test: the long one is for WRIT_CHAOS=full.
func pick(short, long int) int {
	if os.Getenv("WRIT_CHAOS") == "full" {
		return long
	}
	return short
}

// timed is for tests that measure: in the long form, which holds them to it, nothing else
// runs beside them.
func timed(t *testing.T) {
	t.Helper()
	if pick(0, 1) == 0 {
		t.Parallel()
	}
}

// Whatever the order in which a mint and its end get to the target, and wherever the
// mint stalls, nothing is left.
func TestFault03MintAgainstItsEnd(t *testing.T) {
	t.Parallel()
	g := newTarget(t)
	sometime := func() { time.Sleep(time.Duration(rand.IntN(6000)) * time.Microsecond) }
	whole := func(l lease.Lease, _ *pgx.Conn) error {
		sometime()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		_, err := g.Mint(ctx, lease.Order{Lease: l})
		return err
	}
	// Its transaction is open, stalls before the work, and again before the commit.
	stalled := func(l lease.Lease, c *pgx.Conn) error {
		ctx := context.Background()
		tx, err := c.Begin(ctx)
		if err != nil {
			return err
		}
		sometime()
		_, err = tx.Exec(ctx, `SELECT writ.mint($1, $2, $3, NULL, '1 min', clock_timestamp() + interval '1 min')`, "writ_"+l.ID, aVerifier, []string{g.ro})
		if err != nil {
			return errors.Join(err, tx.Rollback(ctx))
		}
		sometime()
		return tx.Commit(ctx)
	}
	var minted, refused atomic.Int32
	runs := pick(60, 1000)
	var all sync.WaitGroup
	for range 4 {
		c, err := pgx.Connect(t.Context(), g.config.URL)
		if err != nil {
			t.Fatal(err)
		}
		all.Go(func() {
			defer func() { _ = c.Close(context.Background()) }()
			for i := range runs / 4 {
				l := g.lease(g.ro)
				mint := whole
				if i%2 == 0 {
					mint = stalled
				}
				var pair sync.WaitGroup
				pair.Go(func() {
					if err := mint(l, c); err == nil {
						minted.Add(1)
					} else if strings.Contains(err.Error(), "has ended") {
						refused.Add(1)
					} else {
						t.Error(err)
					}
				})
				sometime()
				out, err := g.Unmake(context.Background(), []lease.Lease{l})
				if err != nil || out[0].Err != nil {
					t.Error(err, out)
				}
				pair.Wait()
			}
		})
	}
	all.Wait()
	if seen, err := g.Survey(t.Context()); err != nil || len(seen) != 0 {
		t.Errorf("left: %v, %v", seen, err)
	}
	if n := value[int](t, g, `SELECT count(*) FROM pg_auth_members WHERE roleid = to_regrole($1) AND NOT admin_option`, g.ro); n != 0 {
		t.Errorf("the group has %d members", n)
	}
	t.Logf("fault 03: %d interleavings: %d mints were first, %d refused, nothing left", runs, minted.Load(), refused.Load())
	if minted.Load() == 0 || refused.Load() == 0 {
		t.Errorf("%d minted, %d refused: both were to be seen", minted.Load(), refused.Load())
	}
}

// Logins go on while the role ends: none of them may last.
func TestFault06LoginStorm(t *testing.T) {
	t.Parallel()
	g := newTarget(t)
	runs, logins := pick(15, 500), 0
	for range runs {
		l := g.lease(g.ro)
		s := g.mint(t, l)
		var got []*pgx.Conn
		var mu sync.Mutex
		var stop atomic.Bool
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() {
				for !stop.Load() {
					if c, err := pgx.Connect(context.Background(), s["dsn"]); err == nil {
						mu.Lock()
						got = append(got, c)
						mu.Unlock()
					}
				}
			})
		}
		time.Sleep(time.Duration(rand.IntN(20)) * time.Millisecond)
		g.unmake(t, l)
		stop.Store(true)
		all.Wait()
		g.gone(t, l)
		for _, c := range got {
			if _, err := c.Exec(t.Context(), `SELECT 1`); err == nil {
				t.Error("a session lives on")
			}
			_ = c.Close(t.Context())
		}
		logins += len(got)
	}
	if n := value[int](t, g, `SELECT count(*) FROM pg_stat_activity WHERE usesysid IN (SELECT oid FROM writ.lease)`); n != 0 {
		t.Errorf("%d sessions of nobody", n)
	}
	t.Logf("fault 06: %d storms, %d logins got in before the end, none lasts", runs, logins)
	if logins == 0 {
		t.Error("nobody got in, so it proves nothing")
	}
}

// Agents hold every connection that the server has for them, and take each that becomes
// free.
func TestFault07NoConnectionLeft(t *testing.T) {
	timed(t)
	g, _ := ownServer(t, map[string]string{"log_statement": "none", "log_min_messages": "fatal", "log_min_duration_statement": "-1", "log_connections": "off"})
	g.sql(t, `UPDATE writ.settings SET connection_limit = 100`)
	var longest time.Duration
	rounds := pick(2, 30)
	for round := range rounds {
		l, greedy := g.lease(g.ro), g.lease(g.ro)
		s := g.mint(t, l)
		hungry := g.mint(t, greedy)
		m := g.Postgres // has its connections
		if round%2 == 0 {
			m = g.open(t, nil) // has none yet
		}
		var held []*pgx.Conn
		for {
			c, err := pgx.Connect(t.Context(), s["dsn"])
			if err != nil {
				denied(t, err, "53300")
				break
			}
			held = append(held, c)
		}
		if len(held) < 10 {
			t.Fatalf("%d connections", len(held))
		}
		var stop atomic.Bool
		var storm sync.WaitGroup
		for range 4 {
			storm.Go(func() {
				for !stop.Load() {
					if c, err := pgx.Connect(context.Background(), hungry["dsn"]); err == nil {
						defer func() { _ = c.Close(context.Background()) }() // not before the storm is over
					}
				}
			})
		}
		started := time.Now()
		var out []lease.Unmade
		var err error
		for time.Since(started) < 20*time.Second { // as the engine does
			out, err = m.Unmake(t.Context(), []lease.Lease{l, greedy})
			if err == nil && out[0].Err == nil && out[1].Err == nil {
				break
			}
		}
		took := time.Since(started)
		stop.Store(true)
		storm.Wait()
		if err != nil || took > 10*time.Second {
			t.Fatalf("%v, %v after %v", out, err, took)
		}
		if out[0].Seen["sessions"] == nil && took < 5*time.Second {
			t.Errorf("seen %v", out[0].Seen)
		}
		longest = max(longest, took)
		g.gone(t, l)
		g.gone(t, greedy)
		for _, c := range held {
			if c.Ping(t.Context()) == nil {
				t.Error("a session lives on")
			}
			_ = c.Close(context.Background())
		}
		if m != g.Postgres {
			m.Close()
		}
	}
	t.Logf("fault 07: %d rounds with no connection left, the slowest revocation took %v", rounds, longest.Round(time.Millisecond))
}

// Leases come and go without a trace in what groups and tables keep.
func TestFault08NoTraces(t *testing.T) {
	t.Parallel()
	g := newTarget(t)
	const acls = `SELECT (SELECT string_agg(relacl::text, ' ' ORDER BY oid) FROM pg_class) || (SELECT string_agg(datacl::text, ' ' ORDER BY oid) FROM pg_database WHERE datname = current_database())
		|| (SELECT count(*) FROM pg_auth_members WHERE roleid = to_regrole($1) AND admin_option)`
	before := value[string](t, g, acls, g.ro)
	ls := g.leases(pick(300, 10_000))
	spread(8, len(ls), func(i int) { g.make(t, ls[i]) })
	if n := value[int](t, g, `SELECT count(*) FROM pg_auth_members WHERE roleid = to_regrole($1) AND NOT admin_option`, g.ro); n != len(ls) {
		t.Errorf("the group has %d members", n)
	}
	if during := value[string](t, g, acls, g.ro); during != before {
		t.Errorf("before: %s\nwith %d leases: %s", before, len(ls), during)
	}
	g.end(t, ls)
	if after := value[string](t, g, acls, g.ro); after != before {
		t.Errorf("before: %s\nafter: %s", before, after)
	}
	if n := value[int](t, g, `SELECT count(*) FROM pg_db_role_setting s WHERE NOT EXISTS (SELECT FROM pg_roles r WHERE r.oid = s.setrole) AND setrole <> 0`); n != 0 {
		t.Errorf("settings of %d roles that are gone", n)
	}
	t.Logf("fault 08: %d leases of one group at once, no ACL changed", len(ls))
}

// Roles come and go for long: the catalogs stay small, and minting stays fast.
func TestFault08ManyCycles(t *testing.T) {
	timed(t)
	cycles, window := pick(400, 20_000), pick(50, 500)
	g := newTarget(t)
	if cycles > 10_000 { // a server that vacuums as it comes, but for how often it looks
		g, _ = ownServer(t, map[string]string{
			"log_statement": "none", "log_min_messages": "fatal", "log_min_duration_statement": "-1", "log_connections": "off", "autovacuum_naptime": "10s",
		})
	}
	size := func() int {
		return value[int](t, g, `SELECT sum(pg_total_relation_size(c))::int FROM unnest(ARRAY['pg_authid', 'pg_auth_members', 'pg_shdepend', 'pg_db_role_setting']::regclass[]) c`)
	}
	var p99s []time.Duration
	var sizes []int
	started := time.Now()
	for range cycles / window {
		ls := g.leases(window)
		took := make([]time.Duration, window)
		spread(2, window, func(i int) {
			begun := time.Now()
			g.make(t, ls[i])
			took[i] = time.Since(begun)
		})
		g.end(t, ls)
		p99s, sizes = append(p99s, percentile(took, 99)), append(sizes, size())
	}
	authid := value[int](t, g, `SELECT pg_total_relation_size('pg_authid')::int`)
	early, late := best(p99s[1:4]), best(p99s[len(p99s)-3:]) // the first warms up
	t.Logf("fault 08: %d cycles in %v: mint p99 %v at first, %v at last; pg_authid %d kB at last, all role catalogs %d kB at half time, %d kB at last, %d kB at most",
		cycles, time.Since(started).Round(time.Second), early, late, authid>>10, sizes[len(sizes)/2]>>10, sizes[len(sizes)-1]>>10, slices.Max(sizes)>>10)
	if authid > 50<<20 {
		t.Errorf("pg_authid has %d bytes", authid)
	}
	if cycles < 10_000 {
		return // too few to tell
	}
	if late > 2*early {
		t.Errorf("mint p99 was %v, and is %v", early, late)
	}
	if half, last := slices.Max(sizes[:len(sizes)/2]), slices.Max(sizes[len(sizes)/2:]); float64(last) > 1.5*float64(half) {
		t.Errorf("the catalogs grow on: %d bytes at most in the first half, %d in the second", half, last)
	}
}

func percentile(d []time.Duration, p int) time.Duration {
	d = slices.Sorted(slices.Values(d))
	return d[min(len(d)-1, len(d)*p/100)].Round(10 * time.Microsecond)
}

// best of a few leaves out what else the machine was busy with.
func best(d []time.Duration) time.Duration { return slices.Min(d) }

// Fifty mints a second arrive, whether or not the last have been answered, and leases
// end as fast.
func TestFault09MintRate(t *testing.T) {
	timed(t)
	g := newTarget(t)
	var p50s, p99s []time.Duration
	seconds := pick(2, 20)
	for range pick(1, 3) {
		ls := g.leases(50 * seconds)
		took := make([]time.Duration, len(ls))
		made := make(chan lease.Lease, len(ls))
		var all, ending sync.WaitGroup
		ending.Go(func() {
			var batch []lease.Lease
			for l := range made {
				if batch = append(batch, l); len(batch) == 50 {
					g.end(t, batch)
					batch = nil
				}
			}
			g.end(t, batch)
		})
		begun := time.Now()
		for i := range ls {
			due := begun.Add(time.Duration(i) * time.Second / 50)
			time.Sleep(time.Until(due))
			all.Go(func() {
				g.make(t, ls[i])
				took[i] = time.Since(due)
				made <- ls[i]
			})
		}
		all.Wait()
		close(made)
		ending.Wait()
		p50s, p99s = append(p50s, percentile(took, 50)), append(p99s, percentile(took, 99))
	}
	t.Logf("fault 09: 50 mints/s for %d s: p50 %v, p99 %v (of %v)", seconds, best(p50s), best(p99s), p99s)
	if len(p99s) == 3 && best(p99s) > 50*time.Millisecond {
		t.Errorf("p99 %v", best(p99s))
	}
}

// Twenty replicas mint for the same group, and for the very same lease, and end them:
// PostgreSQL's "tuple concurrently updated" reaches nobody.
func TestFault09TwentyReplicas(t *testing.T) {
	t.Parallel()
	g, log := ownServer(t, map[string]string{"max_connections": "200", "log_statement": "none", "log_min_messages": "error", "log_min_duration_statement": "-1", "log_connections": "off"})
	var replicas []*minter.Postgres
	for range 20 {
		replicas = append(replicas, g.open(t, func(c *minter.PostgresConfig) { c.Connections = 2 }))
	}
	rounds := pick(2, 40)
	same, mints := 0, 0
	for range rounds {
		one := g.lease(g.ro)
		ls := append(g.leases(len(replicas)*3), one)
		var all sync.WaitGroup
		for i, m := range replicas {
			for _, l := range append([]lease.Lease{one}, ls[3*i:3*i+3]...) {
				mints++
				all.Go(func() {
					ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
					defer cancel()
					if _, err := m.Mint(ctx, lease.Order{Lease: l}); err != nil {
						t.Error(err)
					}
				})
			}
		}
		all.Wait()
		same += value[int](t, g, `SELECT count(*) FROM pg_roles WHERE rolname = $1`, "writ_"+one.ID)
		for _, m := range replicas[:4] {
			all.Go(func() {
				order := slices.Clone(ls)
				rand.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
				out, err := m.Unmake(context.Background(), order)
				if err != nil {
					t.Error(err)
				}
				for _, u := range out {
					if u.Err != nil {
						t.Error(u.Err)
					}
				}
			})
		}
		all.Wait()
	}
	if seen, err := g.Survey(t.Context()); err != nil || len(seen) != 0 || same != rounds {
		t.Errorf("left: %v, %v; %d of %d shared roles", seen, err, same, rounds)
	}
	t.Logf("fault 09: %d mints by %d replicas, none failed", mints, len(replicas))
	if strings.Contains(log.String(), "concurrently updated") {
		t.Error("a statement failed with it, though nobody was told")
	}
}

// skewed is a target whose clock is off, as far as anything of Writ's can see.
func skewed(t *testing.T, by time.Duration) *target {
	t.Helper()
	off := fmt.Sprintf("(pg_catalog.clock_timestamp() + interval '%d s')", int(by.Seconds()))
	g := describe()
	var server string
	t.Cleanup(func() { g.drop(t, server) })
	g.url = storetest.Database(t, "minter", noMigration)
	server = with(g.url, func(u *url.URL) { u.Path = "/postgres" })
	g.prepare(t)
	functions := strings.ReplaceAll(g.bootstrapSQL(t), "clock_timestamp()", off)
	// What Writ asks itself finds the other clock before the server's own.
	g.sql(t, functions, `CREATE SCHEMA off; CREATE FUNCTION off.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE AS $$ SELECT `+off+` $$;
		GRANT USAGE ON SCHEMA off TO `+g.bootstrap.Account+`; ALTER ROLE `+g.bootstrap.Account+` SET search_path = off, pg_catalog`)
	g.Close()
	g.Postgres = g.open(t, nil)
	return g
}

// The target's clock is wrong: a mint is neither refused for that nor good for longer,
// and a late one is still refused.
func TestFault11TargetsClock(t *testing.T) {
	t.Parallel()
	for _, by := range []time.Duration{-5 * time.Minute, 5 * time.Minute} {
		t.Run(by.String(), func(t *testing.T) {
			t.Parallel()
			g := skewed(t, by)
			for range pick(3, 50) {
				l := g.lease(g.ro)
				before := time.Now()
				g.mint(t, l)
				after := time.Now()
				ttl := l.ExpiresAt.Sub(l.CreatedAt)
				until := value[time.Time](t, g, `SELECT rolvaliduntil FROM pg_roles WHERE rolname = $1`, "writ_"+l.ID)
				// By the target's clock, which is the one that it will look at.
				if from, to := before.Add(by+ttl-time.Second), after.Add(by+ttl+time.Second); until.Before(from) || until.After(to) {
					t.Errorf("valid until %v, want %v to %v", until, from, to)
				}
				g.unmake(t, l)
				wantError(t, g.try(l), "has ended")
			}
			c, err := pgx.Connect(t.Context(), g.config.URL)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = c.Close(context.Background()) }()
			l := g.lease(g.ro)
			_, err = c.Exec(t.Context(), `SELECT writ.mint($1, $2, $3, NULL, '1 min', off.clock_timestamp() - interval '1 ms')`, "writ_"+l.ID, aVerifier, []string{g.ro})
			denied(t, err, "WR003")
			seen, err := g.Survey(t.Context())
			if err != nil || len(seen) != 0 {
				t.Errorf("%v, %v", seen, err)
			}
		})
	}
}

// The target logs all it can, and neither there nor in what it writes for recovery is a
// password.
func TestFault12TargetSeesNoPassword(t *testing.T) {
	t.Parallel()
	g, log := ownServer(t, map[string]string{"log_connections": "off", "log_parameter_max_length": "-1", "log_parameter_max_length_on_error": "-1"})
	// Bootstrap hides the parameters of Writ's account. Here they are logged, as where it
	// was run by somebody who may not hide them.
	g.sql(t, `ALTER ROLE `+g.bootstrap.Account+` RESET ALL`)
	ls := g.leases(pick(40, 1000))
	secrets := make([]string, len(ls))
	spread(4, len(ls), func(i int) {
		made, err := g.Mint(context.Background(), lease.Order{Lease: ls[i]})
		if err != nil {
			t.Error(err)
		}
		secrets[i] = made.Secret["password"]
	})
	if t.Failed() {
		return
	}
	for i := range 3 { // they are the passwords
		c, err := pgx.Connect(t.Context(), with(g.url, func(u *url.URL) { u.User = url.UserPassword("writ_"+ls[i].ID, secrets[i]) }))
		if err != nil {
			t.Fatal(err)
		}
		_ = c.Close(t.Context())
	}
	g.end(t, ls)
	found := map[string][]byte{"log": []byte(log.String())}
	c, err := pgx.Connect(t.Context(), g.url)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close(context.Background()) }()
	rows, _ := c.Query(t.Context(), `SELECT name FROM pg_ls_waldir()`)
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil || len(names) == 0 {
		t.Fatal(names, err)
	}
	for _, name := range names {
		var b []byte
		if err := c.QueryRow(t.Context(), `SELECT pg_read_binary_file('pg_wal/' || $1)`, name).Scan(&b); err != nil {
			t.Fatal(err)
		}
		found["WAL"] = append(found["WAL"], b...)
	}
	known := "writ_" + ls[0].ID
	for where, text := range found {
		if !bytes.Contains(text, []byte(known)) {
			t.Errorf("the %s does not name %s, so it proves nothing", where, known)
		}
		for _, s := range secrets {
			if bytes.Contains(text, []byte(s)) {
				t.Errorf("the %s has a password", where)
				break
			}
		}
	}
	t.Logf("fault 12: %d passwords, none in %d kB of log and %d kB of WAL", len(secrets), len(found["log"])>>10, len(found["WAL"])>>10)
}
