package crash

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/writsec/writ/client"
)

// buildSkewed builds a writ whose wall clock is off by skew, as on a machine whose
// clock is wrong: Go programs ask the kernel without the C library, so faketime can't
// do it, and time namespaces only shift the monotonic clocks. What is changed is Go's
// own time.Now; the monotonic clock stays right, as it would.
func buildSkewed(t *testing.T, skew time.Duration) string {
	t.Helper()
	dir := t.TempDir()
	out, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	source := filepath.Join(strings.TrimSpace(string(out)), "src", "time", "time.go")
	text, err := os.ReadFile(source)
	if err != nil {
		t.Fatal(err)
	}
	const now = "func Now() Time {\n\tsec, nsec, mono := runtimeNow()\n"
	if strings.Count(string(text), now) != 1 {
		t.Fatalf("%s has another time.Now than this test knows", source)
	}
	changed := strings.Replace(string(text), now, now+fmt.Sprintf("\tsec += %d\n", int(skew.Seconds())), 1)
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{source: filepath.Join(dir, "time.go")}})
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"time.go": changed, "overlay.json": string(overlay)} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	to := filepath.Join(dir, "writ")
	if err := build(to, "-overlay", filepath.Join(dir, "overlay.json")); err != nil {
		t.Fatal(err)
	}
	return to
}

// A replica whose clock is five minutes ahead, or behind, answers as the others do.
func TestFault11ReplicasWithAWrongClock(t *testing.T) {
	skews := []time.Duration{5 * time.Minute}
	if full() {
		skews = append(skews, -5*time.Minute)
	}
	for _, skew := range skews {
		t.Run(skew.String(), func(t *testing.T) { wrongClock(t, skew) })
	}
}

