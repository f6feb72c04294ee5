package writ.test.decision

import data.writ.test.fixture

# Inside all bounds, so that only the mocked rules decide.
request := fixture.edit(fixture.request("alice", "staff", "helper"), {
	"/intent/action": "doc.page.read",
	"/resource/type": "doc.page",
	"/resource/id": "page-1",
})

wide := {"actions": ["**"], "resources": [{"type": "doc.page", "id": "**"}]}

decide(asked, rules) := decision if {
	decision := data.writ.decision with input as asked
		with data.writ.rules as rules
		with data.writ.grants as {"staff": [wide]}
		with data.writ.agents as {"helper": {"ceiling": wide}}
}

brief(decision) := [decision.effect, [reason.code | some reason in decision.reasons]]

ok := {"code": "ok", "message": "Fine"}

no := {"code": "no", "message": "Never"}

sure := {"code": "sure", "message": "Sure?", "approver": "user"}

key := {"minter": "m", "ttl": "1m", "scope": {"scopes": ["a"]}}

# --- Combining -------------------------------------------------------------------------------------------------------

test_combining[name] if {
	some name, case in {
		"no domain": {"rules": {}, "want": ["deny", ["no_rule"]]},
		"a domain that says nothing": {"rules": {"a": {}}, "want": ["deny", ["no_rule"]]},
		"empty sets": {"rules": {"a": {"allow": set(), "deny": set(), "ask": set()}}, "want": ["deny", ["no_rule"]]},
		"allow": {"rules": {"a": {"allow": {ok}}}, "want": ["allow", ["ok"]]},
		"ask": {"rules": {"a": {"allow": {ok}, "ask": {sure}}}, "want": ["require_ciba", ["sure"]]},
		"deny": {"rules": {"a": {"deny": {no}}}, "want": ["deny", ["no"]]},
		"deny beats allow": {"rules": {"a": {"allow": {ok}, "deny": {no}}}, "want": ["deny", ["no"]]},
		"deny beats ask": {"rules": {"a": {"allow": {ok}, "deny": {no}, "ask": {sure}}}, "want": ["deny", ["no"]]},
		"ask alone does not allow": {"rules": {"a": {"ask": {sure}}}, "want": ["deny", ["no_rule"]]},
		"deny of another domain": {"rules": {"a": {"allow": {ok}}, "b": {"deny": {no}}}, "want": ["deny", ["no"]]},
		"ask of another domain": {
			"rules": {"a": {"allow": {ok}}, "b": {"ask": {sure}}},
			"want": ["require_ciba", ["sure"]],
		},
		"other exports are no members": {
			"rules": {"a": {"allow": {ok}, "limits": {"deny": 1}, "denied": {no}}},
			"want": ["allow", ["ok"]],
		},
	}
	brief(decide(request, case.rules)) == case.want
}

test_deny_of_another_domain_denies_real_rules if {
	read := fixture.edit(fixture.request("alice", "sales", "sales-agent"), {
		"/intent/action": "crm.opportunity.read",
		"/resource/type": "crm.opportunity",
	})
	fixture.outcome(read) == ["allow", ["read_opportunity"]]
	outcome := fixture.outcome(read) with data.writ.rules.freeze.deny as {{"code": "frozen", "message": "Not now"}}
	outcome == ["deny", ["frozen"]]
}

test_out_of_bounds_no_rule_is_asked if {
	decision := decide(fixture.edit(request, {"/user/claims/groups": []}), {"a": {
		"allow": {ok},
		"deny": {object.union(no, {"advice": {"secret": 1}, "labels": ["seen"]})},
	}})
	decision == {
		"effect": "deny",
		"reasons": [{"code": "not_granted", "message": "None of the user's grants covers this"}],
		"labels": [],
	}
}

# --- Approvals -------------------------------------------------------------------------------------------------------

