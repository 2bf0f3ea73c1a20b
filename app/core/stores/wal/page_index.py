"""Which frame of the WAL is the newest of a page, up to an LSN.

Each segment has parts of its own, which do not change once it is sealed; they go with the segment.
A reader pins the segments it reads, as for records.

A commit that leaves fewer pages than there were cuts off what lies beyond: those pages are gone,
in the WAL and in every generation before it, and are zeros when the database grows over them again
until they are written again (VACUUM, auto_vacuum). Hence three answers to where a page is: a
place, `CUT_OFF`, or None, which says to look into the generation.

Concurrency: loop-confined but for what is handed out, which is immutable. Memory: about 8 bytes a
frame and 20 an entry of the WAL on disk, which is 2 % of it with pages of 512 bytes and less above:
bounded by the WAL budget. Until a database is read after a restart, none.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from app.core.base.errors import InvariantViolation
from app.core.formats.damage import Damage
from app.core.formats.frame_run import frames_of
from app.core.formats.segment import ENTRY_HEADER_BYTES, EntryType
from app.core.formats.sqlite_wal import Words
from app.core.stores.wal.disk import Disk
from app.core.stores.wal.page_parts import (
    Commit,
    EntryBatch,
    FramePlace,
    Lsns,
    PagePart,
    Places,
)
from app.core.stores.wal.scan import SegmentReader

__all__ = ["CUT_OFF", "Commit", "CutOff", "FramePlace", "GatheredPages", "WalPageIndex"]

_BUILD_ENTRIES = 4096


class CutOff(Enum):
    CUT_OFF = "cut off"


CUT_OFF: Final = CutOff.CUT_OFF
"""The page was cut off by a commit and not written since: zeros, where it is within the page count,
whatever an older generation has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatheredPages:
    """One item for each page asked for. Where `lsns` is 0 the WAL has no version: the page is cut
    off, or else the generation's. `segments[segment]` is the file.
    """

    lsns: Lsns
    cut_off: npt.NDArray[np.bool_]
    segment: npt.NDArray[np.int32]
    offsets: Places
    entry_offsets: Places
    entry_bytes: Places
    segments: tuple[tuple[int, Path], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreadSegment:
    """A segment found at open whose entries up to `entries_end` the index has yet to read."""

    segment_id: int
    path: Path
    first_lsn: int
    next_lsn: int
    entries_end: int


class WalPageIndex:
    def __init__(self, *, page_size: int, unread: Sequence[UnreadSegment] = ()) -> None:
        self.page_size = page_size
        self._unread = {one.segment_id: one for one in unread}
        self._parts: list[PagePart] = []  # in LSN order; a segment may have two

    def __repr__(self) -> str:
        unread = f", {len(self._unread)} unread" if self._unread else ""
        return f"<WalPageIndex {len(self)} frames in {len(self._parts)} parts{unread}>"

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self._parts)

    # --- following the log --------------------------------------------------------------------

    @property
    def unread(self) -> tuple[UnreadSegment, ...]:
        """To be read, and given to `attach`, before anything is looked up."""
        return tuple(self._unread.values())

    def attach(self, part: PagePart) -> None:
        """What was read of an unread segment; left out if that has gone meanwhile."""
        if self._unread.pop(part.segment_id, None) is not None:
            self._parts.append(part)
            self._parts.sort(key=lambda one: one.first_lsn)

    def add(self, entries: EntryBatch, *, segment_id: int, path: Path, first_lsn: int) -> None:
        """Entries that have become durable."""
        last = self._parts[-1] if self._parts else None
        if last is None or last.segment_id != segment_id:  # what is unread of it comes by attach
            last = PagePart(
                segment_id=segment_id, path=path, first_lsn=first_lsn, page_size=self.page_size
            )
            self._parts.append(last)
        if last.next_lsn != first_lsn:
            raise InvariantViolation(
                "The page index missed an entry.", expected=last.next_lsn, found=first_lsn
            )
        last.add(entries)

    def remove(self, segment_ids: Collection[int]) -> None:
        """Their files go: nobody has pinned them, nor may from here on."""
        gone = frozenset(segment_ids)
        self._parts = [part for part in self._parts if part.segment_id not in gone]
        for segment_id in gone:
            self._unread.pop(segment_id, None)

    # --- looking up ---------------------------------------------------------------------------

    def lookup(self, page_no: int, *, at_lsn: int) -> FramePlace | Literal[CutOff.CUT_OFF] | None:
        """The page's newest version up to `at_lsn`, which ends a transaction."""
        for part in self._backwards(at_lsn):
            lsn = part.newest_lsn(page_no, at_lsn=at_lsn)
            if part.cuts(page_no, first_lsn=lsn or 0, last_lsn=at_lsn):
                return CUT_OFF
            if lsn is not None:
                return part.place(lsn)
        return None

    def gather(self, page_nos: Words, *, at_lsn: int) -> GatheredPages:
        """Each page's newest version up to `at_lsn`, for reading many at once."""
        count = len(page_nos)
        lsns = np.zeros(count, dtype=np.uint64)
        segment = np.full(count, -1, dtype=np.int32)
        offsets, entry_offsets, entry_bytes = np.zeros((3, count), dtype=np.int64)
        segments: list[tuple[int, Path]] = []
        left = np.arange(count)
        for part in self._backwards(at_lsn):
            if not len(left):
                break
            found = part.newest_lsns(page_nos[left], at_lsn=at_lsn)
            hits = found != 0
            if hits.any():
                into = left[hits]
                lsns[into] = found[hits]
                offsets[into], entry_offsets[into], entry_bytes[into] = part.offsets(found[hits])
                segment[into] = len(segments)
                segments.append((part.segment_id, part.path))
                left = left[~hits]
        cut_off = self._cut_off(page_nos, lsns, first_lsn=0, last_lsn=at_lsn)
        for column in (lsns, offsets, entry_offsets, entry_bytes):
            column[cut_off] = 0
        segment[cut_off] = -1
        return GatheredPages(
            lsns=lsns, cut_off=cut_off, segment=segment, offsets=offsets,
            entry_offsets=entry_offsets, entry_bytes=entry_bytes, segments=tuple(segments),
        )  # fmt: skip

    def newest(self, first_lsn: int, last_lsn: int) -> tuple[Words, Lsns]:
        """The pages written in the range and not cut off since, in page order, and the newest LSN
        of each. Pages above `lowest_page_count` of the range that are not among them are zeros.
        """
        found = [
            part.newest(first_lsn=first_lsn, last_lsn=last_lsn)
            for part in reversed(list(self._backwards(last_lsn)))
        ]
        if not found:
            return np.zeros(0, dtype=np.uint32), np.zeros(0, dtype=np.uint64)
        pages = np.concatenate([pages for pages, _ in found])
        lsns = np.concatenate([lsns for _, lsns in found])
        if len(found) > 1:
            order = np.argsort(pages, kind="stable")  # of one page, the newer part comes later
            pages, lsns = pages[order], lsns[order]
            last = np.ones(len(pages), dtype=np.bool_)
            last[:-1] = pages[1:] != pages[:-1]
            pages, lsns = pages[last], lsns[last]
        kept = ~self._cut_off(pages, lsns, first_lsn=first_lsn, last_lsn=last_lsn)
        return pages[kept], lsns[kept]

    def commit_at(self, lsn: int) -> Commit | None:
        """The newest commit of the WAL up to `lsn`."""
        for part in self._backwards(lsn):
            if (commit := part.commit_at(lsn)) is not None:
                return commit
        return None

    def lowest_page_count(self, first_lsn: int, last_lsn: int) -> int | None:
        """What pages the commits of the range left at the least, where one of them shrank the
        database: any generation's page above that was cut off. None: no such commit. (May also be
        told of a commit that did not shrink it, which cuts off nothing.)
        """
        _, sizes = self._shrinks(first_lsn, last_lsn)
        return int(sizes.min()) if len(sizes) else None

    def place_of(self, lsn: int) -> FramePlace | None:
        """Of the frame with this LSN, if the WAL has it."""
        for part in self._backwards(lsn):
            return part.place(lsn) if lsn < part.next_lsn else None
        return None

    def _backwards(self, at_lsn: int) -> Iterator[PagePart]:
        if self._unread:
            raise InvariantViolation("The page index was not read before it was looked up.")
        for part in reversed(self._parts):
            if part.first_lsn <= at_lsn:
                yield part

    def _shrinks(self, first_lsn: int, last_lsn: int) -> tuple[Lsns, Words]:
        found = [
            part.shrinks(first_lsn=first_lsn, last_lsn=last_lsn)
            for part in reversed(list(self._backwards(last_lsn)))
        ]
        if not found:
            return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.uint32)
        return np.concatenate([one for one, _ in found]), np.concatenate([one for _, one in found])

    def _cut_off(
        self, page_nos: Words, lsns: Lsns, *, first_lsn: int, last_lsn: int
    ) -> npt.NDArray[np.bool_]:
        """Whether a commit from each page's LSN on left the page outside."""
        shrink_lsns, sizes = self._shrinks(first_lsn, last_lsn)
        lowest = np.full(len(sizes) + 1, np.iinfo(np.uint32).max, dtype=np.uint32)
        lowest[:-1] = np.minimum.accumulate(sizes[::-1])[::-1]
        since = np.searchsorted(shrink_lsns, lsns, side="left")
        cut: npt.NDArray[np.bool_] = page_nos > lowest[since]
        return cut


