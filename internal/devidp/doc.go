// Package devidp is the OpenID provider that `writ dev` and `writ demo` carry
// with them: sign-in by the authorization code flow, agents' own tokens, and
// CIBA (OpenID Connect Client-Initiated Backchannel Authentication) with a page
// that plays the users' phones.
//
// It proves nobody's identity. Whoever reaches it may sign in as any user, get
// any token from /dev/token and answer any prompt. So it refuses to listen on
// anything but loopback, answers only to loopback Host headers (a web page that
// rebinds its DNS name to 127.0.0.1 gets nowhere), takes no cross-site POST, and
// keeps everything, its signing key included, in memory. What it speaks, it
// speaks by the book, so that what works against it works against a real
// provider; its discovery document promises only what it does.
//
// Left out: refresh tokens, userinfo, public clients, dynamic registration,
// authorization requests by POST, request objects, ping and push delivery.
package devidp
