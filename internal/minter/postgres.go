package minter

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/writsec/writ/internal/lease"
)

// PostgresKind is the kind of credential that Postgres mints.
const PostgresKind = "postgres"

// What policy must say of tenants: the rows that row-level security shows to a lease.
const (
	TenantsRequired = "required"
	TenantsOptional = "optional"
	TenantsNone     = "none"
)

// PostgresConfig is one target database.
type PostgresConfig struct {
	Name string // of this minter in the configuration
	// URL reaches the target as the account that may call Writ's functions there.
	// Password goes with it.
	URL      string
	Password string
	// CAFile is the PEM file of who signs the server's certificate; "" is the system's.
	// Agents get its content.
	CAFile string
	Schema string   // of Writ's functions
	Groups []string // the most that a credential can be a member of
	// Tenants is TenantsRequired, TenantsOptional or TenantsNone.
	Tenants string
	// AgentHost and AgentPort are where agents reach the target; zero as Writ does.
	AgentHost string
	AgentPort int
	// Connections bounds those that mint. Revocation has its own.
	Connections int
	MaxTTL      time.Duration
}

// Postgres mints roles of a PostgreSQL database, one for each lease. All that it does
// there are calls of the functions that BootstrapSQL prints.
type Postgres struct {
	PostgresConfig
	ca string // PEM
	// sslmode is how Writ and agents connect. It is the URL's, whatever PGSSLMODE says.
	sslmode string
	at      pgconn.Config
	// Minting and ending have pools of their own, so that a flood of the one leaves the
	// other its connections.
	minting, ending *pgxpool.Pool
	clock           atomic.Pointer[sample]
	purged          atomic.Int64 // Unix seconds
}

const (
	oldestPostgres     = 160000 // server_version_num
	endingConnections  = 4
	endingWarm         = 2 // kept open, for the day when agents take all others
	warmEvery          = 10 * time.Second
	connectTimeout     = 5 * time.Second
	defaultMintTimeout = 10 * time.Second
	maxTenant          = 200 // bytes
)

// NewPostgres prepares a target. It connects to it only when there is something to do,
// so that a target that is down holds up nothing else.
func NewPostgres(c PostgresConfig) (*Postgres, error) {
	p := &Postgres{PostgresConfig: c, sslmode: "prefer"} // the driver's default
	if u, err := url.Parse(c.URL); err == nil && u.Query().Get("sslmode") != "" {
		p.sslmode = u.Query().Get("sslmode")
	}
	if c.CAFile != "" {
		pem, err := os.ReadFile(c.CAFile)
		if err != nil {
			return nil, fmt.Errorf("read CA of minter %s: %w", c.Name, err)
		}
		p.ca = string(pem)
		if !x509.NewCertPool().AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("read CA of minter %s: %s holds no PEM certificate", c.Name, c.CAFile)
		}
	}
	var err error
	if p.minting, err = p.pool(c.Connections, 0); err != nil {
		return nil, err
	}
	if p.ending, err = p.pool(endingConnections, endingWarm); err != nil {
		p.minting.Close()
		return nil, err
	}
	p.at = p.minting.Config().ConnConfig.Config
	return p, nil
}

func (m *Postgres) pool(size, warm int) (*pgxpool.Pool, error) {
	cfg, err := m.poolConfig()
	if err != nil {
		return nil, err
	}
	cfg.MaxConns, cfg.MinConns = int32(size), int32(warm) //nolint:gosec // small
	cfg.AfterConnect, cfg.HealthCheckPeriod = m.greet, warmEvery
	pool, err := pgxpool.NewWithConfig(context.Background(), cfg)
	if err != nil {
		return nil, fmt.Errorf("open minter %s: %w", m.Name, err)
	}
	return pool, nil
}

func (m *Postgres) poolConfig() (*pgxpool.Config, error) {
	u, err := url.Parse(m.URL)
	if err != nil {
		return nil, fmt.Errorf("open minter %s: its url can't be read", m.Name) // not quoted
	}
	q := u.Query()
	q.Set("sslmode", m.sslmode)
	if m.CAFile != "" {
		q.Set("sslrootcert", m.CAFile)
	}
	u.RawQuery = q.Encode()
	cfg, err := pgxpool.ParseConfig(u.String())
	if err != nil {
		return nil, fmt.Errorf("open minter %s: its url can't be read by the PostgreSQL driver", m.Name)
	}
	if m.Password != "" {
		cfg.ConnConfig.Password = m.Password
	}
	if cfg.ConnConfig.ConnectTimeout == 0 {
		cfg.ConnConfig.ConnectTimeout = connectTimeout
	}
	cfg.ConnConfig.RuntimeParams["application_name"] = "writ"
	return cfg, nil
}

// Close ends the connections to the target.
func (m *Postgres) Close() {
	m.minting.Close()
	m.ending.Close()
}

