// A real OpenID provider (the npm package oidc-provider) for Writ's tests.
//
// TEST ONLY: it signs anybody in who is named in login_hint, its secrets are
// fixed, its state is in memory and its control API is open to whoever reaches
// the loopback interface.
//
// Usage: node idp.mjs ['{"port": 0, …}']      (or the same JSON in IDP_CONFIG)
//
// It prints one JSON line when ready and ends when its standard input closes,
// so that nothing is left behind by a test that was killed; keep the input
// open when you start it by hand.

import { generateKeyPair, randomBytes } from 'node:crypto';
import { createServer, STATUS_CODES } from 'node:http';
import { request as httpsRequest } from 'node:https';
import { Readable } from 'node:stream';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';

import { createLocalJWKSet, jwtVerify } from 'jose'; // of oidc-provider
import { Provider, errors } from 'oidc-provider';

const EXCHANGE = 'urn:ietf:params:oauth:grant-type:token-exchange';
const TOKEN_TYPE = 'urn:ietf:params:oauth:token-type:';
const CIBA = 'urn:openid:params:grant-type:ciba';

// CIBA Core §7.3: a client that was told no interval has to assume this one.
const SPEC_INTERVAL = 5;

const config = readConfig({
  port: 0,
  control_port: 0,
  // The audience of the agents' access tokens.
  resource: 'urn:writ:test',
  resource_scope: 'writ',
  // Seconds between polls as sent to the client; 0 sends none.
  interval: 1,
  // How many seconds early a poll may arrive: the network may squeeze a gap.
  tolerance: 0.1,
  // Seconds that a prompt lives: without requested_expiry, and at most.
  expires_in: 120,
  max_expires_in: 600,
  token_ttl: 300,
  // RS256 or ES256, for access and ID tokens alike.
  signing_alg: 'RS256',
  binding_message_max: 128,
  // A regular expression for what else a binding message has to be; providers
  // in the field are stricter than printable.
  binding_message_pattern: '',
  users: {},
  // Further agents, id → secret.
  clients: {},
  // Besides /callback on any port of the loopback interface.
  redirect_uris: [],
  // Who signs in when a request has no login_hint; none: access_denied.
  default_user: '',
  // The types of RFC 9396 authorization_details to accept; none turns it off.
  authorization_details_types: [],
  // {endpoint, ca}: makes the client "writ" a ping client. The endpoint has to
  // be https, so the PEM certificates to trust come along.
  ping: null,
  // {audience, scope, ttl, jwks}: lets the client "writ" exchange the users' access
  // tokens (RFC 8693) for opaque ones of that audience, at most of that scope. jwks are
  // Writ's public keys: with them there is the client "writ-key" as well, which
  // authenticates by private_key_jwt, and an actor_token can be shown.
  exchange: null,
});

const users = {
  alice: { groups: ['sales'] },
  bob: { groups: ['hr'] },
  carol: { groups: ['finance'] },
  ...config.users,
};

const secretOf = (id) => `${id}-test-only-secret`;
const agents = {
  ...Object.fromEntries(['sales-agent', 'hr-agent', 'finance-agent'].map((id) => [id, secretOf(id)])),
  ...config.clients,
};
const writ = { writ: secretOf('writ') };

function readConfig(defaults) {
  const given = JSON.parse(process.env.IDP_CONFIG || process.argv[2] || '{}');
  for (const key of Object.keys(given)) {
    if (!(key in defaults)) fail(`unknown configuration key ${JSON.stringify(key)}`);
  }
  return { ...defaults, ...given };
}

function fail(message) {
  console.error(`idp: ${message}`);
  process.exit(1);
}

if (typeof URL.parse !== 'function') {
  fail(`Node.js ${process.version} is too old: oidc-provider needs URL.parse (a late 20, or 22 and newer)`);
}

// ---------------------------------------------------------------- state

const now = () => new Date().toISOString();

let control; // address of the control API
const state = {};

function reset() {
  state.store = new Map();
  state.prompts = new Map(); // auth_req_id → prompt
  state.throttle = new Map(); // auth_req_id → {interval, last, inflight}
  state.promptCount = 0;
  state.polls = [];
  state.requests = [];
  state.faults = [];
  state.trapped = [];
  state.hits = {};
}
reset();

