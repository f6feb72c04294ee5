-- Writ's minter for PostgreSQL 16 and later, version {{.Version}}, for one database.
--
-- Read it, then run it in that database as a superuser, or as a role with CREATEROLE
-- that may create schemas there and has ADMIN OPTION on the groups and on
-- pg_read_all_stats (docs/postgres.md). It may be run again: that brings functions and
-- settings to what stands here and leaves leases alone. It is one transaction.
{{- define "makers"}}ARRAY(SELECT '{{.Owner}}_' || x FROM generate_series(0, {{.Makers}} - 1) x){{end}}
BEGIN;

-- 1. Is this a server on which Writ's promises hold?
DO $writ$
BEGIN
  IF current_setting('server_version_num')::int < 160000 THEN
    RAISE EXCEPTION 'PostgreSQL % is too old, expected 16 or later: before, CREATEROLE was nearly superuser, and SET ROLE could outlive a role',
      current_setting('server_version');
  END IF;
{{- if .Database}}
  IF current_database() <> {{lit .Database}} THEN
    RAISE EXCEPTION 'this is the database %, expected %', current_database(), {{lit .Database}};
  END IF;
{{- end}}
END $writ$;

-- 2. The owner of Writ's functions, as whom nobody can log in, and its makers: they make
--    and drop the roles of leases, which on 16 and later is all that CREATEROLE lets them
--    do, and only when a function of the owner's tells them to. There are several because
--    each change of a role takes its maker time for every other role that it has made.
DO $writ$
DECLARE
  maker text;
  r     record;
BEGIN
  IF to_regrole({{lit (id .Owner)}}) IS NULL THEN
    CREATE ROLE {{id .Owner}} NOLOGIN NOINHERIT;
  END IF;
  FOREACH maker IN ARRAY {{template "makers" .}} LOOP
    IF to_regrole(quote_ident(maker)) IS NULL THEN
      EXECUTE format('CREATE ROLE %I NOLOGIN NOINHERIT CREATEROLE', maker);
    END IF;
  END LOOP;
  FOR r IN SELECT * FROM pg_roles WHERE rolname = {{lit .Owner}} OR rolname = ANY ({{template "makers" .}}) LOOP
    IF r.rolsuper OR r.rolcanlogin OR r.rolreplication OR r.rolbypassrls OR r.rolcreatedb OR r.rolcreaterole <> (r.rolname <> {{lit .Owner}}) THEN
      RAISE EXCEPTION 'role % exists and has other powers than Writ needs: choose another owner', r.rolname;
    END IF;
  END LOOP;
  -- Roles are the server's, not a database's: with an owner in common, one database
  -- would see the other's leases as strangers and disarm them.
  IF EXISTS (SELECT FROM pg_shdepend d WHERE d.refclassid = 'pg_authid'::regclass AND d.refobjid = to_regrole({{lit (id .Owner)}})
      AND d.dbid NOT IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))) THEN
    RAISE EXCEPTION 'role % owns something in another database: give each database an owner of its own (--owner)', {{lit .Owner}};
  END IF;
END $writ$;

-- 3. The account that Writ logs in as. It can call Writ's functions, and nothing else.
DO $writ$
DECLARE r record;
BEGIN
  SELECT * INTO r FROM pg_roles WHERE rolname = {{lit .Account}};
  IF NOT FOUND THEN
    CREATE ROLE {{id .Account}} LOGIN NOINHERIT;
  ELSIF r.rolsuper OR r.rolcreaterole OR r.rolcreatedb OR r.rolreplication OR r.rolbypassrls THEN
    RAISE EXCEPTION 'role % exists and has powers of its own: choose another', {{lit .Account}};
  END IF;
END $writ$;
{{- if .Verifier}}
ALTER ROLE {{id .Account}} PASSWORD {{lit .Verifier}};
{{- else}}
-- Its password is not here. Set it with \password {{id .Account}} in psql.
{{- end}}

