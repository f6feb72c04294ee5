package lease

import "context"

// Step unmakes one batch at one of the targets.
func (w *Worker) Step(ctx context.Context, name string) (bool, error) {
	return w.step(ctx, name, w.Targets[name], false)
}
