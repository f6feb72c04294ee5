package minter

import (
	"bytes"
	"compress/zlib"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/writsec/writ/internal/fault"
)

// StatusStore knows which lease has which place in the status lists.
type StatusStore interface {
	// ReserveStatus takes n places that no replica has had.
	ReserveStatus(ctx context.Context, n int64) (first int64, err error)
	// PutStatus gives a place to a lease, until a time after which nobody asks for it.
	// It reports false where another has the place: the store has lost commits since it
	// was reserved.
	PutStatus(ctx context.Context, place int64, lease string, until time.Time) (bool, error)
	// BadStatus lists the places, from one to before another, whose lease is not active.
	BadStatus(ctx context.Context, from, to int64) ([]int64, error)
	// StatusPlaces are the first place that anybody can ask for and the first that is
	// not reserved.
	StatusPlaces(ctx context.Context) (first, next int64, err error)
	// Now is the clock of tokens.
	Now() time.Time
}

const (
	// statusSize is the number of entries of one list, one bit each.
	statusSize = 1 << 16
	// statusBlock is how many places a replica reserves at a time.
	statusBlock = 256
	// statusGrace is how long a place outlives its token: verifiers' clocks may be late.
	statusGrace = 10 * time.Minute
	// statusFresh is how long a replica serves what it made.
	statusFresh = 5 * time.Second
	// StatusTTL is how long verifiers may go on with a list that they fetched.
	StatusTTL = 10 * time.Second
	// statusLife is how long a list can be believed at all.
	statusLife = time.Minute
	// statusTimeout bounds the work that requests share.
	statusTimeout = 5 * time.Second
)

// StatusLists tells verifiers that don't introspect which tokens ended before their
// time (draft-ietf-oauth-status-list). A token has one bit in one list. The lease is the
// truth: its bit is set unless the store knows it as active.
type StatusLists struct {
	Store  StatusStore
	Keys   *Keys
	Issuer string // Writ
	// Order is the secret by which places are spread over a list, so that an index says
	// nothing about when its token was made. It is the same on every replica, for ever.
	Order [sha256.Size]byte

	shared singleflight.Group

	mu       sync.Mutex
	at, end  int64 // of the block, in places
	lists    map[int64]statusList
	from, to int64 // lists that are served
	looked   time.Time
}

// statusList is one signed list, as served.
type statusList struct {
	token string
	made  time.Time
}

// statusClaim is the status of a token (§6.2 of the draft).
type statusClaim struct {
	List statusRef `json:"status_list"`
}

type statusRef struct {
	Index int    `json:"idx"`
	URI   string `json:"uri"`
}

// enter gives a lease a place. Only then may its token leave.
func (s *StatusLists) enter(ctx context.Context, lease string, expires time.Time) (*statusClaim, error) {
	for {
		place, err := s.place(ctx)
		if err != nil {
			return nil, fmt.Errorf("reserve status: %w", err)
		}
		ok, err := s.Store.PutStatus(ctx, place, lease, expires.Add(statusGrace))
		if err != nil {
			return nil, fmt.Errorf("enter status: %w", err)
		}
		if ok {
			list := listOf(place)
			return &statusClaim{statusRef{Index: s.index(list, place), URI: s.uri(list)}}, nil
		}
	}
}

// place takes the next place of this replica's block, and a new block where that is
// used up.
func (s *StatusLists) place(ctx context.Context) (int64, error) {
	for {
		s.mu.Lock()
		if s.at < s.end {
			defer s.mu.Unlock()
			s.at++
			return s.at - 1, nil
		}
		s.mu.Unlock()
		_, err, _ := s.shared.Do("reserve", func() (any, error) {
			s.mu.Lock()
			left := s.at < s.end // another flight was faster
			s.mu.Unlock()
			if left {
				return nil, nil
			}
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), statusTimeout)
			defer cancel()
			first, err := s.Store.ReserveStatus(ctx, statusBlock)
			if err != nil {
				return nil, err
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			s.at, s.end = first, first+statusBlock
			return nil, nil
		})
		if err != nil {
			return 0, err
		}
	}
}

