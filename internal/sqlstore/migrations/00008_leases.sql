-- Credentials that exist at a target: made before they are active, unmade after they
-- end. And what operators have revoked, or hold back.

-- +goose Up
ALTER TABLE leases ADD COLUMN minter TEXT NOT NULL DEFAULT '';
ALTER TABLE leases ADD COLUMN policy TEXT NOT NULL DEFAULT '';          -- revision
ALTER TABLE leases ADD COLUMN ending TEXT NOT NULL DEFAULT 'word';      -- how its end is seen: word, expiry, target
ALTER TABLE leases ADD COLUMN mint_deadline BIGINT NOT NULL DEFAULT 0;
ALTER TABLE leases ADD COLUMN gone_at BIGINT NOT NULL DEFAULT 0;        -- when its end was seen
ALTER TABLE leases ADD COLUMN revocation TEXT NOT NULL DEFAULT '';      -- that ended it
ALTER TABLE leases ADD COLUMN urgency BIGINT NOT NULL DEFAULT 0;        -- of unmaking it; the least goes first
ALTER TABLE leases ADD COLUMN due_at BIGINT NOT NULL DEFAULT 0;         -- when to unmake it, or to try again
ALTER TABLE leases ADD COLUMN claim TEXT NOT NULL DEFAULT '';           -- of who is unmaking it
ALTER TABLE leases ADD COLUMN attempts BIGINT NOT NULL DEFAULT 0;
ALTER TABLE leases ADD COLUMN last_error TEXT NOT NULL DEFAULT '';
ALTER TABLE leases ADD COLUMN recall_sealed BLOB;                       -- what unmaking it needs
UPDATE leases SET gone_at = ended_at WHERE state = 'revoked';

DROP INDEX leases_due;
DROP INDEX leases_decision;
DROP INDEX leases_session;
DROP INDEX leases_user;
DROP INDEX leases_agent;
CREATE INDEX leases_due ON leases (expires_at) WHERE ended_at = 0;
CREATE INDEX leases_decision ON leases (decision) WHERE ended_at = 0;
CREATE INDEX leases_session ON leases (session) WHERE ended_at = 0;
CREATE INDEX leases_user ON leases (user_subject, user_issuer) WHERE ended_at = 0;
CREATE INDEX leases_agent ON leases (agent_subject, agent_issuer) WHERE ended_at = 0;
CREATE INDEX leases_intent ON leases (mint_deadline) WHERE state = 'intent';
CREATE INDEX leases_minter ON leases (minter) WHERE gone_at = 0;
CREATE INDEX leases_unmake ON leases (minter, urgency, attempts, due_at) WHERE state = 'revoking';
CREATE INDEX leases_pass ON leases (expires_at) WHERE state = 'revoking' AND ending = 'expiry';
CREATE INDEX leases_unfinished ON leases (id) WHERE state = 'revoked' AND gone_at = 0;
CREATE INDEX leases_claim ON leases (claim) WHERE claim <> '';
CREATE INDEX leases_revocation ON leases (revocation, state, gone_at) WHERE revocation <> '';

CREATE TABLE revocations (
  id               TEXT PRIMARY KEY,
  at               BIGINT NOT NULL,
  scope            TEXT NOT NULL, -- decision (of a lease), session, user, agent, minter, policy, all
  value            TEXT NOT NULL, -- id, subject, name or revision
  issuer           TEXT NOT NULL, -- of user and agent
  reason           TEXT NOT NULL,
  operator_issuer  TEXT NOT NULL,
  operator_subject TEXT NOT NULL,
  frozen           BIGINT NOT NULL, -- 1 until it is lifted: nothing new is allowed
  active           BIGINT NOT NULL, -- 1 while it is frozen or something in it has not ended
  sessions         BIGINT NOT NULL, -- that it ended
  leases           BIGINT NOT NULL, -- that it ended, once all are gone
  ended_at         BIGINT NOT NULL, -- when everything in it had ended
  gone_at          BIGINT NOT NULL, -- when all of that was seen to be gone
  lifted_at        BIGINT NOT NULL,
  lifted_issuer    TEXT NOT NULL,
  lifted_subject   TEXT NOT NULL
);
CREATE INDEX revocations_active ON revocations (scope, value, issuer) WHERE active = 1;
CREATE INDEX revocations_due ON revocations (id) WHERE gone_at = 0;

CREATE TABLE orphans (
  minter      TEXT NOT NULL,
  name        TEXT NOT NULL, -- at the target
  seen_at     BIGINT NOT NULL, -- first
  disarmed_at BIGINT NOT NULL,
  PRIMARY KEY (minter, name)
);
