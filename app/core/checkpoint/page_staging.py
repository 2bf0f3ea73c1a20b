"""Makes the blobs of libsql chunks, bases and deltas: the sealed WAL over the generation before.

Invariants: I2: hashed as they are written. I5: pages as of the plan's last LSN. I7: the same
action over the same generation gives the same bytes. I10: all that is read was checked.
I11: a few windows of pages a chunk.
Concurrency: chunks side by side; one thread at a time for each.
Cancellation: at any await; the file is then rubbish. Crash: it is written over.
"""

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from pyroaring import BitMap

from app.core.base.errors import StalePlan
from app.core.base.tasks import BlockingPool, uninterrupted
from app.core.checkpoint.intents import StagedRow
from app.core.checkpoint.page_reading import read_wal_window, windows
from app.core.checkpoint.staging import KeyScope
from app.core.engines.base import CheckpointPlan, CreateDelta, Drop, PageAction, RewriteBase
from app.core.formats.container import ContainerKind, LogIdentity
from app.core.formats.page_blob import PageNos
from app.core.formats.page_blob_writer import (
    PageBatch,
    PageBlobSpec,
    PageBlobSummary,
    PageBlobWriter,
)
from app.core.reads.delta_chain import BaseLayer
from app.core.reads.open_pages import OpenPages
from app.core.reads.page_store import PageStore
from app.core.reads.read_point import ReadPoint
from app.core.stores.local.disk import disk_errors
from app.core.stores.manifest.records import BlobRef, ChunkDeltaRecord, ChunkRecord
from app.core.stores.remote.keys import chunk_key, delta_key

T = TypeVar("T")

