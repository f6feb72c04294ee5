package server

import (
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"fmt"

	"github.com/writsec/writ/internal/config"
	"github.com/writsec/writ/internal/minter"
	"github.com/writsec/writ/internal/sqlstore"
)

// RotationOf is how a configuration wants signing keys to take over from each other.
func RotationOf(cfg config.Config) minter.Rotation {
	return minter.Rotation{Algorithm: cfg.Signing.Algorithm, Every: cfg.Signing.RotateEvery, Life: cfg.LongestLife()}
}

func newStatusLists(ctx context.Context, cfg config.Config, store *sqlstore.Store, keys *minter.Keys) (*minter.StatusLists, error) {
	key, err := store.DigestKey(ctx)
	if err != nil {
		return nil, fmt.Errorf("load digest key: %w", err)
	}
	order, err := hkdf.Expand(sha256.New, key, "writ status lists", sha256.Size)
	if err != nil {
		return nil, fmt.Errorf("derive key of status lists: %w", err)
	}
	return &minter.StatusLists{Store: store, Keys: keys, Issuer: cfg.ExternalURL, Order: [sha256.Size]byte(order)}, nil
}
