package writ.test.bounds

import data.writ.test.fixture

# A user, an agent and a rule that allow everything to whoever is inside the bounds.
request := fixture.edit(fixture.request("alice", "staff", "helper"), {
	"/intent/action": "doc.page.read",
	"/resource/type": "doc.page",
	"/resource/id": "team/page-1",
})

wide := {"actions": ["**"], "resources": [{"type": "doc.page", "id": "**"}]}

outcome(asked, grants, agents) := out if {
	out := fixture.outcome(asked) with data.writ.grants as grants
		with data.writ.agents as agents
		with data.writ.rules as {"doc": {"allow": {{"code": "ok", "message": "Fine"}}}}
}

allowed := ["allow", ["ok"]]

test_patterns[name] if {
	some name, case in {
		"equal": {"action": "doc.page.read", "id": "team/page-1", "want": allowed},
		"star within a part": {"action": "doc.page.r*", "id": "team/page-*", "want": allowed},
		"star for a part": {"action": "doc.*.read", "id": "*/page-1", "want": allowed},
		"two stars": {"action": "**", "id": "**", "want": allowed},
		"alternatives": {"action": "doc.page.{read,list}", "id": "{team,club}/page-[0-9]", "want": allowed},
		"star stops at a dot": {"action": "doc.*", "id": "**", "want": ["deny", ["not_granted"]]},
		"star stops at a slash": {"action": "**", "id": "*", "want": ["deny", ["not_granted"]]},
		"no prefix match": {"action": "doc.page", "id": "**", "want": ["deny", ["not_granted"]]},
		"no suffix match": {"action": "page.read", "id": "**", "want": ["deny", ["not_granted"]]},
		"dot is no wildcard": {"action": "doc.page.rea.", "id": "**", "want": ["deny", ["not_granted"]]},
		"case counts": {"action": "Doc.Page.Read", "id": "**", "want": ["deny", ["not_granted"]]},
		"empty": {"action": "", "id": "", "want": ["deny", ["not_granted"]]},
	}
	grant := {"actions": [case.action], "resources": [{"type": "doc.page", "id": case.id}]}
	outcome(request, {"staff": [grant]}, {"helper": {"ceiling": wide}}) == case.want
}

# An action of one grant does not combine with a resource of another, and a type is no pattern.
test_grants[name] if {
	some name, case in {
		"none": {"grants": {}, "want": "not_granted"},
		"of another group": {"grants": {"Staff": [wide]}, "want": "not_granted"},
		"action here, resource there": {
			"grants": {"staff": [
				{"actions": ["**"], "resources": [{"type": "doc.other", "id": "**"}]},
				{"actions": ["doc.page.write"], "resources": [{"type": "doc.page", "id": "**"}]},
			]},
			"want": "not_granted",
		},
		"type as a pattern": {
			"grants": {"staff": [{"actions": ["**"], "resources": [{"type": "**", "id": "**"}]}]},
			"want": "not_granted",
		},
		"no actions": {"grants": {"staff": [object.remove(wide, ["actions"])]}, "want": "not_granted"},
		"no resources": {"grants": {"staff": [object.remove(wide, ["resources"])]}, "want": "not_granted"},
		"of another issuer": {
			"grants": {"staff": [object.union(wide, {"issuer": "https://partner.example"})]},
			"want": "not_granted",
		},
		"of no issuer": {"grants": {"staff": [object.union(wide, {"issuer": null})]}, "want": "not_granted"},
		"of an issuer with a slash more": {
			"grants": {"staff": [object.union(wide, {"issuer": "https://idp.example/"})]},
			"want": "not_granted",
		},
	}
	outcome(request, case.grants, {"helper": {"ceiling": wide}}) == ["deny", [case.want]]
}

test_grant_of_this_issuer if {
	grants := {"staff": [object.union(wide, {"issuer": "https://idp.example"})]}
	outcome(request, grants, {"helper": {"ceiling": wide}}) == allowed
}

test_groups[name] if {
	some name, case in {
		"one of several": {"groups": ["x", "staff"], "want": allowed},
		"none": {"groups": [], "want": ["deny", ["not_granted"]]},
		"a string": {"groups": "staff", "want": ["deny", ["not_granted"]]},
		"an object with such a value": {"groups": {"not": "staff"}, "want": ["deny", ["not_granted"]]},
		"an object with such a key": {"groups": {"staff": false}, "want": ["deny", ["not_granted"]]},
		"null": {"groups": null, "want": ["deny", ["not_granted"]]},
		"true": {"groups": true, "want": ["deny", ["not_granted"]]},
		"nested": {"groups": [["staff"]], "want": ["deny", ["not_granted"]]},
		"joined": {"groups": ["x,staff"], "want": ["deny", ["not_granted"]]},
		"a glob": {"groups": ["*"], "want": ["deny", ["not_granted"]]},
		"other case": {"groups": ["STAFF"], "want": ["deny", ["not_granted"]]},
	}
	changed := fixture.edit(request, {"/user/claims/groups": case.groups})
	outcome(changed, {"staff": [wide]}, {"helper": {"ceiling": wide}}) == case.want
}

