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
	share string // the same, but others may do so too
	claim string // takes the rows that nobody else has taken

	// mutex is a statement that waits for the lock named $1, until the commit; ""
	// where it is not needed.
	mutex string
	// notify is a statement that sends the topics $1 with the commit; "" where there
	// is nobody to tell.
	notify string
}

var sqliteDialect = dialect{
	goose: goose.DialectSQLite3,
	types: strings.NewReplacer(),
}

var postgresDialect = dialect{
	goose:  goose.DialectPostgres,
	locker: func() (lock.SessionLocker, error) { return lock.NewPostgresSessionLocker() },
	types: strings.NewReplacer(
		"BLOB", "BYTEA",
		"INTEGER PRIMARY KEY AUTOINCREMENT", "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
		"INTEGER PRIMARY KEY", "BIGINT PRIMARY KEY",
	),
	lock:   " FOR NO KEY UPDATE",
	share:  " FOR SHARE",
	claim:  " FOR NO KEY UPDATE SKIP LOCKED",
	mutex:  `SELECT pg_advisory_xact_lock(hashtextextended($1, 0))`,
	notify: `SELECT pg_notify('` + channel + `', topic) FROM unnest($1::text[]) AS topic`,
}

// channel is what replicas listen to.
const channel = "writ"
