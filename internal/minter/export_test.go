package minter

import "time"

// SkewClock makes m believe that the target's clock is off by d.
func SkewClock(m *Postgres, d time.Duration) {
	s := *m.clock.Load()
	s.target = s.target.Add(d)
	m.clock.Store(&s)
}

// For tests of what no server at hand would show.
var (
	Supported       = supported
	ScramVerifierOf = scramVerifierOf
)

// PostgresMakers is how many makers a target has.
const PostgresMakers = postgresMakers
