"""Builders for tests of the remote store."""

import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from app.core.base.clock import Clock, SeededRandomness, SystemClock
from app.core.base.events import Events
from app.core.formats.crc64 import crc64
from app.core.stores.remote.open import RemoteOptions, open_remote
from app.core.stores.remote.protocol import BytesBody, FileBody, RemoteStore


def bytes_body(data: bytes) -> BytesBody:
    return BytesBody(data=data, crc64=crc64(data))


def file_body(path: Path, data: bytes) -> FileBody:
    path.write_bytes(data)
    return FileBody(path=path, bytes=len(data), crc64=crc64(data))


class EventLog:
    """What was emitted, in order."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, dict[str, object]]] = []
        self.events = Events(self._record)

    def _record(self, name: str, level: str, fields: Mapping[str, object]) -> None:
        self.entries.append((name, dict(fields)))

    def named(self, name: str) -> list[dict[str, object]]:
        return [fields for found, fields in self.entries if found == name]


@contextlib.asynccontextmanager
async def opened_remote(
    url: str,
    options: RemoteOptions | None = None,
    *,
    clock: Clock | None = None,
    log: EventLog | None = None,
    seed: int = 7,
) -> AsyncIterator[RemoteStore]:
    """The store with its decorators, as the service opens it."""
    async with contextlib.AsyncExitStack() as stack:
        yield await open_remote(
            stack,
            url,
            options or RemoteOptions(),
            clock=clock or SystemClock(),
            randomness=SeededRandomness(seed),
            events=(log or EventLog()).events,
        )
