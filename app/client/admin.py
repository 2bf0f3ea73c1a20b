"""What operators change: leases by force, approvals, backups; and the log of who did what."""

from collections.abc import AsyncGenerator
from datetime import datetime
from typing import Any

from app.client.calls import Calls, decoded, path_of
from app.client.wire import Answer

BACKUP_SECONDS_MAX = 3600.0


class Approval(Answer, frozen=True):
    approval_id: str
    state: str
    action: str
    tenant: str
    database: str
    chunk_id: int
    job_id: str
    token: int
    reason: str
    requested_by: str
    requested_at: datetime
    expires_at: datetime
    decided_by: str | None
    decided_at: datetime | None
    released: bool


class AuditEntry(Answer, frozen=True):
    sequence: int
    at: datetime
    principal: str
    action: str
    path: str
    tenant: str | None
    reason: str | None
    request: str
    request_id: str
    outcome: str
    status: int | None
    code: str | None
    answer: str
    ended_at: datetime | None


class Backup(Answer, frozen=True):
    path: str
    bytes: int
    sequence: int


class Admin:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def release_lease(
        self, tenant: str, database: str, chunk_id: int, *, reason: str
    ) -> Approval:
        """Asks for it; where approvals are off, it is done on return (`released`)."""
        response = await self._calls.send(
            "POST",
            f"/admin/checkpoint/lease/release/{chunk_id}",
            params={"tenant": tenant, "database": database},
            json={"reason": reason},
        )
        return decoded(response, Approval)

    def approvals(self, *, limit: int | None = None) -> AsyncGenerator[Approval, None]:
        """Newest first."""
        return self._calls.pages("/admin/approvals", Approval, params={}, limit=limit)

    async def approve(self, approval_id: str) -> Approval:
        return await self._decide(approval_id, "approve")

    async def reject(self, approval_id: str) -> Approval:
        return await self._decide(approval_id, "reject")

    def audit(self, *, limit: int | None = None) -> AsyncGenerator[AuditEntry, None]:
        """Newest first."""
        return self._calls.pages("/admin/audit", AuditEntry, params={}, limit=limit)

    async def backup_manifest(self) -> Backup:
        response = await self._calls.send(
            "POST", "/admin/manifest/backup", wait_seconds=BACKUP_SECONDS_MAX
        )
        return decoded(response, Backup)

    async def explain_job(self, job_id: str) -> dict[str, Any]:
        """What it waits for, and who has that."""
        return await self._calls.get(path_of("debug", "jobs", job_id, "explain"), dict[str, Any])

    async def _decide(self, approval_id: str, step: str) -> Approval:
        response = await self._calls.send("POST", path_of("admin", "approvals", approval_id, step))
        return decoded(response, Approval)
