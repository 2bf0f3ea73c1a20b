"""Opens a log, wherever a copy of it lies, and reads it window by window.

Invariants: I10: bytes leave here only through a `decode` that has checked them. Damage in the hot
cache drops that file and the remote copy is read; damage on the way from the remote store is
fetched once more; what is still wrong is CorruptBlob, and in the WAL CorruptWal. I11: one window
at a time; layouts of chunks are kept up to a limit.
Concurrency: one `load` at a time per log. Cancellation: closing lets go of every descriptor.
Crash: nothing here is written.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

from app.core.base.clock import Clock
from app.core.base.errors import CorruptBlob, CorruptWal
from app.core.base.events import Events
from app.core.base.tasks import BlockingPool
from app.core.formats.damage import Damage
from app.core.reads.byte_source import ByteSource, LocalFile, RangeReads, RemoteBlob
from app.core.reads.log_layout import LayoutCache, LogLayout, Window, chunk_layout, segment_layout
from app.core.reads.read_plan import ReadableSegment
from app.core.stores.manifest.records import BlobRef, ChunkRecord
from app.core.stores.remote.protocol import BlobMissing

REMOTE_READS = 2
"""Of the same bytes, if the first came damaged: a flip on the way is not one at rest."""

T = TypeVar("T")


class CachedBlob(Protocol):
    """A blob's file, open until closed."""

    @property
    def descriptor(self) -> int: ...

    def close(self) -> None: ...


class BlobCache(Protocol):
    async def pin(self, sha256: str, *, expected_bytes: int | None = None) -> CachedBlob | None: ...

    async def drop(self, sha256: str) -> None: ...


class Log(Protocol):
    """An open log. `load` gives what `decode` makes of a window's stored bytes, in the pool;
    `decode` raises Damage for bytes that are not right.
    """

    @property
    def layout(self) -> LogLayout: ...

    async def load(self, window: Window, decode: Callable[[bytes], T]) -> T: ...

    def close(self) -> None: ...


class LogReader:
    def __init__(
        self,
        *,
        remote: Callable[[], RangeReads],
        hot_cache: BlobCache,
        pool: BlockingPool,
        clock: Clock,
        events: Events,
        layout_cache_bytes: int,
    ) -> None:
        self.remote = remote
        self.hot_cache = hot_cache
        self.pool = pool
        self.clock = clock
        self.events = events
        self.layouts = LayoutCache(limit_bytes=layout_cache_bytes)

    async def open_segment(self, segment: ReadableSegment) -> Log:
        """Raises CorruptWal, NotReady."""
        try:
            file = await LocalFile.open(segment.path, tier="wal", pool=self.pool)
        except FileNotFoundError as error:
            raise self._corrupt_wal(segment, "its file is gone", error) from error
        try:
            layout = segment_layout(
                segment.index, first_lsn=segment.first_lsn, last_lsn=segment.durable_last_lsn,
                entries_end=segment.entries_end,
            )  # fmt: skip
        except Damage as error:
            file.close()
            raise self._corrupt_wal(segment, error.reason, error) from error
        return _SegmentLog(self, segment, file, layout)

    async def open_chunk(self, row: ChunkRecord) -> Log:
        """Raises CorruptBlob, RemoteUnavailable."""
        log = _ChunkLog(self, row)
        try:
            await log.open()
        except BaseException:
            log.close()
            raise
        return log

    async def fetch(
        self, source: ByteSource, first: int, length: int, decode: Callable[[bytes], T]
    ) -> T:
        """Raises what reading and `decode` raise."""
        started = self.clock.monotonic()
        result = await self.pool.run(decode, await source.read(first, length))
        self.events.debug(
            "read.served", tier=source.tier, bytes=length, seconds=self.clock.monotonic() - started
        )
        return result

    def corrupt_wal(self, segment: ReadableSegment, error: Damage | OSError) -> CorruptWal:
        return self._corrupt_wal(segment, str(error), error)

    def _corrupt_wal(self, segment: ReadableSegment, reason: str, error: Exception) -> CorruptWal:
        self.events.error(
            "read.damaged", tier="wal", segment_id=segment.segment_id, error=str(error)
        )
        return CorruptWal(
            f"WAL segment {segment.segment_id} is damaged: {reason}.",
            segment_id=segment.segment_id,
            first_lsn=segment.first_lsn,
            last_lsn=segment.durable_last_lsn,
        )


class _SegmentLog:
    def __init__(
        self, reader: LogReader, segment: ReadableSegment, file: LocalFile, layout: LogLayout
    ) -> None:
        self.layout = layout
        self._reader = reader
        self._segment = segment
        self._file = file

    async def load(self, window: Window, decode: Callable[[bytes], T]) -> T:
        try:
            first, length = self.layout.stored_range(window)
            return await self._reader.fetch(self._file, first, length, decode)
        except (Damage, OSError) as error:
            raise self._reader.corrupt_wal(self._segment, error) from error

    def close(self) -> None:
        self._file.close()


class _ChunkLog:
    """A published chunk: the hot cache's file as long as it is good, then the remote object."""

    layout: LogLayout

    def __init__(self, reader: LogReader, row: ChunkRecord) -> None:
        assert row.blob is not None
        self._reader = reader
        self._row = row
        self._blob: BlobRef = row.blob
        self._file: LocalFile | None = None

    async def open(self) -> None:
        reader, blob = self._reader, self._blob
        pinned = await reader.hot_cache.pin(blob.sha256.hex(), expected_bytes=blob.bytes)
        if pinned is not None:
            self._file = LocalFile(
                pinned.descriptor, tier="local", pool=reader.pool, on_close=pinned.close
            )
        layout = reader.layouts.get(self._row)
        if layout is None:
            row = self._row
            layout = await self._fetch(
                row.directory_offset, row.directory_bytes, lambda data: chunk_layout(row, data)
            )
            reader.layouts.put(row, layout)
        self.layout = layout

    async def load(self, window: Window, decode: Callable[[bytes], T]) -> T:
        first, length = self.layout.stored_range(window)
        return await self._fetch(first, length, decode)

    async def _fetch(self, first: int, length: int, decode: Callable[[bytes], T]) -> T:
        reader = self._reader
        if self._file is not None:
            try:
                return await reader.fetch(self._file, first, length, decode)
            except (Damage, OSError) as error:
                self._tell("local", error)
                self.close()
                await reader.hot_cache.drop(self._blob.sha256.hex())
        source = RemoteBlob(reader.remote(), self._blob.key)
        for attempt in range(1, REMOTE_READS + 1):
            try:
                return await reader.fetch(source, first, length, decode)
            except BlobMissing as error:
                self._tell("remote", error)
                raise self._corrupt("The blob is gone from the remote store.") from error
            except (Damage, CorruptBlob) as error:
                self._tell("remote", error)
                if attempt == REMOTE_READS:
                    raise self._corrupt(f"The blob is damaged: {error}.") from error
        raise AssertionError("unreachable")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _tell(self, tier: str, error: Exception) -> None:
        self._reader.events.error(
            "read.damaged", tier=tier, key=self._blob.key, error=f"{type(error).__name__}: {error}"
        )

    def _corrupt(self, detail: str) -> CorruptBlob:
        return CorruptBlob(detail, key=self._blob.key, chunk_id=self._row.chunk_id)
