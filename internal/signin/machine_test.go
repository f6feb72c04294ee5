package signin_test

import (
	"errors"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/session"
	"github.com/writsec/writ/internal/signin"
)

// What a sign-in may become, whatever the browsers, the agent and the clock do, in any
// order: a small model beside the real flow, store and all.
func TestStateMachine(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	w := newWorld(t)
	f.visit(t, w, false) // makes the fake the provider
	rapid.Check(t, func(rt *rapid.T) {
		m := &machine{w: w, rt: rt, ticket: w.open(signin.Ask{}), state: signin.Opened}
		m.deadline = time.Now().Add(w.late + 10*time.Minute)
		rt.Repeat(map[string]func(*rapid.T){
			"start": m.start, "callback": m.callback, "accept": func(*rapid.T) { m.answer(true) }, "decline": func(*rapid.T) { m.answer(false) },
			"complete": m.complete, "wrong code": m.wrongCode, "wait": m.wait, "": m.check,
		})
		w.late += 20 * time.Minute // what is left open must not use up the agent's places
	})
}

type machine struct {
	w        *world
	rt       *rapid.T
	ticket   signin.Ticket
	state    signin.State
	deadline time.Time
	visits   []*visit // the last one holds the sign-in
	answered bool     // its provider's answer has been used
	wrong    int
	session  string
}

func (m *machine) over() bool {
	return m.state == signin.Declined || m.state == signin.Completed || m.wrong >= 5 || !time.Now().Add(m.w.late).Before(m.deadline)
}

// expect holds the outcome of a step to what the model says.
func (m *machine) expect(what string, err error, ok bool) bool {
	if (err == nil) != ok {
		m.rt.Fatalf("%s in %s (over %t): %v", what, m.state, m.over(), err)
	}
	if err != nil && (fault.CodeOf(err) == fault.Internal || fault.Is(err, fault.Unavailable)) {
		m.rt.Fatalf("%s: %v", what, err)
	}
	return ok
}

func (m *machine) start(*rapid.T) {
	_, cookie, to, err := m.w.Start(m.w.t.Context(), token(m.ticket), "")
	if m.expect("start", err, !m.over() && m.state != signin.Consented) {
		v := &visit{w: m.w, ticket: m.ticket, cookie: cookie, to: to}
		v.answer = fakeAnswer(m.w.t, to)
		m.visits, m.state, m.answered = append(m.visits, v), signin.Started, false
	}
}

// any picks one of the browsers that have started.
func (m *machine) any() (v *visit, last bool) {
	if len(m.visits) == 0 {
		m.rt.Skip("nobody has started")
	}
	i := rapid.IntRange(0, len(m.visits)-1).Draw(m.rt, "browser")
	return m.visits[i], i == len(m.visits)-1
}

func (m *machine) callback(*rapid.T) {
	v, last := m.any()
	if m.expect("callback", v.back(), last && !m.answered && !m.over()) {
		m.state = signin.SignedIn
	}
	if last && !m.over() {
		m.answered = true
	}
}

func (m *machine) answer(accept bool) {
	v, last := m.any()
	if !m.expect("answer", v.say(accept), last && m.state == signin.SignedIn && !m.over()) {
		return
	}
	if m.state = signin.Declined; accept {
		m.state, m.deadline = signin.Consented, time.Now().Add(m.w.late+5*time.Minute)
	}
}

func (m *machine) complete(*rapid.T) {
	code := "no code"
	if len(m.visits) > 0 {
		if c, err := m.visits[len(m.visits)-1].look(); err == nil && c.Code != "" {
			code = c.Code
		}
	}
	good := m.state == signin.Consented && !m.over()
	s, err := m.w.complete(m.ticket.ID, code)
	if m.expect("complete", err, good) {
		m.state, m.session = signin.Completed, s.ID
		if s.Task.Source != session.SourceUser || s.User.ID != "alice" {
			m.rt.Fatalf("session %+v", s)
		}
	}
}

func (m *machine) wrongCode(*rapid.T) {
	counts := m.state == signin.Consented && !m.over()
	_, err := m.w.complete(m.ticket.ID, "WRONG-WRONG")
	m.expect("wrong code", err, false)
	if counts {
		m.wrong++
	}
}

func (m *machine) wait(*rapid.T) {
	m.w.late += time.Duration(rapid.IntRange(1, 7).Draw(m.rt, "minutes")) * time.Minute
}

func (m *machine) check(*rapid.T) {
	s := m.w.stored(m.ticket.ID)
	if s.State != m.state || s.WrongCodes != m.wrong || s.Session != m.session {
		m.rt.Fatalf("stored %s, %d wrong codes, session %q; want %s, %d, %q", s.State, s.WrongCodes, s.Session, m.state, m.wrong, m.session)
	}
	if known := s.State == signin.SignedIn || s.State == signin.Consented || s.State == signin.Declined || s.State == signin.Completed; known != !s.User.IsZero() {
		m.rt.Fatalf("%s as %q", s.State, s.User)
	}
	if len(m.visits) == 0 {
		return
	}
	v, last := m.any()
	if c, err := v.look(); !last && err == nil { // only the last browser sees anything
		m.rt.Fatalf("an earlier browser sees %+v", c)
	} else if err == nil && c.Code != "" && m.state != signin.Consented {
		m.rt.Fatalf("a code in %s", m.state)
	}
}

// Two agents' requests at once: one session comes of it.
func TestCompleteRace(t *testing.T) {
	t.Parallel()
	w, f := newWorld(t), newFake(t)
	v := f.visit(t, w, false)
	if err := errors.Join(v.back(), v.say(true)); err != nil {
		t.Fatal(err)
	}
	c, err := v.look()
	if err != nil {
		t.Fatal(err)
	}
	const n = 8
	done := make(chan error, n)
	for range n {
		go func() {
			_, err := w.complete(v.ticket.ID, c.Code)
			done <- err
		}()
	}
	won := 0
	for range n {
		if err := <-done; err == nil {
			won++
		} else if !fault.Is(err, fault.NotFound) {
			t.Error(err)
		}
	}
	opened := 0
	for _, e := range w.entries() {
		if e.Kind == audit.SessionOpened {
			opened++
		}
	}
	if won != 1 || opened != 1 {
		t.Errorf("%d completed, %d sessions", won, opened)
	}
}
