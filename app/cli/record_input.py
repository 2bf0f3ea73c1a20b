"""Records out of a file or a pipe, in batches that become one append each.

Concurrency: a pipe or a terminal is waited for on the event loop, so that Ctrl-C ends the wait;
a regular file does not keep one waiting. Cancellation: what was not given out is dropped.
"""

import asyncio
import io
import os
import select
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import BinaryIO, Literal

from app.core.base.errors import MalformedRecords, RecordTooLarge
from app.core.formats.record_framing import LengthPrefixedFramer, RecordFramer, SingleRecordFramer

BATCH_BYTES = 8 * 1024 * 1024
READ_BYTES = 256 * 1024
RECORD_BYTES_MAX = 1 << 30
"""No service takes a longer record; more is not held in memory."""


RecordFormat = Literal["ndjson", "records", "single"]

MEDIA_TYPES: dict[RecordFormat, str] = {
    "ndjson": "application/x-ndjson",
    "records": "application/vnd.bop.records",
    "single": "application/vnd.bop.records",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    body: bytes
    media_type: str


async def iter_batches(
    source: BinaryIO, record_format: RecordFormat, *, batch_bytes: int = BATCH_BYTES
) -> AsyncGenerator[Batch, None]:
    """Raises MalformedRecords for input that breaks off inside a record, or holds none."""
    async with aclosing(_bodies(source, record_format, batch_bytes)) as bodies:
        async for body in bodies:
            yield Batch(body=body, media_type=MEDIA_TYPES[record_format])


def _bodies(
    source: BinaryIO, record_format: RecordFormat, batch_bytes: int
) -> AsyncGenerator[bytes, None]:
    match record_format:
        case "ndjson":
            return _line_bodies(source, batch_bytes)
        case "records":
            framer = LengthPrefixedFramer(
                record_bytes_max=RECORD_BYTES_MAX, entry_target_bytes=batch_bytes
            )
            return _framed_bodies(source, framer)
        case "single":
            return _framed_bodies(source, SingleRecordFramer(record_bytes_max=RECORD_BYTES_MAX))


async def _line_bodies(source: BinaryIO, batch_bytes: int) -> AsyncGenerator[bytes, None]:
    """Whole lines: as many as make a batch, or as there are when nothing more waits to be read."""
    lines = LineBatcher(batch_bytes)
    while piece := await _read(source):
        for body in lines.feed(piece, more_waits=_more_waits(source)):
            yield body
    for body in lines.finish():
        yield body


class LineBatcher:
    """Cuts a stream of bytes behind newlines; nothing of a line is looked at. Pure."""

    def __init__(self, batch_bytes: int) -> None:
        self._batch_bytes = batch_bytes
        self._whole: list[bytes] = []
        self._whole_bytes = 0
        self._tail: list[bytes] = []
        self._tail_bytes = 0
        self._seen = False

    def feed(self, piece: bytes, *, more_waits: bool) -> Iterator[bytes]:
        cut = piece.rfind(b"\n") + 1
        if cut:
            self._whole += [*self._tail, piece[:cut]]
            self._whole_bytes += self._tail_bytes + cut
            self._tail, self._tail_bytes = [], 0
        if cut < len(piece):
            self._tail.append(piece[cut:])
            self._tail_bytes += len(piece) - cut
        if self._tail_bytes > RECORD_BYTES_MAX:
            raise RecordTooLarge(f"A line is longer than {RECORD_BYTES_MAX} bytes.")
        if self._whole and (self._whole_bytes >= self._batch_bytes or not more_waits):
            yield self._take()

    def finish(self) -> Iterator[bytes]:
        """The last line needs no newline."""
        self._whole += self._tail
        self._tail = []
        if self._whole:
            yield self._take()
        elif not self._seen:
            raise MalformedRecords("The input holds no record.")

    def _take(self) -> bytes:
        body = b"".join(self._whole)
        self._whole, self._whole_bytes, self._seen = [], 0, True
        return body


async def _framed_bodies(source: BinaryIO, framer: RecordFramer) -> AsyncGenerator[bytes, None]:
    while piece := await _read(source):
        for entry in framer.feed(piece):
            yield entry.payload
    for entry in framer.finish():
        yield entry.payload


async def _read(source: BinaryIO) -> bytes:
    """What there is, at most READ_BYTES of it; nothing at the end."""
    try:
        fd = source.fileno()
    except io.UnsupportedOperation:
        return source.read(READ_BYTES)
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()
    try:
        loop.add_reader(fd, _set, readable)
    except PermissionError:  # a regular file: epoll does not watch it, reading does not wait
        return os.read(fd, READ_BYTES)
    try:
        await readable
    finally:
        loop.remove_reader(fd)
    return os.read(fd, READ_BYTES)


def _set(readable: asyncio.Future[None]) -> None:
    if not readable.done():
        readable.set_result(None)


def _more_waits(source: BinaryIO) -> bool:
    """True if reading on would not have to wait, at the end of the input too."""
    try:
        fd = source.fileno()
    except io.UnsupportedOperation:
        return True
    return bool(select.select([fd], [], [], 0)[0])
