-- What is taken of budgets and quotas, and until when. A scope is whatever shares
-- them, such as a pair of user and agent.

-- +goose Up
CREATE TABLE reservations (
  scope      TEXT NOT NULL,
  name       TEXT NOT NULL,
  holder     TEXT NOT NULL, -- who can give it back; '' nobody
  expires_at BIGINT NOT NULL,
  amount     BIGINT NOT NULL,
  PRIMARY KEY (scope, name, holder, expires_at)
);
CREATE INDEX reservations_expired ON reservations (expires_at);

-- A version grows with time, so that a scope can be forgotten: one that is made anew
-- never has a version that anybody has seen.
CREATE TABLE scopes (
  scope   TEXT PRIMARY KEY,
  version BIGINT NOT NULL -- microseconds since 1970 of its last change, or later
);
CREATE INDEX scopes_version ON scopes (version);

ALTER TABLE sessions ADD COLUMN scope TEXT NOT NULL DEFAULT '';      -- of its user and agent; '' by a binary of before
ALTER TABLE sessions ADD COLUMN idle_at BIGINT NOT NULL DEFAULT 0;   -- ends then unless something is decided; 0 never
CREATE INDEX sessions_idle ON sessions (idle_at) WHERE ended_at = 0 AND idle_at > 0;
