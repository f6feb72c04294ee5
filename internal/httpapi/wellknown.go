package httpapi

import (
	"net/http"
	"slices"
)

// metadata is RFC 8414. Writ issues tokens only in answer to decisions, so it has
// neither an authorization nor a token endpoint.
func (a *API) metadata(w http.ResponseWriter, _ *http.Request) error {
	w.Header().Set("Cache-Control", "public, max-age=300")
	return writeJSON(w, http.StatusOK, map[string]any{
		"issuer":                   a.ExternalURL,
		"jwks_uri":                 a.ExternalURL + "/.well-known/jwks.json",
		"introspection_endpoint":   a.ExternalURL + "/introspect",
		"revocation_endpoint":      a.ExternalURL + "/revoke",
		"response_types_supported": []string{},
		"grant_types_supported":    []string{},
		// The last two are access token types, of a service's own token.
		"introspection_endpoint_auth_methods_supported": []string{"client_secret_basic", "client_secret_post", "Bearer", "DPoP"},
		"revocation_endpoint_auth_methods_supported":    []string{"client_secret_basic", "client_secret_post"},
		"authorization_details_types_supported":         []string{"writ_intent"},
		"service_documentation":                         a.ExternalURL + "/openapi.yaml",
	})
}

// openIDMetadata is OpenID Connect Discovery §3, as far as Writ is an issuer: targets
// that trust it verify its assertions by this. Nobody signs in here, so there is no
// authorization endpoint.
func (a *API) openIDMetadata(w http.ResponseWriter, _ *http.Request) error {
	w.Header().Set("Cache-Control", "public, max-age=300")
	algorithms := []string{}
	for _, k := range a.Keys.JWKS().Keys {
		if !slices.Contains(algorithms, k.Algorithm) {
			algorithms = append(algorithms, k.Algorithm)
		}
	}
	return writeJSON(w, http.StatusOK, map[string]any{
		"issuer":                                a.ExternalURL,
		"jwks_uri":                              a.ExternalURL + "/.well-known/jwks.json",
		"response_types_supported":              []string{"id_token"},
		"subject_types_supported":               []string{"public"},
		"id_token_signing_alg_values_supported": algorithms,
		"scopes_supported":                      []string{"openid"},
		"claims_supported":                      []string{"iss", "sub", "aud", "iat", "exp", "jti", "sid", "act"},
		"service_documentation":                 a.ExternalURL + "/openapi.yaml",
	})
}

func (a *API) openapi(w http.ResponseWriter, _ *http.Request) error {
	w.Header().Set("Cache-Control", "public, max-age=300")
	w.Header().Set("Content-Type", "application/yaml")
	_, _ = w.Write(OpenAPI) // the client is gone if this fails
	return nil
}