// Adapter keeps what oidc-provider stores. Its own memory adapter won't do: it
// holds only 1000 entries, and forgets a backchannel request at the very moment
// that it expires, so that a client would see invalid_grant, never expired_token.
class Adapter {
  static grace = 600_000;

  constructor(model) {
    this.model = model;
  }

  key(id) {
    return `${this.model}:${id}`;
  }

  async upsert(id, payload, ttl) {
    const until = ttl ? Date.now() + ttl * 1000 + Adapter.grace : Infinity;
    state.store.set(this.key(id), { payload, until });
  }

  async find(id) {
    const entry = state.store.get(this.key(id));
    if (entry && entry.until <= Date.now()) {
      state.store.delete(this.key(id));
      return undefined;
    }
    return entry?.payload;
  }

  async findByUid(uid) {
    return this.#search((payload) => payload.uid === uid);
  }

  async findByUserCode(userCode) {
    return this.#search((payload) => payload.userCode === userCode);
  }

  #search(matches) {
    for (const [key, { payload }] of state.store) {
      if (key.startsWith(`${this.model}:`) && matches(payload)) return payload;
    }
    return undefined;
  }

  // oidc-provider reads, then consumes; two redemptions at once get past its
  // own check, so that the second is refused here.
  async consume(id) {
    const payload = await this.find(id);
    if (!payload || payload.consumed) throw new errors.InvalidGrant('already consumed');
    payload.consumed = Math.floor(Date.now() / 1000);
  }

  async destroy(id) {
    state.store.delete(this.key(id));
  }

  async revokeByGrantId(grantId) {
    for (const [key, { payload }] of state.store) {
      if (key.startsWith(`${this.model}:`) && payload.grantId === grantId) state.store.delete(key);
    }
  }
}

// Prune: a benchmark makes tokens by the hundred thousand.
setInterval(() => {
  for (const [key, { until }] of state.store) {
    if (until <= Date.now()) state.store.delete(key);
  }
}, 60_000).unref();

// ---------------------------------------------------------------- provider

async function freshKeys() {
  const generate = promisify(generateKeyPair);
  const pairs = await Promise.all([
    generate('rsa', { modulusLength: 2048 }),
    generate('ec', { namedCurve: 'P-256' }),
  ]);
  // A new kid at each start makes every restart a key rotation as well.
  const run = randomBytes(6).toString('hex');
  return ['RS256', 'ES256'].map((alg, i) => ({
    ...pairs[i].privateKey.export({ format: 'jwk' }),
    alg,
    use: 'sig',
    kid: `${alg.toLowerCase()}-${run}`,
  }));
}

function findUser(hint) {
  if (Object.hasOwn(users, hint)) return hint;
  // A login hint need not be the subject; a client must not take one for the other.
  const id = hint.endsWith('@example.test') ? hint.slice(0, -'@example.test'.length) : '';
  return Object.hasOwn(users, id) ? id : undefined;
}

function claimsOf(id) {
  const { groups = [], claims = {} } = users[id];
  return { groups, ...claims };
}

function clientMetadata() {
  const common = {
    token_endpoint_auth_method: 'client_secret_basic',
    id_token_signed_response_alg: config.signing_alg,
    redirect_uris: ['http://127.0.0.1/callback', 'http://localhost/callback', ...config.redirect_uris],
    response_types: ['code'],
    // Only for native clients is the port of a loopback redirect URI free (RFC
    // 8252 §7.3), and tests don't know theirs beforehand.
    application_type: 'native',
    ...(config.authorization_details_types.length
      ? { authorization_details_types: config.authorization_details_types } : {}),
  };
  const list = Object.entries(agents).map(([id, secret]) => ({
    ...common,
    client_id: id,
    client_secret: secret,
    grant_types: ['authorization_code', 'client_credentials'],
  }));
  for (const [id, secret] of Object.entries(writ)) {
    list.push({
      ...common,
      client_id: id,
      client_secret: secret,
      grant_types: ['authorization_code', CIBA, ...(config.exchange ? [EXCHANGE] : [])],
      backchannel_token_delivery_mode: config.ping ? 'ping' : 'poll',
      ...(config.ping ? { backchannel_client_notification_endpoint: config.ping.endpoint } : {}),
      backchannel_user_code_parameter: true,
    });
  }
  if (config.exchange?.jwks) {
    list.push({
      ...common,
      client_id: 'writ-key',
      token_endpoint_auth_method: 'private_key_jwt',
      jwks: config.exchange.jwks,
      redirect_uris: [],
      response_types: [],
      grant_types: [EXCHANGE],
    });
  }
  return list;
}

