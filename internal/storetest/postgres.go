// Package storetest gives each test a PostgreSQL database of its own, cloned from a
// template that is migrated once. It is for tests alone.
package storetest

import (
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/hex"
	"fmt"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	_ "github.com/jackc/pgx/v5/stdlib" // the driver "pgx"
	_ "modernc.org/sqlite"             // the driver "sqlite"

	"github.com/writsec/writ/test/postgres"
)

var (
	mu        sync.Mutex
	server    string // DSN of its database postgres; "" not started
	stop      func() error
	templates = map[string]string{}
)

// Database clones the template of that name, which migrate has filled the first
// time, and returns its URL. It is dropped after the test.
func Database(t testing.TB, template string, migrate func(ctx context.Context, url string) error) string {
	t.Helper()
	ctx := context.Background() // outlives the test's, for the clean-up
	source, err := prepare(ctx, template, migrate)
	if err != nil {
		t.Fatalf("prepare PostgreSQL: %v", err)
	}
	name := unique("writ_test")
	if err := admin(ctx, fmt.Sprintf(`CREATE DATABASE %s TEMPLATE %s`, name, source)); err != nil {
		t.Fatalf("clone database: %v", err)
	}
	t.Cleanup(func() {
		if err := admin(ctx, fmt.Sprintf(`DROP DATABASE %s WITH (FORCE)`, name)); err != nil {
			t.Errorf("drop database: %v", err)
		}
	})
	return at(name)
}

// Main runs the tests of a package and then stops the server that they started.
func Main(m *testing.M) (code int) {
	code = m.Run()
	mu.Lock()
	defer mu.Unlock()
	for _, name := range templates { // the server may go on for others
		if err := admin(context.Background(), `DROP DATABASE `+name); err != nil {
			fmt.Println("drop template:", err)
			code = max(code, 1)
		}
	}
	if stop != nil {
		if err := stop(); err != nil {
			fmt.Println("stop PostgreSQL:", err)
			code = max(code, 1)
		}
	}
	return code
}

func prepare(ctx context.Context, template string, migrate func(ctx context.Context, url string) error) (name string, err error) {
	mu.Lock()
	defer mu.Unlock()
	if server == "" {
		start, cancel := context.WithTimeout(ctx, 5*time.Minute)
		defer cancel()
		if server, stop, err = postgres.Shared(start); err != nil {
			return "", err
		}
	}
	if name, ok := templates[template]; ok {
		return name, nil
	}
	name = unique("writ_template_" + template)
	if err := admin(ctx, `CREATE DATABASE `+name); err != nil {
		return "", err
	}
	if err := migrate(ctx, at(name)); err != nil {
		return "", err
	}
	templates[template] = name
	return name, nil
}

func unique(prefix string) string {
	b := make([]byte, 6)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	return prefix + "_" + hex.EncodeToString(b)
}

// at is the URL of a database of the server.
func at(database string) string {
	u, err := url.Parse(server)
	if err != nil {
		panic(err) // the launcher's
	}
	u.Path = "/" + database
	return u.String()
}

func admin(ctx context.Context, statement string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	c, err := pgx.Connect(ctx, server)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close(ctx) }()
	_, err = c.Exec(ctx, statement)
	return err
}

// engine is what URL gives: sqlite, or postgres in the second run of Both.
var engine = "sqlite"

// Both runs the tests of a package twice, on each engine.
func Both(m *testing.M) int {
	code := m.Run()
	engine = "postgres"
	return max(code, Main(m))
}

// URL is a new store of the engine that this run is on.
func URL(t testing.TB, migrate func(ctx context.Context, url string) error) string {
	t.Helper()
	if engine == "postgres" {
		return Database(t, "both", migrate)
	}
	return "sqlite:" + filepath.Join(t.TempDir(), "writ.db")
}

// OnPostgres reports whether this is the run on PostgreSQL.
func OnPostgres() bool { return engine == "postgres" }

// Exec runs a statement beside Writ, as a broken disk or an administrator would.
func Exec(t testing.TB, storeURL, statement string) {
	t.Helper()
	driver, dsn := "pgx", storeURL
	if path, ok := strings.CutPrefix(storeURL, "sqlite:"); ok {
		driver, dsn = "sqlite", "file:"+path+"?_pragma=busy_timeout(5000)"
	}
	db, err := sql.Open(driver, dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = db.Close() }()
	if _, err := db.ExecContext(context.Background(), statement); err != nil {
		t.Fatal(err)
	}
}

// Break makes every insertion into a table fail until mend is called.
func Break(t testing.TB, storeURL, table string) (mend func()) {
	t.Helper()
	if !OnPostgres() {
		Exec(t, storeURL, `CREATE TRIGGER broken BEFORE INSERT ON `+table+` BEGIN SELECT RAISE(FAIL, 'disk full'); END`)
		return func() { Exec(t, storeURL, `DROP TRIGGER broken`) }
	}
	Exec(t, storeURL, `CREATE OR REPLACE FUNCTION broken() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'disk full'; END $$`)
	Exec(t, storeURL, `CREATE TRIGGER broken BEFORE INSERT ON `+table+` FOR EACH ROW EXECUTE FUNCTION broken()`)
	return func() { Exec(t, storeURL, `DROP TRIGGER broken ON `+table) }
}
