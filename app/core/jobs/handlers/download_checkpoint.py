"""The `download_checkpoint` job: brings a generation's blobs into the hot cache, for a warm start.

Invariants: I10: each blob is hashed while it is written and gets its name only if it is right.
I9: nothing is evicted that this job brought, and where there is no room for more it stops: use
never passes the cache's limit or the quota. I8: the generation is pinned.
Concurrency: a few blobs at once. Cancellation: a part that was being written is removed.
Crash: what is in the cache stays, and is not fetched again.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from app.core.base import failpoints
from app.core.base.errors import CorruptBlob
from app.core.base.events import Events
from app.core.base.tasks import for_each
from app.core.jobs.generation_jobs import held_generation
from app.core.jobs.runner import JobContext
from app.core.reads.read_point import GenerationPins
from app.core.stores.local.hot_cache import HotCache
from app.core.stores.manifest.ops import Op
from app.core.stores.manifest.records import BlobRef, Progress
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.remote.protocol import BlobMissing, RemoteStore
from app.core.stores.remote.streams import closing

DOWNLOADS_AT_ONCE = 4
ROUND_BLOBS = 16
"""Progress is told after so many."""

Outcome = Literal["cached", "downloaded", "no_room"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadParts:
    manifest: ManifestStore
    pins: GenerationPins
    remote: Callable[[], RemoteStore]
    hot_cache: HotCache
    events: Events


class DownloadCheckpoint:
    def __init__(self, parts: DownloadParts) -> None:
        self._parts = parts

    async def run(self, context: JobContext) -> Mapping[str, Any]:
        parts = self._parts
        async with held_generation(parts.manifest, parts.pins, context.job) as held:
            mine = dict.fromkeys(blob.sha256.hex() for blob in held.blobs)
            for name in mine:
                parts.hot_cache.refresh(name)  # so that others are evicted first
            seen: Counter[Outcome] = Counter()
            downloaded_bytes = done_bytes = 0
            for start in range(0, len(held.blobs), ROUND_BLOBS):
                blobs = held.blobs[start : start + ROUND_BLOBS]
                outcomes = await for_each(
                    blobs, lambda blob: self._fetch(context, blob, mine), limit=DOWNLOADS_AT_ONCE
                )
                seen.update(outcomes)
                for blob, outcome in zip(blobs, outcomes, strict=True):
                    downloaded_bytes += blob.bytes if outcome == "downloaded" else 0
                    done_bytes += blob.bytes
                await context.update(
                    reason="download.progressed",
                    changes={
                        "progress": Progress(
                            staged_chunks=start + len(blobs),
                            total_chunks=len(held.blobs),
                            uploaded_bytes=done_bytes,
                            total_bytes=held.bytes,
                        )
                    },
                )
            result = {
                "outcome": "partial" if seen["no_room"] else "hydrated",
                "generation": held.generation,
                "blobs": len(held.blobs),
                "downloaded_blobs": seen["downloaded"],
                "downloaded_bytes": downloaded_bytes,
                "cached_blobs": seen["cached"],
                "skipped_blobs": seen["no_room"],
            }
        parts.events.info(
            "checkpoint.downloaded", tenant=context.job.tenant, database=context.job.database,
            **result,
        )  # fmt: skip
        return result

    async def abandon(self, context: JobContext) -> tuple[tuple[Op, ...], dict[str, Any]]:
        del context
        return (), {}

    async def pause(self, context: JobContext) -> tuple[Op, ...]:
        del context
        return ()

    async def _fetch(self, context: JobContext, blob: BlobRef, mine: Collection[str]) -> Outcome:
        parts, name = self._parts, blob.sha256.hex()
        if name in parts.hot_cache:
            return "cached"
        if not parts.hot_cache.has_room(blob.bytes, beside=mine):
            return "no_room"
        try:
            async with (
                parts.hot_cache.writer(sha256=name, size_bytes=blob.bytes) as writer,
                closing(
                    parts.remote().iter_blob(blob.key, first=0, length=blob.bytes)
                ) as pieces,
            ):  # fmt: skip
                async for piece in pieces:
                    await writer.write(piece)
                    context.touch()
                failpoints.fp("download.mid_blob")
                admitted = await writer.commit()
        except BlobMissing as error:
            raise CorruptBlob("The blob is gone from the remote store.", key=blob.key) from error
        except CorruptBlob as error:
            raise CorruptBlob(error.detail, key=blob.key) from error
        return "downloaded" if admitted or name in parts.hot_cache else "no_room"
