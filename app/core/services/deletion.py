"""Deletes a database: the tombstone and its job are one commit, the rest is the job's.

From that commit on the name is free and the database answers 404. Keys hold database and job ids,
so that one of the same name, made at once, never meets what this one leaves.
"""

from app.core.base.clock import Clock, Randomness, wall_us
from app.core.base.errors import JobAlreadyEnded
from app.core.base.events import Events
from app.core.base.ids import new_ulid
from app.core.jobs.queue import JobQueue
from app.core.services.directory import DatabaseDirectory
from app.core.stores.manifest.errors import RowPinned
from app.core.stores.manifest.ops import DeleteSnapshot, SetDatabaseState, UpdateJob
from app.core.stores.manifest.records import JobRecord
from app.core.stores.manifest.store import ManifestStore


class Deletion:
    def __init__(
        self,
        manifest: ManifestStore,
        directory: DatabaseDirectory,
        queue: JobQueue,
        *,
        clock: Clock,
        randomness: Randomness,
        events: Events,
    ) -> None:
        self._manifest = manifest
        self._directory = directory
        self._queue = queue
        self._clock = clock
        self._randomness = randomness
        self._events = events

    async def delete(
        self,
        tenant: str,
        name: str,
        *,
        with_snapshots: bool,
        principal: str,
    ) -> JobRecord:
        """Raises DatabaseNotFound; RowPinned (`snapshot_pinned`) where it has snapshots that are
        not to go with it.
        """
        record = self._directory.read(tenant, name)
        with self._manifest.read() as view:
            snapshots = view.snapshots(record.db_id)
            unfinished = [job for job in view.unfinished_jobs() if job.db_id == record.db_id]
        if snapshots and not with_snapshots:
            names = [snapshot.name for snapshot in snapshots]
            raise RowPinned(
                f"{tenant}/{name} has snapshots: {', '.join(names[:10])}. Delete them, or the "
                "database with ?snapshots=delete.",
                names=names,
            )
        job = JobRecord(
            job_id=new_ulid(self._clock, self._randomness),
            kind="prune_checkpoint",
            tenant=tenant,
            database=name,
            db_id=record.db_id,
            created_at_us=wall_us(self._clock),
            principal=principal,
        )
        await self._queue.enqueue(
            job,
            join=False,
            ops=(
                *(DeleteSnapshot(db_id=record.db_id, name=one.name) for one in snapshots),
                SetDatabaseState(db_id=record.db_id, state="tombstoned"),
                *(
                    UpdateJob(job_id=other.job_id, changes={"cancel_requested": True})
                    for other in unfinished
                ),
            ),
        )
        self._directory.forget(tenant, name)
        self._events.info("database.deleted", tenant=tenant, database=name, db_id=record.db_id)
        for other in unfinished:
            try:
                await self._queue.request_cancel(other.job_id)
            except JobAlreadyEnded:
                continue
        return job
