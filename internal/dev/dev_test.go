package dev_test

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	"github.com/writsec/writ/internal/dev"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func run(t *testing.T, cfg dev.Config) *dev.Dev {
	t.Helper()
	const anyPort = "127.0.0.1:0"
	cfg.Listen, cfg.OpsListen, cfg.IDPListen, cfg.Logger = anyPort, anyPort, anyPort, slog.New(slog.DiscardHandler)
	d, err := dev.New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	stop() // it only has to start, and to stop
	if err := d.Run(ctx); err != nil {
		t.Fatal(err)
	}
	return d
}

func TestFolderIsKept(t *testing.T) {
	dir := t.TempDir()
	d := run(t, dev.Config{Dir: dir})
	key, err := os.ReadFile(filepath.Join(dir, "root.key"))
	if err != nil {
		t.Fatal(err)
	}
	if d.Policies != filepath.Join(dir, "policies") {
		t.Errorf("policies in %s", d.Policies)
	}
	edited := filepath.Join(d.Policies, "writ", "rules", "crm", "crm.rego")
	text, err := os.ReadFile(edited)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(edited, append(text, "\n# mine\n"...), 0o600); err != nil {
		t.Fatal(err)
	}

	run(t, dev.Config{Dir: dir})
	if again, _ := os.ReadFile(filepath.Join(dir, "root.key")); string(again) != string(key) {
		t.Error("the second start made another root key")
	}
	if now, _ := os.ReadFile(edited); string(now) != string(text)+"\n# mine\n" {
		t.Error("the second start overwrote an edited policy")
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if info, err := e.Info(); err != nil || info.Mode().Perm()&0o077 != 0 && e.Name() != "writ.db.lock" {
			t.Errorf("%s is open to others: %v, %v", e.Name(), info.Mode(), err)
		}
	}
}

func TestOwnPolicies(t *testing.T) {
	dir := t.TempDir()
	d := run(t, dev.Config{Dir: dir, Policies: "../../policies"})
	if d.Policies != "../../policies" {
		t.Errorf("policies in %s", d.Policies)
	}
	if _, err := os.Stat(filepath.Join(dir, "policies")); !os.IsNotExist(err) {
		t.Errorf("a sample was unpacked although policies were given: %v", err)
	}
}

func TestOnlyLoopback(t *testing.T) {
	_, err := dev.New(t.Context(), dev.Config{
		Dir: t.TempDir(), Listen: "127.0.0.1:0", OpsListen: "127.0.0.1:0", IDPListen: "0.0.0.0:0", Logger: slog.New(slog.DiscardHandler),
	})
	if err == nil {
		t.Error("the embedded provider listens to the world")
	}
}
