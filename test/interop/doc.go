// Package interop proves that resource servers in other languages, and in Go without a
// line of Writ's code, verify what Writ mints with the libraries that they have anyway:
// jose (Node), PyJWT (Python) and go-oidc. docs/tokens.md shows the very files that the
// tests run: verify.mjs, verify.py and verify.go.
package interop
