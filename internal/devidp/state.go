package devidp

import "sync"

// state is all that outlives one request. Both lists are bounded: what has
// ended makes room for what begins.
type state struct {
	mu      sync.Mutex
	codes   map[string]codeGrant // by code
	prompts []*prompt            // oldest first
}