const askedDetails = (params) => (params.authorization_details ? JSON.parse(params.authorization_details) : undefined);

function providerConfig(keys) {
  return {
    adapter: Adapter,
    clients: clientMetadata(),
    jwks: { keys },
    cookies: { keys: [randomBytes(24).toString('base64url')] },
    // Everything known about a user is in both tokens: openid is the only scope
    // that Writ asks for.
    claims: {
      openid: ['sub', 'acr', 'amr', 'auth_time', ...new Set(Object.keys(users).flatMap((id) => Object.keys(claimsOf(id))))],
    },
    scopes: ['openid'],
    responseTypes: ['code'],
    pkce: { required: () => true },
    expiresWithSession: () => false,
    findAccount: (_ctx, id) => (Object.hasOwn(users, id)
      ? { accountId: id, claims: () => ({ sub: id, ...claimsOf(id) }) }
      : undefined),
    extraTokenClaims: (ctx, token) => (token.accountId
      ? { ...claimsOf(token.accountId), ...(actors.has(ctx) ? { act: actors.get(ctx) } : {}) } : undefined),
    interactions: { url: (_ctx, interaction) => `/interaction/${interaction.uid}` },
    ttl: {
      AccessToken: config.token_ttl,
      ClientCredentials: config.token_ttl,
      IdToken: config.token_ttl,
      AuthorizationCode: 60,
      Grant: 3600,
      Interaction: 600,
      Session: 3600,
      BackchannelAuthenticationRequest: (ctx) => Math.min(
        config.max_expires_in,
        Number(ctx.oidc.params.requested_expiry ?? config.expires_in),
      ),
    },
    fetch: pingFetch,
    renderError: (ctx, out) => { ctx.body = out; },
    features: {
      devInteractions: { enabled: false },
      clientCredentials: { enabled: true },
      introspection: { enabled: true },
      revocation: { enabled: true },
      resourceIndicators: {
        enabled: true,
        // An agent gets tokens for Writ even when it asks for no resource. The
        // client "writ" gets opaque ones, which alone can be revoked here.
        defaultResource: (ctx, client) => (client.clientId in writ && !ctx.oidc.params.authorization_details
          ? undefined : config.resource),
        // Otherwise a code that was asked for a resource is redeemed for an
        // opaque token, unless the client repeats the resource.
        useGrantedResource: () => true,
        getResourceServerInfo: (_ctx, resource) => {
          if (resource !== config.resource) throw new errors.InvalidTarget();
          return {
            audience: resource,
            scope: config.resource_scope,
            accessTokenTTL: config.token_ttl,
            accessTokenFormat: 'jwt',
            jwt: { sign: { alg: config.signing_alg } },
          };
        },
      },
      richAuthorizationRequests: {
        enabled: config.authorization_details_types.length > 0,
        types: Object.fromEntries(config.authorization_details_types.map((type) => [type, { validate() {} }])),
        authorizationDetailsForGrantSource: (ctx) => askedDetails(ctx.oidc.params),
        authorizationDetailsForAccessToken: (_ctx, _token, source) => source?.rar,
        authorizationDetailsForIntrospection: (_ctx, token) => token.rar,
      },
      ciba: {
        enabled: true,
        deliveryModes: ['poll', 'ping'],
        processLoginHint: (_ctx, hint) => findUser(hint),
        processLoginHintToken: () => { throw new errors.InvalidRequest('login_hint_token is not supported'); },
        validateRequestContext: () => {},
        validateBindingMessage,
        verifyUserCode,
        triggerAuthenticationDevice: addPrompt,
      },
    },
  };
}

