package writ.test.envelope

import data.writ.test.fixture

# Of a user who is granted nothing: the envelope is theirs to widen, and gives them no more.
widen := fixture.edit(fixture.request("alice", "nobody", "sales-agent"), {
	"/session/envelope": {
		"actions": ["crm.opportunity.read"],
		"resources": [{"type": "crm.opportunity", "id": "opp-1"}],
		"source": "agent",
	},
	"/intent/action": "writ.envelope.widen",
	"/intent/parameters": {
		"actions": ["crm.email.read", "crm.opportunity.read"],
		"resources": [{"type": "crm.email", "id": "m/**"}, {"type": "crm.opportunity", "id": "opp-1"}],
	},
	"/resource/type": "writ.session",
	"/resource/id": "ses_1",
})

told(request) := decision.approval[0].message if {
	decision := data.writ.decision with input as request
	decision.effect == "require_ciba"
	count(decision.approval) == 1
	decision.approval[0].approver == "user"
	decision.approval[0].display == "summary"
}

test_what_the_user_reads[name] if {
	some name, case in {
		"all of what only the agent declared": {
			"changes": {},
			"want": "Widen the session: do crm.email.read, crm.opportunity.read; on crm.email m/**, crm.opportunity opp-1",
		},
		"what is new to them": {
			"changes": {"/session/envelope/source": "user"},
			"want": "Widen the session: do crm.email.read; on crm.email m/**",
		},
		"a limit": {
			"changes": {"/session/envelope/source": "user", "/intent/parameters/limits": {"paid_EUR": 5000}},
			"want": "Widen the session: do crm.email.read; on crm.email m/**; with paid_EUR up to 5000",
		},
		"a limit raised": {
			"changes": {
				"/session/envelope/source": "user",
				"/session/envelope/limits": {"n": 1, "m": 2},
				"/intent/parameters": {"actions": ["crm.opportunity.read"], "resources": [], "limits": {"n": 10, "m": 2}},
			},
			"want": "Widen the session: with n up to 10",
		},
		"a limit gone": {
			"changes": {
				"/session/envelope/limits": {"n": 1},
				"/intent/parameters": {"actions": ["a"], "resources": []},
			},
			"want": "Widen the session: do a; with n without limit",
		},
	}
	told(fixture.edit(widen, case.changes)) == case.want
}

test_unreadable[name] if {
	some name, case in {
		"a space": {"path": "/intent/parameters/actions", "value": ["crm.email.read and nothing else"]},
		"a comma": {"path": "/intent/parameters/actions", "value": ["a,b"]},
		"a look-alike": {"path": "/intent/parameters/actions", "value": ["сrm.email.read"]},
		"right to left": {"path": "/intent/parameters/actions", "value": ["crm\u202e.email"]},
		"alternatives": {"path": "/intent/parameters/actions", "value": ["{a,b}"]},
		"a class": {"path": "/intent/parameters/resources", "value": [{"type": "t", "id": "[ab]"}]},
		"a negation": {"path": "/intent/parameters/resources", "value": [{"type": "t", "id": "!a"}]},
		"a line end": {"path": "/intent/parameters/resources", "value": [{"type": "t", "id": "a\n"}]},
		"a type with a space": {"path": "/intent/parameters/resources", "value": [{"type": "t x", "id": "a"}]},
		"too long": {"path": "/intent/parameters/actions", "value": [sprintf("%0121d", [0])]},
		"no string": {"path": "/intent/parameters/actions", "value": [1]},
		"no array": {"path": "/intent/parameters/actions", "value": "**"},
		"no id": {"path": "/intent/parameters/resources", "value": [{"type": "t"}]},
		"limits that are none": {"path": "/intent/parameters/limits", "value": ["n"]},
	}
	fixture.outcome(fixture.edit(widen, {case.path: case.value})) == ["deny", ["envelope_unreadable"]]
}

test_too_long if {
	actions := [sprintf("crm.object%d.read", [n]) | some n in numbers.range(1, 20)]
	fixture.outcome(fixture.edit(widen, {"/intent/parameters/actions": actions})) == ["deny", ["envelope_too_long"]]
}

test_approved if {
	approved := fixture.edit(widen, {"/approvals": fixture.approvals("any")})
	decision := data.writ.decision with input as approved
	decision.effect == "allow"
	not decision.credential
}

# The way past the bounds is for this one act, of the session itself.
test_nothing_else_passes_the_bounds[name] if {
	some name, case in {
		"another session": {
			"changes": {"/resource/id": "ses_2"},
			"want": ["not_granted", "outside_ceiling", "outside_envelope"],
		},
		"another type": {
			"changes": {"/resource/type": "crm.opportunity"},
			"want": ["not_granted", "outside_ceiling", "outside_envelope"],
		},
		"another action": {
			"changes": {"/intent/action": "writ.envelope.drop"},
			"want": ["not_granted", "outside_ceiling", "outside_envelope"],
		},
		"an unknown agent": {"changes": {"/agent/id": "nobody"}, "want": ["agent_unknown"]},
		"an invalid input": {"changes": {"/session/labels": "x"}, "want": ["invalid_input"]},
	}
	fixture.outcome(fixture.edit(widen, case.changes)) == ["deny", case.want]
}
