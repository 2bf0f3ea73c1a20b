"""The `truncate_append_only` job: waits until nothing is in its way, then drops.

Invariants: while it waits it holds neither its database's slot nor a runner's place, so that the
checkpoint it waits for goes on. Its time runs from its acceptance, restarts included; it ends with
`lease_timeout` only if something still is in its way then. I6: what was seen here is judged again
inside the publishing transaction.
Cancellation: looked for while it waits. Crash: it waits again for what is left of its time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.core.base import failpoints
from app.core.base.clock import Clock
from app.core.base.errors import JobAlreadyEnded, JobCancelled, LeaseTimeout
from app.core.base.events import Events
from app.core.checkpoint.parts import job_fields
from app.core.checkpoint.truncation import TruncationExecutor
from app.core.jobs.queue import JobQueue
from app.core.jobs.runner import JobContext
from app.core.retention.truncation_plan import TruncationRequest
from app.core.stores.manifest.ops import Op
from app.core.stores.manifest.records import JobKind, JobRecord
from app.core.stores.manifest.store import ManifestStore

POLL_SECONDS = 0.1
POLLERS_AT_FULL_PACE = 20
"""With more waiting, each looks less often, so that looking costs no more in all."""
CANCELLED_KINDS: frozenset[JobKind] = frozenset({"create_checkpoint", "coalesce_chunks"})


@dataclass(frozen=True, slots=True, kw_only=True)
class InTheWay:
    """Who keeps a truncation waiting: the holder of a lease, of the slot, or of both."""

    job_id: str | None
    chunk_id: int | None = None


class TruncateAppendOnly:
    def __init__(
        self,
        executor: TruncationExecutor,
        queue: JobQueue,
        manifest: ManifestStore,
        *,
        clock: Clock,
        events: Events,
    ) -> None:
        self._executor = executor
        self._queue = queue
        self._manifest = manifest
        self._clock = clock
        self._events = events

    async def run(self, context: JobContext) -> Mapping[str, Any]:
        await self._enter(context)
        return await self._executor.run(context)

    async def abandon(self, context: JobContext) -> tuple[tuple[Op, ...], dict[str, Any]]:
        """It has nothing to give back: it acts in one commit, or not at all."""
        del context
        return (), {}

    async def pause(self, context: JobContext) -> tuple[Op, ...]:
        del context
        return ()

    async def _enter(self, context: JobContext) -> None:
        """Returns with the database's slot, and no live lease on the database. Raises
        LeaseTimeout, JobCancelled.
        """
        job = context.job
        request = TruncationRequest.of(job.params)
        left_seconds = request.lease_timeout_seconds - self._queue.age_seconds(job)
        give_up_at = self._clock.monotonic() + left_seconds
        told = False
        while (way := self._in_the_way(job)) is not None or not self._queue.enter(job):
            if self._clock.monotonic() >= give_up_at and job.published_generation is None:
                raise _timeout(request, way or InTheWay(job_id=None))
            if not told:
                told = True
                await context.update(
                    reason="truncation.waiting", changes={"stage": "waiting_for_lease"}
                )
                self._tell("truncation.waiting", job, way)
                failpoints.fp("truncate.before_wait")
            if request.on_lease == "cancel":
                await self._cancel_checkpoint(job)
            context.touch()
            pace = max(1.0, self._queue.aside_count / POLLERS_AT_FULL_PACE)
            await self._clock.sleep(POLL_SECONDS * pace)

    def _in_the_way(self, job: JobRecord) -> InTheWay | None:
        with self._manifest.read() as view:
            leases = view.database_leases(job.db_id)
            row = view.job(job.job_id)
        if row is not None and row.cancel_requested and row.published_generation is None:
            raise JobCancelled("The truncation was cancelled on request.")
        now = self._clock.monotonic()
        for lease in leases:
            if lease.process_id == self._manifest.process_id and now < lease.expires_at_monotonic:
                return InTheWay(job_id=lease.job_id, chunk_id=lease.chunk_id)
        holder = self._queue.holder(job.db_id)
        if holder is not None and holder.job_id != job.job_id:
            return InTheWay(job_id=holder.job_id)
        return None

    async def _cancel_checkpoint(self, job: JobRecord) -> None:
        """What has published goes on to its end; jobs of other kinds are waited for."""
        holder = self._queue.holder(job.db_id)
        if holder is None or holder.kind not in CANCELLED_KINDS:
            return
        with self._manifest.read() as view:
            row = view.job(holder.job_id)
        if row is None or row.cancel_requested or row.published_generation is not None:
            return
        try:
            await self._queue.request_cancel(holder.job_id, by=job.job_id)
        except JobAlreadyEnded:
            return
        self._tell("truncation.cancels_checkpoint", job, InTheWay(job_id=holder.job_id))
        failpoints.fp("truncate.after_cancel")

    def _tell(self, name: str, job: JobRecord, way: InTheWay | None) -> None:
        holder = None if way is None else way.job_id
        self._events.info(name, holder=holder, **job_fields(job))


def _timeout(request: TruncationRequest, way: InTheWay) -> LeaseTimeout:
    return LeaseTimeout(
        f"The truncation waited {request.lease_timeout_seconds:g} s for another job.",
        holder=way.job_id,
        chunk_id=way.chunk_id,
    )