function validateBindingMessage(_ctx, message) {
  if (message === undefined) return;
  const long = [...message].length > config.binding_message_max;
  const printable = /^[\p{L}\p{M}\p{N}\p{P}\p{S} ]+$/u.test(message);
  const fits = new RegExp(config.binding_message_pattern, 'u').test(message);
  if (long || !printable || !fits) {
    throw new errors.InvalidBindingMessage(`binding_message has to be 1 to ${config.binding_message_max} printable characters`);
  }
}

function verifyUserCode(_ctx, account, code) {
  const { user_code: wanted } = users[account.accountId];
  if (!wanted) return;
  if (!code) throw new errors.MissingUserCode('user_code is required for this user');
  if (code !== wanted) throw new errors.InvalidUserCode('user_code is wrong');
}

// pingFetch replaces fetch, which oidc-provider forbids to reach loopback.
async function pingFetch(url, { method, headers, body }) {
  return new Promise((resolve, reject) => {
    const req = httpsRequest(url, {
      method,
      ca: config.ping?.ca,
      agent: false,
      timeout: 2500,
      headers: Object.fromEntries(new Headers(headers)),
    }, (res) => {
      res.resume();
      resolve({ status: res.statusCode });
    });
    req.on('error', reject);
    req.on('timeout', () => req.destroy(new Error('ping timed out')));
    req.end(body);
  });
}

// ---------------------------------------------------------------- exchange

// actors are who acts, by the request that shows it.
const actors = new WeakMap();

// publicHalf keeps what a verifier may know of a JWK.
const publicHalf = ({ kty, kid, alg, use, n, e, crv, x, y }) => JSON.parse(JSON.stringify({ kty, kid, alg, use, n, e, crv, x, y }));

// addExchange registers the grant of RFC 8693, which oidc-provider leaves to its
// users. It has authenticated the client by then.
function addExchange(provider, keys) {
  const { audience, scope, ttl = 60, jwks } = config.exchange;
  const own = createLocalJWKSet({ keys: keys.map(publicHalf) });

  async function verified(token, set, options) {
    try {
      return (await jwtVerify(token, set, options)).payload;
    } catch {
      throw new errors.InvalidGrant('a token is not valid');
    }
  }

  async function exchange(ctx) {
    const { client, params } = ctx.oidc;
    if (params.subject_token_type !== `${TOKEN_TYPE}access_token`) throw new errors.InvalidRequest('subject_token_type is not supported');
    if (params.requested_token_type && params.requested_token_type !== `${TOKEN_TYPE}access_token`) {
      throw new errors.InvalidRequest('requested_token_type is not supported');
    }
    if (!params.subject_token || !params.actor_token !== !params.actor_token_type) throw new errors.InvalidRequest('a token or its type is missing');
    const subject = await verified(params.subject_token, own, {
      issuer: provider.issuer, audience: config.resource, typ: 'at+jwt', algorithms: [config.signing_alg],
    });
    if (!Object.hasOwn(users, subject.sub)) throw new errors.InvalidGrant('the subject is no user');
    if (params.actor_token) {
      if (!jwks || params.actor_token_type !== `${TOKEN_TYPE}jwt`) throw new errors.InvalidRequest('actor_token is not supported');
      const { iss, sub } = await verified(params.actor_token, createLocalJWKSet(jwks), { audience: provider.issuer, maxTokenAge: '5 minutes' });
      actors.set(ctx, { iss, sub });
    }
    if (params.audience !== audience) throw new errors.InvalidTarget();
    const asked = (params.scope ?? scope).split(' ');
    if (!asked.every((s) => scope.split(' ').includes(s))) throw new errors.InvalidScope('more than can be had', params.scope);

    const token = new provider.AccessToken({
      client,
      accountId: subject.sub,
      gty: EXCHANGE,
      scope: asked.join(' '),
      expiresIn: ttl,
      resourceServer: new provider.ResourceServer(audience, { audience, scope, accessTokenFormat: 'opaque' }),
    });
    ctx.oidc.entity('AccessToken', token);
    ctx.body = {
      access_token: await token.save(),
      issued_token_type: `${TOKEN_TYPE}access_token`,
      token_type: token.tokenType,
      expires_in: token.expiration,
      scope: token.scope,
    };
  }

  provider.registerGrantType(EXCHANGE, exchange, [
    'subject_token', 'subject_token_type', 'actor_token', 'actor_token_type', 'requested_token_type', 'audience', 'scope',
  ]);
}

