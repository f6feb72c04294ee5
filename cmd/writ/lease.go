package main

import (
	"context"
	"fmt"
	"io"
	"os/user"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/alecthomas/kong"

	"github.com/writsec/writ/internal/config"
	"github.com/writsec/writ/internal/evidence"
	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/revocation"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/telemetry"
)

// leaseCmd works on the store itself, so that neither a policy nor a Writ that is down
// stands in its way.
type leaseCmd struct {
	List   leaseListCmd   `cmd:"" help:"List leases, newest first."`
	Show   leaseShowCmd   `cmd:"" help:"Show a lease."`
	Revoke leaseRevokeCmd `cmd:"" help:"The kill switch: revoke a lease, or all of a session, user, agent, minter or policy revision, or all there is."`
	Lift   leaseLiftCmd   `cmd:"" help:"End a freeze. What was revoked stays so."`

	Abandon leaseAbandonCmd `cmd:"" help:"Give up on a lease whose end can't be seen any more, such as one of a target that is no more."`
}

// principal is one on the command line, ISSUER#SUBJECT.
type principal struct{ identity.Ref }

// UnmarshalText is called by kong.
func (p *principal) UnmarshalText(text []byte) (err error) {
	p.Ref, err = evidence.ParseRef(string(text))
	return err
}

type leaseListCmd struct {
	logStore
	Session    string    `placeholder:"ID" help:"Of a session."`
	Decision   string    `placeholder:"ID" help:"Of a decision."`
	Revocation string    `placeholder:"ID" help:"That a revocation ended."`
	Minter     string    `placeholder:"NAME" help:"Of a minter."`
	User       principal `placeholder:"ISSUER#SUBJECT" help:"Of a user."`
	Agent      principal `placeholder:"ISSUER#SUBJECT" help:"Of an agent."`
	State      string    `enum:"intent,active,revoking,revoked," default:"" help:"In a state: ${enum}"`
	Stuck      bool      `help:"Whose end should have been seen at their target by now."`
	Limit      int       `default:"50" help:"How many at most."`
	Before     string    `placeholder:"ID" help:"Older than this lease: the page after it."`
	JSON       bool      `help:"One JSON object a line."`
}

// Validate is called by kong.
func (c *leaseListCmd) Validate() error {
	if c.Limit < 1 || c.Limit > 10_000 {
		return fmt.Errorf("--limit: expected 1 to 10000")
	}
	return nil
}

func (c *leaseListCmd) Run(ctx context.Context, k *kong.Context) error {
	return c.with(ctx, func(store *sqlstore.Store, cfg config.Config) error {
		q := lease.Query{
			Session: c.Session, Decision: c.Decision, Revocation: c.Revocation, Minter: c.Minter,
			User: c.User.Ref, Agent: agentOf(cfg, c.Agent.Ref), State: lease.State(c.State), Stuck: c.Stuck, Before: c.Before, Limit: c.Limit,
		}
		return store.View(ctx, func(tx *sqlstore.Tx) error {
			list, err := tx.Leases(ctx, q)
			if err != nil {
				return err
			}
			if c.JSON {
				for _, l := range list {
					if err := printJSON(k, leaseLine(l, tx.Now())); err != nil {
						return err
					}
				}
				return nil
			}
			return listLeases(k.Stdout, list, tx.Now())
		})
	})
}

func listLeases(out io.Writer, list []lease.Lease, now time.Time) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "LEASE\tSTATE\tMINTER\tUSER\tAGENT\tEXPIRES\tENDED\tGONE\tWHY")
	for _, l := range list {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", l.ID, stateOf(l, now), dash(l.Minter), l.User.ID, l.Agent.ID,
			moment(l.ExpiresAt), moment(l.EndedAt), moment(l.GoneAt), dash(l.EndReason))
	}
	return w.Flush()
}

