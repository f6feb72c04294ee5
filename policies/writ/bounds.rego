# METADATA
# title: The bounds
# description: |
#   A request is considered only inside *user's grants ∩ agent's ceiling ∩ session's envelope*. Each of the three holds
#   patterns, and all are matched alike: an action glob in which `*` stops at a dot, and a resource of literally that
#   type with an id glob in which `*` stops at a slash. `**` stops at nothing. Values from the request are only
#   ever matched, never read as patterns. One act is Writ's own, to ask for another envelope: neither grants nor ceiling
#   nor the old envelope stand in its way, and the new one is no way around the other two.
# schemas:
#   - input: schema.input
package writ.bounds

# METADATA
# title: Why the request is out of bounds
# description: Empty means inside.
outside contains {"code": "invalid_input", "message": "The input is not of the shape that policy relies on"} if {
	not valid_input
}

outside contains {"code": "not_granted", "message": "None of the user's grants covers this"} if {
	valid_input
	not granted
}

outside contains {"code": "agent_unknown", "message": "The agent is not registered"} if {
	valid_input
	not agent
}

outside contains {"code": "outside_ceiling", "message": "The agent's ceiling does not cover this"} if {
	valid_input
	agent
	not under_ceiling
}

outside contains {"code": "outside_envelope", "message": "The session's envelope does not cover this"} if {
	valid_input
	not enveloped
}

# --- The three bounds ------------------------------------------------------------------------------------------------

granted if {
	# A claim that is a string holds nothing for `some … in`; but of an object, the values would be read as groups.
	is_array(input.user.claims.groups)
	some group in input.user.claims.groups
	some grant in data.writ.grants[group]
	input.user.issuer == object.get(grant, "issuer", input.user.issuer)
	covers(grant)
}

granted if asks_for_envelope

agent := registered if {
	registered := data.writ.agents[input.agent.id]
	input.agent.issuer == object.get(registered, "issuer", input.agent.issuer)
}

# A rule of its own, because `not covers(agent.ceiling)` is undefined, and so no deny, for an agent without a ceiling.
under_ceiling if covers(agent.ceiling)

under_ceiling if asks_for_envelope

enveloped if not "envelope" in object.keys(input.session)

# The agent wrote these patterns. They can only narrow, and they have only the two wildcards, so that what a human
# consents to reads as it acts: alternatives, classes and escapes are for patterns that policy's own authors write.
enveloped if covers({
	"actions": [action | some action in input.session.envelope.actions; simple(action)],
	"resources": [resource | some resource in input.session.envelope.resources; simple(resource.id)],
})

enveloped if asks_for_envelope

# Only Writ asks this, and only of the session itself: POST /decide refuses actions that begin with "writ.".
asks_for_envelope if {
	input.intent.action == "writ.envelope.widen"
	input.resource.type == "writ.session"
	input.resource.id == input.session.id
}

# METADATA
# title: Whether a pattern has no glob syntax other than the two wildcards
simple(pattern) if {
	is_string(pattern)
	not regex.match(`[][{}?!\\]`, pattern)
}

covers(bound) if {
	some action in bound.actions
	glob.match(action, ["."], input.intent.action)
	some resource in bound.resources
	resource.type == input.resource.type
	glob.match(resource.id, ["/"], input.resource.id)
}

# --- What every rule may take for granted ----------------------------------------------------------------------------

# Writ builds the input, so this should always hold. But `"untrusted_content" in input.session.labels` is as silent
# about labels that are missing or a string as about an empty list, and silence in an ask or a deny opens the door.
valid_input if {
	text(input.user.id)
	text(input.user.issuer)
	text(input.agent.id)
	text(input.agent.issuer)
	text(input.intent.action)
	text(input.resource.type)
	text(input.resource.id)
	is_object(input.user.claims)
	is_object(input.intent.parameters)
	is_object(input.resource.properties)
	marks(input.session)
	marks(input.recent)
	counts(object.get(input.session, ["envelope", "limits"], {}))
	is_array(object.get(input, "approvals", []))
}

marks(left) if {
	is_array(left.labels)
	every label in left.labels {
		is_string(label)
	}
	counts(left.counters)
}

counts(counters) if {
	is_object(counters)
	every _, counter in counters {
		is_number(counter)
		counter >= 0
		counter == floor(counter)
	}
}

text(value) if {
	is_string(value)
	value != ""
}
