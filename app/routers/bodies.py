"""Request bodies: read in pieces, within limits, into what a service takes.

Invariants: I11: all record bodies together hold no more than the memory budget; what does not
fit goes to an unlinked file as it came, and is framed from there in a bounded number of threads.
I13: nothing of a refused, broken or abandoned body stays: memory is given back and the file has
no name.

Concurrency: the budget is loop-confined; a slow client holds up nobody, because nothing is locked
while its body arrives. Cancellation: leaving `RecordBody` gives back memory and lets the file go.
Crash: an unlinked file goes with the process.
"""

import asyncio
import errno
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVarTuple

from app.core.base.clock import Clock
from app.core.base.errors import BodyTooLarge, DiskFull, InvalidRequest, UnsupportedMediaType
from app.core.base.tasks import BlockingPool
from app.core.formats.record_framing import (
    LENGTH_BYTES,
    FramedEntry,
    LengthPrefixedFramer,
    LineFramer,
    RecordFramer,
    SingleRecordFramer,
)
from app.routers.exchange import ClientGone, Exchange

Ts = TypeVarTuple("Ts")

OCTETS = "application/octet-stream"
LINES = "application/x-ndjson"
RECORDS = "application/vnd.bop.records"
RATE_GRACE_SECONDS = 60.0
SPOOL_READ_BYTES = 256 * 1024
FRAMING_THREADS = 2

_AS_IT_IS = frozenset({None, b"", b"identity"})

