package sqlstore

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/writsec/writ/internal/decision"
	"github.com/writsec/writ/internal/id"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/policy"
	"github.com/writsec/writ/internal/session"
)

var (
	other  = identity.Ref{Issuer: "https://other.example", ID: "alice"} // another alice
	hostis = identity.Ref{Issuer: alice.Issuer, ID: `bob' OR '1'='1`}
)

// sessions puts one of each kind there and returns their ids, oldest first.
func (f *fixture) sessions() (ids []string) {
	f.t.Helper()
	for i, x := range []struct {
		user, agent identity.Ref
		ends        time.Time
	}{
		{alice, bot, noon.Add(time.Hour)},
		{alice, bot, noon}, // its time is over
		{other, bot, noon.Add(time.Hour)},
		{alice, other, noon.Add(time.Hour)}, // ended, below
		{hostis, bot, noon.Add(time.Hour)},
	} {
		s := session.Session{
			ID: id.New(id.Session), Version: 1, User: identity.Principal{Ref: x.user}, Agent: x.agent, StartedAt: noon, EndsAt: x.ends,
			Labels: []string{"l"}, Counters: map[string]int64{"paid": 1 << 60},
		}
		f.in(func(tx *Tx) error {
			if err := tx.InsertSession(f.ctx, s); err != nil || i != 3 {
				return err
			}
			s.EndedAt, s.EndReason = noon, "over"
			return tx.UpdateSession(f.ctx, s, true)
		})
		ids = append(ids, s.ID)
	}
	return ids
}

// places says where some ids stand among all.
func places(all, some []string) (out []int) {
	for _, s := range some {
		out = append(out, slices.Index(all, s))
	}
	return out
}

func TestSearchSessions(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		all := f.sessions()
		search := func(q session.Query) (ids []string) {
			t.Helper()
			for _, s := range must(f, func(tx *Tx) ([]session.Session, error) { return tx.Sessions(f.ctx, q) }) {
				ids = append(ids, s.ID)
			}
			return ids
		}
		for _, x := range []struct {
			name string
			q    session.Query
			want []int
		}{
			{"all, newest first", session.Query{}, []int{4, 3, 2, 1, 0}},
			{"a user", session.Query{User: alice}, []int{3, 1, 0}},
			{"of that issuer only", session.Query{User: other}, []int{2}},
			{"an agent", session.Query{Agent: other}, []int{3}},
			{"both", session.Query{User: alice, Agent: bot}, []int{1, 0}},
			{"active", session.Query{State: session.Active}, []int{4, 2, 0}},
			{"ended", session.Query{State: session.Ended}, []int{3, 1}},
			{"a user's active", session.Query{User: alice, State: session.Active}, []int{0}},
			{"a user's ended", session.Query{User: alice, State: session.Ended}, []int{3, 1}},
			{"nobody", session.Query{User: identity.Ref{Issuer: alice.Issuer, ID: "nobody"}}, nil},
			{"quotes are letters", session.Query{User: hostis}, []int{4}},
			{"wildcards are letters", session.Query{User: identity.Ref{Issuer: "%", ID: "%"}}, nil},
			{"before", session.Query{Before: all[2]}, []int{1, 0}},
			{"a user's before", session.Query{User: alice, Before: all[3]}, []int{1, 0}},
			{"before the first", session.Query{Before: all[0]}, nil},
			{"before one that is not there", session.Query{Before: "ses_" + strings.Repeat("v", 26)}, []int{4, 3, 2, 1, 0}},
			{"a page", session.Query{Limit: 2}, []int{4, 3}},
		} {
			if x.q.Limit == 0 {
				x.q.Limit = 100
			}
			if got := places(all, search(x.q)); !slices.Equal(got, x.want) {
				t.Errorf("%s: %v, want %v", x.name, got, x.want)
			}
		}

		// Pages have each row once, whatever comes meanwhile.
		var paged []string
		q := session.Query{Limit: 2}
		for {
			page := search(q)
			paged = append(paged, page...)
			if len(page) < q.Limit {
				break
			}
			q.Before = page[len(page)-1]
			f.session()
		}
		if got := places(all, paged); !slices.Equal(got, []int{4, 3, 2, 1, 0}) {
			t.Errorf("pages: %v", got)
		}
		s := must(f, func(tx *Tx) ([]session.Session, error) {
			return tx.Sessions(f.ctx, session.Query{User: other, Limit: 1})
		})[0]
		s.Scope = session.ScopeOf(s.User.Ref, s.Agent) // which a search does not make up for sessions without
		same(t, must(f, func(tx *Tx) (session.Session, error) { return tx.Session(f.ctx, all[2]) }), s)
	})
}

