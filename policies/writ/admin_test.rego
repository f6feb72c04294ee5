package writ.test.admin

import data.writ.test.fixture

issuer := "https://idp.example"

request(groups, action) := {
	"operator": {"id": "olga", "issuer": issuer, "claims": {"groups": groups}},
	"action": action,
	"resource": {"limit": 100},
	"env": {"time": "2026-11-23T08:01:00Z", "ip": "192.0.2.1"},
}

allowed := {"allow": true, "reasons": [{"code": "operator_role", "message": "One of the operator's groups may do this"}]}

refused := {"allow": false, "reasons": [{"code": "not_permitted", "message": "None of your groups may do this"}]}

answer(asked) := out if {
	out := data.writ.admin with input as asked
}

everything := {
	"audit.checkpoint.read", "audit.entries.read", "audit.proof.read",
	"sessions.read", "decisions.read", "policy.read", "leases.read", "revocations.read", "revocations.lift",
}

test_operators_may_do_all if {
	every action in everything | {"approvals.read", "something.new"} {
		answer(request(["writ-operators"], action)) == allowed
	}
}

test_auditors_read_the_log_and_nothing_else if {
	every action in everything {
		answer(request(["writ-auditors"], action)) == {true: allowed, false: refused}[startswith(action, "audit.")]
	}
}

test_groups[name] if {
	some name, case in {
		"one of several": {"groups": ["x", "writ-operators"], "want": allowed},
		"none": {"groups": [], "want": refused},
		"another": {"groups": ["sales"], "want": refused},
		"a string": {"groups": "writ-operators", "want": refused},
		"an object with such a value": {"groups": {"not": "writ-operators"}, "want": refused},
		"an object with such a key": {"groups": {"writ-operators": true}, "want": refused},
		"null": {"groups": null, "want": refused},
		"true": {"groups": true, "want": refused},
		"nested": {"groups": [["writ-operators"]], "want": refused},
		"joined": {"groups": ["x,writ-operators"], "want": refused},
		"a glob": {"groups": ["*"], "want": refused},
		"other case": {"groups": ["Writ-Operators"], "want": refused},
	}
	answer(request(case.groups, "sessions.read")) == case.want
}

test_no_groups if {
	answer(json.remove(request([], "sessions.read"), ["operator/claims/groups"])) == refused
}

test_roles[name] if {
	some name, case in {
		"exact": {"roles": [{"actions": ["sessions.read"]}], "want": allowed},
		"one of several": {"roles": [{"actions": []}, {"actions": ["x", "sessions.*"]}], "want": allowed},
		"of this issuer": {"roles": [{"actions": ["**"], "issuer": issuer}], "want": allowed},
		"of another issuer": {"roles": [{"actions": ["**"], "issuer": "https://partner.example"}], "want": refused},
		"of no issuer": {"roles": [{"actions": ["**"], "issuer": null}], "want": refused},
		"star stops at a dot": {"roles": [{"actions": ["*"]}], "want": refused},
		"no prefix": {"roles": [{"actions": ["sessions"]}], "want": refused},
		"other case": {"roles": [{"actions": ["Sessions.Read"]}], "want": refused},
		"a string for actions": {"roles": [{"actions": "**"}], "want": refused},
		"no actions": {"roles": [{}], "want": refused},
		"no list": {"roles": {"actions": ["**"]}, "want": refused},
		"null": {"roles": null, "want": refused},
	}
	got := answer(request(["staff"], "sessions.read")) with data.writ.operators as {"staff": case.roles}
	got == case.want
}

# An action is matched, never read as a pattern.
test_values_are_no_patterns if {
	every action in {"audit.**", "**", "*", "{audit.entries.read,x}", ""} {
		got := answer(request(["staff"], action)) with data.writ.operators as {"staff": [{"actions": ["audit.entries.read"]}]}
		got == refused
	}
}

test_odd_input if {
	every changes in [
		{"/operator": null}, {"/operator/claims": []}, {"/action": null}, {"/action": ["audit.entries.read"]},
	] {
		answer(fixture.edit(request(["writ-auditors"], "audit.entries.read"), changes)) == refused
	}
}
