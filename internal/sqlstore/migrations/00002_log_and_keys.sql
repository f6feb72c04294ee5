-- The table audit now holds entries until they are sequenced into the log, a
-- moment later; a binary of before may go on writing to it.

-- +goose Up
ALTER TABLE audit ADD COLUMN trace_id TEXT NOT NULL DEFAULT '';

CREATE TABLE log_entries (
  seq           INTEGER PRIMARY KEY, -- the index in the tree, from 0
  at            BIGINT NOT NULL,
  kind          TEXT NOT NULL,
  user_issuer   TEXT NOT NULL,
  user_subject  TEXT NOT NULL,
  agent_issuer  TEXT NOT NULL,
  agent_subject TEXT NOT NULL,
  session       TEXT NOT NULL,
  decision      TEXT NOT NULL,
  entry         TEXT NOT NULL -- canonical JSON: exactly what was hashed
);
CREATE INDEX log_entries_kind ON log_entries (kind, seq);
CREATE INDEX log_entries_session ON log_entries (session, seq) WHERE session <> '';
CREATE INDEX log_entries_decision ON log_entries (decision, seq) WHERE decision <> '';
CREATE INDEX log_entries_user ON log_entries (user_subject, seq) WHERE user_subject <> '';
CREATE INDEX log_entries_agent ON log_entries (agent_subject, seq) WHERE agent_subject <> '';

-- Hashes of the tree, 256 side by side, as in C2SP tlog-tiles.
CREATE TABLE log_tiles (
  level BIGINT NOT NULL,
  n     BIGINT NOT NULL,
  data  BLOB NOT NULL,
  PRIMARY KEY (level, n)
);

CREATE TABLE log_head (
  id         INTEGER PRIMARY KEY CHECK (id = 1),
  origin     TEXT NOT NULL,
  size       BIGINT NOT NULL,
  checkpoint TEXT NOT NULL, -- of this size, signed
  at         BIGINT NOT NULL,
  pruned     BIGINT NOT NULL -- entries below it are in archives
);

-- What decisions were made on, beside their entries, which hold only a digest.
CREATE TABLE inputs (
  decision TEXT PRIMARY KEY,
  at       BIGINT NOT NULL,
  kept     TEXT NOT NULL, -- whole, redacted
  input    TEXT NOT NULL  -- JSON
);
CREATE INDEX inputs_at ON inputs (at);

ALTER TABLE decisions ADD COLUMN outcome TEXT NOT NULL DEFAULT '';
ALTER TABLE decisions ADD COLUMN outcome_by TEXT NOT NULL DEFAULT ''; -- agent, writ
CREATE INDEX decisions_session ON decisions (session);
CREATE INDEX leases_of_session ON leases (session);
CREATE INDEX sessions_ended ON sessions (ended_at) WHERE ended_at > 0;

ALTER TABLE keys ADD COLUMN active_at BIGINT NOT NULL DEFAULT 0;  -- used from then on
ALTER TABLE keys ADD COLUMN retired_at BIGINT NOT NULL DEFAULT 0; -- not even believed from then on; 0 never