-- 4. Who is no superuser becomes a member of these while this runs.
DO $writ$
DECLARE r text;
BEGIN
  IF NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
    FOREACH r IN ARRAY {{lit .Owner}}::text || {{template "makers" .}} LOOP
      EXECUTE format('GRANT %I TO %I WITH INHERIT TRUE, SET TRUE', r, current_user);
    END LOOP;
  END IF;
END $writ$;

-- 5. The schema.
DO $writ$
BEGIN
  IF to_regnamespace({{lit (id .Schema)}}) IS NULL THEN
    CREATE SCHEMA {{id .Schema}} AUTHORIZATION {{id .Owner}};
  ELSIF (SELECT nspowner FROM pg_namespace WHERE nspname = {{lit .Schema}}) <> to_regrole({{lit (id .Owner)}}) THEN
    RAISE EXCEPTION 'schema % exists and is not owned by %: choose another', {{lit .Schema}}, {{lit .Owner}};
  END IF;
END $writ$;

SET LOCAL ROLE {{id .Owner}};

-- 6. Tables. Nobody but the owner can read them.
--    One row for each lease: while a lease lives, its tenant; afterwards a tombstone,
--    which refuses a mint that comes late. The row also serialises what happens to one
--    role. An advisory lock would do that too, but any agent could hold it.
CREATE TABLE IF NOT EXISTS {{id .Schema}}.lease (
  role     text PRIMARY KEY,
  groups   text[],
  tenant   text,
  oid      oid,         -- of the role, to know a session that outlives it
  ended_at timestamptz  -- when it was disarmed
);
CREATE TABLE IF NOT EXISTS {{id .Schema}}.groups (name text PRIMARY KEY);
CREATE TABLE IF NOT EXISTS {{id .Schema}}.settings (
  one                 boolean PRIMARY KEY DEFAULT true CHECK (one),
  max_ttl             interval NOT NULL,
  tenants             text NOT NULL CHECK (tenants IN ('required', 'optional', 'none')),
  connection_limit    int NOT NULL,
  statement_timeout   int NOT NULL, -- milliseconds, 0 none
  transaction_timeout int NOT NULL, -- idle in transaction, milliseconds, 0 none
  search_path         text[] NOT NULL
);

-- 7. Functions. All run as the owner with a pinned search_path, and act on no role but
--    those that are named after a lease.
{{- define "head"}} LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp{{end}}
{{- define "durable"}}
  -- The end of a lease must survive a crash, even where commits need not.
  IF current_setting('synchronous_commit') IN ('off', 'local') THEN
    PERFORM set_config('synchronous_commit', 'on', true);
  END IF;
{{- end}}

-- Has statements about one lease's role run by its maker.
CREATE OR REPLACE FUNCTION {{id .Schema}}.have(p_role text, VARIADIC p_statements text[]) RETURNS void{{template "head"}} AS $writ$
BEGIN
  -- By the last random bits of the lease's id.
  EXECUTE format('SELECT {{id .Schema}}.maker_%s($1)',
    (32 * strpos('0123456789abcdefghijklmnopqrstuv', substr(p_role, 33, 1)) + strpos('0123456789abcdefghijklmnopqrstuv', substr(p_role, 34, 1))) % {{.Makers}})
    USING p_statements;
END $writ$;

-- Lets the maker act as the role, which ending its sessions and dropping what it owns take.
CREATE OR REPLACE FUNCTION {{id .Schema}}.inherit(p_role text) RETURNS void{{template "head"}} AS $writ$
BEGIN
  IF NOT EXISTS (SELECT FROM pg_auth_members m WHERE m.roleid = to_regrole(p_role) AND m.inherit_option
      AND m.member IN (SELECT r.oid FROM pg_roles r WHERE r.rolname = ANY ({{template "makers" .}}))) THEN
    PERFORM {{id .Schema}}.have(p_role, format('GRANT %I TO CURRENT_USER WITH INHERIT TRUE, SET FALSE', p_role));
  END IF;
END $writ$;

