"""A remote store whose reads ask first: what a scan reads with.

Large reads are cut, so that a ceiling is held smoothly. Everything read through it counts as cold.
Concurrency, Cancellation: as the store inside; a reader that leaves gives its request back.
"""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from app.core.stores.remote.metered import cold_reads
from app.core.stores.remote.protocol import RemoteStore


class Turns(Protocol):
    """Whom to ask."""

    @property
    def piece_bytes_max(self) -> int | None: ...

    def request(self, size_bytes: int) -> AbstractAsyncContextManager[None]: ...


class LimitedReads:
    """The part of a RemoteStore that readers of ranges use."""

    def __init__(self, inner: RemoteStore, turns: Turns) -> None:
        self._inner = inner
        self._turns = turns

    def __repr__(self) -> str:
        return f"<LimitedReads {self._inner!r}>"

    async def get_blob(self, key: str, *, first: int = 0, length: int) -> bytes:
        most = self._turns.piece_bytes_max
        if most is None or length <= most:
            return await self._get(key, first, length)
        return b"".join([piece async for piece in self.iter_blob(key, first=first, length=length)])

    async def iter_blob(self, key: str, *, first: int = 0, length: int) -> AsyncIterator[bytes]:
        """One request a piece: nothing is left open while a reader waits its turn."""
        most = self._turns.piece_bytes_max or length
        end = first + length
        while first < end:
            piece = await self._get(key, first, min(most, end - first))
            yield piece
            if not piece:
                return
            first += len(piece)

    async def _get(self, key: str, first: int, length: int) -> bytes:
        async with self._turns.request(length):
            with cold_reads():
                return await self._inner.get_blob(key, first=first, length=length)
