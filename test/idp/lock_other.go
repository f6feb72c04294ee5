//go:build !unix || aix || solaris

package idp

import (
	"context"
	"errors"
)

func lock(context.Context, string) (unlock func(), err error) {
	return nil, errors.New("no file locks on this system: run npm ci there by hand")
}