-- Ends the sessions of a role.
CREATE OR REPLACE FUNCTION {{id .Schema}}.terminate(p_role text) RETURNS void{{template "head"}} AS $writ$
BEGIN
  PERFORM {{id .Schema}}.inherit(p_role);
  PERFORM {{id .Schema}}.have(p_role, format('SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usesysid = %s', to_regrole(p_role)::oid));
END $writ$;

-- Makes the role of a lease, or gives it a new password if a mint is tried again.
-- p_verifier is a SCRAM-SHA-256 verifier: the password itself never comes here.
-- p_deadline is by the clock of this server. Returns that clock.
CREATE OR REPLACE FUNCTION {{id .Schema}}.mint(
  p_role text, p_verifier text, p_groups text[], p_tenant text, p_ttl interval, p_deadline timestamptz
) RETURNS timestamptz{{template "head"}} AS $writ$
DECLARE
  s    {{id .Schema}}.settings;
  todo text[];
BEGIN
  SELECT * INTO STRICT s FROM {{id .Schema}}.settings;
  IF (p_role ~ '{{.Pattern}}') IS NOT TRUE THEN
    RAISE EXCEPTION 'the role is not named after a lease' USING ERRCODE = 'WR001';
  ELSIF (length(p_verifier) < 200 AND p_verifier ~ '^SCRAM-SHA-256\$[1-9][0-9]{3,5}:[A-Za-z0-9+/]{16,64}={0,2}\$[A-Za-z0-9+/]{43}=:[A-Za-z0-9+/]{43}=$') IS NOT TRUE THEN
    RAISE EXCEPTION 'the verifier is no SCRAM-SHA-256 verifier' USING ERRCODE = 'WR001';
  ELSIF (p_ttl > interval '0' AND p_ttl <= s.max_ttl) IS NOT TRUE THEN
    RAISE EXCEPTION 'the lease would live longer than max_ttl, %', s.max_ttl USING ERRCODE = 'WR001';
  ELSIF (cardinality(p_groups) BETWEEN 1 AND 16) IS NOT TRUE
      OR (SELECT count(*) FROM {{id .Schema}}.groups a WHERE a.name = ANY (p_groups)) <> cardinality(p_groups) THEN
    RAISE EXCEPTION 'a group is not in the list of {{.Schema}}.groups' USING ERRCODE = 'WR001';
  ELSIF (p_tenant IS NULL AND s.tenants = 'required') OR (p_tenant IS NOT NULL AND s.tenants = 'none') OR p_tenant = '' THEN
    RAISE EXCEPTION 'a tenant is %', CASE s.tenants WHEN 'none' THEN 'not wanted' ELSE 'missing' END USING ERRCODE = 'WR001';
  END IF;
  -- What a crash of this server loses of a mint is access, so it need not wait for the disk.
  PERFORM set_config('synchronous_commit', 'off', true);

  INSERT INTO {{id .Schema}}.lease AS l (role, groups, tenant) VALUES (p_role, p_groups, p_tenant)
    ON CONFLICT (role) DO UPDATE SET groups = l.groups
    WHERE l.ended_at IS NULL AND l.groups = excluded.groups AND l.tenant IS NOT DISTINCT FROM excluded.tenant;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'the lease has ended' USING ERRCODE = 'WR002';
  END IF;
  todo := ARRAY[format('%s ROLE %I LOGIN PASSWORD %L VALID UNTIL %L CONNECTION LIMIT %s',
    CASE WHEN EXISTS (SELECT FROM pg_roles WHERE rolname = p_role) THEN 'ALTER' ELSE 'CREATE' END,
    p_role, p_verifier, clock_timestamp() + p_ttl, s.connection_limit)];
  -- These are there for accidents: a session can change them.
  IF s.statement_timeout > 0 THEN
    todo := todo || format('ALTER ROLE %I SET statement_timeout = %s', p_role, s.statement_timeout);
  END IF;
  IF s.transaction_timeout > 0 THEN
    todo := todo || format('ALTER ROLE %I SET idle_in_transaction_session_timeout = %s', p_role, s.transaction_timeout);
  END IF;
  IF cardinality(s.search_path) > 0 THEN
    todo := todo || format('ALTER ROLE %I SET search_path = %s', p_role, (SELECT string_agg(quote_ident(x), ', ') FROM unnest(s.search_path) x));
  END IF;
  -- Last, since it locks the group until the commit, and in one order, so that two mints
  -- can't wait for each other. SET FALSE: no SET ROLE, in which a session would outlive its role.
  todo := todo || ARRAY(SELECT format('GRANT %I TO %I WITH INHERIT TRUE, SET FALSE', g, p_role) FROM unnest(p_groups) g ORDER BY g);
  PERFORM {{id .Schema}}.have(p_role, VARIADIC todo);
  UPDATE {{id .Schema}}.lease SET oid = (SELECT r.oid FROM pg_roles r WHERE r.rolname = p_role) WHERE role = p_role;
  IF (clock_timestamp() < p_deadline) IS NOT TRUE THEN
    RAISE EXCEPTION 'the mint came after its deadline' USING ERRCODE = 'WR003';
  END IF;
  RETURN clock_timestamp();
