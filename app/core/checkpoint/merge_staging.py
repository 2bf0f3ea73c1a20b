"""Makes the blob of a merged append_only chunk out of the blobs of its sources.

Invariants: I2: hashed over the bytes that are uploaded. I7: sources are immutable, so that the same
action gives the same bytes. I10: every entry is checked before it is sealed anew; what comes
damaged is fetched once more, a source that stays so is `corrupt_blob`, and nothing is published.
Concurrency: one merge a plan; sources that are not in the hot cache are fetched one after another.
Cancellation: at any await; files are given back. Crash: what lies in scratch is written over.
"""

import hashlib
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from app.core.base import failpoints
from app.core.base.errors import CorruptBlob, StalePlan
from app.core.base.tasks import BlockingPool, acquired, uninterrupted
from app.core.checkpoint.staging import (
    KeyScope,
    chunk_row,
    pack_blocking,
    packed_as_it_is_blocking,
)
from app.core.engines.base import CheckpointPlan, MergeChunks
from app.core.formats.damage import Damage
from app.core.formats.segment import EngineCode, SegmentHeader
from app.core.formats.segment_merge import MergeInput, merge_segments_blocking
from app.core.reads.log_reader import REMOTE_READS
from app.core.stores.local.disk import disk_errors
from app.core.stores.local.hot_cache import HotCache
from app.core.stores.local.scratch import ScratchDir
from app.core.stores.manifest.records import BlobRef, ChunkRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.remote.protocol import BlobMissing, RemoteStore
from app.core.stores.remote.streams import closing


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeStaging:
    plan: CheckpointPlan
    manifest: ManifestStore
    hot_cache: HotCache
    remote: Callable[[], RemoteStore]
    scratch: ScratchDir
    pool: BlockingPool
    scope: KeyScope
    touch: Callable[[], None]
    """Told of every piece that came: fetching many sources is no stall."""

    async def stage(self, action: MergeChunks, target: Path) -> ChunkRecord:
        """Writes `target`, and returns the row to publish. Raises StalePlan, CorruptBlob,
        RemoteUnavailable, DiskFull.
        """
        rows = self._rows(action)
        with ExitStack() as stack:
            inputs = [
                MergeInput(
                    descriptor=await self._open(row.chunk_id, blob, stack),
                    codec=row.codec,
                    first_lsn=row.first,
                    last_lsn=row.last,
                )
                for row, blob in rows
            ]
            failpoints.fp("coalesce.after_fetch")
            # The descriptors must outlive the thread that reads them.
            return await uninterrupted(
                self.pool.run(lambda: self._merge_blocking(action, inputs, target))
            )

    def _rows(self, action: MergeChunks) -> list[tuple[ChunkRecord, BlobRef]]:
        wanted = {(source.chunk_id, source.generation) for source in action.sources}
        with self.manifest.read() as view:
            found = [
                (row, row.blob)
                for chunk_id, _ in sorted(wanted)
                for row in view.chunk_rows_of(self.plan.db_id, chunk_id)
                if (row.chunk_id, row.generation) in wanted and row.blob is not None
            ]
        if len(found) != len(wanted):
            raise StalePlan("A chunk that was to be merged is gone.", chunk_id=action.chunk_id)
        return found

    async def _open(self, chunk_id: int, blob: BlobRef, stack: ExitStack) -> int:
        """The blob's file, from the hot cache or fetched into scratch; open as long as `stack`."""
        pinned = await self.hot_cache.pin(blob.sha256.hex(), expected_bytes=blob.bytes)
        if pinned is not None:
            return stack.enter_context(pinned).descriptor
        path = self.scratch.file(f"source-{chunk_id}.blob")

        def open_blocking() -> int:
            with disk_errors(path.parent):
                return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

        descriptor = await acquired(self.pool.run(open_blocking), give_back=os.close)
        stack.callback(os.close, descriptor)
        for _ in range(REMOTE_READS):
            if await self._fetch(blob, path, descriptor) == blob.sha256:
                return descriptor
        raise CorruptBlob("A blob is not what was uploaded.", key=blob.key)

    async def _fetch(self, blob: BlobRef, path: Path, descriptor: int) -> bytes:
        """Writes what comes over the file; returns its SHA-256."""
        sha256 = hashlib.sha256()

        def keep_blocking(piece: bytes, at: int) -> None:
            with disk_errors(path.parent):
                view = memoryview(piece)
                while view:
                    written = os.pwrite(descriptor, view, at)
                    view, at = view[written:], at + written
            sha256.update(piece)

        at = 0
        try:
            async with closing(self.remote().iter_blob(blob.key, length=blob.bytes)) as pieces:
                async for piece in pieces:
                    await uninterrupted(self.pool.run(keep_blocking, piece, at))
                    at += len(piece)
                    self.touch()
        except BlobMissing as error:
            raise CorruptBlob("The blob is gone from the remote store.", key=blob.key) from error
        return sha256.digest()

    def _merge_blocking(
        self, action: MergeChunks, inputs: list[MergeInput], target: Path
    ) -> ChunkRecord:
        plan = self.plan
        header = SegmentHeader(
            engine=EngineCode.APPEND_ONLY, db_id=plan.db_id, segment_id=action.first_lsn,
            first_lsn=action.first_lsn, chunk_bytes=action.segment_bytes,
        )  # fmt: skip
        plain = plan.codec == "none"
        segment = target if plain else self.scratch.file(f"merged-{action.chunk_id}.segment")
        with disk_errors(target.parent):
            try:
                summary = merge_segments_blocking(inputs, segment, header=header)
                if plain:
                    packed = packed_as_it_is_blocking(target, summary)
                else:
                    packed = pack_blocking(plan, action.chunk_id, segment, target)
                    segment.unlink()
            except Damage as damage:
                raise CorruptBlob(
                    f"A chunk that was to be merged is damaged: {damage}",
                    chunk_id=action.chunk_id,
                ) from damage
        return chunk_row(plan, action, packed, summary, scope=self.scope)
