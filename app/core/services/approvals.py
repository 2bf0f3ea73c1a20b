"""Acts that take two people: asked for by one, decided by another.

Invariants: an act happens in the commit that records its approval, once, and only on what was
asked for: a lease that changed hands meanwhile is not released. I6: the holder of a lease that is
released by force is fenced. With approvals switched off an act happens at once and is recorded
the same way.
Concurrency: nothing shared; the manifest decides. Cancellation, crash: the commit is there or not.
"""

from collections.abc import Callable

from app.core.base.clock import Clock, Randomness, wall_us
from app.core.base.errors import ApprovalNotFound, LeaseNotFound, SelfApproval
from app.core.base.events import Events
from app.core.base.ids import new_ulid
from app.core.services.directory import DatabaseDirectory
from app.core.stores.manifest.admin_records import ApprovalRecord, ApprovalState
from app.core.stores.manifest.errors import MissingRow, WrongState
from app.core.stores.manifest.ops import DecideApproval, ManifestBatch, PutApproval, ReleaseLease
from app.core.stores.manifest.store import ManifestStore

LIST_MAX = 1000


class Approvals:
    def __init__(
        self,
        manifest: ManifestStore,
        directory: DatabaseDirectory,
        *,
        clock: Clock,
        randomness: Randomness,
        events: Events,
        needed: bool,
        valid_seconds: float,
    ) -> None:
        self._manifest = manifest
        self._directory = directory
        self._clock = clock
        self._randomness = randomness
        self._events = events
        self._needed = needed
        self._valid_us = int(valid_seconds * 1e6)

    async def release_lease(
        self, tenant: str, database: str, chunk_id: int, *, reason: str, principal: str
    ) -> ApprovalRecord:
        """Asks for the chunk's lease to be released; where no approval is needed, releases it.
        The same asked again by the same principal is the same approval while it waits. Raises
        DatabaseNotFound, LeaseNotFound.
        """
        record = self._directory.read(tenant, database)
        now = wall_us(self._clock)
        with self._manifest.read() as view:
            lease = view.lease(record.db_id, chunk_id)
            asked = view.approvals(limit=LIST_MAX)
        if lease is None:
            raise LeaseNotFound(
                f"Nobody holds chunk {chunk_id} of {tenant}/{database}.", chunk_id=chunk_id
            )
        approval = ApprovalRecord(
            approval_id=new_ulid(self._clock, self._randomness),
            action="lease.release",
            tenant=tenant,
            database=database,
            db_id=record.db_id,
            chunk_id=chunk_id,
            job_id=lease.job_id,
            token=lease.token,
            reason=reason,
            requested_by=principal,
            requested_at_us=now,
            expires_at_us=now + self._valid_us,
        )
        if not self._needed:
            return await self._act_at_once(approval)
        for earlier in asked:
            if self._says_the_same(earlier, approval):
                return earlier
        await self._manifest.commit(
            ManifestBatch(ops=(PutApproval(row=approval),), reason="approval.requested")
        )
        self._events.warning("approval.requested", **_fields(approval))
        return approval

    async def approve(
        self, approval_id: str, *, principal: str, sees: Callable[[str], bool]
    ) -> ApprovalRecord:
        """Does what was asked for. Again by the same principal gives the same answer. Raises
        ApprovalNotFound, SelfApproval, LeaseNotFound.
        """
        approval = self._decidable(approval_id, "approved", principal, sees)
        if approval.state == "approved":
            return approval
        if approval.requested_by == principal:
            raise SelfApproval(f"{principal} asked for this.")
        return await self._decide(approval, "approved", principal, self._act_of(approval))

    async def reject(
        self, approval_id: str, *, principal: str, sees: Callable[[str], bool]
    ) -> ApprovalRecord:
        """Nothing is done. Whoever asked may take it back so. Raises ApprovalNotFound."""
        approval = self._decidable(approval_id, "rejected", principal, sees)
        if approval.state == "rejected":
            return approval
        return await self._decide(approval, "rejected", principal, ())

    def list(self, *, limit: int, after: str | None) -> list[ApprovalRecord]:
        """Newest first, from the one behind `after`."""
        with self._manifest.read() as view:
            return view.approvals(after=after, limit=limit)

    def is_expired(self, approval: ApprovalRecord) -> bool:
        return approval.state == "pending" and wall_us(self._clock) >= approval.expires_at_us

    async def _act_at_once(self, approval: ApprovalRecord) -> ApprovalRecord:
        put = PutApproval(row=approval)
        principal = approval.requested_by
        return await self._decide(approval, "approved", principal, (put, *self._act_of(approval)))

    async def _decide(
        self,
        approval: ApprovalRecord,
        state: ApprovalState,
        principal: str,
        ops: tuple[PutApproval | ReleaseLease, ...],
    ) -> ApprovalRecord:
        decision = DecideApproval(
            approval_id=approval.approval_id,
            state=state,
            decided_by=principal,
            decided_at_us=wall_us(self._clock),
        )
        try:
            await self._manifest.commit(
                ManifestBatch(ops=(*ops, decision), reason=f"approval.{state}")
            )
        except WrongState as refused:  # another decision came first
            raise self._gone(approval.approval_id) from refused
        except MissingRow as refused:
            raise LeaseNotFound(
                "The lease that this was about is not held any more.", chunk_id=approval.chunk_id
            ) from refused
        with self._manifest.read() as view:
            decided = view.approval(approval.approval_id)
        if decided is None:
            raise self._gone(approval.approval_id)
        self._events.warning(f"approval.{state}", **_fields(decided))
        if state == "approved":
            self._events.warning("lease.released_by_force", **_fields(decided))
        return decided

    def _act_of(self, approval: ApprovalRecord) -> tuple[ReleaseLease, ...]:
        return (
            ReleaseLease(db_id=approval.db_id, chunk_id=approval.chunk_id, token=approval.token),
        )

    def _decidable(
        self,
        approval_id: str,
        wanted: ApprovalState,
        principal: str,
        sees: Callable[[str], bool],
    ) -> ApprovalRecord:
        """One that waits, or that this principal has decided so already (I7). Raises
        ApprovalNotFound, also for another tenant's (I12).
        """
        with self._manifest.read() as view:
            approval = view.approval(approval_id)
        if approval is None or not sees(approval.tenant):
            raise ApprovalNotFound(f"There is no approval {approval_id}.")
        if approval.state == wanted and approval.decided_by == principal:
            return approval
        if approval.state != "pending":
            raise ApprovalNotFound(f"It is {approval.state} already.", state=approval.state)
        if self.is_expired(approval):
            raise ApprovalNotFound("Its time is over; ask anew.", state="expired")
        return approval

    def _says_the_same(self, earlier: ApprovalRecord, approval: ApprovalRecord) -> bool:
        return (
            earlier.state == "pending"
            and not self.is_expired(earlier)
            and (earlier.db_id, earlier.chunk_id, earlier.token, earlier.requested_by)
            == (approval.db_id, approval.chunk_id, approval.token, approval.requested_by)
        )

    def _gone(self, approval_id: str) -> ApprovalNotFound:
        return ApprovalNotFound(f"The approval {approval_id} was decided meanwhile.")


def _fields(approval: ApprovalRecord) -> dict[str, object]:
    return {
        "approval_id": approval.approval_id,
        "action": approval.action,
        "tenant": approval.tenant,
        "database": approval.database,
        "chunk_id": approval.chunk_id,
        "job_id": approval.job_id,
        "reason": approval.reason,
        "requested_by": approval.requested_by,
        "decided_by": approval.decided_by,
    }
