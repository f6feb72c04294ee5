package minter

import "time"

// Expand is expand.
var Expand = expand

// ReadAnswer is what readAnswer finds of tokens.
func ReadAnswer(body []byte) (token, refresh string, life time.Duration, err error) {
	a, err := readAnswer(body)
	return a.token, a.refresh, a.life, err
}