// stateOf is the state as people should read it.
func stateOf(l lease.Lease, now time.Time) string {
	switch {
	case !l.StuckSince(now).IsZero():
		return "stuck"
	case l.Halted:
		return "halted"
	}
	return string(l.State)
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func moment(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.UTC().Format(time.RFC3339)
}

// leaseText is a lease for machines.
type leaseText struct {
	Lease      string         `json:"lease"`
	State      lease.State    `json:"state"`
	Halted     bool           `json:"halted,omitempty"`
	Session    string         `json:"session"`
	Decision   string         `json:"decision_id"`
	User       identity.Ref   `json:"user"`
	Agent      identity.Ref   `json:"agent"`
	Minter     string         `json:"minter"`
	Kind       string         `json:"kind"`
	Scope      map[string]any `json:"scope"`
	Policy     string         `json:"policy_revision"`
	CreatedAt  time.Time      `json:"created_at"`
	ExpiresAt  time.Time      `json:"expires_at"`
	EndedAt    time.Time      `json:"ended_at,omitzero"`
	EndReason  string         `json:"end_reason,omitempty"`
	Revocation string         `json:"revocation,omitempty"`
	GoneAt     time.Time      `json:"gone_at,omitzero"`
	StuckSince time.Time      `json:"stuck_since,omitzero"`
	Attempts   int            `json:"attempts"`
	LastError  string         `json:"last_error,omitempty"`
}

func leaseLine(l lease.Lease, now time.Time) leaseText {
	return leaseText{
		Lease: l.ID, State: l.State, Halted: l.Halted, Session: l.Session, Decision: l.Decision, User: l.User, Agent: l.Agent,
		Minter: l.Minter, Kind: l.Kind, Scope: l.Scope, Policy: l.Policy, CreatedAt: l.CreatedAt, ExpiresAt: l.ExpiresAt,
		EndedAt: l.EndedAt, EndReason: l.EndReason, Revocation: l.Revocation, GoneAt: l.GoneAt, StuckSince: l.StuckSince(now),
		Attempts: l.Attempts, LastError: l.LastError,
	}
}

type leaseShowCmd struct {
	logStore
	ID   string `arg:"" help:"Of the lease."`
	JSON bool   `help:"As a JSON object."`
}

func (c *leaseShowCmd) Run(ctx context.Context, k *kong.Context) error {
	return c.with(ctx, func(store *sqlstore.Store, _ config.Config) error {
		return store.View(ctx, func(tx *sqlstore.Tx) error {
			l, err := tx.Lease(ctx, c.ID)
			if err != nil {
				return err
			}
			if c.JSON {
				return printJSON(k, leaseLine(l, tx.Now()))
			}
			scope, err := evidence.JSON(l.Scope)
			if err != nil {
				return err
			}
			w := tabwriter.NewWriter(k.Stdout, 0, 0, 2, ' ', 0)
			for _, row := range [][2]string{
				{"lease", l.ID}, {"state", stateOf(l, tx.Now())}, {"minter", dash(l.Minter)}, {"kind", l.Kind}, {"scope", string(scope)},
				{"user", l.User.String()}, {"agent", l.Agent.String()}, {"session", l.Session}, {"decision", l.Decision}, {"policy", dash(l.Policy)},
				{"created", moment(l.CreatedAt)}, {"expires", moment(l.ExpiresAt)}, {"ended", moment(l.EndedAt)}, {"why", dash(l.EndReason)},
				{"revocation", dash(l.Revocation)}, {"gone", moment(l.GoneAt)}, {"stuck since", moment(l.StuckSince(tx.Now()))},
				{"attempts", fmt.Sprint(l.Attempts)}, {"last error", dash(l.LastError)},
			} {
				fmt.Fprintf(w, "%s\t%s\n", row[0], row[1])
			}
			return w.Flush()
		})
	})
}

type leaseRevokeCmd struct {
	logStore
	ID      string    `arg:"" optional:"" xor:"scope" help:"Of a lease."`
	Session string    `xor:"scope" placeholder:"ID" help:"A session, with all in it."`
	User    principal `xor:"scope" placeholder:"ISSUER#SUBJECT" help:"All of a user's sessions."`
	Agent   principal `xor:"scope" placeholder:"ISSUER#SUBJECT" help:"All of an agent's sessions."`
	Minter  string    `xor:"scope" placeholder:"NAME" help:"All that a minter made."`
	Policy  string    `xor:"scope" placeholder:"REVISION" help:"All that a policy revision allowed."`
	All     bool      `xor:"scope" help:"Everything."`
	Freeze  *bool     `negatable:"" help:"Allow nothing new in this scope until it is lifted. Minters and policies are frozen unless --no-freeze is given."`
	Reason  string    `help:"For the record."`
	JSON    bool      `help:"Print a JSON object."`

	scope revocation.Scope
}

// maxReason is that of POST /revocations.
const maxReason = 500

// Validate is called by kong.
func (c *leaseRevokeCmd) Validate() error {
	found := 0
	set := func(there bool, s revocation.Scope) {
		if there {
			found, c.scope = found+1, s
		}
	}
	set(c.ID != "", revocation.Scope{Kind: revocation.OfLease, Value: c.ID})
	set(c.Session != "", revocation.Scope{Kind: revocation.OfSession, Value: c.Session})
	set(!c.User.IsZero(), revocation.Scope{Kind: revocation.OfUser, Issuer: c.User.Issuer, Value: c.User.ID})
	set(!c.Agent.IsZero(), revocation.Scope{Kind: revocation.OfAgent, Issuer: c.Agent.Issuer, Value: c.Agent.ID})
	set(c.Minter != "", revocation.Scope{Kind: revocation.OfMinter, Value: c.Minter})
	set(c.Policy != "", revocation.Scope{Kind: revocation.OfPolicy, Value: c.Policy})
	set(c.All, revocation.Scope{Kind: revocation.OfAll})
	switch {
	case found != 1:
		return fmt.Errorf("expected exactly one of: the id of a lease, --session, --user, --agent, --minter, --policy, --all")
	case c.ID != "" && !id.Valid(id.Lease, c.ID):
		return fmt.Errorf("expected the id of a lease, lea_…")
	case c.Freeze != nil && *c.Freeze && !c.scope.CanFreeze():
		return fmt.Errorf("--freeze: a lease or a session is over for good, and can't be held back as well")
	case len([]rune(c.Reason)) > maxReason:
		return fmt.Errorf("--reason: is longer than %d characters", maxReason)
	}
	return nil
}

func (c *leaseRevokeCmd) Run(ctx context.Context, k *kong.Context) error {
	return c.with(ctx, func(store *sqlstore.Store, cfg config.Config) error {
		scope := c.scope
		freeze := scope.Kind == revocation.OfMinter || scope.Kind == revocation.OfPolicy // as over HTTP
		if c.Freeze != nil {
			freeze = *c.Freeze
		}
		if err := c.known(ctx, store, cfg); err != nil && freeze {
			return err
		}
		if scope.Kind == revocation.OfAgent {
			agent := agentOf(cfg, c.Agent.Ref)
			scope.Issuer, scope.Value = agent.Issuer, agent.ID
		}
		p, err := revoker(store).Revoke(ctx, revocation.Order{
			Operator: localOperator(), Scope: scope, Freeze: freeze, Reason: strings.ToValidUTF8(c.Reason, "?"),
		})
		if err != nil {
			return err
		}
		return printRevocation(k, p, c.JSON)
	})
}

// known refuses the name of a minter that neither the configuration nor a lease has: its
// freeze would look like a success.
func (c *leaseRevokeCmd) known(ctx context.Context, store *sqlstore.Store, cfg config.Config) error {
	if _, configured := cfg.Minters[c.Minter]; c.Minter == "" || configured {
		return nil
	}
	return store.View(ctx, func(tx *sqlstore.Tx) error {
		made, err := tx.Leases(ctx, lease.Query{Minter: c.Minter, Limit: 1})
		if err == nil && len(made) == 0 {
			err = fmt.Errorf("--minter: neither the configuration nor a lease has %q; --no-freeze revokes without a look at the name", c.Minter)
		}
		return err
	})
}

type leaseAbandonCmd struct {
	logStore
	ID     string `arg:"" help:"Of the lease."`
	Reason string `required:"" help:"How it is known that the credential is gone. For the record."`
}

func (c *leaseAbandonCmd) Run(ctx context.Context, k *kong.Context) error {
	return c.with(ctx, func(store *sqlstore.Store, _ config.Config) error {
		if err := revoker(store).Abandon(ctx, localOperator(), c.ID, strings.ToValidUTF8(c.Reason, "?")); err != nil {
			return err
		}
		_, err := fmt.Fprintf(k.Stdout, "%s is taken for gone. If its credential still exists at the target, nobody ends it now.\n", c.ID)
		return err
	})
}

type leaseLiftCmd struct {
	logStore
	ID   string `arg:"" help:"Of the revocation, rev_…"`
	JSON bool   `help:"Print a JSON object."`
}

func (c *leaseLiftCmd) Run(ctx context.Context, k *kong.Context) error {
	return c.with(ctx, func(store *sqlstore.Store, _ config.Config) error {
		r := revoker(store)
		if err := r.Lift(ctx, localOperator(), c.ID); err != nil {
			return err
		}
		p, err := r.Progress(ctx, c.ID)
		if err != nil {
			return err
		}
		return printRevocation(k, p, c.JSON)
	})
}

func revoker(store *sqlstore.Store) *revocation.Revoker {
	return &revocation.Revoker{Store: sqlstore.For[revocation.Tx](store), Metrics: telemetry.NewMetrics()}
}

// localOperator is whoever can read the store's keys; no issuer says who that is.
func localOperator() identity.Ref {
	name := "unknown"
	if u, err := user.Current(); err == nil && u.Username != "" {
		name = u.Username
	}
	return identity.Ref{Issuer: "local", ID: name}
}

// agentOf is the agent that an identity is one of, as the configuration groups them.
func agentOf(cfg config.Config, r identity.Ref) identity.Ref {
	for _, a := range cfg.Agents {
		for _, one := range a.Identities {
			if (identity.Ref{Issuer: one.Issuer, ID: one.ID}) == r {
				return identity.Ref{Issuer: a.Issuer, ID: a.ID}
			}
		}
	}
	return r
}

// revocationText is a revocation for machines.
type revocationText struct {
	ID       string          `json:"id"`
	At       time.Time       `json:"at"`
	Kind     revocation.Kind `json:"scope"`
	Value    string          `json:"value,omitempty"`
	Issuer   string          `json:"issuer,omitempty"`
	Frozen   bool            `json:"frozen"`
	Sessions int             `json:"sessions"`
	Leases   int             `json:"leases"`
	Gone     int             `json:"gone"`
	EndedAt  time.Time       `json:"ended_at,omitzero"`
	GoneAt   time.Time       `json:"gone_at,omitzero"`
	LiftedAt time.Time       `json:"lifted_at,omitzero"`
}

func printRevocation(k *kong.Context, p revocation.Progress, asJSON bool) error {
	if asJSON {
		return printJSON(k, revocationText{
			p.ID, p.At, p.Scope.Kind, p.Scope.Value, p.Scope.Issuer, p.Frozen, p.Sessions, p.Leases, p.Gone, p.EndedAt, p.GoneAt, p.LiftedAt,
		})
	}
	out := &strings.Builder{}
	if !p.LiftedAt.IsZero() {
		fmt.Fprintf(out, "%s was lifted at %s.\n", p.ID, moment(p.LiftedAt))
		_, err := io.WriteString(k.Stdout, out.String())
		return err
	}
	fmt.Fprintf(out, "%s: in force since %s.\n", p.ID, moment(p.At))
	fmt.Fprintf(out, "Ended %d sessions and %d leases, of which %d were seen to be gone.\n", p.Sessions, p.Leases, p.Gone)
	if p.EndedAt.IsZero() {
		fmt.Fprintln(out, "There is more to end: a running Writ carries on. Nothing in the scope is granted or confirmed any more.")
	}
	if n := p.Leases - p.Gone; n > 0 {
		fmt.Fprintf(out, "Not gone yet: %d. They go on working until a running Writ has unmade them at their targets, or they expire: writ lease list --revocation %s\n", n, p.ID)
	}
	if p.Sessions == 0 && p.Leases == 0 && p.Scope.Kind != revocation.OfAll {
		fmt.Fprintln(out, "Nothing was found in this scope: is its name right?")
	}
	if p.Frozen {
		fmt.Fprintf(out, "Nothing new is allowed in this scope until: writ lease lift %s\n", p.ID)
	}
	_, err := io.WriteString(k.Stdout, out.String())
	return err
}
