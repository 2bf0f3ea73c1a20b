"""Ops on what operators asked for: approvals, and the audit log. Not in the change log."""

from typing import TypeAlias, get_args

from app.core.stores.manifest.admin_records import (
    ApprovalRecord,
    ApprovalState,
    AuditOutcome,
    AuditRecord,
)
from app.core.stores.manifest.op import Op


class PutApproval(Op, frozen=True, kw_only=True, tag=True):
    row: ApprovalRecord


class DecideApproval(Op, frozen=True, kw_only=True, tag=True):
    """Refused (`WrongState`) unless it is pending."""

    approval_id: str
    state: ApprovalState
    decided_by: str
    decided_at_us: int


class DeleteApproval(Op, frozen=True, kw_only=True, tag=True):
    approval_id: str


class AppendAudit(Op, frozen=True, kw_only=True, tag=True):
    """Result: the entry's sequence, which the row itself need not know."""

    row: AuditRecord


class SettleAudit(Op, frozen=True, kw_only=True, tag=True):
    sequence: int
    outcome: AuditOutcome
    status: int | None
    code: str | None
    answer: str
    ended_at_us: int


class DeleteAudit(Op, frozen=True, kw_only=True, tag=True):
    sequence: int


AdminOp: TypeAlias = (
    PutApproval | DecideApproval | DeleteApproval | AppendAudit | SettleAudit | DeleteAudit
)
ADMIN_OPS: tuple[type[Op], ...] = get_args(AdminOp)
