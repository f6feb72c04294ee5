# METADATA
# title: Joiners and leavers
# description: Both are always a human's decision, and nobody offboards themselves through an agent.
# schemas:
#   - input: schema.input
package writ.rules.hr

allow contains {
	"code": "change_employment",
	"message": "HR may onboard and offboard employees",
	"credential": {"minter": "hr", "ttl": "1m", "scope": {"scopes": [change.scope]}},
}

ask contains {
	"code": "confirm_employment_change",
	"message": sprintf("%s employee %q", [change.verb, change.employee]),
	"approver": "user",
	"display": "summary",
}

deny contains {"code": "invalid_resource", "message": "This is not the id of an employee"} if {
	changes[input.intent.action]
	not change
}

deny contains {"code": "own_offboarding", "message": "Nobody may offboard themselves"} if {
	input.intent.action == "hr.employee.offboard"
	lower(input.resource.id) in own_names
}

changes := {
	"hr.employee.offboard": {"verb": "Offboard", "scope": "hr:offboard"},
	"hr.employee.onboard": {"verb": "Onboard", "scope": "hr:onboard"},
}

# The request as the rules above need it: defined as a whole, or not at all and then denied. Ids have one spelling,
# so that "Bob", "bob " or a Cyrillic look-alike is not somebody else than bob, neither to policy nor to the approver.
change := object.union(changes[input.intent.action], {"employee": input.resource.id}) if {
	input.resource.type == "hr.employee"
	regex.match(`^[a-z0-9][a-z0-9._@-]{0,127}$`, input.resource.id)
}

# The HR system may know a user by another name than the identity provider does.
own_names contains lower(input.user.id)

own_names contains lower(name) if {
	some claim in ["preferred_username", "email"]
	name := input.user.claims[claim]
	is_string(name)
}
