package revocation

import "context"

// Step is one round of Run.
func (e *Expirer) Step(ctx context.Context) (more bool, err error) { return e.step(ctx) }
