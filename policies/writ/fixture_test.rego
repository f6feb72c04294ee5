# METADATA
# title: What the tests share
# description: |
#   Tests live in `writ.test.<domain>`, never under `writ.rules`, where each package is a domain whose exports decide.
package writ.test.fixture

# METADATA
# title: A request of a user in one group, through an agent, as Writ would build it
request(user, group, agent) := {
	"user": {"id": user, "issuer": "https://idp.example", "claims": {"groups": [group]}},
	"agent": {"id": agent, "issuer": "https://idp.example", "claims": {}},
	"session": {"id": "ses_1", "labels": [], "counters": {}, "started_at": "2026-11-23T08:00:00Z"},
	"recent": {"window": "24h", "labels": [], "counters": {}},
	"intent": {"action": "none", "parameters": {}},
	"resource": {"type": "none", "id": "none", "properties": {}},
	"context": {},
	"env": {"time": "2026-11-23T08:01:00Z", "ip": "192.0.2.1"},
}

# METADATA
# title: The same request with other values at some JSON pointers
edit(request, changes) := json.patch(request, [{"op": "add", "path": path, "value": value} |
	some path, value in changes
])

# METADATA
# title: The decision in brief, its effect and the codes of its reasons
outcome(request) := [decision.effect, [reason.code | some reason in decision.reasons]] if {
	decision := data.writ.decision with input as request
}

approvals(acr) := [{"approver": "user", "acr": acr, "amr": ["hwk"], "auth_time": "2026-11-23T08:00:30Z"}]
