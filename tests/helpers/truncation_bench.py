"""A queue, a runner and the executors over a real manifest; remote store and WAL in memory."""

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

from app.core.base.clock import SeededRandomness, wall_us
from app.core.base.events import Events
from app.core.base.ids import new_ulid
from app.core.checkpoint.executor import CheckpointExecutor
from app.core.checkpoint.parts import CheckpointLimits, CheckpointParts
from app.core.checkpoint.truncation import TruncationExecutor
from app.core.checkpoint.wal_release import WalRelease
from app.core.coordination.quota import StorageQuota
from app.core.jobs.feed import JobFeed
from app.core.jobs.handlers.truncate_append_only import TruncateAppendOnly
from app.core.jobs.queue import JobQueue
from app.core.jobs.runner import JobContext, JobRunner, RetryPolicy
from app.core.retention.truncation_plan import TruncationRequest
from app.core.stores.manifest.ops import (
    AcquireLease,
    AdvanceCheckpointed,
    CoverSegment,
    CreateDatabase,
    ManifestBatch,
    Op,
    PublishGeneration,
    RegisterSegment,
    SealSegment,
    UpsertChunk,
)
from app.core.stores.manifest.records import (
    BlobRef,
    ChangeRecord,
    ChunkRecord,
    GenerationRecord,
    JobRecord,
    WalSegmentRecord,
)
from app.core.stores.manifest.store import ManifestStore
from tests.helpers.fake_clock import FakeClock
from tests.helpers.memory_remote import MemoryRemote

RANDOMNESS = SeededRandomness(5)


class FakeLog:
    """Files that go when asked, unless a reader has them pinned."""

    def __init__(self) -> None:
        self.checkpointed: set[int] = set()
        self.pinned: set[int] = set()
        self.removed: set[int] = set()

    def mark_checkpointed(self, segment_ids: Any) -> None:
        self.checkpointed |= set(segment_ids)

    def remembered_of(self, segment_id: int) -> tuple[()]:
        return ()

    async def remove(self, segment_ids: list[int]) -> tuple[int, ...]:
        gone = tuple(one for one in segment_ids if one not in self.pinned)
        self.removed |= set(gone)
        return gone


class FakeScratch:
    async def remove(self, job_id: str) -> int:
        return 0


class Ownership:
    epoch = 1

    async def confirm(self) -> None:
        pass


