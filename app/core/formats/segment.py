"""Byte layout of a WAL segment, which for append_only is also the chunk. All little-endian.

    segment header (64 bytes) · entries · [sparse index · trailer (96 bytes), once sealed]

An entry is an 80-byte header and its payload: whole records, each `u32 length + bytes`. A request
is one entry or several in a row (BEGINS on the first, ENDS on the last) and counts only as a
whole. Within a segment LSNs have no holes; between segments they may. `durable_lsn` is the last
LSN known durable when the entry was written: a damaged entry at or below a later entry's
`durable_lsn` was acknowledged and is not a torn tail.

The sparse index has one point, the entry's first LSN and offset, at least every 64 KiB.
"""

import struct
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum, IntFlag

import numpy as np
import numpy.typing as npt

from app.core.formats.crc64 import crc64
from app.core.formats.damage import Damage

VERSION = 1
SEGMENT_MAGIC = b"BOPWSEG\x01"
ENTRY_MAGIC = b"\xb0PE\x01"
TRAILER_MAGIC = b"BOPWEND\x01"

_SEGMENT = struct.Struct("<8sHBBIQQQQ8xQ")
_ENTRY = struct.Struct("<4sBBHQIIQQ16s16sQ")
_TRAILER = struct.Struct("<8sHHIQQQQQQQQQQ")
_CRC = struct.Struct("<Q")

SEGMENT_HEADER_BYTES = _SEGMENT.size
ENTRY_HEADER_BYTES = _ENTRY.size
TRAILER_BYTES = _TRAILER.size
INDEX_POINT_BYTES = 16
INDEX_STRIDE_BYTES = 64 * 1024
ENTRY_PAYLOAD_BYTES_MAX = 1 << 30
NO_HASH = bytes(16)

assert (SEGMENT_HEADER_BYTES, ENTRY_HEADER_BYTES, TRAILER_BYTES) == (64, 80, 96)

IndexArray = npt.NDArray[np.uint64]


class EngineCode(IntEnum):
    APPEND_ONLY = 1
    LIBSQL = 2


class EntryType(IntEnum):
    RECORDS = 1
    FRAMES = 2


class EntryFlag(IntFlag):
    BEGINS = 1  # first entry of a request
    ENDS = 2  # last entry of a request: all of it becomes visible
    LINE_SAFE = 4  # no record holds a newline
    KEYED = 8  # key_hash and body_hash are set


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentHeader:
    engine: EngineCode
    db_id: int
    segment_id: int
    first_lsn: int
    chunk_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryHeader:
    type: EntryType
    flags: EntryFlag
    first_lsn: int
    count: int
    payload_bytes: int
    durable_lsn: int
    appended_at_us: int
    key_hash: bytes = NO_HASH
    body_hash: bytes = NO_HASH

    @property
    def last_lsn(self) -> int:
        return self.first_lsn + self.count - 1

    @property
    def entry_bytes(self) -> int:
        return ENTRY_HEADER_BYTES + self.payload_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentSummary:
    """A sealed segment's trailer. `entries_end` is where the index begins."""

    db_id: int
    segment_id: int
    first_lsn: int
    last_lsn: int
    entries: int
    entries_end: int
    payload_bytes: int
    index_points: int
    line_safe: bool
    keyed: bool = False  # an entry carries an idempotency key

    @property
    def directory_bytes(self) -> int:
        """Index and trailer: the file's end, and what a reader fetches first."""
        return self.index_points * INDEX_POINT_BYTES + TRAILER_BYTES

    @property
    def segment_bytes(self) -> int:
        return self.entries_end + self.directory_bytes


def pack_segment_header(header: SegmentHeader) -> bytes:
    head = _SEGMENT.pack(
        SEGMENT_MAGIC, VERSION, header.engine, 0, 0,
        header.db_id, header.segment_id, header.first_lsn, header.chunk_bytes, 0,
    )[:-8]  # fmt: skip
    return head + _CRC.pack(crc64(head))