// greet looks whether a new connection has led to a server that Writ can work with.
func (m *Postgres) greet(ctx context.Context, c *pgx.Conn) error {
	var (
		number  int
		version string
		standby bool
		now     time.Time
	)
	err := c.QueryRow(ctx, `SELECT current_setting('server_version_num')::int, current_setting('server_version'), pg_is_in_recovery(), clock_timestamp()`).
		Scan(&number, &version, &standby, &now)
	if err != nil {
		return targetError(err)
	}
	m.clock.Store(&sample{now, time.Now()})
	if err := supported(number, version); err != nil {
		return err
	}
	if standby {
		return errors.New("the target is a standby, expected its primary")
	}
	var functions int
	if err := c.QueryRow(ctx, `SELECT `+m.fn("version")+`()`).Scan(&functions); err != nil {
		return fmt.Errorf("the target does not offer Writ's functions to this account (%w); run what `writ postgres bootstrap` prints", targetError(err))
	}
	if functions < PostgresVersion {
		return fmt.Errorf("the target has version %d of Writ's functions, expected %d; run what `writ postgres bootstrap` prints", functions, PostgresVersion)
	}
	return nil
}

func supported(number int, version string) error {
	if number < oldestPostgres {
		return fmt.Errorf("PostgreSQL %s is too old, expected 16 or later: before, whoever makes roles is nearly superuser, and a session could outlive its role by SET ROLE", version)
	}
	return nil
}

// fn is the SQL name of one of Writ's functions.
func (m *Postgres) fn(name string) string { return pgx.Identifier{m.Schema, name}.Sanitize() }

// Plan implements lease.Minter. The scope that policy wants has the members groups and,
// where tenants are used, tenant.
func (m *Postgres) Plan(w lease.Want) (lease.Grant, *lease.Refusal) {
	g := lease.Grant{
		Minter: m.Name, Kind: PostgresKind, TTL: min(w.TTL, m.MaxTTL), Outside: true, Renewable: true,
		Revocability: lease.RevocableInstant, Precision: lease.PrecisionCoarse,
	}
	refuse := func(code, format string, args ...any) (lease.Grant, *lease.Refusal) {
		return g, &lease.Refusal{Code: code, Message: fmt.Sprintf(format, args...)}
	}
	s, ok := roleScopeOf(w.Scope)
	if !ok {
		return refuse("credential_scope", `Policy must give a postgres credential the scope {"groups": ["…"], "tenant": "…"}, where tenants are used, and nothing else`)
	}
	for _, group := range s.groups {
		if !slices.Contains(m.Groups, group) {
			return refuse("credential_scope", "Policy wants the group %q, which minter %s does not grant", group, m.Name)
		}
	}
	g.Scope = map[string]any{"groups": s.groups}
	switch {
	case s.tenant == "" && m.Tenants == TenantsRequired:
		return refuse("credential_scope", "Policy names no tenant, which minter %s requires", m.Name)
	case s.tenant != "" && m.Tenants == TenantsNone:
		return refuse("credential_scope", "Policy names a tenant, but minter %s has none", m.Name)
	case s.tenant != "":
		g.Scope["tenant"] = s.tenant
	}
	switch {
	case g.TTL < time.Second:
		return refuse("credential_ttl", "Policy wants a credential that lives less than a second")
	case !lease.MeetsLeast(g.Revocability, w.Revocability):
		return refuse("credential_revocability", "Policy demands revocability %q; minter %s offers %q", w.Revocability, m.Name, g.Revocability)
	case !lease.MeetsLeast(g.Precision, w.Precision):
		return refuse("credential_precision", "Policy demands precision %q; minter %s offers %q", w.Precision, m.Name, g.Precision)
	}
	return g, nil
}

type roleScope struct {
	groups []string
	tenant string
}

const maxGroups = 16 // of one credential; the target checks that too

// roleScopeOf reads a scope, as policy wrote it or back from the store.
func roleScopeOf(scope map[string]any) (s roleScope, ok bool) {
	for name, v := range scope {
		switch name {
		case "groups":
			switch list := v.(type) {
			case []string:
				s.groups = slices.Clone(list)
			case []any:
				for _, v := range list {
					g, _ := v.(string)
					s.groups = append(s.groups, g)
				}
			}
		case "tenant":
			if s.tenant, ok = v.(string); !ok || s.tenant == "" || len(s.tenant) > maxTenant || strings.ContainsRune(s.tenant, 0) {
				return s, false
			}
		default:
			return s, false
		}
	}
	slices.Sort(s.groups)
	whole := len(s.groups) > 0 && len(s.groups) <= maxGroups
	return s, whole && !slices.Contains(s.groups, "") && len(slices.Compact(slices.Clone(s.groups))) == len(s.groups)
}

