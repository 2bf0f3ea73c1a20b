"""Reads a generation from the remote store past every cache, as frames.

Invariants: I10: pages and records were checked before they are in a frame. I11: a scan holds some
MiB, whatever it reads: what is read ahead is bounded by bytes, directories by their number of
bytes, and nothing goes into the page cache or the hot cache, nor is looked for there.
Concurrency: reads run ahead of the frame that is being sent, each when the limiter lets it.
Cancellation: closing the frames ends the reads that are under way. Crash: nothing is written.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing

from app.core.base.clock import Clock
from app.core.base.events import Events, Level
from app.core.base.tasks import BlockingPool
from app.core.formats.cold_scan import Frame, FrameType
from app.core.reads.byte_source import RangeReads
from app.core.reads.in_order import in_order
from app.core.reads.log_layout import Window
from app.core.reads.log_reader import CachedBlob, Log, LogReader
from app.core.reads.page_cache import PageCache
from app.core.reads.page_store import LogOf, PageStore
from app.core.reads.read_point import GenerationPins, ReadPoint
from app.core.reads.record_pieces import RecordForm, render_records
from app.core.reads.scan_plan import ChunkScan, PageScan
from app.core.stores.manifest.store import ManifestStore

WINDOW_BYTES = 2 * 1024 * 1024
"""Large, for all of it is wanted: a request costs as much CPU time as half a MiB."""
READ_AHEAD_WINDOWS = 5
READ_AHEAD_BYTES = READ_AHEAD_WINDOWS * WINDOW_BYTES
OPEN_AHEAD = 4
DIRECTORIES_BYTES = 4 * 1024 * 1024
LAYOUTS_BYTES = 1024 * 1024


class NoCache:
    """The hot cache of who must not use it."""

    async def pin(self, sha256: str, *, expected_bytes: int | None = None) -> CachedBlob | None:
        del sha256, expected_bytes
        return None

    async def drop(self, sha256: str) -> None:
        del sha256


class ColdScanReader:
    def __init__(
        self,
        manifest: ManifestStore,
        wal: LogOf,
        *,
        pins: GenerationPins,
        pool: BlockingPool,
        clock: Clock,
        events: Events,
    ) -> None:
        self._manifest = manifest
        self._wal = wal
        self._pins = pins
        self._pool = pool
        self._clock = clock
        self._events = Events(_background(events))

    async def pages(
        self, point: ReadPoint, scan: PageScan, remote: Callable[[], RangeReads]
    ) -> AsyncGenerator[Frame, None]:
        """Raises CorruptBlob, RemoteUnavailable."""
        store = PageStore(
            self._manifest,
            self._wal,
            remote=remote,
            hot_cache=NoCache(),
            cache=PageCache(limit_bytes=0),
            pins=self._pins,
            pool=self._pool,
            clock=self._clock,
            events=self._events,
            window_bytes=WINDOW_BYTES,
            read_ahead_windows=READ_AHEAD_WINDOWS,
            directories_bytes=DIRECTORIES_BYTES,
        )
        per_chunk = point.pages_per_chunk
        async with store, aclosing(
            store.iter_pages(point, scan.first_page, scan.last_page)
        ) as runs:  # fmt: skip
            async for run in runs:
                yield Frame(
                    type=FrameType.PAGES, chunk_id=(run.first - 1) // per_chunk, first=run.first,
                    count=run.count, payload=run.data,
                )  # fmt: skip

    async def records(
        self, scans: Sequence[ChunkScan], remote: Callable[[], RangeReads]
    ) -> AsyncGenerator[Frame, None]:
        """Raises CorruptBlob, RemoteUnavailable."""
        logs = LogReader(
            remote=remote,
            hot_cache=NoCache(),
            pool=self._pool,
            clock=self._clock,
            events=self._events,
            layout_cache_bytes=LAYOUTS_BYTES,
        )

        async def open_chunk(scan: ChunkScan) -> tuple[ChunkScan, Log]:
            return scan, await logs.open_chunk(scan.row)

        async with (
            aclosing(
                in_order(
                    _each(scans), open_chunk, weigh=lambda _: 1, budget=OPEN_AHEAD, name="chunks"
                )
            ) as opened,
            aclosing(_windows(opened)) as windows,
            aclosing(
                in_order(
                    windows,
                    _load,
                    weigh=lambda one: one[1].layout.raw_bytes(one[2]),
                    budget=READ_AHEAD_BYTES,
                    name="windows",
                )
            ) as frames,
        ):
            async for frame in frames:
                yield frame


async def _each(scans: Iterable[ChunkScan]) -> AsyncIterator[ChunkScan]:
    for scan in scans:
        yield scan


async def _windows(
    opened: AsyncIterator[tuple[ChunkScan, Log]],
) -> AsyncGenerator[tuple[ChunkScan, Log, Window], None]:
    """A chunk without a cached file has nothing to be closed."""
    async for scan, log in opened:
        for window in log.layout.windows(scan.first_lsn, scan.last_lsn, target_bytes=WINDOW_BYTES):
            yield scan, log, window


async def _load(part: tuple[ChunkScan, Log, Window]) -> Frame:
    scan, log, window = part
    first, last = max(scan.first_lsn, window.first_lsn), min(scan.last_lsn, window.last_lsn)

    def render(data: bytes) -> bytes:
        return render_records(
            log.layout, window, data,
            first_lsn=scan.first_lsn, last_lsn=scan.last_lsn, form=RecordForm.FRAMED,
        )  # fmt: skip

    return Frame(
        type=FrameType.RECORDS, chunk_id=scan.row.chunk_id, first=first, count=last - first + 1,
        payload=await log.load(window, render),
    )  # fmt: skip


def _background(events: Events) -> Callable[[str, Level, Mapping[str, object]], None]:
    """Damage is told as ever; how long reads took is no measure of foreground reads."""
    tell = {
        "debug": events.debug, "info": events.info,
        "warning": events.warning, "error": events.error,
    }  # fmt: skip

    def sink(name: str, level: Level, fields: Mapping[str, object]) -> None:
        if name not in {"read.served", "page.read"}:
            tell[level](name, **fields)

    return sink
