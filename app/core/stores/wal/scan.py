"""Reads segment files block by block: entries in order, and what later bytes claim of them.

Memory: one block, or the largest entry that a header announces and the file has room for.
"""

from collections.abc import Iterator

import numpy as np

from app.core.formats.damage import Damage
from app.core.formats.entry_search import possible_entries
from app.core.formats.segment import (
    ENTRY_HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    TRAILER_BYTES,
    EntryHeader,
    IndexArray,
    SegmentHeader,
    SegmentSummary,
    entry_crc,
    parse_directory,
    parse_entry_header,
    parse_segment_header,
    parse_trailer,
)
from app.core.stores.wal.disk import Disk

BLOCK_BYTES = 1024 * 1024
CLAIM_WORK_FACTOR = 64
CLAIM_WORK_BYTES_MAX = 4 * 1024 * 1024 * 1024
CLAIM_CHECK_BYTES = 32 * 1024
"""Hostile payloads may look like headers of entries, large ones or many: this many times the file,
and no more than that, is read in their honour, then the search gives up, on the safe side. Each
look costs about as much as so many bytes."""


class SegmentReader:
    """One segment file, opened for reading."""

    def __init__(self, disk: Disk, fd: int) -> None:
        self._disk = disk
        self._fd = fd
        self.size = disk.size(fd)
        self._block = memoryview(b"")
        self._start = 0

    def at(self, offset: int, length: int) -> tuple[memoryview, int]:
        """A buffer and the place in it where the bytes from `offset` begin. Raises Damage where
        the file is shorter.
        """
        if not (self._start <= offset and offset + length <= self._start + len(self._block)):
            if offset + length > self.size:
                raise Damage("the file ends too early", offset=offset)
            data = self._disk.read(self._fd, max(length, BLOCK_BYTES), offset)
            if len(data) < length:
                raise Damage("the file ends too early", offset=offset)
            self._block, self._start = memoryview(data), offset
        return self._block, offset - self._start

    def header(self) -> SegmentHeader:
        data, place = self.at(0, SEGMENT_HEADER_BYTES)
        return parse_segment_header(data[place : place + SEGMENT_HEADER_BYTES])

    def directory(self) -> tuple[SegmentSummary, IndexArray]:
        """Of a sealed segment, at the end of the file. Raises Damage."""
        summary = parse_trailer(self._tail(TRAILER_BYTES))
        if summary.segment_bytes != self.size:
            raise Damage("the trailer is of a file of another size")
        summary, index = parse_directory(self._tail(summary.directory_bytes))
        return summary, index.copy()

    def rest(self, offset: int, *, length_max: int) -> bytes | None:
        """All bytes from `offset` to the end of the file; None if they are more."""
        if self.size - offset > length_max:
            return None
        return self._disk.read(self._fd, self.size - offset, offset)

    def entry(self, offset: int, *, end: int) -> EntryHeader:
        """The intact entry at `offset`. Raises Damage."""
        data, place = self.at(offset, ENTRY_HEADER_BYTES)
        header, stored = parse_entry_header(data, offset=place)
        if offset + header.entry_bytes > end:
            raise Damage("entry payload is cut off", offset=offset)
        data, place = self.at(offset, header.entry_bytes)
        if entry_crc(data, offset=place, entry_bytes=header.entry_bytes) != stored:
            raise Damage("entry fails its checksum", offset=offset)
        return header

    def iter_entries(self, *, end: int) -> Iterator[tuple[int, EntryHeader]]:
        """Offset and header of each entry up to `end`. Raises Damage at the first that is not
        intact or does not continue the LSNs; what was given before it is good.
        """
        offset = SEGMENT_HEADER_BYTES
        expected = self.header().first_lsn
        while offset < end:
            header = self.entry(offset, end=end)
            if header.first_lsn != expected:
                raise Damage("LSNs are not contiguous", offset=offset)
            yield offset, header
            offset += header.entry_bytes
            expected += header.count

    def claims_durable(self, lsn: int, *, start: int) -> bool:
        """True if an intact entry from `start` on, wherever it lies, says that `lsn` was durable
        when it was written.
        """
        work_bytes = min(CLAIM_WORK_FACTOR * max(self.size, BLOCK_BYTES), CLAIM_WORK_BYTES_MAX)
        block_start = start
        while block_start < self.size:
            length = min(BLOCK_BYTES, self.size - block_start)
            data = self._disk.read(self._fd, length + ENTRY_HEADER_BYTES, block_start)
            places, heads = possible_entries(data, stop=length)
            durable_lsns, ends = heads["durable_lsn"], places + heads["payload_bytes"]
            claims = (
                (durable_lsns >= np.uint64(lsn))
                & (durable_lsns < heads["first_lsn"])
                & (block_start + ends + ENTRY_HEADER_BYTES <= self.size)
            )
            for place, end in zip(places[claims].tolist(), ends[claims].tolist(), strict=True):
                work_bytes -= end - place + CLAIM_CHECK_BYTES
                if work_bytes < 0 or self._is_intact(block_start + place):
                    return True
            block_start += length
        return False

    def _is_intact(self, offset: int) -> bool:
        try:
            self.entry(offset, end=self.size)
        except Damage:
            return False
        return True

    def _tail(self, length: int) -> bytes:
        if length > self.size:
            raise Damage("trailer is cut off")
        data = self._disk.read(self._fd, length, self.size - length)
        if len(data) != length:
            raise Damage("trailer is cut off")
        return data
