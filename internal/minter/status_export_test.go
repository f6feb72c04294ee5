package minter

// StatusIndex is where in its list a place is.
func StatusIndex(s *StatusLists, list, place int64) int { return s.index(list, place) }
