"""Bodies that are looked at as a whole: read to their end, then read again at any place.

Invariants: I11: a body takes a little of the memory that all bodies share, and goes to an unlinked
file as soon as it is larger. I13: nothing of a refused, broken or abandoned body stays.
Concurrency: a slow client holds up nobody, because nothing is locked while its body arrives; a
piece is written while the next one arrives.
Cancellation: leaving `RawBody` gives back memory and lets the file go, once the last thread that
reads it has let go as well. Crash: an unlinked file goes with the process.
"""

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Protocol, Self

from app.core.base.errors import InvalidRequest
from app.routers.bodies import BodyMemory, BodyReader, Spool, SpoolFile

HELD_BYTES_MAX = 4 * 1024 * 1024
"""What one body may take of the shared memory."""
WRITE_BYTES = 256 * 1024


class HeldBody:
    def __init__(self, data: bytearray) -> None:
        self._data = memoryview(data)

    @property
    def size_bytes(self) -> int:
        return len(self._data)

    def read_blocking(self, offset: int, length: int) -> memoryview:
        return self._data[offset : offset + length]


class SpooledBody:
    def __init__(self, file: SpoolFile, size_bytes: int) -> None:
        self._file = file
        self.size_bytes = size_bytes

    def read_blocking(self, offset: int, length: int) -> bytes:
        data = os.pread(self._file.fd, length, offset)
        while len(data) < length:
            more = os.pread(self._file.fd, length - len(data), offset + len(data))
            if not more:
                raise OSError(errno.EIO, "the spool file is shorter than what was written to it")
            data += more
        return data


class Draft(Protocol):
    """Where a body may go instead of into a spool file. Appended to in order, by one thread at a
    time; another syncs.
    """

    @property
    def size_bytes(self) -> int: ...

    def append_blocking(self, piece: bytes | bytearray) -> None: ...

    def sync_blocking(self) -> None:
        """What will not change any more."""
        ...

    def read_blocking(self, offset: int, length: int) -> bytes | memoryview: ...

    def close_blocking(self) -> None:
        """What was not taken over goes; other threads may still be at it."""
        ...


async def _no_draft(_head: bytes) -> None:
    """Bodies go into the spool."""


class RawBody:
    """`async with`, `read`, then what that gave until the block is left.

    `check_head` is given the first `head_bytes` as soon as they are there (or all, if there are
    fewer) and may refuse the body by raising. `draft` is given them where the body is too large for
    memory, and says where it goes, if not into a spool file.
    """

    def __init__(
        self,
        reader: BodyReader,
        *,
        memory: BodyMemory,
        spool: Spool,
        head_bytes: int = 0,
        check_head: Callable[[bytes], None] | None = None,
        draft: Callable[[bytes], Awaitable[Draft | None]] = _no_draft,
    ) -> None:
        self._reader = reader
        self._memory = memory
        self._spool = spool
        self._head_bytes = head_bytes
        self._check_head = check_head
        self._make_draft = draft
        self._held = bytearray()
        self._reserved_bytes = 0
        self._is_spilled = False
        self._file: SpoolFile | None = None
        self._draft: Draft | None = None
        self._written_bytes = 0
        self._writing: asyncio.Future[None] | None = None
        """A piece on its way into the file while the next one arrives."""
        self._syncing: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._give_back()
        if self._draft is not None:
            self._spool.begin(self._draft.close_blocking)  # a large file takes a while to go
        self._held = bytearray()
        self._file = self._draft = self._writing = self._syncing = None

    async def read(self) -> HeldBody | SpooledBody | Draft:
        """Raises BodyTooLarge, InvalidRequest, DiskFull, ClientGone, and what `check_head` and
        `draft` do.
        """
        while (piece := await self._reader.read_piece()) is not None:
            if not self._is_spilled and not self._may_hold(len(piece)):
                self._is_spilled = True
            self._held += piece
            self._look_at_head(ended=False)
            if self._is_spilled and len(self._held) >= WRITE_BYTES:
                await self._write()
        self._look_at_head(ended=True)
        if not self._is_spilled:
            return HeldBody(self._held)
        await self._write()
        await self._join_write()
        if self._draft is not None:
            if self._syncing is not None:
                await asyncio.wait({self._syncing})
            if self._written_bytes != self._draft.size_bytes:
                raise InvalidRequest(
                    f"{self._written_bytes} bytes came, {self._draft.size_bytes} were announced."
                )
            return self._draft
        assert self._file is not None
        return SpooledBody(self._file, self._written_bytes)

    def _may_hold(self, count: int) -> bool:
        if self._reserved_bytes + count > HELD_BYTES_MAX or not self._memory.try_reserve(count):
            return False
        self._reserved_bytes += count
        return True

    def _look_at_head(self, *, ended: bool) -> None:
        if self._check_head is not None and (ended or len(self._held) >= self._head_bytes):
            check, self._check_head = self._check_head, None
            check(bytes(self._held[: self._head_bytes]))

    async def _write(self) -> None:
        if self._check_head is not None:
            return  # its head is not there yet
        await self._join_write()
        if self._draft is None and self._file is None:
            self._draft = await self._make_draft(bytes(self._held[: self._head_bytes]))
            if self._draft is None:
                self._file = await self._spool.open()
        held, self._held = self._held, bytearray()
        if self._draft is not None:
            self._writing = self._spool.begin(self._draft.append_blocking, held)
            if self._syncing is None or self._syncing.done():
                self._syncing = self._spool.begin(self._draft.sync_blocking)
        else:
            assert self._file is not None
            self._writing = self._spool.begin_append(self._file, held)
        self._written_bytes += len(held)

    async def _join_write(self) -> None:
        """Raises DiskFull."""
        if self._writing is not None:
            await asyncio.wait({self._writing})
            self._writing.result()
            self._writing = None
        self._give_back()

    def _give_back(self) -> None:
        self._memory.release(self._reserved_bytes)
        self._reserved_bytes = 0
