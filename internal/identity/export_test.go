package identity

// OverHTTP brings tokens to the API's real handler. The external tests of this folder
// set it: httpapi imports this package.
var OverHTTP struct {
	// Decide asks for a decision as an agent, Operate for what needs an operator.
	Decide  func(v *Verifier, bearer, subject string) (status int, detail string)
	Operate func(v *Verifier, bearer string) (status int, detail string)
}