// ---------------------------------------------------------------- prompts

function addPrompt(ctx, request, account, client) {
  const { params } = ctx.oidc;
  state.promptCount += 1;
  state.prompts.set(request.jti, {
    id: `prompt-${state.promptCount}`,
    auth_req_id: request.jti,
    account: account.accountId,
    client: client.clientId,
    scope: params.scope,
    binding_message: params.binding_message,
    acr_values: params.acr_values?.split(' ') ?? [],
    authorization_details: askedDetails(params),
    requested_expiry: params.requested_expiry === undefined ? undefined : Number(params.requested_expiry),
    expires_in: request.expiration,
    created_at: now(),
    // oidc-provider counts in whole seconds.
    expires_at: new Date((Math.floor(Date.now() / 1000) + request.expiration) * 1000).toISOString(),
    verdict: undefined,
  });
}

function promptView(prompt) {
  const { verdict, ...rest } = prompt;
  const expired = Date.now() >= Date.parse(prompt.expires_at);
  const status = { approve: 'approved', deny: 'denied' }[verdict] ?? (expired ? 'expired' : 'pending');
  return { ...rest, status };
}

// answer is what the person does on the phone.
async function answer(provider, id, verdict) {
  const prompt = [...state.prompts.values()].find((p) => p.id === id || p.auth_req_id === id);
  if (!prompt) throw new HttpError(404, `no prompt ${id}`);
  const { status } = promptView(prompt);
  if (status !== 'pending') throw new HttpError(409, `prompt ${id} is ${status}`);
  allowOnly(verdict, ['verdict', 'acr', 'amr', 'auth_time', 'as', 'error', 'error_description', 'authorization_details']);

  const request = await provider.BackchannelAuthenticationRequest.find(prompt.auth_req_id);
  if (!request) throw new HttpError(409, `prompt ${id} has expired`);

  let result;
  if (verdict.verdict === 'deny') {
    result = new errors.CustomOIDCProviderError(verdict.error ?? 'access_denied', verdict.error_description);
  } else if (verdict.verdict === 'approve') {
    const account = verdict.as ?? prompt.account;
    if (!Object.hasOwn(users, account)) throw new HttpError(400, `no user ${account}`);
    // oidc-provider refuses a grant of another person, so the request itself
    // has to change hands to bring about a wrong ID token.
    request.accountId = account;
    result = new provider.Grant({ accountId: account, clientId: prompt.client });
    result.addOIDCScope(request.scope);
    for (const resource of request.resourceIndicators) {
      if (resource) result.addResourceScope(resource, config.resource_scope);
    }
    await result.save();
  } else {
    throw new HttpError(400, 'verdict has to be approve or deny');
  }

  prompt.verdict = verdict.verdict;
  prompt.answered_at = now();
  try {
    await provider.backchannelResult(request, result, {
      // A well-behaved provider meets the first class of authentication asked for.
      acr: verdict.acr ?? prompt.acr_values[0],
      amr: verdict.amr ?? ['mfa'],
      authTime: verdict.auth_time ?? Math.floor(Date.now() / 1000),
      rar: verdict.authorization_details ?? prompt.authorization_details,
    });
  } catch (err) {
    // The verdict is stored before the ping goes out; a client that can't be
    // reached must not undo it.
    prompt.ping_error = err.message;
  }
  return promptView(prompt);
}

// ---------------------------------------------------------------- middleware

const ENDPOINTS = new Map([
  ['/token', 'token'],
  ['/backchannel', 'backchannel'],
  ['/jwks', 'jwks'],
  ['/.well-known/openid-configuration', 'discovery'],
  ['/.well-known/oauth-authorization-server', 'discovery'],
  ['/auth', 'authorization'],
  ['/token/revocation', 'revocation'],
  ['/token/introspection', 'introspection'],
  ['/me', 'userinfo'],
]);

