"""Any page of a libsql database, at its newest state or at a generation.

The write-ahead log has the newest pages, then deltas, then the base; the blobs' pages come from
the page cache, the hot cache's files or ranged reads of the remote store.

Invariants: I4, I5, I8: a point pins what it shows. I10: see wal_pages.py and blob_reader.py.
I11: a bulk read holds a few windows of a MiB, whatever it reads, and goes past the page cache:
a scan would push everything else out of it.
Concurrency: any number of reads at once; who wants the same block waits for one fetch.
Cancellation: a read that nobody waits for ends; iterators close what they opened.
Crash: nothing here is written.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Protocol, Self

from app.core.base.clock import Clock
from app.core.base.errors import CorruptWal, DatabaseNotFound
from app.core.base.events import Events
from app.core.base.tasks import BlockingPool, TaskScope
from app.core.formats.sqlite_wal import lock_byte_page
from app.core.reads.blob_reader import SMALL_BLOB_BYTES, BlobReader
from app.core.reads.byte_source import RangeReads
from app.core.reads.delta_chain import DeltaChain, Layer, delta_chain
from app.core.reads.heads import Head, Heads
from app.core.reads.log_reader import BlobCache
from app.core.reads.open_pages import OpenPages
from app.core.reads.page_blobs import DIRECTORIES_BYTES, KeptDirectories, PageBlobs, PageTier
from app.core.reads.page_cache import FetchOptions, PageCache, PageKey
from app.core.reads.page_windows import OpenChunk, windows
from app.core.reads.read_point import GenerationPins, ReadPoint
from app.core.reads.wal_pages import WalPageReader, WalPages
from app.core.retention.selection import missing_generation
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.wal.log import WalLog
from app.core.stores.wal.page_index import CUT_OFF, WalPageIndex

WINDOW_BYTES = 1024 * 1024
READ_AHEAD_WINDOWS = 4
CHAINS_BYTES = 8 * 1024 * 1024
DEFAULT_OPTIONS = FetchOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class PageRead:
    data: bytes
    tier: PageTier
    generation: int


@dataclass(slots=True)
class CachedPage:
    """A page from memory, and the state that it was read at."""

    data: bytes
    generation: int
    lsn: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PageRun:
    """`count` pages from page `first` on, back to back."""

    first: int
    count: int
    data: memoryview


class LogOf(Protocol):
    def log(self, db_id: int) -> WalLog: ...


class PageStore:
    """An async context: leaving it ends what is being fetched."""

    def __init__(
        self,
        manifest: ManifestStore,
        wal: LogOf,
        *,
        remote: Callable[[], RangeReads],
        hot_cache: BlobCache,
        cache: PageCache,
        pins: GenerationPins,
        pool: BlockingPool,
        clock: Clock,
        events: Events,
        window_bytes: int = WINDOW_BYTES,
        read_ahead_windows: int = READ_AHEAD_WINDOWS,
        small_blob_bytes: int = SMALL_BLOB_BYTES,
        directories_bytes: int = DIRECTORIES_BYTES,
        kept_directories: KeptDirectories | None = None,
    ) -> None:
        self._manifest = manifest
        self._wal = wal
        self.cache = cache
        self._pins = pins
        self._pool = pool
        self._clock = clock
        self._events = events
        self._window_bytes = window_bytes
        self._read_ahead_windows = read_ahead_windows
        # Whoever waits for a fetch is told of its error; of one nobody waits for, nobody cares.
        self._scope = TaskScope("pages", on_error=lambda _: None)
        self._blobs = PageBlobs(
            BlobReader(
                remote=remote,
                hot_cache=hot_cache,
                pool=pool,
                clock=clock,
                events=events,
                small_blob_bytes=small_blob_bytes,
            ),
            cache,
            scope=self._scope,
            directories_bytes=directories_bytes,
            kept=kept_directories,
        )
        self._wal_reader = WalPageReader(pool=pool, scope=self._scope, clock=clock, events=events)
        self._chains = _ChainCache(limit_bytes=CHAINS_BYTES)
        self._heads = Heads(manifest)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._scope.aclose()

    # --- points -------------------------------------------------------------------------------

    async def point(
        self, db_id: int, *, generation: int | None = None, lsn: int | None = None
    ) -> ReadPoint:
        """The newest committed state, WAL included, or that at an `lsn` of the WAL which ends a
        transaction, or a generation; to be released by the caller. Raises GenerationExpired,
        NotFound for a generation that never was, CorruptWal.
        """
        if generation is not None:
            return self._generation_point(db_id, generation)
        log = self._wal.log(db_id)
        if log.health == "corrupt_wal":
            raise CorruptWal
        index = await log.frames.read()
        # From here on without an await: rows, pins and commits are of one moment.
        head = self._heads.get(db_id)
        wal = self._newer(head, index, log.durable_lsn if lsn is None else lsn)
        on_release = [self._pins.pin(db_id, head.generation)]
        if wal is not None:
            on_release.append(log.pin(head.lsn + 1, wal.at_lsn).release)
        return ReadPoint(
            database=head.database, generation=head.generation,
            lsn=head.lsn if wal is None else wal.at_lsn,
            page_count=head.page_count if wal is None else wal.page_count,
            published_page_count=head.page_count, wal=wal, _on_release=on_release,
        )  # fmt: skip

    def _newer(self, head: Head, index: WalPageIndex, lsn: int) -> WalPages | None:
        """What the log has up to `lsn` that the newest generation has not; None: nothing."""
        commit = index.commit_at(lsn)
        if commit is None or commit.lsn <= head.lsn:
            return None
        return WalPages(
            index=index, reader=self._wal_reader, base_lsn=head.lsn, at_lsn=commit.lsn,
            page_count=commit.page_count,
        )  # fmt: skip

    def _generation_point(self, db_id: int, generation: int) -> ReadPoint:
        with self._manifest.read() as view:
            database = view.database(db_id)
            record = view.generation(db_id, generation)
        if database is None or database.state == "tombstoned":
            raise DatabaseNotFound(db_id=db_id)
        if record is None:
            raise missing_generation(database, generation)
        return ReadPoint(
            database=database, generation=generation, lsn=record.last_lsn,
            page_count=record.page_count, published_page_count=record.page_count, wal=None,
            _on_release=[self._pins.pin(db_id, generation)],
        )  # fmt: skip

    async def open_layer(self, layer: Layer) -> OpenPages:
        """For reading much of one blob; to be closed by the caller. Raises CorruptBlob,
        RemoteUnavailable.
        """
        return await self._blobs.open(layer)

    # --- one page -----------------------------------------------------------------------------

    def get_page(self, db_id: int, page_no: int) -> CachedPage | None:
        """The page at the newest committed state, if that takes nothing but memory; None says
        nothing about the page: ask `read_page`. Since nothing is awaited, nothing is pinned.
        """
        log = self._wal.log(db_id)
        index = log.frames.index
        if log.health == "corrupt_wal" or index.unread:
            return None
        head = self._heads.get(db_id)
        wal = self._newer(head, index, log.durable_lsn)
        lsn, page_count = (
            (head.lsn, head.page_count) if wal is None else (wal.at_lsn, wal.page_count)
        )
        known_pages = min(page_count, head.page_count)
        if not 1 <= page_no <= known_pages or page_no == lock_byte_page(index.page_size):
            return None
        if wal is not None and wal.locate(page_no) is not None:
            return None
        chunk_id = (page_no - 1) // head.pages_per_chunk
        layer = self._chain(db_id, head.generation, chunk_id).layer_of(page_no)
        if layer is None or (data := self._blobs.get_page(layer, page_no)) is None:
            return None
        return CachedPage(data=data, generation=head.generation, lsn=lsn)

    async def read_page(
        self, point: ReadPoint, page_no: int, options: FetchOptions = DEFAULT_OPTIONS
    ) -> PageRead:
        """A page within the point's page count; of one never written, zeros. Raises CorruptBlob,
        CorruptWal, RemoteUnavailable.
        """
        assert 1 <= page_no <= point.page_count
        data: bytes
        tier: PageTier
        place = point.wal.locate(page_no) if point.wal is not None else None
        if page_no == lock_byte_page(point.page_size) or place is CUT_OFF:
            data, tier = bytes(point.page_size), "wal" if point.wal else "page_cache"
        elif place is not None:
            assert point.wal is not None
            data, tier = await point.wal.read(place), "wal"
        else:
            data, tier = await self._read_published(point, page_no, options)
        return PageRead(data=data, tier=tier, generation=point.generation)

    async def _read_published(
        self, point: ReadPoint, page_no: int, options: FetchOptions
    ) -> tuple[bytes, PageTier]:
        chain = self.chain(point, (page_no - 1) // point.pages_per_chunk)
        layer = chain.layer_of(page_no) if page_no <= point.published_page_count else None
        found = None
        if layer is not None:
            started = self._clock.monotonic()
            found = await self._blobs.read_page(layer, page_no, options)
            if found is not None and found[1] != "page_cache":
                self._events.debug("page.read", seconds=self._clock.monotonic() - started)
        if layer is None or found is None:
            return bytes(point.page_size), "page_cache"
        key = PageKey(layer.blob.sha256, page_no)
        if options.pin and self.cache.pin(key):
            point.on_release(lambda: self.cache.unpin(key))
        return found

    def chain(self, point: ReadPoint, chunk_id: int) -> DeltaChain:
        """The chunk's blobs at the point's generation."""
        return self._chain(point.database.db_id, point.generation, chunk_id)

    def _chain(self, db_id: int, generation: int, chunk_id: int) -> DeltaChain:
        key = (db_id, generation, chunk_id)
        chain = self._chains.get(key)
        if chain is None:
            with self._manifest.read() as view:
                rows = view.chunk_history(db_id, chunk_id)
            chain = delta_chain(chunk_id, rows.bases, rows.deltas, generation=generation)
            self._chains.put(key, chain)
        return chain

    # --- many pages ---------------------------------------------------------------------------

    async def iter_pages(
        self,
        point: ReadPoint,
        first: int,
        last: int,
        *,
        window_bytes: int | None = None,
    ) -> AsyncGenerator[PageRun, None]:
        """The pages [first, last], both included, in runs of at most `window_bytes` (or one page;
        otherwise a MiB), with a few of them read ahead, as many bytes at once in any case. Goes
        past the page cache. Raises what `read_page` does. Close it if it is not read to its end.
        """
        assert first >= 1
        assert last <= point.page_count
        scope = TaskScope("page-runs", on_error=lambda _: None)  # told where a run is awaited
        chunks: OrderedDict[int, OpenChunk] = OrderedDict()
        ahead: deque[tuple[int, asyncio.Task[PageRun]]] = deque()
        window_bytes = window_bytes or self._window_bytes
        ahead_bytes = self._read_ahead_windows * self._window_bytes
        upcoming = windows(point, first, last, window_bytes=window_bytes)

        def read_next() -> None:
            window = next(upcoming, None)
            if window is not None:
                chunk_id, page_no, count = window
                chunk = chunks.get(chunk_id)
                if chunk is None:
                    chunk = chunks[chunk_id] = OpenChunk(self._blobs, self.chain(point, chunk_id))
                run = scope.start(_read_run(point, chunk, page_no, count), name="window")
                ahead.append((chunk_id, run))

        try:
            for _ in range(max(2, ahead_bytes // window_bytes)):
                read_next()
            while ahead:
                chunk_id, run = ahead.popleft()
                result = await run
                while next(iter(chunks)) != chunk_id:  # runs come in order: done with
                    chunks.popitem(last=False)[1].close()
                read_next()
                yield result
        finally:
            await scope.aclose()
            for chunk in chunks.values():
                chunk.close()


class _ChainCache:
    """Chains at a generation never change. Least recently used go first (I11)."""

    def __init__(self, *, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._chains: OrderedDict[tuple[int, int, int], DeltaChain] = OrderedDict()

    def get(self, key: tuple[int, int, int]) -> DeltaChain | None:
        chain = self._chains.get(key)
        if chain is not None:
            self._chains.move_to_end(key)
        return chain

    def put(self, key: tuple[int, int, int], chain: DeltaChain) -> None:
        self._chains[key] = chain
        self._used_bytes += chain.memory_bytes
        while self._used_bytes > self._limit_bytes:
            _, oldest = self._chains.popitem(last=False)
            self._used_bytes -= oldest.memory_bytes


async def _read_run(point: ReadPoint, chunk: OpenChunk, first: int, count: int) -> PageRun:
    pages = await chunk.read(point, first, count)
    return PageRun(first=first, count=count, data=pages.data.cast("B"))
