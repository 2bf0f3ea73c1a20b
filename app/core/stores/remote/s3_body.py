"""The body of an upload: a file's bytes, streamed in pieces, never held in memory as a whole.

botocore wants `read`, `seek` and `tell`, aiohttp `__aiter__`. A piece that lies in the page cache
is read on the event loop (RWF_NOWAIT cannot wait for the disk), any other in the blocking pool.
"""

import os
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Self

from app.core.base.errors import CorruptBlob
from app.core.base.tasks import BlockingPool, acquired

PIECE_BYTES = 1024 * 1024


class FileStream:
    """`length` bytes of a file from `first` on. Iterating starts anew each time."""

    def __init__(
        self,
        fd: int,
        *,
        first: int,
        length: int,
        pool: BlockingPool,
        progress: Sequence[Callable[[], None]],
    ) -> None:
        """Those of `progress` are called as each piece is asked for: the transport took the one
        before.
        """
        self._fd = fd
        self._first = first
        self._length = length
        self._pool = pool
        self._progress = progress
        self._position = 0
        self.failure: Exception | None = None
        """Why the file could not be read; the transport reports it as a broken connection."""

    def __len__(self) -> int:
        return self._length

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        match whence:
            case os.SEEK_SET:
                self._position = offset
            case os.SEEK_CUR:
                self._position += offset
            case _:
                self._position = self._length + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Part of the interface that botocore looks for; an unsigned payload is never read so."""
        left = self._length - self._position
        wanted = left if size < 0 else min(size, left)
        data = os.pread(self._fd, wanted, self._first + self._position)
        self._position += len(data)
        return data

    async def __aiter__(self) -> AsyncIterator[memoryview | bytes]:
        offset, end = self._first, self._first + self._length
        while offset < end:
            self._tell()
            piece = await self._piece(min(PIECE_BYTES, end - offset), offset)
            offset += len(piece)
            yield piece
        self._tell()

    def _tell(self) -> None:
        for told in self._progress:
            told()

    async def _piece(self, size: int, offset: int) -> memoryview | bytes:
        try:
            piece = _read_cached(self._fd, size, offset)
            if piece is not None:
                return piece
            data = await self._pool.run(os.pread, self._fd, size, offset)
            if not data:
                raise CorruptBlob("The file became shorter while it was uploaded.")
        except (OSError, CorruptBlob) as error:
            self.failure = error
            raise
        return data


class OpenedFile:
    """A file descriptor that is closed with the block. Opening a local file is quick; still the
    disk may have to answer, so it happens in the pool.
    """

    def __init__(self, path: Path, *, length: int, pool: BlockingPool) -> None:
        self._path = path
        self._length = length
        self._pool = pool
        self.fd = -1

    async def __aenter__(self) -> Self:
        self.fd = await acquired(
            self._pool.run(os.open, self._path, os.O_RDONLY | os.O_CLOEXEC), give_back=os.close
        )
        found = os.fstat(self.fd).st_size
        if found != self._length:
            os.close(self.fd)
            raise CorruptBlob(
                "The file to upload has not the recorded length.",
                bytes=found,
                expected=self._length,
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        os.close(self.fd)


def _read_cached(fd: int, size: int, offset: int) -> memoryview | None:
    """None where the bytes are not in the page cache, or the file system cannot say."""
    buffer = bytearray(size)
    try:
        count = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except OSError:
        return None  # EAGAIN, EOPNOTSUPP; a true error shows again in the pool's read
    return memoryview(buffer)[:count] if count else None
