package fault_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/writsec/writ/internal/fault"
)

func TestCodeOf(t *testing.T) {
	cause := errors.New("disk full")
	err := fmt.Errorf("commit: %w", fault.Wrap(fault.Unavailable, cause, "try later"))
	if fault.CodeOf(err) != fault.Unavailable || !fault.Is(err, fault.Unavailable) || !errors.Is(err, cause) {
		t.Errorf("%v is not what it wraps", err)
	}
	if fault.CodeOf(cause) != fault.Internal || fault.Is(cause, fault.Internal) || fault.Is(nil, fault.Internal) {
		t.Error("an error that is no fault counts as one")
	}
	if got, want := fault.Invalid("/a/b", "is %d", 5).Error(), "invalid_request: the request is not valid; /a/b: is 5"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
