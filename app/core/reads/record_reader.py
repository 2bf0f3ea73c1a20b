"""Streams records of an append_only database: WAL, hot cache and remote store as one log.

Invariants: I10: no record leaves before its entry was checked; the first piece is read before a
stream is handed out, so most damage is an error and not a broken stream. I11: a stream holds the
piece being sent, the window being read and a page of chunk rows, whatever its range: where the rows
are many, they are gone through once to find the answer's end, and again as it is read. I4: what it
pins stays until it is closed. An answer never crosses a gap.
Concurrency: one window is read ahead while the piece before it is sent. Cancellation: closing a
stream, or dropping out of `open`, joins the read-ahead, closes files and releases the pin.
Crash: nothing here is written.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Protocol, assert_never

from app.core.base.clock import Clock, SystemClock
from app.core.base.errors import CorruptWal, NotReady
from app.core.base.events import Events
from app.core.base.tasks import BlockingPool, TaskScope
from app.core.reads.log_reader import BlobCache, Log, LogReader
from app.core.reads.paged_plan import ChunkPages, PagedPlan
from app.core.reads.read_plan import ChunkSpan, ReadableSegment, Span, WalSpan
from app.core.reads.record_pieces import RecordForm, render_records
from app.core.stores.remote.protocol import RemoteStore

LAYOUT_CACHE_BYTES = 16 * 1024 * 1024
SENT_PIECE_BYTES = 1024 * 1024


class SegmentPin(Protocol):
    """WAL segments that stay where they are until `release`, which may be said again."""

    @property
    def segments(self) -> Sequence[ReadableSegment]: ...

    def release(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordStream:
    """`content` is framed records or lines, in pieces of at most 1 MiB. Close it, however far it
    was read; closing again is harmless.
    """

    first_lsn: int | None
    last_lsn: int | None
    next_lsn: int
    content: AsyncGenerator[bytes, None]
    _pieces: AsyncGenerator[bytes, None]
    _pin: SegmentPin

    async def aclose(self) -> None:
        try:
            await self.content.aclose()
            await self._pieces.aclose()
        finally:
            self._pin.release()


class RecordReader:
    def __init__(
        self,
        *,
        remote: Callable[[], RemoteStore],
        hot_cache: BlobCache,
        pool: BlockingPool,
        events: Events,
        clock: Clock | None = None,
        layout_cache_bytes: int = LAYOUT_CACHE_BYTES,
    ) -> None:
        """`remote` is asked only when a remote copy is needed; it may raise NotReady."""
        self._logs = LogReader(
            remote=remote,
            hot_cache=hot_cache,
            pool=pool,
            clock=clock or SystemClock(),
            events=events,
            layout_cache_bytes=layout_cache_bytes,
        )

    async def open(
        self,
        *,
        chunks: ChunkPages,
        pin: SegmentPin,
        next_lsn: int,
        from_lsn: int,
        to_lsn: int | None,
        limit: int | None,
        as_lines: bool,
        cut: Sequence[tuple[int, int]] = (),
    ) -> RecordStream:
        """A stream, to be closed by the caller. `pin` is released with it, or when this raises.

        `chunks` are the newest generation's and `cut` what truncations took of the WAL; `pin` and
        `next_lsn` are of the same moment. As lines, the whole range is looked through first unless
        it is known to be safe.
        Raises NotLineRecords, CorruptBlob, CorruptWal, RemoteUnavailable.
        """

        def new_plan(first_lsn: int, last_lsn: int | None, limit: int | None) -> PagedPlan:
            return PagedPlan(
                pin.segments,
                from_lsn=first_lsn, to_lsn=last_lsn, limit=limit, next_lsn=next_lsn, cut=cut,
            )  # fmt: skip

        try:
            plan = new_plan(from_lsn, to_lsn, limit)
            kept = await _first_spans(plan, chunks, from_lsn)

            def spans() -> AsyncGenerator[Span, None]:
                if kept is not None:
                    return _listed(kept)
                assert plan.first_lsn is not None
                again = new_plan(plan.first_lsn, plan.last_lsn, None)
                return _planned(again, chunks, plan.first_lsn, last_lsn=plan.last_lsn)

            if as_lines:
                await _exhaust(self._read_ahead(_unsafe(spans()), RecordForm.CHECKED))
            form = RecordForm.LINES if as_lines else RecordForm.FRAMED
            pieces = self._read_ahead(spans(), form)
            first_piece = await anext(pieces, b"")
        except BaseException:
            pin.release()
            raise
        return RecordStream(
            first_lsn=plan.first_lsn,
            last_lsn=plan.last_lsn,
            next_lsn=plan.next_lsn,
            content=_in_pieces(first_piece, pieces),
            _pieces=pieces,
            _pin=pin,
        )

    async def _read_ahead(
        self, spans: AsyncGenerator[Span, None], form: RecordForm
    ) -> AsyncGenerator[bytes, None]:
        """The rendered windows; the next one is being read while one is in the reader's hands."""
        windows = self._windows(spans, form)

        async def read_next() -> bytes | None:
            return await anext(windows, None)

        # An error is raised where the window is awaited; of one nobody waits for, nobody cares.
        scope = TaskScope("read", on_error=lambda _: None)
        try:
            ahead = scope.start(read_next(), name="window")
            while (piece := await ahead) is not None:
                ahead = scope.start(read_next(), name="window")
                yield piece
        finally:
            await scope.aclose()
            await windows.aclose()
            await spans.aclose()

    async def _windows(
        self, spans: AsyncGenerator[Span, None], form: RecordForm
    ) -> AsyncGenerator[bytes, None]:
        async for span in spans:
            at, copies = span.first_lsn, self._copies(span)
            for number, open_copy in enumerate(copies, start=1):
                try:
                    log = await open_copy()
                    try:
                        for window in log.layout.windows(at, span.last_lsn):
                            render = partial(
                                render_records, log.layout, window,
                                first_lsn=at, last_lsn=span.last_lsn, form=form,
                            )  # fmt: skip
                            piece = await log.load(window, render)
                            at = window.last_lsn + 1
                            yield piece
                    finally:
                        log.close()
                    break
                except CorruptWal:
                    if number == len(copies):
                        raise  # else the published copy goes on where this one ended

    def _copies(self, span: Span) -> list[Callable[[], Awaitable[Log]]]:
        """The best first."""
        match span:
            case ChunkSpan(row=row):
                return [partial(self._logs.open_chunk, row)]
            case WalSpan(segment=segment, published=published):
                copies: list[Callable[[], Awaitable[Log]]] = [
                    partial(self._logs.open_segment, segment)
                ]
                if published is not None:
                    copies.append(partial(self._logs.open_chunk, published))
                return copies
            case _:
                assert_never(span)


