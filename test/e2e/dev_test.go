package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

var (
	phoneForm = regexp.MustCompile(`(?s)<p class="message"[^>]*>([^<]*)</p>.*?<form method="post" action="([^"]+)">\s*<input type="hidden" name="csrf" value="([^"]+)">`)
	shown     = regexp.MustCompile(`(?m)^  (phone page|policies|data) +(\S+)`)
)

// TestDev does what somebody does who has just got Writ: runs it, pastes the three
// lines, approves on the phone page and edits a policy. It is not parallel, since the
// policies' tests keep all cores busy at each load.
func TestDev(t *testing.T) {
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	port := freePorts(t, 3)
	out, errs := &buffer{}, &buffer{}
	cmd := exec.Command(binary, "dev", "--port", fmt.Sprint(port), "--dir", filepath.Join(dir, "data"))
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, out, errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case err := <-exited:
			if err != nil {
				t.Errorf("writ dev ended with %v", err)
			}
		case <-time.After(15 * time.Second):
			_ = cmd.Process.Kill()
			t.Error("writ dev did not end")
		}
		if t.Failed() {
			t.Logf("writ dev said:\n%s%s", out, errs)
		}
	})
	var lines []string
	within(t, 60*time.Second, func() error {
		lines = nil
		for l := range strings.Lines(out.String()) {
			if strings.HasPrefix(l, "curl ") {
				lines = append(lines, l)
			}
		}
		if len(lines) != 4 {
			return fmt.Errorf("%d curl lines", len(lines))
		}
		return nil
	})
	paths := map[string]string{}
	for _, m := range shown.FindAllStringSubmatch(out.String(), -1) {
		paths[m[1]] = m[2]
	}

	paste := func(i int) (a answer, err error) {
		cmd := exec.Command(bash, "-c", lines[i])
		stdout, err := cmd.Output()
		if err != nil {
			return a, fmt.Errorf("line %d: %w", i+1, err)
		}
		return a, json.Unmarshal(stdout, &a)
	}
	mustPaste := func(i int, effect, code string) answer {
		t.Helper()
		a, err := paste(i)
		if err != nil {
			t.Fatal(err)
		}
		if a.Decision != effect || a.Reasons[0].Code != code || (a.Credential != nil) != (effect == allow) {
			t.Fatalf("line %d: %s %v, credential %v", i+1, a.Decision, a.Reasons, a.Credential != nil)
		}
		return a
	}
	unedited := mustPaste(0, allow, "read_opportunity")
	mustPaste(1, deny, "not_granted")

	link, err := exec.Command(bash, "-c", lines[3]).Output()
	if err != nil {
		t.Fatal(err)
	}
	var need struct {
		Status string `json:"status"`
		SignIn struct {
			URL string `json:"url"`
		} `json:"sign_in"`
	}
	if err := json.Unmarshal(link, &need); err != nil || need.Status != "login_required" {
		t.Fatalf("line 4: %s %v", link, err)
	}
	if res, err := http.Get(need.SignIn.URL); err != nil || res.StatusCode != http.StatusOK {
		t.Errorf("the link opens %v, %v", res, err)
	} else {
		res.Body.Close()
	}

	third := make(chan error, 1)
	var approved answer
	go func() {
		var err error
		approved, err = paste(2)
		third <- err
	}()
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	phone := &http.Client{Jar: jar, Timeout: 10 * time.Second}
	var form []string
	within(t, 20*time.Second, func() error {
		res, err := phone.Get(paths["phone page"])
		if err != nil {
			return err
		}
		defer res.Body.Close()
		page, err := io.ReadAll(res.Body)
		if err != nil {
			return err
		}
		if form = phoneForm.FindStringSubmatch(string(page)); form == nil {
			return fmt.Errorf("no prompt on the phone: %s", page)
		}
		return nil
	})
	if !strings.Contains(form[1], "hr.employee.offboard") || !strings.Contains(form[1], "e-1001") {
		t.Errorf("the phone shows %q", form[1])
	}
	action, err := url.Parse(paths["phone page"])
	if err != nil {
		t.Fatal(err)
	}
	res, err := phone.PostForm(action.ResolveReference(&url.URL{Path: form[2]}).String(), url.Values{"csrf": {form[3]}, "verdict": {"approve"}})
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != http.StatusOK {
		t.Fatalf("the phone page answered %d", res.StatusCode)
	}
	if err := <-third; err != nil {
		t.Fatal(err)
	}
	if approved.Decision != allow || approved.Credential == nil {
		t.Fatalf("line 3: %s %v", approved.Decision, approved.Reasons)
	}

	// The printed folder is where to edit. A slip changes nothing.
	policies := paths["policies"]
	if !filepath.IsAbs(policies) {
		policies = filepath.Join(dir, policies)
	}
	crm := filepath.Join(policies, "writ", "rules", "crm", "crm.rego")
	before, err := os.ReadFile(crm)
	if err != nil {
		t.Fatal(err)
	}
	edit := func(content []byte) {
		t.Helper()
		if err := os.WriteFile(crm, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// Their tests pass at the start; from here on they would only take time.
	tests, err := filepath.Glob(filepath.Join(policies, "writ", "*_test.rego"))
	more, err2 := filepath.Glob(filepath.Join(policies, "writ", "rules", "*", "*_test.rego"))
	if err := errors.Join(err, err2); err != nil || len(tests) == 0 || len(more) == 0 {
		t.Fatalf("no tests beside the policies: %v", err)
	}
	for _, name := range append(tests, more...) {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	edit(append(before[:len(before):len(before)], "\noops("...))
	within(t, 30*time.Second, func() error {
		if !strings.Contains(errs.String(), "policies refused") {
			return fmt.Errorf("nothing on the terminal")
		}
		return nil
	})
	if !strings.Contains(errs.String(), "crm.rego:") {
		t.Error("the terminal does not say where")
	}
	mustPaste(0, allow, "read_opportunity")

	edit(bytes.ReplaceAll(before, []byte("Opportunities may be read"), []byte("Edited while it runs")))
	within(t, 60*time.Second, func() error {
		a := mustPaste(0, allow, "read_opportunity")
		if a.Reasons[0].Message != "Edited while it runs" {
			return fmt.Errorf("still %q", a.Reasons[0].Message)
		}
		if a.Policy.Digest == unedited.Policy.Digest {
			t.Errorf("other policies, the same digest %s", a.Policy.Digest)
		}
		return nil
	})
}

// Only a story that was told to its end is a success.
func TestInterruptedDemoFails(t *testing.T) {
	t.Parallel()
	cmd := exec.Command(binary, "demo")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(300 * time.Millisecond)
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Errorf("an interrupted demo ends with 0:\n%s", &out)
	}
}
