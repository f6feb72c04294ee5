package approval

import "context"

// Step does the next thing that one due prompt needs.
func (e *Engine) Step(ctx context.Context) (more bool, err error) {
	a, more, err := e.claim(ctx)
	if err != nil || !more {
		return more, err
	}
	return true, e.carry(ctx, a)
}

// Crash makes the engine stop dead where f says so.
func (e *Engine) Crash(f func(point string) bool) { e.crash = f }
