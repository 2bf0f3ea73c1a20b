"""Makes the blobs of a plan: staged as files, recorded as intents, uploaded, confirmed.

Invariants: I2 the store confirms length and checksum of every blob. I7 a blob's key is in the
manifest before its upload begins; what is confirmed is never uploaded again. I15 a blob whose
upload may have been lost is looked for first.
Concurrency: chunks side by side, bounded. Cancellation: at any `await`; what was committed is
resumed from. Crash: the same.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from app.core.base import failpoints
from app.core.base.errors import InvariantViolation, StalePlan
from app.core.base.tasks import for_each
from app.core.checkpoint.intents import (
    StagedRow,
    blob_bytes,
    intent_of,
    progress_of,
    row_of,
    rows_of,
    staged_name,
)
from app.core.checkpoint.job_hold import JobHold
from app.core.checkpoint.page_staging import PageStaging
from app.core.checkpoint.parts import CheckpointLimits, CheckpointParts, job_fields
from app.core.checkpoint.staging import KeyScope, SegmentSource, stage_segment_blocking
from app.core.checkpoint.upload_marker import UploadMarker
from app.core.engines.base import CheckpointPlan, ChunkAction, SealAsBase
from app.core.stores.remote.protocol import FileBody


class BlobMaking:
    def __init__(self, parts: CheckpointParts, limits: CheckpointLimits) -> None:
        self._parts = parts
        self._limits = limits

    async def run(self, hold: JobHold, plan: CheckpointPlan) -> None:
        """Every blob of the plan is on the remote store, and the job's intents say so. Raises
        StalePlan where other bytes came out than an earlier run recorded.
        """
        await self._stage(hold, plan)
        await self._upload(hold)

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
            "checkpoint.staged", chunks=len(rows), bytes=total_bytes, **job_fields(hold.job)
        )
        failpoints.fp("stage.after_intents")

    @asynccontextmanager
    async def _stager(
        self, hold: JobHold, plan: CheckpointPlan
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
            **job_fields(hold.job),
        )
