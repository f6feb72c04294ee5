package config_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/writsec/writ/internal/config"
)

const (
	signIn = "    sign_in:\n      client_id: writ\n      client_secret_file: secret\n"
	agents = "agents:\n  - issuer: https://idp.example\n    id: crm-agent\n"
)

func TestSignIn(t *testing.T) {
	dir := folder(t)
	cfg, msg := load(t, dir, edited(t, "minters:\n", signIn+"minters:\n")+agents+"    redirect_uris: [\"https://crm.example/done?a=b\", \"http://127.0.0.1:7/x\", \"http://[::1]:7/x\"]\n")
	if msg != "" {
		t.Fatal(msg)
	}
	want := &config.SignIn{ClientID: "writ", ClientSecretFile: cfg.Issuers[0].CIBA.ClientSecretFile, ClientAuth: "client_secret_basic", Scopes: []string{"openid"}}
	if diff := cmp.Diff(want, cfg.Issuers[0].SignIn); diff != "" {
		t.Error(diff)
	}
	if a := cfg.Agents[0]; a.ID != "crm-agent" || len(a.RedirectURIs) != 3 {
		t.Errorf("%+v", a)
	}

	uris := func(v string) string { return agents + "    redirect_uris: [" + v + "]\n" }
	for _, tt := range []struct{ name, signIn, agents, want string }{
		{"no client", "    sign_in: {client_secret_file: secret}\n", "", "writ.yaml:14: issuers[0].sign_in.client_id: is missing"},
		{"no secret", "    sign_in: {client_id: writ}\n", "", "writ.yaml:14: issuers[0].sign_in.client_secret_file: is missing"},
		{"empty secret", "    sign_in: {client_id: writ, client_secret_file: empty}\n", "", "writ.yaml:14: issuers[0].sign_in.client_secret_file: read secret: empty is empty"},
		{"unknown way of authentication", signIn + "      client_auth: none\n", "", `writ.yaml:17: issuers[0].sign_in.client_auth: is "none", expected one of client_secret_basic, client_secret_post`},
		{"no openid", signIn + "      scopes: [email]\n", "", "writ.yaml:17: issuers[0].sign_in.scopes: does not list openid, without which nobody says who signed in"},
		{"two scopes in one", signIn + "      scopes: [openid, \"a b\"]\n", "", `writ.yaml:17: issuers[0].sign_in.scopes[1]: is "a b", which is no scope`},
		{"agent of no issuer", "", "agents: [{id: a}]\n", "writ.yaml:22: agents[0].issuer: is \"\", expected one of issuers that speaks for agent"},
		{"agent of a stranger", "", "agents: [{issuer: \"https://x.example\", id: a}]\n", `writ.yaml:22: agents[0].issuer: is "https://x.example", expected one of issuers that speaks for agent`},
		{"agent without id", "", "agents: [{issuer: \"https://idp.example\"}]\n", "writ.yaml:22: agents[0].id: is missing"},
		{"agent twice", "", agents + "  - {issuer: \"https://idp.example\", id: crm-agent}\n", "writ.yaml:25: agents[1]: names what agents[0] names already"},
		{"redirect in clear", "", uris(`"http://crm.example/done"`), `writ.yaml:25: agents[0].redirect_uris[0]: is "http://crm.example/done", expected https: plain http is for loopback only`},
		{"redirect to a scheme of its own", "", uris(`"crm:done"`), `writ.yaml:25: agents[0].redirect_uris[0]: is "crm:done", expected an https URL`},
		{"redirect that is script", "", uris(`"javascript://x/%0aalert(1)"`), `writ.yaml:25: agents[0].redirect_uris[0]: is "javascript://x/%0aalert(1)", expected an https URL`},
		{"redirect with a fragment", "", uris(`"https://crm.example/#a"`), `writ.yaml:25: agents[0].redirect_uris[0]: is "https://crm.example/#a", expected a URL without user and fragment`},
		{"redirect with a user", "", uris(`"https://crm.example@evil.example/"`), `writ.yaml:25: agents[0].redirect_uris[0]: is "https://crm.example@evil.example/", expected a URL without user and fragment`},
		{"redirect with a space", "", uris(`"https://crm.example/a b"`), `writ.yaml:25: agents[0].redirect_uris[0]: is "https://crm.example/a b", expected visible ASCII characters only`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, msg := load(t, dir, edited(t, "minters:\n", tt.signIn+"minters:\n")+tt.agents); msg != tt.want {
				t.Errorf("got  %s\nwant %s", msg, tt.want)
			}
		})
	}
	if _, msg := load(t, dir, edited(t, "speaks_for: [user, agent]\n", "speaks_for: [agent]\n"+signIn)); msg != "writ.yaml:10: issuers[0].sign_in: has no effect: speaks_for does not list user" {
		t.Error(msg)
	}
}
