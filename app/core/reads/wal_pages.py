"""Pages from the write-ahead log, checked.

A frame is covered by its entry's checksum. Whoever wants all frames of an entry reads it whole,
once, and checks that. The first read of only some of them reads all of it, too, and keeps a
checksum for each of its pages; later reads of its frames read the frame alone and check that.

Invariants: I10: no page leaves unchecked; damage here is CorruptWal, there is no other copy.
I5: nothing above the point's LSN is looked at, nor anything that its generation has newer: of WAL
that is published already, a segment that some reader pins may outlive newer ones.
Concurrency: reads run in the pool, side by side; one at a time checks an entry.
Cancellation: a read in the pool is waited for. Crash: nothing here is written.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from app.core.base.clock import Clock
from app.core.base.errors import CorruptWal
from app.core.base.events import Events
from app.core.base.tasks import BlockingPool, TaskScope, uninterrupted
from app.core.formats.crc64 import crc64
from app.core.formats.damage import Damage
from app.core.formats.segment import ENTRY_HEADER_BYTES, EntryType, parse_entry_header
from app.core.formats.sqlite_wal import FRAME_HEADER_BYTES, frame_bytes
from app.core.reads.byte_source import read_exactly_blocking
from app.core.reads.single_flight import SingleFlight
from app.core.stores.local.disk import want_of_means
from app.core.stores.wal.page_index import CUT_OFF, CutOff, FramePlace, GatheredPages, WalPageIndex

Checksums = npt.NDArray[np.uint64]
PageNos = npt.NDArray[np.uint32]
Offsets = npt.NDArray[np.int64]
Pages = npt.NDArray[np.uint8]
Selection = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.intp]

CHECKSUMS_KEPT_BYTES = 16 * 1024 * 1024
"""8 bytes a frame: of 8 GiB of WAL with pages of 4 KiB."""
GAP_BYTES_MAX = 64 * 1024
"""Frames further apart than this are read apart."""
SPAN_BYTES_MAX = 4 * 1024 * 1024

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EntryPlace:
    """Where an entry of the log lies; its file is never written again up to its end."""

    path: Path
    offset: int
    bytes: int


class WalPageReader:
    """Reads frames of any log. Keeps what it learned of entries, up to a limit (I11)."""

    def __init__(
        self,
        *,
        pool: BlockingPool,
        scope: TaskScope,
        clock: Clock,
        events: Events,
        kept_bytes: int = CHECKSUMS_KEPT_BYTES,
    ) -> None:
        self._pool = pool
        self._clock = clock
        self._events = events
        self._kept_bytes = kept_bytes
        self._checksums: OrderedDict[EntryPlace, Checksums] = OrderedDict()
        self._used_bytes = 0
        self._flights = SingleFlight[EntryPlace, Checksums](scope)

    async def read_frame(self, place: FramePlace) -> bytes:
        """The page in a frame. Raises CorruptWal."""
        page_bytes = place.length - FRAME_HEADER_BYTES
        entry = EntryPlace(place.path, place.entry_offset, place.entry_bytes)
        checksums = await self._load(entry, page_size=page_bytes)
        number = (place.offset - entry.offset - ENTRY_HEADER_BYTES) // place.length
        started = self._clock.monotonic()
        page = await self._run(
            lambda: _read_page_blocking(place, int(checksums[number])), path=place.path
        )
        self._events.debug(
            "read.served", tier="wal", bytes=page_bytes, seconds=self._clock.monotonic() - started
        )
        return page

    async def fill(
        self,
        pages: Pages,
        rows: Rows,
        path: Path,
        *,
        offsets: Offsets,
        entry_offsets: Offsets,
        entry_bytes: Offsets,
    ) -> None:
        """Puts the pages of many frames of one file into `rows` of `pages`, shape (any, page size).
        Raises CorruptWal.
        """
        page_size, started = pages.shape[1], self._clock.monotonic()

        def fill_whole() -> Rows:
            return _read_whole_blocking(
                path, pages, rows,
                offsets=offsets, entry_offsets=entry_offsets, entry_bytes=entry_bytes,
            )  # fmt: skip

        left = await self._run(fill_whole, path=path)
        if len(left):
            entries, first, which = np.unique(
                entry_offsets[left], return_index=True, return_inverse=True
            )
            known = await self._load_many(
                [
                    EntryPlace(path, at, size)
                    for at, size in zip(
                        entries.tolist(), entry_bytes[left][first].tolist(), strict=True
                    )
                ],
                page_size=page_size,
            )
            numbers = (offsets - entry_offsets - ENTRY_HEADER_BYTES) // frame_bytes(page_size)
            begins = np.cumsum([0, *map(len, known)])[:-1]
            expected = np.concatenate(known)[begins[which] + numbers[left]]
            pages[rows[left]] = await self._run(
                lambda: _read_pages_blocking(path, offsets[left], expected, page_size), path=path
            )
        self._events.debug(
            "read.served", tier="wal", bytes=len(rows) * page_size,
            seconds=self._clock.monotonic() - started,
        )  # fmt: skip

    async def _load(self, entry: EntryPlace, *, page_size: int) -> Checksums:
        known = self._checksums.get(entry)
        if known is not None:
            self._checksums.move_to_end(entry)
            return known

        async def check() -> Checksums:
            found = await self._run(
                lambda: _check_entries_blocking([entry], page_size)[0], path=entry.path
            )
            self._keep(entry, found)
            return found

        return await self._flights.run(entry, check)

    async def _load_many(self, entries: Sequence[EntryPlace], *, page_size: int) -> list[Checksums]:
        """Of entries of one file. Those not known are checked in one go: they are many and small,
        and a turn through the pool for each would cost more than reading it.
        """
        found = {entry: self._checksums[entry] for entry in entries if entry in self._checksums}
        unknown = [entry for entry in entries if entry not in found]
        if unknown:
            checked = await self._run(
                lambda: _check_entries_blocking(unknown, page_size), path=unknown[0].path
            )
            for entry, checksums in zip(unknown, checked, strict=True):
                found[entry] = checksums
                self._keep(entry, checksums)
        return [found[entry] for entry in entries]

    def _keep(self, entry: EntryPlace, checksums: Checksums) -> None:
        if entry in self._checksums:  # another reader was quicker
            return
        self._checksums[entry] = checksums
        self._used_bytes += checksums.nbytes + 256
        while self._used_bytes > self._kept_bytes and self._checksums:
            _, oldest = self._checksums.popitem(last=False)
            self._used_bytes -= oldest.nbytes + 256

    async def _run(self, step: Callable[[], T], *, path: Path) -> T:
        try:
            return await uninterrupted(self._pool.run(step))
        except (Damage, OSError) as error:
            if isinstance(error, OSError) and (means := want_of_means(error)) is not None:
                raise means from error
            self._events.error("read.damaged", tier="wal", file=path.name, error=str(error))
            raise CorruptWal(
                f"WAL segment {path.stem} is damaged: {error}.", segment=path.stem
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundPages:
    """A row for each page that was looked for: `newer` ones are frames of the log, `done` are also
    those that were cut off, which are zeros; the others are the generation's.
    """

    places: GatheredPages
    newer: Selection
    done: Selection


@dataclass(frozen=True, slots=True, kw_only=True)
class WalPages:
    """The log's part of a read point: frames with LSNs in (base_lsn, at_lsn]. The segments that
    hold them are pinned as long as the point is.
    """

    index: WalPageIndex
    reader: WalPageReader
    base_lsn: int
    """The last LSN of the point's generation: what the log has up to there, that has newer."""
    at_lsn: int
    page_count: int
    """Of the database at that LSN."""

    def locate(self, page_no: int) -> FramePlace | Literal[CutOff.CUT_OFF] | None:
        """None: look into the generation. CUT_OFF: zeros."""
        place = self.index.lookup(page_no, at_lsn=self.at_lsn)
        if place is None:
            return None
        if place is CUT_OFF:
            return CUT_OFF if page_no > self._lowest_page_count() else None
        return place if place.lsn > self.base_lsn else None

    async def read(self, place: FramePlace) -> bytes:
        """Raises CorruptWal."""
        return await self.reader.read_frame(place)

    def find(self, first_page: int, count: int) -> FoundPages | None:
        """What the log has of the pages [first_page, first_page + count); None: nothing."""
        page_nos = np.arange(first_page, first_page + count, dtype=np.uint32)
        found = self.index.gather(page_nos, at_lsn=self.at_lsn)
        newer = found.lsns > np.uint64(self.base_lsn)
        done = newer
        if found.cut_off.any():
            gone = found.cut_off & (page_nos.astype(np.int64) > self._lowest_page_count())
            done = newer | gone
        return FoundPages(places=found, newer=newer, done=done) if done.any() else None

    async def fill(self, pages: Pages, *, first_page: int) -> Selection:
        """Puts what the log has into `pages`, a row for each page from `first_page` on. Returns
        the rows that are done, those of pages that were cut off included: they stay as they are.
        Raises CorruptWal.
        """
        found = self.find(first_page, len(pages))
        if found is None:
            return np.zeros(len(pages), dtype=np.bool_)
        await self.put(pages, found)
        return found.done

    async def put(self, pages: Pages, found: FoundPages) -> None:
        """Puts the pages that were found into their rows. Raises CorruptWal."""
        places = found.places
        for number, (_, path) in enumerate(places.segments):
            rows = np.flatnonzero(found.newer & (places.segment == number))
            if len(rows):
                await self.reader.fill(
                    pages,
                    rows,
                    path,
                    offsets=places.offsets[rows],
                    entry_offsets=places.entry_offsets[rows],
                    entry_bytes=places.entry_bytes[rows],
                )

    def _lowest_page_count(self) -> int:
        lowest = self.index.lowest_page_count(self.base_lsn + 1, self.at_lsn)
        return np.iinfo(np.int64).max if lowest is None else lowest


