"""Verifies newest generations now and then: the one that was verified longest ago is next.

Off unless an interval is set. Invariants: I11: one job is asked for at a time. Concurrency: one
round at a time. Cancellation, crash: nothing is held; what was asked for is a durable job.
"""

from collections.abc import Iterable, Mapping

from app.core.base.clock import Clock, Randomness, wall_us
from app.core.base.errors import BopError
from app.core.base.events import Events
from app.core.jobs.generation_jobs import generation_job
from app.core.jobs.queue import JobQueue
from app.core.stores.manifest.records import DatabaseRecord, GenerationRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.view import ManifestView

Candidate = tuple[DatabaseRecord, GenerationRecord]


class Verification:
    name = "verification"

    def __init__(
        self,
        manifest: ManifestStore,
        queue: JobQueue,
        *,
        clock: Clock,
        randomness: Randomness,
        events: Events,
        interval_seconds: float,
        max_age_seconds: float,
    ) -> None:
        self._manifest = manifest
        self._queue = queue
        self._clock = clock
        self._randomness = randomness
        self._events = events
        self._interval_seconds = interval_seconds
        self._max_age_seconds = max_age_seconds
        self._asked_us: dict[int, int] = {}
        """By database: one that stays damaged must not keep the others waiting."""

    async def run(self) -> None:
        while True:
            await self._clock.sleep(self._interval_seconds)
            try:
                await self.run_once()
            except BopError as error:
                self._events.warning("verification.not_asked", code=error.code, detail=str(error))

    async def run_once(self) -> str | None:
        """The job that was asked for; None where nothing is due or one is at work."""
        before_us = wall_us(self._clock) - int(self._max_age_seconds * 1e6)
        found = await self._manifest.read_in_thread(_candidates)
        due = None if found is None else next_due(found, self._asked_us, before_us=before_us)
        if due is None:
            return None
        database, generation = due
        job = generation_job(
            "verify_manifest",
            database,
            generation=generation.generation,
            principal="service",
            reason="scheduled",
            clock=self._clock,
            randomness=self._randomness,
        )
        await self._queue.enqueue(job, join=False)
        known = {record.db_id for record, _ in found or ()}
        self._asked_us = {db_id: at for db_id, at in self._asked_us.items() if db_id in known}
        self._asked_us[database.db_id] = wall_us(self._clock)
        return job.job_id


def next_due(
    candidates: Iterable[Candidate], asked_us: Mapping[int, int], *, before_us: int
) -> Candidate | None:
    """Never verified before long ago verified, old before young; pure."""

    def looked_at_us(pair: Candidate) -> int:
        return max(pair[1].verified_at_us or 0, asked_us.get(pair[0].db_id, 0))

    due = [pair for pair in candidates if looked_at_us(pair) < before_us]
    return min(
        due,
        key=lambda pair: (looked_at_us(pair), pair[1].committed_at_us, pair[0].db_id),
        default=None,
    )


def _candidates(view: ManifestView) -> list[Candidate] | None:
    """Each database's newest generation; None while a verification waits or runs."""
    if any(job.kind == "verify_manifest" for job in view.unfinished_jobs()):
        return None
    found = []
    for database in view.all_databases():
        if database.state != "tombstoned" and database.generation > 0:
            generation = view.generation(database.db_id, database.generation)
            if generation is not None:
                found.append((database, generation))
    return found
