"""Rows about what operators do: approvals that a second person gives, and the audit log."""

from typing import Literal

from app.core.stores.manifest.records import Record

ApprovalAction = Literal["lease.release"]
ApprovalState = Literal["pending", "approved", "rejected"]
AuditOutcome = Literal["unknown", "done", "refused", "failed"]


class ApprovalRecord(Record, array_like=True, frozen=True, kw_only=True):
    """An act that waits for, or was decided by, a second person. One that is past its time is
    still `pending` here; nobody can decide it any more.
    """

    approval_id: str
    action: ApprovalAction
    tenant: str
    database: str
    db_id: int
    chunk_id: int
    job_id: str
    """Who held the lease when this was asked for."""
    token: int
    """That lease and no later one is what may be released."""
    reason: str
    requested_by: str
    requested_at_us: int
    expires_at_us: int
    state: ApprovalState = "pending"
    decided_by: str | None = None
    decided_at_us: int | None = None


class AuditRecord(Record, array_like=True, frozen=True, kw_only=True):
    """One admin action: recorded before it is done, completed with how it ended. An outcome that
    is still unknown means that the process ended, or the caller left, in between.
    """

    sequence: int
    at_us: int
    principal: str
    action: str
    """Method and route: `POST /admin/queue/drain`."""
    path: str
    """With its query, as it was asked for."""
    request_id: str
    tenant: str | None = None
    """None: it concerns all."""
    reason: str | None = None
    request: str = ""
    """The body, cut."""
    outcome: AuditOutcome = "unknown"
    status: int | None = None
    code: str | None = None
    """Of the problem that refused it."""
    answer: str = ""
    """The answer's body, cut."""
    ended_at_us: int | None = None
