package audit

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/writsec/writ/internal/config"
	"github.com/writsec/writ/internal/telemetry"
)

// Place is a second place for checkpoints, out of reach of whoever administers the
// store.
type Place interface {
	// Name is file or url.
	Name() string
	// Copy stores a signed checkpoint.
	Copy(ctx context.Context, checkpoint string) error
}

// Copier copies the log's checkpoint to second places on a timer. Every replica
// copies for itself, so that none depends on another.
type Copier struct {
	Store   LogStore
	Places  []Place
	Every   time.Duration
	Metrics *telemetry.Metrics
	Logger  *slog.Logger

	copied map[string]string // by place: the last checkpoint it took
}

const copyTimeout = 10 * time.Second

// Run works until ctx ends, and then copies once more.
func (c *Copier) Run(ctx context.Context) error {
	if len(c.Places) == 0 {
		<-ctx.Done()
		return nil
	}
	for {
		c.Step(ctx)
		select {
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), copyTimeout)
			defer cancel()
			c.Step(last)
			return nil
		case <-time.After(c.Every/2 + rand.N(c.Every/2)): //nolint:gosec // jitter
		}
	}
}

// Step copies the present checkpoint to every place that lacks it.
func (c *Copier) Step(ctx context.Context) {
	var head Head
	var ok bool
	err := c.Store.View(ctx, func(tx LogTx) (err error) {
		head, ok, err = tx.Head(ctx)
		return err
	})
	if err != nil || !ok {
		if ctx.Err() == nil { // a stop copies once more
			c.Logger.ErrorContext(ctx, "copy checkpoint", "error", err)
		}
		return
	}
	if c.copied == nil {
		c.copied = map[string]string{}
	}
	for _, p := range c.Places {
		if c.copied[p.Name()] != head.Checkpoint {
			one, cancel := context.WithTimeout(ctx, copyTimeout)
			err := p.Copy(one, head.Checkpoint)
			cancel()
			if err != nil && ctx.Err() != nil {
				return
			}
			if err != nil {
				c.Metrics.Copies.WithLabelValues(p.Name(), "failed").Inc()
				c.Logger.ErrorContext(ctx, "copy checkpoint", "place", p.Name(), "error", err)
				continue
			}
			c.Metrics.Copies.WithLabelValues(p.Name(), "ok").Inc()
			c.copied[p.Name()] = head.Checkpoint
		}
		c.Metrics.CopiedSize.WithLabelValues(p.Name()).Set(float64(head.Size))
		c.Metrics.CopiedAt.WithLabelValues(p.Name()).SetToCurrentTime()
	}
}

// FilePlace appends checkpoints to a file, each followed by an empty line. The file
// should be on another machine, or at least another's to write.
type FilePlace struct{ Path string }

// Name implements Place.
func (FilePlace) Name() string { return "file" }

// Copy implements Place.
func (p FilePlace) Copy(_ context.Context, checkpoint string) (err error) {
	if err := os.MkdirAll(filepath.Dir(p.Path), 0o700); err != nil {
		return fmt.Errorf("append checkpoint: %w", err)
	}
	f, err := os.OpenFile(p.Path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("append checkpoint: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	// One write, so that replicas which share the file don't tear each other's lines.
	if _, err := io.WriteString(f, checkpoint+"\n"); err != nil {
		return fmt.Errorf("append checkpoint: %w", err)
	}
	return f.Sync()
}

// Largest returns the checkpoint of an origin in the file that has the most entries
// and is signed by one of the verifier keys; "" where there is none. Neither a smaller
// one after it nor a forged one hides it.
func (p FilePlace) Largest(origin string, vkeys []string) (string, error) {
	f, err := os.Open(p.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read copied checkpoints: %w", err)
	}
	defer func() { _ = f.Close() }() // only read
	largest, size := "", int64(-1)
	err = EachCheckpoint(f, func(signed string) error {
		c, err := OpenCheckpoint(signed, vkeys...) // a torn one is passed over
		if err == nil && c.Origin == origin && c.Size >= size {
			largest, size = signed, c.Size
		}
		return nil
	})
	return largest, err
}

const maxCheckpoint = 64 << 10 // bytes of one

// EachCheckpoint calls f with each signed checkpoint of a file that FilePlace wrote.
func EachCheckpoint(r io.Reader, f func(signed string) error) error {
	s := bufio.NewScanner(r)
	s.Buffer(nil, maxCheckpoint)
	var b strings.Builder
	flush := func() error {
		defer b.Reset()
		if text := b.String(); strings.Contains(text, "\n\n— ") {
			return f(text)
		}
		return nil
	}
	for s.Scan() {
		line := s.Text()
		if line == "" && strings.Contains(b.String(), "\n\n— ") || b.Len() > maxCheckpoint {
			if err := flush(); err != nil {
				return err
			}
			continue
		}
		b.WriteString(line + "\n")
	}
	if err := s.Err(); err != nil {
		return fmt.Errorf("read copied checkpoints: %w", err)
	}
	return flush()
}

// URLPlace posts checkpoints to an HTTP endpoint, which must answer 2xx.
type URLPlace struct {
	URL       string
	TokenFile string // holds what is sent as Bearer, read anew each time; "" none
	Client    *http.Client
}

// Name implements Place.
func (URLPlace) Name() string { return "url" }

// Copy implements Place.
func (p URLPlace) Copy(ctx context.Context, checkpoint string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.URL, strings.NewReader(checkpoint))
	if err != nil {
		return fmt.Errorf("post checkpoint: %w", err)
	}
	req.Header.Set("Content-Type", "text/plain; charset=utf-8")
	if p.TokenFile != "" {
		token, err := config.Secret(p.TokenFile)
		if err != nil {
			return fmt.Errorf("post checkpoint: %w", err)
		}
		req.Header.Set("Authorization", "Bearer "+token)
	}
	res, err := p.Client.Do(req)
	if err != nil {
		return fmt.Errorf("post checkpoint: %w", err)
	}
	defer res.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, 64<<10)) // to keep the connection
	if res.StatusCode/100 != 2 {
		return fmt.Errorf("post checkpoint: answered %s", res.Status)
	}
	return nil
}
