"""Cold scans: a generation, or a part of it, from the remote store, beside everything else.

Invariants: I8: the generation is pinned in the step that reads its rows, until the scan is closed.
I5: only published generations are scanned, and those end on a commit.
Concurrency: a scan belongs to one reader. Cancellation: closing it ends its reads and pins.
Crash: pins are memory only; nothing is written.
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass

from app.core.base.errors import NoGeneration, WrongEngine
from app.core.coordination.bandwidth import Priority, RemoteReadLimiter, ScanReads
from app.core.coordination.flags import require_enabled
from app.core.formats.cold_scan import Frame, FrameType, ScanEnd, ScanStart, note_frame
from app.core.reads.cold_scan import ColdScanReader
from app.core.reads.page_store import PageStore
from app.core.reads.read_point import ReadPoint
from app.core.reads.scan_plan import ScanRange, plan_pages, plan_records
from app.core.services.directory import DatabaseDirectory
from app.core.services.states import Newest, States, StateSelector
from app.core.stores.manifest.records import DatabaseRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.remote.limited import LimitedReads
from app.core.stores.remote.protocol import RemoteStore

EVERYTHING = ScanRange()


@dataclass(frozen=True, slots=True, kw_only=True)
class Throttle:
    bytes_per_second: int | None = None
    """Read from the remote store; None: only the tenant's own limit."""
    priority: Priority = "normal"


class ColdScan:
    """An open scan. Close it, however far it was read."""

    def __init__(
        self,
        start: ScanStart,
        data: Callable[[], AsyncGenerator[Frame, None]] | None,
        stack: AsyncExitStack,
    ) -> None:
        self.start = start
        self._data = data
        self._stack = stack

    async def frames(self) -> AsyncGenerator[Frame, None]:
        """The start, what there is, and the end. Raises CorruptBlob, RemoteUnavailable."""
        yield note_frame(FrameType.START, self.start)
        frames = sent_bytes = chunks = 0
        chunk_id: int | None = None
        if self._data is not None:
            async with aclosing(self._data()) as data:
                async for frame in data:
                    frames += 1
                    sent_bytes += len(frame.payload)
                    chunks += frame.chunk_id != chunk_id
                    chunk_id = frame.chunk_id
                    yield frame
        yield note_frame(FrameType.END, ScanEnd(frames=frames, bytes=sent_bytes, chunks=chunks))

    async def aclose(self) -> None:
        """Again is harmless."""
        await self._stack.aclose()


class ColdScans:
    def __init__(
        self,
        manifest: ManifestStore,
        directory: DatabaseDirectory,
        states: States,
        store: PageStore,
        reader: ColdScanReader,
        limiter: RemoteReadLimiter,
        *,
        remote: Callable[[], RemoteStore],
    ) -> None:
        self._manifest = manifest
        self._directory = directory
        self._states = states
        self._store = store
        self._reader = reader
        self._limiter = limiter
        self._remote = remote

    async def open(
        self,
        tenant: str,
        name: str,
        selector: StateSelector,
        *,
        wanted: ScanRange = EVERYTHING,
        throttle: Throttle | None = None,
    ) -> ColdScan:
        """To be closed by the caller. Without a selector the newest generation. Raises
        DatabaseNotFound, FeatureDisabled, WrongEngine for a range of the other engine,
        NoGeneration, GenerationExpired, NotFound, SnapshotNotFound, LsnTruncated, NotReady.
        """
        database = self._directory.read(tenant, name)
        with self._manifest.read() as view:
            require_enabled(view, tenant, "enable_cold_scan")
        _check_range(database, wanted)
        self._remote()  # raises NotReady before anything is promised
        how = throttle or Throttle()
        async with AsyncExitStack() as stack:
            reads = await stack.enter_async_context(
                self._limiter.scan(
                    tenant, bytes_per_second=how.bytes_per_second, priority=how.priority
                )
            )
            generation = self._generation(database, selector)
            point = stack.enter_context(
                await self._store.point(database.db_id, generation=generation)
            )
            chunks, data = await self._plan(point, wanted, reads)
            start = ScanStart(
                tenant=tenant, database=name, engine=database.engine, generation=generation,
                page_size=database.page_size or None, chunks=chunks,
            )  # fmt: skip
            return ColdScan(start, data, stack.pop_all())

    def _generation(self, database: DatabaseRecord, selector: StateSelector) -> int:
        if not isinstance(selector, Newest):
            return self._states.generation_of(database, selector)
        if database.generation == 0:
            raise NoGeneration(f"Nothing of {database.tenant}/{database.name} is published yet.")
        return database.generation

    async def _plan(
        self, point: ReadPoint, wanted: ScanRange, reads: ScanReads
    ) -> tuple[int, Callable[[], AsyncGenerator[Frame, None]] | None]:
        """How many chunks the range touches, and what reads them."""

        def remote() -> LimitedReads:
            return LimitedReads(self._remote(), reads)

        if point.database.engine == "libsql":
            pages = plan_pages(
                wanted, page_count=point.page_count, pages_per_chunk=point.pages_per_chunk
            )
            if pages is None:
                return 0, None
            return pages.chunks, lambda: self._reader.pages(point, pages, remote)
        db_id, generation = point.database.db_id, point.generation
        chunks = await self._manifest.read_in_thread(
            lambda view: plan_records(wanted, view.chunk_view(db_id, generation))
        )
        return len(chunks), lambda: self._reader.records(chunks, remote)


def _check_range(database: DatabaseRecord, wanted: ScanRange) -> None:
    foreign = wanted.names_lsns if database.engine == "libsql" else wanted.names_pages
    if foreign:
        raise WrongEngine(
            f"{database.tenant}/{database.name} is of the engine {database.engine}: ranges are of "
            f"{'pages' if database.engine == 'libsql' else 'LSNs'}.",
            engine=database.engine,
        )
