"""Where the pages in one stretch of a segment lie. Arrays, so that a frame costs 8 bytes.

A version of a page is one number, `page_no << 32 | LSN - first_lsn`: sorted, all versions of a page
are next to each other, oldest first, and one binary search finds the newest up to an LSN. New
entries make small sorted arrays, merged as they grow (each at least twice as long as the next), so
that an append costs the logarithm of the frames and a lookup looks at few arrays.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from app.core.formats.segment import ENTRY_HEADER_BYTES
from app.core.formats.sqlite_wal import Words, frame_bytes

Keys = npt.NDArray[np.uint64]
Lsns = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]

_LSN_BITS = 32
_LSN_MASK = (1 << _LSN_BITS) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FramePlace:
    """A frame in a segment file: `length` bytes at `offset`, header and page. The entry it is in
    begins at `entry_offset`; its checksum covers the frame.
    """

    segment_id: int
    path: Path
    lsn: int
    offset: int
    length: int
    entry_offset: int
    entry_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """The newest commit up to some LSN: the database has `page_count` pages from there on."""

    lsn: int
    page_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryBatch:
    """Entries in a row: an item each in the first three, a frame each in the last two."""

    offsets: Places
    entry_bytes: Places
    counts: Places
    page_nos: Words
    commit_sizes: Words


N = TypeVar("N", bound=np.generic)


class Column(Generic[N]):
    """An array that grows at its end. What was read from it stays as it was."""

    __slots__ = ("_data", "count")

    def __init__(self, dtype: type[N]) -> None:
        self._data: npt.NDArray[N] = np.empty(16, dtype=dtype)
        self.count = 0

    def extend(self, values: npt.ArrayLike) -> None:
        added = np.asarray(values)
        count = self.count + len(added)
        if count > len(self._data):
            grown = np.empty(max(count, 2 * len(self._data)), dtype=self._data.dtype)
            grown[: self.count] = self._data[: self.count]
            self._data = grown
        self._data[self.count : count] = added
        self.count = count

    @property
    def values(self) -> npt.NDArray[N]:
        return self._data[: self.count]

    @property
    def bytes(self) -> int:
        return self._data.nbytes


class PagePart:
    """Entries in a row of one segment: those found at open, or those written since."""

    def __init__(self, *, segment_id: int, path: Path, first_lsn: int, page_size: int) -> None:
        self.segment_id = segment_id
        self.path = path
        self.first_lsn = first_lsn
        self.next_lsn = first_lsn
        self._page_size = page_size
        self._levels: list[Keys] = []
        self._entry_lsns = Column(np.uint32)  # relative to first_lsn, as everywhere here
        self._entry_offsets = Column(np.int64)
        self._entry_bytes = Column(np.int64)
        self._commit_lsns = Column(np.uint32)
        self._commit_sizes = Column(np.uint32)
        self._shrink_lsns = Column(np.uint32)
        self._shrink_sizes = Column(np.uint32)

    def __len__(self) -> int:
        return self.next_lsn - self.first_lsn

    def __repr__(self) -> str:
        return f"<PagePart {self.segment_id} [{self.first_lsn}, {self.next_lsn})>"

    @property
    def bytes(self) -> int:
        columns = (
            self._entry_lsns, self._entry_offsets, self._entry_bytes, self._commit_lsns,
            self._commit_sizes, self._shrink_lsns, self._shrink_sizes,
        )  # fmt: skip
        return sum(level.nbytes for level in self._levels) + sum(one.bytes for one in columns)

    # --- adding -------------------------------------------------------------------------------

    def add(self, entries: "EntryBatch") -> None:
        """The next entries, with the numbers of their frames' pages."""
        start = self.next_lsn - self.first_lsn
        page_nos, commit_sizes = entries.page_nos, entries.commit_sizes
        count = len(page_nos)
        lsns = np.arange(start, start + count, dtype=np.uint64)
        self._levels.append(np.sort((page_nos.astype(np.uint64) << np.uint64(_LSN_BITS)) | lsns))
        self._merge()
        ends = np.cumsum(entries.counts)
        assert ends[-1] == count
        self._entry_lsns.extend(start + ends - entries.counts)
        self._entry_offsets.extend(entries.offsets)
        self._entry_bytes.extend(entries.entry_bytes)
        commits = np.flatnonzero(commit_sizes)
        if len(commits):
            self._add_commits(start + commits, commit_sizes[commits], page_nos[commits])
        self.next_lsn += count

    def _merge(self) -> None:
        levels = self._levels
        while len(levels) > 1 and 2 * len(levels[-1]) > len(levels[-2]):
            last = levels.pop()
            merged = np.concatenate((levels[-1], last))
            merged.sort(kind="stable")  # two sorted runs: a merge
            levels[-1] = merged

    def _add_commits(self, lsns: npt.NDArray[np.intp], sizes: Words, page_nos: Words) -> None:
        """A commit can hide a page only if it left fewer pages than there were before it, if that
        is not known, or if its own page lies outside.
        """
        before = np.empty(len(sizes), dtype=np.int64)
        before[1:] = sizes[:-1]
        known = self._commit_sizes.count
        before[0] = self._commit_sizes.values[-1] if known else np.iinfo(np.int64).max
        shrinks = (sizes < before) | (page_nos > sizes)
        self._commit_lsns.extend(lsns)
        self._commit_sizes.extend(sizes)
        self._shrink_lsns.extend(lsns[shrinks])
        self._shrink_sizes.extend(sizes[shrinks])

    # --- looking up ---------------------------------------------------------------------------

    def newest_lsn(self, page_no: int, *, at_lsn: int) -> int | None:
        """Of the page's versions up to `at_lsn`."""
        relative = min(at_lsn, self.next_lsn - 1) - self.first_lsn
        if relative < 0:
            return None
        limit = np.uint64(page_no << _LSN_BITS | relative)
        newest = -1
        for level in self._levels:
            place = int(np.searchsorted(level, limit, side="right")) - 1
            if place >= 0:
                key = int(level[place])
                if key >> _LSN_BITS == page_no:
                    newest = max(newest, key & _LSN_MASK)
        return None if newest < 0 else self.first_lsn + newest

    def newest_lsns(self, page_nos: Words, *, at_lsn: int) -> Lsns:
        """For each page its newest LSN up to `at_lsn`, 0 where there is none. Pages ascend."""
        found = np.zeros(len(page_nos), dtype=np.uint64)
        relative = min(at_lsn, self.next_lsn - 1) - self.first_lsn
        if relative < 0:
            return found
        pages = page_nos.astype(np.uint64)
        limits = pages << np.uint64(_LSN_BITS) | np.uint64(relative)
        for level in self._levels:
            if level[0] > limits[-1] or level[-1] < pages[0] << np.uint64(_LSN_BITS):
                continue  # of no page between the first and the last
            places = np.searchsorted(level, limits, side="right").astype(np.int64) - 1
            keys = level[np.maximum(places, 0)]
            hits = (places >= 0) & (keys >> np.uint64(_LSN_BITS) == pages)
            lsns = (keys & np.uint64(_LSN_MASK)) + np.uint64(self.first_lsn)
            np.maximum(found, np.where(hits, lsns, np.uint64(0)), out=found)
        return found

    def newest(self, *, first_lsn: int, last_lsn: int) -> tuple[Words, Lsns]:
        """The pages with versions in the range, in page order, and the newest LSN of each."""
        start, stop = first_lsn - self.first_lsn, last_lsn - self.first_lsn
        if start >= len(self) or stop < 0 or not self._levels:
            return np.zeros(0, dtype=np.uint32), np.zeros(0, dtype=np.uint64)
        keys = self._levels[0] if len(self._levels) == 1 else np.sort(np.concatenate(self._levels))
        if start > 0 or stop < len(self) - 1:
            lsns = keys & np.uint64(_LSN_MASK)
            keys = keys[(lsns >= max(start, 0)) & (lsns <= stop)]
        pages = (keys >> np.uint64(_LSN_BITS)).astype(np.uint32)
        last_of_page = np.ones(len(pages), dtype=np.bool_)
        last_of_page[:-1] = pages[1:] != pages[:-1]
        lsns = (keys[last_of_page] & np.uint64(_LSN_MASK)) + np.uint64(self.first_lsn)
        return pages[last_of_page], lsns

    def place(self, lsn: int) -> FramePlace:
        """Of a frame of this part."""
        offsets, entries, sizes = self.offsets(np.array([lsn], dtype=np.uint64))
        return FramePlace(
            segment_id=self.segment_id, path=self.path, lsn=lsn, offset=int(offsets[0]),
            length=frame_bytes(self._page_size), entry_offset=int(entries[0]),
            entry_bytes=int(sizes[0]),
        )  # fmt: skip

    def offsets(self, lsns: Lsns) -> tuple[Places, Places, Places]:
        """Of frames of this part: where each begins, where its entry does, and the entry's size."""
        relative = (lsns - np.uint64(self.first_lsn)).astype(np.uint32)
        starts = self._entry_lsns.values
        entries = np.searchsorted(starts, relative, side="right") - 1
        begins = self._entry_offsets.values[entries]
        within = (relative - starts[entries]).astype(np.int64) * frame_bytes(self._page_size)
        return begins + ENTRY_HEADER_BYTES + within, begins, self._entry_bytes.values[entries]

    # --- commits ------------------------------------------------------------------------------

    def commit_at(self, lsn: int) -> Commit | None:
        """The newest in this part up to `lsn`."""
        place = _rank(self._commit_lsns.values, lsn + 1 - self.first_lsn) - 1
        if place < 0:
            return None
        return Commit(
            lsn=self.first_lsn + int(self._commit_lsns.values[place]),
            page_count=int(self._commit_sizes.values[place]),
        )

    def shrinks(self, *, first_lsn: int, last_lsn: int) -> tuple[Lsns, Words]:
        """LSNs and sizes of the commits in the range that may hide pages, oldest first."""
        lsns, sizes = self._shrink_lsns.values, self._shrink_sizes.values
        start = _rank(lsns, first_lsn - self.first_lsn)
        stop = _rank(lsns, last_lsn + 1 - self.first_lsn)
        return lsns[start:stop].astype(np.uint64) + np.uint64(self.first_lsn), sizes[start:stop]

    def cuts(self, page_no: int, *, first_lsn: int, last_lsn: int) -> bool:
        """Whether a commit in the range left the page outside the database."""
        if not self._shrink_lsns.count:
            return False
        _, sizes = self.shrinks(first_lsn=first_lsn, last_lsn=last_lsn)
        return bool(len(sizes)) and int(sizes.min()) < page_no


def _rank(values: Words, limit: int) -> int:
    """How many of the ascending `values` lie below `limit`. (An int beside uint32 would make
    numpy copy them all.)
    """
    if limit <= 0:
        return 0
    if limit > _LSN_MASK:
        return len(values)
    return int(np.searchsorted(values, np.uint32(limit), side="left"))
