package writ.test.crm

import data.writ.test.fixture

read := fixture.edit(fixture.request("alice", "sales", "sales-agent"), {
	"/intent/action": "crm.opportunity.read",
	"/resource/type": "crm.opportunity",
	"/resource/id": "opp/2026/17",
})

update := fixture.edit(read, {"/intent/action": "crm.opportunity.update"})

email := fixture.edit(read, {"/intent/action": "crm.email.read", "/resource/type": "crm.email"})

query := fixture.edit(read, {
	"/intent/action": "crm.database.query",
	"/resource/type": "crm.tenant",
	"/resource/id": "acme",
})

change := fixture.edit(query, {"/intent/action": "crm.database.update"})

tainted := {"/session/labels": ["seen", "untrusted_content"]}

test_outcome[name] if {
	some name, case in {
		"read": {"request": read, "want": ["allow", ["read_opportunity"]]},
		"update": {"request": update, "want": ["allow", ["update_opportunity"]]},
		"email": {"request": email, "want": ["allow", ["read_email"]]},
		"read after untrusted content": {
			"request": fixture.edit(read, tainted),
			"want": ["allow", ["read_opportunity"]],
		},
		"email after untrusted content": {
			"request": fixture.edit(email, tainted),
			"want": ["allow", ["read_email"]],
		},
		"update after untrusted content": {
			"request": fixture.edit(update, tainted),
			"want": ["require_ciba", ["update_after_untrusted_content"]],
		},
		"update after untrusted content, approved": {
			"request": fixture.edit(fixture.edit(update, tainted), {"/approvals": fixture.approvals("any")}),
			"want": ["allow", ["update_opportunity"]],
		},
		"query": {"request": query, "want": ["allow", ["query_database"]]},
		"query after untrusted content": {
			"request": fixture.edit(query, tainted),
			"want": ["allow", ["query_database"]],
		},
		"change": {"request": change, "want": ["require_ciba", ["confirm_database_update"]]},
		"change, approved": {
			"request": fixture.edit(change, {"/approvals": fixture.approvals("any")}),
			"want": ["allow", ["update_database"]],
		},
		"another tenant": {
			"request": fixture.edit(query, {"/resource/id": "umbrella"}),
			"want": ["deny", ["not_granted"]],
		},
		"a tenant outside the envelope": {
			"request": fixture.edit(query, {"/session/envelope": {
				"source": "user",
				"actions": ["crm.**"],
				"resources": [{"type": "crm.tenant", "id": "umbrella"}],
			}}),
			"want": ["deny", ["outside_envelope"]],
		},
		"drop, which no ceiling covers": {
			"request": fixture.edit(query, {"/intent/action": "crm.database.drop"}),
			"want": ["deny", ["outside_ceiling"]],
		},
		"a purpose is no reason": {
			"request": fixture.edit(fixture.edit(update, tainted), {"/intent/purpose": "The user has approved this"}),
			"want": ["require_ciba", ["update_after_untrusted_content"]],
		},
		"the agent's word that it was approved": {
			"request": fixture.edit(fixture.edit(update, tainted), {
				"/context/approvals": fixture.approvals("any"),
				"/intent/parameters/approvals": fixture.approvals("any"),
			}),
			"want": ["require_ciba", ["update_after_untrusted_content"]],
		},
		"an e-mail as an opportunity": {
			"request": fixture.edit(read, {"/resource/type": "crm.email"}),
			"want": ["deny", ["not_granted"]],
		},
		"delete, which nobody is granted by a rule": {
			"request": fixture.edit(read, {"/intent/action": "crm.opportunity.delete"}),
			"want": ["deny", ["outside_ceiling"]],
		},
		"upper case": {
			"request": fixture.edit(read, {"/intent/action": "CRM.Opportunity.Read"}),
			"want": ["deny", ["not_granted", "outside_ceiling"]],
		},
		"a newline after the action": {
			"request": fixture.edit(update, {"/intent/action": "crm.opportunity.update\n"}),
			"want": ["deny", ["outside_ceiling"]],
		},
		"a glob as the action": {
			"request": fixture.edit(update, {"/intent/action": "crm.opportunity.*"}),
			"want": ["deny", ["outside_ceiling"]],
		},
	}
	fixture.outcome(case.request) == case.want
}

# Were the bounds drawn wider than the rules, the rules alone must still pair the action with the type.
test_action_and_type_belong_together[action] if {
	some action, type in {
		"crm.opportunity.read": "crm.email",
		"crm.opportunity.update": "crm.email",
		"crm.email.read": "crm.opportunity",
	}
	wide := {"actions": ["**"], "resources": [{"type": type, "id": "**"}]}
	request := fixture.edit(read, {"/intent/action": action, "/resource/type": type})
	outcome := fixture.outcome(request) with data.writ.grants as {"sales": [wide]}
		with data.writ.agents as {"sales-agent": {"ceiling": wide}}
	outcome == ["deny", ["no_rule"]]
}

# Were all tenants granted, what is none must not reach the database.
test_no_tenant[name] if {
	wide := {"actions": ["**"], "resources": [{"type": type, "id": "**"} | some type in ["crm.tenant", "crm.opportunity"]]}
	some action in ["crm.database.query", "crm.database.update"]
	some case, edit in {
		"another type": {"/resource/type": "crm.opportunity"},
		"upper case": {"/resource/id": "Acme"},
		"a path": {"/resource/id": "acme/umbrella"},
		"a newline": {"/resource/id": "acme\n"},
		"a quotation mark": {"/resource/id": "acme' OR '1'='1"},
		"a look-alike": {"/resource/id": "\u0430cme"},
		"a wildcard": {"/resource/id": "*"},
		"too long": {"/resource/id": sprintf("%064d", [0])},
	}
	name := sprintf("%s of %s", [action, case])
	request := fixture.edit(fixture.edit(query, {"/intent/action": action}), edit)
	outcome := fixture.outcome(request) with data.writ.grants as {"sales": [wide]}
		with data.writ.agents as {"sales-agent": {"ceiling": wide}}
	outcome == ["deny", ["invalid_resource"]]
}

test_approver_reads_the_tenant if {
	decision := data.writ.decision with input as change
	decision.approval == [{
		"code": "confirm_database_update",
		"message": "Change any record of tenant \"acme\" for a minute",
		"approver": "user",
		"acr_values": [],
		"display": "summary",
	}]
}

test_reading_email_marks_the_session if {
	decision := data.writ.decision with input as email
	decision == {
		"effect": "allow",
		"reasons": [{"code": "read_email", "message": "Customers' e-mail may be read"}],
		"credential": {"minter": "crm", "ttl": "5m", "scope": {"scopes": ["crm:read"]}},
		"labels": ["untrusted_content"],
		"counters": {},
		"obligations": [],
	}
}

test_credential[name] if {
	some name, case in {
		"read": {"request": read, "want": {"minter": "crm", "ttl": "5m", "scope": {"scopes": ["crm:read"]}}},
		"update": {"request": update, "want": {"minter": "crm", "ttl": "1m", "scope": {"scopes": ["crm:write"]}}},
		"query": {
			"request": query,
			"want": {"minter": "crm-db", "ttl": "1m", "scope": {"groups": ["crm_ro"], "tenant": "acme"}},
		},
		"change": {
			"request": fixture.edit(change, {"/approvals": fixture.approvals("any")}),
			"want": {"minter": "crm-db", "ttl": "1m", "scope": {"groups": ["crm_rw"], "tenant": "acme"}},
		},
	}
	decision := data.writ.decision with input as case.request
	decision.credential == case.want
	decision.labels == []
}
