package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/writsec/writ/client"
	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/dev"
	"github.com/writsec/writ/internal/devidp"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/telemetry"
)

type demoCmd struct {
	Postgres string `env:"WRIT_POSTGRES" placeholder:"URL" help:"PostgreSQL server, of 16 or later, as a superuser, for the scenes with a database; it is left as it was. make demo brings its own."`
	Verbose  bool   `short:"v" help:"Show Writ's own log."`
}

const demoLimit = 2 * time.Minute

func (d *demoCmd) Run(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeout(ctx, demoLimit)
	defer cancel()
	dir, err := os.MkdirTemp("", "writ-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	logs := io.Discard
	if d.Verbose {
		logs = os.Stderr
	}
	const anyPort = "127.0.0.1:0"
	w, err := dev.New(ctx, dev.Config{
		Dir: dir, Listen: anyPort, OpsListen: anyPort, IDPListen: anyPort, Postgres: d.Postgres,
		Logger: telemetry.NewTextLogger(logs, 0),
	})
	if err != nil {
		return err
	}
	running, stop := context.WithCancel(ctx)
	defer stop()
	stopped := make(chan error, 1)
	go func() { stopped <- w.Run(running) }()

	s := &story{ctx: ctx, Dev: w, screen: newScreen(os.Stdout)}
	err = s.play()
	stop()
	err = errors.Join(err, <-stopped)
	if w.Database != nil {
		err = errors.Join(err, w.Database.Drop(context.WithoutCancel(ctx)))
	}
	return err
}

// story is what the demo plays. Each scene says what it expects before it looks;
// the first that comes out otherwise ends the story with an error.
type story struct {
	*dev.Dev
	*screen
	ctx context.Context

	alice, bob *client.Client
	sales, hr  *client.Session
	reading    *client.Decision // what read got
	offboard   client.Request   // what approve asked
	admin      *pgx.Conn        // a superuser at the database; nil: there is none
	role       *role            // what query got
	freeze     string           // the id of the revocation
}

type scene struct {
	name string
	play func() (string, error)
}

func (s *story) play() (err error) {
	s.title("Writ: an agent holds no standing privilege. It asks, and gets a credential for just that action.")
	scenes := []scene{
		{"alice's agent reads an opportunity; the CRM takes its token", s.read},
		{"… and tries to pay someone: outside alice's grants", s.overreach},
		{"bob's agent starts an HR offboarding; bob approves on his phone", s.approve},
		{"… and uses the same approval again", s.reuse},
		{"… and changes a parameter after another approval", s.change},
		{"alice's agent releases its credential", s.release},
		{"bob's session ends, with all it still held", s.endSession},
	}
	if s.Database != nil {
		if s.admin, err = pgx.Connect(s.ctx, s.Database.URL); err != nil {
			return fmt.Errorf("look at the CRM's database: %w", err)
		}
		defer func() { err = errors.Join(err, s.admin.Close(context.WithoutCancel(s.ctx))) }()
		scenes = append(scenes,
			scene{"alice's agent queries the CRM's PostgreSQL: a role of its own, for a minute", s.query},
			scene{"… and tries to write", s.write},
			scene{"… and releases the role, with a connection still open", s.releaseRole},
		)
	}
	scenes = append(scenes,
		scene{"the kill switch: olga, an operator, stops alice", s.kill},
		scene{"… and lets alice on again", s.lift},
	)
	letter := 'a'
	for _, scene := range scenes {
		s.begin(letter, scene.name)
		came, err := scene.play()
		s.outcome(came, err)
		if err != nil {
			return fmt.Errorf("scene (%c): %w", letter, err)
		}
		letter++
	}
	if s.Database == nil {
		s.note("Not played, for want of a PostgreSQL: credentials for databases. `make demo` brings one; or: writ demo --postgres URL")
	}
	return s.record(letter)
}

func (s *story) agent(user, agent string) (*client.Client, error) {
	token, err := s.IDP.AccessToken(user, agent, 0)
	return client.New(s.URL, client.StaticToken(token)), err
}

func (s *story) read() (came string, err error) {
	if s.alice, err = s.agent("alice", "sales-agent"); err != nil {
		return "", err
	}
	s.sales, err = s.alice.OpenSession(s.ctx, client.SessionRequest{
		Task:     "Summarise the pipeline",
		Envelope: &client.Envelope{Actions: []string{"crm.**"}, Resources: []client.ResourcePattern{{Type: "crm.opportunity", ID: "**"}, {Type: "crm.tenant", ID: "acme"}}},
	})
	if err != nil {
		return "", err
	}
	if s.reading, err = s.alice.Decide(s.ctx, readOpportunity(s.sales.ID)); err != nil {
		return "", err
	}
	if err := expect(s.reading, client.Allow, "read_opportunity"); err != nil {
		return "", err
	}
	c := s.reading.Credential
	s.aside(fmt.Sprintf("allow: a %s for scope crm:read, that lives %s", c.Kind, time.Until(c.ExpiresAt).Round(time.Second)))
	if came, err = s.use(c.Secret["token"]); err != nil {
		return "", err
	}
	return came, s.alice.Report(s.ctx, s.reading.ID, "succeeded", "")
}

func readOpportunity(session string) client.Request {
	return client.Request{
		Session: session, Intent: client.Intent{Action: "crm.opportunity.read", Purpose: "Summarise the pipeline"},
		Resource: client.Resource{Type: "crm.opportunity", ID: "opp-42"},
	}
}

// use takes the token to two resource servers.
func (s *story) use(token string) (string, error) {
	offline, err := newOfflineCRM(s.ctx, s.URL, s.Services["crm"].Audience)
	if err != nil {
		return "", err
	}
	defer offline.stop()
	introspecting, err := newIntrospectingCRM(s.URL, s.Services["crm"])
	if err != nil {
		return "", err
	}
	defer introspecting.stop()
	for _, crm := range []*crm{offline, introspecting} {
		if status, err := crm.get(s.ctx, token); err != nil || status != 200 {
			return "", errors.Join(fmt.Errorf("%s answered %d, expected 200", crm.name, status), err)
		}
	}
	return "200 from the CRM that verifies offline and from the one that introspects", nil
}

func (s *story) overreach() (string, error) {
	d, err := s.alice.Decide(s.ctx, client.Request{
		Session:  s.sales.ID,
		Intent:   client.Intent{Action: "payments.transfer.create", Parameters: map[string]any{"amount": 500, "currency": "EUR", "creditor": "ACME"}},
		Resource: client.Resource{Type: "payments.account", ID: "main"},
	})
	if err != nil {
		return "", err
	}
	return "deny: " + d.Reasons[0].Message, expect(d, client.Deny, "not_granted")
}

func (s *story) approve() (came string, err error) {
	if s.bob, err = s.agent("bob", "hr-agent"); err != nil {
		return "", err
	}
	if s.hr, err = s.bob.OpenSession(s.ctx, client.SessionRequest{Task: "Offboard the people on the list"}); err != nil {
		return "", err
	}
	s.offboard = s.offboarding("e-1001", "2026-12-31")
	if s.offboard.Approval, err = s.ask(s.offboard); err != nil {
		return "", err
	}
	d, err := s.bob.Decide(s.ctx, s.offboard)
	if err != nil {
		return "", err
	}
	if err := expect(d, client.Allow, "change_employment"); err != nil {
		return "", err
	}
	if d.Credential.Precision != "exact" {
		return "", fmt.Errorf("the credential is %s, expected exact", d.Credential.Precision)
	}
	return "approved, so allow: a credential for exactly this act", nil
}

func (s *story) offboarding(employee, lastDay string) client.Request {
	return client.Request{
		Session:  s.hr.ID,
		Intent:   client.Intent{Action: "hr.employee.offboard", Parameters: map[string]any{"last_day": lastDay}},
		Resource: client.Resource{Type: "hr.employee", ID: employee},
	}
}

// ask gets bob's approval and returns its id.
func (s *story) ask(r client.Request) (approval string, err error) {
	asked, err := s.bob.Decide(s.ctx, r)
	if err != nil {
		return "", err
	}
	if err := expect(asked, client.RequireCIBA, "confirm_employment_change"); err != nil {
		return "", err
	}
	prompt, err := s.phone("bob")
	if err != nil {
		return "", err
	}
	if !strings.Contains(prompt.Message, asked.Approval.Code) || !strings.Contains(prompt.Message, r.Resource.ID) {
		return "", fmt.Errorf("the phone shows %q, expected %s and the code %s", prompt.Message, r.Resource.ID, asked.Approval.Code)
	}
	s.aside("require_ciba: bob's phone shows " + prompt.Message)
	if err := s.IDP.Answer(prompt.ID, true); err != nil {
		return "", err
	}
	decided, err := s.bob.Approval(s.ctx, asked.Approval.ID, 20*time.Second)
	if err == nil && decided.Status != "approved" {
		err = fmt.Errorf("the approval is %s, expected approved", decided.Status)
	}
	return asked.Approval.ID, err
}

// phone waits for the prompt that a user's phone shows.
func (s *story) phone(user string) (devidp.Prompt, error) {
	for {
		for _, p := range s.IDP.Prompts() {
			if p.User == user && p.Status == devidp.Pending {
				return p, nil
			}
		}
		select {
		case <-s.ctx.Done():
			return devidp.Prompt{}, fmt.Errorf("no prompt reached %s's phone: %w", user, s.ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (s *story) reuse() (string, error) {
	d, err := s.bob.Decide(s.ctx, s.offboard)
	if err != nil {
		return "", err
	}
	return "deny: " + d.Reasons[0].Message, expect(d, client.Deny, "approval_consumed")
}

func (s *story) change() (string, error) {
	approval, err := s.ask(s.offboarding("e-1002", "2026-12-31"))
	if err != nil {
		return "", err
	}
	changed := s.offboarding("e-1002", "2026-11-30")
	changed.Approval = approval
	d, err := s.bob.Decide(s.ctx, changed)
	if err != nil {
		return "", err
	}
	return "deny: " + d.Reasons[0].Message, expect(d, client.Deny, "approval_mismatch")
}

func (s *story) release() (string, error) {
	if _, err := s.alice.Release(s.ctx, s.reading.Credential.Lease); err != nil {
		return "", err
	}
	active, err := introspect(s.ctx, s.URL, s.Services["crm"], s.reading.Credential.Secret["token"])
	if err == nil && active {
		err = errors.New("introspection still calls the token active")
	}
	return "revoked: introspection says inactive", err
}

func (s *story) endSession() (string, error) {
	// Something of bob's must still live, or there would be nothing to revoke.
	before, err := s.activeLeases(s.hr.ID)
	if err != nil {
		return "", err
	}
	if before == 0 {
		return "", errors.New("the session holds no lease")
	}
	if _, err := s.bob.EndSession(s.ctx, s.hr.ID); err != nil {
		return "", err
	}
	after, err := s.activeLeases(s.hr.ID)
	if err == nil && after != 0 {
		err = fmt.Errorf("%d leases outlive their session", after)
	}
	if err != nil {
		return "", err
	}
	_, err = s.bob.Decide(s.ctx, s.offboarding("e-1003", "2026-12-31"))
	if p, ok := errors.AsType[*client.Error](err); !ok || p.Code != "session_ended" {
		return "", fmt.Errorf("a decision in the ended session did not end in session_ended but in: %w", err)
	}
	return fmt.Sprintf("%d lease revoked; no new decisions", before), nil
}

func (s *story) activeLeases(session string) (n int, err error) {
	err = s.Server.Store().View(s.ctx, func(tx *sqlstore.Tx) error {
		leases, err := tx.Leases(s.ctx, lease.Query{Session: session, State: lease.Active, Limit: 100})
		n = len(leases)
		return err
	})
	return n, err
}

// record shows what Writ wrote down of the story, and proves its last entry.
func (s *story) record(letter rune) error {
	var entries []audit.Sequenced
	var head audit.Head
	for {
		var load sqlstore.Load
		var ending []lease.Lease
		err := s.Server.Store().View(s.ctx, func(tx *sqlstore.Tx) (err error) {
			if load, err = tx.Load(s.ctx); err != nil {
				return err
			}
			if ending, err = tx.Leases(s.ctx, lease.Query{State: lease.Revoking, Limit: 1}); err != nil {
				return err
			}
			if head, err = audit.HeadOf(s.ctx, tx); err != nil {
				return err
			}
			entries, err = tx.LogEntries(s.ctx, audit.Query{Limit: 100})
			return err
		})
		if err != nil {
			return err
		}
		if load.Unsequenced == 0 && len(ending) == 0 {
			break
		}
		select { // what ends has ended, and is in the log, within a moment
		case <-s.ctx.Done():
			return s.ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
	if len(entries) < 10 {
		return fmt.Errorf("the audit log has %d entries, expected the whole story", len(entries))
	}
	return s.table(letter, entries, head)
}

func expect(d *client.Decision, effect client.Effect, reason string) error {
	if d.Effect != effect || d.Reasons[0].Code != reason {
		return fmt.Errorf("the decision is %s (%s), expected %s (%s)", d.Effect, d.Reasons[0].Code, effect, reason)
	}
	return nil
}
