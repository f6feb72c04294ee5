package server

import (
	"log/slog"
	"time"

	"github.com/writsec/writ/internal/config"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/minter"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/telemetry"
)

func newMinters(cfg config.Config, keys *minter.Keys, status *minter.StatusLists, now func() time.Time) (_ map[string]lease.Minter, err error) {
	out := map[string]lease.Minter{}
	for name, m := range cfg.Minters {
		if m.OAuth != nil {
			out[name] = newOAuth(name, m, cfg.ExternalURL, keys, now)
		}
		if m.Postgres != nil {
			if out[name], err = NewPostgres(name, m); err != nil {
				return nil, err
			}
		}
		if j := m.JWT; j != nil {
			out[name] = &minter.JWT{
				Name: name, Issuer: cfg.ExternalURL, Audience: j.Audience, Scopes: j.Scopes, MaxTTL: m.MaxTTL,
				EnforcesDetails: j.EnforcesDetails, Checks: minter.Checks(j.Checks), Keys: keys, Status: status,
			}
		}
	}
	return out, nil
}

// leaseWork is what goes on at the targets of minters.
type leaseWork struct {
	breakers map[string]*lease.Breaker
	worker   *lease.Worker
	surveys  *lease.Surveys
}

const (
	surveyEvery = 5 * time.Second
	orphanGrace = 2 * time.Minute
)

func newLeaseWork(minters map[string]lease.Minter, store *sqlstore.Store, m *telemetry.Metrics, log *slog.Logger) leaseWork {
	w := leaseWork{
		breakers: map[string]*lease.Breaker{},
		worker:   &lease.Worker{Store: sqlstore.For[lease.WorkTx](store).Urgent(), Targets: map[string]lease.Target{}, Metrics: m, Logger: log},
		surveys: &lease.Surveys{
			Store: sqlstore.For[lease.SurveyTx](store), Targets: map[string]lease.Surveyor{},
			Every: surveyEvery, Grace: orphanGrace, Logger: log,
		},
	}
	w.worker.Breakers = w.breakers
	for name, minter := range minters {
		if t, ok := minter.(lease.Target); ok {
			w.breakers[name], w.worker.Targets[name] = &lease.Breaker{}, t
		}
		if t, ok := minter.(lease.Surveyor); ok {
			w.surveys.Targets[name] = t
		}
	}
	return w
}

func leaseLimits(cfg config.Config) lease.Limits {
	l := lease.Limits{
		PerSession: cfg.Leases.PerSession, PerUser: cfg.Leases.PerUser, PerAgent: cfg.Leases.PerAgent, PerMinter: map[string]int{},
	}
	for name, m := range cfg.Minters {
		l.PerMinter[name] = m.MaxActive
	}
	return l
}
