package writ.test.hr

import data.writ.test.fixture

offboard := fixture.edit(fixture.request("bob", "hr", "hr-agent"), {
	"/intent/action": "hr.employee.offboard",
	"/resource/type": "hr.employee",
	"/resource/id": "dave",
})

onboard := fixture.edit(offboard, {"/intent/action": "hr.employee.onboard"})

approved := {"/approvals": fixture.approvals("any")}

asked := ["require_ciba", ["confirm_employment_change"]]

allowed := ["allow", ["change_employment"]]

test_outcome[name] if {
	some name, case in {
		"offboard": {"request": offboard, "want": asked},
		"onboard": {"request": onboard, "want": asked},
		"offboard, approved": {"request": fixture.edit(offboard, approved), "want": allowed},
		"onboard, approved": {"request": fixture.edit(onboard, approved), "want": allowed},
		"offboard another's address": {
			"request": fixture.edit(offboard, {"/resource/id": "bob@other.example", "/user/claims/email": "bob@corp.example"}),
			"want": asked,
		},
		"offboard whom another claim names": {
			"request": fixture.edit(offboard, {"/user/claims/mentor": "dave"}),
			"want": asked,
		},
		"onboard oneself": {"request": fixture.edit(onboard, {"/resource/id": "bob"}), "want": asked},
		"another user": {
			"request": fixture.edit(offboard, {"/user/claims/groups": ["sales"]}),
			"want": ["deny", ["not_granted"]],
		},
		"another agent": {
			"request": fixture.edit(offboard, {"/agent/id": "sales-agent"}),
			"want": ["deny", ["outside_ceiling"]],
		},
		"an action that has no rule": {
			"request": fixture.edit(offboard, {"/intent/action": "hr.employee.promote"}),
			"want": ["deny", ["not_granted", "outside_ceiling"]],
		},
	}
	fixture.outcome(case.request) == case.want
}

# An approval does not lift a deny.
test_nobody_offboards_themselves[name] if {
	some name, changes in {
		"by id": {"/resource/id": "bob"},
		"by an id that the identity provider writes in capitals": {"/resource/id": "bob", "/user/id": "BOB"},
		"by address": {"/resource/id": "bob@corp.example", "/user/claims/email": "Bob@Corp.example"},
		"by user name": {"/resource/id": "b.ob", "/user/claims/preferred_username": "b.ob"},
		"beside a claim of a wrong type": {"/resource/id": "bob", "/user/claims/email": ["x"]},
	}
	fixture.outcome(fixture.edit(fixture.edit(offboard, approved), changes)) == ["deny", ["own_offboarding"]]
}

test_one_spelling_of_an_employee[name] if {
	some name, id in {
		"capitals": "Dave",
		"trailing space": "dave ",
		"trailing newline": "dave\n",
		"leading space": " dave",
		"cyrillic a": "dаve",
		"zero width space": "da\u200bve",
		"right to left": "\u202eevad",
		"path": "../dave",
		"glob": "*",
		"quote": `dave" and "erin`,
		"too long": sprintf("%0129d", [0]),
	}
	fixture.outcome(fixture.edit(offboard, {"/resource/id": id})) == ["deny", ["invalid_resource"]]
}

test_capitals_do_not_hide_oneself if {
	fixture.outcome(fixture.edit(offboard, {"/resource/id": "BOB"})) == ["deny", ["invalid_resource", "own_offboarding"]]
}

test_other_type_is_no_employee if {
	wide := {"actions": ["**"], "resources": [{"type": "crm.email", "id": "**"}]}
	request := fixture.edit(offboard, {"/resource/type": "crm.email"})
	outcome := fixture.outcome(request) with data.writ.grants as {"hr": [wide]}
		with data.writ.agents as {"hr-agent": {"ceiling": wide}}
	outcome == ["deny", ["invalid_resource"]]
}

test_what_the_approver_reads if {
	decision := data.writ.decision with input as fixture.edit(offboard, {"/intent/purpose": "Routine, just say yes"})
	decision == {
		"effect": "require_ciba",
		"reasons": [{"code": "confirm_employment_change", "message": `Offboard employee "dave"`}],
		"approval": [{
			"code": "confirm_employment_change",
			"message": `Offboard employee "dave"`,
			"approver": "user",
			"acr_values": [],
			"display": "summary",
		}],
		"labels": [],
	}
}

test_credential[action] if {
	some action, scope in {"hr.employee.offboard": "hr:offboard", "hr.employee.onboard": "hr:onboard"}
	request := fixture.edit(fixture.edit(offboard, approved), {"/intent/action": action})
	decision := data.writ.decision with input as request
	decision.credential == {"minter": "hr", "ttl": "1m", "scope": {"scopes": [scope]}}
}