_FRAMERS: dict[str, Callable[[int], RecordFramer]] = {
    OCTETS: lambda limit: SingleRecordFramer(record_bytes_max=limit),
    LINES: lambda limit: LineFramer(record_bytes_max=limit),
    RECORDS: lambda limit: LengthPrefixedFramer(record_bytes_max=limit),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyLimits:
    bytes_max: int
    limit_name: str
    """The setting that says so, as it is told to the client."""
    idle_timeout_seconds: float
    bytes_per_second_min: int


class BodyReader:
    """The pieces of one body, refused as soon as a limit is passed."""

    __slots__ = ("_began", "_clock", "_exchange", "_limits")

    def __init__(self, exchange: Exchange, limits: BodyLimits, *, clock: Clock) -> None:
        self._exchange = exchange
        self._limits = limits
        self._clock = clock
        self._began = clock.monotonic()
        if exchange.body_encoding not in _AS_IT_IS:
            raise UnsupportedMediaType("A body comes as it is, without a Content-Encoding.")
        if (exchange.body_declared or 0) > limits.bytes_max:
            raise self._too_large()

    async def read_piece(self) -> bytes | None:
        """The next piece, which may be empty; None after the last. Raises BodyTooLarge,
        InvalidRequest for a body that is too slow, ClientGone.
        """
        exchange, limits = self._exchange, self._limits
        if exchange.body_ended:
            return None
        try:
            async with asyncio.timeout(limits.idle_timeout_seconds):
                message = await exchange.receive()
        except TimeoutError as error:
            raise InvalidRequest(
                f"Nothing of the body arrived for {limits.idle_timeout_seconds:g} seconds.",
                body_idle_timeout_seconds=limits.idle_timeout_seconds,
                errors=[{"loc": ["body"], "msg": "Nothing arrived", "type": "timeout"}],
            ) from error
        if message["type"] != "http.request":
            raise ClientGone
        if exchange.body_received > limits.bytes_max:
            raise self._too_large()
        if not exchange.body_ended:
            self._check_rate()
        piece: bytes = message.get("body", b"")
        return piece

    async def read_whole(self) -> bytes:
        pieces: list[bytes] = []
        while (piece := await self.read_piece()) is not None:
            pieces.append(piece)
        return b"".join(pieces)

    def _check_rate(self) -> None:
        seconds = self._clock.monotonic() - self._began
        least = self._limits.bytes_per_second_min
        if seconds > RATE_GRACE_SECONDS and self._exchange.body_received < least * seconds:
            raise InvalidRequest(
                f"The body comes slower than {least} bytes a second.",
                body_bytes_per_second_min=least,
                errors=[{"loc": ["body"], "msg": "Too slow", "type": "timeout"}],
            )

    def _too_large(self) -> BodyTooLarge:
        limits = self._limits
        return BodyTooLarge(
            f"The body is larger than {limits.bytes_max} bytes.",
            **{limits.limit_name: limits.bytes_max},
        )


class BodyMemory:
    """The budget of memory that all bodies share."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def try_reserve(self, count: int) -> bool:
        if self._used_bytes + count > self._limit_bytes:
            return False
        self._used_bytes += count
        return True

    def release(self, count: int) -> None:
        self._used_bytes -= count
        assert self._used_bytes >= 0, "more body memory released than reserved"


class MemoryEntry:
    """An entry's payload, held in memory."""

    __slots__ = ("_payload", "count", "line_safe", "payload_bytes")

    def __init__(self, framed: FramedEntry) -> None:
        self._payload = framed.payload
        self.count = framed.count
        self.line_safe = framed.line_safe
        self.payload_bytes = len(framed.payload)

    def load_blocking(self) -> bytes:
        return self._payload


class SpoolFile:
    """A file without a name. It is closed when the last one that reads or writes it lets go: a
    thread may still be at it when the request that it belongs to was cancelled.
    """

    def __init__(self, fd: int, *, close: Callable[[int], None]) -> None:
        self.fd = fd
        weakref.finalize(self, close, fd)


class SpooledEntry:
    """An entry's payload in the spool file of its body."""

    __slots__ = ("_file", "_offset", "count", "line_safe", "payload_bytes")

    def __init__(self, framed: FramedEntry, *, file: SpoolFile, offset: int) -> None:
        self._file = file
        self._offset = offset
        self.count = framed.count
        self.line_safe = framed.line_safe
        self.payload_bytes = len(framed.payload)

    def load_blocking(self) -> bytes:
        payload = os.pread(self._file.fd, self.payload_bytes, self._offset)
        if len(payload) != self.payload_bytes:
            raise OSError(errno.EIO, "the spool file is shorter than what was written to it")
        return payload


class Spool:
    """Makes files without a name, and the threads that read and write them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pool = BlockingPool("spool", threads=4)
        self._framing = asyncio.Semaphore(FRAMING_THREADS)

    def close_blocking(self) -> None:
        self._pool.close_blocking()

    async def open(self) -> SpoolFile:
        return await self._pool.run(self._open_blocking)

    async def append(self, file: SpoolFile, piece: bytes | bytearray) -> None:
        await self.begin_append(file, piece)

    def begin_append(self, file: SpoolFile, piece: bytes | bytearray) -> asyncio.Future[None]:
        """The write goes on, whether somebody waits for it or not, and what becomes of it is told
        to who does. Its result raises DiskFull.
        """
        return self.begin(_write_blocking, file, piece)

    def begin(self, function: Callable[[*Ts], None], *args: *Ts) -> asyncio.Future[None]:
        """Runs in the threads that write bodies; as `begin_append` otherwise."""
        step = self._pool.begin(function, *args)
        step.add_done_callback(_seen)
        return step

    async def frame(
        self, raw: SpoolFile, framed: SpoolFile, framer: RecordFramer
    ) -> list[SpooledEntry]:
        """Frames what is in `raw` into `framed`. As many at once as there are framing threads, so
        that long records in the making are bounded too.
        """
        async with self._framing:
            return await self._pool.run(_frame_blocking, raw, framed, framer)

    def _open_blocking(self) -> SpoolFile:
        self._directory.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(dir=self._directory)
        Path(name).unlink()
        return SpoolFile(fd, close=self._close)

    def _close(self, fd: int) -> None:
        """Not by whoever happens to let go last: with two GiB in it that takes half a second."""
        try:
            self._pool.submit(os.close, fd)
        except RuntimeError:  # the pool is closed
            os.close(fd)


def _seen(write: asyncio.Future[None]) -> None:
    """Nobody may be left to be told."""
    if not write.cancelled():
        write.exception()


def _write_blocking(file: SpoolFile, piece: bytes | bytearray) -> None:
    view = memoryview(piece)
    try:
        while view:
            view = view[os.write(file.fd, view) :]
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise DiskFull("There is no room to spool the body.") from error
        raise


def _frame_blocking(raw: SpoolFile, framed: SpoolFile, framer: RecordFramer) -> list[SpooledEntry]:
    entries: list[SpooledEntry] = []
    written = 0

    def keep(found: Iterable[FramedEntry]) -> None:
        nonlocal written
        for one in found:
            _write_blocking(framed, one.payload)
            entries.append(SpooledEntry(one, file=framed, offset=written))
            written += len(one.payload)

    at = 0
    while piece := os.pread(raw.fd, SPOOL_READ_BYTES, at):
        at += len(piece)
        keep(framer.feed(piece))
    keep(framer.finish())
    return entries


class RecordBody:
    """One append's body: `async with`, `read`, then `entries` until the block is left."""

    def __init__(
        self,
        reader: BodyReader,
        framer: RecordFramer,
        *,
        memory: BodyMemory,
        spool: Spool,
        hashed: bool,
    ) -> None:
        self._reader = reader
        self._framer = framer
        self._memory = memory
        self._spool = spool
        self._digest = blake2b(digest_size=16) if hashed else None
        self._reserved_bytes = 0
        self._files: list[SpoolFile] = []
        self._entries: list[MemoryEntry | SpooledEntry] = []

    @property
    def entries(self) -> Sequence[MemoryEntry | SpooledEntry]:
        return self._entries

    @property
    def body_hash(self) -> bytes | None:
        """BLAKE2b-128 of the body as it came; only where it was asked for."""
        return None if self._digest is None else self._digest.digest()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._entries = []
        self._memory.release(self._reserved_bytes)
        self._reserved_bytes = 0
        self._files = []

    async def read(self) -> None:
        """Raises BodyTooLarge, RecordTooLarge, MalformedRecords, InvalidRequest, DiskFull,
        ClientGone.
        """
        while (piece := await self._reader.read_piece()) is not None:
            if self._digest is not None:
                self._digest.update(piece)
            held_bytes = self._held_bytes(piece)
            if not self._memory.try_reserve(held_bytes):
                await self._read_to_file(piece)
                return
            self._reserved_bytes += held_bytes
            self._keep(self._framer.feed(piece))
        self._keep(self._framer.finish())

    def _held_bytes(self, piece: bytes) -> int:
        """What the piece takes once framed: a line's newline becomes a length of four bytes."""
        lines = piece.count(b"\n") if isinstance(self._framer, LineFramer) else 0
        return len(piece) + LENGTH_BYTES * lines

    def _keep(self, found: Iterable[FramedEntry]) -> None:
        self._entries.extend(map(MemoryEntry, found))

    async def _read_to_file(self, first: bytes) -> None:
        """The rest of the body, from the piece that memory had no room for."""
        raw = await self._open_file()
        piece: bytes | None = first
        while piece is not None:
            await self._spool.append(raw, piece)
            piece = await self._reader.read_piece()
            if piece is not None and self._digest is not None:
                self._digest.update(piece)
        framed = await self._open_file()
        self._entries.extend(await self._spool.frame(raw, framed, self._framer))

    async def _open_file(self) -> SpoolFile:
        file = await self._spool.open()
        self._files.append(file)
        return file


def framer_for(media_type: str, *, record_bytes_max: int) -> RecordFramer:
    """Raises UnsupportedMediaType."""
    make = _FRAMERS.get(media_type)
    if make is None:
        raise UnsupportedMediaType(
            f"Records come as {', '.join(_FRAMERS)}.",
            content_type=media_type or None,
            supported=list(_FRAMERS),
        )
    return make(record_bytes_max)
