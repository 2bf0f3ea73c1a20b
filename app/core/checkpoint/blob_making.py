"""Makes the blobs of a plan: how its chunks are staged as files, and how a file is uploaded.

Invariants: I2 the store confirms length and checksum of every blob. I7 a blob's key is in the
manifest before its upload begins (see intent_log.py). I15 a blob whose
upload may have been lost is looked for first.
Concurrency: see blob_pipeline.py. Cancellation: at any `await`; what was committed is
resumed from. Crash: the same.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from app.core.base import failpoints
from app.core.base.errors import InvariantViolation, StalePlan
from app.core.checkpoint.blob_pipeline import BlobPipeline
from app.core.checkpoint.intent_log import IntentLog
from app.core.checkpoint.intents import (
    StagedRow,
    blob_bytes,
    blobs_of,
    row_of,
    rows_of,
    staged_name,
)
from app.core.checkpoint.job_hold import JobHold
from app.core.checkpoint.merge_staging import MergeStaging
from app.core.checkpoint.page_staging import PageStaging
from app.core.checkpoint.parts import CheckpointLimits, CheckpointParts, job_fields
from app.core.checkpoint.staging import KeyScope, SegmentSource, stage_segment_blocking
from app.core.engines.base import CheckpointPlan, ChunkAction, MergeChunks, SealAsBase
from app.core.stores.local.scratch import ScratchDir
from app.core.stores.remote.protocol import FileBody, RemoteStore


class BlobMaking:
    def __init__(self, parts: CheckpointParts, limits: CheckpointLimits) -> None:
        self._parts = parts
        self._limits = limits

    async def run(self, hold: JobHold, plan: CheckpointPlan) -> None:
        """Every blob of the plan is on the remote store, and the job's intents say so. Raises
        StalePlan where other bytes came out than an earlier run recorded.
        """
        parts, limits = self._parts, self._limits
        await hold.update(reason="checkpoint.staging", changes={"stage": "staging"})
        remote = parts.remote()
        directory = await parts.scratch.create(hold.job.job_id)
        known = {row_of(intent).chunk_id for intent in hold.job.intents if intent.uploaded}
        async with self._stager(hold, plan, directory) as stage_file:
            pipeline = BlobPipeline(
                stage=lambda action: stage_file(action, _staged_file(directory, action.chunk_id)),
                upload=lambda row: self._upload(hold, remote, directory, row),
                staging_concurrency=limits.staging_concurrency,
                upload_concurrency=limits.upload_concurrency,
            )
            await pipeline.run(plan.actions, IntentLog(hold, plan, parts.events))
        new = [row for row in rows_of(hold.job.intents) if row.chunk_id not in known]
        parts.events.info(
            "checkpoint.uploaded",
            blobs=len(blobs_of(new)), bytes=blob_bytes(new), **job_fields(hold.job),
        )  # fmt: skip

    @asynccontextmanager
    async def _stager(
        self, hold: JobHold, plan: CheckpointPlan, directory: ScratchDir
    ) -> AsyncIterator[Callable[[ChunkAction, Path], Awaitable[StagedRow]]]:
        """How this plan's actions are turned into files."""
        parts, job = self._parts, hold.job
        scope = KeyScope(tenant=job.tenant, database=job.database)
        segments = {info.segment_id: info for info in parts.wal.log(job.db_id).sealed_segments()}

        async def stage_segment(action: SealAsBase, target: Path) -> StagedRow:
            info = segments.get(action.segment_id)
            if info is None:
                raise StalePlan("A planned WAL segment is gone.", segment_id=action.segment_id)
            source = SegmentSource(path=info.path, summary=info.summary)
            return await parts.pool.run(
                lambda: stage_segment_blocking(plan, action, source, target, scope=scope)
            )

        if plan.engine == "append_only":
            merging = MergeStaging(
                plan=plan, manifest=parts.manifest, hot_cache=parts.hot_cache,
                remote=parts.remote, scratch=directory, pool=parts.pool, scope=scope,
                touch=hold.touch,
            )  # fmt: skip

            async def stage_record_chunk(action: ChunkAction, target: Path) -> StagedRow:
                match action:
                    case SealAsBase():
                        return await stage_segment(action, target)
                    case MergeChunks():
                        return await merging.stage(action, target)
                    case _:
                        raise InvariantViolation("a page action in a plan of records")

            yield stage_record_chunk
            return

        with await parts.pages.point(job.db_id, lsn=plan.last_lsn) as point:
            pages = PageStaging(
                plan=plan, point=point, pages=parts.pages, pool=parts.pool, scope=scope,
                threads=self._limits.compression_threads, touch=hold.touch,
            )  # fmt: skip
            pages.check()

            async def stage_page_chunk(action: ChunkAction, target: Path) -> StagedRow:
                assert not isinstance(action, SealAsBase | MergeChunks)
                return await pages.stage(action, target)

            yield stage_page_chunk

    async def _upload(
        self, hold: JobHold, remote: RemoteStore, directory: ScratchDir, row: StagedRow
    ) -> None:
        """Returns once the store has confirmed the row's blob (I2)."""
        blob = row.blob
        assert blob is not None
        found = await remote.head_blob(blob.key) if hold.job.run > 1 else None
        if found is None or (found.bytes, found.crc64) != (blob.bytes, blob.crc64):
            failpoints.fp("upload.before_put")
            path = _staged_file(directory, row.chunk_id)
            body = FileBody(path=path, bytes=blob.bytes, crc64=blob.crc64, on_moved=hold.touch)
            found = await remote.put_blob(blob.key, body)
            failpoints.fp("upload.after_put")
        if (found.bytes, found.crc64) != (blob.bytes, blob.crc64):
            raise InvariantViolation("the store confirmed another object", key=blob.key)


def _staged_file(directory: ScratchDir, chunk_id: int) -> Path:
    return directory.file(staged_name(chunk_id))