async function readText(req, limit = 1 << 20) {
  const chunks = [];
  let size = 0;
  for await (const chunk of req) {
    size += chunk.length;
    if (size > limit) throw new HttpError(413, 'body too large');
    chunks.push(chunk);
  }
  return Buffer.concat(chunks).toString();
}

function basicUser(ctx) {
  const [scheme, value] = (ctx.get('authorization') || '').split(' ');
  if (scheme.toLowerCase() !== 'basic' || !value) return undefined;
  return decodeURIComponent(Buffer.from(value, 'base64').toString().split(':')[0]);
}

// observe logs every call of an endpoint, and lets a fault spoil it.
async function observe(ctx, next) {
  const endpoint = ENDPOINTS.get(ctx.path);
  if (!endpoint) return next();
  state.hits[endpoint] = (state.hits[endpoint] ?? 0) + 1;
  if (endpoint !== 'token' && endpoint !== 'backchannel') return spoil(ctx, [endpoint], undefined, next);

  // oidc-provider takes an already read body from req.body.
  ctx.req.body = await readText(ctx.req);
  const form = new URLSearchParams(ctx.req.body);

  if (endpoint === 'backchannel') {
    const parameters = Object.fromEntries(form);
    delete parameters.client_secret;
    const entry = { client: basicUser(ctx) ?? parameters.client_id, parameters, start: now() };
    state.requests.push(entry);
    return record(ctx, entry, () => spoil(ctx, [endpoint], entry, () => withInterval(ctx, next)));
  }

  if (form.get('grant_type') !== CIBA) return spoil(ctx, [endpoint], undefined, next);
  return poll(ctx, form.get('auth_req_id') ?? '', next);
}

async function withInterval(ctx, next) {
  await next();
  if (ctx.status === 200 && config.interval > 0) ctx.body = { ...ctx.body, interval: config.interval };
}

async function poll(ctx, id, next) {
  const prompt = state.prompts.get(id);
  const client = basicUser(ctx);
  const entry = { auth_req_id: id, prompt: prompt?.id, client, start: now(), overlap: false };
  state.polls.push(entry);

  // Only the client that owns the prompt can use up its time.
  const mine = prompt && prompt.client === client;
  const throttle = state.throttle.get(id) ?? { interval: config.interval || SPEC_INTERVAL, last: -Infinity, inflight: 0 };
  const started = performance.now();
  const early = started - throttle.last < (throttle.interval - config.tolerance) * 1000;
  if (mine) {
    if (Number.isFinite(throttle.last)) entry.gap_ms = Math.round(started - throttle.last);
    entry.overlap = throttle.inflight > 0;
    throttle.last = started;
    throttle.inflight += 1;
    state.throttle.set(id, throttle);
  }

  try {
    await record(ctx, entry, () => spoil(ctx, ['poll', 'token'], entry, async () => {
      await next();
      // slow_down is a variant of authorization_pending (CIBA Core §11), so
      // only that answer turns into it; oidc-provider never gives it itself.
      if (mine && early && ctx.body?.error === 'authorization_pending') {
        ctx.body = { error: 'slow_down', error_description: 'polled too soon' };
      }
    }));
    if (mine && entry.outcome === 'slow_down') throttle.interval += 5;
    if (mine && entry.outcome === 'tokens') prompt.redeemed_at = entry.end;
  } finally {
    if (mine) throttle.inflight -= 1;
  }
}

// record fills in how a logged call ended. The end is the moment before the
// answer leaves, so that whoever has the answer finds it in the log.
async function record(ctx, entry, handle) {
  try {
    await handle();
  } finally {
    entry.end = now();
    entry.status = ctx.status;
    entry.outcome ??= ctx.body?.error ?? (ctx.body?.access_token ? 'tokens' : ctx.body?.auth_req_id ? 'accepted' : String(ctx.status));
    entry.auth_req_id ??= ctx.body?.auth_req_id;
  }
}

