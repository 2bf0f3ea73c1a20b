"""Bytes on a socket, and what comes back: for what an HTTP library does not let one say."""

import asyncio
import contextlib
import re
from dataclasses import dataclass

_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n(.*?)\r\n\r\n", re.DOTALL)


@dataclass(frozen=True)
class Told:
    """All that a server said until it closed, or until it said no more for a while."""

    raw: bytes
    closed: bool

    @property
    def statuses(self) -> list[int]:
        """Of every answer: what a smuggled request would add to."""
        return [int(found[1]) for found in _STATUS.finditer(self.raw)]

    @property
    def head(self) -> bytes:
        return self.raw.partition(b"\r\n\r\n")[0].lower()


class RawConnection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> "RawConnection":
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    def end(self) -> None:
        """Of this side: nothing more is sent, and the answer is waited for."""
        self._writer.write_eof()

    async def read(self, *, quiet_seconds: float = 1.0) -> Told:
        """Until the server closes, or is quiet for so long."""
        raw, closed = b"", False
        try:
            while True:
                piece = await asyncio.wait_for(self._reader.read(65536), quiet_seconds)
                if not piece:
                    closed = True
                    break
                raw += piece
        except TimeoutError:
            pass
        except ConnectionError:
            closed = True
        return Told(raw, closed)

    async def aclose(self) -> None:
        self._writer.transport.abort()  # whatever was not sent yet goes, too
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


async def told(port: int, data: bytes, *, quiet_seconds: float = 1.0) -> Told:
    connection = await RawConnection.open(port)
    try:
        await connection.send(data)
        return await connection.read(quiet_seconds=quiet_seconds)
    finally:
        await connection.aclose()
