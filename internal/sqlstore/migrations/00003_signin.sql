-- Users' sign-ins for agents that have no token of theirs. Columns named *_hash are
-- SHA-256 in base64url; what they are of is nowhere in the store.

-- +goose Up
CREATE TABLE sign_ins (
  id            TEXT PRIMARY KEY,
  version       BIGINT NOT NULL,
  state         TEXT NOT NULL,
  agent_issuer  TEXT NOT NULL,
  agent_subject TEXT NOT NULL,
  opened_from   TEXT NOT NULL, -- the agent's address
  task          TEXT NOT NULL,
  envelope      TEXT NOT NULL, -- JSON or null
  age_us        BIGINT NOT NULL,
  redirect_uri  TEXT NOT NULL,
  agent_state   TEXT NOT NULL,
  token_hash    TEXT NOT NULL,
  browser_hash  TEXT NOT NULL,
  state_hash    TEXT NOT NULL,
  code_hash     TEXT NOT NULL,
  issuer        TEXT NOT NULL, -- that the browser was sent to
  user_issuer   TEXT NOT NULL,
  user_subject  TEXT NOT NULL,
  user_claims   TEXT NOT NULL, -- JSON
  wrong_codes   BIGINT NOT NULL,
  session       TEXT NOT NULL, -- that it became
  opened_at     BIGINT NOT NULL,
  expires_at    BIGINT NOT NULL
);
CREATE UNIQUE INDEX sign_ins_token ON sign_ins (token_hash);
CREATE UNIQUE INDEX sign_ins_state ON sign_ins (state_hash) WHERE state_hash <> '';
CREATE INDEX sign_ins_agent ON sign_ins (agent_subject, agent_issuer, expires_at);
CREATE INDEX sign_ins_due ON sign_ins (expires_at);