func (f *fixture) decision(s session.Session, effect policy.Effect, user identity.Ref) string {
	f.t.Helper()
	r := decision.Record{ID: id.New(id.Decision), At: noon, Session: s.ID, User: user, Agent: bot, IntentHash: "h"}
	r.Answer = decision.Answer{
		DecisionID: r.ID, Decision: effect, Session: s.ID, Reasons: []policy.Reason{{Code: "c", Message: "m"}},
		Obligations: []map[string]any{}, Advice: map[string]any{"a": "b", "decision": "allow", "z": 1}, // no decision
	}
	f.in(func(tx *Tx) error { return tx.InsertDecision(f.ctx, r) })
	return r.ID
}

func TestSearchDecisions(t *testing.T) {
	each(t, func(t *testing.T, f *fixture) {
		s1, s2 := f.session(), f.session()
		all := []string{
			f.decision(s1, policy.Allow, alice), f.decision(s1, policy.Deny, alice), f.decision(s2, policy.RequireCIBA, alice),
			f.decision(s2, policy.Deny, other),
		}
		search := func(q decision.Query) (ids []string) {
			t.Helper()
			for _, d := range must(f, func(tx *Tx) ([]decision.Record, error) { return tx.Decisions(f.ctx, q) }) {
				ids = append(ids, d.ID)
			}
			return ids
		}
		for _, x := range []struct {
			name string
			q    decision.Query
			want []int
		}{
			{"all, newest first", decision.Query{}, []int{3, 2, 1, 0}},
			{"a session", decision.Query{Session: s1.ID}, []int{1, 0}},
			{"a user", decision.Query{User: alice}, []int{2, 1, 0}},
			{"of that issuer only", decision.Query{User: other}, []int{3}},
			{"an agent", decision.Query{Agent: bot}, []int{3, 2, 1, 0}},
			{"another agent", decision.Query{Agent: other}, nil},
			{"allow", decision.Query{Effect: policy.Allow}, []int{0}},
			{"deny", decision.Query{Effect: policy.Deny}, []int{3, 1}},
			{"require_ciba", decision.Query{Effect: policy.RequireCIBA}, []int{2}},
			{"a session's deny", decision.Query{Session: s1.ID, Effect: policy.Deny}, []int{1}},
			{"a user's deny", decision.Query{User: alice, Effect: policy.Deny, Agent: bot}, []int{1}},
			{"before", decision.Query{Before: all[2]}, []int{1, 0}},
			{"a page", decision.Query{Limit: 1, Before: all[3]}, []int{2}},
		} {
			if x.q.Limit == 0 {
				x.q.Limit = 100
			}
			if got := places(all, search(x.q)); !slices.Equal(got, x.want) {
				t.Errorf("%s: %v, want %v", x.name, got, x.want)
			}
		}
		d := must(f, func(tx *Tx) ([]decision.Record, error) {
			return tx.Decisions(f.ctx, decision.Query{User: other, Limit: 1})
		})[0]
		same(t, must(f, func(tx *Tx) (decision.Record, error) { return tx.Decision(f.ctx, all[3]) }), d)
	})
}

// A search of one user is no walk through all.
func TestSearchesHaveIndexes(t *testing.T) {
	f := newSQLite(t)
	for query, index := range map[string]string{
		`SELECT id FROM sessions WHERE user_subject = 'a' AND user_issuer = 'b' ORDER BY id DESC LIMIT 1`:                "sessions_of_user",
		`SELECT id FROM sessions WHERE agent_subject = 'a' AND agent_issuer = 'b' AND id < 'x' ORDER BY id DESC LIMIT 1`: "sessions_of_agent",
		`SELECT id, answer FROM decisions WHERE session = 'a' AND id < 'x' ORDER BY id DESC LIMIT 1`:                     "decisions_of_session",
		`SELECT id, answer FROM decisions WHERE user_subject = 'a' AND user_issuer = 'b' ORDER BY id DESC LIMIT 1`:       "decisions_of_user",
		`SELECT id, answer FROM decisions WHERE agent_subject = 'a' AND agent_issuer = 'b' ORDER BY id DESC LIMIT 1`:     "decisions_of_agent",
		`SELECT id, answer FROM decisions WHERE effect = 'deny' AND id < 'x' ORDER BY id DESC LIMIT 1`:                   "decisions_effect",
	} {
		var plan []string
		err := f.View(f.ctx, func(tx *Tx) (err error) {
			plan, err = some(f.ctx, tx, "explain", func(r scanner) (detail string, err error) {
				var n int
				return detail, r.Scan(&n, &n, &n, &detail)
			}, `EXPLAIN QUERY PLAN `+query)
			return err
		})
		if text := fmt.Sprint(plan); err != nil || !strings.Contains(text, index) || strings.Contains(text, "TEMP B-TREE") {
			t.Errorf("%s\n%s %v, want %s", query, text, err, index)
		}
	}
}
