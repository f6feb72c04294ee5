# METADATA
# title: The decision
# description: |
#   Combines what the rules of every domain say into the one document that Writ queries, `data.writ.decision`:
#
#   - deny, if the request is out of bounds, if any rule of any domain denies, or if no rule allows;
#   - require_ciba, if some rule asks for a human's yes that `input.approvals` does not hold;
#   - allow, only then.
#
#   It is written so that whatever is missing, misspelt or of a wrong type ends in a deny: `effect` is deny by default,
#   and what a rule exports in a shape that this library does not know is a reason to deny, never something to skip.
# schemas:
#   - input: schema.input
package writ

import data.writ.bounds
import data.writ.members

# METADATA
# title: The one document that Writ queries
# description: Its shape is bundles/schemas/decision.json. Sets leave as sorted arrays, so equal inputs give equal bytes.
# entrypoint: true
decision := object.union({"effect": effect}, verdict[effect])

default effect := "deny"

effect := "require_ciba" if {
	count(denials) == 0
	count(unmet) > 0
}

effect := "allow" if {
	count(denials) == 0
	count(unmet) == 0
}

# Labels come from the rules that made the effect: what an allow leaves behind has not happened while a human is asked.
verdict["deny"] := object.union(
	{"reasons": reasons(denials), "labels": labels(members.deny)},
	{"advice": advice | advice := object.union_n([deny.advice | some deny in sort(members.deny)]); advice != {}},
)

verdict["require_ciba"] := {
	"reasons": reasons(unmet),
	"labels": labels(members.ask),
	"approval": [prompt |
		some ask in sort(unmet)
		prompt := object.union({"acr_values": [], "display": "summary"}, object.remove(ask, ["labels"]))
	],
}

verdict["allow"] := object.union(
	{
		"reasons": reasons(members.allow),
		"labels": labels(members.allow | members.ask),
		"counters": counters,
		"obligations": sort({obligation | some allow in members.allow; some obligation in allow.obligations}),
	},
	{"credential": credential | some credential in credentials}, # at most one, see credential_conflict
)

# --- Deny ------------------------------------------------------------------------------------------------------------

denials contains reason if some reason in bounds.outside

denials contains reason if some reason in members.deny

denials contains {
	"code": "policy_malformed",
	"message": sprintf("The rules of domain %q export a malformed %s", [domain, kind]),
} if {
	some [domain, kind] in members.malformed
}

# Which of the two was meant? Neither is minted.
denials contains {
	"code": "credential_conflict",
	"message": "The rules that allow this demand different credentials",
} if {
	count(credentials) > 1
}

# A limit holds whatever allows: it is counted as the session's counters would be.
denials contains {
	"code": "outside_envelope_limit",
	"message": sprintf("With this, the session's counter %q would pass the limit of its envelope", [name]),
} if {
	some name, limit in input.session.envelope.limits
	object.get(input.session.counters, name, 0) + counters[name] > limit
}

denials contains {"code": "no_rule", "message": "No rule allows this"} if {
	count(bounds.outside) == 0
	count(members.allow) == 0
	count(members.deny) == 0 # which says more
}

# --- Ask -------------------------------------------------------------------------------------------------------------

unmet contains ask if {
	some ask in members.ask
	not met(ask)
}

met(ask) if {
	some approval in input.approvals
	approval.approver == ask.approver
	strong_enough(approval, object.get(ask, "acr_values", []))
}

strong_enough(_, []) := true

strong_enough(approval, acr_values) if approval.acr in acr_values

# --- Allow -----------------------------------------------------------------------------------------------------------

credentials contains allow.credential if some allow in members.allow

# Two rules that allow the same act have seen the same amount: the larger counts, once.
counters[name] := floor(max(amounts)) if {
	some name in {name | some allow in members.allow; some name, _ in allow.counters}
	amounts := {allow.counters[name] | some allow in members.allow}
}

# --- All effects -----------------------------------------------------------------------------------------------------

# The answer holds 16 at most; to cut more than that changes nothing of the effect.
reasons(said) := array.slice(sort({{"code": s.code, "message": s.message} | some s in said}), 0, 16)

labels(said) := sort({label | some s in said; some label in s.labels})
