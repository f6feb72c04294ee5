package crash

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/writsec/writ/test/postgres"
)

// TestChaos kills replicas, and PostgreSQL itself, at random moments under load. Its
// full form (WRIT_CHAOS=full) kills more than 200 times.
func TestChaos(t *testing.T) {
	var sum tally
	for _, engine := range []struct {
		name        string
		short, full int // kills
		run         func(*testing.T, *rand.Rand, int) tally
	}{
		{"postgres", 8, 150, chaosOnPostgres},
		{"sqlite", 8, 60, chaosOnSQLite},
	} {
		t.Run(engine.name, func(t *testing.T) {
			t.Logf("-chaos.seed=%d", *seed)
			kills := engine.short
			if full() {
				kills = engine.full
			}
			sum.add(engine.run(t, rand.New(rand.NewPCG(*seed, uint64(len(engine.name)))), kills))
		})
	}
	fmt.Printf("chaos kills=%d answered=%d lost=%d duplicated=%d unverified=%d\n",
		sum.kills, sum.answered, sum.lost, sum.duplicated, sum.unverified)
}

type tally struct{ kills, answered, lost, duplicated, unverified int }

func (t *tally) add(o tally) {
	t.kills += o.kills
	t.answered += o.answered
	t.lost += o.lost
	t.duplicated += o.duplicated
	t.unverified += o.unverified
}

func chaosOnPostgres(t *testing.T, rng *rand.Rand, kills int) tally {
	server := startPostgres(t)
	return chaos(newSite(t, server.DSN("postgres"), 3), server, rng, kills)
}

func chaosOnSQLite(t *testing.T, rng *rand.Rand, kills int) tally {
	return chaos(newSite(t, "", 1), nil, rng, kills)
}

func chaos(s *site, server *postgres.Server, rng *rand.Rand, kills int) tally {
	s.is.sayYes()
	for _, r := range s.replicas {
		r.tolerates = true
	}
	s.start()
	ctx, cease := context.WithCancel(context.Background())
	var keepers sync.WaitGroup
	for _, r := range s.replicas {
		pause := source(rng)
		keepers.Go(func() { r.keepUp(ctx, pause) })
	}
	l := newLoad(s)
	l.start(10, func() *rand.Rand { return source(rng) })

	killed, servers := 0, 0
	for killed < kills && !s.t.Failed() {
		sleep(rng, 1200*time.Millisecond)
		if server != nil && rng.IntN(4) == 0 {
			server.Kill()
			servers++
			killed++
			sleep(rng, 700*time.Millisecond)
			if err := server.Restart(context.Background()); err != nil {
				s.t.Error(err)
			}
			continue
		}
		if s.replicas[rng.IntN(len(s.replicas))].kill() {
			killed++
		}
	}
	l.stop() // each client still gets its last answer
	for _, r := range s.replicas {
		within(s.t, 30*time.Second, r.ready)
	}
	cease()
	keepers.Wait()
	s.stop()
	s.settle()
	f := s.verify(l)
	s.clean(l, f)
	s.t.Logf("%d kills, %d of PostgreSQL; %d decisions answered, %d entries; %d connections broke, refused %v",
		killed, servers, len(l.decisions), f.entries, l.broken, l.refusals)
	return tally{killed, len(l.decisions), len(f.lost), len(f.duplicated), len(f.unverified)}
}

// source is a random source that follows from another.
func source(from *rand.Rand) *rand.Rand { return rand.New(rand.NewPCG(from.Uint64(), from.Uint64())) }

func sleep(rng *rand.Rand, most time.Duration) { time.Sleep(time.Duration(rng.Int64N(int64(most)))) }

// keepUp starts the process again whenever it ends, as a supervisor does, until ctx
// ends.
func (r *replica) keepUp(ctx context.Context, rng *rand.Rand) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.ended():
			sleep(rng, 600*time.Millisecond)
			r.launch()
		}
	}
}
