package evidence

import "github.com/writsec/writ/internal/audit"

// The activities of the class.
const (
	ocsfCreate = 1
	ocsfRead   = 2
	ocsfUpdate = 3
	ocsfDelete = 4
	ocsfOther  = 99
)

var (
	activities = map[int]string{ocsfCreate: "Create", ocsfRead: "Read", ocsfUpdate: "Update", ocsfDelete: "Delete", ocsfOther: "Other"}
	severities = map[int]string{1: "Informational", 2: "Low", 3: "Medium", 4: "High"}
	statuses   = map[int]string{0: "Unknown", 1: "Success", 2: "Failure", 99: "Other"}
)

// mapping is what OCSF makes of a kind of entry; docs/audit.md has the same table.
type mapping struct{ activity, severity, status int }

var ocsfKinds = map[audit.Kind]mapping{
	audit.SessionOpened: {ocsfCreate, 1, 1},
	audit.SessionEnded:  {ocsfDelete, 1, 1},
	audit.SignedOut:     {ocsfDelete, 1, 1},

	audit.SignInOpened:    {ocsfCreate, 1, 1},
	audit.SignInSignedIn:  {ocsfUpdate, 1, 1},
	audit.SignInConsented: {ocsfUpdate, 1, 1},
	audit.SignInDeclined:  {ocsfDelete, 2, 2},
	audit.SignInCompleted: {ocsfUpdate, 1, 1},

	audit.SessionEnvelope: {ocsfUpdate, 1, 1},

	audit.DecisionAllow:       {ocsfOther, 1, 1},
	audit.DecisionDeny:        {ocsfOther, 2, 2},
	audit.DecisionRequireCIBA: {ocsfOther, 1, 99},
	audit.DecisionReissued:    {ocsfUpdate, 1, 1},
	audit.DecisionOutcome:     {ocsfUpdate, 1, 0}, // by what it says

	audit.ApprovalOpened:   {ocsfCreate, 1, 1},
	audit.ApprovalAsking:   {ocsfUpdate, 1, 1},
	audit.ApprovalPrompted: {ocsfUpdate, 1, 1},
	audit.ApprovalAnswered: {ocsfUpdate, 1, 1},
	audit.ApprovalApproved: {ocsfUpdate, 1, 1},
	audit.ApprovalConsumed: {ocsfUpdate, 1, 1},
	audit.ApprovalClosed:   {ocsfDelete, 2, 2},

	audit.LeaseIntent:   {ocsfCreate, 1, 99},
	audit.LeaseActive:   {ocsfCreate, 1, 1},
	audit.LeaseRenewed:  {ocsfUpdate, 1, 1},
	audit.LeaseUsed:     {ocsfRead, 1, 1},
	audit.LeaseRevoking: {ocsfDelete, 1, 99},
	audit.LeaseRevoked:  {ocsfDelete, 1, 1},

	audit.OrphanFound:    {ocsfRead, 3, 1},
	audit.OrphanDisarmed: {ocsfUpdate, 3, 1},
	audit.OrphanGone:     {ocsfDelete, 2, 1},

	audit.ServiceRevoked: {ocsfDelete, 2, 1},

	audit.PolicyActivated: {ocsfUpdate, 1, 1},
	audit.PolicyRefused:   {ocsfUpdate, 3, 2},

	audit.OperatorRevoked:  {ocsfDelete, 3, 1},
	audit.RevocationGone:   {ocsfDelete, 1, 1},
	audit.RevocationLifted: {ocsfUpdate, 3, 1},
	audit.OperatorRead:     {ocsfRead, 1, 1},
	audit.OperatorRefused:  {ocsfRead, 2, 2},

	audit.KeyAdded:      {ocsfCreate, 2, 1},
	audit.KeysRewrapped: {ocsfUpdate, 2, 1},

	audit.LogOpened:   {ocsfCreate, 1, 1},
	audit.LogRestored: {ocsfUpdate, 4, 1},
	audit.LogPruned:   {ocsfDelete, 2, 1},
}
