package jws

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"

	"github.com/go-jose/go-jose/v4"
)

// ParsePrivateKey reads a private key in PEM (PKCS #8, PKCS #1 or SEC 1) that signs by
// RS256, ES256 or ES384: the first among its blocks. Its kid is its RFC 7638 thumbprint. Nothing of the key shows
// in the error.
func ParsePrivateKey(data []byte) (jose.JSONWebKey, error) {
	block, rest := pem.Decode(data)
	for block != nil && !strings.HasSuffix(block.Type, "PRIVATE KEY") {
		block, rest = pem.Decode(rest) // such as EC PARAMETERS, which openssl writes in front
	}
	if block == nil {
		return jose.JSONWebKey{}, errors.New("holds no private key in PEM")
	}
	key, err := parseDER(block.Bytes)
	if err != nil {
		return jose.JSONWebKey{}, err
	}
	out := jose.JSONWebKey{Key: key, Use: "sig"}
	switch k := key.(type) {
	case *rsa.PrivateKey:
		if k.N.BitLen() < minRSA {
			return jose.JSONWebKey{}, fmt.Errorf("holds an RSA key of %d bits, expected %d or more", k.N.BitLen(), minRSA)
		}
		out.Algorithm = string(jose.RS256)
	case *ecdsa.PrivateKey:
		switch k.Curve {
		case elliptic.P256():
			out.Algorithm = string(jose.ES256)
		case elliptic.P384():
			out.Algorithm = string(jose.ES384)
		}
	}
	if out.Algorithm == "" {
		return jose.JSONWebKey{}, errors.New("holds a key of another kind, expected RSA, P-256 or P-384")
	}
	public := out.Public()
	thumbprint, err := public.Thumbprint(crypto.SHA256)
	if err != nil {
		return jose.JSONWebKey{}, fmt.Errorf("thumbprint: %w", err)
	}
	out.KeyID = base64.RawURLEncoding.EncodeToString(thumbprint)
	return out, nil
}

func parseDER(der []byte) (any, error) {
	if key, err := x509.ParsePKCS8PrivateKey(der); err == nil {
		return key, nil
	}
	if key, err := x509.ParsePKCS1PrivateKey(der); err == nil {
		return key, nil
	}
	if key, err := x509.ParseECPrivateKey(der); err == nil {
		return key, nil
	}
	return nil, errors.New("holds no private key that can be read, expected an unencrypted one")
}
