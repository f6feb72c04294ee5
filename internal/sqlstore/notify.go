package sqlstore

import "sync"

// hub wakes those who wait for a topic.
type hub struct {
	mu       sync.Mutex
	watchers map[string]map[chan struct{}]struct{}
}

func newHub() *hub { return &hub{watchers: map[string]map[chan struct{}]struct{}{}} }

func (h *hub) watch(topic string) (<-chan struct{}, func()) {
	c := make(chan struct{}, 1)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.watchers[topic] == nil {
		h.watchers[topic] = map[chan struct{}]struct{}{}
	}
	h.watchers[topic][c] = struct{}{}
	return c, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.watchers[topic], c)
		if len(h.watchers[topic]) == 0 {
			delete(h.watchers, topic)
		}
	}
}

// wake never blocks: a watcher that has a wake-up waiting needs no second.
func (h *hub) wake(topics []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, t := range topics {
		for c := range h.watchers[t] {
			select {
			case c <- struct{}{}:
			default:
			}
		}
	}
}
