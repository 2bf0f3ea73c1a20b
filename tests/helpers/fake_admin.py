"""Approvals and the audit log behind the HTTP edge, in memory."""

from typing import Any

import msgspec

from app.core.base.errors import ApprovalNotFound, LeaseNotFound, SelfApproval
from app.core.services.audit import ActionEnd, AdminAction
from app.core.services.freshness import DatabaseFreshness
from app.core.stores.manifest.admin_records import ApprovalRecord, AuditRecord

NOW_US = 1_763_931_900_000_000


class FakeAudit:
    def __init__(self) -> None:
        self.entries: list[AuditRecord] = []
        self.failing: Exception | None = None

    async def begin(self, action: AdminAction) -> int | None:
        if self.failing is not None:
            raise self.failing
        sequence = len(self.entries) + 1
        fields = {name: getattr(action, name) for name in AdminAction.__slots__}
        self.entries.append(AuditRecord(sequence=sequence, at_us=NOW_US, **fields))
        return sequence

    async def end(self, sequence: int | None, action: AdminAction, end: ActionEnd) -> None:
        assert sequence is not None
        changes: dict[str, Any] = {name: getattr(end, name) for name in ActionEnd.__slots__}
        self.entries[sequence - 1] = msgspec.structs.replace(
            self.entries[sequence - 1], ended_at_us=NOW_US, **changes
        )

    def list(self, *, limit, after) -> list[AuditRecord]:
        newest = reversed(self.entries)
        return [one for one in newest if after is None or one.sequence < after][:limit]


class FakeApprovals:
    def __init__(self) -> None:
        self.needed = True
        self.rows: dict[str, ApprovalRecord] = {}
        self.held: set[tuple[str, str, int]] = set()
        self.expired: set[str] = set()

    async def release_lease(self, tenant, database, chunk_id, *, reason, principal):
        if (tenant, database, chunk_id) not in self.held:
            raise LeaseNotFound
        row = ApprovalRecord(
            approval_id=f"01JDB4P7R2M8K5T0V3X6Z9A1{len(self.rows):02d}",
            action="lease.release",
            tenant=tenant,
            database=database,
            db_id=1,
            chunk_id=chunk_id,
            job_id="01JDB4N0Z8Q3V5W7X9Y1A2B3C4",
            token=17,
            reason=reason,
            requested_by=principal,
            requested_at_us=NOW_US,
            expires_at_us=NOW_US + 1,
        )
        if not self.needed:
            row = _decided(row, "approved", principal)
        self.rows[row.approval_id] = row
        return row

    async def approve(self, approval_id, *, principal, sees):
        row = self._find(approval_id, sees)
        if row.requested_by == principal:
            raise SelfApproval
        return self._decide(row, "approved", principal)

    async def reject(self, approval_id, *, principal, sees):
        return self._decide(self._find(approval_id, sees), "rejected", principal)

    def list(self, *, limit, after) -> list[ApprovalRecord]:
        newest = sorted(self.rows.values(), key=lambda row: row.approval_id, reverse=True)
        return [row for row in newest if after is None or row.approval_id < after][:limit]

    def is_expired(self, approval: ApprovalRecord) -> bool:
        return approval.approval_id in self.expired

    def _find(self, approval_id, sees) -> ApprovalRecord:
        row = self.rows.get(approval_id)
        if row is None or not sees(row.tenant) or row.state != "pending":
            raise ApprovalNotFound
        return row

    def _decide(self, row, state, principal) -> ApprovalRecord:
        self.rows[row.approval_id] = _decided(row, state, principal)
        return self.rows[row.approval_id]


def _decided(row: ApprovalRecord, state: Any, principal: str) -> ApprovalRecord:
    return msgspec.structs.replace(row, state=state, decided_by=principal, decided_at_us=NOW_US)


class FakeFreshness:
    def __init__(self) -> None:
        self.seen: list[DatabaseFreshness] = []
        self.failing: Exception | None = None

    async def look(self) -> list[DatabaseFreshness]:
        if self.failing is not None:
            raise self.failing
        return self.seen
