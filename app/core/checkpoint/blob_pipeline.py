"""The order in which a plan's blobs are made: each is staged, recorded, uploaded and confirmed by
itself, so that the store has work while the next one is staged.

Concurrency: chunks side by side, staging and uploads bounded each for itself.
Cancellation: at any await; the first error cancels the other chunks and is raised.
Crash: what the intent log holds is resumed from: confirmed blobs are not made again.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from app.core.base import failpoints
from app.core.base.tasks import for_each
from app.core.checkpoint.intent_log import IntentLog
from app.core.checkpoint.intents import StagedRow
from app.core.engines.base import ChunkAction


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobPipeline:
    stage: Callable[[ChunkAction], Awaitable[StagedRow]]
    """Writes the chunk's file; the same bytes each time (I7)."""
    upload: Callable[[StagedRow], Awaitable[None]]
    """Returns once the store has confirmed the row's blob."""
    staging_concurrency: int
    upload_concurrency: int

    async def run(self, actions: Sequence[ChunkAction], log: IntentLog) -> None:
        """Every blob of `actions` is confirmed and marked so. Raises what `stage` and `upload` do,
        and StalePlan where other bytes came out than an earlier run recorded.
        """
        staging = asyncio.Semaphore(self.staging_concurrency)
        uploads = asyncio.Semaphore(self.upload_concurrency)

        async def make(action: ChunkAction) -> None:
            async with staging:
                failpoints.fp("stage.before_file")
                row = await self.stage(action)
                failpoints.fp("stage.after_file")
            await log.staged(row)
            failpoints.fp("stage.after_intents")
            if row.blob is None:
                return
            async with uploads:
                await self.upload(row)
            await log.uploaded(row.chunk_id)
            failpoints.fp("upload.after_marker")

        left = [action for action in actions if not log.is_uploaded(action.chunk_id)]
        await for_each(left, make, limit=max(1, len(left)))