def _read_whole_blocking(
    path: Path,
    pages: Pages,
    rows: Rows,
    *,
    offsets: Offsets,
    entry_offsets: Offsets,
    entry_bytes: Offsets,
) -> Rows:
    """Frames of entries of which every frame is wanted go into `rows` of `pages`; returns which of
    the frames are left. Raises Damage, OSError.
    """
    entries, first, which, wanted = np.unique(
        entry_offsets, return_index=True, return_inverse=True, return_counts=True
    )
    sizes = entry_bytes[first]
    frames = (sizes - ENTRY_HEADER_BYTES) // frame_bytes(pages.shape[1])
    whole = (wanted == frames) & (sizes <= SPAN_BYTES_MAX)
    if whole.any():
        of_entry = np.split(np.argsort(offsets), np.cumsum(wanted)[:-1])
        _read_entries_blocking(
            [
                (EntryPlace(path, int(entries[at]), int(sizes[at])), rows[of_entry[at]])
                for at in np.flatnonzero(whole).tolist()
            ],
            pages,
        )
    return np.flatnonzero(~whole[which])


def _read_entries_blocking(wanted: Sequence[tuple[EntryPlace, Rows]], pages: Pages) -> None:
    """Entries of one file, ascending, of which every frame is wanted: each is read once, and its
    own checksum covers all that is taken from it. Its frames go to the given rows of `pages`.
    Raises Damage, OSError.
    """
    page_size = pages.shape[1]
    fd = os.open(wanted[0][0].path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for start, stop in _entry_spans([entry for entry, _ in wanted]):
            begin, last = wanted[start][0].offset, wanted[stop - 1][0]
            data = memoryview(read_exactly_blocking(fd, begin, last.offset + last.bytes - begin))
            for entry, rows in wanted[start:stop]:
                at = entry.offset - begin
                frames = _frames_of(data[at : at + entry.bytes], entry, page_size)
                if (np.diff(rows) == 1).all():  # an image's, or an insert's: in page order
                    pages[int(rows[0]) : int(rows[-1]) + 1] = frames
                else:
                    pages[rows] = frames
    finally:
        os.close(fd)


def _frames_of(data: memoryview, entry: EntryPlace, page_size: int) -> Pages:
    """The pages of an intact entry, a view. Raises Damage."""
    stride = frame_bytes(page_size)
    header, stored = parse_entry_header(data[:ENTRY_HEADER_BYTES], offset=0)
    if header.type is not EntryType.FRAMES or header.entry_bytes != entry.bytes:
        raise Damage("not the entry of frames that was written", offset=entry.offset)
    checksum = crc64(data[: ENTRY_HEADER_BYTES - 8])
    payload = data[ENTRY_HEADER_BYTES:]
    if crc64(payload, checksum) != stored or header.count != len(payload) // stride:
        raise Damage("entry fails its checksum", offset=entry.offset)
    frames = np.frombuffer(payload, dtype=np.uint8, count=header.count * stride)
    return frames.reshape(-1, stride)[:, FRAME_HEADER_BYTES:]


def _entry_spans(entries: Sequence[EntryPlace]) -> Iterator[tuple[int, int]]:
    """Runs [start, stop) of entries that follow each other and are not too much at once."""
    start = 0
    for at in range(1, len(entries) + 1):
        if (
            at == len(entries)
            or entries[at].offset != entries[at - 1].offset + entries[at - 1].bytes
            or entries[at].offset + entries[at].bytes - entries[start].offset > SPAN_BYTES_MAX
        ):
            yield start, at
            start = at


def _check_entries_blocking(entries: Sequence[EntryPlace], page_size: int) -> list[Checksums]:
    """Of entries of one file. Raises Damage, OSError."""
    fd = os.open(entries[0].path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return [_check_entry_blocking(fd, entry, page_size) for entry in entries]
    finally:
        os.close(fd)


def _check_entry_blocking(fd: int, entry: EntryPlace, page_size: int) -> Checksums:
    """A checksum for each page of an entry that is intact. Raises Damage, OSError."""
    stride = frame_bytes(page_size)
    head = read_exactly_blocking(fd, entry.offset, ENTRY_HEADER_BYTES)
    header, stored = parse_entry_header(head, offset=0)
    if header.type is not EntryType.FRAMES or header.entry_bytes != entry.bytes:
        raise Damage("not the entry of frames that was written", offset=entry.offset)
    found: list[int] = []
    checksum = crc64(memoryview(head)[: ENTRY_HEADER_BYTES - 8])
    at, end = entry.offset + ENTRY_HEADER_BYTES, entry.offset + entry.bytes
    step = max(1, SPAN_BYTES_MAX // stride) * stride
    while at < end:
        data = memoryview(read_exactly_blocking(fd, at, min(step, end - at)))
        checksum = crc64(data, checksum)
        found += [
            crc64(data[start + FRAME_HEADER_BYTES : start + stride])
            for start in range(0, len(data) // stride * stride, stride)
        ]
        at += len(data)
    if checksum != stored or len(found) != header.count:
        raise Damage("entry fails its checksum", offset=entry.offset)
    return np.array(found, dtype=np.uint64)


def _read_page_blocking(place: FramePlace, checksum: int) -> bytes:
    """Raises Damage, OSError."""
    start, length = place.offset + FRAME_HEADER_BYTES, place.length - FRAME_HEADER_BYTES
    fd = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        page = read_exactly_blocking(fd, start, length)
    finally:
        os.close(fd)
    if crc64(page) != checksum:
        raise Damage("frame changed after it was checked", offset=place.offset)
    return page


def _read_pages_blocking(
    path: Path, offsets: Offsets, checksums: Checksums, page_size: int
) -> Pages:
    """Frames near one another are read together. Raises Damage, OSError."""
    stride = frame_bytes(page_size)
    order = np.argsort(offsets, kind="stable")
    ascending = offsets[order]
    pages = np.empty((len(offsets), page_size), dtype=np.uint8)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for start, stop in _spans(ascending, stride):
            begin = int(ascending[start])
            length = int(ascending[stop - 1]) + stride - begin
            data = np.frombuffer(read_exactly_blocking(fd, begin, length), dtype=np.uint8)
            within = ascending[start:stop] - begin + FRAME_HEADER_BYTES
            windows = np.lib.stride_tricks.sliding_window_view(data, page_size)
            pages[order[start:stop]] = windows[within]
    finally:
        os.close(fd)
    view = pages.data.cast("B")
    for number, checksum in enumerate(checksums.tolist()):
        if crc64(view[number * page_size : (number + 1) * page_size]) != checksum:
            raise Damage("frame changed after it was checked", offset=int(offsets[number]))
    return pages


def _spans(ascending: Offsets, stride: int) -> list[tuple[int, int]]:
    """Runs [start, stop) of frames that lie close together and are not too much at once."""
    breaks = np.flatnonzero(np.diff(ascending) > stride + GAP_BYTES_MAX) + 1
    spans: list[tuple[int, int]] = []
    for start, stop in zip([0, *breaks.tolist()], [*breaks.tolist(), len(ascending)], strict=True):
        at = start
        while at < stop:
            limit = int(ascending[at]) + SPAN_BYTES_MAX
            end = max(at + 1, int(np.searchsorted(ascending[:stop], limit - stride, "right")))
            spans.append((at, end))
            at = end
    return spans
