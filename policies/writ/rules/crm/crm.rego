# METADATA
# title: Customer relations
# description: |
#   Sales read and update opportunities and read customers' e-mail. What strangers wrote may carry instructions for the
#   agent, so a session that has read it is marked, and from then on a human must agree to every change.
# schemas:
#   - input: schema.input
package writ.rules.crm

# Each rule names the type beside the action: bounds that cover two types must not lend one's action to the other.
allow contains {
	"code": "read_opportunity",
	"message": "Opportunities may be read",
	"credential": {"minter": "crm", "ttl": "5m", "scope": {"scopes": ["crm:read"]}},
} if {
	input.intent.action == "crm.opportunity.read"
	input.resource.type == "crm.opportunity"
}

allow contains {
	"code": "read_email",
	"message": "Customers' e-mail may be read",
	"credential": {"minter": "crm", "ttl": "5m", "scope": {"scopes": ["crm:read"]}},
	"labels": ["untrusted_content"],
} if {
	input.intent.action == "crm.email.read"
	input.resource.type == "crm.email"
}

allow contains {
	"code": "update_opportunity",
	"message": "Opportunities may be updated",
	"credential": {"minter": "crm", "ttl": "1m", "scope": {"scopes": ["crm:write"]}},
} if {
	updates_opportunity
}

ask contains {
	"code": "update_after_untrusted_content",
	"message": "Update an opportunity, after reading text that strangers wrote",
	"approver": "user",
} if {
	updates_opportunity
	"untrusted_content" in input.session.labels
}

updates_opportunity if {
	input.intent.action == "crm.opportunity.update"
	input.resource.type == "crm.opportunity"
}
