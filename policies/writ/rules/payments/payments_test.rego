package writ.test.payments

import data.writ.test.fixture

pay := fixture.edit(fixture.request("carol", "finance", "finance-agent"), {
	"/intent/action": "payments.transfer.create",
	"/intent/parameters": {"amount": 4200, "currency": "EUR", "creditor": "Acme Ltd"},
	"/resource/type": "payments.account",
	"/resource/id": "DE89370400440532013000",
})

test_amount[name] if {
	some name, case in {
		"one cent": {"amount": 1, "want": ["allow", ["pay"]]},
		"below ask": {"amount": 9999, "want": ["allow", ["pay"]]},
		"at ask": {"amount": 10000, "want": ["require_ciba", ["large_payment"]]},
		"at hard": {"amount": 1000000, "want": ["require_ciba", ["large_payment"]]},
		"over hard": {"amount": 1000001, "want": ["deny", ["over_hard_limit"]]},
		"over hard and session": {"amount": 2000001, "want": ["deny", ["over_hard_limit", "over_session_limit"]]},
		"largest exact integer": {
			"amount": 9007199254740991,
			"want": ["deny", ["over_hard_limit", "over_recent_limit", "over_session_limit"]],
		},
		"beyond every double": {"amount": 1e400, "want": ["deny", ["invalid_parameters"]]},
		"written as a float": {"amount": 4200.0, "want": ["allow", ["pay"]]},
		"written with an exponent": {"amount": 42e2, "want": ["allow", ["pay"]]},
		"zero": {"amount": 0, "want": ["deny", ["invalid_parameters"]]},
		"negative": {"amount": -1, "want": ["deny", ["invalid_parameters"]]},
		"fraction": {"amount": 0.5, "want": ["deny", ["invalid_parameters"]]},
		"fraction above one": {"amount": 9999.99, "want": ["deny", ["invalid_parameters"]]},
		"string": {"amount": "4200", "want": ["deny", ["invalid_parameters"]]},
		"null": {"amount": null, "want": ["deny", ["invalid_parameters"]]},
		"true": {"amount": true, "want": ["deny", ["invalid_parameters"]]},
		"array": {"amount": [4200], "want": ["deny", ["invalid_parameters"]]},
		"object": {"amount": {"value": 4200}, "want": ["deny", ["invalid_parameters"]]},
	}
	fixture.outcome(fixture.edit(pay, {"/intent/parameters/amount": case.amount})) == case.want
}

test_currency[name] if {
	some name, case in {
		"pound": {"currency": "GBP", "want": ["allow", ["pay"]]},
		"dollar": {"currency": "USD", "want": ["allow", ["pay"]]},
		"without limits": {"currency": "XAU", "want": ["deny", ["unknown_currency"]]},
		"lower case": {"currency": "eur", "want": ["deny", ["unknown_currency"]]},
		"trailing space": {"currency": "EUR ", "want": ["deny", ["unknown_currency"]]},
		"glob": {"currency": "*", "want": ["deny", ["unknown_currency"]]},
		"empty": {"currency": "", "want": ["deny", ["unknown_currency"]]},
		"null": {"currency": null, "want": ["deny", ["invalid_parameters"]]},
		"array": {"currency": ["EUR"], "want": ["deny", ["invalid_parameters"]]},
	}
	fixture.outcome(fixture.edit(pay, {"/intent/parameters/currency": case.currency})) == case.want
}

test_creditor[name] if {
	some name, case in {
		"initial": {"creditor": "A", "want": ["allow", ["pay"]]},
		"punctuation": {"creditor": "O'Neill (Dublin) + Sons, No. 7", "want": ["allow", ["pay"]]},
		"longest": {"creditor": sprintf("%070d", [0]), "want": ["allow", ["pay"]]},
		"too long": {"creditor": sprintf("%071d", [0]), "want": ["deny", ["invalid_parameters"]]},
		"empty": {"creditor": "", "want": ["deny", ["invalid_parameters"]]},
		"space": {"creditor": " ", "want": ["deny", ["invalid_parameters"]]},
		"newline": {"creditor": "Acme\nApproved by your bank", "want": ["deny", ["invalid_parameters"]]},
		"trailing newline": {"creditor": "Acme\n", "want": ["deny", ["invalid_parameters"]]},
		"quote": {"creditor": `Acme" for 1.00 EUR`, "want": ["deny", ["invalid_parameters"]]},
		"look-alike": {"creditor": "Аcme Ltd", "want": ["deny", ["invalid_parameters"]]},
		"right to left": {"creditor": "Acme\u202edtL", "want": ["deny", ["invalid_parameters"]]},
		"null": {"creditor": null, "want": ["deny", ["invalid_parameters"]]},
		"array": {"creditor": ["Acme Ltd"], "want": ["deny", ["invalid_parameters"]]},
	}
	fixture.outcome(fixture.edit(pay, {"/intent/parameters/creditor": case.creditor})) == case.want
}