END $writ$;

-- Makes roles unable to log in, for good, whether they exist or not. Each answer is for
-- one role: problem is NULL once it is disarmed. The caller commits and goes on to kill.
CREATE OR REPLACE FUNCTION {{id .Schema}}.disarm(p_roles text[]) RETURNS TABLE (role text, problem text){{template "head"}}
  SET lock_timeout = '50ms' AS $writ$
DECLARE
  begun timestamptz := clock_timestamp();
  busy  text[];
  o     oid;
BEGIN
{{- template "durable"}}
  SELECT coalesce(array_agg(DISTINCT a.usename::text), '{}') INTO busy FROM pg_stat_activity a WHERE a.usename = ANY (p_roles::name[]);
  FOR role IN SELECT DISTINCT x, x = ANY (busy) FROM unnest(p_roles) x ORDER BY 2, 1 LOOP
    problem := NULL;
    IF (role ~ '{{.Pattern}}') IS NOT TRUE THEN
      problem := 'is not named after a lease';
    ELSIF clock_timestamp() > begun + interval '500 ms' THEN
      problem := 'was not its turn yet'; -- so that what has been done is committed
    ELSE
      BEGIN
        -- Waits for a mint that is under way.
        INSERT INTO {{id .Schema}}.lease AS l (role, ended_at) VALUES (disarm.role, clock_timestamp())
          ON CONFLICT ON CONSTRAINT lease_pkey DO UPDATE SET ended_at = coalesce(l.ended_at, excluded.ended_at);
        -- Not by to_regrole: its cache need not know yet of a mint that this has waited for.
        SELECT r.oid INTO o FROM pg_roles r WHERE r.rolname = disarm.role;
        IF o IS NOT NULL THEN
          -- An agent could have altered its own role in a transaction that it keeps open,
          -- for which the next statement would have to wait.
          IF role = ANY (busy) THEN
            PERFORM {{id .Schema}}.terminate(role);
          END IF;
          PERFORM {{id .Schema}}.have(role, format('ALTER ROLE %I NOLOGIN PASSWORD NULL VALID UNTIL ''-infinity'' CONNECTION LIMIT 0', role));
        END IF;
      EXCEPTION WHEN OTHERS THEN
        problem := format('can''t be disarmed: %s (%s)', SQLERRM, SQLSTATE);
      END;
    END IF;
    RETURN NEXT;
  END LOOP;
END $writ$;

-- Ends the sessions of roles and lists them. Rows without a role are connections that
-- are being made, by whom is not known yet.
CREATE OR REPLACE FUNCTION {{id .Schema}}.kill(p_roles text[]) RETURNS TABLE (role text, pid int, since timestamptz, address text){{template "head"}}
  SET lock_timeout = '50ms' AS $writ$