test_no_groups_claim if {
	without := json.remove(request, ["user/claims/groups"])
	outcome(without, {"staff": [wide]}, {"helper": {"ceiling": wide}}) == ["deny", ["not_granted"]]
}

test_agents[name] if {
	some name, case in {
		"registered": {"agents": {"helper": {"ceiling": wide}}, "want": allowed},
		"of this issuer": {
			"agents": {"helper": {"ceiling": wide, "issuer": "https://idp.example"}},
			"want": allowed,
		},
		"unknown": {"agents": {"Helper": {"ceiling": wide}}, "want": ["deny", ["agent_unknown"]]},
		"of another issuer": {
			"agents": {"helper": {"ceiling": wide, "issuer": "https://partner.example"}},
			"want": ["deny", ["agent_unknown"]],
		},
		"without a ceiling": {"agents": {"helper": {"owner": "x"}}, "want": ["deny", ["outside_ceiling"]]},
		"with a low ceiling": {
			"agents": {"helper": {"ceiling": {"actions": ["doc.page.list"], "resources": wide.resources}}},
			"want": ["deny", ["outside_ceiling"]],
		},
		"with a ceiling over another type": {
			"agents": {"helper": {"ceiling": {"actions": ["**"], "resources": [{"type": "doc", "id": "**"}]}}},
			"want": ["deny", ["outside_ceiling"]],
		},
	}
	outcome(request, {"staff": [wide]}, case.agents) == case.want
}

