package server

// NewIdentity makes the verifier that serve makes.
var NewIdentity = newIdentity

// NewOAuth makes the minter that serve makes.
var NewOAuth = newOAuth
