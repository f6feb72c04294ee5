// Package bundles embeds what turns policies into a bundle, and the sample that
// `writ dev` and `writ demo` start from.
package bundles

import "embed"

// Capabilities is what policies may use of OPA: everything but built-in functions
// that reach outside or whose answer differs from call to call.
//
//go:embed capabilities.json
var Capabilities []byte

// Schemas holds schemas/input.json and schemas/admin_input.json, which policies are
// type-checked against, and schemas/decision.json and schemas/admin.json, which each of
// their answers is held to.
//
//go:embed schemas/input.json schemas/decision.json schemas/admin_input.json schemas/admin.json
var Schemas embed.FS

// Sample is the bundle built from the policies folder.
//
//go:embed writ.tar.gz
var Sample []byte
