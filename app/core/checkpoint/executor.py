"""Runs a checkpoint: plan → reserve → stage → upload → clean up → publish → document → done.

Invariants: I2 every blob is confirmed by the store before the manifest names it. I3 one batch
publishes, and the generation document is stored before the job completes and before any WAL goes.
I4 WAL goes last. I6 lease tokens, generation and run are checked inside the publishing
transaction. I7 the persisted plan fixes all that a retry does. I9, I13 every exit gives back the
reservation and the scratch directory. I15 once published, only onwards.
Concurrency: one run per database at a time (the queue sees to that); chunks side by side, bounded.
Cancellation: at any `await`; what was committed is resumed from, the rest is done again.
Crash: the same. Scratch and reservation of a dead process are swept at start.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from app.core.base import failpoints
from app.core.base.clock import Clock, wall_us
from app.core.base.errors import InvariantViolation, OwnershipLost, StalePlan
from app.core.base.events import Events
from app.core.base.ids import JobId, checkpoint_id
from app.core.base.tasks import BlockingPool, for_each, run_beside
from app.core.checkpoint.generation_document import (
    build_document,
    decode_document,
    encode_document,
)
from app.core.checkpoint.intents import (
    StagedRow,
    all_uploaded,
    blob_bytes,
    blobs_of,
    intent_of,
    progress_of,
    row_of,
    rows_of,
    staged_name,
)
from app.core.checkpoint.job_hold import JobHold
from app.core.checkpoint.outcome import delta_chain_lengths, result_of
from app.core.checkpoint.page_planning import PlanningParts, committed_segments, load_changes
from app.core.checkpoint.page_staging import PageStaging
from app.core.checkpoint.publication import publication_batch
from app.core.checkpoint.staging import KeyScope, SegmentSource, stage_segment_blocking
from app.core.checkpoint.upload_marker import UploadMarker
from app.core.checkpoint.wal_release import WalRelease
from app.core.coordination.flags import flags_of
from app.core.coordination.leases import keep_leases
from app.core.coordination.ownership import PrefixOwnership
from app.core.coordination.quota import Reservation, StorageQuota
from app.core.engines.base import (
    CheckpointPlan,
    ChunkAction,
    DeltaLimits,
    PageChanges,
    PlannerContext,
    SealAsBase,
    SegmentView,
    decode_plan,
    encode_plan,
)
from app.core.engines.planning import plan_checkpoint
from app.core.formats.crc64 import crc64
from app.core.reads.delta_chain import is_valid_at
from app.core.reads.page_cache import CheckpointScope
from app.core.reads.page_store import PageStore
from app.core.stores.local.hot_cache import HotCache
from app.core.stores.local.scratch import ScratchStore
from app.core.stores.manifest.errors import GenerationMoved, KeyDoomed, LeaseLost
from app.core.stores.manifest.ops import (
    AcquireLease,
    AdvanceCheckpointed,
    ExpectGeneration,
    Op,
    ReleaseLeases,
    RetireBlob,
)
from app.core.stores.manifest.records import GenerationRecord, JobRecord, Progress
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.remote.keys import generation_document_key
from app.core.stores.remote.protocol import BytesBody, FileBody, RemoteStore
from app.core.stores.wal.segments import SegmentInfo
from app.core.stores.wal.store import WalStore

REPLANS_MAX = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointLimits:
    staging_concurrency: int
    upload_concurrency: int
    lease_ttl_seconds: float
    gc_grace_seconds: float
    deltas: DeltaLimits = field(default_factory=DeltaLimits)
    compression_threads: int = 2
    """For the blocks of one chunk; they do not hold the interpreter's lock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointParts:
    """What the executor works with; the composition root fills it."""

    manifest: ManifestStore
    wal: WalStore
    scratch: ScratchStore
    hot_cache: HotCache
    quota: StorageQuota
    remote: Callable[[], RemoteStore]
    """The claimed remote store; raises NotReady until the prefix is ours."""
    ownership: PrefixOwnership
    release: WalRelease
    pages: PageStore
    on_durable: Callable[[int], None]
    """Told the db_id whenever its `checkpointed_lsn` has moved."""
    pool: BlockingPool
    clock: Clock
    events: Events


