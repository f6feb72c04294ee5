import { inflateSync } from 'node:zlib'
import { createRemoteJWKSet, jwtVerify } from 'jose'

const algorithms = ['ES256', 'EdDSA']

// verifier holds tokens to Writ's keys. It throws what jose throws, or Error('revoked').
export function verifier(issuer, audience) {
  const keys = createRemoteJWKSet(new URL(`${issuer}/.well-known/jwks.json`), { cacheMaxAge: 300_000 })
  const lists = new Map() // by URI, as long as their ttl says

  async function bits(uri) {
    const held = lists.get(uri)
    if (held && Date.now() < held.until) return held.bits
    const answer = await fetch(uri, { headers: { accept: 'application/statuslist+jwt' } })
    if (!answer.ok) throw new Error(`status list: ${answer.status}`)
    const { payload } = await jwtVerify(await answer.text(), keys, {
      issuer, subject: uri, typ: 'statuslist+jwt', algorithms, requiredClaims: ['exp', 'iat'], clockTolerance: 30,
    })
    if (payload.status_list.bits !== 1) throw new Error('status list: not of one bit')
    const bits = inflateSync(Buffer.from(payload.status_list.lst, 'base64url'), { maxOutputLength: 1 << 20 })
    lists.set(uri, { bits, until: Date.now() + payload.ttl * 1000 })
    return bits
  }

  return async function verify(token) {
    const { payload } = await jwtVerify(token, keys, {
      issuer, audience, typ: 'at+jwt', algorithms, requiredClaims: ['exp', 'sub', 'client_id', 'jti', 'scope'], clockTolerance: 30,
    })
    const status = payload.status?.status_list // only where the minter has checks: status_list
    if (status) {
      if (!status.uri.startsWith(`${issuer}/status/`)) throw new Error('status list: of somebody else')
      const list = await bits(status.uri)
      if (status.idx >= list.length * 8) throw new Error('status list: no such index')
      if ((list[status.idx >> 3] >> (status.idx & 7)) & 1) throw new Error('revoked')
    }
    return payload
  }
}
