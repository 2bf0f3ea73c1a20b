"""Truncations of append_only databases: accept them. What they do is the job's (`checkpoint/`)."""

from collections.abc import Callable

import msgspec

from app.core.base.clock import Clock, Randomness, wall_us
from app.core.base.errors import WalLost
from app.core.base.ids import new_ulid
from app.core.coordination.flags import require_enabled
from app.core.jobs.queue import JobQueue
from app.core.retention.truncation_plan import (
    Direction,
    OnLease,
    TruncationRequest,
    check_range,
)
from app.core.services.directory import DatabaseDirectory
from app.core.stores.manifest.ops import Op
from app.core.stores.manifest.records import DatabaseRecord, JobRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.view import ManifestView
from app.core.stores.wal.log import WalLog


class Truncations:
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

    async def request(
        self,
        tenant: str,
        database: str,
        *,
        direction: Direction,
        lsn: int,
        on_lease: OnLease,
        lease_timeout_seconds: float,
        principal: str,
        remember: Callable[[JobRecord], Op] | None = None,
    ) -> JobRecord:
        """A pending job. What a tail truncation reaches is fixed here: the WAL is sealed, and what
        is appended from now on stays. `remember` makes the op that stores the answer, in the job's
        own commit. Raises DatabaseNotFound, WrongEngine, FeatureDisabled, LsnOutOfRange, WalLost,
        CorruptWal, DiskFull, Backpressure.
        """
        record, log = self._directory.require(tenant, database, "append_only")
        with self._manifest.read() as view:
            require_enabled(view, tenant, "enable_append_only_truncation")
        request = TruncationRequest(
            direction=direction,
            lsn=lsn,
            end_lsn=log.durable_lsn,
            on_lease=on_lease,
            lease_timeout_seconds=lease_timeout_seconds,
        )
        await self._check(request, record)
        if direction == "tail":
            request = await self._reaching_to_the_newest(request, record, log)
        now = wall_us(self._clock)
        return await self._queue.enqueue(
            JobRecord(
                job_id=new_ulid(self._clock, self._randomness),
                kind="truncate_append_only",
                tenant=tenant,
                database=database,
                db_id=record.db_id,
                created_at_us=now,
                params=request.params(),
                principal=principal,
                deadline_us=now + int((lease_timeout_seconds + self._deadline_seconds) * 1e6),
            ),
            join=False,
            remember=remember,
        )

    async def _reaching_to_the_newest(
        self, request: TruncationRequest, record: DatabaseRecord, log: WalLog
    ) -> TruncationRequest:
        if log.health == "wal_lost":
            raise WalLost(lost_from_lsn=log.lost_from_lsn)
        await log.seal()
        sealed = msgspec.structs.replace(request, end_lsn=log.sealed_lsn)
        await self._check(sealed, record)
        return sealed

    async def _check(self, request: TruncationRequest, record: DatabaseRecord) -> None:
        def check_blocking(view: ManifestView) -> None:
            current = view.database(record.db_id) or record
            check_range(request, current, view.chunk_view(record.db_id, current.generation))

        await self._manifest.read_in_thread(check_blocking)
