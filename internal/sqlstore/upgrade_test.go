package sqlstore

import (
	"io/fs"
	"testing"

	"github.com/pressly/goose/v3"

	"github.com/writsec/writ/internal/audit"
)

// A store of the schema before is brought up to date with all that it holds, and a
// binary of before, which still runs, can go on writing to it.
func TestUpgrade(t *testing.T) {
	f := newSQLite(t)
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		t.Fatal(err)
	}
	if err := f.raw().Exec(`DROP TABLE goose_db_version`); err != nil {
		t.Fatal(err)
	}
	for _, table := range []string{"audit", "leases", "approvals", "decisions", "replays", "sessions", "keys", "log_entries", "log_tiles", "log_head", "inputs", "signouts", "spent", "sign_ins", "reservations", "scopes", "revocations", "orphans", "status_entries", "status_places"} {
		if err := f.raw().Exec(`DROP TABLE ` + table); err != nil {
			t.Fatal(err)
		}
	}
	f.engine.(*sqlite).drop()
	p, err := goose.NewProvider(goose.DialectSQLite3, f.engine.(*sqlite).write, files, goose.WithSlog(quiet))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.UpTo(f.ctx, 1); err != nil {
		t.Fatal(err)
	}
	const oldEntry = `INSERT INTO audit (at, kind, request_id, user_issuer, user_subject, agent_issuer, agent_subject,
		operator_issuer, operator_subject, session, decision, approval, lease, detail)
		VALUES (1, 'session.opened', '', '', '', '', '', '', '', 'ses_old', '', '', '', '{"a":1}')`
	if err := f.raw().Exec(oldEntry); err != nil {
		t.Fatal(err)
	}
	// A deny whose advice looks like an allow, but is none.
	for _, old := range []string{
		`INSERT INTO sessions (id, version, user_issuer, user_subject, user_claims, agent_issuer, agent_subject, task, envelope, labels, counters,
			started_at, ends_at, ended_at, end_reason) VALUES ('ses_0', 1, '', '', '{}', '', '', 'null', 'null', 'null', 'null', 1, 2, 0, '')`,
		`INSERT INTO decisions (id, at, session, user_issuer, user_subject, agent_issuer, agent_subject, intent_hash, answer, approval, lease)
			VALUES ('dec_0', 1, 'ses_0', '', '', '', '', '', '{"decision_id":"dec_06h0d83k3lv41093qubcn1cf18","decision":"deny",` +
			`"session":"ses_0","advice":{"a":"b","decision":"allow","z":1}}', '', '')`,
	} {
		if err := f.raw().Exec(old); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	f.reopen()
	if err := audit.OpenLog(f.ctx, f.log(), "h"); err != nil {
		t.Fatal(err)
	}
	for _, old := range []string{
		oldEntry,
		`INSERT INTO sessions (id, version, user_issuer, user_subject, user_claims, agent_issuer, agent_subject, task, envelope, labels, counters,
			started_at, ends_at, ended_at, end_reason) VALUES ('ses_1', 1, '', '', '{}', '', '', 'null', 'null', 'null', 'null', 1, 2, 0, '')`,
		`INSERT INTO decisions (id, at, session, user_issuer, user_subject, agent_issuer, agent_subject, intent_hash, answer, approval, lease)
			VALUES ('dec_1', 1, 'ses_1', '', '', '', '', '', '{}', '', '')`,
		`INSERT INTO keys (id, purpose, created_at, key_sealed) VALUES ('k', 'x', 1, x'00')`,
	} {
		if err := f.raw().Exec(old); err != nil {
			t.Errorf("the binary of before: %v", err)
		}
	}
	if effect, err := f.raw().QueryRow(`SELECT effect FROM decisions WHERE id = 'dec_0'`); err != nil || effect != "deny" {
		t.Errorf("the effect of a decision of before: %q %v", effect, err)
	}
	f.sequence()
	_, entries := f.wantWhole()
	if len(entries) != 3 {
		t.Fatalf("%d entries, want those of before and after", len(entries))
	}
	if e, err := audit.ParseRecord(entries[0].Record); err != nil || e.Session != "ses_old" {
		t.Errorf("%+v %v", e, err)
	}
}
