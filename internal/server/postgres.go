package server

import (
	"fmt"

	"github.com/writsec/writ/internal/config"
	"github.com/writsec/writ/internal/minter"
)

// NewPostgres makes the minter of a PostgreSQL target. It connects when it is used.
func NewPostgres(name string, m config.Minter) (*minter.Postgres, error) {
	p := m.Postgres
	c := minter.PostgresConfig{
		Name: name, URL: p.URL, CAFile: p.CAFile, Schema: p.Schema, Groups: p.Groups, Tenants: p.Tenants,
		AgentHost: p.AgentHost, AgentPort: p.AgentPort, Connections: p.Connections, MaxTTL: m.MaxTTL,
	}
	if p.PasswordFile != "" {
		var err error
		if c.Password, err = config.Secret(p.PasswordFile); err != nil {
			return nil, fmt.Errorf("minter %s: %w", name, err)
		}
	}
	return minter.NewPostgres(c)
}

// PostgresBootstrap is how a target is prepared for such a minter.
func PostgresBootstrap(m config.Minter) minter.Bootstrap {
	p := m.Postgres
	return minter.Bootstrap{
		Database: p.Database(), Schema: p.Schema, Owner: p.Owner, Account: p.Account(), Groups: p.Groups, Tenants: p.Tenants,
		MaxTTL: m.MaxTTL, ConnectionLimit: p.ConnectionLimit, StatementTimeout: p.StatementTimeout,
		TransactionTimeout: p.TransactionTimeout, SearchPath: p.SearchPath, Harden: true,
	}
}