// List returns a list as a signed token (§5.1 of the draft), made moments ago;
// fault.NotFound where there is none.
func (s *StatusLists) List(ctx context.Context, list int64) (string, error) {
	now := s.Store.Now()
	s.mu.Lock()
	made, ok := s.lists[list]
	s.mu.Unlock()
	if age := now.Sub(made.made); ok && age >= 0 && age < statusFresh {
		return made.token, nil
	}
	// Whoever asks for what does not exist must cost little.
	if served, err := s.serves(ctx, list, now); err != nil || !served {
		if err == nil {
			err = fault.New(fault.NotFound, "there is no such status list")
		}
		return "", err
	}
	token, err, _ := s.shared.Do("list "+strconv.FormatInt(list, 10), func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), statusTimeout)
		defer cancel()
		return s.make(ctx, list)
	})
	if err != nil {
		return "", err
	}
	return token.(string), nil
}

// serves reports whether anybody can have a token with a place in the list. Another
// replica may just have begun the next one.
func (s *StatusLists) serves(ctx context.Context, list int64, now time.Time) (bool, error) {
	s.mu.Lock()
	age := now.Sub(s.looked)
	s.mu.Unlock()
	if age < 0 || age >= statusFresh {
		_, err, _ := s.shared.Do("places", func() (any, error) {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), statusTimeout)
			defer cancel()
			first, next, err := s.Store.StatusPlaces(ctx)
			if err != nil {
				return nil, err
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			s.from, s.to, s.looked = listOf(first), listOf(next)+1, now
			for old := range s.lists {
				if old < s.from {
					delete(s.lists, old)
				}
			}
			return nil, nil
		})
		if err != nil {
			return false, fmt.Errorf("look for status lists: %w", err)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.from <= list && list <= s.to, nil
}

// make reads and signs a list.
func (s *StatusLists) make(ctx context.Context, list int64) (string, error) {
	now := s.Store.Now() // before the look: what ended since may be missing
	start := (list - 1) * statusSize
	bad, err := s.Store.BadStatus(ctx, start, start+statusSize)
	if err != nil {
		return "", fmt.Errorf("read status list: %w", err)
	}
	bits := make([]byte, statusSize/8)
	for _, place := range bad {
		i := s.index(list, place)
		bits[i/8] |= 1 << (i % 8) // the first in the least significant bit (§4.1)
	}
	payload, err := json.Marshal(map[string]any{
		"iss": s.Issuer, "sub": s.uri(list), "iat": now.Unix(), "exp": now.Add(statusLife).Unix(), "ttl": int(StatusTTL.Seconds()),
		"status_list": map[string]any{"bits": 1, "lst": compressed(bits)},
	})
	if err != nil {
		return "", fmt.Errorf("make status list: %w", err)
	}
	token, err := s.Keys.sign(typeStatusList, payload)
	if err != nil {
		return "", fmt.Errorf("make status list: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lists == nil {
		s.lists = map[int64]statusList{}
	}
	s.lists[list] = statusList{token, now}
	return token, nil
}

func compressed(bits []byte) string {
	var out bytes.Buffer
	z, _ := zlib.NewWriterLevel(&out, zlib.BestCompression) // the level exists
	_, _ = z.Write(bits)                                    // to memory
	_ = z.Close()
	return base64.RawURLEncoding.EncodeToString(out.Bytes())
}

// listOf is the number of the list that a place is in; the first is 1.
func listOf(place int64) int64 { return place/statusSize + 1 }

func (s *StatusLists) uri(list int64) string {
	return s.Issuer + "/status/" + strconv.FormatInt(list, 10)
}

// index is where in its list a place is: a Feistel network makes a secret permutation of
// all indexes of a list, so that no two places share one.
func (s *StatusLists) index(list, place int64) int {
	l, r := byte(place%statusSize>>8), byte(place) //nolint:gosec // G115: halves of 16 bits
	for round := range byte(4) {
		l, r = r, l^s.half(list, round, r)
	}
	return int(l)<<8 | int(r)
}

func (s *StatusLists) half(list int64, round, half byte) byte {
	mac := hmac.New(sha256.New, s.Order[:])
	mac.Write(binary.BigEndian.AppendUint64([]byte{round, half}, uint64(list))) //nolint:gosec // G115: a label
	return mac.Sum(nil)[0]
}
