"""Tells of every request as `remote.requested`: op, outcome, seconds, bytes read and written, and
whether it was made for a scan (`cold`) or for anything else (`normal`).

Concurrency, Cancellation: as the store inside. A cancelled request counts as `cancelled`, an absent
object and a lost race as `ok`.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextvars import ContextVar
from typing import Literal

from app.core.base.clock import Clock
from app.core.base.events import Events
from app.core.stores.remote.protocol import BlobInfo, BlobMissing, Body, BytesBody, RemoteStore
from app.core.stores.remote.streams import closing

ReadMode = Literal["normal", "cold"]
_read_mode: ContextVar[ReadMode] = ContextVar("read_mode", default="normal")


@contextlib.contextmanager
def cold_reads() -> Iterator[None]:
    """Requests made within count as cold: nothing below needs to know who reads."""
    token = _read_mode.set("cold")
    try:
        yield
    finally:
        _read_mode.reset(token)


class _Count:
    __slots__ = ("read", "written")

    def __init__(self) -> None:
        self.read = 0
        self.written = 0


class Metered(RemoteStore):
    def __init__(self, inner: RemoteStore, *, clock: Clock, events: Events) -> None:
        self._inner = inner
        self._clock = clock
        self._events = events

    def __repr__(self) -> str:
        return f"<Metered {self._inner!r}>"

    async def put_blob(self, key: str, body: Body) -> BlobInfo:
        with self._request("put_blob") as count:
            info = await self._inner.put_blob(key, body)
            count.written = body.bytes
            return info

    async def put_if_absent(self, key: str, body: BytesBody) -> BlobInfo | None:
        with self._request("put_if_absent") as count:
            info = await self._inner.put_if_absent(key, body)
            count.written = body.bytes if info else 0
            return info

    async def put_if_match(self, key: str, body: BytesBody, *, etag: str) -> BlobInfo | None:
        with self._request("put_if_match") as count:
            info = await self._inner.put_if_match(key, body, etag=etag)
            count.written = body.bytes if info else 0
            return info

    async def head_blob(self, key: str) -> BlobInfo | None:
        with self._request("head_blob"):
            return await self._inner.head_blob(key)

    async def get_blob(self, key: str, *, first: int = 0, length: int | None = None) -> bytes:
        with self._request("get_blob") as count:
            data = await self._inner.get_blob(key, first=first, length=length)
            count.read = len(data)
            return data

    async def iter_blob(
        self, key: str, *, first: int = 0, length: int | None = None
    ) -> AsyncIterator[bytes]:
        """Counts as `get_blob`; the seconds include the consumer's own."""
        with self._request("get_blob") as count:
            async with closing(self._inner.iter_blob(key, first=first, length=length)) as stream:
                async for piece in stream:
                    count.read += len(piece)
                    yield piece

    async def delete_blobs(self, keys: Sequence[str]) -> Sequence[str]:
        with self._request("delete_blobs"):
            return await self._inner.delete_blobs(keys)

    async def list_blobs(self, prefix: str) -> AsyncIterator[BlobInfo]:
        with self._request("list_blobs"):
            async with closing(self._inner.list_blobs(prefix)) as found:
                async for info in found:
                    yield info

    async def aclose(self) -> None:
        await self._inner.aclose()

    @contextlib.contextmanager
    def _request(self, op: str) -> Iterator[_Count]:
        count = _Count()
        begun = self._clock.monotonic()
        outcome = "error"
        try:
            yield count
            outcome = "ok"
        except BlobMissing:
            outcome = "ok"
            raise
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "cancelled"
            raise
        finally:
            self._events.debug(
                "remote.requested",
                op=op,
                outcome=outcome,
                seconds=self._clock.monotonic() - begun,
                bytes_read=count.read,
                mode=_read_mode.get(),
                bytes_written=count.written,
            )
