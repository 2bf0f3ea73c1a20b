"""Where in a log's bytes its LSNs lie: pure, for WAL segments and for published chunks alike.

A log is read in windows: runs of index points (of whole blocks, in a container) of some MiB at
most, or one point where a single entry is larger. A window is the unit of reading, of checking and
of repair.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from app.core.formats.codecs import codec_code
from app.core.formats.container import (
    ContainerDirectory,
    ContainerKind,
    parse_container_directory,
    stored_range,
    unpack_blocks,
)
from app.core.formats.damage import Damage
from app.core.formats.segment import SEGMENT_HEADER_BYTES, IndexArray, parse_directory
from app.core.stores.manifest.records import ChunkRecord

WINDOW_BYTES = 1024 * 1024

Numbers = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Index points [point, stop) and the LSNs of the entries there, first and last."""

    point: int
    stop: int
    first_lsn: int
    last_lsn: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLayout:
    """`lsns` and `offsets` are the points: an entry's first LSN, and its place in the segment."""

    first_lsn: int
    last_lsn: int
    lsns: Numbers
    offsets: Numbers
    entries_end: int
    container: ContainerDirectory | None = None

    @property
    def memory_bytes(self) -> int:
        """About what it costs to keep."""
        table = self.container.directory_bytes if self.container is not None else 0
        return 512 + self.lsns.nbytes + self.offsets.nbytes + table

    def stored_range(self, window: Window) -> tuple[int, int]:
        """Offset and length of a window in the file or object."""
        if self.container is not None:
            return stored_range(self.container, window.point, window.stop)
        start = int(self.offsets[window.point])
        return start, self._end(window.stop) - start

    def raw_bytes(self, window: Window) -> int:
        """Of a window's entries, uncompressed."""
        return self._end(window.stop) - int(self.offsets[window.point])

    def runs(self, window: Window, data: bytes) -> Iterator[memoryview]:
        """A window's whole entries, from the bytes of its stored range. Raises Damage."""
        if self.container is None:
            yield memoryview(data)
            return
        skip = SEGMENT_HEADER_BYTES if window.point == 0 else 0
        for raw in unpack_blocks(self.container, window.point, window.stop, data):
            yield memoryview(raw)[skip:]
            skip = 0

    def windows(
        self, first_lsn: int, last_lsn: int, *, target_bytes: int = WINDOW_BYTES
    ) -> Iterator[Window]:
        """The windows that hold [first_lsn, last_lsn], in order."""
        point = max(_count_up_to(self.lsns, first_lsn) - 1, 0)
        end = _count_up_to(self.lsns, last_lsn)
        while point < end:
            limit = int(self.offsets[point]) + target_bytes
            stop = _count_up_to(self.offsets, limit) - 1
            if stop == len(self.offsets) - 1 and self.entries_end <= limit:
                stop += 1
            stop = min(max(stop, point + 1), end)
            yield Window(
                point=point, stop=stop, first_lsn=int(self.lsns[point]),
                last_lsn=int(self.lsns[stop]) - 1 if stop < len(self.lsns) else self.last_lsn,
            )  # fmt: skip
            point = stop

    def _end(self, stop: int) -> int:
        return int(self.offsets[stop]) if stop < len(self.offsets) else self.entries_end


def _count_up_to(ascending: Numbers, value: int) -> int:
    # As uint64: numpy would compare through doubles, which do not hold every LSN.
    return int(np.searchsorted(ascending, np.uint64(value), side="right"))


def segment_layout(
    index: IndexArray, *, first_lsn: int, last_lsn: int, entries_end: int
) -> LogLayout:
    """Of a segment file up to `entries_end`. Raises Damage if the index cannot be right."""
    if len(index) == 0:
        index = np.array([[first_lsn, SEGMENT_HEADER_BYTES]], dtype=np.uint64)
    lsns, offsets = index[:, 0].astype(np.uint64), index[:, 1].astype(np.uint64)
    fits = (
        int(offsets[0]) == SEGMENT_HEADER_BYTES
        and int(offsets[-1]) < entries_end
        and int(lsns[0]) == first_lsn
        and int(lsns[-1]) <= last_lsn
        and bool((offsets[:-1] < offsets[1:]).all())
        and bool((lsns[:-1] < lsns[1:]).all())
    )
    if not fits:
        raise Damage("the index is not of this log")
    return LogLayout(
        first_lsn=first_lsn, last_lsn=last_lsn, lsns=lsns, offsets=offsets, entries_end=entries_end
    )


def chunk_layout(row: ChunkRecord, directory: bytes) -> LogLayout:
    """Of a published chunk, from its blob's last part. Raises Damage unless that is intact and
    the blob is the one the row means: an object in another's place is noticed here.
    """
    owner = row.origin_db_id or row.db_id
    if row.codec == "none":
        summary, index = parse_directory(directory)
        is_it = (
            summary.db_id == owner
            and (summary.first_lsn, summary.last_lsn) == (row.first, row.last)
            and summary.entries_end == row.directory_offset
            and summary.directory_bytes == row.directory_bytes
        )
        if not is_it:
            raise Damage("the blob is another one than its row says")
        return segment_layout(
            index, first_lsn=row.first, last_lsn=row.last, entries_end=summary.entries_end
        )
    container = parse_container_directory(directory)
    header, who = container.header, container.header.identity
    is_it = (
        (header.kind, header.codec) == (ContainerKind.LOG, codec_code(row.codec))
        and (who.db_id, who.chunk_id) == (owner, row.chunk_id)
        # A row may be renewed (a tail truncation, a fork) without its blob.
        and (owner != row.db_id or who.generation <= row.generation)
        and (container.first_key, container.last_key) == (row.first, row.last)
        and container.directory_offset == row.directory_offset
        and header.raw_bytes == row.logical_bytes
    )
    if not is_it:
        raise Damage("the blob is another one than its row says")
    blocks = container.blocks
    index = np.column_stack((blocks["first_key"], blocks["raw_offset"]))[:-1].copy()
    index[:1, 1] = SEGMENT_HEADER_BYTES  # the first block begins with the segment header
    layout = segment_layout(
        index, first_lsn=row.first, last_lsn=row.last, entries_end=int(blocks["raw_offset"][-1])
    )
    return LogLayout(
        first_lsn=layout.first_lsn, last_lsn=layout.last_lsn, lsns=layout.lsns,
        offsets=layout.offsets, entries_end=layout.entries_end, container=container,
    )  # fmt: skip


class LayoutCache:
    """Layouts of published chunks by their blob's SHA-256, least recently used go first (I11)."""

    def __init__(self, *, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._layouts: dict[tuple[bytes, int, int], LogLayout] = {}
        self.used_bytes = 0

    def get(self, row: ChunkRecord) -> LogLayout | None:
        key = _key(row)
        layout = self._layouts.pop(key, None)
        if layout is not None:
            self._layouts[key] = layout  # at the end: the newest
        return layout

    def put(self, row: ChunkRecord, layout: LogLayout) -> None:
        key = _key(row)
        if (old := self._layouts.pop(key, None)) is not None:
            self.used_bytes -= old.memory_bytes
        self._layouts[key] = layout
        self.used_bytes += layout.memory_bytes
        while self.used_bytes > self._limit_bytes:
            oldest = next(iter(self._layouts))
            self.used_bytes -= self._layouts.pop(oldest).memory_bytes


def _key(row: ChunkRecord) -> tuple[bytes, int, int]:
    """A row that means another database's or chunk's blob must check that for itself."""
    assert row.blob is not None
    return row.blob.sha256, row.origin_db_id or row.db_id, row.chunk_id