BEGIN
  FOR role, pid, since, address IN
    SELECT a.usename, a.pid, a.backend_start, coalesce(host(a.client_addr), '') FROM pg_stat_activity a
     WHERE a.usename = ANY (p_roles::name[]) AND a.usename ~ '{{.Pattern}}' ORDER BY 1
  LOOP
    BEGIN
      PERFORM {{id .Schema}}.inherit(role);
      PERFORM {{id .Schema}}.have(role, format('SELECT pg_terminate_backend(%s)', pid));
    EXCEPTION WHEN OTHERS THEN
      NULL; -- it is listed, so the caller knows that it is there
    END;
    RETURN NEXT;
  END LOOP;
  -- A connection that has shown its password is in a transaction, but is not seen in
  -- pg_stat_activity as its role's before that transaction ends.
  RETURN QUERY SELECT NULL::text, l.pid, NULL::timestamptz, ''::text FROM pg_locks l
    WHERE l.locktype = 'virtualxid' AND l.pid <> pg_backend_pid() AND NOT EXISTS (
      SELECT FROM pg_stat_activity a WHERE a.pid = l.pid AND (a.usesysid IS NOT NULL OR a.backend_type <> 'client backend'));
END $writ$;

-- Drops roles that are disarmed and have no sessions. Each answer is for one role:
-- problem is NULL once it is gone.
CREATE OR REPLACE FUNCTION {{id .Schema}}.reap(p_roles text[]) RETURNS TABLE (role text, problem text){{template "head"}}
  SET lock_timeout = '50ms' AS $writ$
DECLARE
  begun timestamptz := clock_timestamp();
  busy  text[];
  ended timestamptz;
  o     oid;
  armed boolean;
BEGIN
{{- template "durable"}}
  SELECT coalesce(array_agg(DISTINCT a.usename::text), '{}') INTO busy FROM pg_stat_activity a WHERE a.usename = ANY (p_roles::name[]);
  FOR role IN SELECT DISTINCT x FROM unnest(p_roles) x ORDER BY 1 LOOP
    problem := NULL;
    IF (role ~ '{{.Pattern}}') IS NOT TRUE THEN
      problem := 'is not named after a lease';
    ELSIF role = ANY (busy) THEN
      problem := 'has sessions that do not end';
    ELSIF clock_timestamp() > begun + interval '1 s' THEN
      problem := 'was not its turn yet';
    ELSE
      BEGIN
        SELECT l.ended_at INTO ended FROM {{id .Schema}}.lease l WHERE l.role = reap.role FOR UPDATE;
        SELECT r.oid, r.rolcanlogin INTO o, armed FROM pg_roles r WHERE r.rolname = reap.role;
        IF ended IS NULL THEN
          problem := 'is not disarmed';
        ELSIF armed THEN
          problem := 'can log in again: somebody altered it';
        ELSIF o IS NOT NULL THEN
          IF EXISTS (SELECT FROM pg_shdepend d WHERE d.refclassid = 'pg_authid'::regclass AND d.refobjid = o) THEN
            PERFORM {{id .Schema}}.inherit(role);
            PERFORM {{id .Schema}}.have(role, format('DROP OWNED BY %I', role));
          END IF;
          PERFORM {{id .Schema}}.have(role, format('DROP ROLE %I', role));
        END IF;
      EXCEPTION
        WHEN lock_not_available THEN
          problem := format('can''t be dropped: %s (%s)', SQLERRM, SQLSTATE);
          PERFORM {{id .Schema}}.unblock(role, o);
        WHEN OTHERS THEN
          problem := format('can''t be dropped: %s (%s)', SQLERRM, SQLSTATE);
      END;
    END IF;
    RETURN NEXT;
  END LOOP;
END $writ$;

-- Ends the sessions of other leases that hold a role's lock: whoever names a role in ALTER
-- DEFAULT PRIVILEGES holds it until the end of the transaction, and needs no right to.
CREATE OR REPLACE FUNCTION {{id .Schema}}.unblock(p_role text, p_oid oid) RETURNS void{{template "head"}} AS $writ$
DECLARE
  holder record;
