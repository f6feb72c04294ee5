package main

import (
	"strings"
	"testing"
	"time"

	"github.com/writsec/writ/internal/sqlstore"
)

func TestListKeys(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	at := func(hours int) time.Time { return now.Add(time.Duration(hours) * time.Hour) }
	keys := []sqlstore.Key{
		{ID: "data-1", Purpose: sqlstore.DataKey, CreatedAt: at(-9), ActiveAt: at(-9)},
		{ID: "data-2", Purpose: sqlstore.DataKey, CreatedAt: at(-8), ActiveAt: at(-8)}, // the one before still opens what it sealed
		{ID: "gone", Purpose: sqlstore.SigningKey, CreatedAt: at(-9), ActiveAt: at(-9), RetiredAt: at(0)},
		{ID: "before", Purpose: sqlstore.SigningKey, CreatedAt: at(-5), ActiveAt: at(-5), RetiredAt: at(1)},
		{ID: "signs", Purpose: sqlstore.SigningKey, CreatedAt: at(-3), ActiveAt: at(-2), RetiredAt: at(3)}, // until the next does
		{ID: "soon", Purpose: sqlstore.SigningKey, CreatedAt: at(-1), ActiveAt: at(1)},
		{ID: "head", Purpose: sqlstore.CheckpointKey, CreatedAt: at(-9), RetiredAt: at(9)},
	}
	var out strings.Builder
	if err := listKeys(&out, keys, now); err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, line := range strings.Split(strings.TrimSpace(out.String()), "\n")[1:] {
		f := strings.Fields(line)
		got[f[len(f)-1]] = f[1]
	}
	for id, want := range map[string]string{
		"data-1": "active", "data-2": "active", "gone": "retired", "before": "retiring", "signs": "active", "soon": "next", "head": "retiring",
	} {
		if got[id] != want {
			t.Errorf("%s is %s, want %s\n%s", id, got[id], want, out.String())
		}
	}
}