class CheckpointExecutor:
    def __init__(self, parts: CheckpointParts, limits: CheckpointLimits) -> None:
        self._parts = parts
        self._limits = limits
        self._planning = PlanningParts(
            manifest=parts.manifest, pages=parts.pages, hot_cache=parts.hot_cache,
            pool=parts.pool, events=parts.events,
        )  # fmt: skip
        self._reservations: dict[str, Reservation] = {}

    async def run(self, hold: JobHold) -> Mapping[str, Any]:
        """One attempt, resumed from where the job's row stands. Returns the job's result."""
        for _ in range(REPLANS_MAX):
            try:
                return await self._run(hold)
            except (StalePlan, GenerationMoved, LeaseLost, KeyDoomed) as stale:
                if hold.job.published_generation is not None:
                    raise
                await self._replan(hold, stale)
        raise StalePlan(f"The plan went stale {REPLANS_MAX} times in a row.")

    async def pause(self, hold: JobHold) -> tuple[Op, ...]:
        """Gives back scratch, reservation and leases until the next attempt."""
        await self._clean_up(hold)
        return (ReleaseLeases(job_id=hold.job.job_id),)

    async def abandon(self, hold: JobHold) -> tuple[tuple[Op, ...], dict[str, Any]]:
        """The job ends unpublished: nothing local stays, and what may be on the store is retired
        in the commit that ends the job.
        """
        await self._clean_up(hold)
        self._parts.events.warning("checkpoint.failed", **_fields(hold.job))
        return self._retire(hold.job), {"plan": None, "intents": ()}

    # --- the stages, in order -----------------------------------------------------------------

    async def _run(self, hold: JobHold) -> Mapping[str, Any]:
        if hold.job.published_generation is not None:
            await self._clean_up(hold)  # a power cut may have brought the scratch back
            return await self._finish(hold)
        started = self._parts.clock.monotonic()
        self._parts.events.info("checkpoint.started", **_fields(hold.job))
        planned = await self._plan(hold)
        if planned is None:
            return self._no_changes(hold.job)
        plan, tokens = planned
        with self._told_to_caches(hold, plan):
            await run_beside(
                self._make(hold, plan, tokens),
                keep_leases(
                    self._parts.manifest,
                    job_id=hold.job.job_id,
                    ttl_seconds=self._limits.lease_ttl_seconds,
                    clock=self._parts.clock,
                ),
            )
        result = await self._finish(hold)
        self._parts.events.info(
            "checkpoint.completed",
            seconds=self._parts.clock.monotonic() - started,
            bytes_uploaded=result["bytes_uploaded"],
            bytes_dirtied=plan.bytes_dirtied,
            **_fields(hold.job),
        )
        return result

    @contextmanager
    def _told_to_caches(self, hold: JobHold, plan: CheckpointPlan) -> Iterator[None]:
        cache = self._parts.pages.cache
        scope = CheckpointScope(
            db_id=plan.db_id, chunk_ids=tuple(action.chunk_id for action in plan.actions)
        )
        cache.checkpoint_started(scope)
        try:
            yield
        finally:
            cache.checkpoint_ended(scope, generation=hold.job.published_generation)

    async def _make(
        self, hold: JobHold, plan: CheckpointPlan, tokens: tuple[tuple[int, int], ...]
    ) -> None:
        if not hold.job.intents or not all_uploaded(hold.job.intents):
            await self._reserve(hold, plan)
            await self._stage(hold, plan)
            await self._upload(hold)
        await self._keep_local(hold)
        await self._publish(hold, plan, tokens)

    async def _plan(
        self, hold: JobHold
    ) -> tuple[CheckpointPlan, tuple[tuple[int, int], ...]] | None:
        """The persisted plan, or a new one, with its leases taken in the same commit."""
        parts, job = self._parts, hold.job
        if job.plan is None:
            failpoints.fp("job.before_plan")
            await parts.wal.log(job.db_id).seal()
            plan = await self._decide(job)
            if plan is None:
                return None
        else:
            plan = decode_plan(job.plan)
        receipt = await hold.update(
            reason="checkpoint.planned",
            changes={
                "plan": encode_plan(plan),
                "stage": "planning",
                "progress": msgspec.structs.replace(
                    job.progress,
                    total_chunks=len(plan.actions),
                    total_bytes=plan.staged_bytes_max,
                ),
            },
            ops=tuple(
                AcquireLease(
                    db_id=plan.db_id,
                    chunk_id=action.chunk_id,
                    generation=plan.target_generation,
                    job_id=job.job_id,
                    ttl_seconds=self._limits.lease_ttl_seconds,
                )
                for action in plan.actions
            ),
            preconditions=(
                ExpectGeneration(db_id=plan.db_id, generation=plan.expected_generation),
            ),
        )
        failpoints.fp("job.after_plan")
        tokens = receipt.results[: len(plan.actions)]
        return plan, tuple(
            (action.chunk_id, token) for action, token in zip(plan.actions, tokens, strict=True)
        )

    async def _decide(self, job: JobRecord) -> CheckpointPlan | None:
        parts = self._parts
        segments = [info for info in self._segments(job.db_id).values() if info.state == "sealed"]
        changes: PageChanges | None = None
        if segments and segments[0].engine_name == "libsql":
            log = parts.wal.log(job.db_id)
            segments = list(committed_segments(segments, await log.frames.read()))
            if segments:
                changes = await load_changes(self._planning, log, segments, db_id=job.db_id)
        with parts.manifest.read() as view:
            database = view.database(job.db_id)
            if database is None:
                raise InvariantViolation("a checkpoint of no database", db_id=job.db_id)
            chunks = view.chunk_view(job.db_id, database.generation)
            flags = flags_of(view, job.tenant)
        with_deltas = self._limits.deltas.enabled and flags.enable_chunk_deltas
        epoch = parts.ownership.epoch
        return plan_checkpoint(
            PlannerContext(
                database=database,
                chunks=tuple(chunks),
                segments=tuple(
                    SegmentView(
                        engine=info.engine_name,
                        segment_id=info.segment_id,
                        first_lsn=info.first_lsn,
                        last_lsn=info.last_lsn,
                        segment_bytes=info.file_bytes,
                        line_safe=info.line_safe,
                    )
                    for info in segments
                ),
                checkpoint_id=checkpoint_id(
                    generation=database.generation + 1, epoch=epoch, job_id=JobId(job.job_id)
                ),
                epoch=epoch,
                pages=changes,
                limits=replace(self._limits.deltas, enabled=with_deltas),
            )
        )

    async def _reserve(self, hold: JobHold, plan: CheckpointPlan) -> None:
        await hold.update(reason="checkpoint.reserving", changes={"stage": "reserving"})
        job = hold.job
        self._reservations[job.job_id] = await self._parts.quota.reserve(
            tenant=job.tenant, job_id=job.job_id, size_bytes=plan.staged_bytes_max, drain=True
        )
        failpoints.fp("quota.after_reserve")

    async def _stage(self, hold: JobHold, plan: CheckpointPlan) -> None:
        parts, job = self._parts, hold.job
        await hold.update(reason="checkpoint.staging", changes={"stage": "staging"})
        directory = await parts.scratch.create(job.job_id)
        async with self._stager(hold, plan) as stage_file:

            async def stage(action: ChunkAction) -> StagedRow:
                failpoints.fp("stage.before_file")
                row = await stage_file(action, directory.file(staged_name(action.chunk_id)))
                failpoints.fp("stage.after_file")
                hold.touch()
                return row

            rows = await for_each(plan.actions, stage, limit=self._limits.staging_concurrency)
        known = {row.chunk_id: row for row in rows_of(job.intents)}
        if known and any(known[row.chunk_id].blob != row.blob for row in rows):
            raise StalePlan("Staging gave other bytes than before.")
        uploaded = {row_of(intent).chunk_id for intent in job.intents if intent.uploaded}
        intents = tuple(intent_of(row, uploaded=row.chunk_id in uploaded) for row in rows)
        total_bytes = blob_bytes(rows)
        await hold.update(
            reason="checkpoint.staged",
            changes={
                "stage": "uploading",
                "intents": intents,
                "progress": progress_of(intents, total_bytes=total_bytes),
            },
        )
        parts.events.info(
            "checkpoint.staged", chunks=len(rows), bytes=total_bytes, **_fields(hold.job)
        )
        failpoints.fp("stage.after_intents")

    @asynccontextmanager
    async def _stager(
        self, hold: JobHold, plan: CheckpointPlan
    ) -> AsyncIterator[Callable[[ChunkAction, Path], Awaitable[StagedRow]]]:
        """How this plan's actions are turned into files."""
        parts, job = self._parts, hold.job
        scope = KeyScope(tenant=job.tenant, database=job.database)
        segments = self._segments(job.db_id)

        async def stage_segment(action: SealAsBase, target: Path) -> StagedRow:
            info = segments.get(action.segment_id)
            if info is None:
                raise StalePlan("A planned WAL segment is gone.", segment_id=action.segment_id)
            source = SegmentSource(path=info.path, summary=info.summary)
            return await parts.pool.run(
                lambda: stage_segment_blocking(plan, action, source, target, scope=scope)
            )

        if plan.engine == "append_only":

            async def stage_record_chunk(action: ChunkAction, target: Path) -> StagedRow:
                assert isinstance(action, SealAsBase)
                return await stage_segment(action, target)

            yield stage_record_chunk
            return

        with await parts.pages.point(job.db_id, lsn=plan.last_lsn) as point:
            pages = PageStaging(
                plan=plan, point=point, pages=parts.pages, pool=parts.pool, scope=scope,
                threads=self._limits.compression_threads,
            )  # fmt: skip
            pages.check()

            async def stage_page_chunk(action: ChunkAction, target: Path) -> StagedRow:
                assert not isinstance(action, SealAsBase)
                return await pages.stage(action, target)

            yield stage_page_chunk

    async def _upload(self, hold: JobHold) -> None:
        parts = self._parts
        remote = parts.remote()
        directory = await parts.scratch.create(hold.job.job_id)
        waiting = rows_of(intent for intent in hold.job.intents if not intent.uploaded)
        marker = UploadMarker(hold)

        async def upload(row: StagedRow) -> None:
            blob = row.blob
            assert blob is not None
            found = await remote.head_blob(blob.key) if hold.job.run > 1 else None
            if found is None or (found.bytes, found.crc64) != (blob.bytes, blob.crc64):
                failpoints.fp("upload.before_put")
                body = FileBody(
                    path=directory.file(staged_name(row.chunk_id)),
                    bytes=blob.bytes,
                    crc64=blob.crc64,
                )
                found = await remote.put_blob(blob.key, body)
                failpoints.fp("upload.after_put")
            if (found.bytes, found.crc64) != (blob.bytes, blob.crc64):
                raise InvariantViolation("the store confirmed another object", key=blob.key)
            await marker.uploaded(row.chunk_id)
            failpoints.fp("upload.after_marker")

        await for_each(waiting, upload, limit=self._limits.upload_concurrency)
        parts.events.info(
            "checkpoint.uploaded",
            blobs=len(waiting),
            bytes=blob_bytes(waiting),
            **_fields(hold.job),
        )

    async def _keep_local(self, hold: JobHold) -> None:
        """Links the blobs into the hot cache, then scratch and reservation go."""
        await hold.update(reason="checkpoint.cleanup", changes={"stage": "cleanup"})
        parts = self._parts
        directory = await parts.scratch.create(hold.job.job_id)
        for row in rows_of(hold.job.intents):
            if (blob := row.blob) is None:
                continue
            path = directory.file(staged_name(row.chunk_id))
            await parts.hot_cache.admit_link(path, sha256=blob.sha256.hex(), size_bytes=blob.bytes)
        failpoints.fp("cleanup.after_links")
        await self._clean_up(hold)
        parts.events.info("checkpoint.cleaned_up", **_fields(hold.job))
        failpoints.fp("cleanup.after_scratch")

    async def _publish(
        self, hold: JobHold, plan: CheckpointPlan, tokens: tuple[tuple[int, int], ...]
    ) -> None:
        parts, job = self._parts, hold.job
        await hold.update(reason="checkpoint.publishing", changes={"stage": "publishing"})
        await parts.ownership.confirm()
        log = parts.wal.log(job.db_id)
        batch = publication_batch(
            plan,
            rows=rows_of(job.intents),
            committed_at_us=wall_us(parts.clock),
            document_key=generation_document_key(
                tenant=job.tenant,
                database=job.database,
                db_id=job.db_id,
                generation=plan.target_generation,
            ),
            job_id=job.job_id,
            tokens=tokens,
            epoch=parts.ownership.epoch,
            remembered={
                segment_id: log.remembered_of(segment_id) for segment_id in plan.segment_ids
            },
        )
        failpoints.fp("publish.before_commit")
        await hold.update(
            reason="checkpoint.published",
            changes={"published_generation": plan.target_generation},
            ops=batch.ops,
            preconditions=batch.preconditions,
        )
        failpoints.fp("publish.after_commit")
        log.mark_checkpointed(plan.segment_ids)
        parts.events.info(
            "checkpoint.published",
            generation=plan.target_generation,
            checkpoint_id=plan.checkpoint_id,
            first_lsn=plan.first_lsn,
            last_lsn=plan.last_lsn,
            chunks=len(plan.actions),
            delta_chain_lengths=delta_chain_lengths(plan),
            **_fields(hold.job),
        )

    # --- after the publication: only onwards --------------------------------------------------

    async def _finish(self, hold: JobHold) -> Mapping[str, Any]:
        """Stores the generation document, lets `checkpointed_lsn` say so, and frees the WAL."""
        parts, job = self._parts, hold.job
        assert job.published_generation is not None
        assert job.plan is not None
        plan = decode_plan(job.plan)
        with parts.manifest.read() as view:
            database = view.database(job.db_id)
            generation = view.generation(job.db_id, job.published_generation)
            chunks = [
                row
                for row in view.chunk_rows(job.db_id)
                if is_valid_at(row, job.published_generation)
            ]
            deltas = view.delta_view(job.db_id, job.published_generation)
        if database is None or generation is None:
            raise InvariantViolation("a published generation is gone", db_id=job.db_id)
        if not generation.document_stored:
            document = build_document(database, generation, chunks, deltas)
            failpoints.fp("publish.before_document")
            await self._store_document(generation, encode_document(document))
            failpoints.fp("publish.after_document")
            await hold.update(
                reason="checkpoint.durable",
                changes={},
                ops=(
                    AdvanceCheckpointed(
                        db_id=job.db_id, generation=generation.generation, lsn=plan.last_lsn
                    ),
                ),
                allow_cancelled=True,
            )
            parts.on_durable(job.db_id)
        failpoints.fp("publish.before_wal_release")
        await parts.release.release(job.db_id)
        failpoints.fp("publish.after_wal_release")
        return result_of(plan, rows_of(hold.job.intents))

    async def _store_document(self, generation: GenerationRecord, data: bytes) -> None:
        """Raises OwnershipLost if another document is there: someone else published (I17)."""
        remote, key = self._parts.remote(), generation.document_key
        body = BytesBody(data=data, crc64=crc64(data))
        if await remote.put_if_absent(key, body) is not None:
            return
        stored = decode_document(await remote.get_blob(key), key=key)
        if not stored.says_the_same_as(decode_document(data, key=key)):
            raise OwnershipLost(f"Another process published this generation: {key}")

    # --- ways out -----------------------------------------------------------------------------

    async def _replan(self, hold: JobHold, stale: Exception) -> None:
        self._parts.events.warning("checkpoint.replanning", detail=str(stale), **_fields(hold.job))
        await self._clean_up(hold)
        await hold.update(
            reason="checkpoint.replanning",
            changes={"plan": None, "intents": (), "progress": Progress()},
            ops=self._retire(hold.job),
        )

    async def _clean_up(self, hold: JobHold) -> None:
        """Scratch and reservation go; nothing there is fine."""
        await self._parts.scratch.remove(hold.job.job_id)
        reservation = self._reservations.pop(hold.job.job_id, None)
        if reservation is not None:
            reservation.release()

    def _retire(self, job: JobRecord) -> tuple[Op, ...]:
        eligible_at_us = wall_us(self._parts.clock) + int(self._limits.gc_grace_seconds * 1e6)
        return (
            *(
                RetireBlob(
                    blob=blob,
                    db_id=job.db_id,
                    eligible_at_us=eligible_at_us,
                    reason="unpublished",
                )
                for blob in blobs_of(rows_of(job.intents))
            ),
            ReleaseLeases(job_id=job.job_id),
        )

    def _segments(self, db_id: int) -> dict[int, SegmentInfo]:
        return {info.segment_id: info for info in self._parts.wal.log(db_id).sealed_segments()}

    def _no_changes(self, job: JobRecord) -> Mapping[str, Any]:
        with self._parts.manifest.read() as view:
            latest = view.latest_generation(job.db_id)
        self._parts.events.info("checkpoint.unchanged", **_fields(job))
        return {
            "outcome": "no_changes",
            "generation": latest.generation if latest else 0,
            "checkpoint_id": latest.checkpoint_id if latest else None,
            "first_lsn": latest.first_lsn if latest else None,
            "last_lsn": latest.last_lsn if latest else None,
            "bytes_uploaded": 0,
            "chunks": [],
        }


def _fields(job: JobRecord) -> dict[str, object]:
    return {
        "job_id": job.job_id,
        "tenant": job.tenant,
        "database": job.database,
        "db_id": job.db_id,
        "stage": job.stage,
        "attempt": job.attempts,
        "run": job.run,
    }
