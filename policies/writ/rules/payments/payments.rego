# METADATA
# title: Payments
# description: |
#   Finance pay, within four limits for each currency (data.json beside this file, in minor units): from `ask` on, a human
#   must agree; above `hard`, never; one session pays no more than `session` in all, so that many small payments are
#   no way around the other two; and a user and an agent no more than `recent` within the window, so that a new session
#   is no way around the third.
# schemas:
#   - input: schema.input
package writ.rules.payments

import data.writ.rules.payments.limits

allow contains {
	"code": "pay",
	"message": "Finance may pay within the limits",
	"credential": {"minter": "payments", "ttl": "1m", "scope": {"scopes": ["payments:create"]}},
	"counters": {payment.counter: payment.amount},
}

ask contains {
	"code": "large_payment",
	"message": sprintf("Pay %s to %q", [payment.money, payment.creditor]),
	"approver": "user",
} if {
	payment.amount >= payment.limit.ask
}

deny contains {
	"code": "over_hard_limit",
	"message": "This is more than one payment may ever be",
	"advice": {"currency": payment.currency, "max_amount": payment.limit.hard},
} if {
	payment.amount > payment.limit.hard
}

deny contains {
	"code": "over_session_limit",
	"message": "With this, the session would pay more than one session may",
} if {
	payment.paid + payment.amount > payment.limit.session
}

deny contains {
	"code": "over_recent_limit",
	"message": sprintf("With this, user and agent would pay more than they may within %s", [input.recent.window]),
} if {
	payment.paid_recently + payment.amount > payment.limit.recent
}

deny contains {"code": "unknown_currency", "message": "There are no limits for this currency"} if {
	pays
	unknown_currency
}

deny contains {
	"code": "invalid_parameters",
	"message": "Needed: amount, a positive integer of minor units; currency; creditor, in plain letters; nothing else",
} if {
	pays
	not payment
	not unknown_currency
}

pays if {
	input.intent.action == "payments.transfer.create"
	input.resource.type == "payments.account"
}

unknown_currency if {
	is_string(input.intent.parameters.currency)
	not limits[input.intent.parameters.currency]
}

# The request as the rules above need it: defined as a whole, or not at all and then denied. Otherwise each of them would
# have to remember that in Rego null is less and "5" is more than any number, and that an ask whose message can't be
# spelt does not ask.
payment := {
	"amount": amount,
	"currency": parameters.currency,
	"creditor": parameters.creditor,
	"limit": limit,
	"money": sprintf("%d.%0*d %s", [floor(amount / unit), limit.decimals, amount % unit, parameters.currency]),
	"counter": counter,
	"paid": object.get(input.session.counters, counter, 0),
	"paid_recently": object.get(input.recent.counters, counter, 0),
} if {
	pays
	parameters := input.intent.parameters
	object.keys(parameters) == {"amount", "currency", "creditor"} # what policy has not read, it has not judged
	limit := limits[parameters.currency]
	is_number(limit.ask)
	is_number(limit.hard)
	is_number(limit.session)
	is_number(limit.recent)
	counter := sprintf("paid_%s", [parameters.currency])

	is_number(parameters.amount)
	parameters.amount > 0
	amount := floor(parameters.amount) # 100.0 leaves as 100
	amount == parameters.amount
	unit := [1, 10, 100, 1000][limit.decimals]

	# Letters of the SEPA set: nothing invisible, no look-alikes and no quotation mark in what the approver reads.
	is_string(parameters.creditor)
	regex.match(`^[A-Za-z0-9][A-Za-z0-9/?:().,'+ -]{0,69}$`, parameters.creditor)
}
