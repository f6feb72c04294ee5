package signin_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/writsec/writ/internal/audit"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/session"
	"github.com/writsec/writ/internal/signin"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/storetest"
	"github.com/writsec/writ/test/idp"
)

// provider is the real one of all tests, where alice signs in.
var provider *idp.IdP

func TestMain(m *testing.M) {
	var err error
	if provider, err = idp.New(context.Background(), idp.Config{DefaultUser: "alice"}); err != nil {
		fmt.Fprintln(os.Stderr, "start the OpenID provider:", err)
		os.Exit(1)
	}
	code := storetest.Both(m)
	provider.Close()
	os.Exit(code)
}

const external = "http://127.0.0.1:8180"

type world struct {
	*signin.Flow
	t     *testing.T
	store *sqlstore.Store
	late  time.Duration // how far its clock has been moved
	agent identity.Caller
	idp   *idp.IdP
}

// newWorld has the shared provider, or one that the test may disturb.
func newWorld(t *testing.T, own ...*idp.IdP) *world {
	t.Helper()
	w := &world{t: t, idp: provider}
	for _, p := range own {
		w.idp = p
	}
	w.agent = caller(w.idp.Issuer, "sales-agent")
	var err error
	w.store, err = sqlstore.Open(t.Context(), sqlstore.Config{
		URL: storetest.URL(t, migrate), Now: func() time.Time { return time.Now().Add(w.late) }, Relaxed: true, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.store.Close() })
	client := identity.NewHTTPClient(5 * time.Second)
	t.Cleanup(client.CloseIdleConnections)
	v, err := identity.New(identity.Config{
		Issuers: []identity.Issuer{{URL: w.idp.Issuer, User: true, Algorithms: []string{"RS256"}, Leeway: time.Minute}},
		HTTP:    client, Now: time.Now, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	w.Flow = &signin.Flow{
		Store: sqlstore.For[signin.Tx](w.store), Sessions: session.Settings{DefaultAge: time.Hour, MaxAge: 8 * time.Hour},
		Providers: []*signin.Provider{{
			Issuer: w.idp.Issuer, ClientID: idp.Writ, ClientSecret: w.idp.Clients[idp.Writ], Scopes: []string{"openid"}, HTTP: client, Verifier: v,
		}},
		Redirects:   map[identity.Ref][]string{w.agent.Agent.Ref: {"https://crm.example/done", "https://crm.example/q?a=b"}},
		ExternalURL: external,
	}
	return w
}

func migrate(ctx context.Context, url string) error {
	s, err := sqlstore.Open(ctx, sqlstore.Config{URL: url, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	return s.Close()
}

func caller(issuer, id string) identity.Caller {
	return identity.Caller{Agent: identity.Principal{Ref: identity.Ref{Issuer: issuer, ID: id}}}
}

var spec = session.Spec{
	Task: "Summarise the pipeline", Age: 30 * time.Minute,
	Envelope: &session.Envelope{Actions: []string{"crm.*"}, Resources: []session.ResourcePattern{{Type: "crm", ID: "*"}}},
}

// visit is one browser's way through a sign-in.
type visit struct {
	w      *world
	ticket signin.Ticket
	cookie string
	to     string
	answer url.Values // of the provider
}

func (w *world) open(ask signin.Ask) signin.Ticket {
	w.t.Helper()
	if ask.Spec.Task == "" {
		ask.Spec = spec
	}
	ask.From = "192.0.2.7"
	ticket, err := w.Open(w.t.Context(), w.agent, ask)
	if err != nil {
		w.t.Fatal(err)
	}
	return ticket
}

func token(ticket signin.Ticket) string { return strings.TrimPrefix(ticket.URL, external+"/signin/") }

func (w *world) start(ticket signin.Ticket) *visit {
	w.t.Helper()
	v := &visit{w: w, ticket: ticket}
	_, cookie, to, err := w.Start(w.t.Context(), token(ticket), "")
	if err != nil {
		w.t.Fatal(err)
	}
	v.cookie, v.to = cookie, to
	return v
}

// authorize goes to the provider and comes back with its answer.
func (v *visit) authorize() *visit {
	v.w.t.Helper()
	answer, err := authorize(v.w.t.Context(), v.to)
	if err != nil {
		v.w.t.Fatal(err)
	}
	v.answer = answer
	return v
}

func authorize(ctx context.Context, next string) (url.Values, error) {
	jar, err := cookiejar.New(nil)
	if err != nil {
		return nil, err
	}
	browser := &http.Client{Jar: jar, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	for range 10 {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, next, http.NoBody)
		if err != nil {
			return nil, err
		}
		res, err := browser.Do(req)
		if err != nil {
			return nil, err
		}
		res.Body.Close()
		location, err := res.Location()
		if err != nil {
			return nil, fmt.Errorf("%s: %s", next, res.Status)
		}
		if strings.HasPrefix(location.String(), external+"/callback?") {
			return location.Query(), nil
		}
		next = location.String()
	}
	return nil, errors.New("too many redirects")
}

// back brings the provider's answer to Writ.
func (v *visit) back() error {
	got, err := v.w.Callback(v.w.t.Context(), v.answer, func(id string) string {
		if id == v.ticket.ID {
			return v.cookie
		}
		return ""
	})
	if err == nil && got != v.ticket.ID {
		v.w.t.Errorf("came back for %s, want %s", got, v.ticket.ID)
	}
	return err
}

func (v *visit) look() (signin.Consent, error) {
	return v.w.Consent(v.w.t.Context(), v.ticket.ID, v.cookie)
}

func (v *visit) say(accept bool) error {
	c, err := v.look()
	if err != nil {
		return err
	}
	return v.w.Answer(v.w.t.Context(), v.ticket.ID, v.cookie, c.Form, "198.51.100.1", accept)
}

// consented goes all the way to the consent, and returns it.
func (v *visit) consented() signin.Consent {
	v.w.t.Helper()
	v.authorize()
	if err := errors.Join(v.back(), v.say(true)); err != nil {
		v.w.t.Fatal(err)
	}
	c, err := v.look()
	if err != nil {
		v.w.t.Fatal(err)
	}
	return c
}

func (w *world) complete(id, code string) (session.Session, error) {
	return w.Complete(w.t.Context(), w.agent, id, code)
}

// want fails unless err carries the code.
func want(t *testing.T, err error, code fault.Code, text string) {
	t.Helper()
	if !fault.Is(err, code) || !strings.Contains(err.Error(), text) {
		t.Errorf("got %v, want %s with %q", err, code, text)
	}
}

func (w *world) stored(id string) (s signin.SignIn) {
	w.t.Helper()
	err := w.store.View(w.t.Context(), func(tx *sqlstore.Tx) (err error) {
		s, err = tx.SignIn(w.t.Context(), id)
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

// entries are those that are not sequenced yet: nothing sequences here.
func (w *world) entries() (out []audit.Entry) {
	w.t.Helper()
	err := w.store.View(w.t.Context(), func(tx *sqlstore.Tx) (err error) {
		out, err = tx.Unsequenced(w.t.Context(), 1000)
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return out
}

func TestJourney(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ticket := w.open(signin.Ask{})
	if n := len(token(ticket)); n != 22 || strings.Contains(ticket.URL, ticket.ID) { // 128 bits
		t.Errorf("link %s", ticket.URL)
	}
	_, err := w.complete(ticket.ID, "AAAAA-AAAAA")
	want(t, err, fault.LoginRequired, "not opened")

	v := w.start(ticket)
	_, err = w.complete(ticket.ID, "AAAAA-AAAAA")
	want(t, err, fault.LoginRequired, "at the identity provider")
	_, err = v.look()
	want(t, err, fault.Forbidden, "This browser")

	v.authorize()
	if err := v.back(); err != nil {
		t.Fatal(err)
	}
	_, err = w.complete(ticket.ID, "AAAAA-AAAAA")
	want(t, err, fault.LoginRequired, "not consented")
	c, err := v.look()
	if err != nil || c.State != signin.SignedIn || c.User.Ref != (identity.Ref{Issuer: w.idp.Issuer, ID: "alice"}) || c.Code != "" || c.Return != "" || c.Age != 30*time.Minute {
		t.Fatalf("%+v %v", c, err)
	}
	if _, there := c.User.Claims["nonce"]; there || !cmp.Equal(c.User.Claims["groups"], []any{"sales"}) {
		t.Errorf("claims %v", c.User.Claims)
	}
	if c.Agent != w.agent.Agent.Ref || c.From != "192.0.2.7" || c.Spec.Task != spec.Task || !cmp.Equal(c.Spec.Envelope, spec.Envelope) {
		t.Errorf("shown %+v", c.SignIn)
	}
	if err := v.say(true); err != nil {
		t.Fatal(err)
	}
	if c, err = v.look(); err != nil || len(c.Code) != 11 {
		t.Fatalf("%+v %v", c, err)
	}
	// The way through hands.
	s, err := w.complete(ticket.ID, " "+strings.ToLower(strings.ReplaceAll(strings.ReplaceAll(c.Code, "0", "o"), "1", "l"))+" ")
	if err != nil {
		t.Fatal(err)
	}
	if s.User.Ref != c.User.Ref || s.Agent != w.agent.Agent.Ref || s.Task.Source != session.SourceUser || s.Envelope.Source != session.SourceUser ||
		s.Task.Text != spec.Task || s.EndsAt.Sub(s.StartedAt) != 30*time.Minute {
		t.Errorf("session %+v", s)
	}
	got, alive, err := (&session.Manager{Store: sqlstore.For[session.Tx](w.store)}).Get(t.Context(), w.agent, s.ID)
	if err != nil || !alive || !cmp.Equal(got.User.Claims["groups"], []any{"sales"}) {
		t.Errorf("stored %+v %v", got, err)
	}
	if c, err := v.look(); err != nil || c.State != signin.Completed || c.Code != "" || c.Return != "" {
		t.Errorf("afterwards %+v %v", c, err)
	}

	var kinds []string
	for _, e := range w.entries() {
		kinds = append(kinds, string(e.Kind))
		text := fmt.Sprint(e)
		for _, secret := range []string{token(ticket), v.cookie, c.Code, v.answer.Get("code"), v.answer.Get("state")} {
			if secret != "" && strings.Contains(text, secret) {
				t.Errorf("%s holds a secret: %s", e.Kind, text)
			}
		}
	}
	if d := cmp.Diff([]string{"signin.opened", "signin.signed_in", "signin.consented", "session.opened", "signin.completed"}, kinds); d != "" {
		t.Error(d)
	}
	last := w.entries()[4]
	if last.Session != s.ID || last.User != s.User.Ref || last.Agent != s.Agent || last.Detail["sign_in"] != ticket.ID {
		t.Errorf("%+v", last)
	}
}

// The store alone is worth nothing: whoever reads it can neither start, nor consent,
// nor complete.
func TestStoreHoldsNoSecrets(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	v := w.start(w.open(signin.Ask{}))
	q, err := url.Parse(v.to)
	if err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf("%+v", w.stored(v.ticket.ID))
	for _, secret := range []string{token(v.ticket), v.cookie, q.Query().Get("state"), q.Query().Get("nonce")} {
		if secret == "" || strings.Contains(text, secret) {
			t.Errorf("%q stands in %s", secret, text)
		}
	}
	if q.Query().Get("code_challenge_method") != "S256" || q.Query().Get("redirect_uri") != external+"/callback" || q.Query().Get("scope") != "openid" {
		t.Errorf("asks %v", q.Query())
	}
	c := v.consented()
	if text := fmt.Sprintf("%+v", w.stored(v.ticket.ID)); strings.Contains(text, c.Code) || strings.Contains(text, strings.ReplaceAll(c.Code, "-", "")) {
		t.Errorf("the code stands in %s", text)
	}
}

func TestNothingChangesByLooking(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ticket := w.open(signin.Ask{})
	before := w.stored(ticket.ID)
	for range 3 {
		if s, err := w.Show(t.Context(), token(ticket)); err != nil || s.ID != ticket.ID {
			t.Fatal(s, err)
		}
	}
	v := w.start(ticket).authorize()
	if err := v.back(); err != nil {
		t.Fatal(err)
	}
	after := w.stored(ticket.ID)
	for range 3 {
		if _, err := v.look(); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Show(t.Context(), token(ticket)); err != nil {
			t.Fatal(err)
		}
	}
	if before.State != signin.Opened || before.Version != 1 || w.stored(ticket.ID).Version != after.Version {
		t.Error("a look has changed something")
	}
}

func TestCallback(t *testing.T) {
	t.Parallel()
	own := idp.Start(t, idp.Config{DefaultUser: "alice"})
	for name, tt := range map[string]struct {
		spoil func(w *world, v *visit)
		code  fault.Code
		text  string
		asked int // calls of the token endpoint
	}{
		"another browser": {func(_ *world, v *visit) { v.cookie = "" }, fault.Forbidden, "This browser", 0},
		"another browser with a cookie of its own": {func(w *world, v *visit) { v.cookie = w.start(w.open(signin.Ask{})).cookie },
			fault.Forbidden, "This browser", 0},
		"no state":                {func(_ *world, v *visit) { v.answer.Del("state") }, fault.NotFound, "", 0},
		"an invented state":       {func(_ *world, v *visit) { v.answer.Set("state", strings.Repeat("a", 43)) }, fault.NotFound, "", 0},
		"mix-up":                  {func(_ *world, v *visit) { v.answer.Set("iss", "https://evil.example") }, fault.Forbidden, "another provider", 0},
		"an empty iss":            {func(_ *world, v *visit) { v.answer.Set("iss", "") }, fault.Forbidden, "another provider", 0},
		"iss but for a slash":     {func(w *world, v *visit) { v.answer.Set("iss", w.idp.Issuer+"/") }, fault.Forbidden, "another provider", 0},
		"no iss, though promised": {func(_ *world, v *visit) { v.answer.Del("iss") }, fault.Forbidden, "iss is missing", 0},
		"two codes":               {func(_ *world, v *visit) { v.answer.Add("code", "x") }, fault.InvalidRequest, "malformed", 0},
		"two states":              {func(_ *world, v *visit) { v.answer.Add("state", "x") }, fault.InvalidRequest, "malformed", 0},
		"a very long code":        {func(_ *world, v *visit) { v.answer.Set("code", strings.Repeat("x", 4097)) }, fault.InvalidRequest, "malformed", 0},
		"neither code nor error":  {func(_ *world, v *visit) { v.answer.Del("code") }, fault.Forbidden, "neither", 0},
		"cancelled": {func(_ *world, v *visit) {
			v.answer.Del("code")
			v.answer.Set("error", "access_denied")
			v.answer.Set("error_description", "<script>alert(1)</script>")
		}, fault.Forbidden, "You did not sign in", 0},
		"an error with a code": {func(_ *world, v *visit) { v.answer.Set("error", "a\"\nb") }, fault.Forbidden, "answered malformed", 0},
		"an invented code":     {func(_ *world, v *visit) { v.answer.Set("code", "invented") }, fault.Forbidden, "invalid_grant", 1},
		// PKCE: a code that was stolen elsewhere is good for nothing here.
		"a code of another sign-in": {func(w *world, v *visit) {
			v.answer.Set("code", w.start(w.open(signin.Ask{})).authorize().answer.Get("code"))
		}, fault.Forbidden, "invalid_grant", 1},
		"another nonce": {func(_ *world, v *visit) {
			q, err := url.Parse(v.to)
			if err != nil {
				v.w.t.Fatal(err)
			}
			values := q.Query()
			values.Set("nonce", "of-another-request")
			q.RawQuery = values.Encode()
			v.to = q.String()
			v.authorize()
		}, fault.Forbidden, "nonce differs", 1},
		"no ID token": {func(w *world, _ *visit) { w.spoil(map[string]any{"id_token": nil}) }, fault.Forbidden, "the ID token", 1},
		"an access token in its place": {func(w *world, _ *visit) {
			raw, err := w.idp.AgentToken(w.t.Context(), idp.SalesAgent)
			if err != nil {
				w.t.Fatal(err)
			}
			w.spoil(map[string]any{"id_token": raw})
		}, fault.Forbidden, "not an ID token", 2},
		"an ID token of another client": {func(w *world, _ *visit) {
			_, raw, err := w.idp.UserToken(w.t.Context(), "bob", idp.SalesAgent)
			if err != nil {
				w.t.Fatal(err)
			}
			w.spoil(map[string]any{"id_token": raw})
		}, fault.Forbidden, "of a client that Writ does not know", 2},
		"the token endpoint down": {func(w *world, _ *visit) {
			w.fault(idp.Fault{Endpoint: idp.TokenEndpoint, Kind: idp.FaultStatus})
		}, fault.Unavailable, "503", 1},
		"the token endpoint redirects": {func(w *world, _ *visit) {
			w.fault(idp.Fault{Endpoint: idp.TokenEndpoint, Kind: idp.FaultRedirect})
		}, fault.Forbidden, "307", 1},
		"the token endpoint speaks HTML": {func(w *world, _ *visit) {
			w.fault(idp.Fault{Endpoint: idp.TokenEndpoint, Kind: idp.FaultHTML})
		}, fault.Unavailable, "no token response", 1},
		"the time is over": {func(w *world, _ *visit) { w.late = 10 * time.Minute }, fault.SessionEnded, "over", 0},
		"started again":    {func(w *world, v *visit) { w.start(v.ticket) }, fault.NotFound, "", 0},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, own)
			before := w.tokenCalls()
			v := w.start(w.open(signin.Ask{})).authorize()
			good := v.cookie
			tt.spoil(w, v)
			want(t, v.back(), tt.code, tt.text)
			if n := w.tokenCalls() - before; n != tt.asked {
				t.Errorf("the token endpoint was called %d times, want %d", n, tt.asked)
			}
			trapped, err := w.idp.Trapped(t.Context())
			if err != nil || len(trapped) > 0 {
				t.Errorf("followed a redirect with its secret: %v %v", trapped, err)
			}
			if s := w.stored(v.ticket.ID); s.State != signin.Started || !s.User.IsZero() {
				t.Errorf("and yet %s as %s", s.State, s.User)
			}
			w.late, v.cookie = 0, good
			_, err = v.look()
			want(t, err, fault.Forbidden, "")
		})
	}
}

func (w *world) tokenCalls() int {
	w.t.Helper()
	hits, err := w.idp.Hits(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	return hits[idp.TokenEndpoint]
}

func (w *world) spoil(set map[string]any) {
	w.t.Helper()
	w.fault(idp.Fault{Endpoint: idp.TokenEndpoint, Kind: idp.FaultPatch, Set: set})
}

func (w *world) fault(f idp.Fault) {
	w.t.Helper()
	if err := w.idp.Fault(w.t.Context(), f); err != nil {
		w.t.Fatal(err)
	}
}

// A provider that does not promise iss may leave it out, but not lie.
func TestIssOfAnOldProvider(t *testing.T) {
	t.Parallel()
	own := idp.Start(t, idp.Config{DefaultUser: "alice"})
	for _, iss := range []string{"", "https://evil.example"} {
		w := newWorld(t, own)
		w.fault(idp.Fault{Endpoint: idp.DiscoveryEndpoint, Kind: idp.FaultPatch, Set: map[string]any{"authorization_response_iss_parameter_supported": nil}})
		v := w.start(w.open(signin.Ask{})).authorize()
		if v.answer.Del("iss"); iss != "" {
			v.answer.Set("iss", iss)
		}
		if err := v.back(); (err == nil) != (iss == "") {
			t.Errorf("iss %q: %v", iss, err)
		}
	}
}

func TestAStateIsGoodOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	v := w.start(w.open(signin.Ask{})).authorize()
	if err := v.back(); err != nil {
		t.Fatal(err)
	}
	want(t, v.back(), fault.NotFound, "")
	if s := w.stored(v.ticket.ID); s.State != signin.SignedIn {
		t.Errorf("the replay has made it %s", s.State)
	}
	// Also after a failure.
	v = w.start(w.open(signin.Ask{})).authorize()
	iss := v.answer.Get("iss")
	v.answer.Set("iss", "https://evil.example")
	want(t, v.back(), fault.Forbidden, "")
	v.answer.Set("iss", iss)
	want(t, v.back(), fault.NotFound, "")
	// But somebody who has seen the address can't burn it for the one who started.
	v = w.start(w.open(signin.Ask{})).authorize()
	thief := *v
	thief.cookie = "stolen-nothing"
	want(t, thief.back(), fault.Forbidden, "This browser")
	if err := v.back(); err != nil {
		t.Errorf("after a stranger's try: %v", err)
	}
}

func TestStartAgain(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ticket := w.open(signin.Ask{})
	first := w.start(ticket).authorize()
	if err := first.back(); err != nil {
		t.Fatal(err)
	}
	second := w.start(ticket)
	_, err := first.look()
	want(t, err, fault.Forbidden, "started again")
	want(t, first.say(true), fault.Forbidden, "started again")
	want(t, w.Answer(t.Context(), ticket.ID, second.cookie, "", "", true), fault.Forbidden, "") // not signed in yet
	c := second.consented()
	if _, err := w.complete(ticket.ID, c.Code); err != nil {
		t.Error(err)
	}
	_, _, _, err = w.Start(t.Context(), token(ticket), "")
	want(t, err, fault.SessionEnded, "")
}

func TestAnswer(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	signedIn := func() *visit {
		v := w.start(w.open(signin.Ask{})).authorize()
		if err := v.back(); err != nil {
			t.Fatal(err)
		}
		return v
	}
	v, other := signedIn(), signedIn()
	o, err := other.look()
	if err != nil {
		t.Fatal(err)
	}
	for name, form := range map[string]string{"none": "", "another's": o.Form, "invented": "x"} {
		if err := w.Answer(t.Context(), v.ticket.ID, v.cookie, form, "", true); !fault.Is(err, fault.Forbidden) {
			t.Errorf("form %s: %v", name, err)
		}
	}
	c, err := v.look()
	if err != nil {
		t.Fatal(err)
	}
	for name, cookie := range map[string]string{"none": "", "another's": other.cookie} {
		if err := w.Answer(t.Context(), v.ticket.ID, cookie, c.Form, "", true); !fault.Is(err, fault.Forbidden) {
			t.Errorf("cookie %s: %v", name, err)
		}
	}
	for _, id := range []string{"", "sin_x", strings.Replace(v.ticket.ID, "sin_", "ses_", 1)} {
		want(t, w.Answer(t.Context(), id, v.cookie, c.Form, "", true), fault.Forbidden, "This browser")
	}
	if s := w.stored(v.ticket.ID); s.State != signin.SignedIn {
		t.Fatalf("it is %s", s.State)
	}
	if err := v.say(true); err != nil {
		t.Fatal(err)
	}
	want(t, w.Answer(t.Context(), v.ticket.ID, v.cookie, c.Form, "", true), fault.SessionEnded, "")
	want(t, w.Answer(t.Context(), v.ticket.ID, v.cookie, c.Form, "", false), fault.SessionEnded, "")
	if s := w.stored(v.ticket.ID); s.State != signin.Consented {
		t.Errorf("a second answer has made it %s", s.State)
	}

	if err := other.say(false); err != nil {
		t.Fatal(err)
	}
	_, err = w.complete(other.ticket.ID, o.Code)
	want(t, err, fault.Forbidden, "declined")
	if c, err := other.look(); err != nil || c.State != signin.Declined || c.Code != "" {
		t.Errorf("declined: %+v %v", c, err)
	}
	want(t, other.say(true), fault.SessionEnded, "")

	late := signedIn()
	w.late = 10 * time.Minute
	want(t, late.say(true), fault.SessionEnded, "")
}

func TestComplete(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	consented := func() (*visit, string) {
		v := w.start(w.open(signin.Ask{}))
		return v, v.consented().Code
	}
	v, code := consented()
	user := w.agent
	user.User = &identity.Principal{Ref: identity.Ref{Issuer: w.idp.Issuer, ID: "bob"}}
	_, err := w.Complete(t.Context(), user, v.ticket.ID, code)
	want(t, err, fault.InvalidRequest, "/sign_in")
	for name, c := range map[string]identity.Caller{
		"another agent": caller(w.idp.Issuer, "hr-agent"), "its namesake at another issuer": caller("https://other.example", "sales-agent"),
	} {
		if _, err := w.Complete(t.Context(), c, v.ticket.ID, code); !fault.Is(err, fault.NotFound) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, id := range []string{"", "sin_x", strings.Replace(v.ticket.ID, "sin_", "ses_", 1), "sin_00000000000000000000000000"} {
		_, err := w.complete(id, code)
		want(t, err, fault.NotFound, "")
	}
	if s := w.stored(v.ticket.ID); s.WrongCodes != 0 {
		t.Errorf("others have used up %d tries", s.WrongCodes)
	}
	if _, err := w.complete(v.ticket.ID, code); err != nil {
		t.Fatal(err)
	}
	_, err = w.complete(v.ticket.ID, code)
	want(t, err, fault.NotFound, "") // once

	// Five wrong codes.
	v, code = consented()
	_, another := consented()
	for i, wrong := range []string{"", another, code + "0", code[:10], "-"} {
		_, err = w.complete(v.ticket.ID, wrong)
		want(t, err, fault.InvalidRequest, fmt.Sprintf("/sign_in/code: is not the code that the user was given; %d tries are left", 4-i))
	}
	for _, c := range []string{"x", code} {
		_, err = w.complete(v.ticket.ID, c)
		want(t, err, fault.NotFound, "")
	}
	_, err = v.look()
	want(t, err, fault.SessionEnded, "")

	// Four are forgiven.
	v, code = consented()
	for range 4 {
		_, _ = w.complete(v.ticket.ID, "x")
	}
	if _, err := w.complete(v.ticket.ID, code); err != nil {
		t.Error(err)
	}

	// A code is good for five minutes.
	v, code = consented()
	w.late += 5*time.Minute + time.Second
	_, err = w.complete(v.ticket.ID, code)
	want(t, err, fault.NotFound, "")
	_, err = v.look()
	want(t, err, fault.SessionEnded, "")

	for _, e := range w.entries() {
		if e.Kind == audit.SessionOpened && e.User.ID != "alice" {
			t.Errorf("a session for %s", e.User)
		}
	}
}

func TestRedirect(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for _, uri := range []string{
		"https://crm.example/done/", "https://crm.example/done?x", "https://crm.example/don", "https://crm.example/done/../done",
		"https://CRM.example/done", "https://crm.example.evil.example/done", "https://crm.example:443/done", "http://crm.example/done",
		"https://crm.example/done#x", " https://crm.example/done", "javascript:alert(1)", "//crm.example/done",
	} {
		_, err := w.Open(t.Context(), w.agent, signin.Ask{Spec: spec, RedirectURI: uri})
		want(t, err, fault.InvalidRequest, "/redirect_uri: is not registered")
	}
	_, err := w.Open(t.Context(), caller(w.idp.Issuer, "hr-agent"), signin.Ask{Spec: spec, RedirectURI: "https://crm.example/done"})
	want(t, err, fault.InvalidRequest, "/redirect_uri: is not registered")
	for _, state := range []string{"a b", "a\nb", "ü", strings.Repeat("x", 513)} {
		_, err := w.Open(t.Context(), w.agent, signin.Ask{Spec: spec, RedirectURI: "https://crm.example/done", State: state})
		want(t, err, fault.InvalidRequest, "/state")
	}
	_, err = w.Open(t.Context(), w.agent, signin.Ask{Spec: spec, State: "x"})
	want(t, err, fault.InvalidRequest, "/state")

	v := w.start(w.open(signin.Ask{RedirectURI: "https://crm.example/q?a=b", State: "s&code=x#"}))
	c := v.consented()
	u, err := url.Parse(c.Return)
	if err != nil || !strings.HasPrefix(c.Return, "https://crm.example/q?a=b&") || c.Code != "" {
		t.Fatalf("%+v %v", c, err)
	}
	q := u.Query()
	if q.Get("iss") != external || q.Get("state") != "s&code=x#" || q.Get("sign_in") != v.ticket.ID || len(q["code"]) != 1 || u.Fragment != "" {
		t.Errorf("returns to %s", c.Return)
	}
	if _, err := w.complete(v.ticket.ID, q.Get("code")); err != nil {
		t.Error(err)
	}

	v = w.start(w.open(signin.Ask{RedirectURI: "https://crm.example/done"})).authorize()
	if err := errors.Join(v.back(), v.say(false)); err != nil {
		t.Fatal(err)
	}
	if c, err := v.look(); err != nil || !strings.HasPrefix(c.Return, "https://crm.example/done?error=access_denied&") {
		t.Errorf("%+v %v", c, err)
	}
}

func TestStartRefuses(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for _, link := range []string{"", "x", strings.Repeat("A", 22)} {
		_, _, _, err := w.Start(t.Context(), link, "")
		want(t, err, fault.NotFound, "")
		_, err = w.Show(t.Context(), link)
		want(t, err, fault.NotFound, "")
	}
	ticket := w.open(signin.Ask{})
	// The id is no secret and opens nothing; nor does a hash from the store.
	for _, link := range []string{ticket.ID, w.stored(ticket.ID).TokenHash} {
		_, _, _, err := w.Start(t.Context(), link, "")
		want(t, err, fault.NotFound, "")
	}
	_, _, _, err := w.Start(t.Context(), token(ticket), "https://evil.example")
	want(t, err, fault.InvalidRequest, "Choose")
	w.Providers = append(w.Providers, &signin.Provider{Issuer: "https://other.example"})
	_, _, _, err = w.Start(t.Context(), token(ticket), "")
	want(t, err, fault.InvalidRequest, "Choose")
	if got := w.Issuers(); !slices.Equal(got, []string{w.idp.Issuer, "https://other.example"}) {
		t.Errorf("issuers %q", got)
	}
	if _, _, _, err = w.Start(t.Context(), token(ticket), w.idp.Issuer); err != nil {
		t.Error(err)
	}
	w.late = 10 * time.Minute
	_, _, _, err = w.Start(t.Context(), token(ticket), w.idp.Issuer)
	want(t, err, fault.SessionEnded, "")
	_, err = w.Show(t.Context(), token(ticket))
	want(t, err, fault.SessionEnded, "")
}

func TestProviderDown(t *testing.T) {
	t.Parallel()
	w := newWorld(t, idp.Start(t, idp.Config{DefaultUser: "alice"}))
	ticket := w.open(signin.Ask{})
	w.idp.Stop()
	_, _, _, err := w.Start(t.Context(), token(ticket), "")
	want(t, err, fault.Unavailable, "cannot be reached")
	if s := w.stored(ticket.ID); s.State != signin.Opened {
		t.Errorf("it is %s", s.State)
	}
	if err := w.idp.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.start(ticket).consented()
}

func TestOpenIsBounded(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for range 100 {
		w.open(signin.Ask{})
	}
	_, err := w.Open(t.Context(), w.agent, signin.Ask{Spec: spec})
	want(t, err, fault.Overloaded, "too many open sign-ins")
	if _, err := w.Open(t.Context(), caller(w.idp.Issuer, "hr-agent"), signin.Ask{Spec: spec}); err != nil {
		t.Errorf("another agent: %v", err)
	}
	w.late = 10 * time.Minute
	w.open(signin.Ask{})
	long := spec
	long.Age = 9 * time.Hour
	_, err = w.Open(t.Context(), w.agent, signin.Ask{Spec: long})
	want(t, err, fault.InvalidRequest, "/expires_in")
}
