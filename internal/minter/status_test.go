package minter_test

import (
	"bytes"
	"compress/zlib"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/lease"
	"github.com/writsec/writ/internal/minter"
)

// places is a StatusStore in memory, for several replicas.
type places struct {
	mu     sync.Mutex
	now    time.Time
	next   int64
	leases map[int64]string
	until  map[int64]time.Time
	ended  map[string]bool
	asked  int
	fails  error
}

func newPlaces() *places {
	return &places{now: time.Unix(1_700_000_000, 0), leases: map[int64]string{}, until: map[int64]time.Time{}, ended: map[string]bool{}}
}

func (p *places) Now() time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.now
}

func (p *places) ReserveStatus(_ context.Context, n int64) (int64, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.next += n
	return p.next - n, p.fails
}

func (p *places) PutStatus(_ context.Context, place int64, lease string, until time.Time) (bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fails != nil || p.leases[place] != "" {
		return false, p.fails
	}
	p.leases[place], p.until[place] = lease, until
	return true, nil
}

func (p *places) BadStatus(_ context.Context, from, to int64) (bad []int64, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked++
	for place, l := range p.leases {
		if from <= place && place < to && p.ended[l] && p.now.Before(p.until[place]) {
			bad = append(bad, place)
		}
	}
	return bad, p.fails
}

func (p *places) StatusPlaces(context.Context) (first, next int64, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked++
	first = p.next
	for place := range p.leases {
		first = min(first, place)
	}
	return first, p.next, p.fails
}

func newLists(t *testing.T, p *places) *minter.StatusLists {
	t.Helper()
	return &minter.StatusLists{Store: p, Keys: newKeys(t), Issuer: issuer, Order: [32]byte{1}}
}

type reference struct {
	List struct {
		Index int    `json:"idx"`
		URI   string `json:"uri"`
	} `json:"status_list"`
}

// issue mints the token of a lease and returns where its status stands.
func issue(t *testing.T, s *minter.StatusLists, id string) reference {
	t.Helper()
	m := newMinter(s.Keys)
	m.Checks, m.Status = minter.CheckStatusList, s
	l, act := granted(s.Store.Now())
	l.ID = id
	all, _, ok := s.Keys.Claims(mint(t, m, l, act), audience)
	if !ok {
		t.Fatal("the token is not ours")
	}
	raw, _ := json.Marshal(all["status"])
	var out reference
	if err := json.Unmarshal(raw, &out); err != nil {
		t.Fatal(err)
	}
	return out
}

// bit reads a status list as the draft has verifiers do it (§8.3).
func bit(t *testing.T, s *minter.StatusLists, list int64, r reference) byte {
	t.Helper()
	token, err := s.List(t.Context(), list)
	if err != nil {
		t.Fatal(err)
	}
	set := s.Keys.JWKS()
	jws, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		t.Fatal(err)
	}
	payload, err := jws.Verify(set)
	if err != nil || jws.Signatures[0].Header.ExtraHeaders["typ"] != "statuslist+jwt" {
		t.Fatal(err, jws.Signatures[0].Header)
	}
	var c struct {
		Issuer  string `json:"iss"`
		Subject string `json:"sub"`
		Issued  int64  `json:"iat"`
		Expires int64  `json:"exp"`
		TTL     int64  `json:"ttl"`
		List    struct {
			Bits int    `json:"bits"`
			List string `json:"lst"`
		} `json:"status_list"`
	}
	if err := json.Unmarshal(payload, &c); err != nil {
		t.Fatal(err)
	}
	if c.Issuer != issuer || c.Subject != r.List.URI || c.List.Bits != 1 || c.TTL != 10 || c.Expires-c.Issued != 60 {
		t.Errorf("claims %s", payload)
	}
	packed, err := base64.RawURLEncoding.DecodeString(c.List.List)
	if err != nil {
		t.Fatal(err)
	}
	z, err := zlib.NewReader(bytes.NewReader(packed))
	if err != nil {
		t.Fatal(err)
	}
	bits, err := io.ReadAll(z)
	if err != nil || len(bits) != 1<<13 {
		t.Fatal(len(bits), err)
	}
	return bits[r.List.Index/8] >> (r.List.Index % 8) & 1
}

func TestStatusFollowsTheLease(t *testing.T) {
	t.Parallel()
	p := newPlaces()
	s := newLists(t, p)
	good, bad, renewed := issue(t, s, "lea_good"), issue(t, s, "lea_bad"), issue(t, s, "lea_bad")
	if good.List.URI != issuer+"/status/1" || good == bad || bad == renewed {
		t.Fatalf("%+v and %+v", good, bad)
	}
	want := func(when string, g, b byte) {
		t.Helper()
		if got := bit(t, s, 1, good); got != g {
			t.Errorf("%s, the good one is %d", when, got)
		}
		for _, r := range []reference{bad, renewed} {
			if got := bit(t, s, 1, r); got != b {
				t.Errorf("%s, the bad one is %d", when, got)
			}
		}
	}
	want("both alive", 0, 0)
	p.ended["lea_bad"] = true
	asked := p.asked
	want("within seconds", 0, 0)
	if p.asked != asked {
		t.Error("the store is asked each time")
	}
	p.now = p.now.Add(5 * time.Second)
	want("seconds later", 0, 1)
	p.now = p.now.Add(time.Minute + 5*time.Minute) // its token is over, but a verifier's clock may be late
	want("after its end", 0, 1)
}