const FAULTS = {
  // An answer made up by the fault: a status, with Retry-After if wanted.
  status(ctx, fault) {
    ctx.status = fault.status ?? 503;
    if (fault.retry_after !== undefined) ctx.set('Retry-After', String(fault.retry_after));
    ctx.body = { error: 'temporarily_unavailable' };
  },
  html(ctx, fault) {
    ctx.status = fault.status ?? 200;
    ctx.type = 'text/html';
    ctx.body = '<!doctype html><title>Maintenance</title><h1>Back soon</h1>';
  },
  big(ctx, fault) {
    const size = fault.bytes ?? 1 << 20;
    ctx.status = fault.status ?? 200;
    ctx.type = 'application/json';
    ctx.body = Readable.from(padding(size));
  },
  slow_down(ctx) {
    ctx.status = 400;
    ctx.body = { error: 'slow_down' };
  },
  redirect(ctx, fault) {
    ctx.redirect(fault.location ?? `${control}/trap`);
    ctx.status = fault.status ?? 307;
  },
  // The call never gets through.
  drop(ctx) {
    ctx.respond = false;
    ctx.req.socket.destroy();
  },
  // The call is held, then goes on, unless the caller has left by then.
  async hang(ctx, fault, next) {
    const left = new AbortController();
    ctx.res.once('close', () => left.abort());
    try {
      await sleep(fault.ms ?? 1000, undefined, { signal: left.signal });
    } catch {
      ctx.respond = false;
      return;
    }
    await next();
  },
  // The call is carried out, but its answer is lost.
  async lost_reply(ctx, _fault, next) {
    await next();
    ctx.respond = false;
    ctx.req.socket.destroy();
  },
  // The true answer with some members replaced, or removed by null.
  async patch(ctx, fault, next) {
    await next();
    if (fault.status) ctx.status = fault.status;
    const status = ctx.status;
    const body = { ...ctx.body, ...fault.set };
    ctx.body = Object.fromEntries(Object.entries(body).filter(([, value]) => value !== null));
    ctx.status = status;
  },
};

function* padding(size) {
  const head = '{"padding":"';
  const tail = '"}';
  yield head;
  const chunk = 'x'.repeat(64 * 1024);
  for (let left = size - head.length - tail.length; left > 0; left -= chunk.length) {
    yield left < chunk.length ? chunk.slice(0, left) : chunk;
  }
  yield tail;
}

async function spoil(ctx, endpoints, entry, next) {
  const fault = state.faults.find((f) => f.times > 0 && endpoints.includes(f.endpoint));
  if (!fault) return next();
  fault.times -= 1;
  if (entry) entry.fault = fault.kind;
  await FAULTS[fault.kind](ctx, fault, next);
  // What a spoilt call ended with is the fault's doing, not the provider's.
  if (entry && fault.kind !== 'hang') entry.outcome = fault.kind === 'slow_down' ? 'slow_down' : `fault:${fault.kind}`;
  if (entry && fault.kind === 'hang' && ctx.respond === false) entry.outcome = 'fault:hang';
}

// signIn stands for the person at the login and consent pages.
async function signIn(ctx, next) {
  // Every visit is a login of its own: with a session left over from another
  // user, oidc-provider would answer with an HTML form to log that one out.
  if (ctx.path === '/auth') delete ctx.req.headers.cookie;
  if (!ctx.path.startsWith('/interaction/')) return next();

  const { params } = await ctx.app.interactionDetails(ctx.req, ctx.res);
  const account = findUser(params.login_hint ?? config.default_user);
  ctx.respond = false;
  if (!account) {
    await ctx.app.interactionFinished(ctx.req, ctx.res, {
      error: 'access_denied',
      error_description: 'login_hint names no user',
    }, { mergeWithLastSubmission: false });
    return;
  }
  const grant = new ctx.app.Grant({ accountId: account, clientId: params.client_id });
  if (params.scope) grant.addOIDCScope(params.scope);
  for (const resource of [params.resource ?? []].flat()) grant.addResourceScope(resource, config.resource_scope);
  await ctx.app.interactionFinished(ctx.req, ctx.res, {
    login: { accountId: account, amr: ['pwd'], remember: false },
    consent: { grantId: await grant.save() },
  });
}