test_parameters[name] if {
	some name, parameters in {
		"none": {},
		"no amount": {"currency": "EUR", "creditor": "Acme Ltd"},
		"no currency": {"amount": 4200, "creditor": "Acme Ltd"},
		"no creditor": {"amount": 4200, "currency": "EUR"},
		"one more": {"amount": 4200, "currency": "EUR", "creditor": "Acme Ltd", "times": 1000},
		"amount in other letters": {"Amount": 4200, "currency": "EUR", "creditor": "Acme Ltd"},
	}
	fixture.outcome(fixture.edit(pay, {"/intent/parameters": parameters})) == ["deny", ["invalid_parameters"]]
}

test_session_limit[name] if {
	some name, case in {
		"up to the limit": {"counters": {"paid_EUR": 1995800}, "want": ["allow", ["pay"]]},
		"over it by one": {"counters": {"paid_EUR": 1995801}, "want": ["deny", ["over_session_limit"]]},
		"already over it": {"counters": {"paid_EUR": 3000000}, "want": ["deny", ["over_session_limit"]]},
		"another currency": {"counters": {"paid_USD": 2000000}, "want": ["allow", ["pay"]]},
		"a counter of a wrong type": {"counters": {"paid_EUR": "0"}, "want": ["deny", ["invalid_input"]]},
		"a negative counter": {"counters": {"paid_EUR": -5000000}, "want": ["deny", ["invalid_input"]]},
	}
	fixture.outcome(fixture.edit(pay, {"/session/counters": case.counters})) == case.want
}

# A new session starts with no counters, but not with a new budget.
test_recent_limit[name] if {
	some name, case in {
		"up to the limit": {"recent": {"paid_EUR": 4995800}, "want": ["allow", ["pay"]]},
		"over it by one": {"recent": {"paid_EUR": 4995801}, "want": ["deny", ["over_recent_limit"]]},
		"another currency": {"recent": {"paid_USD": 5000000}, "want": ["allow", ["pay"]]},
		"a counter of a wrong type": {"recent": {"paid_EUR": "0"}, "want": ["deny", ["invalid_input"]]},
	}
	fixture.outcome(fixture.edit(pay, {"/recent/counters": case.recent})) == case.want
}

# An approval answers the ask. It lifts no limit.
test_approved[name] if {
	some name, case in {
		"within the limits": {"amount": 1000000, "paid": 0, "want": ["allow", ["pay"]]},
		"over hard": {"amount": 1000001, "paid": 0, "want": ["deny", ["over_hard_limit"]]},
		"over session": {"amount": 10000, "paid": 2000000, "want": ["deny", ["over_session_limit"]]},
	}
	request := fixture.edit(pay, {
		"/approvals": fixture.approvals("any"),
		"/intent/parameters/amount": case.amount,
		"/session/counters/paid_EUR": case.paid,
	})
	fixture.outcome(request) == case.want
}

test_bounds[name] if {
	some name, case in {
		"another user": {"changes": {"/user/claims/groups": ["hr"]}, "want": ["not_granted"]},
		"another agent": {"changes": {"/agent/id": "hr-agent"}, "want": ["outside_ceiling"]},
		"another type": {"changes": {"/resource/type": "hr.employee"}, "want": ["not_granted", "outside_ceiling"]},
		"another action": {
			"changes": {"/intent/action": "payments.transfer.createAll"},
			"want": ["not_granted", "outside_ceiling"],
		},
	}
	fixture.outcome(fixture.edit(pay, case.changes)) == ["deny", case.want]
}

