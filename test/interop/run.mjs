// Verifies the tokens that come as JSON on standard input and writes what became of each.
import { errors } from 'jose'
import { verifier } from './verify.mjs'

let text = ''
for await (const part of process.stdin) text += part
const { issuer, audience, tokens } = JSON.parse(text)
const verify = verifier(issuer, audience)
const results = {}
for (const [name, token] of Object.entries(tokens)) {
  try {
    const claims = await verify(token)
    results[name] = `good for ${claims.authorization_details[0].actions[0]}`
  } catch (err) {
    results[name] = err.message === 'revoked' ? 'revoked'
      : err instanceof errors.JOSEError ? `refused: ${err.code}` : `failed: ${err.stack}`
  }
}
console.log(JSON.stringify(results))
