# METADATA
# title: What operators may do
# description: |
#   Writ asks for this package as a whole, `data.writ.admin`, at each request of an operator, but never before revoking.
#   So `allow` and `reasons` are the only rules here: one more, and the answer is out of form, which is a no for all.
#   What rules need besides can be a function, or a package of its own.
#
#   Which groups may do what is data, `data.writ.operators`. A group is found in the operator's `groups` claim. In
#   actions `*` stops at a dot and `**` stops at nothing. An entry with `issuer` holds for that issuer only.
# schemas:
#   - input: schema.admin_input
package writ.admin

default allow := false

allow if {
	# A claim that is a string holds nothing for `some … in`; but of an object, the values would be read as groups.
	is_array(input.operator.claims.groups)
	some group in input.operator.claims.groups
	some role in data.writ.operators[group]
	input.operator.issuer == object.get(role, "issuer", input.operator.issuer)
	some action in role.actions
	glob.match(action, ["."], input.action)
}

reasons := [{"code": "operator_role", "message": "One of the operator's groups may do this"}] if allow

reasons := [{"code": "not_permitted", "message": "None of your groups may do this"}] if not allow
