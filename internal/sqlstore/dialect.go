package sqlstore

import (
	"strings"

	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/lock"
)

// dialect is how the one text of the statements is adapted to a database. SQLite
// has one writer, so that nothing needs a lock there.
type dialect struct {
	goose  goose.Dialect
	locker func() (lock.SessionLocker, error) // of migrations
	types  *strings.Replacer                  // in migrations

	lock  string // keeps the rows read as they are until the commit
	claim string // takes the rows that nobody else has taken

	// mutex is a statement that waits for the lock named $1, until the commit; ""
	// where it is not needed.
	mutex string
	// notify is a statement that sends the topics $1 with the commit; "" where there
	// is nobody to tell.
	notify string

	// PostgreSQL lets those who share a row's lock in past one who waits to change it, so
	// that a flood of decisions could hold off the kill switch. Sessions fall into a few
	// locks of another kind, which queue fairly: decisions share them, and who ends
	// sessions holds them alone.
	//
	// And all share one more, which whoever revokes by a wider scope holds alone.
	shareAll     string
	holdAll      string
	shareSession string // by id $1
	sharedCheck  string // the same with the check of id $1 at version $2, and of its scope $3 at version $4
	holdSessions string // of a condition
}

var sqliteDialect = dialect{
	goose:       goose.DialectSQLite3,
	types:       strings.NewReplacer(),
	sharedCheck: `SELECT 1 FROM sessions WHERE id = $1 AND version = $2 AND ended_at = 0 AND ` + scopeCheck,
}

var postgresDialect = dialect{
	goose:  goose.DialectPostgres,
	locker: func() (lock.SessionLocker, error) { return lock.NewPostgresSessionLocker(lock.WithLockTimeout(1, 300)) }, // tries each second
	types: strings.NewReplacer(
		"BLOB", "BYTEA",
		"INTEGER PRIMARY KEY AUTOINCREMENT", "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
		"INTEGER PRIMARY KEY", "BIGINT PRIMARY KEY",
	),
	lock:         " FOR NO KEY UPDATE",
	claim:        " FOR NO KEY UPDATE SKIP LOCKED",
	shareAll:     `SELECT pg_advisory_xact_lock_shared(7719, -1)`,
	holdAll:      `SELECT pg_advisory_xact_lock(7719, -1)`,
	shareSession: `SELECT pg_advisory_xact_lock_shared(7719, -1), pg_advisory_xact_lock_shared(` + sessionBucket + `)`,
	sharedCheck: `WITH held AS MATERIALIZED (SELECT pg_advisory_xact_lock_shared(7719, -1), pg_advisory_xact_lock_shared(` + sessionBucket + `))
		SELECT 1 FROM sessions, held WHERE id = $1 AND version = $2 AND ended_at = 0 AND ` + scopeCheck + ` FOR SHARE OF sessions`,
	holdSessions: `SELECT pg_advisory_xact_lock(class, bucket) FROM (
		SELECT DISTINCT 7719 AS class, (hashtextextended(id, 0) & 63)::int AS bucket
		FROM (SELECT id FROM sessions WHERE %s) AS held ORDER BY bucket) AS buckets`,
	mutex:  `SELECT pg_advisory_xact_lock(hashtextextended($1, 0))`,
	notify: `SELECT pg_notify('` + channel + `', topic) FROM unnest($1::text[]) AS topic`,
}

// scopeCheck takes no lock: whoever only checks a scope leaves nothing there that others
// would have to see.
const scopeCheck = `COALESCE((SELECT scopes.version FROM scopes WHERE scopes.scope = $3), 0) = $4`

const sessionBucket = `7719, (hashtextextended($1, 0) & 63)::int`

// channel is what replicas listen to.
const channel = "writ"
