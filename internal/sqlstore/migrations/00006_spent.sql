-- What is good once only and was used: ids of proofs, assertions and events.

-- +goose Up
CREATE TABLE spent (
  use        TEXT PRIMARY KEY,
  expires_at BIGINT NOT NULL
);
CREATE INDEX spent_expired ON spent (expires_at);