func TestStatusIndexesAreUniqueAndScattered(t *testing.T) {
	t.Parallel()
	p := newPlaces()
	replicas := []*minter.StatusLists{newLists(t, p), newLists(t, p)}
	replicas[1].Keys = replicas[0].Keys
	var mu sync.Mutex
	seen := map[reference]bool{}
	var order []int
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 100 {
				r := issue(t, replicas[i%2], fmt.Sprintf("lea_%d_%d", i, j))
				mu.Lock()
				if seen[r] {
					t.Errorf("%+v was given twice", r)
				}
				seen[r] = true
				order = append(order, r.List.Index)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	ordered := 0
	for i := range order[1:] {
		if d := order[i+1] - order[i]; d > -256 && d < 256 {
			ordered++
		}
	}
	// At random, one pair of neighbours in 128 is that close.
	if ordered > 40 || slices.Max(order) < 1<<15 {
		t.Errorf("%d of %d neighbours have neighbouring indexes", ordered, len(order))
	}
}

// Another list begins when one is full, and no index comes twice in it.
func TestEveryPlaceHasItsIndex(t *testing.T) {
	t.Parallel()
	s := newLists(t, newPlaces())
	seen := make([]bool, 1<<16)
	for i := range int64(1 << 16) {
		at := minter.StatusIndex(s, 1, i)
		if seen[at] {
			t.Fatalf("index %d is given twice", at)
		}
		seen[at] = true
	}
	same := 0
	for i := range int64(1000) {
		if minter.StatusIndex(s, 1, i) == minter.StatusIndex(s, 2, 1<<16+i) {
			same++
		}
	}
	if same > 10 {
		t.Errorf("%d of 1000 places have the same index in the next list", same)
	}
	p := newPlaces()
	p.next = 1<<16 - 1
	s = newLists(t, p)
	if a, b := issue(t, s, "lea_1"), issue(t, s, "lea_2"); a.List.URI != issuer+"/status/1" || b.List.URI != issuer+"/status/2" {
		t.Errorf("%+v, then %+v", a, b)
	}
}

func TestStatusListsThatAreNotThere(t *testing.T) {
	t.Parallel()
	p := newPlaces()
	p.next = 5 << 16
	s := newLists(t, p)
	for range 3 {
		issue(t, s, "lea_1") // in list 6
	}
	for _, list := range []int64{-1, 0, 1, 5, 8, 1 << 50} {
		if _, err := s.List(t.Context(), list); !fault.Is(err, fault.NotFound) {
			t.Errorf("list %d: %v", list, err)
		}
	}
	if p.asked != 1 {
		t.Errorf("lists that are not there cost %d looks", p.asked)
	}
	for _, list := range []int64{6, 7} { // another replica may have begun the next
		if _, err := s.List(t.Context(), list); err != nil {
			t.Errorf("list %d: %v", list, err)
		}
	}
}

func TestStatusStoreDown(t *testing.T) {
	t.Parallel()
	p := newPlaces()
	s := newLists(t, p)
	issue(t, s, "lea_1")
	if _, err := s.List(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	p.fails = errors.New("down")
	p.now = p.now.Add(5 * time.Second)
	if _, err := s.List(t.Context(), 1); !errors.Is(err, p.fails) {
		t.Errorf("an old list is served: %v", err)
	}
	m := newMinter(s.Keys)
	m.Checks, m.Status = minter.CheckStatusList, s
	l, act := granted(p.now)
	if made, err := m.Mint(t.Context(), lease.Order{Lease: l, Act: act}); !errors.Is(err, p.fails) || made.Secret != nil {
		t.Errorf("minted what no list can call bad: %v", err)
	}
	// A store that has lost commits gives out places that are taken.
	p.fails, p.next = nil, 0
	other := newLists(t, p)
	first := issue(t, other, "lea_9")
	if first.List.Index == 0 && first.List.URI == "" || p.leases[0] != "lea_1" || p.leases[1] != "lea_9" {
		t.Errorf("%+v %v", first, p.leases)
	}
}

// A status list is no access token, and an access token no status list.
func TestStatusListIsNoToken(t *testing.T) {
	t.Parallel()
	s := newLists(t, newPlaces())
	issue(t, s, "lea_1")
	token, err := s.List(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, aud := range []string{"", audience, issuer} {
		if _, _, ok := s.Keys.Claims(token, aud); ok {
			t.Errorf("a status list passes for a token to %q", aud)
		}
	}
}
