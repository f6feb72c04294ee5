package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/url"
	"time"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/config"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/minter"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/telemetry"
)

// OpenStore opens the store that a configuration names.
func OpenStore(ctx context.Context, cfg config.Config, root sqlstore.RootKey, m *telemetry.Metrics, log *slog.Logger) (*sqlstore.Store, error) {
	c, err := storeConfig(cfg, root, log)
	if err != nil {
		return nil, err
	}
	c.Metrics = m
	return sqlstore.Open(ctx, c)
}

// OpenStoreTool opens it for one command, beside a Writ that may be running.
func OpenStoreTool(ctx context.Context, cfg config.Config, log *slog.Logger) (*sqlstore.Store, error) {
	root, err := config.RootKey(cfg.RootKeyFile)
	if err != nil {
		return nil, err
	}
	c, err := storeConfig(cfg, root, log)
	if err != nil {
		return nil, err
	}
	c.Tool = true
	return sqlstore.Open(ctx, c)
}

func storeConfig(cfg config.Config, root sqlstore.RootKey, log *slog.Logger) (sqlstore.Config, error) {
	c := sqlstore.Config{
		URL: cfg.Store, Root: root, Relaxed: cfg.Durability == "os", Connections: cfg.StoreConnections, Logger: log,
	}
	if cfg.StorePasswordFile != "" {
		var err error
		if c.Password, err = config.Secret(cfg.StorePasswordFile); err != nil {
			return c, fmt.Errorf("store_password_file: %w", err)
		}
	}
	return c, nil
}

// openLog begins the log, or goes on with it. A store that is older than what is
// known of it outside was restored from a backup, and must revive nothing.
func (s *Server) openLog(ctx context.Context, cfg config.Config, restored bool) error {
	host := hostOf(cfg)
	logs := sqlstore.For[audit.LogTx](s.store)
	if err := audit.OpenLog(ctx, logs, host); err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	var head audit.Head
	err := logs.View(ctx, func(tx audit.LogTx) (err error) {
		head, _, err = tx.Head(ctx)
		return err
	})
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	outside, why := "", ""
	if file := cfg.Audit.Copies.File; file != "" {
		vkeys, err := s.verifiers(ctx)
		if err != nil {
			return err
		}
		if outside, err = (audit.FilePlace{Path: file}).Largest(head.Origin, vkeys); err != nil {
			return err
		}
	}
	if outside != "" {
		if why, err = audit.Behind(ctx, logs, outside); err != nil {
			return fmt.Errorf("compare log with audit.copies.file: %w", err)
		}
	}
	if why == "" && restored {
		why = "started with --restored"
	}
	if why == "" {
		return nil
	}
	return s.restore(ctx, host, head.Origin, outside, why)
}

func (s *Server) restore(ctx context.Context, host, origin, outside, why string) error {
	s.log.WarnContext(ctx, "restore mode: this store comes from a backup; every session, approval and lease is ended, and the log goes on under a new origin",
		"why", why)
	if err := audit.Restore(ctx, sqlstore.For[audit.RestoreTx](s.store), host, origin, outside, why); err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	return nil
}

// hostOf is whose log it is.
func hostOf(cfg config.Config) string {
	if u, err := url.Parse(cfg.ExternalURL); err == nil && u.Host != "" {
		return u.Host
	}
	return "writ"
}

// verifiers lists the keys that verify checkpoints of this store.
func (s *Server) verifiers(ctx context.Context) (out []string, err error) {
	keys, err := s.store.ListKeys(ctx)
	for _, k := range keys {
		if k.Purpose == sqlstore.CheckpointKey {
			out = append(out, k.ID)
		}
	}
	return out, err
}

func (s *Server) newSequencer(host string, m *telemetry.Metrics) *audit.Sequencer {
	return &audit.Sequencer{
		Store: sqlstore.For[audit.LogTx](s.store), Metrics: m, Logger: s.log,
		WentBack: func(ctx context.Context, seen audit.Head, why string) error {
			return s.restore(ctx, host, seen.Origin, seen.Checkpoint, why)
		},
	}
}

