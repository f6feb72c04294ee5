package idp

import (
	"context"
	"time"
)

// Endpoint is one that can fail. Hits counts by the same names.
type Endpoint string

// The endpoints. PollEndpoint is the token endpoint for the CIBA grant alone;
// Hits counts it under TokenEndpoint.
const (
	AuthorizationEndpoint Endpoint = "authorization"
	BackchannelEndpoint   Endpoint = "backchannel"
	DiscoveryEndpoint     Endpoint = "discovery"
	IntrospectionEndpoint Endpoint = "introspection"
	JWKSEndpoint          Endpoint = "jwks"
	PollEndpoint          Endpoint = "poll"
	RevocationEndpoint    Endpoint = "revocation"
	TokenEndpoint         Endpoint = "token"
	UserinfoEndpoint      Endpoint = "userinfo"
)

// FaultKind is a way to fail.
type FaultKind string

// The kinds of faults.
const (
	// FaultStatus answers Status (503) with RetryAfter.
	FaultStatus FaultKind = "status"
	// FaultHTML answers a page in HTML, with Status (200).
	FaultHTML FaultKind = "html"
	// FaultBig answers valid JSON of Bytes (1 MiB), with Status (200).
	FaultBig FaultKind = "big"
	// FaultSlowDown answers slow_down; the interval grows as it then must.
	FaultSlowDown FaultKind = "slow_down"
	// FaultRedirect answers Status (307) with Location, which is by default a
	// trap; see Trapped.
	FaultRedirect FaultKind = "redirect"
	// FaultDrop closes the connection; nothing is carried out.
	FaultDrop FaultKind = "drop"
	// FaultHang waits Delay (1 s), then answers; a caller that has left by then
	// has done nothing.
	FaultHang FaultKind = "hang"
	// FaultLostReply carries the request out, then closes the connection.
	FaultLostReply FaultKind = "lost_reply"
	// FaultPatch gives the true answer with the members in Set replaced, or
	// removed where nil, and with Status if that is given.
	FaultPatch FaultKind = "patch"
)

// Fault spoils the next calls of an endpoint.
type Fault struct {
	Endpoint   Endpoint
	Kind       FaultKind
	Times      int // 0 is once
	Status     int
	RetryAfter string // seconds or an HTTP date; empty sends none
	Delay      time.Duration
	Bytes      int64
	Location   string
	Set        map[string]any
}

// Fault queues a fault; faults of one endpoint come in the order queued.
func (p *IdP) Fault(ctx context.Context, f Fault) error {
	body := map[string]any{"endpoint": f.Endpoint, "kind": f.Kind, "times": max(f.Times, 1)}
	if f.Status != 0 {
		body["status"] = f.Status
	}
	if f.RetryAfter != "" {
		body["retry_after"] = f.RetryAfter
	}
	if f.Delay != 0 {
		body["ms"] = f.Delay.Milliseconds()
	}
	if f.Bytes != 0 {
		body["bytes"] = f.Bytes
	}
	if f.Location != "" {
		body["location"] = f.Location
	}
	if f.Set != nil {
		body["set"] = f.Set
	}
	return p.call(ctx, "/faults", body, nil)
}

// Trap is a call that followed a FaultRedirect, with whatever it gave away.
type Trap struct {
	Method        string    `json:"method"`
	Authorization string    `json:"authorization"`
	Body          string    `json:"body"`
	At            time.Time `json:"at"`
}

// Trapped lists the calls that followed a redirect; a good client leaves none.
func (p *IdP) Trapped(ctx context.Context) ([]Trap, error) {
	var list []Trap
	return list, p.call(ctx, "/trapped", nil, &list)
}

// Hits counts the calls of each endpoint since the start.
func (p *IdP) Hits(ctx context.Context) (map[Endpoint]int, error) {
	var hits map[Endpoint]int
	return hits, p.call(ctx, "/hits", nil, &hits)
}
