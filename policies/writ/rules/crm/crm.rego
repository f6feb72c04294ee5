# METADATA
# title: Customer relations
# description: |
#   Sales read and update opportunities and read customers' e-mail. What strangers wrote may carry instructions for the
#   agent, so a session that has read it is marked, and from then on a human must agree to every change.
#
#   Where the CRM's database is a target of the minter crm-db, they also get a role there. It reaches all records of one
#   tenant, which is the resource, so that grants, ceiling and envelope say whose rows an agent may see.
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

allow contains {
	"code": "query_database",
	"message": "The records of one tenant may be queried",
	"credential": {"minter": "crm-db", "ttl": "1m", "scope": {"groups": ["crm_ro"], "tenant": tenant}},
} if {
	input.intent.action == "crm.database.query"
}

allow contains {
	"code": "update_database",
	"message": "The records of one tenant may be changed",
	"credential": {"minter": "crm-db", "ttl": "1m", "scope": {"groups": ["crm_rw"], "tenant": tenant}},
} if {
	input.intent.action == "crm.database.update"
}

# No role is as narrow as one change, so a human agrees to each.
ask contains {
	"code": "confirm_database_update",
	"message": sprintf("Change any record of tenant %q for a minute", [tenant]),
	"approver": "user",
} if {
	input.intent.action == "crm.database.update"
}

deny contains {"code": "invalid_resource", "message": "This is not the name of a tenant"} if {
	input.intent.action in {"crm.database.query", "crm.database.update"}
	not tenant
}

# One spelling, plain to read for the approver and the same to the database as to policy.
tenant := input.resource.id if {
	input.resource.type == "crm.tenant"
	regex.match(`^[a-z0-9][a-z0-9_-]{0,62}$`, input.resource.id)
}