func (s *Server) newCopier(cfg config.Copies, m *telemetry.Metrics) *audit.Copier {
	c := &audit.Copier{Store: sqlstore.For[audit.LogTx](s.store), Every: cfg.Every, Metrics: m, Logger: s.log}
	if cfg.File != "" {
		c.Places = append(c.Places, audit.FilePlace{Path: cfg.File})
	}
	if cfg.URL != "" {
		c.Places = append(c.Places, audit.URLPlace{
			URL: cfg.URL, TokenFile: cfg.URLTokenFile, Client: identity.NewHTTPClient(issuerTimeout),
		})
	}
	return c
}

func newKeeper(ctx context.Context, cfg config.Audit, store *sqlstore.Store) (*audit.Keeper, error) {
	key, err := store.DigestKey(ctx)
	if err != nil {
		return nil, fmt.Errorf("load digest key: %w", err)
	}
	var rules []audit.KeepRule
	for _, r := range cfg.Inputs {
		rules = append(rules, audit.KeepRule{Actions: r.Actions, Keep: audit.Keep(r.Keep)})
	}
	return audit.NewKeeper(key, rules)
}

const (
	// maxLag is how long an entry may wait for the log, in which alone it is safe.
	// Beyond, nothing is decided.
	maxLag     = time.Minute
	watchEvery = 10 * time.Second
	watchLimit = 5 * time.Second
)

// measureLeases sets the gauges of each minter, those with nothing too.
func (s *Server) measureLeases(m *telemetry.Metrics, load sqlstore.Load) {
	counts, stuck := map[[2]string]int{}, map[string]int{}
	minters := map[string]int{}
	maps.Copy(minters, load.Orphans)
	for _, name := range s.minters {
		minters[name] += 0
	}
	for _, l := range load.Leases {
		minters[l.Minter] += 0
		counts[[2]string{l.Minter, string(l.State)}] += l.Count
		stuck[l.Minter] += l.Stuck
	}
	for name, orphans := range minters {
		m.Orphans.WithLabelValues(name).Set(float64(orphans))
		m.StuckLeases.WithLabelValues(name).Set(float64(stuck[name]))
		for _, state := range []lease.State{lease.Intent, lease.Active, lease.Revoking} {
			m.ActiveLeases.WithLabelValues(name, string(state)).Set(float64(counts[[2]string{name, string(state)}]))
		}
	}
}

// watch follows what other replicas change of the keys, and measures the load.
func (s *Server) watch(m *telemetry.Metrics, keys *minter.Keys, root sqlstore.RootKey) func(context.Context) error {
	began := time.Now()
	step := func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, watchLimit)
		defer cancel()
		// Each by itself: one that fails must not keep the others from being followed.
		errs := []error{s.store.RefreshDataKeys(ctx, root), keys.Refresh(ctx)}
		var load sqlstore.Load
		var lag time.Duration
		err := s.store.View(ctx, func(tx *sqlstore.Tx) (err error) {
			if lag, err = tx.SequenceLag(ctx); err == nil {
				load, err = tx.Load(ctx)
			}
			return err
		})
		// What a Writ that was down left behind gets its time too.
		s.stuck.Store(err == nil && min(lag, time.Since(began)) > maxLag)
		if err == nil {
			m.OpenApprovals.Set(float64(load.OpenApprovals))
			m.Freezes.Set(float64(load.Freezes))
			s.measureLeases(m, load)
			m.Unsequenced.Set(float64(load.Unsequenced))
		}
		return errors.Join(append(errs, err)...)
	}
	return func(ctx context.Context) error {
		wake, stop := s.store.Watch(sqlstore.KeysTopic)
		defer stop()
		for {
			if err := step(ctx); err != nil && ctx.Err() == nil {
				s.log.ErrorContext(ctx, "follow the store", "error", err)
			}
			select {
			case <-ctx.Done():
				return nil
			case <-wake:
			case <-time.After(watchEvery):
			}
		}
	}
}
