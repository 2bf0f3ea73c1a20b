"""Has small chunks of append_only databases merged, once a publication leaves a run of them.

Invariants: the plan is made again by the job; what is looked at here only says whether it is worth
one. Idle databases cost nothing.
Concurrency: one loop; the jobs run beside others, one that mutates at a time per database.
Cancellation: at any await. Crash: the next publication of a database looks again.
"""

import asyncio
from collections.abc import Mapping

from app.core.base.clock import Clock, Randomness, wall_us
from app.core.base.errors import Backpressure, BopError
from app.core.base.events import Events, Level
from app.core.base.ids import new_ulid
from app.core.coordination.flags import flags_of
from app.core.engines.append_only.coalescing import pick_run
from app.core.jobs.queue import JobQueue
from app.core.stores.manifest.records import DatabaseRecord, JobRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.view import ManifestView


class Coalescing:
    name = "coalescing"

    def __init__(
        self,
        manifest: ManifestStore,
        queue: JobQueue,
        *,
        clock: Clock,
        randomness: Randomness,
        events: Events,
        deadline_seconds: float,
    ) -> None:
        self._manifest = manifest
        self._queue = queue
        self._clock = clock
        self._randomness = randomness
        self._events = events
        self._deadline_seconds = deadline_seconds
        self._published: set[int] = set()
        self._wake = asyncio.Event()
        events.subscribe(self._listen)

    def _listen(self, name: str, level: Level, fields: Mapping[str, object]) -> None:
        del level
        if name == "checkpoint.published" and isinstance(db_id := fields.get("db_id"), int):
            self._published.add(db_id)
            self._wake.set()

    async def run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._published:
                await self._look(self._published.pop())

    async def _look(self, db_id: int) -> None:
        try:
            database = await self._manifest.read_in_thread(lambda view: _worth_it(view, db_id))
            if database is not None:
                await self._ask(database)
        except Backpressure:
            return  # the next publication looks again
        except BopError as error:
            self._events.warning(
                "coalescing.not_enqueued", db_id=db_id, code=error.code, detail=str(error)
            )

    async def _ask(self, database: DatabaseRecord) -> None:
        now = wall_us(self._clock)
        job = JobRecord(
            job_id=new_ulid(self._clock, self._randomness),
            kind="coalesce_chunks",
            tenant=database.tenant,
            database=database.name,
            db_id=database.db_id,
            created_at_us=now,
            reason="small_chunks",
            deadline_us=now + int(self._deadline_seconds * 1e6),
        )
        await self._queue.enqueue(job, join=True)


def _worth_it(view: ManifestView, db_id: int) -> DatabaseRecord | None:
    """Walks over all chunks of the database."""
    database = view.database(db_id)
    if database is None or (database.engine, database.state) != ("append_only", "active"):
        return None
    if not flags_of(view, database.tenant).enable_checkpoints:
        return None
    chunks = view.chunk_view(db_id, database.generation)
    run = pick_run(chunks, db_id=db_id, chunk_bytes=database.chunk_bytes)
    return database if run else None
