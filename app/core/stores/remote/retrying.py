"""Tries again, with patience and in moderation, and never guesses.

Invariants: an upload whose answer was lost is looked up before it is repeated, and adopted if the
store holds our very bytes (I15, I7); a conditional write that lost is compared with what is there,
because a lost answer or a repeating proxy makes us lose against ourselves; attempts, their number
at once and the budget for all of them are bounded (I11).
Concurrency: throttling lowers the number of requests in flight for all callers; waits between
attempts hold no slot.
Cancellation: ends the wait or the request; nothing goes on behind.
Crash: nothing is kept.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

from app.core.base.errors import BopError, CorruptBlob, OutcomeUnknown
from app.core.stores.remote.protocol import (
    BlobInfo,
    BlobMissing,
    Body,
    BytesBody,
    RemoteStore,
    UploadCorrupted,
)
from app.core.stores.remote.requests import ConcurrencyLimit, Retrier
from app.core.stores.remote.streams import closing

T = TypeVar("T")


class Retrying(RemoteStore):
    def __init__(self, inner: RemoteStore, *, retrier: Retrier, limit: ConcurrencyLimit) -> None:
        self._inner = inner
        self._retrier = retrier
        self._limit = limit

    @property
    def limit(self) -> ConcurrencyLimit:
        return self._limit

    def __repr__(self) -> str:
        return f"<Retrying {self._inner!r}>"

    async def put_blob(self, key: str, body: Body) -> BlobInfo:
        """Raises CorruptBlob where the body arrives damaged twice: then it is damaged here."""

        async def adopt() -> BlobInfo | None:
            found = await self.head_blob(key)
            if found is None or (found.bytes, found.crc64) != (body.bytes, body.crc64):
                return None
            return found

        return await self._put("put_blob", key, lambda: self._inner.put_blob(key, body), adopt)

    async def put_if_absent(self, key: str, body: BytesBody) -> BlobInfo | None:
        """None only if something else is there: an object equal to ours is ours."""
        return await self._put_if(
            "put_if_absent", key, body, lambda: self._inner.put_if_absent(key, body)
        )

    async def put_if_match(self, key: str, body: BytesBody, *, etag: str) -> BlobInfo | None:
        """None only if something else is there, or nothing: an object equal to ours is ours."""
        return await self._put_if(
            "put_if_match", key, body, lambda: self._inner.put_if_match(key, body, etag=etag)
        )

    async def _put_if(
        self,
        op: str,
        key: str,
        body: BytesBody,
        put_once: Callable[[], Awaitable[BlobInfo | None]],
    ) -> BlobInfo | None:
        async def adopt() -> BlobInfo | None:
            return await self._equal_object(key, body)

        info = await self._put(op, key, put_once, adopt)
        return info or await adopt()

    async def _put(
        self,
        op: str,
        key: str,
        put_once: Callable[[], Awaitable[T]],
        adopt: Callable[[], Awaitable[T | None]],
    ) -> T:
        """`adopt` looks whether a put of unknown outcome took effect."""
        attempt = 0
        while True:
            attempt += 1
            try:
                async with self._limit.slot():
                    info = await put_once()
            except OutcomeUnknown as unknown:
                try:
                    ours = await adopt()
                except BopError as error:
                    raise unknown from error  # still unknown, and the caller must know that
                if ours is not None:
                    return ours
                await self._retrier.back_off(op, unknown, attempt=attempt)
            except BopError as error:
                try:
                    await self._retrier.back_off(op, error, attempt=attempt)
                except UploadCorrupted as damaged:
                    raise CorruptBlob(
                        "The bytes to upload do not match their recorded checksum.", key=key
                    ) from damaged
            else:
                self._retrier.succeeded()
                return info

    async def _equal_object(self, key: str, body: BytesBody) -> BlobInfo | None:
        """What is at the key, if its bytes are ours."""
        found = await self.head_blob(key)
        if found is None or (found.bytes, found.crc64 or body.crc64) != (body.bytes, body.crc64):
            return None
        try:
            data = await self.get_blob(key)
        except BlobMissing:
            return None
        return found if data == body.data else None

    async def head_blob(self, key: str) -> BlobInfo | None:
        return await self._run("head_blob", lambda: self._inner.head_blob(key))

    async def get_blob(self, key: str, *, first: int = 0, length: int | None = None) -> bytes:
        return await self._run(
            "get_blob", lambda: self._inner.get_blob(key, first=first, length=length)
        )

    async def iter_blob(
        self, key: str, *, first: int = 0, length: int | None = None
    ) -> AsyncIterator[bytes]:
        """Goes on behind the last byte that arrived when a connection breaks; attempts count anew
        with each byte that arrives. A slot is held until the first byte, not while the consumer
        works: one that makes other requests meanwhile must not wait for itself.
        """
        arrived, attempt = 0, 0
        while True:
            attempt += 1
            left = None if length is None else length - arrived
            try:
                async with closing(
                    self._inner.iter_blob(key, first=first + arrived, length=left)
                ) as stream:
                    async with self._limit.slot():
                        piece = await anext(stream, None)
                    while piece is not None:
                        arrived += len(piece)
                        attempt = 0
                        yield piece
                        piece = await anext(stream, None)
            except CorruptBlob:
                raise  # what was handed out cannot be taken back
            except BopError as error:
                await self._retrier.back_off("get_blob", error, attempt=max(1, attempt))
            else:
                self._retrier.succeeded()
                return

    async def delete_blobs(self, keys: Sequence[str]) -> Sequence[str]:
        return await self._run("delete_blobs", lambda: self._inner.delete_blobs(keys))

    async def list_blobs(self, prefix: str) -> AsyncIterator[BlobInfo]:
        """The store itself tries each page again: begun anew, a listing would repeat itself."""
        async with closing(self._inner.list_blobs(prefix)) as found:
            async for info in found:
                yield info

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _run(self, op: str, request: Callable[[], Awaitable[T]]) -> T:
        async def attempt_once() -> T:
            async with self._limit.slot():
                return await request()

        return await self._retrier.run(op, attempt_once)
