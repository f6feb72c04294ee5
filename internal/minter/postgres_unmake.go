package minter

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/lease"
)

const (
	endingTimeout  = 30 * time.Second // of one call, whatever becomes of the network
	unmakePatience = 5 * time.Second  // for sessions to end and locks to go
	settlePatience = time.Second      // for connections that were being made during disarm
	purgeEvery     = 10 * time.Second
	purgeLimit     = 20_000
	maxSeen        = 16 // connections that are told of
)

// ending is one role on its way out.
type ending struct {
	role     string
	disarmed time.Time // zero: not yet
	// starting are the connections that were being made when the role was found
	// disarmed: one of them may have got in just before.
	starting map[int32]bool
	busy     bool // had sessions at the last look
	gone     bool // seen to be gone
	resists  bool // no use to try again now
	problem  string
	seen     map[string]lease.Connection
}

// Unmake implements lease.Target. Roles are made unable to log in, which is committed;
// then their sessions are ended, until none is seen; then they are dropped, and looked
// for once more. Each step is one statement for all of them. It is patient for a few
// seconds with those that resist.
func (m *Postgres) Unmake(ctx context.Context, leases []lease.Lease) ([]lease.Unmade, error) {
	ctx, cancel := context.WithTimeout(ctx, endingTimeout)
	defer cancel()
	out, err := m.unmake(ctx, leases)
	if refusal, is := errors.AsType[*sqlError](err); is && len(leases) > 1 && refusal.ofStatement() {
		// One of them may be what the statement fails for.
		out = nil
		for _, l := range leases {
			one, err := m.unmake(ctx, []lease.Lease{l})
			if err != nil {
				one = []lease.Unmade{{Err: err, Seen: map[string]any{"role": roleOf(l.ID)}}}
			}
			out = append(out, one...)
		}
		return out, nil
	}
	if err == nil {
		m.purge(ctx)
	}
	return out, err
}

// ofStatement tells what a statement did wrong from a target that can't be used:
// connection errors, no resources, and an operator's intervention such as a shutdown
// (but a statement's timeout).
func (e *sqlError) ofStatement() bool {
	class := e.code[:min(2, len(e.code))]
	return e.code == "57014" || !slices.Contains([]string{"08", "28", "53", "57", "58"}, class)
}

func (m *Postgres) unmake(ctx context.Context, leases []lease.Lease) ([]lease.Unmade, error) {
	all := make([]*ending, len(leases))
	byRole := make(map[string]*ending, len(leases))
	for i, l := range leases {
		role := roleOf(l.ID)
		if byRole[role] == nil {
			byRole[role] = &ending{role: role, seen: map[string]lease.Connection{}}
		}
		all[i] = byRole[role]
	}
	c, err := m.ending.Acquire(ctx)
	if err != nil {
		return nil, targetError(err)
	}
	defer c.Release()
	pause, deadline := 5*time.Millisecond, time.Now().Add(unmakePatience)
	for {
		if err := m.round(ctx, c.Conn(), byRole); err != nil {
			return nil, err
		}
		if len(left(byRole, isLeft)) == 0 || time.Now().After(deadline) {
			break
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(pause):
		}
		pause = min(2*pause, 200*time.Millisecond)
	}
	out := make([]lease.Unmade, len(all))
	for i, e := range all {
		out[i] = e.unmade()
	}
	return out, nil
}

// round takes each role as far as it can be taken now.
func (m *Postgres) round(ctx context.Context, c *pgx.Conn, roles map[string]*ending) error {
	if todo := left(roles, func(e *ending) bool { return isLeft(e) && e.disarmed.IsZero() }); len(todo) > 0 {
		// First, so that what is open now is in the record: disarm ends it too.
		if err := m.kill(ctx, c, roles); err != nil {
			return err
		}
		err := m.ask(ctx, c, "disarm", todo, func(role, problem string) {
			if e := roles[role]; problem != "" {
				e.problem, e.resists = problem, lasting(problem)
			} else {
				e.disarmed = time.Now()
			}
		})
		if err != nil {
			return err
		}
	}
	if err := m.kill(ctx, c, roles); err != nil {
		return err
	}
	quiet := left(roles, func(e *ending) bool {
		settled := len(e.starting) == 0 || time.Since(e.disarmed) > settlePatience
		return isLeft(e) && !e.disarmed.IsZero() && !e.busy && settled
	})
	if len(quiet) == 0 {
		return nil
	}
	var dropped []string
	err := m.ask(ctx, c, "reap", quiet, func(role, problem string) {
		e := roles[role]
		switch e.problem, e.resists = problem, lasting(problem); {
		case problem == "":
			dropped = append(dropped, role)
		case strings.HasPrefix(problem, "can log in"):
			e.disarmed, e.starting = time.Time{}, nil // once more
		}
	})
	if err != nil || len(dropped) == 0 {
		return err
	}
	for _, role := range dropped {
		roles[role].gone = true
	}
	return m.ask(ctx, c, "remains", dropped, func(role, problem string) { roles[role].gone, roles[role].problem = false, problem })
}