BEGIN
  FOR holder IN
    SELECT DISTINCT a.usename::text AS role, a.pid FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
     WHERE l.locktype = 'object' AND l.classid = 'pg_authid'::regclass AND l.objid = p_oid AND l.granted
       AND a.usename ~ '{{.Pattern}}' AND a.usename <> p_role
  LOOP
    BEGIN
      PERFORM {{id .Schema}}.inherit(holder.role);
      PERFORM {{id .Schema}}.have(holder.role, format('SELECT pg_terminate_backend(%s)', holder.pid));
    EXCEPTION WHEN OTHERS THEN
      NULL; -- the next attempt comes
    END;
  END LOOP;
END $writ$;

-- Lists what is left of roles: the role, or a session that outlives it.
CREATE OR REPLACE FUNCTION {{id .Schema}}.remains(p_roles text[]) RETURNS TABLE (role text, problem text){{template "head"}} AS $writ$
BEGIN
  RETURN QUERY SELECT r.rolname::text, 'is there still' FROM pg_roles r WHERE r.rolname = ANY (p_roles::name[])
    UNION ALL
    SELECT l.role, format('is gone, but its session with the process id %s is not', a.pid)
      FROM {{id .Schema}}.lease l JOIN pg_stat_activity a ON a.usesysid = l.oid AND a.usename IS NULL
     WHERE l.role = ANY (p_roles);
END $writ$;

-- Lists the roles of leases that these makers made, and their sessions.
CREATE OR REPLACE FUNCTION {{id .Schema}}.survey() RETURNS TABLE (role text, armed boolean, pid int, since timestamptz, address text){{template "head"}} AS $writ$
BEGIN
  RETURN QUERY SELECT r.rolname::text, r.rolcanlogin AND coalesce(r.rolvaliduntil > clock_timestamp(), true),
      a.pid, a.backend_start, coalesce(host(a.client_addr), '')
    FROM pg_roles r
    JOIN pg_auth_members m ON m.roleid = r.oid AND m.admin_option
     AND m.member IN (SELECT x.oid FROM pg_roles x WHERE x.rolname = ANY ({{template "makers" .}}))
    LEFT JOIN pg_stat_activity a ON a.usesysid = r.oid
   WHERE r.rolname ~ '{{.Pattern}}' ORDER BY 1, 3;
END $writ$;

-- Forgets tombstones, oldest first, that no mint can be late for any more.
CREATE OR REPLACE FUNCTION {{id .Schema}}.purge(p_limit int) RETURNS bigint{{template "head"}} AS $writ$
DECLARE n bigint;
BEGIN
  DELETE FROM {{id .Schema}}.lease WHERE role IN (
    SELECT l.role FROM {{id .Schema}}.lease l
     WHERE l.ended_at < clock_timestamp() - interval '2 hours' AND NOT EXISTS (SELECT FROM pg_roles r WHERE r.rolname = l.role)
     ORDER BY l.role LIMIT p_limit FOR UPDATE SKIP LOCKED);
  GET DIAGNOSTICS n = ROW_COUNT;
  RETURN n;
END $writ$;

-- What doctor can't see as the account.
CREATE OR REPLACE FUNCTION {{id .Schema}}.facts() RETURNS jsonb{{template "head"}} AS $writ$
BEGIN
  RETURN jsonb_build_object(
    'settings', (SELECT to_jsonb(s) - 'max_ttl' - 'one' || jsonb_build_object('max_ttl', extract(epoch FROM s.max_ttl)) FROM {{id .Schema}}.settings s),
    'groups', (SELECT coalesce(jsonb_agg(g.name ORDER BY g.name), '[]') FROM {{id .Schema}}.groups g),
    'tombstones', (SELECT count(*) FROM {{id .Schema}}.lease l WHERE l.ended_at IS NOT NULL),
    'due', (SELECT count(*) FROM {{id .Schema}}.lease l WHERE l.ended_at < clock_timestamp() - interval '3 hours'),
    'owner', current_user);
END $writ$;

