"""Where bytes are read from: an open file, or an object on the remote store.

Nothing here checks a checksum; who asks for bytes does (I10).
Concurrency: files are read in the pool. Cancellation: a read of a file is waited for, so that its
descriptor is never closed under it.
"""

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal, Protocol

from app.core.base.tasks import BlockingPool, acquired, uninterrupted
from app.core.formats.damage import Damage
from app.core.stores.local.disk import want_of_means

Tier = Literal["wal", "local", "remote"]


class RangeReads(Protocol):
    """The part of a remote store that reading needs: a RemoteStore, or one that asks first."""

    def get_blob(self, key: str, *, first: int, length: int) -> Awaitable[bytes]: ...


class ByteSource(Protocol):
    @property
    def tier(self) -> Tier: ...

    async def read(self, first: int, length: int) -> bytes:
        """Exactly these bytes, in memory. Raises Damage if there are fewer."""
        ...


class LocalFile:
    """An open file; `on_close` lets go of it."""

    __slots__ = ("_descriptor", "_on_close", "_pool", "tier")

    def __init__(
        self, descriptor: int, *, tier: Tier, pool: BlockingPool, on_close: Callable[[], None]
    ) -> None:
        self.tier: Tier = tier
        self._descriptor = descriptor
        self._pool = pool
        self._on_close = on_close

    @classmethod
    async def open(cls, path: Path, *, tier: Tier, pool: BlockingPool) -> "LocalFile":
        """Raises OSError, and NotReady where the process has no descriptor left."""
        try:
            descriptor = await acquired(
                pool.run(os.open, path, os.O_RDONLY | os.O_CLOEXEC), give_back=os.close
            )
        except OSError as error:
            if (means := want_of_means(error)) is not None:
                raise means from error
            raise
        return cls(descriptor, tier=tier, pool=pool, on_close=lambda: os.close(descriptor))

    async def read(self, first: int, length: int) -> bytes:
        return await uninterrupted(
            self._pool.run(read_exactly_blocking, self._descriptor, first, length)
        )

    def close(self) -> None:
        """Again is harmless."""
        if self._descriptor >= 0:
            self._descriptor = -1
            self._on_close()


class RemoteBlob:
    """An object, read by ranges. Holds nothing open between reads, however slow its reader."""

    __slots__ = ("_key", "_store")

    tier: Tier = "remote"

    def __init__(self, store: RangeReads, key: str) -> None:
        self._store = store
        self._key = key

    async def read(self, first: int, length: int) -> bytes:
        data = await self._store.get_blob(self._key, first=first, length=length)
        if len(data) != length:
            raise Damage(f"{len(data)} bytes instead of {length}", offset=first)
        return data


def read_exactly_blocking(descriptor: int, first: int, length: int) -> bytes:
    data = os.pread(descriptor, length, first)
    while len(data) < length:
        more = os.pread(descriptor, length - len(data), first + len(data))
        if not more:
            raise Damage("file is cut off", offset=first + len(data))
        data += more
    return data
