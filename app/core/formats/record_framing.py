"""Records on the wire and in the WAL.

Inside (and as `application/vnd.bop.records`) a record is a u32 little-endian length and that many
bytes. A framer takes a request body in pieces, as they arrive, and gives entry payloads of whole
records in that layout; nothing is held but the unfinished tail. The reverse functions turn entry
payloads into what a reader asked for.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from app.core.base.errors import MalformedRecords, RecordTooLarge
from app.core.formats.damage import Damage

LENGTH_BYTES = 4
ENTRY_TARGET_BYTES = 1024 * 1024

_LENGTH = struct.Struct("<I")
_pack_length = _LENGTH.pack
_unpack_length = _LENGTH.unpack_from


@dataclass(frozen=True, slots=True)
class FramedEntry:
    """Whole records, in order. `line_safe`: none of them holds a newline."""

    payload: bytes
    count: int
    line_safe: bool


class RecordFramer(Protocol):
    def feed(self, piece: bytes) -> Iterator[FramedEntry]:
        """Takes the next piece of the body. Raises MalformedRecords, RecordTooLarge."""
        ...

    def finish(self) -> Iterator[FramedEntry]:
        """The body has ended. Raises MalformedRecords if it broke off or held no record."""
        ...


class SingleRecordFramer:
    """`application/octet-stream`: the body is one record. An empty body is one empty record."""

    def __init__(self, *, record_bytes_max: int) -> None:
        self._max = record_bytes_max
        self._pieces: list[bytes] = []
        self._bytes = 0

    def feed(self, piece: bytes) -> Iterator[FramedEntry]:
        self._bytes += len(piece)
        if self._bytes > self._max:
            raise RecordTooLarge(
                f"The record is larger than {self._max} bytes.", max_record_bytes=self._max
            )
        self._pieces.append(piece)
        return iter(())

    def finish(self) -> Iterator[FramedEntry]:
        payload = b"".join((_pack_length(self._bytes), *self._pieces))
        safe = not any(b"\n" in piece for piece in self._pieces)
        self._pieces.clear()
        yield FramedEntry(payload, 1, safe)


class LineFramer:
    """`application/x-ndjson`: each line, without its newline, is a record."""

    def __init__(
        self, *, record_bytes_max: int, entry_target_bytes: int = ENTRY_TARGET_BYTES
    ) -> None:
        self._max = record_bytes_max
        self._target = entry_target_bytes
        self._tail: list[bytes] = []  # the unfinished line's pieces
        self._tail_bytes = 0
        self._ready: list[bytes] = []
        self._ready_bytes = 0
        self._ready_count = 0
        self._seen = False

    def feed(self, piece: bytes) -> Iterator[FramedEntry]:
        lines = piece.split(b"\n")
        self._tail.append(lines[0])
        self._tail_bytes += len(lines[0])
        self._check(self._tail_bytes)
        if len(lines) == 1:
            return
        lines[0] = b"".join(self._tail)
        last = lines.pop()
        self._take(lines)
        self._tail, self._tail_bytes = [last], len(last)
        self._check(self._tail_bytes)
        if self._ready_bytes >= self._target:
            yield self._flush()

    def finish(self) -> Iterator[FramedEntry]:
        if self._tail_bytes:
            self._take([b"".join(self._tail)])
        if not self._seen:
            raise MalformedRecords("The body holds no record.")
        if self._ready:
            yield self._flush()

    def _take(self, lines: list[bytes]) -> None:
        self._seen = True
        lengths = list(map(len, lines))
        self._check(max(lengths))
        framed = b"".join(chain.from_iterable(zip(map(_pack_length, lengths), lines, strict=True)))
        self._ready.append(framed)
        self._ready_bytes += len(framed)
        self._ready_count += len(lines)

    def _flush(self) -> FramedEntry:
        entry = FramedEntry(b"".join(self._ready), self._ready_count, line_safe=True)
        self._ready, self._ready_bytes, self._ready_count = [], 0, 0
        return entry

    def _check(self, record_bytes: int) -> None:
        if record_bytes > self._max:
            raise RecordTooLarge(
                f"A line is longer than {self._max} bytes.", max_record_bytes=self._max
            )


class LengthPrefixedFramer:
    """`application/vnd.bop.records`: stored as it comes, cut at record boundaries."""

    def __init__(
        self, *, record_bytes_max: int, entry_target_bytes: int = ENTRY_TARGET_BYTES
    ) -> None:
        self._max = record_bytes_max
        self._target = entry_target_bytes
        self._pending = bytearray()  # whole records up to _whole, then an unfinished one
        self._whole = 0
        self._count = 0
        self._needed = LENGTH_BYTES  # bytes of _pending at which the next boundary can be known
        self._seen = False

    def feed(self, piece: bytes) -> Iterator[FramedEntry]:
        pending = self._pending
        pending += piece
        if len(pending) < self._needed:
            return
        at, end, limit, count = self._whole, len(pending), self._max, 0
        while end - at >= LENGTH_BYTES:
            length = _unpack_length(pending, at)[0]
            if length > limit:
                raise RecordTooLarge(
                    f"A record of {length} bytes is larger than {limit}.", max_record_bytes=limit
                )
            following = at + LENGTH_BYTES + length
            if following > end:
                self._needed = following
                break
            at = following
            count += 1
        else:
            self._needed = at + LENGTH_BYTES
        self._whole = at
        self._count += count
        if at >= self._target:
            yield self._flush()

    def finish(self) -> Iterator[FramedEntry]:
        if self._whole != len(self._pending):
            raise MalformedRecords(
                "The body breaks off inside a record.", at_byte_of_record=self._needed - self._whole
            )
        if self._count:
            yield self._flush()
        elif not self._seen:
            raise MalformedRecords("The body holds no record.")

    def _flush(self) -> FramedEntry:
        payload = bytes(memoryview(self._pending)[: self._whole])
        del self._pending[: self._whole]
        entry = FramedEntry(payload, self._count, is_line_safe(payload))
        self._needed -= self._whole
        self._whole, self._count, self._seen = 0, 0, True
        return entry


def is_line_safe(payload: bytes) -> bool:
    """True if no record of a length-prefixed payload holds a newline."""
    if b"\n" not in payload:
        return True
    return not any(payload.find(b"\n", start, end) >= 0 for start, end in record_spans(payload))


def record_spans(payload: bytes | memoryview) -> Iterator[tuple[int, int]]:
    """Half-open byte span of each record's content. Raises Damage if the framing is broken."""
    at, end = 0, len(payload)
    while at < end:
        if end - at < LENGTH_BYTES:
            raise Damage("record length is cut off", offset=at)
        start = at + LENGTH_BYTES
        at = start + _unpack_length(payload, at)[0]
        if at > end:
            raise Damage("record is cut off", offset=start)
        yield start, at


