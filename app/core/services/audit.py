"""Who did what, when, why, and how it ended.

Invariants: an action is recorded, durably, before it is done; one that cannot be recorded is not
done. The exception is a full disk or a full map: what makes room must stay possible, so the action
goes on and the log alone tells of it (`audit.unrecorded`).
Concurrency: nothing shared. Cancellation: the outcome stays unknown. Crash: the same.
"""

from dataclasses import dataclass

from app.core.base.clock import Clock, wall_us
from app.core.base.errors import BopError, ErrorKind
from app.core.base.events import Events
from app.core.stores.manifest.admin_records import AuditOutcome, AuditRecord
from app.core.stores.manifest.ops import AppendAudit, ManifestBatch, SettleAudit
from app.core.stores.manifest.store import ManifestStore


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminAction:
    """What is about to be done, and by whom."""

    principal: str
    action: str
    path: str
    request_id: str
    tenant: str | None
    reason: str | None
    request: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionEnd:
    outcome: AuditOutcome
    status: int | None = None
    code: str | None = None
    answer: str = ""


class Audit:
    def __init__(self, manifest: ManifestStore, *, clock: Clock, events: Events) -> None:
        self._manifest = manifest
        self._clock = clock
        self._events = events

    async def begin(self, action: AdminAction) -> int | None:
        """The entry's sequence, for `end`; None where there was no room to record it. Raises what
        the manifest does when it takes no writes.
        """
        row = AuditRecord(
            sequence=0,
            at_us=wall_us(self._clock),
            principal=action.principal,
            action=action.action,
            path=action.path,
            request_id=action.request_id,
            tenant=action.tenant,
            reason=action.reason,
            request=action.request,
        )
        try:
            receipt = await self._manifest.commit(
                ManifestBatch(ops=(AppendAudit(row=row),), reason="audit.begun")
            )
        except BopError as error:
            if error.kind is not ErrorKind.EXHAUSTED:
                raise
            self._tell_unrecorded(action.action, error)
            return None
        sequence: int = receipt.results[0]
        return sequence

    async def end(self, sequence: int | None, action: AdminAction, end: ActionEnd) -> None:
        """How it ended. The action has happened: that this cannot be recorded does not undo it."""
        self._events.info(
            "admin.acted",
            principal=action.principal,
            action=action.action,
            path=action.path,
            tenant=action.tenant,
            reason=action.reason,
            outcome=end.outcome,
            code=end.code,
        )
        if sequence is None:
            return
        settle = SettleAudit(
            sequence=sequence,
            outcome=end.outcome,
            status=end.status,
            code=end.code,
            answer=end.answer,
            ended_at_us=wall_us(self._clock),
        )
        try:
            await self._manifest.commit(ManifestBatch(ops=(settle,), reason="audit.ended"))
        except BopError as error:
            self._tell_unrecorded(action.action, error)

    def list(self, *, limit: int, after: int | None) -> list[AuditRecord]:
        """Newest first, from the one behind `after`."""
        with self._manifest.read() as view:
            return view.audit_log(after=after, limit=limit)

    def _tell_unrecorded(self, action: str, error: BopError) -> None:
        self._events.error("audit.unrecorded", action=action, detail=str(error))
