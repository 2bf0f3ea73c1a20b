"""Checkpoints on demand."""

from collections.abc import Callable

from app.core.base.clock import Clock, Randomness, wall_us
from app.core.base.ids import new_ulid
from app.core.coordination.flags import require_enabled
from app.core.jobs.queue import JobQueue
from app.core.services.directory import DatabaseDirectory
from app.core.stores.manifest.ops import Op
from app.core.stores.manifest.records import JobRecord
from app.core.stores.manifest.store import ManifestStore


class Checkpoints:
    def __init__(
        self,
        manifest: ManifestStore,
        directory: DatabaseDirectory,
        queue: JobQueue,
        *,
        clock: Clock,
        randomness: Randomness,
        deadline_seconds: float,
    ) -> None:
        self._manifest = manifest
        self._directory = directory
        self._queue = queue
        self._clock = clock
        self._randomness = randomness
        self._deadline_seconds = deadline_seconds

    async def trigger(
        self,
        tenant: str,
        database: str,
        *,
        reason: str | None,
        principal: str,
        remember: Callable[[JobRecord], Op] | None = None,
    ) -> JobRecord:
        """A pending job that covers all that was acknowledged before this call: one that waits
        and has not planned yet, or a new one. `remember` makes the op that stores the answer, in
        the job's own commit. Raises DatabaseNotFound, FeatureDisabled,
        Backpressure.
        """
        record = self._directory.read(tenant, database)
        with self._manifest.read() as view:
            require_enabled(view, tenant, "enable_checkpoints")
        now = wall_us(self._clock)
        return await self._queue.enqueue(
            JobRecord(
                job_id=new_ulid(self._clock, self._randomness),
                kind="create_checkpoint",
                tenant=tenant,
                database=database,
                db_id=record.db_id,
                created_at_us=now,
                reason=reason,
                principal=principal,
                deadline_us=now + int(self._deadline_seconds * 1e6),
            ),
            join=True,
            remember=remember,
        )
