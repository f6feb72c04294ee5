-- A small CRM of several tenants, and what agents may do in it. May be run again.
BEGIN;
CREATE SCHEMA IF NOT EXISTS crm;
CREATE TABLE IF NOT EXISTS crm.accounts (
  id     int PRIMARY KEY,
  tenant text NOT NULL,
  name   text NOT NULL
);
CREATE TABLE IF NOT EXISTS crm.opportunities (
  id      int PRIMARY KEY,
  tenant  text NOT NULL,
  account int NOT NULL REFERENCES crm.accounts,
  stage   text NOT NULL,
  amount  int NOT NULL -- EUR
);
INSERT INTO crm.accounts VALUES (1, 'acme', 'Roadrunner Parcels'), (2, 'acme', 'Coyote Catering'), (3, 'umbrella', 'Raccoon Rentals')
  ON CONFLICT DO NOTHING;
INSERT INTO crm.opportunities VALUES (42, 'acme', 1, 'negotiation', 125000), (43, 'acme', 2, 'proposal', 40000), (44, 'umbrella', 3, 'won', 990000)
  ON CONFLICT DO NOTHING;

-- What a group may do is what its members' credentials can do, and nothing else is.
GRANT USAGE ON SCHEMA crm TO crm_ro, crm_rw;
GRANT SELECT ON crm.accounts, crm.opportunities TO crm_ro, crm_rw;
GRANT INSERT, UPDATE, DELETE ON crm.accounts, crm.opportunities TO crm_rw;

-- Whose rows they see. writ.tenant() goes by the lease that a session logged in with.
ALTER TABLE crm.accounts ENABLE ROW LEVEL SECURITY;
ALTER TABLE crm.opportunities ENABLE ROW LEVEL SECURITY;
DROP POLICY IF EXISTS tenant ON crm.accounts;
DROP POLICY IF EXISTS tenant ON crm.opportunities;
CREATE POLICY tenant ON crm.accounts TO crm_ro, crm_rw USING (tenant = (SELECT writ.tenant()));
CREATE POLICY tenant ON crm.opportunities TO crm_ro, crm_rw USING (tenant = (SELECT writ.tenant()));
COMMIT;
