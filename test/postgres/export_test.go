package postgres

// Alive is for tests of what is left behind.
var Alive = alive
