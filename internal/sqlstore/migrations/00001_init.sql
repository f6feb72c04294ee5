-- Times are microseconds since 1970 UTC, 0 for none. Columns named *_sealed are
-- encrypted under the root key; see seal.go.

-- +goose Up
CREATE TABLE sessions (
  id            TEXT PRIMARY KEY,
  version       BIGINT NOT NULL,
  user_issuer   TEXT NOT NULL,
  user_subject  TEXT NOT NULL,
  user_claims   TEXT NOT NULL, -- JSON
  agent_issuer  TEXT NOT NULL,
  agent_subject TEXT NOT NULL,
  task          TEXT NOT NULL, -- JSON or null
  envelope      TEXT NOT NULL, -- JSON or null
  labels        TEXT NOT NULL, -- JSON
  counters      TEXT NOT NULL, -- JSON
  started_at    BIGINT NOT NULL,
  ends_at       BIGINT NOT NULL,
  ended_at      BIGINT NOT NULL,
  end_reason    TEXT NOT NULL
);
CREATE INDEX sessions_due ON sessions (ends_at) WHERE ended_at = 0;
CREATE INDEX sessions_user ON sessions (user_subject, user_issuer) WHERE ended_at = 0;
CREATE INDEX sessions_agent ON sessions (agent_subject, agent_issuer) WHERE ended_at = 0;

CREATE TABLE decisions (
  id            TEXT PRIMARY KEY,
  at            BIGINT NOT NULL,
  session       TEXT NOT NULL REFERENCES sessions (id),
  user_issuer   TEXT NOT NULL,
  user_subject  TEXT NOT NULL,
  agent_issuer  TEXT NOT NULL,
  agent_subject TEXT NOT NULL,
  intent_hash   TEXT NOT NULL,
  answer        TEXT NOT NULL, -- JSON, without credential
  approval      TEXT NOT NULL,
  lease         TEXT NOT NULL
);

CREATE TABLE replays (
  agent_issuer  TEXT NOT NULL,
  agent_subject TEXT NOT NULL,
  key           TEXT NOT NULL,
  digest        TEXT NOT NULL,
  decision      TEXT NOT NULL,
  at            BIGINT NOT NULL,
  PRIMARY KEY (agent_issuer, agent_subject, key)
);
CREATE INDEX replays_at ON replays (at);

CREATE TABLE approvals (
  id                 TEXT PRIMARY KEY,
  version            BIGINT NOT NULL,
  state              TEXT NOT NULL,
  reason             TEXT NOT NULL,
  session            TEXT NOT NULL REFERENCES sessions (id),
  user_issuer        TEXT NOT NULL,
  user_subject       TEXT NOT NULL,
  agent_issuer       TEXT NOT NULL,
  agent_subject      TEXT NOT NULL,
  intent_hash        TEXT NOT NULL,
  approver           TEXT NOT NULL,
  approver_issuer    TEXT NOT NULL,
  approver_subject   TEXT NOT NULL,
  hint               TEXT NOT NULL,
  message            TEXT NOT NULL,
  code               TEXT NOT NULL,
  acr_values         TEXT NOT NULL, -- JSON
  created_at         BIGINT NOT NULL,
  sent_at            BIGINT NOT NULL,
  expires_at         BIGINT NOT NULL,
  interval_us        BIGINT NOT NULL,
  polled_at          BIGINT NOT NULL,
  polling            BIGINT NOT NULL,
  failures           BIGINT NOT NULL,
  due_at             BIGINT NOT NULL,
  auth_req_id_sealed BLOB,
  answer_sealed      BLOB,
  acr                TEXT NOT NULL,
  amr                TEXT NOT NULL, -- JSON
  auth_time          BIGINT NOT NULL
);
CREATE INDEX approvals_due ON approvals (due_at) WHERE state IN ('created', 'requesting', 'pending', 'redeemed', 'approved');
-- One prompt per person and act, whatever the code does.
CREATE UNIQUE INDEX approvals_open ON approvals (approver_subject, approver_issuer, intent_hash)
  WHERE state IN ('created', 'requesting', 'pending', 'redeemed');
CREATE INDEX approvals_act ON approvals (intent_hash);
CREATE INDEX approvals_session ON approvals (session);

CREATE TABLE leases (
  id            TEXT PRIMARY KEY,
  state         TEXT NOT NULL,
  session       TEXT NOT NULL REFERENCES sessions (id),
  decision      TEXT NOT NULL,
  user_issuer   TEXT NOT NULL,
  user_subject  TEXT NOT NULL,
  agent_issuer  TEXT NOT NULL,
  agent_subject TEXT NOT NULL,
  intent_hash   TEXT NOT NULL,
  grant_json    TEXT NOT NULL,
  created_at    BIGINT NOT NULL,
  expires_at    BIGINT NOT NULL,
  ended_at      BIGINT NOT NULL,
  end_reason    TEXT NOT NULL
);
CREATE INDEX leases_due ON leases (expires_at) WHERE state = 'active';
CREATE INDEX leases_decision ON leases (decision) WHERE state = 'active';
CREATE INDEX leases_session ON leases (session) WHERE state = 'active';
CREATE INDEX leases_user ON leases (user_subject, user_issuer) WHERE state = 'active';
CREATE INDEX leases_agent ON leases (agent_subject, agent_issuer) WHERE state = 'active';

CREATE TABLE audit (
  seq              INTEGER PRIMARY KEY AUTOINCREMENT,
  at               BIGINT NOT NULL,
  kind             TEXT NOT NULL,
  request_id       TEXT NOT NULL,
  user_issuer      TEXT NOT NULL,
  user_subject     TEXT NOT NULL,
  agent_issuer     TEXT NOT NULL,
  agent_subject    TEXT NOT NULL,
  operator_issuer  TEXT NOT NULL,
  operator_subject TEXT NOT NULL,
  session          TEXT NOT NULL,
  decision         TEXT NOT NULL,
  approval         TEXT NOT NULL,
  lease            TEXT NOT NULL,
  detail           TEXT NOT NULL -- JSON
);

CREATE TABLE keys (
  id          TEXT PRIMARY KEY,
  purpose     TEXT NOT NULL,
  created_at  BIGINT NOT NULL,
  key_sealed  BLOB NOT NULL
);
