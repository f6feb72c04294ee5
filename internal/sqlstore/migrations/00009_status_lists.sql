-- The places that tokens have in the status lists, for verifiers that don't introspect.

-- +goose Up
CREATE TABLE status_entries (
  place INTEGER PRIMARY KEY,
  lease TEXT NOT NULL,
  until BIGINT NOT NULL -- nobody asks for the place any more
);
CREATE INDEX status_entries_until ON status_entries (until);

CREATE TABLE status_places (
  one  INTEGER PRIMARY KEY, -- there is one row
  next BIGINT NOT NULL      -- the first place that no replica has reserved
);
INSERT INTO status_places (one, next) VALUES (1, 0);
