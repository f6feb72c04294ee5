package devidp

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// Whatever discovery names must be there, and the key set must hold no private half.
func TestDiscoveryIsTrue(t *testing.T) {
	p := newProvider(t)
	doc := decode[map[string]any](t, get(t, p, "/.well-known/openid-configuration"))
	for name, method := range map[string]string{
		"jwks_uri":                            http.MethodGet,
		"authorization_endpoint":              http.MethodGet,
		"token_endpoint":                      http.MethodPost,
		"revocation_endpoint":                 http.MethodPost,
		"backchannel_authentication_endpoint": http.MethodPost,
	} {
		endpoint, _ := doc[name].(string)
		if !strings.HasPrefix(endpoint, p.Issuer()+"/") {
			t.Errorf("%s is %q", name, endpoint)
			continue
		}
		w := httptest.NewRecorder()
		p.ServeHTTP(w, httptest.NewRequest(method, endpoint, nil))
		if w.Code == http.StatusNotFound || w.Code == http.StatusMethodNotAllowed {
			t.Errorf("%s %s: %d", method, endpoint, w.Code)
		}
	}
	if doc["issuer"] != p.Issuer() || doc["request_uri_parameter_supported"] != false {
		t.Errorf("discovery %v", doc)
	}

	var set struct{ Keys []map[string]json.RawMessage }
	if err := json.Unmarshal(get(t, p, "/jwks").Body.Bytes(), &set); err != nil || len(set.Keys) != 1 {
		t.Fatalf("key set %v: %v", set, err)
	}
	if _, private := set.Keys[0]["d"]; private {
		t.Error("the private key is published")
	}
}
