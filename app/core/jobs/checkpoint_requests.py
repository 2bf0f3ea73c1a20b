"""Asks for a checkpoint of a database: by a caller, or by the service itself."""

from collections.abc import Callable

from app.core.base.clock import Clock, Randomness, wall_us
from app.core.base.ids import new_ulid
from app.core.jobs.queue import JobQueue
from app.core.stores.manifest.ops import Op
from app.core.stores.manifest.records import DatabaseRecord, JobRecord


class CheckpointRequests:
    def __init__(
        self, queue: JobQueue, *, clock: Clock, randomness: Randomness, deadline_seconds: float
    ) -> None:
        self._queue = queue
        self._clock = clock
        self._randomness = randomness
        self._deadline_seconds = deadline_seconds

    async def request(
        self,
        database: DatabaseRecord,
        *,
        reason: str | None,
        principal: str,
        remember: Callable[[JobRecord], Op] | None = None,
    ) -> JobRecord:
        """A pending job that covers all that was acknowledged before this call: one that waits
        and has not planned yet, or a new one. Raises QueueDrained, Backpressure.
        """
        now = wall_us(self._clock)
        return await self._queue.enqueue(
            JobRecord(
                job_id=new_ulid(self._clock, self._randomness),
                kind="create_checkpoint",
                tenant=database.tenant,
                database=database.name,
                db_id=database.db_id,
                created_at_us=now,
                reason=reason,
                principal=principal,
                deadline_us=now + int(self._deadline_seconds * 1e6),
            ),
            join=True,
            remember=remember,
        )
