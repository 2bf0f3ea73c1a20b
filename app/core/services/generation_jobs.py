"""Verifications and downloads of published generations, on demand."""

from collections.abc import Callable

from app.core.base.clock import Clock, Randomness
from app.core.base.errors import GenerationExpired, NoGeneration, NotFound
from app.core.jobs.generation_jobs import GenerationJobKind, generation_job
from app.core.jobs.queue import JobQueue
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
        if record.generation == 0:
            raise NoGeneration(f"Nothing of {tenant}/{database} is published yet.")
        wanted = record.generation if generation is None else generation
        with self._manifest.read() as view:
            found = view.generation(record.db_id, wanted)
        if found is None:
            if wanted <= record.generation:
                raise GenerationExpired(
                    f"Generation {wanted} is no longer retained.", generation=wanted
                )
            raise NotFound(
                f"There is no generation {wanted}; the newest is {record.generation}.",
                generation=wanted,
            )
        job = generation_job(
            kind,
            record,
            generation=wanted,
            principal=principal,
            reason=None,
            clock=self._clock,
            randomness=self._randomness,
        )
        return await self._queue.enqueue(job, join=False, remember=remember)