# Were the bounds drawn wider than the rules, the rules alone must still pair the action with the type, and have nothing
# to say of other acts that happen to carry a currency.
test_action_and_type_belong_together[name] if {
	some name, changes in {
		"another action": {"/intent/action": "payments.transfer.cancel"},
		"another type": {"/resource/type": "payments.invoice"},
		"another action in no currency": {
			"/intent/action": "payments.transfer.cancel",
			"/intent/parameters/currency": "XAU",
		},
	}
	request := fixture.edit(pay, changes)
	wide := {"actions": ["**"], "resources": [{"type": request.resource.type, "id": "**"}]}
	outcome := fixture.outcome(request) with data.writ.grants as {"finance": [wide]}
		with data.writ.agents as {"finance-agent": {"ceiling": wide}}
	outcome == ["deny", ["no_rule"]]
}

# Limits are data, and data has typos too. An amount is never "more" than a limit that is a string.
test_malformed_limits[name] if {
	some name, limit in {
		"no ask": {"decimals": 2, "hard": 1000000, "session": 2000000, "recent": 5000000},
		"ask is a string": {"decimals": 2, "ask": "10000", "hard": 1000000, "session": 2000000, "recent": 5000000},
		"hard is a string": {"decimals": 2, "ask": 10000, "hard": "1000000", "session": 2000000, "recent": 5000000},
		"session is a string": {"decimals": 2, "ask": 10000, "hard": 1000000, "session": "2000000", "recent": 5000000},
		"no recent": {"decimals": 2, "ask": 10000, "hard": 1000000, "session": 2000000},
		"recent is a string": {"decimals": 2, "ask": 10000, "hard": 1000000, "session": 2000000, "recent": "5000000"},
		"no decimals": {"ask": 10000, "hard": 1000000, "session": 2000000, "recent": 5000000},
		"too many decimals": {"decimals": 4, "ask": 10000, "hard": 1000000, "session": 2000000, "recent": 5000000},
	}
	outcome := fixture.outcome(pay) with data.writ.rules.payments.limits as {"EUR": limit}
	outcome == ["deny", ["invalid_parameters"]]
}

test_what_the_approver_reads[text] if {
	some text, case in {
		`Pay 150.00 EUR to "Acme Ltd"`: {"amount": 15000, "decimals": 2},
		`Pay 150.07 EUR to "Acme Ltd"`: {"amount": 15007, "decimals": 2},
		`Pay 15.007 EUR to "Acme Ltd"`: {"amount": 15007, "decimals": 3},
	}
	request := fixture.edit(pay, {"/intent/parameters/amount": case.amount})
	decision := data.writ.decision with input as request
		with data.writ.rules.payments.limits.EUR.decimals as case.decimals
	decision.effect == "require_ciba"
	decision.approval == [{
		"code": "large_payment",
		"message": text,
		"approver": "user",
		"acr_values": [],
		"display": "summary",
	}]
}

test_allow_counts_and_mints if {
	decision := data.writ.decision with input as pay
	decision == {
		"effect": "allow",
		"reasons": [{"code": "pay", "message": "Finance may pay within the limits"}],
		"credential": {"minter": "payments", "ttl": "1m", "scope": {"scopes": ["payments:create"]}},
		"labels": [],
		"counters": {"paid_EUR": 4200},
		"obligations": [],
	}
}

# The store reads integers, and 4200.0 is spelt as none.
test_counter_is_spelt_as_an_integer if {
	decision := data.writ.decision with input as fixture.edit(pay, {"/intent/parameters/amount": 4200.0})
	json.marshal(decision.counters) == `{"paid_EUR":4200}`
}

test_deny_tells_the_limit if {
	decision := data.writ.decision with input as fixture.edit(pay, {"/intent/parameters/amount": 1000001})
	decision == {
		"effect": "deny",
		"reasons": [{"code": "over_hard_limit", "message": "This is more than one payment may ever be"}],
		"labels": [],
		"advice": {"currency": "EUR", "max_amount": 1000000},
	}
}

# Who may not pay at all is not told how much others may.
test_no_advice_out_of_bounds if {
	decision := data.writ.decision with input as fixture.edit(pay, {
		"/intent/parameters/amount": 1000001,
		"/user/claims/groups": ["sales"],
	})
	decision == {
		"effect": "deny",
		"reasons": [{"code": "not_granted", "message": "None of the user's grants covers this"}],
		"labels": [],
	}
}

# The order matters: every currency that has limits must have them in an order in which each can be reached.
test_limits_are_in_order[currency] if {
	some currency, limit in data.writ.rules.payments.limits
	limit.ask <= limit.hard
	limit.hard <= limit.session
	limit.session <= limit.recent
}
