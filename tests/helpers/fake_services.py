"""The services behind the HTTP edge, in memory, keeping their contracts (signatures, errors).

A test that wants a failure sets `service.failing["records.append"] = SomeError(…)`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import msgspec

from app.container import Readiness
from app.core.base.errors import (
    DatabaseConflict,
    DatabaseNotFound,
    GenerationExpired,
    IdempotencyKeyReused,
    JobAlreadyEnded,
    JobNotFound,
    LsnMismatch,
    LsnOutOfRange,
    LsnTruncated,
    NotLineRecords,
    PageNotFound,
    SnapshotExists,
    SnapshotNotFound,
    WrongEngine,
)
from app.core.base.events import Events
from app.core.formats.record_framing import pack_records, unpack_records
from app.core.reads.page_cache import PageCacheStats
from app.core.services.databases import DatabaseStatus, DurableStatus
from app.core.services.debugging import CacheReport, NamedLease
from app.core.services.idempotency import Remember, StoredAnswer
from app.core.services.pages import FoundPage
from app.core.services.records import AppendLimits
from app.core.services.states import (
    AtGeneration,
    AtSnapshot,
    AtTime,
    Newest,
    StateSelector,
)
from app.core.stores.local.hot_cache import HotCacheStats
from app.core.stores.manifest.records import (
    ENDED_STATES,
    ChangeRecord,
    DatabaseRecord,
    ForkParent,
    GenerationRecord,
    JobRecord,
    LeaseRecord,
    SnapshotRecord,
)
from app.settings import Settings
from tests.helpers.fake_admin import FakeApprovals, FakeAudit, FakeFreshness


@dataclass
class Appended:
    first_lsn: int
    last_lsn: int
    count: int
    payload_bytes: int
    replayed: bool = False


@dataclass
class Stored:
    record: DatabaseRecord
    records: list[bytes] = field(default_factory=list)
    first_lsn: int = 1
    keys: dict[bytes, tuple[bytes, Appended]] = field(default_factory=dict)
    entry_counts: list[list[int]] = field(default_factory=list)

    @property
    def next_lsn(self) -> int:
        return self.first_lsn + len(self.records)


@dataclass
class FakeStream:
    first_lsn: int | None
    last_lsn: int | None
    next_lsn: int
    content: AsyncIterator[bytes]
    on_close: Callable[[], None]

    async def aclose(self) -> None:
        self.on_close()


@dataclass
class FakeImage:
    """A state of a libsql database; `failing_at` is the byte at which its content breaks."""

    service: "FakeService"
    data: bytes
    generation: int
    lsn: int
    page_size: int = 4096
    piece_bytes: int = 5000
    failing_at: int | None = None
    failure: Exception | None = None
    held: bool = True

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    @property
    def tag(self) -> str:
        return f"7-{self.lsn}"

    async def content(self, first: int, stop: int) -> AsyncIterator[memoryview]:
        for at in range(first, stop, self.piece_bytes):
            if self.failing_at is not None and at >= self.failing_at:
                assert self.failure is not None
                raise self.failure
            yield memoryview(self.data)[at : min(at + self.piece_bytes, stop)]

    def release(self) -> None:
        if self.held:
            self.held = False
            self.service.closed_streams += 1


class FakeService:
    """One object that plays all services, and the container around them."""

    def __init__(self) -> None:
        self.stored: dict[tuple[str, str], Stored] = {}
        self.job_records: dict[str, JobRecord] = {}
        self.generations_kept: list[GenerationRecord] = []
        self.snapshots_kept: dict[tuple[int, str], SnapshotRecord] = {}
        self.leases_kept: list[NamedLease] = []
        self.changes_kept: list[ChangeRecord] = []
        self.failing: dict[str, Exception] = {}
        self.images: dict[tuple[str, str], dict[int, FakeImage]] = {}
        self.changed = asyncio.Condition()
        self.answers: dict[bytes, tuple[bytes, StoredAnswer]] = {}
        self.idempotency_locks: dict[bytes, asyncio.Lock] = {}
        self.committed: list[Any] = []
        self.open_streams = 0
        self.closed_streams = 0
        self.waiting = 0
        self.record_bytes_max = 1024 * 1024
        self.fail_stream_after: int | None = None
        self.status = Readiness(status="ready", reasons=[], degraded=[])
        self.shutdowns = 0
        self.on_fatal: Callable[[BaseException], None] | None = None
        self.failures: list[str] = []
        self.services = SimpleNamespace(
            databases=_Databases(self),
            records=_Records(self),
            pages=_Pages(self),
            images=_Images(self),
            checkpoints=_Checkpoints(self),
            truncations=_Truncations(self),
            jobs=_Jobs(self),
            history=_History(self),
            snapshots=_Snapshots(self),
            forks=_Forks(self),
            debugging=_Debugging(self),
            idempotency=_Idempotency(self),
            approvals=FakeApprovals(),
            audit=FakeAudit(),
            freshness=FakeFreshness(),
        )
        self.gauges = SimpleNamespace(
            queue_depth=lambda: 3.0,
            wal_bytes=lambda: 4096.0,
            wal_budget_bytes=lambda: 65536.0,
            quota_used_bytes=lambda: 8192.0,
            quota_limit_bytes=lambda: 65536.0,
            hot_cache_bytes=lambda: 0.0,
            page_cache_bytes=lambda: 0.0,
            cold_scans=lambda: 0.0,
            gc_queue=lambda: 0.0,
            gc_lag_seconds=lambda: 0.0,
            gc_paused=lambda: 0.0,
        )

    # --- the container's part

    @asynccontextmanager
    async def open(
        self, settings: Settings, *, events: Events, on_fatal: Callable[[BaseException], None]
    ) -> AsyncIterator["FakeService"]:
        self.on_fatal = on_fatal
        self.check("open")
        yield self

    def readiness(self) -> Readiness:
        return self.status

    def begin_shutdown(self) -> None:
        self.shutdowns += 1
        self.status = Readiness(status="stopping", reasons=["shutting down"], degraded=[])

    def fail(self, reason: str) -> None:
        self.failures.append(reason)

    # --- for tests

    def check(self, call: str) -> None:
        if (error := self.failing.get(call)) is not None:
            raise error

    def find(self, tenant: str, name: str) -> Stored:
        found = self.stored.get((tenant, name))
        if found is None:
            raise DatabaseNotFound(f"There is no database {tenant}/{name}.")
        return found

    def add_database(self, tenant: str, name: str, engine: str = "append_only") -> Stored:
        stored = Stored(
            DatabaseRecord(
                db_id=len(self.stored) + 1,
                tenant=tenant,
                name=name,
                engine=engine,
                page_size=4096 if engine == "libsql" else 0,
                chunk_bytes=67_108_864,
                compression="none",
                created_at_us=1_763_931_900_000_000,
            )
        )
        self.stored[tenant, name] = stored
        return stored

    def add_image(self, tenant: str, name: str, data: bytes, *, generation: int) -> FakeImage:
        """The newest state has the highest generation; its LSN is 10 times that."""
        image = FakeImage(service=self, data=data, generation=generation, lsn=10 * generation)
        self.images.setdefault((tenant, name), {})[generation] = image
        return image

    def state(self, tenant: str, name: str, selector: StateSelector) -> FakeImage:
        if self.find(tenant, name).record.engine != "libsql":
            raise WrongEngine
        kept = self.images[tenant, name]
        match selector:
            case Newest():
                found = kept[max(kept)]
            case AtGeneration(generation):
                if generation not in kept:
                    raise GenerationExpired
                found = kept[generation]
            case AtTime(time_us):
                found = kept[max(one for one in kept if one * 1_000_000 <= time_us)]
            case AtSnapshot():
                raise SnapshotNotFound
        return replace(found, held=True)

    def add_job(self, **changes: Any) -> JobRecord:
        number = len(self.job_records) + 1
        values: dict[str, Any] = {
            "job_id": f"01JDB4N0Z8Q3V5W7X9Y1A2B3{number:02d}",
            "kind": "create_checkpoint",
            "tenant": "acme",
            "database": "events",
            "db_id": 1,
            "created_at_us": 1_763_931_900_000_000 + number,
        }
        job = JobRecord(**{**values, **changes})
        self.job_records[job.job_id] = job
        return job

    async def update_job(self, job_id: str, **changes: Any) -> None:
        async with self.changed:
            self.job_records[job_id] = msgspec.structs.replace(self.job_records[job_id], **changes)
            self.changed.notify_all()

    def record_contents(self, tenant: str = "acme", name: str = "events") -> list[bytes]:
        return self.stored[tenant, name].records


class _Part:
    def __init__(self, service: FakeService) -> None:
        self.service = service


class _Databases(_Part):
    async def create(self, tenant, name, spec) -> tuple[DatabaseStatus, bool]:
        self.service.check("databases.create")
        existing = self.service.stored.get((tenant, name))
        if existing is not None:
            if spec.engine != existing.record.engine:
                raise DatabaseConflict(differing={"engine": spec.engine})
            return self.get(tenant, name), False
        self.service.add_database(tenant, name, spec.engine)
        return self.get(tenant, name), True

    def get(self, tenant, name) -> DatabaseStatus:
        stored = self.service.find(tenant, name)
        return DatabaseStatus(
            record=stored.record,
            first_lsn=stored.first_lsn,
            next_lsn=stored.next_lsn,
            page_count=stored.record.page_count,
            wal_bytes=0,
            health="ok",
            lost_from_lsn=None,
            earliest_generation=None,
            latest_generation=None,
        )

    def list(self, tenant, *, limit, after) -> list[DatabaseStatus]:
        names = sorted(name for owner, name in self.service.stored if owner == tenant)
        names = [name for name in names if after is None or name > after]
        return [self.get(tenant, name) for name in names[:limit]]

    async def wait_durable(self, tenant, name, *, min_lsn, wait_seconds) -> DurableStatus:
        stored = self.service.find(tenant, name)
        if min_lsn > stored.record.checkpointed_lsn and wait_seconds:
            await _until_time(self.service, wait_seconds)
        return DurableStatus(
            durable_lsn=stored.next_lsn - 1, checkpointed_lsn=stored.record.checkpointed_lsn
        )

    async def acknowledge_loss(self, tenant, name) -> DatabaseStatus:
        self.service.check("databases.acknowledge_loss")
        return self.get(tenant, name)


class _Pages(_Part):
    in_memory: FoundPage | None = None

    def get(self, tenant, name, page_no) -> FoundPage | None:
        self.service.check("pages.get")
        return self.in_memory

    async def read(self, tenant, name, page_no, selector) -> FoundPage:
        self.service.check("pages.read")
        image = self.service.state(tenant, name, selector)
        size = image.page_size
        if not 1 <= page_no <= len(image.data) // size:
            raise PageNotFound(page_no=page_no)
        return FoundPage(
            data=image.data[(page_no - 1) * size : page_no * size],
            tier="local",
            generation=image.generation,
            lsn=image.lsn,
        )


class _Images(_Part):
    async def open(self, tenant, name, selector) -> "FakeImage":
        self.service.check("images.open")
        image = self.service.state(tenant, name, selector)
        self.service.open_streams += 1
        return image


class _Records(_Part):
    def check_appendable(self, tenant, name) -> AppendLimits:
        self.service.check("records.check_appendable")
        stored = self.service.find(tenant, name)
        if stored.record.engine != "append_only":
            raise WrongEngine(engine=stored.record.engine)
        return AppendLimits(self.service.record_bytes_max)

    async def append(
        self, tenant, name, entries, *, expected_next_lsn, key_hash, body_hash
    ) -> Appended:
        self.service.check("records.append")
        stored = self.service.find(tenant, name)
        if key_hash is not None and key_hash in stored.keys:
            known, first = stored.keys[key_hash]
            if known != body_hash:
                raise IdempotencyKeyReused
            return first
        if expected_next_lsn not in {None, stored.next_lsn}:
            raise LsnMismatch(next_lsn=stored.next_lsn)
        payloads = [await asyncio.to_thread(entry.load_blocking) for entry in entries]
        for entry, payload in zip(entries, payloads, strict=True):
            assert entry.payload_bytes == len(payload)
            assert entry.count == len(unpack_records(payload))
            assert entry.line_safe == all(b"\n" not in one for one in unpack_records(payload))
        records = [one for payload in payloads for one in unpack_records(payload)]
        first_lsn = stored.next_lsn
        stored.records += records
        stored.entry_counts.append([entry.count for entry in entries])
        appended = Appended(first_lsn, stored.next_lsn - 1, len(records), sum(map(len, payloads)))
        if key_hash is not None:
            stored.keys[key_hash] = (body_hash, appended)
        return appended

    async def open_read(
        self, tenant, name, *, from_lsn, to_lsn, limit, wait_seconds, as_lines
    ) -> FakeStream:
        service = self.service
        service.check("records.open_read")
        stored = service.find(tenant, name)
        if from_lsn < stored.first_lsn:
            raise LsnTruncated(first_lsn=stored.first_lsn)
        if from_lsn >= stored.next_lsn and wait_seconds:
            await _until_time(service, wait_seconds)
        end = stored.next_lsn if to_lsn is None else min(to_lsn + 1, stored.next_lsn)
        if limit is not None:
            end = min(end, from_lsn + limit)
        shown = stored.records[from_lsn - stored.first_lsn : end - stored.first_lsn]
        if as_lines and any(b"\n" in one for one in shown):
            raise NotLineRecords
        service.open_streams += 1

        async def content() -> AsyncIterator[bytes]:
            for number, one in enumerate(shown):
                if number == service.fail_stream_after:
                    raise OSError("the disk went away")
                yield one + b"\n" if as_lines else pack_records([one])

        def close() -> None:
            service.closed_streams += 1

        return FakeStream(
            from_lsn if shown else None,
            end - 1 if shown else None,
            max(end, from_lsn),
            content(),
            close,
        )


class _Checkpoints(_Part):
    async def trigger(self, tenant, database, *, reason, principal, remember=None) -> JobRecord:
        self.service.check("checkpoints.trigger")
        stored = self.service.find(tenant, database)
        job = self.service.add_job(
            tenant=tenant,
            database=database,
            db_id=stored.record.db_id,
            reason=reason,
            principal=principal,
        )
        if remember is not None:
            self.service.committed.append(remember(job))
        return job


class _Truncations(_Part):
    async def request(
        self, tenant, database, *, direction, lsn, on_lease, lease_timeout_seconds, principal,
        remember=None,
    ) -> JobRecord:  # fmt: skip
        self.service.check("truncations.request")
        stored = self.service.find(tenant, database)
        if stored.record.engine != "append_only":
            raise WrongEngine
        if lsn > stored.next_lsn:
            raise LsnOutOfRange(next_lsn=stored.next_lsn)
        job = self.service.add_job(
            kind="truncate_append_only", tenant=tenant, database=database,
            db_id=stored.record.db_id, principal=principal,
            params={
                "direction": direction, "lsn": lsn, "on_lease": on_lease,
                "lease_timeout_seconds": lease_timeout_seconds,
            },
        )  # fmt: skip
        if remember is not None:
            self.service.committed.append(remember(job))
        return job


class _Jobs(_Part):
    def get(self, job_id, *, kinds=None) -> JobRecord:
        job = self.service.job_records.get(job_id)
        if job is None or (kinds is not None and job.kind not in kinds):
            raise JobNotFound(f"There is no job {job_id}.", job_id=job_id)
        return job

    async def wait(self, job_id, *, seconds) -> JobRecord:
        try:
            async with asyncio.timeout(seconds):
                async for job in self.watch(job_id):
                    if job.state in ENDED_STATES:
                        return job
        except TimeoutError:
            pass
        return self.get(job_id)

    async def watch(self, job_id) -> AsyncIterator[JobRecord]:
        last = None
        self.service.waiting += 1
        try:
            while True:
                job = self.get(job_id)
                if job != last:
                    yield job
                    last = job
                if job.state in ENDED_STATES:
                    return
                async with self.service.changed:
                    if self.get(job_id) == last:
                        await self.service.changed.wait()
        finally:
            self.service.waiting -= 1

    def list(
        self, *, kinds=None, tenant=None, database=None, states=None, tenants=None, limit, after
    ) -> list[JobRecord]:
        found = sorted(self.service.job_records.values(), key=lambda job: job.job_id, reverse=True)
        return [
            job
            for job in found
            if (kinds is None or job.kind in kinds)
            and (tenant is None or job.tenant == tenant)
            and (database is None or job.database == database)
            and (states is None or job.state in states)
            and (tenants is None or job.tenant in tenants)
            and (after is None or job.job_id < after)
        ][:limit]

    async def cancel(self, job_id) -> JobRecord:
        job = self.get(job_id)
        if job.state in ENDED_STATES:
            raise JobAlreadyEnded(state=job.state)
        await self.service.update_job(job_id, state="cancelled")
        return self.get(job_id)


class _History(_Part):
    def generations(self, tenant, name, *, limit, after, expiring=False) -> list[GenerationRecord]:
        self.service.find(tenant, name)
        kept = self.service.generations_kept
        if expiring:
            kept = [one for one in kept if one.superseded_at_us is not None]
        return [one for one in kept if after is None or one.generation > after][:limit]

    async def set_retention(self, tenant, name, change) -> None:
        self.service.check("history.set_retention")
        stored = self.service.find(tenant, name)
        stored.record = msgspec.structs.replace(
            stored.record, retention=change(stored.record.retention)
        )


class _Snapshots(_Part):
    async def create(
        self, tenant, database, name, *, generation=None, remember=None
    ) -> SnapshotRecord:
        self.service.check("snapshots.create")
        db_id = self.service.find(tenant, database).record.db_id
        if (db_id, name) in self.service.snapshots_kept:
            raise SnapshotExists(snapshot=name)
        row = SnapshotRecord(
            db_id=db_id, name=name, generation=generation or 9, last_lsn=90, page_count=3,
            created_at_us=1_763_931_900_000_000,
        )  # fmt: skip
        self.service.snapshots_kept[db_id, name] = row
        if remember is not None:
            self.service.committed.append(remember(row))
        return row

    def get(self, tenant, database, name) -> SnapshotRecord:
        db_id = self.service.find(tenant, database).record.db_id
        if (db_id, name) not in self.service.snapshots_kept:
            raise SnapshotNotFound(snapshot=name)
        return self.service.snapshots_kept[db_id, name]

    def list(self, tenant, database, *, limit, after) -> list[SnapshotRecord]:
        db_id = self.service.find(tenant, database).record.db_id
        found = sorted(name for owner, name in self.service.snapshots_kept if owner == db_id)
        names = [name for name in found if after is None or name > after]
        return [self.service.snapshots_kept[db_id, name] for name in names[:limit]]

    async def delete(self, tenant, database, name) -> None:
        self.get(tenant, database, name)
        db_id = self.service.find(tenant, database).record.db_id
        del self.service.snapshots_kept[db_id, name]


class _Forks(_Part):
    async def create(
        self, tenant, database, *, fork_tenant, fork_database, generation=None, snapshot=None,
        remember=None,
    ) -> DatabaseStatus:  # fmt: skip
        self.service.check("forks.create")
        parent = self.service.find(tenant, database).record
        if snapshot is not None:
            generation = self.service.services.snapshots.get(tenant, database, snapshot).generation
        stored = self.service.add_database(fork_tenant, fork_database, parent.engine)
        stored.record = msgspec.structs.replace(
            stored.record,
            forked_from=ForkParent(
                tenant=tenant, database=database, db_id=parent.db_id, generation=generation or 9
            ),
        )
        status = self.service.services.databases.get(fork_tenant, fork_database)
        if remember is not None:
            self.service.committed.append(remember(status))
        return status


class _Debugging(_Part):
    def leases(self, *, limit, after) -> list[NamedLease]:
        def place(named: NamedLease) -> tuple[int, int]:
            return named.lease.db_id, named.lease.chunk_id

        kept = sorted(self.service.leases_kept, key=place)
        return [one for one in kept if after is None or place(one) > after][:limit]

    def active_jobs(self, *, limit, after) -> list[JobRecord]:
        return self.service.services.jobs.list(
            states=("pending", "in_flight"), limit=limit, after=after
        )

    def change_log(self, *, limit, after) -> list[ChangeRecord]:
        return [one for one in self.service.changes_kept if one.sequence > after][:limit]

    async def manifest_stats(self) -> dict[str, Any]:
        return {"map_bytes": 1024, "last_sequence": len(self.service.changes_kept)}

    def caches(self) -> CacheReport:
        return CacheReport(
            page_cache=PageCacheStats(
                limit_bytes=10, used_bytes=1, entries=2, pinned=0, hits=3, misses=4, evictions=5
            ),
            hot_cache=HotCacheStats(
                limit_bytes=20, used_bytes=6, entries=7, pinned=0, hits=8, misses=9, evictions=1
            ),
        )


class _Idempotency(_Part):
    async def run(self, *, scope_hash, body_hash, action) -> StoredAnswer:
        lock = self.service.idempotency_locks.setdefault(scope_hash, asyncio.Lock())
        async with lock:
            if (known := self.service.answers.get(scope_hash)) is not None:
                if known[0] != body_hash:
                    raise IdempotencyKeyReused
                return known[1]
            remember = Remember(scope_hash=scope_hash, body_hash=body_hash, created_at_us=0)
            answer = await action(remember)
            self.service.answers[scope_hash] = (body_hash, answer)
            return answer


async def _until_time(service: FakeService, seconds: float) -> None:
    """Waits for a change, at most so long."""
    service.waiting += 1
    try:
        async with asyncio.timeout(seconds), service.changed:
            await service.changed.wait()
    except TimeoutError:
        pass
    finally:
        service.waiting -= 1


def lease(tenant: str, *, db_id: int, chunk_id: int) -> NamedLease:
    return NamedLease(
        tenant=tenant,
        database="events",
        lease=LeaseRecord(
            db_id=db_id,
            chunk_id=chunk_id,
            generation=2,
            job_id="01JDB4N0Z8Q3V5W7X9Y1A2B3C4",
            token=17,
            process_id="p",
            registered_at_us=1,
            expires_at_us=2,
            expires_at_monotonic=0.0,
        ),
    )