test_approvals[name] if {
	yes := {"approver": "user", "acr": "gold", "amr": []}
	strong := object.union(sure, {"acr_values": ["gold", "platinum"]})
	some name, case in {
		"met": {"ask": sure, "approvals": [yes], "want": "allow"},
		"empty acr_values": {"ask": object.union(sure, {"acr_values": []}), "approvals": [yes], "want": "allow"},
		"met by acr": {"ask": strong, "approvals": [yes], "want": "allow"},
		"met by the second": {"ask": strong, "approvals": [{"approver": "user", "acr": "tin", "amr": []}, yes], "want": "allow"},
		"none": {"ask": sure, "approvals": [], "want": "require_ciba"},
		"other acr": {"ask": strong, "approvals": [object.union(yes, {"acr": "tin"})], "want": "require_ciba"},
		"acr in other case": {"ask": strong, "approvals": [object.union(yes, {"acr": "Gold"})], "want": "require_ciba"},
		"no acr": {"ask": strong, "approvals": [object.remove(yes, ["acr"])], "want": "require_ciba"},
		"empty acr": {"ask": strong, "approvals": [object.union(yes, {"acr": ""})], "want": "require_ciba"},
		"all acrs": {"ask": strong, "approvals": [object.union(yes, {"acr": ["gold"]})], "want": "require_ciba"},
		"another approver": {"ask": sure, "approvals": [object.union(yes, {"approver": "boss"})], "want": "require_ciba"},
		"no approver": {"ask": sure, "approvals": [object.remove(yes, ["approver"])], "want": "require_ciba"},
		"acr of one, approver of another": {
			"ask": strong,
			"approvals": [object.union(yes, {"approver": "boss"}), object.union(yes, {"acr": "tin"})],
			"want": "require_ciba",
		},
		"nonsense": {"ask": sure, "approvals": ["user", null, true, 1], "want": "require_ciba"},
	}
	decision := decide(
		fixture.edit(request, {"/approvals": case.approvals}),
		{"a": {"allow": {ok}, "ask": {case.ask}}},
	)
	decision.effect == case.want
}

test_only_unmet_asks_are_told if {
	boss := {
		"code": "boss",
		"message": "Boss, sure?",
		"approver": "boss",
		"acr_values": ["gold"],
		"expires_in": "1h30m",
		"display": "full",
		"labels": ["asked"],
	}
	decision := decide(
		fixture.edit(request, {"/approvals": fixture.approvals("any")}),
		{"a": {"allow": {ok}, "ask": {sure}}, "b": {"ask": {boss}}},
	)
	decision == {
		"effect": "require_ciba",
		"reasons": [{"code": "boss", "message": "Boss, sure?"}],
		"approval": [object.remove(boss, ["labels"])],
		"labels": ["asked"],
	}
}

test_asks_in_order if {
	asks := {object.union(sure, {"code": code}) | some code in ["c", "a", "b"]}
	decision := decide(request, {"a": {"allow": {ok}, "ask": asks}})
	[ask.code | some ask in decision.approval] == ["a", "b", "c"]
}

# --- What comes with the effect --------------------------------------------------------------------------------------

test_labels_of_the_effect[effect] if {
	some effect, case in {
		"allow": {"approvals": fixture.approvals("any"), "deny": set(), "want": ["asked", "done"]},
		"require_ciba": {"approvals": [], "deny": set(), "want": ["asked"]},
		"deny": {"approvals": [], "deny": {object.union(no, {"labels": ["refused", "refused"]})}, "want": ["refused"]},
	}
	decision := decide(fixture.edit(request, {"/approvals": case.approvals}), {"a": {
		"allow": {object.union(ok, {"labels": ["done"]})},
		"ask": {object.union(sure, {"labels": ["asked"]})},
		"deny": case.deny,
	}})
	decision.effect == effect
	decision.labels == case.want
}

test_allow_in_full if {
	decision := decide(request, {
		"a": {"allow": {
			{"code": "b", "message": "B", "credential": key, "counters": {"n": 1, "m": 2.0}, "labels": ["y", "x"]},
			{"code": "a", "message": "A", "obligations": [{"type": "tell", "whom": "owner"}, {"type": "log"}]},
		}},
		"b": {"allow": {{
			"code": "c",
			"message": "C",
			"credential": key,
			"counters": {"n": 3},
			"obligations": [{"type": "log"}],
		}}},
	})
	decision == {
		"effect": "allow",
		"reasons": [{"code": "a", "message": "A"}, {"code": "b", "message": "B"}, {"code": "c", "message": "C"}],
		"credential": key,
		"labels": ["x", "y"],
		"counters": {"m": 2, "n": 3},
		"obligations": [{"type": "log"}, {"type": "tell", "whom": "owner"}],
	}
}

