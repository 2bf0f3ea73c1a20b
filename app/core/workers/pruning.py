"""Forgets what is past its time: ended jobs, remembered answers and appends, decided approvals,
the oldest of the audit log.

Invariants: I11: history is bounded. An unfinished job is never forgotten, nor an answer within its
24 h (I7). Concurrency: one round at a time, in small batches. Cancellation, crash: the next round
goes on.
"""

from collections.abc import Iterator, Sequence

from app.core.base.clock import Clock, wall_us
from app.core.base.errors import BopError
from app.core.base.events import Events
from app.core.stores.manifest.ops import (
    DeleteApproval,
    DeleteAudit,
    DeleteIdempotency,
    DeleteJob,
    ForgetAppends,
    ManifestBatch,
    Op,
)
from app.core.stores.manifest.records import ENDED_STATES
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.view import ManifestView

INTERVAL_SECONDS = 300.0
REMEMBERED_US = 24 * 3600 * 1_000_000
APPROVALS_KEPT_US = 30 * 24 * 3600 * 1_000_000
BATCH_OPS = 500


class Pruning:
    name = "pruning"

    def __init__(
        self,
        manifest: ManifestStore,
        *,
        clock: Clock,
        events: Events,
        jobs_max: int,
        audit_max: int,
    ) -> None:
        self._manifest = manifest
        self._clock = clock
        self._events = events
        self._jobs_max = jobs_max
        self._audit_max = audit_max

    async def run(self) -> None:
        while True:
            try:
                await self.run_once()
            except BopError as error:
                self._events.warning("pruning.failed", code=error.code, detail=str(error))
            await self._clock.sleep(INTERVAL_SECONDS)

    async def run_once(self) -> int:
        """Returns how many rows went: all that were past their time, however many came since the
        last round. A part of them is in memory at a time.
        """
        gone = 0
        while True:
            before_us = wall_us(self._clock) - REMEMBERED_US
            found = await self._prune_some(before_us)
            gone += found
            if found < BATCH_OPS:  # of none was there more than was looked for
                break
        if gone:
            self._events.info("history.pruned", rows=gone)
        return gone

    async def _prune_some(self, before_us: int) -> int:
        ops = await self._manifest.read_in_thread(
            lambda view: [
                *self._jobs(view),
                *_answers(view, before_us),
                *_appends(view, before_us),
                *_approvals(view, wall_us(self._clock) - APPROVALS_KEPT_US),
                *self._audit(view),
            ]
        )
        for part in _parts(ops):
            await self._manifest.commit(ManifestBatch(ops=tuple(part), reason="history.pruned"))
        return len(ops)

    def _jobs(self, view: ManifestView) -> Iterator[Op]:
        """The oldest ended jobs beyond the bound."""
        ended = view.jobs(states=ENDED_STATES, limit=2 * self._jobs_max + BATCH_OPS)
        for job in ended[self._jobs_max :]:
            yield DeleteJob(job_id=job.job_id)

    def _audit(self, view: ManifestView) -> Iterator[Op]:
        """The oldest entries beyond the bound."""
        newest = view.audit_log(limit=1)
        bound = newest[0].sequence - self._audit_max if newest else 0
        for entry in view.oldest_audit(BATCH_OPS):
            if entry.sequence <= bound:
                yield DeleteAudit(sequence=entry.sequence)


def _answers(view: ManifestView, before_us: int) -> Iterator[Op]:
    for row in view.idempotency_rows():
        if row.created_at_us < before_us:
            yield DeleteIdempotency(scope_hash=row.scope_hash)


def _appends(view: ManifestView, before_us: int) -> Iterator[Op]:
    """Of a segment's remembered appends the youngest decides."""
    for database in view.all_databases():
        for segment_id, appends in view.remembered_appends(database.db_id).items():
            if all(append.appended_at_us < before_us for append in appends):
                yield ForgetAppends(db_id=database.db_id, segment_id=segment_id)


def _approvals(view: ManifestView, before_us: int) -> Iterator[Op]:
    for approval in view.oldest_approvals(BATCH_OPS):
        if approval.expires_at_us < before_us:
            yield DeleteApproval(approval_id=approval.approval_id)


def _parts(ops: Sequence[Op]) -> Iterator[Sequence[Op]]:
    for start in range(0, len(ops), BATCH_OPS):
        yield ops[start : start + BATCH_OPS]
