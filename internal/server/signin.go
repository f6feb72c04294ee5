package server

import (
	"fmt"

	"github.com/writsec/writ/internal/config"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/session"
	"github.com/writsec/writ/internal/signin"
	"github.com/writsec/writ/internal/sqlstore"
)

// newSignIn makes the flow of users' sign-ins, nil where no issuer is set up for it.
func newSignIn(cfg config.Config, v *identity.Verifier, store *sqlstore.Store, settings session.Settings) (*signin.Flow, error) {
	f := &signin.Flow{
		Store: sqlstore.For[signin.Tx](store), Sessions: settings, ExternalURL: cfg.ExternalURL, Redirects: map[identity.Ref][]string{},
	}
	for _, is := range cfg.Issuers {
		s := is.SignIn
		if s == nil {
			continue
		}
		secret, err := config.Secret(s.ClientSecretFile)
		if err != nil {
			return nil, fmt.Errorf("sign_in of %s: %w", is.Issuer, err)
		}
		f.Providers = append(f.Providers, &signin.Provider{
			Issuer: is.Issuer, ClientID: s.ClientID, ClientSecret: secret, AuthInBody: s.ClientAuth == "client_secret_post",
			Scopes: s.Scopes, HTTP: identity.NewHTTPClient(issuerTimeout), Verifier: v,
		})
	}
	if len(f.Providers) == 0 {
		return nil, nil
	}
	for _, a := range cfg.Agents {
		f.Redirects[identity.Ref{Issuer: a.Issuer, ID: a.ID}] = a.RedirectURIs
	}
	return f, nil
}
