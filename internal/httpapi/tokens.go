package httpapi

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/minter"
)

// tokenRequest reads what RFC 7662 §2.1 and RFC 7009 §2.1 have in common: a token, and
// the service that sends it. The hint says nothing that Writ needs, since there is one
// kind of token.
func (a *API) tokenRequest(w http.ResponseWriter, r *http.Request) (service Service, token string, err error) {
	body, err := readBody(w, r, "application/x-www-form-urlencoded")
	if err != nil {
		return service, "", err
	}
	form, err := url.ParseQuery(string(body))
	if err != nil {
		return service, "", fault.New(fault.InvalidRequest, "the body is not a form")
	}
	if service, err = a.service(r, form); err != nil {
		return service, "", err
	}
	if len(form["token"]) != 1 {
		return service, "", fault.Invalid("token", "expected exactly one token")
	}
	return service, form.Get("token"), nil
}

// revokeToken is RFC 7009. What is no token of ours, or is over, is as good as revoked;
// a token for somebody else is refused, so that its sender does not think it is.
func (a *API) revokeToken(w http.ResponseWriter, r *http.Request) error {
	service, token, err := a.tokenRequest(w, r)
	if err != nil {
		return err
	}
	sure, err := a.Keys.Learn(r.Context(), token)
	if err != nil {
		return err
	}
	audience, leaseID, ok := a.Keys.Lease(token)
	switch {
	case !ok && !sure:
		return fault.New(fault.Unavailable, "the token's key is not known here yet; try again")
	case ok && audience != service.Audience:
		return fault.Invalid("token", "is for another audience; only that audience's service, an operator or the agent can end it")
	case ok:
		if err := a.Revoker.RevokeToken(r.Context(), service.ID, leaseID); err != nil {
			return err
		}
	}
	w.WriteHeader(http.StatusOK)
	return nil
}

// statusList serves one list of draft-ietf-oauth-status-list §8, to anybody.
func (a *API) statusList(w http.ResponseWriter, r *http.Request) error {
	name := chi.URLParam(r, "list")
	list, err := strconv.ParseInt(name, 10, 64)
	if err != nil || strconv.FormatInt(list, 10) != name {
		return fault.New(fault.NotFound, "there is no such status list")
	}
	if r.URL.Query().Has("time") { // §8.4
		return fault.New(fault.NotFound, "status lists of the past are not kept; ask without time")
	}
	token, err := a.Status.List(r.Context(), list)
	if err != nil {
		return err
	}
	h := w.Header()
	h.Set("Access-Control-Allow-Origin", "*") // verifiers in browsers; there is nothing here that one could be tricked into
	h.Set("Content-Type", "application/statuslist+jwt")
	h.Set("Cache-Control", public(minter.StatusTTL))
	_, _ = w.Write([]byte(token)) // the client is gone if this fails
	return nil
}

// jwks serves the keys that verify minted tokens. A key is in it long enough before it
// signs that nobody needs to fetch it more often.
func (a *API) jwks(w http.ResponseWriter, r *http.Request) error {
	var body bytes.Buffer
	if err := json.NewEncoder(&body).Encode(a.Keys.JWKS()); err != nil {
		return fmt.Errorf("write keys: %w", err)
	}
	sum := sha256.Sum256(body.Bytes())
	tag := `"` + base64.RawURLEncoding.EncodeToString(sum[:12]) + `"`
	h := w.Header()
	h.Set("Cache-Control", public(minter.KeysMaxAge))
	h.Set("ETag", tag)
	if matches(r.Header.Values("If-None-Match"), tag) {
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	h.Set("Content-Type", "application/json")
	_, _ = w.Write(body.Bytes()) // the client is gone if this fails
	return nil
}

func public(maxAge time.Duration) string {
	return "public, max-age=" + strconv.Itoa(int(maxAge.Seconds()))
}

// matches is If-None-Match (RFC 9110 §13.1.2).
func matches(given []string, tag string) bool {
	for _, one := range strings.Split(strings.Join(given, ","), ",") {
		if one = strings.TrimSpace(one); one == "*" || strings.TrimPrefix(one, "W/") == tag {
			return true
		}
	}
	return false
}