// rolePrefix is what the names of lease roles have in front of the lease's id. Nothing
// else may be named like that: Writ disarms what it does not know.
const rolePrefix = "writ_"

func roleOf(leaseID string) string { return rolePrefix + leaseID }

// Mint implements lease.Minter. It may be called again for the same lease, as long as
// that lives, and makes a new password then.
//
// A mint must not succeed after its lease has been given up. Two things see to that.
// Unmake leaves a tombstone under the role's name, in a row that both have to write, so
// that one waits for the other: whatever holds up a mint, be it a lock, the network or
// a pooler, it is refused once the lease has been unmade. And the target refuses a mint
// by its own clock after the deadline, at the end of the work, when all waiting is over.
// That deadline is the time that is left here, added to what the target's clock last
// said: it does not matter how far that clock and ours differ.
func (m *Postgres) Mint(ctx context.Context, o lease.Order) (lease.Made, error) {
	s, ok := roleScopeOf(o.Lease.Scope)
	if !ok {
		return lease.Made{}, errors.New("mint role: the lease has no groups")
	}
	if _, set := ctx.Deadline(); !set {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, defaultMintTimeout)
		defer cancel()
	}
	password := newPassword()
	verifier, err := scramVerifier(password)
	if err != nil {
		return lease.Made{}, fmt.Errorf("mint role: %w", err)
	}
	role := roleOf(o.Lease.ID)
	if err := m.mint(ctx, role, verifier, s, o.Lease.ExpiresAt.Sub(o.Lease.CreatedAt)); err != nil {
		return lease.Made{}, fmt.Errorf("mint role: %w", err)
	}
	return lease.Made{Secret: m.secret(role, password)}, nil
}

// What Writ's functions raise.
const (
	codeEnded = "WR002" // the lease has been disarmed
	codeLate  = "WR003" // past the deadline
)

func (m *Postgres) mint(ctx context.Context, role, verifier string, s roleScope, ttl time.Duration) error {
	c, err := m.minting.Acquire(ctx)
	if err != nil {
		return targetError(err)
	}
	defer c.Release()
	until, _ := ctx.Deadline()
	for retried := false; ; retried = true {
		var now time.Time
		var tenant *string
		if s.tenant != "" {
			tenant = &s.tenant
		}
		err := c.QueryRow(ctx, `SELECT `+m.fn("mint")+`($1, $2, $3, $4, $5, $6)`,
			role, verifier, s.groups, tenant, ttl, m.clock.Load().at(until)).Scan(&now)
		if err == nil {
			m.clock.Store(&sample{now, time.Now()})
			return nil
		}
		if pg, is := errors.AsType[*pgconn.PgError](err); !is || pg.Code != codeLate || retried || time.Until(until) < time.Second {
			return targetError(err)
		}
		// There is time left, so the target's clock was set since we saw it.
		if err := c.QueryRow(ctx, `SELECT clock_timestamp()`).Scan(&now); err != nil {
			return targetError(err)
		}
		m.clock.Store(&sample{now, time.Now()})
	}
}

// sample is what the target's clock said at some time of ours, which was later than
// the target looked at it: what follows from it is rather early than late.
type sample struct{ target, ours time.Time }

// at is what the target's clock says at a time of ours.
func (s *sample) at(ours time.Time) time.Time { return s.target.Add(ours.Sub(s.ours)) }

// secret is what an agent needs to connect.
func (m *Postgres) secret(role, password string) lease.Secret {
	host, port := m.AgentHost, m.AgentPort
	if host == "" {
		host = m.at.Host
	}
	if port == 0 {
		port = int(m.at.Port)
	}
	u := url.URL{
		Scheme: "postgres", User: url.UserPassword(role, password), Host: net.JoinHostPort(host, strconv.Itoa(port)),
		Path: "/" + m.at.Database, RawQuery: "sslmode=" + m.sslmode,
	}
	out := lease.Secret{
		"username": role, "password": password, "host": host, "port": strconv.Itoa(port), "database": m.at.Database,
		"sslmode": m.sslmode, "dsn": u.String(),
	}
	if m.ca != "" {
		out["ca"] = m.ca
	}
	return out
}

// newPassword has 192 bits, in characters that need no escaping anywhere.
func newPassword() string {
	b := make([]byte, 24)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	return base64.RawURLEncoding.EncodeToString(b)
}

// targetError leaves of an error what the target says in its message: its other parts
// quote statements, and with them verifiers.
func targetError(err error) error {
	if pg, is := errors.AsType[*pgconn.PgError](err); is {
		return &sqlError{pg.Code, pg.Message}
	}
	return err
}

// sqlError is an error of the target's.
type sqlError struct{ code, message string }

func (e *sqlError) Error() string {
	return fmt.Sprintf("the target says: %s (SQLSTATE %s)", e.message, e.code)
}
