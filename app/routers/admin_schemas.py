"""What approvals and the audit log look like."""

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, StringConstraints

from app.core.base.clock import rfc3339
from app.core.stores.manifest.admin_records import ApprovalRecord, AuditRecord
from app.routers.schemas import EXAMPLE_JOB_ID, EXAMPLE_TIME, Body, PageOf, View, example

EXAMPLE_APPROVAL_ID = "01JDB4P7R2M8K5T0V3X6Z9A1C4"
REASON_CHARS_MAX = 1024

Reason = Annotated[str, StringConstraints(min_length=1, max_length=REASON_CHARS_MAX)]


class ReasonBody(Body):
    model_config = ConfigDict(
        json_schema_extra=example({"reason": "the holder hangs in an upload since 10:40"})
    )

    reason: Reason


class WhyBody(Body):
    """May be left out: the audit log keeps why, if that is told."""

    model_config = ConfigDict(json_schema_extra=example({"reason": "maintenance at 11:00"}))

    reason: Reason | None = None


NO_REASON = WhyBody()


class ApprovalView(View):
    model_config = ConfigDict(
        json_schema_extra=example(
            {
                "approval_id": EXAMPLE_APPROVAL_ID,
                "state": "pending",
                "action": "lease.release",
                "tenant": "acme",
                "database": "events",
                "chunk_id": 0,
                "job_id": EXAMPLE_JOB_ID,
                "token": 17,
                "reason": "the holder hangs in an upload since 10:40",
                "requested_by": "ops-1",
                "requested_at": EXAMPLE_TIME,
                "expires_at": EXAMPLE_TIME,
                "decided_by": None,
                "decided_at": None,
                "released": False,
            }
        )
    )

    approval_id: str
    state: Literal["pending", "approved", "rejected", "expired"]
    action: Literal["lease.release"]
    tenant: str
    database: str
    chunk_id: int
    job_id: str
    """The job that held the lease when this was asked for."""
    token: int
    """The fencing token of that lease."""
    reason: str
    requested_by: str
    requested_at: str
    expires_at: str
    decided_by: str | None
    decided_at: str | None
    released: Annotated[bool, Field(description="The lease was released, its holder is fenced.")]

    @classmethod
    def of(cls, approval: ApprovalRecord, *, expired: bool) -> Self:
        decided_at_us = approval.decided_at_us
        return cls(
            approval_id=approval.approval_id,
            state="expired" if expired else approval.state,
            action=approval.action,
            tenant=approval.tenant,
            database=approval.database,
            chunk_id=approval.chunk_id,
            job_id=approval.job_id,
            token=approval.token,
            reason=approval.reason,
            requested_by=approval.requested_by,
            requested_at=rfc3339(approval.requested_at_us),
            expires_at=rfc3339(approval.expires_at_us),
            decided_by=approval.decided_by,
            decided_at=None if decided_at_us is None else rfc3339(decided_at_us),
            released=approval.state == "approved",
        )


class ApprovalPage(PageOf):
    items: list[ApprovalView]


class AuditView(View):
    model_config = ConfigDict(
        json_schema_extra=example(
            {
                "sequence": 12,
                "at": EXAMPLE_TIME,
                "principal": "ops-1",
                "action": "POST /admin/checkpoint/lease/release/{chunk_id}",
                "path": "/admin/checkpoint/lease/release/0?tenant=acme&database=events",
                "tenant": "acme",
                "reason": "the holder hangs in an upload since 10:40",
                "request": '{"reason": "the holder hangs in an upload since 10:40"}',
                "request_id": "0f8fad5bd9cb469fa16570867728950e",
                "outcome": "done",
                "status": 202,
                "code": None,
                "answer": f'{{"approval_id": "{EXAMPLE_APPROVAL_ID}", "state": "pending"}}',
                "ended_at": EXAMPLE_TIME,
            }
        )
    )

    sequence: int
    at: str
    principal: str
    action: str
    path: str
    tenant: str | None
    """null: it concerns all."""
    reason: str | None
    request: str
    """The body, cut where it is long."""
    request_id: str
    outcome: Literal["unknown", "done", "refused", "failed"]
    """unknown: it runs, or the process ended or the caller left before it had ended."""
    status: int | None
    code: str | None
    answer: str
    ended_at: str | None

    @classmethod
    def of(cls, entry: AuditRecord) -> Self:
        return cls(
            sequence=entry.sequence,
            at=rfc3339(entry.at_us),
            principal=entry.principal,
            action=entry.action,
            path=entry.path,
            tenant=entry.tenant,
            reason=entry.reason,
            request=entry.request,
            request_id=entry.request_id,
            outcome=entry.outcome,
            status=entry.status,
            code=entry.code,
            answer=entry.answer,
            ended_at=None if entry.ended_at_us is None else rfc3339(entry.ended_at_us),
        )


class AuditPage(PageOf):
    items: list[AuditView]
