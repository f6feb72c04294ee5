package decision

import (
	"context"
	"fmt"
	"hash/maphash"
)

// turns orders those who were in each other's way: each would otherwise be evaluated
// again and again on what the next one has already changed. It only spares work; what
// keeps them apart is the store, across replicas too.
type turns struct {
	seed  maphash.Seed
	lanes [256]chan struct{} // strangers may share one
}

func newTurns() *turns {
	t := &turns{seed: maphash.MakeSeed()}
	for i := range t.lanes {
		t.lanes[i] = make(chan struct{}, 1)
	}
	return t
}

// take waits for a turn among those of the same key, and returns what ends it.
func (t *turns) take(ctx context.Context, key string) (end func(), err error) {
	lane := t.lanes[maphash.String(t.seed, key)%uint64(len(t.lanes))]
	select {
	case lane <- struct{}{}:
		return func() { <-lane }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for parallel requests: %w", context.Cause(ctx))
	}
}
