package server

// NewIdentity makes the verifier that serve makes.
var NewIdentity = newIdentity