async def _first_spans(
    plan: PagedPlan, chunks: ChunkPages, from_lsn: int
) -> tuple[Span, ...] | None:
    """Plans to the end. None where the spans come from more than one page: they are not kept."""
    kept: tuple[Span, ...] = ()
    is_whole = True
    async with aclosing(chunks.pages(from_lsn)) as pages:
        async for page in pages:
            spans = plan.add(page)
            is_whole = is_whole and not (kept and spans)
            kept = kept or spans
            if plan.done:
                break
    return kept if is_whole else None


async def _listed(spans: Sequence[Span]) -> AsyncGenerator[Span, None]:
    for span in spans:
        yield span


async def _planned(
    plan: PagedPlan, chunks: ChunkPages, first_lsn: int, *, last_lsn: int | None
) -> AsyncGenerator[Span, None]:
    """As planned before, page by page. Raises NotReady where rows went in spite of their pin, as
    in the end they do of a database that was deleted.
    """
    async with aclosing(chunks.pages(first_lsn)) as pages:
        async for page in pages:
            for span in plan.add(page):
                yield span
            if plan.done:
                break
    if plan.last_lsn != last_lsn:
        raise NotReady("What was to be read went away meanwhile.")


async def _unsafe(spans: AsyncGenerator[Span, None]) -> AsyncGenerator[Span, None]:
    async with aclosing(spans):
        async for span in spans:
            if not span.line_safe:
                yield span


async def _exhaust(pieces: AsyncGenerator[bytes, None]) -> None:
    async for _ in pieces:
        pass


async def _in_pieces(
    first: bytes, following: AsyncGenerator[bytes, None]
) -> AsyncGenerator[bytes, None]:
    piece: bytes | None = first
    while piece is not None:
        if len(piece) <= SENT_PIECE_BYTES:
            if piece:
                yield piece
        else:
            view = memoryview(piece)
            for start in range(0, len(piece), SENT_PIECE_BYTES):
                yield bytes(view[start : start + SENT_PIECE_BYTES])
        piece = await anext(following, None)
