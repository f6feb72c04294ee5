package minter_test

import (
	"context"
	"fmt"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/writsec/writ/internal/lease"
)

// parallel measures b.N calls by some callers.
func parallel(b *testing.B, callers int, f func(i int)) {
	spread(callers, b.N, f)
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "ops/s")
}

func spread(callers, n int, f func(i int)) {
	var next atomic.Int64
	var all sync.WaitGroup
	for range callers {
		all.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				f(i)
			}
		})
	}
	all.Wait()
}

// BenchmarkPostgres measures minting and verified revocation, in batches as the engine
// gives them, beside bare SQL by a superuser that makes such roles, each in one round
// trip, and drops them. With disks as in production:
//
//	go run ./test/postgres/run -set fsync=on -set full_page_writes=on -- \
//	  go test -run '^$' -bench Postgres ./internal/minter
func BenchmarkPostgres(b *testing.B) {
	g := newTarget(b)
	mint := func(callers int) func(*testing.B) {
		return func(b *testing.B) {
			made := g.leases(b.N)
			b.ResetTimer()
			parallel(b, callers, func(i int) { g.make(b, made[i]) })
			b.StopTimer()
			g.end(b, made)
		}
	}
	for _, callers := range []int{1, 8, 32} {
		b.Run(fmt.Sprintf("mint/callers=%d", callers), mint(callers))
	}
	for _, callers := range []int{1, 2, 4} {
		b.Run(fmt.Sprintf("unmake100/callers=%d", callers), func(b *testing.B) {
			all := g.leases(100 * b.N)
			spread(8, len(all), func(i int) { g.make(b, all[i]) })
			b.ResetTimer()
			parallel(b, callers, func(i int) { g.end(b, all[100*i:100*i+100]) })
			b.ReportMetric(100*float64(b.N)/b.Elapsed().Seconds(), "leases/s")
		})
	}

	pool, err := pgxpool.New(context.Background(), with(g.url, func(u *url.URL) { u.RawQuery += "&default_query_exec_mode=simple_protocol" }))
	if err != nil {
		b.Fatal(err)
	}
	defer pool.Close()
	run := func(b *testing.B, statement string, args ...any) {
		if _, err := pool.Exec(context.Background(), fmt.Sprintf(statement, args...)); err != nil {
			b.Error(err)
		}
	}
	const create = `BEGIN; CREATE ROLE %[1]s LOGIN PASSWORD '` + aVerifier + `' VALID UNTIL 'tomorrow' CONNECTION LIMIT 3; ALTER ROLE %[1]s SET statement_timeout = 30000;
		ALTER ROLE %[1]s SET idle_in_transaction_session_timeout = 60000; ALTER ROLE %[1]s SET search_path = public; GRANT %[2]s TO %[1]s; COMMIT`
	for _, callers := range []int{1, 8} {
		b.Run(fmt.Sprintf("raw-create/callers=%d", callers), func(b *testing.B) {
			all := g.leases(b.N)
			b.ResetTimer()
			parallel(b, callers, func(i int) { run(b, create, "writ_"+all[i].ID, g.ro) })
			b.StopTimer()
			spread(4, len(all), func(i int) { run(b, `DROP ROLE writ_%s`, all[i].ID) })
		})
		b.Run(fmt.Sprintf("raw-drop/callers=%d", callers), func(b *testing.B) {
			all := g.leases(b.N)
			spread(8, len(all), func(i int) { run(b, create, "writ_"+all[i].ID, g.ro) })
			b.ResetTimer()
			parallel(b, callers, func(i int) { run(b, `DROP ROLE writ_%s`, all[i].ID) })
		})
	}

	// Each change of roles costs something for every role that is there.
	const live = 5000
	crowd := g.leases(live)
	spread(8, live, func(i int) { g.make(b, crowd[i]) })
	b.Run(fmt.Sprintf("mint/callers=8/live=%d", live), mint(8))
	g.end(b, crowd)
}

func (g *target) leases(n int) (out []lease.Lease) {
	for range n {
		out = append(out, g.lease(g.ro))
	}
	return out
}

func (g *target) make(b testing.TB, l lease.Lease) {
	b.Helper()
	if _, err := g.Mint(context.Background(), lease.Order{Lease: l}); err != nil {
		b.Error(err)
	}
}

func (g *target) end(b testing.TB, ls []lease.Lease) {
	b.Helper()
	for len(ls) > 0 {
		n := min(100, len(ls))
		out, err := g.Unmake(context.Background(), ls[:n])
		if err != nil {
			b.Error(err)
		}
		for _, u := range out {
			if u.Err != nil {
				b.Error(u.Err)
			}
		}
		ls = ls[n:]
	}
}