def parse_segment_header(data: bytes | memoryview) -> SegmentHeader:
    """Raises Damage unless `data` begins with a whole, intact segment header."""
    if len(data) < SEGMENT_HEADER_BYTES:
        raise Damage("segment header is cut off", offset=0)
    magic, version, engine, _, _, db_id, segment_id, first_lsn, chunk_bytes, stored = (
        _SEGMENT.unpack_from(data)
    )
    if magic != SEGMENT_MAGIC or version != VERSION:
        raise Damage("not a segment of a known version", offset=0)
    if crc64(data[: SEGMENT_HEADER_BYTES - 8]) != stored:
        raise Damage("segment header fails its checksum", offset=0)
    if engine not in (EngineCode.APPEND_ONLY, EngineCode.LIBSQL):
        raise Damage("segment of an unknown engine", offset=0)
    return SegmentHeader(
        engine=EngineCode(engine), db_id=db_id, segment_id=segment_id,
        first_lsn=first_lsn, chunk_bytes=chunk_bytes,
    )  # fmt: skip


def pack_entry_header(header: EntryHeader, payload: Iterable[bytes | memoryview]) -> bytes:
    """The header, its CRC taken over itself and the payload's pieces in order."""
    head = _ENTRY.pack(
        ENTRY_MAGIC, header.type, header.flags, VERSION, header.first_lsn, header.count,
        header.payload_bytes, header.durable_lsn, header.appended_at_us,
        header.key_hash, header.body_hash, 0,
    )[:-8]  # fmt: skip
    checksum = crc64(head)
    for piece in payload:
        checksum = crc64(piece, checksum)
    return head + _CRC.pack(checksum)


def parse_entry_header(data: bytes | memoryview, *, offset: int) -> tuple[EntryHeader, int]:
    """The header at `offset` in `data` and the CRC it carries; the payload is not looked at.

    Raises Damage where it is cut off or cannot be a header. Fields are only proven right once
    `check_entry` has passed.
    """
    if len(data) - offset < ENTRY_HEADER_BYTES:
        raise Damage("entry header is cut off", offset=offset)
    fields = _ENTRY.unpack_from(data, offset)
    magic, kind, flags, version, first_lsn, count, payload_bytes, durable_lsn = fields[:8]
    appended_at_us, key_hash, body_hash, stored = fields[8:]
    if magic != ENTRY_MAGIC or version != VERSION:
        raise Damage("no entry of a known version", offset=offset)
    if kind not in (EntryType.RECORDS, EntryType.FRAMES) or flags > 15:
        raise Damage("entry of an unknown type", offset=offset)
    if payload_bytes > ENTRY_PAYLOAD_BYTES_MAX or count == 0:
        raise Damage("entry of an impossible size", offset=offset)
    header = EntryHeader(
        type=EntryType(kind), flags=EntryFlag(flags), first_lsn=first_lsn, count=count,
        payload_bytes=payload_bytes, durable_lsn=durable_lsn, appended_at_us=appended_at_us,
        key_hash=key_hash, body_hash=body_hash,
    )  # fmt: skip
    return header, stored


def check_entry(data: bytes | memoryview, *, offset: int) -> EntryHeader:
    """The intact entry at `offset`: header and payload match their CRC. Raises Damage."""
    header, stored = parse_entry_header(data, offset=offset)
    if offset + header.entry_bytes > len(data):
        raise Damage("entry payload is cut off", offset=offset)
    if entry_crc(data, offset=offset, entry_bytes=header.entry_bytes) != stored:
        raise Damage("entry fails its checksum", offset=offset)
    return header


def entry_crc(data: bytes | memoryview, *, offset: int, entry_bytes: int) -> int:
    """What the entry's CRC should be; all of it is in `data`."""
    view = memoryview(data)
    checksum = crc64(view[offset : offset + ENTRY_HEADER_BYTES - 8])
    return crc64(view[offset + ENTRY_HEADER_BYTES : offset + entry_bytes], checksum)


def iter_entries(data: bytes | memoryview) -> Iterator[tuple[int, EntryHeader]]:
    """Offset and header of each entry in `data`, which holds whole entries only. Raises Damage."""
    offset = 0
    while offset < len(data):
        header = check_entry(data, offset=offset)
        yield offset, header
        offset += header.entry_bytes


