"""What the ops about operators' acts do: approvals and the audit log."""

from typing import Any, assert_never

import msgspec

from app.core.stores.manifest.errors import MissingRow, RowExists, WrongState
from app.core.stores.manifest.ops import (
    AdminOp,
    AppendAudit,
    DecideApproval,
    DeleteApproval,
    DeleteAudit,
    PutApproval,
    SettleAudit,
)
from app.core.stores.manifest.rows import StagedRows
from app.core.stores.manifest.tables import (
    APPROVALS,
    AUDIT_LOG,
    AUDIT_SEQUENCE,
    SCHEMA,
    number_key,
    number_of,
)

replace = msgspec.structs.replace


def apply_admin(rows: StagedRows, op: AdminOp) -> Any:
    """Gives the op's result."""
    match op:
        case PutApproval(row=approval):
            key = approval.approval_id.encode()
            if rows.get(APPROVALS, key) is not None:
                raise RowExists("The approval exists already.", approval_id=approval.approval_id)
            rows.put(APPROVALS, key, approval)
        case DecideApproval():
            _decide(rows, op)
        case DeleteApproval():
            rows.delete(APPROVALS, op.approval_id.encode())
        case AppendAudit(row=action):
            raw = rows.get(SCHEMA, AUDIT_SEQUENCE)
            sequence = 1 if raw is None else number_of(raw) + 1
            rows.put(SCHEMA, AUDIT_SEQUENCE, number_key(sequence))
            rows.put(AUDIT_LOG, number_key(sequence), replace(action, sequence=sequence))
            return sequence
        case SettleAudit():
            _settle(rows, op)
        case DeleteAudit():
            rows.delete(AUDIT_LOG, number_key(op.sequence))
        case _:
            assert_never(op)
    return None


def _decide(rows: StagedRows, op: DecideApproval) -> None:
    approval = rows.get(APPROVALS, op.approval_id.encode())
    if approval is None:
        raise MissingRow("No such approval.", approval_id=op.approval_id)
    if approval.state != "pending":
        raise WrongState(f"The approval is {approval.state}.", approval_id=op.approval_id)
    decided = replace(
        approval, state=op.state, decided_by=op.decided_by, decided_at_us=op.decided_at_us
    )
    rows.put(APPROVALS, op.approval_id.encode(), decided)


def _settle(rows: StagedRows, op: SettleAudit) -> None:
    """An entry that was trimmed meanwhile stays away."""
    action = rows.get(AUDIT_LOG, number_key(op.sequence))
    if action is None:
        return
    settled = replace(
        action,
        outcome=op.outcome,
        status=op.status,
        code=op.code,
        answer=op.answer,
        ended_at_us=op.ended_at_us,
    )
    rows.put(AUDIT_LOG, number_key(op.sequence), settled)
