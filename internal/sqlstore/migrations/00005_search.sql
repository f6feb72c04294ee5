-- Operators search sessions and decisions, newest first: an id sorts by age.

-- +goose Up
CREATE INDEX sessions_of_user ON sessions (user_subject, user_issuer, id);
CREATE INDEX sessions_of_agent ON sessions (agent_subject, agent_issuer, id);

-- What the answer says, in a place of its own. A binary of before leaves it empty:
-- what such a one decides meanwhile is found by everything but its effect.
ALTER TABLE decisions ADD COLUMN effect TEXT NOT NULL DEFAULT '';
UPDATE decisions SET effect = CASE
  WHEN answer LIKE '{"decision_id":"______________________________","decision":"allow",%' THEN 'allow'
  WHEN answer LIKE '{"decision_id":"______________________________","decision":"deny",%' THEN 'deny'
  WHEN answer LIKE '{"decision_id":"______________________________","decision":"require_ciba",%' THEN 'require_ciba'
  ELSE '' END;
CREATE INDEX decisions_of_user ON decisions (user_subject, user_issuer, id);
CREATE INDEX decisions_of_agent ON decisions (agent_subject, agent_issuer, id);
CREATE INDEX decisions_effect ON decisions (effect, id);
CREATE INDEX decisions_of_session ON decisions (session, id);
DROP INDEX decisions_session; -- the one before does its work, too
