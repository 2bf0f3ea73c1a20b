"""Directories of page blobs, kept on the local disk: a page whose blob is on the remote store alone
takes one request, not two, and a patched one two, not three.

They are a two-hundredth of what they describe, so they stay long after the hot cache has let go of
the blobs. Each is written when its blob is published or read, and found by the blob's SHA-256.

Invariants: I10: what is kept is not trusted: who asks checks its checksum and whose it is, and
drops what is wrong. I11: never more than the limit, besides what is just being written.
Concurrency: the index is confined to the event loop; the pool does the disk's work. Cancellation: a
step on the disk and its entry in the index are one. Crash: nothing is synced, for losing it costs
only time.
"""

import os
from collections import OrderedDict
from pathlib import Path
from typing import Self

from app.core.base.events import Events
from app.core.base.tasks import BlockingPool, uninterrupted
from app.core.stores.local.cache_files import CachedFile, CacheFiles


class DirectoryFiles:
    """Made by `DirectoryFiles.open`. Blobs are named by their SHA-256 in hex."""

    def __init__(self, root: Path, *, limit_bytes: int, pool: BlockingPool, events: Events) -> None:
        self._files = CacheFiles(root)
        self._limit_bytes = limit_bytes
        self._pool = pool
        self._events = events
        self._entries: OrderedDict[str, CachedFile] = OrderedDict()  # least recently used first
        self._arriving: set[str] = set()
        self.used_bytes = 0

    @classmethod
    async def open(
        cls, root: Path, *, limit_bytes: int, pool: BlockingPool, events: Events
    ) -> Self:
        """Lists what is there, oldest first, and removes what is above the limit."""
        kept = cls(root, limit_bytes=limit_bytes, pool=pool, events=events)
        for file in await pool.run(kept._files.open_blocking):
            kept._add(file)
        await uninterrupted(kept._trim())
        return kept

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    async def get(self, sha256: str) -> bytes | None:
        """What was kept, as it is on the disk now."""
        if sha256 not in self._entries:
            return None
        self._entries.move_to_end(sha256)
        try:
            return await self._pool.run(self._files.path(sha256).read_bytes)
        except OSError as error:
            self._events.warning("directory.unreadable", sha256=sha256, error=str(error))
            await self.drop(sha256)
            return None

    async def put(self, sha256: str, data: bytes) -> None:
        """Keeps it if it can be kept."""
        if sha256 in self._entries or sha256 in self._arriving or len(data) > self._limit_bytes:
            return
        self._arriving.add(sha256)
        try:
            await uninterrupted(self._put(sha256, data))
        finally:
            self._arriving.discard(sha256)

    async def put_from(self, path: Path, sha256: str, *, offset: int, length: int) -> None:
        """The same, of a blob that is a file at `path`."""
        if sha256 in self._entries or length > self._limit_bytes:
            return
        try:
            data = await self._pool.run(_read_blocking, path, offset, length)
        except OSError as error:
            self._events.warning("directory.not_kept", sha256=sha256, error=str(error))
        else:
            await self.put(sha256, data)

    async def drop(self, sha256: str) -> None:
        """It was found to be wrong. Absent is fine."""
        await uninterrupted(self._unlink([sha256] if sha256 in self._entries else []))

    async def _put(self, sha256: str, data: bytes) -> None:
        try:
            self._add(await self._pool.run(self._write_blocking, sha256, data))
        except OSError as error:
            self._events.warning("directory.not_kept", sha256=sha256, error=str(error))
        await self._trim()

    async def _trim(self) -> None:
        excess_bytes, names = self.used_bytes - self._limit_bytes, list[str]()
        for name, file in self._entries.items():
            if excess_bytes <= 0:
                break
            names.append(name)
            excess_bytes -= file.bytes
        await self._unlink(names)

    async def _unlink(self, names: list[str]) -> None:
        files = [self._entries.pop(name) for name in names]
        self.used_bytes -= sum(file.bytes for file in files)
        if files:
            await self._pool.run(self._files.unlink_blocking, files)

    def _add(self, file: CachedFile) -> None:
        self._entries[file.sha256] = file
        self.used_bytes += file.bytes

    def _write_blocking(self, sha256: str, data: bytes) -> CachedFile:
        """Raises OSError, and leaves nothing then."""
        part = self._files.new_part_blocking()
        try:
            part.write_bytes(data)
            return self._files.name_blocking(part, sha256, len(data))
        finally:
            part.unlink(missing_ok=True)


def _read_blocking(path: Path, offset: int, length: int) -> bytes:
    """What there is of it: whoever reads it checks it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)