WINDOW_BYTES = 4 * 1024 * 1024
"""Of a base that is written: each takes a few turns through the event loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageStaging:
    """The chunks of one plan. `point` is the database at the plan's last LSN, over the generation
    that the plan expects.
    """

    plan: CheckpointPlan
    point: ReadPoint
    pages: PageStore
    pool: BlockingPool
    scope: KeyScope
    threads: int
    """For compressing the blocks of one chunk."""
    touch: Callable[[], None]
    """Told of every window that was written: a large chunk is no stall."""

    def check(self) -> None:
        """Raises StalePlan where the point is not what was planned."""
        point, plan = self.point, self.plan
        found = (point.generation, point.lsn, point.page_count)
        if found != (plan.expected_generation, plan.last_lsn, plan.page_count):
            raise StalePlan("The database is not in the state that was planned.")

    async def stage(self, action: PageAction, target: Path) -> StagedRow:
        """Writes `target` (nothing, for a drop) and returns the row to publish. Raises DiskFull,
        StalePlan, CorruptWal, CorruptBlob, RemoteUnavailable.
        """
        match action:
            case Drop():
                return self._dropped(action)
            case RewriteBase():
                return self._base_row(action, await self._write_base(action, target))
            case CreateDelta():
                return await self._stage_delta(action, target)

    # --- bases --------------------------------------------------------------------------------

    async def _write_base(self, action: RewriteBase, target: Path) -> PageBlobSummary:
        spec = PageBlobSpec(
            kind=ContainerKind.PAGES, codec=self.plan.codec, page_size=self.point.page_size,
            identity=self._identity(action),
        )  # fmt: skip
        pages = self.pages.iter_pages(
            self.point, action.first_page, action.last_page, window_bytes=WINDOW_BYTES
        )
        async with self._writer(target, spec) as writer, aclosing(pages):
            async for run in pages:
                batch = PageBatch(
                    page_nos=np.arange(run.first, run.first + run.count, dtype=np.uint32),
                    data=run.data,
                )
                await self._on_disk(target, partial(writer.add_blocking, batch))
            return await self._on_disk(target, writer.finish_blocking)

    def _base_row(self, action: RewriteBase, written: PageBlobSummary) -> ChunkRecord:
        plan = self.plan
        return ChunkRecord(
            db_id=plan.db_id,
            chunk_id=action.chunk_id,
            generation=plan.target_generation,
            blob=BlobRef(
                key=chunk_key(
                    tenant=self.scope.tenant,
                    database=self.scope.database,
                    checkpoint_id=plan.checkpoint_id,
                    chunk_id=action.chunk_id,
                    generation=plan.target_generation,
                    sha256_hex=written.sha256.hex(),
                ),
                sha256=written.sha256,
                crc64=written.crc64,
                bytes=written.bytes,
            ),
            first=action.first_page,
            last=action.last_page,
            visible_last=action.last_page,
            codec=plan.codec,
            directory_offset=written.directory_offset,
            directory_bytes=written.directory_bytes,
            logical_bytes=written.raw_bytes,
            count=len(written.pages),
            origin_db_id=plan.db_id,
        )

    def _dropped(self, action: Drop) -> ChunkRecord:
        last = action.first_page + self.point.pages_per_chunk - 1
        return ChunkRecord(
            db_id=self.plan.db_id,
            chunk_id=action.chunk_id,
            generation=self.plan.target_generation,
            blob=None,
            first=action.first_page,
            last=last,
            visible_last=action.first_page - 1,
            origin_db_id=self.plan.db_id,
        )

    # --- deltas -------------------------------------------------------------------------------

    async def _stage_delta(self, action: CreateDelta, target: Path) -> ChunkDeltaRecord:
        base = self._base_of(action)
        spec = PageBlobSpec(
            kind=ContainerKind.DELTA, codec=self.plan.codec, page_size=self.point.page_size,
            identity=self._identity(action), delta_id=action.delta_id,
        )  # fmt: skip
        async with AsyncExitStack() as stack:
            against: OpenPages | None = None
            if action.base_key:
                against = await self.pages.open_layer(base)
                stack.callback(against.close)
            sha256 = base.blob.sha256 if action.base_key else None
            writer = await stack.enter_async_context(self._writer(target, spec, base_sha256=sha256))
            layers = await self._open_layers(action, stack)
            for page_nos in windows(
                BitMap.deserialize(action.pages), page_size=self.point.page_size
            ):
                batch = await self._read_window(page_nos, layers)
                base_pages = await _base_pages(against, page_nos)
                await self._on_disk(
                    target, partial(writer.add_blocking, batch, base_pages=base_pages)
                )
            written = await self._on_disk(target, writer.finish_blocking)
        return self._delta_row(action, written)

    def _base_of(self, action: CreateDelta) -> BaseLayer:
        layers = self.pages.chain(self.point, action.chunk_id).layers
        base = layers[-1] if layers else None
        if (
            not isinstance(base, BaseLayer)
            or base.row.generation != action.base_generation
            or action.base_key not in ("", base.blob.key)
        ):
            raise StalePlan("The base of a planned delta is gone.", chunk_id=action.chunk_id)
        return base

    async def _open_layers(self, action: CreateDelta, stack: AsyncExitStack) -> list[OpenPages]:
        """What a merged delta takes pages over from: the deltas before, newest first."""
        layers: list[OpenPages] = []
        if action.merges:
            for layer in self.pages.chain(self.point, action.chunk_id).layers[:-1]:
                opened = await self.pages.open_layer(layer)
                stack.callback(opened.close)
                layers.append(opened)
        return layers

    async def _read_window(self, page_nos: PageNos, layers: list[OpenPages]) -> PageBatch:
        point = self.point
        window = await read_wal_window(point, page_nos, low_page_count=self.plan.low_page_count)
        left = np.flatnonzero(~window.done)
        for layer in layers:
            held = left[np.isin(page_nos[left], layer.page_nos, assume_unique=True)]
            if len(held):
                window.pages[held] = await layer.read(page_nos[held])
                left = np.setdiff1d(left, held, assume_unique=True)
        if len(left):
            raise StalePlan("A planned page is in no delta.", page_no=int(page_nos[left[0]]))
        return PageBatch(page_nos=page_nos, data=window.data)

    def _delta_row(self, action: CreateDelta, written: PageBlobSummary) -> ChunkDeltaRecord:
        plan = self.plan
        return ChunkDeltaRecord(
            db_id=plan.db_id,
            chunk_id=action.chunk_id,
            generation=plan.target_generation,
            delta_id=action.delta_id,
            blob=BlobRef(
                key=delta_key(
                    tenant=self.scope.tenant,
                    database=self.scope.database,
                    checkpoint_id=plan.checkpoint_id,
                    chunk_id=action.chunk_id,
                    delta_id=action.delta_id,
                    generation=plan.target_generation,
                    sha256_hex=written.sha256.hex(),
                ),
                sha256=written.sha256,
                crc64=written.crc64,
                bytes=written.bytes,
            ),
            base_key=action.base_key,
            pages=action.pages,
            codec=plan.codec,
            directory_offset=written.directory_offset,
            directory_bytes=written.directory_bytes,
            logical_bytes=written.raw_bytes,
            count=len(written.pages),
            origin_db_id=plan.db_id,
        )

    # ---

    def _identity(self, action: PageAction) -> LogIdentity:
        return LogIdentity(
            db_id=self.plan.db_id,
            chunk_id=action.chunk_id,
            generation=self.plan.target_generation,
        )

    def _writer(
        self, target: Path, spec: PageBlobSpec, *, base_sha256: bytes | None = None
    ) -> "_Writer":
        def open_blocking() -> PageBlobWriter:
            return PageBlobWriter(target, spec, base_sha256=base_sha256, threads=self.threads)

        return _Writer(open_blocking, on_disk=lambda step: self._on_disk(target, step))

    async def _on_disk(self, target: Path, step: Callable[[], T]) -> T:
        """In the pool; waited for even when cancelled, since it writes to the file."""

        def run_blocking() -> T:
            with disk_errors(target.parent):
                return step()

        done = await uninterrupted(self.pool.run(run_blocking))
        self.touch()
        return done


class _Writer:
    """A blob's writer as an async context. Who is cancelled while it opens leaves nothing open."""

    def __init__(
        self,
        open_blocking: Callable[[], PageBlobWriter],
        *,
        on_disk: Callable[[Callable[[], PageBlobWriter]], Awaitable[PageBlobWriter]],
    ) -> None:
        self._open_blocking = open_blocking
        self._on_disk = on_disk
        self._writer: PageBlobWriter | None = None

    async def __aenter__(self) -> PageBlobWriter:
        try:
            return await self._on_disk(self._hold_blocking)
        except BaseException:
            await self.__aexit__()
            raise

    async def __aexit__(self, *_: object) -> None:
        if self._writer is not None:
            with suppress(OSError):  # of an unfinished one what is buffered may not fit: rubbish
                self._writer.close()

    def _hold_blocking(self) -> PageBlobWriter:
        self._writer = self._open_blocking()
        return self._writer


async def _base_pages(against: OpenPages | None, page_nos: PageNos) -> dict[int, bytes] | None:
    if against is None:
        return None
    held = page_nos[np.isin(page_nos, against.page_nos, assume_unique=True)]
    if len(held) == 0:
        return {}
    rows = await against.read(held)
    return {page_no: rows[at].tobytes() for at, page_no in enumerate(held.tolist())}