-- The tenant of the lease that this session logged in with, for row-level security:
--   CREATE POLICY lease ON t TO a_group USING (tenant = (SELECT {{.Schema}}.tenant()));
-- It goes by session_user, which a session can't change. NULL, so no rows, for all others.
CREATE OR REPLACE FUNCTION {{id .Schema}}.tenant() RETURNS text
  LANGUAGE sql STABLE SECURITY DEFINER PARALLEL SAFE SET search_path = pg_catalog, pg_temp
  AS $writ$ SELECT l.tenant FROM {{id .Schema}}.lease l WHERE l.role = session_user::text $writ$;

-- The version of all this. Writ refuses to work with an older one than its own.
CREATE OR REPLACE FUNCTION {{id .Schema}}.version() RETURNS int LANGUAGE sql IMMUTABLE AS $writ$ SELECT {{.Version}} $writ$;

-- 8. What Writ's configuration says, minters.*.postgres.
INSERT INTO {{id .Schema}}.settings (max_ttl, tenants, connection_limit, statement_timeout, transaction_timeout, search_path)
VALUES (interval '{{ms .MaxTTL}} ms', {{lit .Tenants}}, {{.ConnectionLimit}}, {{ms .StatementTimeout}}, {{ms .TransactionTimeout}}, ARRAY[{{lits .SearchPath}}]::text[])
ON CONFLICT (one) DO UPDATE SET (max_ttl, tenants, connection_limit, statement_timeout, transaction_timeout, search_path) =
  (excluded.max_ttl, excluded.tenants, excluded.connection_limit, excluded.statement_timeout, excluded.transaction_timeout, excluded.search_path);
-- A group that is no longer listed is not given to new leases.
DELETE FROM {{id .Schema}}.groups WHERE name <> ALL (ARRAY[{{lits .Groups}}]::text[]);
INSERT INTO {{id .Schema}}.groups SELECT unnest(ARRAY[{{lits .Groups}}]::text[]) ON CONFLICT DO NOTHING;

-- 9. Who may call what.
REVOKE ALL ON ALL TABLES IN SCHEMA {{id .Schema}} FROM PUBLIC, {{id .Account}};
REVOKE ALL ON FUNCTION
  {{funcs .Schema}}
  FROM PUBLIC, {{id .Account}};
GRANT USAGE ON SCHEMA {{id .Schema}} TO {{id .Account}};
GRANT EXECUTE ON FUNCTION {{id .Schema}}.mint, {{id .Schema}}.disarm, {{id .Schema}}.kill, {{id .Schema}}.reap, {{id .Schema}}.remains,
  {{id .Schema}}.survey, {{id .Schema}}.purge, {{id .Schema}}.facts, {{id .Schema}}.version TO {{id .Account}};

-- Each maker does what the owner's functions have it do, and nobody else's.
DO $writ$
DECLARE
  n     int := 0;
  maker text;
