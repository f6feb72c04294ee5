package id_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/writsec/writ/internal/id"
)

func TestNew(t *testing.T) {
	var ids []string
	for range 1000 {
		ids = append(ids, id.New(id.Lease))
	}
	if !slices.IsSorted(ids) {
		t.Error("ids do not sort by age")
	}
	if len(slices.Compact(ids)) != 1000 {
		t.Error("an id came twice")
	}
	if !id.Valid(id.Lease, ids[0]) || id.Valid(id.Session, ids[0]) {
		t.Errorf("%s is not just a lease's", ids[0])
	}
}

func TestValid(t *testing.T) {
	good := id.New(id.Session)
	for _, bad := range []string{
		"", "ses_", good[:len(good)-1], good + "0", strings.ToUpper(good), strings.TrimPrefix(good, "ses_"),
		good[:len(good)-1] + "w", good[:len(good)-1] + "'", "ses_" + strings.Repeat("/", 26),
	} {
		if id.Valid(id.Session, bad) {
			t.Errorf("%q passes", bad)
		}
	}
}
