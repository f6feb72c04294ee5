// Package dev puts Writ and the embedded OpenID provider together on loopback, for
// trying it out: `writ dev` and `writ demo`. Nothing in it is for production.
package dev

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
	"golang.org/x/sync/errgroup"

	"github.com/writsec/writ/bundles"
	"github.com/writsec/writ/internal/config"
	"github.com/writsec/writ/internal/devidp"
	"github.com/writsec/writ/internal/server"
)

// Audience is what the embedded provider's access tokens are for: this Writ.
const Audience = "urn:writ:dev"

// OpsConsole is the client whose tokens the operator uses.
const OpsConsole = "ops-console"

// Gateway is the client whose own token introspects tokens for the CRM.
const Gateway = "crm-gateway"

// Config says where to run.
type Config struct {
	// Dir keeps the data; it is made if it does not exist.
	Dir string
	// Policies is the directory of Rego; "" for Dir/policies, filled from the sample
	// bundle where it does not exist.
	Policies string
	// Listen, OpsListen and IDPListen are loopback addresses; port 0 is any.
	Listen, OpsListen, IDPListen string
	// IDPKey signs the embedded provider's tokens; nil for a fresh one.
	IDPKey *ecdsa.PrivateKey
	// Postgres is the URL of a PostgreSQL server, of 16 or later, as a superuser: the CRM's
	// database is made there, and stays until Database.Drop. Or it is the URL of a
	// database that is a target already, as the minter's account. "" for no such minter.
	Postgres string
	// Change edits Writ's configuration before it starts; nil for none.
	Change func(*config.Config)
	Logger *slog.Logger
}

// Dev is a running pair, once Run is called.
type Dev struct {
	IDP    *devidp.Provider
	Server *server.Server
	// URL of Writ's API.
	URL string
	// Policies is the directory that is watched.
	Policies string
	// Services are the resource servers that may introspect, by audience.
	Services map[string]Service
	// Database is the CRM's; nil for none.
	Database *Database
}

const rootKeyFile = "root.key"

// Service is a resource server's account.
type Service struct{ ID, Secret, Audience string }

// minters are what the sample policies mint with.
var minters = map[string][]string{
	"crm":      {"crm:read", "crm:write"},
	"hr":       {"hr:onboard", "hr:offboard"},
	"payments": {"payments:create"},
}

// New makes what is missing in the folder and binds everything.
func New(ctx context.Context, cfg Config) (_ *Dev, err error) {
	if cfg.Dir, err = filepath.Abs(cfg.Dir); err != nil {
		return nil, fmt.Errorf("find data folder: %w", err)
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make data folder: %w", err)
	}
	d := &Dev{Policies: cfg.Policies, Services: map[string]Service{}}
	if d.Policies == "" {
		d.Policies = filepath.Join(cfg.Dir, "policies")
		if err := unpackSample(d.Policies); err != nil {
			return nil, err
		}
	}
	if _, err := secretFile(cfg.Dir, rootKeyFile); err != nil {
		return nil, err
	}
	cibaSecret, err := secretFile(cfg.Dir, "ciba-client-secret")
	if err != nil {
		return nil, err
	}
	d.IDP, err = devidp.New(devidp.Config{
		Listen: cfg.IDPListen, Audience: Audience, Key: cfg.IDPKey, Logger: cfg.Logger,
		CIBAClient: devidp.Client{ID: "writ", Secret: cibaSecret},
		Users: append(devidp.DefaultUsers(),
			devidp.User{ID: "olga", Name: "Olga Orlov", Email: "olga@example.com", Groups: []string{"writ-operators"}}),
		Agents: append(devidp.DefaultAgents(), devidp.Agent{ID: OpsConsole}, devidp.Agent{ID: Gateway}),
	})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = d.IDP.Close()
			err = errors.Join(err, d.Database.giveUp(ctx))
		}
	}()
	wc, err := d.serverConfig(cfg)
	if err != nil {
		return nil, err
	}
	if cfg.Postgres != "" {
		if d.Database, wc.Minters[crmMinter], err = openCRM(ctx, cfg.Dir, cfg.Postgres); err != nil {
			return nil, err
		}
	}
	if cfg.Change != nil {
		cfg.Change(&wc)
	}
	if err := writeConfig(filepath.Join(cfg.Dir, "writ.yaml"), wc); err != nil {
		return nil, err
	}
	d.Server, err = server.New(ctx, wc, false, cfg.Logger)
	return d, err
}

// writeConfig writes what commands on this store need, such as writ audit.
func writeConfig(path string, c config.Config) error {
	policies, err := filepath.Abs(c.Policy.Path)
	if err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	issuers := []any{}
	for _, is := range c.Issuers {
		issuers = append(issuers, map[string]any{
			"issuer": is.Issuer, "speaks_for": []string{"user", "agent"}, "audience": is.Audience, "algorithms": is.Algorithms,
		})
	}
	text, err := yaml.Marshal(map[string]any{
		"external_url": c.ExternalURL, "store": c.Store, "root_key_file": c.RootKeyFile,
		"policy": map[string]any{"path": policies}, "issuers": issuers,
	})
	if err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	text = append([]byte("# Made by writ dev, for commands on its store: writ audit, writ keys, writ policy.\n"), text...)
	if err := os.WriteFile(path, text, 0o600); err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	return nil
}

