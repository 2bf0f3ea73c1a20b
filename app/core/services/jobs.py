"""Jobs as callers see them: look, wait, watch, list, cancel."""

import asyncio
from collections.abc import AsyncIterator, Collection

from app.core.base.errors import JobNotFound
from app.core.jobs.queue import JobQueue
from app.core.stores.manifest.records import ENDED_STATES, JobKind, JobRecord, JobState
from app.core.stores.manifest.store import ManifestStore


class Jobs:
    def __init__(self, manifest: ManifestStore, queue: JobQueue) -> None:
        self._manifest = manifest
        self._queue = queue

    def get(self, job_id: str, *, kinds: Collection[JobKind] | None = None) -> JobRecord:
        """Raises JobNotFound, also for a job of another kind than asked."""
        with self._manifest.read() as view:
            job = view.job(job_id)
        if job is None or (kinds is not None and job.kind not in kinds):
            raise JobNotFound(f"There is no job {job_id}.", job_id=job_id)
        return job

    async def wait(self, job_id: str, *, seconds: float) -> JobRecord:
        """The job when it has ended, or as it is when the time is over."""
        try:
            async with asyncio.timeout(seconds):
                async for job in self.watch(job_id):
                    if job.state in ENDED_STATES:
                        return job
        except TimeoutError:
            return self.get(job_id)
        return self.get(job_id)

    async def watch(self, job_id: str) -> AsyncIterator[JobRecord]:
        """The job now and after each change; ends with the one that ended. Changes that come
        faster than they are taken are folded into one.
        """
        feed = self._queue.feed
        last: JobRecord | None = None
        while True:
            changed = feed.subscribe(job_id)
            try:
                job = self.get(job_id)
                if job != last:
                    yield job
                    last = job
                if job.state in ENDED_STATES:
                    return
                await changed
            finally:
                feed.unsubscribe(job_id, changed)

    def list(
        self,
        *,
        kinds: Collection[JobKind] | None = None,
        tenant: str | None = None,
        database: str | None = None,
        states: Collection[JobState] | None = None,
        tenants: Collection[str] | None = None,
        limit: int,
        after: str | None,
    ) -> list[JobRecord]:
        """Newest first, from the one behind `after`; `tenants` bounds what may be seen."""
        with self._manifest.read() as view:
            return view.jobs(
                kinds=kinds,
                tenant=tenant,
                database=database,
                states=states,
                tenants=tenants,
                after=after,
                limit=limit,
            )

    async def cancel(self, job_id: str) -> JobRecord:
        """Asks the job to end; one that never ran has ended on return. Raises JobNotFound,
        JobAlreadyEnded.
        """
        return await self._queue.request_cancel(job_id)