test_envelope_limits[name] if {
	spend := {"a": {"allow": {object.union(ok, {"counters": {"n": 3}})}}}
	some name, case in {
		"up to it": {"limits": {"n": 10}, "n": 7, "rules": spend, "want": ["allow", ["ok"]]},
		"over it": {"limits": {"n": 10}, "n": 8, "rules": spend, "want": ["deny", ["outside_envelope_limit"]]},
		"over it at once": {"limits": {"n": 2}, "n": 0, "rules": spend, "want": ["deny", ["outside_envelope_limit"]]},
		"of another counter": {"limits": {"m": 0}, "n": 8, "rules": spend, "want": ["allow", ["ok"]]},
		"none": {"limits": {}, "n": 8, "rules": spend, "want": ["allow", ["ok"]]},
		"an act that counts nothing": {"limits": {"n": 0}, "n": 8, "rules": {"a": {"allow": {ok}}}, "want": ["allow", ["ok"]]},
		"before a human is asked": {
			"limits": {"n": 2},
			"n": 0,
			"rules": object.union(spend, {"b": {"ask": {sure}}}),
			"want": ["deny", ["outside_envelope_limit"]],
		},
	}
	asked := fixture.edit(request, {
		"/session/counters": {"n": case.n},
		"/session/envelope": {
			"actions": ["**"],
			"resources": [{"type": "doc.page", "id": "**"}],
			"limits": case.limits,
			"source": "agent",
		},
	})
	brief(decide(asked, case.rules)) == case.want
}

test_different_credentials_conflict if {
	other := object.union(key, {"ttl": "2m"})
	decision := decide(request, {
		"a": {"allow": {object.union(ok, {"credential": key})}},
		"b": {"allow": {object.union(ok, {"credential": other})}},
	})
	decision == {
		"effect": "deny",
		"reasons": [{"code": "credential_conflict", "message": "The rules that allow this demand different credentials"}],
		"labels": [],
	}
}

test_nothing_of_an_allow_in_a_deny if {
	decision := decide(request, {"a": {
		"allow": {object.union(ok, {"credential": key, "counters": {"n": 1}, "obligations": [{"type": "log"}]})},
		"deny": {no},
	}})
	decision == {"effect": "deny", "reasons": [no], "labels": []}
}

test_advice_is_merged_in_order if {
	decision := decide(request, {
		"a": {"deny": {{"code": "b", "message": "B", "advice": {"max": 2, "b": 1}}, no}},
		"b": {"deny": {{"code": "a", "message": "A", "advice": {"max": 1, "a": 1}}}},
	})
	decision.advice == {"max": 2, "a": 1, "b": 1}
}

test_reasons_are_at_most_16 if {
	decision := decide(request, {"a": {"deny": {{"code": sprintf("n%d", [n]), "message": "N"} |
		some n in numbers.range(1, 40)
	}}})
	decision.effect == "deny"
	count(decision.reasons) == 16
}

# --- Exports that can't be read --------------------------------------------------------------------------------------