def slice_records(payload: bytes | memoryview, *, skip: int, take: int) -> bytes | memoryview:
    """The framed bytes of `take` records after the first `skip`. Raises Damage if too few."""
    at = 0
    end = len(payload)
    begin = 0 if skip == 0 else -1
    for index in range(skip + take):
        if end - at < LENGTH_BYTES:
            raise Damage("fewer records than the entry says", offset=at)
        at += LENGTH_BYTES + _unpack_length(payload, at)[0]
        if index + 1 == skip:
            begin = at
    if at > end:
        raise Damage("record is cut off", offset=at)
    return payload[begin:at]


def to_lines(payload: bytes | memoryview) -> bytes:
    """The records as NDJSON: each followed by a newline. The caller knows them to be line-safe."""
    parts: list[bytes | memoryview] = [payload[start:end] for start, end in record_spans(payload)]
    parts.append(b"")
    return b"\n".join(parts)


def pack_records(records: Iterator[bytes] | list[bytes]) -> bytes:
    """Frames records; for clients, tests and tools."""
    kept = list(records)
    return b"".join(chain.from_iterable((_pack_length(len(one)), one) for one in kept))


def unpack_records(payload: bytes | memoryview) -> list[bytes]:
    return [bytes(payload[start:end]) for start, end in record_spans(payload)]