func wrongClock(t *testing.T, skew time.Duration) {
	skewed := buildSkewed(t, skew)
	s := newSite(t, empty(t), 2)
	right, wrong := s.replicas[0], s.replicas[1]
	wrong.binary = skewed
	s.start()

	var line struct{ Time time.Time }
	if err := json.Unmarshal([]byte(wrong.out.lines("writ is serving")[0]), &line); err != nil {
		t.Fatal(err)
	}
	if off := time.Until(line.Time); (off - skew).Abs() > 10*time.Second {
		t.Fatalf("its clock is %v off, want %v", off, skew)
	}
	near := func(what string, got, want time.Time) {
		t.Helper()
		if d := got.Sub(want).Abs(); d > 2*time.Second {
			t.Errorf("%s is %v, which is %v off", what, got, d)
		}
	}
	ctx := t.Context()
	for _, r := range s.replicas {
		// Tokens of the provider: it believes what holds now, and nothing else.
		now := time.Now()
		for name, tt := range map[string]struct {
			from, to time.Duration
			good     bool
		}{
			"for the next minute":        {0, time.Minute, true},
			"ended a minute ago":         {-10 * time.Minute, -time.Minute, false},
			"begins in two minutes":      {2 * time.Minute, 20 * time.Minute, false},
			"ended ten minutes ago":      {-time.Hour, -10 * time.Minute, false},
			"began an hour ago, goes on": {-time.Hour, time.Hour, true},
		} {
			c := client.New(r.url, client.StaticToken(s.is.tokenAt("user", "agent", now.Add(tt.from), now.Add(tt.to))))
			if _, err := c.OpenSession(ctx, client.SessionRequest{}); (err == nil) != tt.good {
				t.Errorf("%s: a token %s: %v", r.name, name, err)
			}
		}

		// Sessions, decisions and credentials.
		c := r.client(s)
		opened, err := c.OpenSession(ctx, client.SessionRequest{ExpiresIn: 3600})
		if err != nil {
			t.Fatal(err)
		}
		near(r.name+": started_at", opened.StartedAt, time.Now())
		near(r.name+": ends_at", opened.EndsAt, time.Now().Add(time.Hour))
		request := client.Request{
			Session: opened.ID, Intent: client.Intent{Action: "read"}, Resource: client.Resource{Type: "thing", ID: r.name},
			IdempotencyKey: "clock-" + r.name,
		}
		d, err := c.Decide(ctx, request)
		if err != nil || d.Credential == nil {
			t.Fatalf("%s: %+v, %v", r.name, d, err)
		}
		near(r.name+": expires_at", d.Credential.ExpiresAt, time.Now().Add(5*time.Minute))
		jws, err := jose.ParseSignedCompact(d.Credential.Secret["token"], []jose.SignatureAlgorithm{jose.ES256})
		if err != nil {
			t.Fatal(err)
		}
		var claims struct{ Iat, Exp int64 }
		if err := json.Unmarshal(jws.UnsafePayloadWithoutVerification(), &claims); err != nil {
			t.Fatal(err)
		}
		near(r.name+": iat", time.Unix(claims.Iat, 0), time.Now())
		near(r.name+": exp", time.Unix(claims.Exp, 0), time.Now().Add(5*time.Minute))
		asked, err := c.Decide(ctx, client.Request{
			Session: opened.ID, Intent: client.Intent{Action: "ask"}, Resource: client.Resource{Type: "thing", ID: r.name},
		})
		if err != nil || asked.Approval == nil {
			t.Fatalf("%s: %+v, %v", r.name, asked, err)
		}
		near(r.name+": the approval's expires_at", asked.Approval.ExpiresAt, time.Now().Add(5*time.Minute))

		// Both see a short session end when it does.
		short, err := c.OpenSession(ctx, client.SessionRequest{ExpiresIn: 3})
		if err != nil {
			t.Fatal(err)
		}
		status := func(of *replica) string {
			got, err := of.client(s).Session(ctx, short.ID)
			if err != nil {
				t.Fatal(err)
			}
			return got.Status
		}
		if a, b := status(right), status(wrong); a != "active" || b != "active" {
			t.Errorf("at first the session is %s and %s", a, b)
		}
		time.Sleep(time.Until(short.EndsAt) + 100*time.Millisecond)
		if a, b := status(right), status(wrong); a != "ended" || b != "ended" {
			t.Errorf("in the end the session is %s and %s", a, b)
		}
		// And the credential lives on, for a retry on the other one too.
		request.Session = opened.ID
		for _, other := range s.replicas {
			again, err := other.client(s).Decide(ctx, request)
			if err != nil || again.ID != d.ID || again.Credential == nil {
				t.Errorf("%s: %+v, %v", other.name, again, err)
			}
		}
	}
	s.stop()
	s.settle()
	f := s.verify(newLoad(s))
	s.clean(newLoad(s), f)
	db := s.database()
	defer db.Close()
	// Leases begin and end by the store's time, whichever replica recorded it.
	leases := 0
	var drift time.Duration
	const first = `SELECT created_at, expires_at FROM leases l WHERE NOT EXISTS (SELECT 1 FROM leases o WHERE o.decision = l.decision AND o.created_at < l.created_at)`
	rows(s, db, first, func(scan func(...any)) {
		var created, expires int64
		scan(&created, &expires)
		leases++
		drift = max(drift, (time.UnixMicro(expires).Sub(time.UnixMicro(created)) - 5*time.Minute).Abs())
		if d := time.Since(time.UnixMicro(created)); d < -time.Second || d > time.Minute {
			t.Errorf("a lease is %v old", d)
		}
	})
	t.Logf("fault 11: a replica that is %v off: %d leases, each good for 5m give or take %v", skew, leases, drift.Round(time.Millisecond))
	if leases == 0 || drift > time.Second {
		t.Errorf("%d leases, drift %v", leases, drift)
	}
	rows(s, db, `SELECT seq, at FROM log_entries`, func(scan func(...any)) {
		var seq, at int64
		scan(&seq, &at)
		if d := time.Since(time.UnixMicro(at)); d < -2*time.Second || d > time.Minute {
			t.Errorf("entry %d is %v old", seq, d)
		}
	})
}
