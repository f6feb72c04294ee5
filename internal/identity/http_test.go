package identity_test

import (
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"

	"github.com/writsec/writ/internal/decision"
	"github.com/writsec/writ/internal/httpapi"
	"github.com/writsec/writ/internal/identity"
	"github.com/writsec/writ/internal/telemetry"
)

func init() {
	identity.OverHTTP.Decide = func(v *identity.Verifier, bearer, subject string) (int, string) {
		body := map[string]any{
			"intent":   map[string]any{"action": "crm.opportunity.read"},
			"resource": map[string]any{"type": "crm.opportunity", "id": "opp-42"},
		}
		if subject != "" {
			body["subject_token"] = subject
		}
		raw, err := json.Marshal(body)
		if err != nil {
			panic(err)
		}
		r := httptest.NewRequest(http.MethodPost, "/decide", strings.NewReader(string(raw)))
		r.Header.Set("Content-Type", "application/json")
		return answer(v, r, bearer)
	}
	identity.OverHTTP.Operate = func(v *identity.Verifier, bearer string) (int, string) {
		return answer(v, httptest.NewRequest(http.MethodGet, "/audit/checkpoint", nil), bearer)
	}
}

// answer is what an API answers that has nothing but a verifier: who is refused gets
// no further.
func answer(v *identity.Verifier, r *http.Request, bearer string) (status int, detail string) {
	log := slog.New(slog.DiscardHandler)
	api := httpapi.New(httpapi.Config{
		Identity: v, Decider: decision.New(decision.Config{Identity: v, Logger: log}), Metrics: telemetry.NewMetrics(), Logger: log,
	})
	r.Header.Set("Authorization", "Bearer "+bearer)
	w := httptest.NewRecorder()
	api.ServeHTTP(w, r)
	var problem struct{ Code, Detail string }
	if err := json.Unmarshal(w.Body.Bytes(), &problem); err != nil {
		panic(err)
	}
	return w.Code, problem.Detail
}