def read_part_blocking(disk: Disk, unread: UnreadSegment, *, page_size: int) -> PagePart:
    """A segment's part, from its entries; each is checked. Raises Damage, OSError."""
    part = PagePart(
        segment_id=unread.segment_id, path=unread.path, first_lsn=unread.first_lsn,
        page_size=page_size,
    )  # fmt: skip
    fd = disk.open(unread.path, writable=False)
    try:
        reader = SegmentReader(disk, fd)
        rows: list[tuple[int, int, int]] = []
        page_nos: list[Words] = []
        commit_sizes: list[Words] = []
        for offset, entry in reader.iter_entries(end=unread.entries_end):
            if entry.type is not EntryType.FRAMES:
                raise Damage("an entry that holds no frames", offset=offset)
            data, place = reader.at(offset + ENTRY_HEADER_BYTES, entry.payload_bytes)
            frames = frames_of(data[place : place + entry.payload_bytes], page_size=page_size)
            if len(frames) != entry.count:
                raise Damage("an entry does not hold the frames it counts", offset=offset)
            rows.append((offset, entry.entry_bytes, entry.count))
            page_nos.append(frames.page_nos)
            commit_sizes.append(frames.commit_sizes)
            if len(rows) == _BUILD_ENTRIES:
                part.add(_batch(rows, page_nos, commit_sizes))
                rows, page_nos, commit_sizes = [], [], []
        if rows:
            part.add(_batch(rows, page_nos, commit_sizes))
    finally:
        disk.close(fd)
    return part


def _batch(
    rows: Sequence[tuple[int, int, int]], page_nos: Sequence[Words], commit_sizes: Sequence[Words]
) -> EntryBatch:
    offsets, entry_bytes, counts = np.array(rows, dtype=np.int64).T
    return EntryBatch(
        offsets=offsets, entry_bytes=entry_bytes, counts=counts,
        page_nos=np.concatenate(page_nos), commit_sizes=np.concatenate(commit_sizes),
    )  # fmt: skip
