package decision

import "context"

// Turns is turns.
type Turns struct{ *turns }

// NewTurns makes turns.
func NewTurns() Turns { return Turns{newTurns()} }

// Take is take.
func (t Turns) Take(ctx context.Context, key string) (end func(), err error) { return t.take(ctx, key) }
