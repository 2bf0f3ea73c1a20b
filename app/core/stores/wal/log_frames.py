"""What a libsql database's log knows beyond any log: its pages, and where its last request left it.

Concurrency: loop-confined; what is read of files is read on the log's pool and taken over here.
Cancellation: a reading of segments that nobody waits for any more is thrown away, and done again.
Crash: nothing here is durable; all of it is in the entries.
"""

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from app.core.base.errors import CorruptWal
from app.core.base.tasks import BlockingPool
from app.core.formats.damage import Damage
from app.core.formats.frame_run import FrameFooter, parse_footer
from app.core.formats.segment import ENTRY_HEADER_BYTES, EntryFlag, EntryHeader, EntryType
from app.core.stores.wal.disk import Disk
from app.core.stores.wal.page_index import UnreadSegment, WalPageIndex, read_part_blocking
from app.core.stores.wal.page_parts import EntryBatch, FramePlace, PagePart
from app.core.stores.wal.planning import Run
from app.core.stores.wal.requests import FramesPayload, LastRequest
from app.core.stores.wal.scan import SegmentReader
from app.core.stores.wal.segments import Segment
from app.core.stores.wal.writer import Written


class LogFrames:
    def __init__(
        self,
        *,
        page_size: int,
        segments: Sequence[Segment],
        last: LastRequest | None,
        disk: Disk,
        pool: BlockingPool,
    ) -> None:
        self._page_size = page_size
        self._disk = disk
        self._pool = pool
        self._reading = asyncio.Lock()
        self.last = last
        self.index = WalPageIndex(
            page_size=page_size,
            unread=[
                UnreadSegment(
                    segment_id=segment.segment_id, path=segment.path, first_lsn=segment.first_lsn,
                    next_lsn=segment.durable.next_lsn, entries_end=segment.durable.entries_end,
                )
                for segment in segments
                if segment.durable.entries
            ],
        )  # fmt: skip

    def take(self, written: Written, frames: Sequence["WrittenFrames"]) -> None:
        """Entries that became durable, run by run."""
        for (segment, _), run in zip(written, frames, strict=True):
            self.index.add(
                run.entries, segment_id=segment.segment_id, path=segment.path,
                first_lsn=run.first_lsn,
            )  # fmt: skip
            if run.last is not None:
                self.last = run.last

    def remove(self, segment_ids: Collection[int]) -> None:
        self.index.remove(segment_ids)

    async def read(self) -> WalPageIndex:
        """The index, after what it has not seen yet was read. Raises CorruptWal, OSError."""
        if self.index.unread:
            async with self._reading:
                for unread in self.index.unread:
                    try:
                        part = await self._pool.run(self._read_blocking, unread)
                    except FileNotFoundError:
                        if unread in self.index.unread:
                            raise
                    else:
                        self.index.attach(part)
        return self.index

    async def footer_at(self, lsn: int) -> FrameFooter | None:
        """What the request that ends with `lsn`, which the caller has pinned, left; None if none
        in the WAL does so. Raises CorruptWal, OSError.
        """
        if self.last is not None and self.last.last_lsn == lsn:
            return self.last.footer
        place = (await self.read()).place_of(lsn)
        if place is None:
            return None
        return await self._pool.run(self._footer_blocking, place)

    def _read_blocking(self, unread: UnreadSegment) -> PagePart:
        try:
            return read_part_blocking(self._disk, unread, page_size=self._page_size)
        except Damage as damage:
            raise CorruptWal(str(damage), segment_id=unread.segment_id) from damage

    def _footer_blocking(self, place: FramePlace) -> FrameFooter | None:
        fd = self._disk.open(place.path, writable=False)
        try:
            reader = SegmentReader(self._disk, fd)
            end = place.entry_offset + place.entry_bytes
            entry, footer = _footer_of(reader, place.entry_offset, end, self._page_size)
        except Damage as damage:
            raise CorruptWal(str(damage), segment_id=place.segment_id) from damage
        finally:
            self._disk.close(fd)
        return footer if entry.last_lsn == place.lsn else None


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFrames:
    """What a run adds to what is known. Made by the thread that wrote it: an image may have tens of
    thousands of entries.
    """

    first_lsn: int
    entries: EntryBatch
    last: LastRequest | None

    @classmethod
    def of(cls, run: Run) -> "WrittenFrames":
        payloads = [cast("FramesPayload", entry.payload) for entry in run.entries]
        sizes = np.array([payload.payload_bytes for payload in payloads], dtype=np.int64)
        batch = EntryBatch(
            offsets=np.array([entry.offset for entry in run.entries], dtype=np.int64),
            entry_bytes=sizes + ENTRY_HEADER_BYTES,
            counts=np.array([payload.count for payload in payloads], dtype=np.int64),
            page_nos=np.concatenate([payload.page_nos for payload in payloads]),
            commit_sizes=np.concatenate([payload.commit_sizes for payload in payloads]),
        )
        return cls(first_lsn=run.entries[0].first_lsn, entries=batch, last=_last_of(run, payloads))


def _last_of(run: Run, payloads: Sequence[FramesPayload]) -> LastRequest | None:
    for entry, payload in zip(reversed(run.entries), reversed(payloads), strict=True):
        if payload.footer is not None:
            lsn = entry.first_lsn + payload.count - 1
            return LastRequest(last_lsn=lsn, footer=payload.footer)
    return None


def last_request_blocking(
    disk: Disk, segments: Sequence[Segment], *, page_size: int
) -> LastRequest | None:
    """From the last entry of a recovered log, which ends a request. Raises Damage, OSError."""
    if not segments:
        return None
    segment = segments[-1]
    index = segment.durable_index()
    fd = disk.open(segment.path, writable=False)
    try:
        reader = SegmentReader(disk, fd)
        end = segment.durable.entries_end
        start = offset = int(index[-1, 1])
        while offset < end:
            start, offset = offset, offset + reader.entry(offset, end=end).entry_bytes
        entry, footer = _footer_of(reader, start, end, page_size)
        if footer is None:
            raise Damage("the last request is incomplete", offset=start)
        return LastRequest(last_lsn=entry.last_lsn, footer=footer)
    finally:
        disk.close(fd)


def _footer_of(
    reader: SegmentReader, offset: int, end: int, page_size: int
) -> tuple[EntryHeader, FrameFooter | None]:
    entry = reader.entry(offset, end=end)
    if entry.type is not EntryType.FRAMES:
        raise Damage("an entry that holds no frames", offset=offset)
    if not entry.flags & EntryFlag.ENDS:
        return entry, None
    data, place = reader.at(offset + ENTRY_HEADER_BYTES, entry.payload_bytes)
    return entry, parse_footer(data[place : place + entry.payload_bytes], page_size=page_size)
