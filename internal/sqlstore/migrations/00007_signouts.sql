-- Words of issuers that somebody, or one login of theirs, is over.

-- +goose Up
CREATE TABLE signouts (
  issuer     TEXT NOT NULL,
  subject    TEXT NOT NULL, -- '' where only the login is known
  sid        TEXT NOT NULL, -- '' for all logins
  before_at  BIGINT NOT NULL, -- tokens from then and before are not believed
  expires_at BIGINT NOT NULL, -- when no such token can be alive any more
  PRIMARY KEY (issuer, subject, sid)
);
CREATE INDEX signouts_sid ON signouts (sid, issuer) WHERE sid <> '';
CREATE INDEX signouts_expired ON signouts (expires_at);

ALTER TABLE sessions ADD COLUMN user_sid TEXT NOT NULL DEFAULT ''; -- sid of the user's token
CREATE INDEX sessions_sid ON sessions (user_sid, user_issuer) WHERE ended_at = 0 AND user_sid <> '';