func (d *Dev) serverConfig(cfg Config) (config.Config, error) {
	listen, err := freePort(cfg.Listen)
	if err != nil {
		return config.Config{}, err
	}
	d.URL = "http://" + listen
	c := config.Default()
	c.Listen, c.OpsListen, c.ExternalURL = listen, cfg.OpsListen, d.URL
	c.Store = "sqlite:" + filepath.Join(cfg.Dir, "writ.db")
	c.RootKeyFile = filepath.Join(cfg.Dir, rootKeyFile)
	c.Policy.Path, c.Policy.Reload = d.Policies, 500*time.Millisecond
	c.Sessions.OpenOnDecide = true
	c.Issuers = []config.Issuer{{
		Issuer: d.IDP.Issuer(), SpeaksFor: []config.Principal{config.User, config.Agent, config.Operator, config.ServicePrincipal},
		Audience: Audience, Algorithms: []string{"ES256"}, ClockLeeway: 30 * time.Second,
		Operator: &config.Operators{Claim: "groups", Value: "writ-operators", Clients: []string{OpsConsole}},
		CIBA: &config.CIBA{
			ClientID: "writ", ClientSecretFile: filepath.Join(cfg.Dir, "ciba-client-secret"), ClientAuth: "client_secret_basic",
			LoginHint: "{sub}", Algorithms: []string{"ES256"}, Timeout: 40 * time.Second,
			BindingMessage: config.BindingMessage{MaxLength: 200, Charset: "text"},
		},
		Signals: &config.Signals{Audience: Audience},
		SignIn: &config.SignIn{
			ClientID: "writ", ClientSecretFile: filepath.Join(cfg.Dir, "ciba-client-secret"), ClientAuth: "client_secret_basic",
			Scopes: []string{"openid", "profile", "email", "groups"},
		},
	}}
	c.Minters = map[string]config.Minter{}
	for name, scopes := range minters {
		file := "service-" + name + "-secret"
		secret, err := secretFile(cfg.Dir, file)
		if err != nil {
			return config.Config{}, err
		}
		s := Service{ID: name + "-api", Secret: secret, Audience: "urn:" + name + ":api"}
		d.Services[name] = s
		c.Minters[name] = config.Minter{
			MaxTTL: 5 * time.Minute,
			JWT:    &config.JWTMinter{Audience: s.Audience, Scopes: scopes, Checks: "introspection", EnforcesDetails: name != "crm"},
		}
		c.Services = append(c.Services, config.Service{ID: s.ID, SecretFile: filepath.Join(cfg.Dir, file), Audience: s.Audience})
	}
	c.Services = append(c.Services, config.Service{
		ID: Gateway, Subject: &config.Subject{Issuer: d.IDP.Issuer(), ID: Gateway}, Audience: d.Services["crm"].Audience,
	})
	return c, nil
}

// Run serves both until ctx ends.
func (d *Dev) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.IDP.Run(ctx) })
	g.Go(func() error { return d.Server.Run(ctx) })
	return g.Wait()
}

// freePort gives port 0 a number: Writ's own URL must be known before it listens.
func freePort(addr string) (string, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil || port != "0" {
		return addr, err
	}
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		return "", fmt.Errorf("find a free port: %w", err)
	}
	return l.Addr().String(), l.Close()
}

// secretFile reads a secret of the data folder and makes it the first time.
func secretFile(dir, name string) (string, error) {
	path := filepath.Join(dir, name)
	s, err := config.Secret(path)
	if !errors.Is(err, os.ErrNotExist) {
		return s, err
	}
	b := make([]byte, 32)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	s = base64.StdEncoding.EncodeToString(b)
	if name != rootKeyFile { // no character that a form or Basic would have to escape
		s = base64.RawURLEncoding.EncodeToString(b)
	}
	if err := os.WriteFile(path, []byte(s+"\n"), 0o600); err != nil {
		return "", fmt.Errorf("make %s: %w", name, err)
	}
	return s, nil
}

// unpackSample writes the sample bundle as a directory to edit, unless it exists:
// all of it or nothing.
func unpackSample(dir string) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	half, err := os.MkdirTemp(filepath.Dir(dir), ".policies-")
	if err != nil {
		return fmt.Errorf("unpack sample policies: %w", err)
	}
	if err := unpack(half); err != nil {
		return errors.Join(fmt.Errorf("unpack sample policies: %w", err), os.RemoveAll(half))
	}
	if err := os.Rename(half, dir); err != nil {
		return fmt.Errorf("unpack sample policies: %w", err)
	}
	return nil
}

func unpack(dir string) error {
	z, err := gzip.NewReader(bytes.NewReader(bundles.Sample))
	if err != nil {
		return err
	}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(filepath.Clean(h.Name), "/")
		// The manifest's revision would go on naming what has been edited since.
		if h.Typeflag != tar.TypeReg || !filepath.IsLocal(name) || name == ".manifest" {
			continue
		}
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		data, err := io.ReadAll(io.LimitReader(r, 1<<20))
		if err != nil {
			return err
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			return err
		}
	}
}