test_envelope[name] if {
	some name, case in {
		"equal": {"actions": ["doc.page.read"], "resources": [{"type": "doc.page", "id": "team/page-1"}], "want": allowed},
		"wildcards": {"actions": ["doc.*.*"], "resources": [{"type": "doc.page", "id": "team/*"}], "want": allowed},
		"one of several": {
			"actions": ["x", "doc.page.read"],
			"resources": [{"type": "x", "id": "**"}, {"type": "doc.page", "id": "**"}],
			"want": allowed,
		},
		"everything": {"actions": ["**"], "resources": [{"type": "doc.page", "id": "**"}], "want": allowed},
		"another action": {
			"actions": ["doc.page.write"],
			"resources": [{"type": "doc.page", "id": "**"}],
			"want": ["deny", ["outside_envelope"]],
		},
		"another resource": {
			"actions": ["**"],
			"resources": [{"type": "doc.page", "id": "team/page-2"}],
			"want": ["deny", ["outside_envelope"]],
		},
		"type as a pattern": {
			"actions": ["**"],
			"resources": [{"type": "**", "id": "**"}],
			"want": ["deny", ["outside_envelope"]],
		},
		"no actions": {"actions": [], "resources": [{"type": "doc.page", "id": "**"}], "want": ["deny", ["outside_envelope"]]},
		"no resources": {"actions": ["**"], "resources": [], "want": ["deny", ["outside_envelope"]]},
		"null": {"actions": null, "resources": null, "want": ["deny", ["outside_envelope"]]},
		"strings for arrays": {"actions": "**", "resources": "**", "want": ["deny", ["outside_envelope"]]},
		"patterns that are no strings": {
			"actions": [1, null, ["**"], {"a": "**"}],
			"resources": [{"type": "doc.page", "id": {}}],
			"want": ["deny", ["outside_envelope"]],
		},
		"alternatives": {
			"actions": ["{doc.page.read,x}"],
			"resources": [{"type": "doc.page", "id": "**"}],
			"want": ["deny", ["outside_envelope"]],
		},
		"class": {
			"actions": ["doc.page.[a-z]ead"],
			"resources": [{"type": "doc.page", "id": "**"}],
			"want": ["deny", ["outside_envelope"]],
		},
		"question mark": {
			"actions": ["doc.page.rea?"],
			"resources": [{"type": "doc.page", "id": "**"}],
			"want": ["deny", ["outside_envelope"]],
		},
		"escape": {
			"actions": [`doc.page.rea\d`],
			"resources": [{"type": "doc.page", "id": "**"}],
			"want": ["deny", ["outside_envelope"]],
		},
		"broken pattern beside a good one": {
			"actions": ["[", "{", `\`, "doc.page.read"],
			"resources": [{"type": "doc.page", "id": "["}, {"type": "doc.page", "id": "**"}],
			"want": allowed,
		},
	}
	envelope := {"actions": case.actions, "resources": case.resources, "source": "agent"}
	changed := fixture.edit(request, {"/session/envelope": envelope})
	outcome(changed, {"staff": [wide]}, {"helper": {"ceiling": wide}}) == case.want
}

# Only an envelope that is not there is no constraint.
test_envelope_of_no_use[name] if {
	some name, envelope in {"null": null, "false": false, "empty": {}, "array": [], "string": "**"}
	changed := fixture.edit(request, {"/session/envelope": envelope})
	outcome(changed, {"staff": [wide]}, {"helper": {"ceiling": wide}}) == ["deny", ["outside_envelope"]]
}

test_envelope_does_not_widen if {
	changed := fixture.edit(request, {"/session/envelope": {
		"actions": ["**"],
		"resources": [{"type": "doc.page", "id": "**"}],
		"source": "user",
	}})
	narrow := {"actions": ["doc.page.list"], "resources": wide.resources}
	outcome(changed, {"staff": [narrow]}, {"helper": {"ceiling": narrow}}) == ["deny", ["not_granted", "outside_ceiling"]]
}

# Patterns are read from data and the envelope only; in a value, their letters are letters.
test_values_are_no_patterns[name] if {
	some name, changes in {
		"action": {"/intent/action": "doc.page.*"},
		"action of alternatives": {"/intent/action": "{doc.page.read,x}"},
		"id": {"/resource/id": "team/*"},
		"id of everything": {"/resource/id": "**"},
	}
	narrow := {"actions": ["doc.page.read"], "resources": [{"type": "doc.page", "id": "team/page-1"}]}
	changed := fixture.edit(request, changes)
	outcome(changed, {"staff": [narrow]}, {"helper": {"ceiling": wide}}) == ["deny", ["not_granted"]]
}

test_all_bounds_are_told if {
	changed := fixture.edit(request, {"/session/envelope": {"actions": [], "resources": [], "source": "agent"}})
	outcome(changed, {}, {}) == ["deny", ["agent_unknown", "not_granted", "outside_envelope"]]
}

open := {"actions": ["**"], "resources": [{"type": "doc.page", "id": "**"}], "source": "agent"}

test_invalid_input[name] if {
	some name, changes in {
		"user id": {"/user/id": 1},
		"empty user id": {"/user/id": ""},
		"user issuer": {"/user/issuer": null},
		"claims": {"/user/claims": "groups"},
		"agent id": {"/agent/id": ["helper"]},
		"agent issuer": {"/agent/issuer": ""},
		"session": {"/session": []},
		"labels": {"/session/labels": "untrusted_content"},
		"labels as an object": {"/session/labels": {"a": "untrusted_content"}},
		"a label": {"/session/labels": [{"untrusted_content": true}]},
		"counters": {"/session/counters": []},
		"a counter": {"/session/counters": {"n": "1"}},
		"a negative counter": {"/session/counters": {"n": -1}},
		"a broken counter": {"/session/counters": {"n": 0.5}},
		"recent": {"/recent": []},
		"recent labels": {"/recent/labels": "untrusted_content"},
		"a recent counter": {"/recent/counters": {"n": "1"}},
		"a negative recent counter": {"/recent/counters": {"n": -1}},
		"limits": {"/session/envelope": object.union(open, {"limits": ["n"]})},
		"limits of null": {"/session/envelope": object.union(open, {"limits": null})},
		"a limit": {"/session/envelope": object.union(open, {"limits": {"n": "1"}})},
		"a negative limit": {"/session/envelope": object.union(open, {"limits": {"n": -1}})},
		"action": {"/intent/action": ["doc.page.read"]},
		"parameters": {"/intent/parameters": "x"},
		"resource type": {"/resource/type": {}},
		"resource id": {"/resource/id": 7},
		"empty resource id": {"/resource/id": ""},
		"properties": {"/resource/properties": null},
		"approvals": {"/approvals": {"approver": "user"}},
	}
	changed := fixture.edit(request, changes)
	outcome(changed, {"staff": [wide]}, {"helper": {"ceiling": wide}}) == ["deny", ["invalid_input"]]
}

test_missing_input[path] if {
	some path in [
		"user", "user/id", "user/issuer", "user/claims", "agent", "agent/id", "agent/issuer",
		"session", "session/labels", "session/counters", "recent", "recent/labels", "recent/counters", "intent", "intent/action", "intent/parameters",
		"resource", "resource/type", "resource/id", "resource/properties",
	]
	changed := json.remove(request, [path])
	outcome(changed, {"staff": [wide]}, {"helper": {"ceiling": wide}}) == ["deny", ["invalid_input"]]
}

test_no_input_at_all if {
	data.writ.decision.effect == "deny"
}
