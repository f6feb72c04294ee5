package sqlstore

import (
	"context"

	"github.com/writsec/writ/internal/approval"
	"github.com/writsec/writ/internal/fault"
	"github.com/writsec/writ/internal/identity"
)

const (
	approvalColumns = `id, version, state, reason, session, user_issuer, user_subject, agent_issuer, agent_subject, intent_hash,
		approver, approver_issuer, approver_subject, hint, message, code, acr_values,
		created_at, sent_at, expires_at, interval_us, polled_at, polling, failures, due_at,
		auth_req_id_sealed, answer_sealed, acr, amr, auth_time`
	openStates = `('created', 'requesting', 'pending', 'redeemed')`

	authReqIDColumn = "approvals.auth_req_id"
	answerColumn    = "approvals.answer"
)

func (t *Tx) scanApproval(r scanner) (a approval.Approval, err error) {
	var authReqID, answer []byte
	err = r.Scan(&a.ID, &a.Version, &a.State, &a.Reason, &a.Session, &a.User.Issuer, &a.User.ID, &a.Agent.Issuer, &a.Agent.ID, &a.IntentHash,
		&a.Approver, &a.ApproverRef.Issuer, &a.ApproverRef.ID, &a.Hint, &a.Message, &a.Code, jsonOf(&a.ACRValues),
		timeOf(&a.CreatedAt), timeOf(&a.SentAt), timeOf(&a.ExpiresAt), durationOf(&a.Interval), timeOf(&a.PolledAt), &a.Polling, &a.Failures, timeOf(&a.DueAt),
		&authReqID, &answer, &a.ACR, jsonOf(&a.AMR), timeOf(&a.AuthTime))
	if err != nil {
		return a, err
	}
	// One damaged row must keep neither the kill switch nor other prompts from working.
	id, err1 := t.seal.open(authReqID, authReqIDColumn, a.ID)
	yes, err2 := t.seal.open(answer, answerColumn, a.ID)
	if a.Damaged = err1 != nil || err2 != nil; !a.Damaged {
		a.AuthReqID, a.Answer = string(id), yes
	}
	return a, nil
}

// InsertApproval implements approval.Tx.
func (t *Tx) InsertApproval(ctx context.Context, a approval.Approval) error {
	return t.insert(ctx, "insert approval", `INSERT INTO approvals (`+approvalColumns+`)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20,
		  $21, $22, $23, $24, $25, $26, $27, $28, $29, $30)`,
		a.ID, a.Version, a.State, a.Reason, a.Session, a.User.Issuer, a.User.ID, a.Agent.Issuer, a.Agent.ID, a.IntentHash,
		a.Approver, a.ApproverRef.Issuer, a.ApproverRef.ID, a.Hint, a.Message, a.Code, asJSON(a.ACRValues),
		micros(a.CreatedAt), micros(a.SentAt), micros(a.ExpiresAt), a.Interval.Microseconds(), micros(a.PolledAt), flag(a.Polling), a.Failures, micros(a.DueAt),
		t.seal.seal([]byte(a.AuthReqID), authReqIDColumn, a.ID), t.seal.seal(a.Answer, answerColumn, a.ID), a.ACR, asJSON(a.AMR), micros(a.AuthTime))
}

// Approval implements approval.Tx.
func (t *Tx) Approval(ctx context.Context, id string) (approval.Approval, error) {
	return one(ctx, t, "read approval", t.scanApproval, `SELECT `+approvalColumns+` FROM approvals WHERE id = $1`+t.kept(), id)
}

// UpdateApproval implements approval.Tx.
func (t *Tx) UpdateApproval(ctx context.Context, a *approval.Approval) error {
	err := t.change(ctx, approval.ErrStale, "update approval", `
		UPDATE approvals SET version = version + 1, state = $1, reason = $2, sent_at = $3, expires_at = $4, interval_us = $5,
		  polled_at = $6, polling = $7, failures = $8, due_at = $9, auth_req_id_sealed = $10, answer_sealed = $11,
		  acr = $12, amr = $13, auth_time = $14
		WHERE id = $15 AND version = $16`,
		a.State, a.Reason, micros(a.SentAt), micros(a.ExpiresAt), a.Interval.Microseconds(),
		micros(a.PolledAt), flag(a.Polling), a.Failures, micros(a.DueAt),
		t.seal.seal([]byte(a.AuthReqID), authReqIDColumn, a.ID), t.seal.seal(a.Answer, answerColumn, a.ID),
		a.ACR, asJSON(a.AMR), micros(a.AuthTime), a.ID, a.Version)
	if err == nil {
		a.Version++
	}
	return err
}

// JoinableApproval implements approval.Tx.
func (t *Tx) JoinableApproval(ctx context.Context, hash string, approver identity.Ref, except string) (approval.Approval, bool, error) {
	if err := t.alone(ctx, "approver "+approver.String()); err != nil {
		return approval.Approval{}, false, err
	}
	return found(one(ctx, t, "find joinable approval", t.scanApproval, `SELECT `+approvalColumns+` FROM approvals
		WHERE approver_subject = $1 AND approver_issuer = $2 AND intent_hash = $3 AND id <> $4
		  AND (state IN `+openStates+` OR state = 'approved' AND expires_at > $5)
		ORDER BY created_at DESC, id DESC LIMIT 1`+t.kept(),
		approver.ID, approver.Issuer, hash, except, micros(t.now)))
}

// CountOpenApprovals implements approval.Tx.
func (t *Tx) CountOpenApprovals(ctx context.Context, approver identity.Ref) (int, error) {
	return one(ctx, t, "count open approvals", func(r scanner) (n int, err error) { return n, r.Scan(&n) },
		`SELECT count(*) FROM approvals WHERE approver_subject = $1 AND approver_issuer = $2 AND state IN `+openStates,
		approver.ID, approver.Issuer)
}

// SessionApprovals implements approval.Tx.
func (t *Tx) SessionApprovals(ctx context.Context, session string) ([]approval.Approval, error) {
	return some(ctx, t, "list approvals", t.scanApproval, `SELECT `+approvalColumns+` FROM approvals
		WHERE session = $1 AND (state = 'approved' OR state IN `+openStates+`) ORDER BY id`+t.kept(), session)
}

// DueApproval implements approval.Tx.
func (t *Tx) DueApproval(ctx context.Context) (approval.Approval, bool, error) {
	return found(one(ctx, t, "find due approval", t.scanApproval, `SELECT `+approvalColumns+` FROM approvals
		WHERE due_at <= $1 AND state IN ('created', 'requesting', 'pending', 'redeemed', 'approved')
		ORDER BY due_at LIMIT 1`+t.claimed(), micros(t.now)))
}

// found turns fault.NotFound into ok false.
func found[T any](v T, err error) (T, bool, error) {
	if fault.Is(err, fault.NotFound) {
		return v, false, nil
	}
	return v, err == nil, err
}

// flag is a truth as a column of numbers has it.
func flag(b bool) int64 {
	if b {
		return 1
	}
	return 0
}
