package devidp

import "net/http"

// metadata is OpenID Connect Discovery §3 with RFC 8414, RFC 9207 and CIBA Core
// §4. ES256 is the only algorithm, though Discovery asks for RS256 too.
type metadata struct {
	Issuer                string `json:"issuer"`
	AuthorizationEndpoint string `json:"authorization_endpoint"`
	TokenEndpoint         string `json:"token_endpoint"`
	RevocationEndpoint    string `json:"revocation_endpoint"`
	BackchannelEndpoint   string `json:"backchannel_authentication_endpoint"`
	JWKSURI               string `json:"jwks_uri"`

	Scopes           []string `json:"scopes_supported"`
	Claims           []string `json:"claims_supported"`
	ResponseTypes    []string `json:"response_types_supported"`
	ResponseModes    []string `json:"response_modes_supported"`
	GrantTypes       []string `json:"grant_types_supported"`
	SubjectTypes     []string `json:"subject_types_supported"`
	SigningAlgs      []string `json:"id_token_signing_alg_values_supported"`
	AuthMethods      []string `json:"token_endpoint_auth_methods_supported"`
	RevocationAuth   []string `json:"revocation_endpoint_auth_methods_supported"`
	ChallengeMethods []string `json:"code_challenge_methods_supported"`
	DeliveryModes    []string `json:"backchannel_token_delivery_modes_supported"`

	IssInResponse bool `json:"authorization_response_iss_parameter_supported"`
	UserCode      bool `json:"backchannel_user_code_parameter_supported"`
	ClaimsParam   bool `json:"claims_parameter_supported"`
	RequestParam  bool `json:"request_parameter_supported"`
	RequestURI    bool `json:"request_uri_parameter_supported"` // absent would mean true
}

func (p *Provider) discovery(*http.Request) (any, error) {
	authMethods := []string{"client_secret_basic", "client_secret_post"}
	return metadata{
		Issuer:                p.issuer,
		AuthorizationEndpoint: p.issuer + "/authorize",
		TokenEndpoint:         p.issuer + "/token",
		RevocationEndpoint:    p.issuer + "/revoke",
		BackchannelEndpoint:   p.issuer + "/bc-authorize",
		JWKSURI:               p.issuer + "/jwks",
		Scopes:                scopes,
		Claims: []string{
			"iss", "sub", "aud", "iat", "exp", "auth_time", "acr", "amr", "nonce", "at_hash",
			"name", "email", "groups",
		},
		ResponseTypes:    []string{"code"},
		ResponseModes:    []string{"query"},
		GrantTypes:       []string{grantCode, grantCredentials, grantCIBA},
		SubjectTypes:     []string{"public"},
		SigningAlgs:      []string{"ES256"},
		AuthMethods:      authMethods,
		RevocationAuth:   authMethods,
		ChallengeMethods: []string{"S256"},
		DeliveryModes:    []string{"poll"},
		IssInResponse:    true,
	}, nil
}

func (p *Provider) jwks(*http.Request) (any, error) { return p.tokens.keys, nil }
