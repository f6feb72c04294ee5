# METADATA
# title: What the domains say
# description: |
#   Gathers the members of the sets `allow`, `deny` and `ask` of every domain, and tells the malformed apart. The shape is
#   closed: an ask with `acr_value` for `acr_values` would otherwise be one that a weaker approval satisfies.
# schemas:
#   - input: schema.input
package writ.members

import data.writ.bounds

allow contains member if {
	some member in exported.allow[_]
	well_formed("allow", member)
}

deny contains member if {
	some member in exported.deny[_]
	well_formed("deny", member)
}

ask contains member if {
	some member in exported.ask[_]
	well_formed("ask", member)
}

# METADATA
# title: Where a domain and a kind export what cannot be read
# description: A deny or an ask that was meant must not vanish because it was written badly.
malformed contains [domain, kind] if {
	some kind, domains in exported
	some domain, members in domains
	not is_set(members) # such as `deny := true`, in which iteration finds nothing
}

malformed contains [domain, kind] if {
	some kind, domains in exported
	some domain, members in domains
	some member in members
	not well_formed(kind, member)
}

# Out of bounds no rule is asked. So what rules say, advice included, is told only to those who may act here at all.
exported.allow[domain] := data.writ.rules[domain].allow if count(bounds.outside) == 0

exported.deny[domain] := data.writ.rules[domain].deny if count(bounds.outside) == 0

exported.ask[domain] := data.writ.rules[domain].ask if count(bounds.outside) == 0

# --- The shape of a member -------------------------------------------------------------------------------------------

well_formed(kind, member) if {
	is_object(member)
	count(required[kind] - object.keys(member)) == 0
	every key, value in member {
		valid(kind, key, value)
	}
}

required := {
	"allow": {"code", "message"},
	"deny": {"code", "message"},
	"ask": {"code", "message", "approver"},
}

valid(_, "code", value) if word(value)

valid(_, "message", value) if {
	text(value)
	count(value) <= 256
}

valid(_, "labels", value) if {
	is_array(value)
	every label in value {
		word(label)
	}
}

valid("allow", "credential", value) if is_object(value)

valid("allow", "counters", value) if {
	is_object(value)
	every name, amount in value {
		text(name)
		is_number(amount)
		amount >= 0
		amount == floor(amount)
	}
}

valid("allow", "obligations", value) if {
	is_array(value)
	every obligation in value {
		text(obligation.type)
	}
}

valid("deny", "advice", value) if is_object(value)

valid("ask", "approver", value) if text(value)

valid("ask", "acr_values", value) if {
	is_array(value)
	every acr in value {
		text(acr)
	}
}

valid("ask", "expires_in", value) if {
	text(value)
	regex.match(`^([1-9][0-9]{0,4}h)?([1-9][0-9]{0,4}m)?([1-9][0-9]{0,4}s)?$`, value)
}

valid("ask", "display", value) if value in {"code", "summary", "full"}

word(value) if {
	is_string(value)
	regex.match(`^[a-z][a-z0-9_]{0,63}$`, value)
}

text(value) if {
	is_string(value)
	value != ""
}
