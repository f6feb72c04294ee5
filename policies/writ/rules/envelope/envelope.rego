# METADATA
# title: Envelopes
# description: |
#   A session's envelope widens only through its user, who reads each pattern and each limit that they have not approved
#   yet. Writ itself asks, and refuses an allow without the user's yes whatever is written here; here is decided what the
#   user is asked. Grants and ceiling hold for what is inside the envelope as before.
# schemas:
#   - input: schema.input
package writ.rules.envelope

import data.writ.bounds

allow contains {"code": "widen_envelope", "message": "The user may widen what the session may need"} if {
	asked
}

ask contains {
	"code": "confirm_envelope",
	"message": message,
	"approver": "user",
} if {
	asked
	count(message) <= 256
}

deny contains {
	"code": "envelope_unreadable",
	"message": "Patterns may have letters, digits, . _ : / @ + - and the wildcard *, so that the user can read them",
} if {
	asked
	not message
}

deny contains {
	"code": "envelope_too_long",
	"message": "This is more than the user could be shown; ask for less at a time",
} if {
	asked
	count(message) > 256
}

asked if {
	input.intent.action == "writ.envelope.widen"
	input.resource.type == "writ.session"
}

# Undefined if there is anything that the user can't read or that is not of the shape expected here.
message := sprintf("Widen the session: %s", [concat("; ", parts)]) if {
	parts := [part | some part in [list("do", actions), list("on", resources), list("with", limits)][_]]

	is_array(input.intent.parameters.actions)
	is_array(input.intent.parameters.resources)
	is_object(object.get(input.intent.parameters, "limits", {}))
	every action in actions {
		plain(action)
	}
	every resource in input.intent.parameters.resources {
		plain(resource.type)
		plain(resource.id)
	}
	count(resources) == count(fresh_resources)
}

list(_, set()) := []

list(word, items) := [sprintf("%s %s", [word, concat(", ", sort(items))])] if count(items) > 0

actions := {action | some action in input.intent.parameters.actions; not action in approved.actions}

fresh_resources := {resource |
	some resource in input.intent.parameters.resources
	not resource in approved.resources
}

resources := {sprintf("%s %s", [resource.type, resource.id]) | some resource in fresh_resources}

limits contains sprintf("%s up to %d", [name, limit]) if {
	some name, limit in input.intent.parameters.limits
	limit != object.get(approved, ["limits", name], null)
}

limits contains sprintf("%s without limit", [name]) if {
	some name, _ in input.session.envelope.limits
	not name in object.keys(object.get(input.intent.parameters, "limits", {}))
}

# What only the agent declared, the user has never seen.
default approved := {"actions": [], "resources": []}

approved := input.session.envelope if input.session.envelope.source == "user"

plain(pattern) if {
	bounds.simple(pattern)
	regex.match(`^[A-Za-z0-9._:/@+*-]{1,120}$`, pattern)
}