class IndexBuilder:
    """Collects the sparse index while entries are written or scanned in order."""

    __slots__ = ("_lsns", "_next_offset", "_offsets")

    def __init__(self) -> None:
        self._lsns: list[int] = []
        self._offsets: list[int] = []
        self._next_offset = 0

    @classmethod
    def of(cls, points: IndexArray) -> "IndexBuilder":
        """As it was when it gave `array()`."""
        builder = cls()
        builder._lsns, builder._offsets = points[:, 0].tolist(), points[:, 1].tolist()
        builder.truncate(offset=builder._offsets[-1] + 1 if builder._offsets else 0)
        return builder

    def add(self, *, first_lsn: int, offset: int) -> None:
        """Only an entry that BEGINS a request or continues one may be given; all are points."""
        if offset >= self._next_offset:
            self._lsns.append(first_lsn)
            self._offsets.append(offset)
            self._next_offset = offset + INDEX_STRIDE_BYTES

    def truncate(self, *, offset: int) -> None:
        """Forgets points at or beyond `offset`, after a write was taken back."""
        while self._offsets and self._offsets[-1] >= offset:
            self._offsets.pop()
            self._lsns.pop()
        self._next_offset = self._offsets[-1] + INDEX_STRIDE_BYTES if self._offsets else 0

    def __len__(self) -> int:
        return len(self._offsets)

    def array(self, *, end: int | None = None) -> IndexArray:
        """Shape (points, 2), columns first LSN and file offset, both ascending; of the points
        below the offset `end`, which another thread may be adding to.
        """
        count = len(self._offsets)
        if end is not None:
            count = bisect_left(self._offsets, end, hi=count)
        points = np.empty((count, 2), dtype="<u8")
        points[:, 0] = self._lsns[:count]
        points[:, 1] = self._offsets[:count]
        return points


def pack_directory(summary: SegmentSummary, index: IndexArray) -> bytes:
    """Sparse index and trailer, to be written at `summary.entries_end`."""
    body = np.ascontiguousarray(index, dtype="<u8").tobytes()
    assert len(index) == summary.index_points
    head = _TRAILER.pack(
        TRAILER_MAGIC, VERSION, summary.line_safe | summary.keyed << 1, summary.index_points,
        summary.db_id, summary.segment_id, summary.first_lsn, summary.last_lsn,
        summary.entries, summary.entries_end, summary.payload_bytes, 0, 0, 0,
    )[:-8]  # fmt: skip
    return body + head + _CRC.pack(crc64(head, crc64(body)))


def parse_trailer(data: bytes | memoryview) -> SegmentSummary:
    """The trailer in the last 96 bytes of `data`; its CRC is checked by `parse_directory`."""
    if len(data) < TRAILER_BYTES:
        raise Damage("trailer is cut off")
    fields = _TRAILER.unpack_from(data, len(data) - TRAILER_BYTES)
    magic, version, flags, points, db_id, segment_id, first_lsn, last_lsn = fields[:8]
    entries, entries_end, payload_bytes, _, _, _ = fields[8:]
    if magic != TRAILER_MAGIC or version != VERSION:
        raise Damage("not a sealed segment of a known version")
    return SegmentSummary(
        db_id=db_id, segment_id=segment_id, first_lsn=first_lsn, last_lsn=last_lsn,
        entries=entries, entries_end=entries_end, payload_bytes=payload_bytes,
        index_points=points, line_safe=bool(flags & 1), keyed=bool(flags & 2),
    )  # fmt: skip


def parse_directory(data: bytes | memoryview) -> tuple[SegmentSummary, IndexArray]:
    """Summary and index from the last `directory_bytes` of a sealed segment. Raises Damage."""
    summary = parse_trailer(data)
    start = len(data) - summary.directory_bytes
    if start < 0:
        raise Damage("index is cut off")
    view = memoryview(data)
    stored = _CRC.unpack_from(data, len(data) - 8)[0]
    if crc64(view[start : len(data) - 8]) != stored:
        raise Damage("index and trailer fail their checksum")
    points = np.frombuffer(view[start : len(data) - TRAILER_BYTES], dtype="<u8").reshape(-1, 2)
    return summary, points