class TruncationBench:
    """One append_only database, `db_id` 1: chunks of ten LSNs each, as many as `publish` makes."""

    db_id = 1

    def __init__(self, manifest: ManifestStore, clock: FakeClock) -> None:
        self.manifest, self.clock = manifest, clock
        self.manifest.set_epoch(Ownership.epoch)
        self.log, self.remote = FakeLog(), MemoryRemote()
        self.queue = JobQueue(
            manifest,
            clock=clock,
            events=Events(),
            feed=JobFeed(),
            depth_max=100,
            retry_wait_seconds_max=60,
        )
        wal = SimpleNamespace(log=lambda db_id: self.log)
        quota = StorageQuota(
            global_limit_bytes=1 << 30, drain_limit_bytes=1 << 20, clock=clock, events=Events()
        )
        given: dict[str, Any] = {
            "manifest": manifest,
            "wal": wal,
            "scratch": FakeScratch(),
            "quota": quota,
            "remote": lambda: self.remote,
            "ownership": Ownership(),
            "release": WalRelease(manifest, wal, events=Events()),  # type: ignore[arg-type]
            "on_durable": lambda db_id: None,
            "clock": clock,
            "events": Events(),
        }
        unused = dict.fromkeys(field.name for field in fields(CheckpointParts))
        parts = CheckpointParts(**{**unused, **given})  # type: ignore[arg-type]
        planning: Any = None  # the tests' checkpoints do work of their own
        self.checkpoints = CheckpointExecutor(
            parts,
            CheckpointLimits(
                staging_concurrency=1, upload_concurrency=1, lease_ttl_seconds=60,
                gc_grace_seconds=0,
            ),
            planning,
        )  # fmt: skip
        self.truncations = TruncationExecutor(parts)

    async def commit(self, *ops: Op, reason: str = "test") -> Any:
        batch = ManifestBatch(ops=ops, reason=reason, db_id=self.db_id)
        return await self.manifest.commit(batch)

    async def create(self, name: str = "log") -> None:
        database = CreateDatabase(
            tenant="acme", name=name, engine="append_only", page_size=0, chunk_bytes=65536,
            compression="none", created_at_us=1,
        )  # fmt: skip
        await self.manifest.commit(ManifestBatch(ops=(database,), reason="test"))

    async def seal(self, first: int, last: int) -> None:
        row = WalSegmentRecord(
            db_id=self.db_id, segment_id=first, first_lsn=first, ceiling_lsn=last + 1000
        )
        await self.commit(RegisterSegment(row=row))
        await self.commit(SealSegment(db_id=self.db_id, segment_id=first, last_lsn=last, bytes=100))

    async def publish(self, generation: int) -> None:
        """LSNs of the chunk: ten from 10 * generation - 9 on. Its WAL stays."""
        first, last = 10 * generation - 9, 10 * generation
        await self.seal(first, last)
        chunk_id = generation - 1
        blob = BlobRef(key=f"chunk-{chunk_id}", sha256=bytes(32), crc64=0, bytes=1)
        await self.commit(
            UpsertChunk(
                row=ChunkRecord(
                    db_id=self.db_id, chunk_id=chunk_id, generation=generation, blob=blob,
                    first=first, last=last, visible_last=last,
                )
            ),
            CoverSegment(db_id=self.db_id, segment_id=first, generation=generation),
            PublishGeneration(
                row=GenerationRecord(
                    db_id=self.db_id, generation=generation, checkpoint_id=f"c{generation}",
                    first_lsn=first, last_lsn=last, page_count=0, committed_at_us=generation,
                    base_chunks=1, delta_chunks=0, bytes_uploaded=1,
                    document_key=f"document-{generation}",
                ),
                next_chunk_id=chunk_id + 1,
            ),
        )  # fmt: skip
        await self.commit(AdvanceCheckpointed(db_id=self.db_id, generation=generation, lsn=last))

    async def lease(self, job_id: str, *, chunk_id: int = 9, ttl_seconds: float = 60) -> None:
        await self.commit(
            AcquireLease(
                db_id=self.db_id, chunk_id=chunk_id, generation=9, job_id=job_id,
                ttl_seconds=ttl_seconds,
            )
        )  # fmt: skip

    async def enqueue(self, kind: Any, **fields: Any) -> JobRecord:
        job = JobRecord(
            job_id=new_ulid(self.clock, RANDOMNESS), kind=kind, tenant="acme", database="log",
            db_id=self.db_id, created_at_us=wall_us(self.clock), **fields,
        )  # fmt: skip
        return await self.queue.enqueue(job, join=False)

    async def truncation(self, direction: Any, lsn: int, end_lsn: int, **fields: Any) -> JobRecord:
        request = TruncationRequest(direction=direction, lsn=lsn, end_lsn=end_lsn, **fields)
        return await self.enqueue("truncate_append_only", params=request.params())

    def handler(self) -> TruncateAppendOnly:
        return TruncateAppendOnly(
            self.truncations, self.queue, self.manifest, clock=self.clock, events=Events()
        )

    async def run_claimed(self, handler: Any) -> JobRecord:
        """Claims a job and runs one attempt of it; the job as it then is."""
        claimed = await self.queue.claim()
        assert claimed is not None
        runner = JobRunner(
            self.queue, {claimed.kind: handler}, clock=self.clock, randomness=RANDOMNESS,
            events=Events(),
            policy=RetryPolicy(
                attempts_max=2, backoff_base_seconds=0.1, backoff_cap_seconds=0.1,
                stall_seconds=600,
            ),
        )  # fmt: skip
        await runner.run(claimed)
        return self.job(claimed.job_id)

    def job(self, job_id: str) -> JobRecord:
        with self.manifest.read() as view:
            job = view.job(job_id)
        assert job is not None
        return job

    def leases(self) -> list[str]:
        with self.manifest.read() as view:
            return [lease.job_id for lease in view.leases()]

    def catalogue(self) -> Any:
        with self.manifest.read() as view:
            return view.catalogue()

    def changes(self, after: int = 0) -> list[ChangeRecord]:
        with self.manifest.read() as view:
            return view.change_log(after)


class CheckpointLike:
    """A checkpoint whose work is the test's, and whose ways out are the executor's own."""

    def __init__(self, bench: TruncationBench, work: Any) -> None:
        self._bench, self._work = bench, work

    async def run(self, context: JobContext) -> Any:
        return await self._work(context)

    async def abandon(self, context: JobContext) -> Any:
        return await self._bench.checkpoints.abandon(context)

    async def pause(self, context: JobContext) -> Any:
        return await self._bench.checkpoints.pause(context)