// kill ends sessions, and takes down what it saw.
func (m *Postgres) kill(ctx context.Context, c *pgx.Conn, roles map[string]*ending) error {
	todo := left(roles, isLeft)
	rows, err := c.Query(ctx, `SELECT coalesce(role, ''), pid, since, address FROM `+m.fn("kill")+`($1)`, todo)
	if err != nil {
		return targetError(err)
	}
	for _, role := range todo {
		roles[role].busy = false
	}
	var (
		role, from string
		pid        int32
		since      *time.Time
	)
	starting := map[int32]bool{}
	_, err = pgx.ForEachRow(rows, []any{&role, &pid, &since, &from}, func() error {
		if role == "" {
			starting[pid] = true
			return nil
		}
		e := roles[role]
		e.busy, e.problem = true, "has sessions that do not end"
		conn := connection(pid, since, from)
		e.seen[conn.ID] = conn
		return nil
	})
	if err != nil {
		return targetError(err)
	}
	for _, role := range todo {
		switch e := roles[role]; {
		case e.disarmed.IsZero():
		case e.starting == nil:
			e.starting = maps.Clone(starting)
		default:
			maps.DeleteFunc(e.starting, func(pid int32, _ bool) bool { return !starting[pid] })
		}
	}
	return nil
}

func connection(pid int32, since *time.Time, from string) lease.Connection {
	c := lease.Connection{From: from}
	if since != nil {
		c.Since = since.UTC()
	}
	c.ID = fmt.Sprintf("%d/%d", pid, c.Since.UnixMicro())
	return c
}

// ask calls a function that answers with a problem, or none, for roles.
func (m *Postgres) ask(ctx context.Context, c *pgx.Conn, function string, roles []string, answer func(role, problem string)) error {
	rows, err := c.Query(ctx, `SELECT role, coalesce(problem, '') FROM `+m.fn(function)+`($1)`, roles)
	if err != nil {
		return targetError(err)
	}
	var role, problem string
	if _, err = pgx.ForEachRow(rows, []any{&role, &problem}, func() error { answer(role, problem); return nil }); err != nil {
		return targetError(err)
	}
	return nil
}

func isLeft(e *ending) bool { return !e.gone && !e.resists }

// lasting reports whether a problem is one that does not go by itself, as locks and
// changes at the same time do: objects that depend on the role (2BP01), or a role that
// is not ours (42501).
func lasting(problem string) bool {
	return strings.HasSuffix(problem, "(2BP01)") || strings.HasSuffix(problem, "(42501)")
}

// left lists the roles that match.
func left(roles map[string]*ending, match func(*ending) bool) []string {
	var out []string
	for role, e := range roles {
		if match(e) {
			out = append(out, role)
		}
	}
	return out
}

func (e *ending) unmade() lease.Unmade {
	seen := map[string]any{"role": e.role, "sessions": len(e.seen)}
	var connections []map[string]any
	for _, c := range e.seen {
		if len(connections) < maxSeen {
			connections = append(connections, map[string]any{"id": c.ID, "since": c.Since, "from": c.From})
		}
	}
	if connections != nil {
		seen["connections"] = connections
	}
	u := lease.Unmade{Seen: seen}
	switch {
	case e.gone:
	case e.problem == "":
		u.Err = fmt.Errorf("role %s: connections were being made for too long", e.role)
	default:
		u.Err = fmt.Errorf("role %s %s", e.role, e.problem)
	}
	return u
}

// purge forgets old tombstones from time to time. What it leaves, a later one takes.
func (m *Postgres) purge(ctx context.Context) {
	now, last := time.Now().Unix(), m.purged.Load()
	if now-last < int64(purgeEvery/time.Second) || !m.purged.CompareAndSwap(last, now) {
		return
	}
	_, _ = m.ending.Exec(ctx, `SELECT `+m.fn("purge")+`($1)`, purgeLimit)
}

// Survey implements lease.Surveyor.
func (m *Postgres) Survey(ctx context.Context) ([]lease.Sighting, error) {
	ctx, cancel := context.WithTimeout(ctx, endingTimeout)
	defer cancel()
	rows, err := m.ending.Query(ctx, `SELECT role, armed, coalesce(pid, 0), since, address FROM `+m.fn("survey")+`()`)
	if err != nil {
		return nil, targetError(err)
	}
	var (
		out        []lease.Sighting
		role, from string
		armed      bool
		pid        int32
		since      *time.Time
	)
	_, err = pgx.ForEachRow(rows, []any{&role, &armed, &pid, &since, &from}, func() error {
		if n := len(out); n == 0 || out[n-1].Name != role {
			out = append(out, lease.Sighting{Name: role, Lease: strings.TrimPrefix(role, rolePrefix), Armed: armed})
		}
		if s := &out[len(out)-1]; pid != 0 {
			s.Uses = append(s.Uses, connection(pid, since, from))
		}
		return nil
	})
	if err != nil {
		return nil, targetError(err)
	}
	return out, nil
}

// Disarm implements lease.Surveyor: the roles can't log in any more, and their sessions
// end. They stay, for people to look at.
func (m *Postgres) Disarm(ctx context.Context, names []string) error {
	roles := map[string]*ending{}
	for _, name := range names {
		if !id.Valid(id.Lease, strings.TrimPrefix(name, rolePrefix)) || !strings.HasPrefix(name, rolePrefix) {
			return fmt.Errorf("disarm: %q is not named after a lease", name)
		}
		roles[name] = &ending{role: name, seen: map[string]lease.Connection{}}
	}
	ctx, cancel := context.WithTimeout(ctx, endingTimeout)
	defer cancel()
	c, err := m.ending.Acquire(ctx)
	if err != nil {
		return targetError(err)
	}
	defer c.Release()
	var problems []error
	err = m.ask(ctx, c.Conn(), "disarm", names, func(role, problem string) {
		if problem != "" {
			problems = append(problems, fmt.Errorf("disarm: role %s %s", role, problem))
		}
	})
	if err == nil {
		err = m.kill(ctx, c.Conn(), roles)
	}
	return errors.Join(append(problems, err)...)
}