BEGIN
  FOREACH maker IN ARRAY {{template "makers" .}} LOOP
    EXECUTE format('GRANT CREATE, USAGE ON SCHEMA {{id .Schema}} TO %I', maker);
    EXECUTE format('SET LOCAL ROLE %I', maker);
    EXECUTE format('CREATE OR REPLACE FUNCTION {{id .Schema}}.maker_%s(p_statements text[]) RETURNS void
      LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
      AS %L', n, 'DECLARE s text; BEGIN FOREACH s IN ARRAY p_statements LOOP EXECUTE s; END LOOP; END');
    EXECUTE format('REVOKE ALL ON FUNCTION {{id .Schema}}.maker_%s FROM PUBLIC', n);
    EXECUTE format('GRANT EXECUTE ON FUNCTION {{id .Schema}}.maker_%s TO {{id .Owner}}', n);
    RESET ROLE;
    EXECUTE format('REVOKE CREATE ON SCHEMA {{id .Schema}} FROM %I', maker);
    n := n + 1;
  END LOOP;
END $writ$;

-- 10. The groups: what a lease can be given. Grant them what agents may do, and no more:
--     reading only, if they are to read only.
{{- range .Groups}}
DO $writ$
DECLARE
  bad   text;
  maker text;
BEGIN
  IF to_regrole({{lit (id .)}}) IS NULL THEN
    CREATE ROLE {{id .}} NOLOGIN;
  END IF;
  -- A group that leads to the server's own roles, or to more than rights on data.
  WITH RECURSIVE up AS (
    SELECT to_regrole({{lit (id .)}})::oid AS oid
    UNION SELECT m.roleid FROM pg_auth_members m JOIN up ON m.member = up.oid)
  SELECT string_agg(r.rolname, ', ') INTO bad FROM up JOIN pg_roles r USING (oid)
   WHERE r.rolsuper OR r.rolcreaterole OR r.rolreplication OR r.rolbypassrls OR r.rolcanlogin OR r.rolname ~ '^pg_';
  IF bad IS NOT NULL THEN
    RAISE EXCEPTION 'group % is or leads to %, which is more than rights on data', {{lit .}}, bad;
  END IF;
  FOREACH maker IN ARRAY {{template "makers" $}} LOOP
    EXECUTE format('GRANT {{id .}} TO %I WITH ADMIN TRUE, INHERIT FALSE, SET FALSE', maker);
  END LOOP;
END $writ$;
GRANT USAGE ON SCHEMA {{id $.Schema}} TO {{id .}};
GRANT EXECUTE ON FUNCTION {{id $.Schema}}.tenant TO {{id .}};
{{- end}}
DO $writ$
DECLARE r text;
BEGIN
  FOREACH r IN ARRAY ARRAY[{{lits .Groups}}, {{lit .Account}}]::text[] LOOP
    EXECUTE format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), r);
  END LOOP;
END $writ$;

-- 11. Powers of the server that this needs: the owner sees when and whence sessions of
--     leases began; the account gets in when agents have taken every other connection
--     (set reserved_connections too: it needs a restart).
GRANT pg_read_all_stats TO {{id .Owner}} WITH ADMIN FALSE, INHERIT TRUE, SET FALSE;
DO $writ$
BEGIN
  GRANT pg_use_reserved_connections TO {{id .Account}} WITH ADMIN FALSE, INHERIT TRUE, SET FALSE;
EXCEPTION WHEN insufficient_privilege THEN
  RAISE WARNING 'pg_use_reserved_connections could not be granted to %: ask who can', {{lit .Account}};
END $writ$;
ALTER ROLE {{id .Account}} SET default_transaction_isolation = 'read committed';
ALTER ROLE {{id .Account}} SET statement_timeout = '10s';
ALTER ROLE {{id .Account}} SET idle_in_transaction_session_timeout = '10s';
DO $writ$
BEGIN
  -- Verifiers are no passwords, but need not stand in logs either.
  ALTER ROLE {{id .Account}} SET log_parameter_max_length = 0;
  ALTER ROLE {{id .Account}} SET log_parameter_max_length_on_error = 0;
EXCEPTION WHEN insufficient_privilege THEN
  RAISE NOTICE 'log_parameter_max_length was not set for %: that takes a superuser', {{lit .Account}};
END $writ$;
{{- if .Harden}}

-- 12. What PUBLIC can do, an agent can do. These take from PUBLIC what would make an
--     agent the owner of something. Roles of yours that need one of them must be granted
--     it; leave this step out with --no-harden.
DO $writ$
BEGIN
  EXECUTE format('REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC', current_database());
END $writ$;
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
REVOKE EXECUTE ON FUNCTION pg_catalog.lo_creat(int), pg_catalog.lo_create(oid), pg_catalog.lo_from_bytea(oid, bytea) FROM PUBLIC;
{{- end}}

-- 13. The end of the memberships of step 4.
DO $writ$
DECLARE r text;
BEGIN
  IF NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
    FOREACH r IN ARRAY {{lit .Owner}}::text || {{template "makers" .}} LOOP
      EXECUTE format('REVOKE %I FROM %I GRANTED BY %I', r, current_user, current_user);
    END LOOP;
  END IF;
END $writ$;

COMMIT;