// ---------------------------------------------------------------- control

class HttpError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function allowOnly(object, keys) {
  for (const key of Object.keys(object)) {
    if (!keys.includes(key)) throw new HttpError(400, `unknown member ${JSON.stringify(key)}`);
  }
}

function addFault(fault) {
  allowOnly(fault, ['endpoint', 'kind', 'times', 'status', 'retry_after', 'ms', 'bytes', 'location', 'set']);
  const endpoints = [...new Set(ENDPOINTS.values()), 'poll'];
  if (!endpoints.includes(fault.endpoint)) throw new HttpError(400, `endpoint has to be one of ${endpoints.join(', ')}`);
  if (!Object.hasOwn(FAULTS, fault.kind)) throw new HttpError(400, `kind has to be one of ${Object.keys(FAULTS).join(', ')}`);
  state.faults.push({ times: 1, ...fault });
  return {};
}

const CONTROL = {
  'GET /prompts': () => [...state.prompts.values()].map(promptView),
  'GET /polls': () => state.polls,
  'GET /requests': () => state.requests,
  'GET /hits': () => state.hits,
  'GET /trapped': () => state.trapped,
  'POST /faults': (_provider, body) => addFault(body),
  'POST /reset': () => {
    reset();
    return {};
  },
};

function controlHandler(provider) {
  return async (req, res) => {
    const { pathname } = new URL(req.url, 'http://control');
    let status = 200;
    let out;
    try {
      const text = await readText(req);
      const handler = CONTROL[`${req.method} ${pathname}`];
      const prompt = /^\/prompts\/([^/]+)$/.exec(pathname);
      if (pathname === '/trap') {
        // Where a redirected call ends up, if the client follows.
        state.trapped.push({ method: req.method, authorization: req.headers.authorization, body: text, at: now() });
        out = {};
      } else if (req.method === 'POST' && prompt) {
        out = await answer(provider, decodeURIComponent(prompt[1]), JSON.parse(text));
      } else if (handler) {
        out = await handler(provider, text && JSON.parse(text));
      } else {
        throw new HttpError(404, `no ${req.method} ${pathname}`);
      }
    } catch (err) {
      status = err.status ?? (err instanceof SyntaxError ? 400 : 500);
      out = { error: err.message || STATUS_CODES[status] };
      if (status === 500) console.error(err);
    }
    res.writeHead(status, { 'Content-Type': 'application/json' }).end(JSON.stringify(out));
  };
}

// ---------------------------------------------------------------- start

// The port, which is part of the issuer, is known only once it listens: a request
// that comes before the provider is made waits for it.
async function listen(server, port, handler) {
  server.on('request', (req, res) => handler.then((handle) => handle(req, res)));
  // Longer than any test idles, so that no client meets a connection that is
  // being closed under it.
  server.keepAliveTimeout = 300_000;
  await new Promise((resolve, reject) => {
    server.once('error', reject);
    server.listen(port, '127.0.0.1', resolve);
  });
  return `http://127.0.0.1:${server.address().port}`;
}

process.stdin.on('end', () => process.exit(0)).on('error', () => process.exit(0)).resume();
process.on('SIGTERM', () => process.exit(0));
process.on('SIGINT', () => process.exit(0));

try {
  const server = createServer();
  const controlServer = createServer();
  let provide, provideControl;
  const handler = new Promise((resolve) => { provide = resolve; });
  const controlHandlerReady = new Promise((resolve) => { provideControl = resolve; });
  const [keys, issuer] = await Promise.all([freshKeys(), listen(server, config.port, handler)]);
  control = await listen(controlServer, config.control_port, controlHandlerReady);

  const provider = new Provider(issuer, providerConfig(keys));
  if (config.exchange) addExchange(provider, keys);
  provider.use(signIn);
  provider.use(observe);
  provider.on('server_error', (_ctx, err) => console.error(err));
  provide(provider.callback());
  provideControl(controlHandler(provider));

  console.log(JSON.stringify({ issuer, control, resource: config.resource, clients: { ...agents, ...writ } }));
} catch (err) {
  fail(err.stack);
}