test_malformed_exports_deny[name] if {
	some name, exports in {
		"deny is true": {"deny": true},
		"deny is false": {"deny": false},
		"deny is a string": {"deny": "no"},
		"deny is null": {"deny": null},
		"deny is an array": {"deny": ["no"]},
		"deny is an object": {"deny": no},
		"allow is true": {"allow": true},
		"ask is true": {"ask": true},
		"a bare message": {"deny": {"no"}},
		"no code": {"deny": {{"message": "Never"}}},
		"no message": {"deny": {{"code": "no"}}},
		"empty message": {"deny": {{"code": "no", "message": ""}}},
		"message too long": {"deny": {{"code": "no", "message": sprintf("%0257d", [0])}}},
		"code in capitals": {"deny": {{"code": "No", "message": "Never"}}},
		"code with a space": {"deny": {{"code": "no way", "message": "Never"}}},
		"code too long": {"deny": {{"code": sprintf("n%064d", [0]), "message": "Never"}}},
		"code is a number": {"deny": {{"code": 7, "message": "Never"}}},
		"advice is a string": {"deny": {object.union(no, {"advice": "less"})}},
		"a credential with a deny": {"deny": {object.union(no, {"credential": key})}},
		"no approver": {"ask": {object.remove(sure, ["approver"])}},
		"approver is null": {"ask": {object.union(sure, {"approver": null})}},
		"approver is an array": {"ask": {object.union(sure, {"approver": ["user"]})}},
		"approver is empty": {"ask": {object.union(sure, {"approver": ""})}},
		"acr_values misspelt": {"ask": {object.union(sure, {"acr_value": ["gold"]})}},
		"acr_values is a string": {"ask": {object.union(sure, {"acr_values": "gold"})}},
		"acr_values is an object": {"ask": {object.union(sure, {"acr_values": {"a": "gold"}})}},
		"acr_values is null": {"ask": {object.union(sure, {"acr_values": null})}},
		"an empty acr": {"ask": {object.union(sure, {"acr_values": [""]})}},
		"expires_in is a number": {"ask": {object.union(sure, {"expires_in": 60})}},
		"expires_in without a unit": {"ask": {object.union(sure, {"expires_in": "60"})}},
		"expires_in is empty": {"ask": {object.union(sure, {"expires_in": ""})}},
		"expires_in is nothing": {"ask": {object.union(sure, {"expires_in": "0s"})}},
		"unknown display": {"ask": {object.union(sure, {"display": "none"})}},
		"labels is a string": {"allow": {object.union(ok, {"labels": "x"})}},
		"labels is an object": {"allow": {object.union(ok, {"labels": {"a": "x"}})}},
		"a label is a number": {"allow": {object.union(ok, {"labels": [1]})}},
		"a label with a space": {"allow": {object.union(ok, {"labels": ["a b"]})}},
		"credential is a string": {"allow": {object.union(ok, {"credential": "m"})}},
		"credential misspelt": {"allow": {object.union(ok, {"credentials": key})}},
		"counters is an array": {"allow": {object.union(ok, {"counters": [1]})}},
		"counters is an empty array": {"allow": {object.union(ok, {"counters": []})}},
		"a negative counter": {"allow": {object.union(ok, {"counters": {"n": -1}})}},
		"a broken counter": {"allow": {object.union(ok, {"counters": {"n": 0.5}})}},
		"a counter is a string": {"allow": {object.union(ok, {"counters": {"n": "1"}})}},
		"an approver in an allow": {"allow": {object.union(ok, {"approver": "user"})}},
		"obligations is an object": {"allow": {object.union(ok, {"obligations": {"type": "log"}})}},
		"obligations is an object of objects": {"allow": {object.union(ok, {"obligations": {"a": {"type": "log"}}})}},
		"an obligation without a type": {"allow": {object.union(ok, {"obligations": [{"what": "log"}]})}},
	}
	decision := decide(
		fixture.edit(request, {"/approvals": fixture.approvals("any")}),
		{"sound": {"allow": {ok}}, "broken": exports},
	)
	brief(decision) == ["deny", ["policy_malformed"]]
	decision.labels == []
}

test_edges_of_the_shape[name] if {
	some name, allow in {
		"longest message": {"code": "ok", "message": sprintf("%0256d", [0])},
		"longest code": {"code": sprintf("n%063d", [0]), "message": "Fine"},
		"a counter of nothing": object.union(ok, {"counters": {"n": 0}}),
		"empty lists": object.union(ok, {"labels": [], "counters": {}, "obligations": []}),
	}
	brief(decide(request, {"a": {"allow": {allow}}})) == ["allow", [allow.code]]
}

test_malformed_says_where if {
	decision := decide(request, {"sound": {"allow": {ok}}, "broken": {"ask": {"sure?"}}})
	decision.reasons == [{
		"code": "policy_malformed",
		"message": `The rules of domain "broken" export a malformed ask`,
	}]
}

test_sound_denies_are_told_beside_malformed_ones[name] if {
	some name, denies in {"a set": {no, "never"}, "an array": [no]}
	brief(decide(request, {"a": {"deny": denies}})) == ["deny", ["no", "policy_malformed"]]
}

# --- The real rules --------------------------------------------------------------------------------------------------

# `writ.rules.hr.emea` would be a value inside the domain `hr`: its denies would be found by nobody.
test_domains_are_one_level_deep if {
	nested := {[domain, name] |
		some name in {"allow", "deny", "ask"}
		data.writ.rules[domain][_][name] with input as request
	}
	nested == set()
}

test_every_domain_exports_sets[domain] if {
	some domain, _ in data.writ.rules
	exported := {name: data.writ.rules[domain][name] | some name in {"allow", "deny", "ask"}} with input as request
	exported != {}
	every set in exported {
		is_set(set)
	}
}

test_every_agent_has_an_owner[id] if {
	some id, agent in data.writ.agents
	agent.owner
	agent.purpose
	agent.ceiling
}
