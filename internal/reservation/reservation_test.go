package reservation_test

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/writsec/writ/internal/reservation"
	"github.com/writsec/writ/internal/sqlstore"
	"github.com/writsec/writ/internal/storetest"
)

var noon = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)

func TestMain(m *testing.M) { os.Exit(storetest.Both(m)) }

func migrate(ctx context.Context, url string) error {
	s, err := sqlstore.Open(ctx, sqlstore.Config{URL: url, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	return s.Close()
}

func open(t *testing.T, now *time.Time) *sqlstore.Store {
	t.Helper()
	s, err := sqlstore.Open(t.Context(), sqlstore.Config{
		URL: storetest.URL(t, migrate), Now: func() time.Time { return *now }, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func TestUntil(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		window := time.Duration(rapid.Int64Range(1, int64(400*24*time.Hour)).Draw(t, "window"))
		now := noon.Add(time.Duration(rapid.Int64Range(0, int64(1000*time.Hour)).Draw(t, "later"))).Truncate(time.Microsecond)
		until := reservation.Until(now, window)
		if until.Before(now.Add(window)) {
			t.Fatalf("%v early", now.Add(window).Sub(until))
		}
		if late := until.Sub(now.Add(window)); late > max(window/64, 2*time.Microsecond) {
			t.Fatalf("%v late of %v", late, window)
		}
	})
}

func TestUsageNeverWraps(t *testing.T) {
	u := reservation.Usage{}
	for range 3 {
		u.Add(reservation.Reservation{Name: "n", Amount: math.MaxInt64 - 1, Until: noon})
	}
	if u["n"].Amount != math.MaxInt64 {
		t.Errorf("%d", u["n"].Amount)
	}
}

// What is reserved, forgotten and read is what a list of all reservations says,
// whatever the order and whoever comes with an old version.
func TestReservationsModel(t *testing.T) {
	now := noon
	store := open(t, &now)
	round := 0
	rapid.Check(t, func(r *rapid.T) {
		ctx := context.Background()
		round++
		type scope struct {
			version int64
			kept    []reservation.Reservation
		}
		scopes := map[string]*scope{}
		names := []string{"a", "b"}
		for _, n := range names {
			scopes[n] = &scope{}
		}
		key := func(n string) string { return n + string(rune('0'+round%10)) + time.Duration(round).String() }
		read := func(n string) (u reservation.Usage, version int64) {
			err := store.View(ctx, func(tx *sqlstore.Tx) (err error) {
				if u, err = tx.Usage(ctx, key(n)); err != nil {
					return err
				}
				version, err = tx.ScopeVersion(ctx, key(n))
				return err
			})
			if err != nil {
				r.Fatal(err)
			}
			return u, version
		}
		reserve := func(n string, version int64, u reservation.Usage, rs []reservation.Reservation) error {
			return store.Update(ctx, func(tx *sqlstore.Tx) error {
				return reservation.Reserve(ctx, tx, key(n), version, u, rs)
			})
		}
		r.Repeat(map[string]func(*rapid.T){
			"reserve": func(r *rapid.T) {
				n := rapid.SampledFrom(names).Draw(r, "scope")
				u, version := read(n)
				var rs []reservation.Reservation
				for range rapid.IntRange(0, 3).Draw(r, "n") {
					rs = append(rs, reservation.Reservation{
						Name:   rapid.SampledFrom([]string{"x", "label:x", "y"}).Draw(r, "name"),
						Amount: rapid.Int64Range(0, 100).Draw(r, "amount"),
						Until:  now.Add(time.Duration(rapid.IntRange(0, 3).Draw(r, "until")) * time.Minute),
					})
				}
				if err := reserve(n, version, u, rs); err != nil {
					r.Fatal(err)
				}
				scopes[n].kept = append(scopes[n].kept, rs...)
			},
			"too late": func(r *rapid.T) {
				n := rapid.SampledFrom(names).Draw(r, "scope")
				u, version := read(n)
				old := version - 1
				if version == 0 {
					old = 7
				}
				err := reserve(n, old, u, []reservation.Reservation{{Name: "x", Amount: 5, Until: now.Add(time.Hour)}})
				if !errors.Is(err, reservation.ErrChanged) {
					r.Fatalf("from version %d of %d: %v", old, version, err)
				}
			},
			"too much": func(r *rapid.T) {
				n := rapid.SampledFrom(names).Draw(r, "scope")
				u, version := read(n)
				if u["x"].Amount == 0 {
					return
				}
				err := reserve(n, version, u, []reservation.Reservation{{Name: "x", Amount: math.MaxInt64, Until: now.Add(time.Hour)}})
				if !errors.Is(err, reservation.ErrOverflow) {
					r.Fatal(err)
				}
			},
			"later": func(r *rapid.T) {
				now = now.Add(time.Duration(rapid.IntRange(1, 120).Draw(r, "seconds")) * time.Second)
			},
			"forget": func(*rapid.T) {
				err := store.Update(ctx, func(tx *sqlstore.Tx) error {
					_, err := tx.ForgetReservations(ctx, now.Add(-time.Hour), 10)
					return err
				})
				if err != nil {
					r.Fatal(err)
				}
			},
			"": func(r *rapid.T) {
				for _, n := range names {
					want := reservation.Usage{}
					for _, k := range scopes[n].kept {
						if k.Until.After(now) {
							want.Add(k)
						}
					}
					got, version := read(n)
					if d := cmp.Diff(want, got); d != "" {
						r.Fatalf("scope %s (-want +got):\n%s", n, d)
					}
					if version < scopes[n].version {
						r.Fatalf("version %d after %d", version, scopes[n].version)
					}
					scopes[n].version = version
				}
			},
		})
	})
}

// A scope is forgotten only once nothing is left in it and nobody can have its version
// in hand; what is written meanwhile keeps it.
func TestForget(t *testing.T) {
	now := noon
	store := open(t, &now)
	ctx := t.Context()
	in := func(f func(tx *sqlstore.Tx) error) {
		t.Helper()
		if err := store.Update(ctx, f); err != nil {
			t.Fatal(err)
		}
	}
	version := func() (v int64) {
		in(func(tx *sqlstore.Tx) (err error) { v, err = tx.ScopeVersion(ctx, "s"); return err })
		return v
	}
	forget := func() (n int64) {
		in(func(tx *sqlstore.Tx) (err error) {
			n, err = tx.ForgetReservations(ctx, now.Add(-24*time.Hour), 2)
			return err
		})
		return n
	}
	in(func(tx *sqlstore.Tx) error {
		var rs []reservation.Reservation
		for i := range 5 {
			rs = append(rs, reservation.Reservation{Name: "n", Amount: 1, Until: noon.Add(time.Duration(i+1) * time.Minute)})
		}
		rs = append(rs, reservation.Reservation{Name: "n", Amount: 1, Until: noon.Add(72 * time.Hour)})
		return reservation.Reserve(ctx, tx, "s", 0, nil, rs)
	})
	if n := forget(); n != 0 {
		t.Errorf("%d forgotten before their time", n)
	}
	now = noon.Add(48 * time.Hour)
	for _, want := range []int64{2, 2, 1, 0} {
		if n := forget(); n != want {
			t.Errorf("%d forgotten, want %d", n, want)
		}
	}
	if version() == 0 {
		t.Error("a scope that something is left in was forgotten")
	}
	before := version()
	now = noon.Add(73 * time.Hour)
	forget()
	if version() != 0 {
		t.Error("an empty scope is kept for ever")
	}
	// Made anew, it has a version that nobody has seen.
	in(func(tx *sqlstore.Tx) error { return tx.AdvanceScope(ctx, "s", 0) })
	if version() <= before {
		t.Errorf("version %d again after %d", version(), before)
	}
	if err := store.Update(ctx, func(tx *sqlstore.Tx) error { return tx.AdvanceScope(ctx, "s", before) }); !errors.Is(err, reservation.ErrChanged) {
		t.Errorf("from a version before it was forgotten: %v", err)
	}
}
