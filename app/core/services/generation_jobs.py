"""Verifications and downloads of published generations, on demand."""

from collections.abc import Callable

from app.core.base.clock import Clock, Randomness
from app.core.jobs.generation_jobs import GenerationJobKind, generation_job
from app.core.jobs.queue import JobQueue
from app.core.retention.selection import select_generation
from app.core.services.directory import DatabaseDirectory
from app.core.stores.manifest.ops import Op
from app.core.stores.manifest.records import JobRecord
from app.core.stores.manifest.store import ManifestStore


class GenerationJobs:
    def __init__(
        self,
        manifest: ManifestStore,
        directory: DatabaseDirectory,
        queue: JobQueue,
        *,
        clock: Clock,
        randomness: Randomness,
    ) -> None:
        self._manifest = manifest
        self._directory = directory
        self._queue = queue
        self._clock = clock
        self._randomness = randomness

    async def request(
        self,
        kind: GenerationJobKind,
        tenant: str,
        database: str,
        *,
        generation: int | None,
        principal: str,
        remember: Callable[[JobRecord], Op] | None = None,
    ) -> JobRecord:
        """A job for that generation, or the newest at this moment. `remember` makes the op that
        stores the answer, in the job's own commit. Raises DatabaseNotFound, NoGeneration,
        GenerationExpired, NotFound, Backpressure.
        """
        record = self._directory.read(tenant, database)
        with self._manifest.read() as view:
            found = select_generation(view, record, generation=generation)
        job = generation_job(
            kind,
            record,
            generation=found.generation,
            principal=principal,
            reason=None,
            clock=self._clock,
            randomness=self._randomness,
        )
        return await self._queue.enqueue(job, join=False, remember=remember)
