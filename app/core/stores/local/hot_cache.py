"""Blobs kept on the local disk: files named by their SHA-256, least recently used go first.

Invariants: I11: files in the cache and those arriving never pass the limit. I10: what is streamed
in is checked against its SHA-256 before it gets its name; a linked file was hashed when it was
staged, and readers check every block. Entries are whole blobs, so nothing stale can be met.
Concurrency: the index is confined to the event loop; the pool does the disk's work. A name that is
arriving or leaving is nobody else's to add or remove. A pinned file is not evicted; dropping one
unlinks it under its readers, whose descriptors stay good.
Cancellation: a step on the disk and its entry in the index are one: it ends first, then the
cancellation is raised.
Crash: nothing is synced, for losing it all costs only time; `open` lists what is there. After a
power cut a file may hold rubbish: `verify` finds it, or the readers' block checks, which `drop` it.
"""

import errno
import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from app.core.base.errors import InvariantViolation
from app.core.base.events import Events
from app.core.base.tasks import BlockingPool, acquired, uninterrupted
from app.core.stores.file_account import CacheAccount, NoAccount
from app.core.stores.local.cache_files import CachedFile, CacheFiles, is_sha256
from app.core.stores.local.cache_writer import CacheWriter
from app.core.stores.local.pinned_file import PinnedFile

# Any other failure to open, too many open files above all, says nothing of the file.
_FILE_IS_LOST = frozenset({errno.ENOENT, errno.EIO, errno.ESTALE})


@dataclass(frozen=True, slots=True, kw_only=True)
class HotCacheStats:
    limit_bytes: int
    used_bytes: int
    entries: int
    pinned: int
    hits: int
    misses: int
    evictions: int


@dataclass(slots=True, eq=False)
class _Entry:
    file: CachedFile
    pins: int = 0


def plan_eviction(oldest_first: Iterable[tuple[str, int]], need_bytes: int) -> list[str] | None:
    """Whom to evict so that `need_bytes` go; None if all of them together are not enough."""
    victims: list[str] = []
    if need_bytes <= 0:
        return victims
    for sha256, size_bytes in oldest_first:
        victims.append(sha256)
        need_bytes -= size_bytes
        if need_bytes <= 0:
            return victims
    return None


class HotCache:
    """Made by `HotCache.open`. Also a quota's `Reclaimer`."""

    def __init__(
        self,
        root: Path,
        *,
        limit_bytes: int,
        pool: BlockingPool,
        events: Events,
        account: CacheAccount | None = None,
    ) -> None:
        self._files = CacheFiles(root)
        self._limit_bytes = limit_bytes
        self._pool = pool
        self._events = events
        self._account = account or NoAccount()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._used_bytes = 0
        self._arriving: dict[str, int] = {}
        self._leaving: set[str] = set()
        self._hits = self._misses = self._evictions = 0

    def __repr__(self) -> str:
        return f"<HotCache {self._used_bytes}/{self._limit_bytes} bytes, {len(self)} files>"

    @classmethod
    async def open(
        cls,
        root: Path,
        *,
        limit_bytes: int,
        pool: BlockingPool,
        events: Events,
        account: CacheAccount | None = None,
    ) -> Self:
        """Lists the directory, oldest file first, and evicts what is above the limit."""
        cache = cls(root, limit_bytes=limit_bytes, pool=pool, events=events, account=account)
        for file in await pool.run(cache._files.open_blocking):
            cache._add(file)
        await cache.set_limit(limit_bytes)
        return cache

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, sha256: str) -> bool:
        """Whether it is there now; neither a hit nor a miss, and not a use."""
        return sha256 in self._entries

    def stats(self) -> HotCacheStats:
        return HotCacheStats(
            limit_bytes=self._limit_bytes,
            used_bytes=self._used_bytes,
            entries=len(self._entries),
            pinned=sum(entry.pins > 0 for entry in self._entries.values()),
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
        )

    async def set_limit(self, limit_bytes: int) -> None:
        """Evicts down to it as far as pins allow; admissions are refused until use has fallen."""
        self._limit_bytes = limit_bytes
        unpinned = self._unpinned()
        excess_bytes = self._used_bytes + sum(self._arriving.values()) - limit_bytes
        victims = plan_eviction(unpinned, excess_bytes)
        files = self._take_out([name for name, _ in unpinned] if victims is None else victims)
        await uninterrupted(self._unlink(files))

    # --- in

    async def admit_link(self, source: Path, *, sha256: str, size_bytes: int) -> bool:
        """Hard-links `source`, which is never written again; copies it across file systems.

        True: it is in the cache. False: it is not, and need not be (no room, no such file, a file
        of another size, the disk is full).
        """
        return await uninterrupted(self._admit_link(source, sha256, size_bytes))

    async def _admit_link(self, source: Path, sha256: str, size_bytes: int) -> bool:
        with self._arrival(sha256, size_bytes) as room:
            if room is None:
                return self._is_known(sha256)
            await self._unlink(self._take_out(room))
            try:
                file = await self._pool.run(self._files.link_blocking, source, sha256, size_bytes)
            except OSError as error:
                self._events.warning("hot_cache.not_admitted", sha256=sha256, error=str(error))
                return False
            self._add(file)
        return True

    @asynccontextmanager
    async def writer(self, *, sha256: str, size_bytes: int) -> AsyncIterator[CacheWriter]:
        """For a download: `write` its pieces, then `commit`. Left without, nothing remains."""
        with self._arrival(sha256, size_bytes, is_new=True) as room:
            if room is not None:
                await uninterrupted(self._unlink(self._take_out(room)))
            writer = CacheWriter(
                self._files,
                sha256=sha256,
                size_bytes=size_bytes,
                pool=self._pool,
                events=self._events,
                on_commit=self._add,
                wanted=room is not None,
            )
            try:
                yield writer
            finally:
                await writer.aclose()

    # --- reading

    async def pin(self, sha256: str, *, expected_bytes: int | None = None) -> PinnedFile | None:
        """The file, open, safe from eviction until closed; None is a miss.

        A file that vanished or has another size than it should is dropped, and a miss.
        """
        entry = self._entries.get(sha256)
        if entry is None:
            self._misses += 1
            return None
        entry.pins += 1
        self._entries.move_to_end(sha256)
        try:
            pinned = await self._open(sha256, entry)
        except OSError as error:
            self._misses += 1
            self._events.warning("hot_cache.unreadable", sha256=sha256, error=str(error))
            if error.errno in _FILE_IS_LOST:
                await self._drop_entry(sha256, entry)
            return None
        wanted_bytes = entry.file.bytes if expected_bytes is None else expected_bytes
        if pinned.size_bytes != wanted_bytes:
            pinned.close()
            self._misses += 1
            await self._drop_entry(sha256, entry)
            return None
        self._hits += 1
        return pinned

    async def _open(self, sha256: str, entry: _Entry) -> PinnedFile:
        try:
            descriptor = await acquired(
                self._pool.run(self._files.open_file_blocking, sha256), give_back=os.close
            )
        except BaseException:
            self._unpin(entry)
            raise
        return PinnedFile(
            descriptor,
            sha256=sha256,
            size_bytes=os.fstat(descriptor).st_size,
            on_close=lambda: self._unpin(entry),
        )

    def _unpin(self, entry: _Entry) -> None:
        entry.pins -= 1
        assert entry.pins >= 0

    async def verify(self, sha256: str) -> bool:
        """Whether the file is what its name says; one that is not is dropped. Absent is fine, and
        it is no use of the file.
        """
        entry = self._entries.get(sha256)
        if entry is None:
            return True
        entry.pins += 1
        try:
            pinned = await self._open(sha256, entry)
        except OSError as error:
            if error.errno in _FILE_IS_LOST:
                await self._drop_entry(sha256, entry)
                return False
            return True
        try:
            found = await uninterrupted(
                self._pool.run(self._files.hash_blocking, pinned.descriptor)
            )
        except OSError as error:
            found = str(error)
        finally:
            pinned.close()
        if found != sha256:
            await self._drop_entry(sha256, entry)
        return found == sha256

    def names(self) -> tuple[str, ...]:
        """Of all files, least recently used first."""
        return tuple(self._entries)

    def refresh(self, sha256: str) -> bool:
        """Whether it is there; where it is, this counts as a use, but not as a hit."""
        return self._is_known(sha256)

    def has_room(self, size_bytes: int, *, beside: Collection[str]) -> bool:
        """Whether a new file fits without any of `beside` being evicted for it."""
        used_bytes = self._used_bytes + sum(self._arriving.values())
        need_bytes = max(
            used_bytes + size_bytes - self._limit_bytes, self._account.missing_bytes(size_bytes)
        )
        if need_bytes <= 0:
            return True
        return need_bytes <= sum(size for name, size in self._unpinned() if name not in beside)

    def path_of(self, sha256: str) -> Path:
        """Of a file that is pinned: it keeps its name unless it is dropped as damaged."""
        return self._files.path(sha256)

    # --- out

    async def drop(self, sha256: str) -> None:
        """Removes a damaged file, pinned or not. Absent is fine."""
        if (entry := self._entries.get(sha256)) is not None:
            await self._drop_entry(sha256, entry)

    async def forget(self, sha256: str) -> None:
        """The blob was collected: its file goes unless someone reads it. Absent is fine."""
        entry = self._entries.get(sha256)
        if entry is not None and entry.pins == 0:
            await uninterrupted(self._unlink(self._take_out([sha256])))

    async def _drop_entry(self, sha256: str, entry: _Entry) -> None:
        if self._entries.get(sha256) is entry:  # else another file has taken its place
            self._events.warning("hot_cache.dropped", sha256=sha256)
            await uninterrupted(self._unlink(self._take_out([sha256])))

    async def evict(self, size_bytes: int) -> int:
        """Evicts unpinned files, least recently used first, until `size_bytes` are free on the
        disk; returns how many are. Files that are linked elsewhere stay: they would free nothing.
        """
        return await uninterrupted(self._evict(size_bytes))

    async def reclaim(self, size_bytes: int) -> int:
        return await self.evict(size_bytes)

    async def _evict(self, size_bytes: int) -> int:
        freed_bytes, shared = 0, set[str]()
        while freed_bytes < size_bytes:
            candidates = [pair for pair in self._unpinned() if pair[0] not in shared]
            if not candidates:
                break
            victims = plan_eviction(candidates, size_bytes - freed_bytes)
            names = [name for name, _ in candidates] if victims is None else victims
            alone = await self._pool.run(self._files.unshared_blocking, names)
            shared.update(set(names) - alone)
            # Looked at again: while the pool looked, some may have been pinned or removed.
            unpinned = {name for name, _ in self._unpinned()}
            files = self._take_out([name for name in names if name in alone & unpinned])
            freed_bytes += await self._unlink(files)
        return freed_bytes

    # --- the index

    def _unpinned(self) -> list[tuple[str, int]]:
        return [
            (sha256, entry.file.bytes) for sha256, entry in self._entries.items() if entry.pins == 0
        ]

    @contextmanager
    def _arrival(
        self, sha256: str, size_bytes: int, *, is_new: bool = False
    ) -> Iterator[list[str] | None]:
        """Room for a file while it arrives: whom to evict for it, or None if it cannot come in.
        A new one takes room on the disk that a link does not.
        """
        if not is_sha256(sha256) or size_bytes < 0:
            raise InvariantViolation("Not a blob's SHA-256 and size.", sha256=sha256)
        used_bytes = self._used_bytes + sum(self._arriving.values())
        busy = sha256 in self._entries or sha256 in self._arriving or sha256 in self._leaving
        need_bytes = used_bytes + size_bytes - self._limit_bytes
        if is_new:
            need_bytes = max(need_bytes, self._account.missing_bytes(size_bytes))
        victims = None if busy else plan_eviction(self._unpinned(), need_bytes)
        if victims is None:
            yield None
            return
        self._arriving[sha256] = size_bytes
        try:
            yield victims
        finally:
            # A file that got in counts as an entry from then on.
            self._arriving.pop(sha256, None)

    def _is_known(self, sha256: str) -> bool:
        if sha256 in self._entries:
            self._entries.move_to_end(sha256)
        return sha256 in self._entries

    def _add(self, file: CachedFile) -> None:
        assert file.sha256 not in self._entries
        self._arriving.pop(file.sha256, None)
        self._entries[file.sha256] = _Entry(file)
        self._used_bytes += file.bytes
        self._account.charge(
            file.sha256, device=file.device, inode=file.inode, size_bytes=file.bytes
        )

    def _take_out(self, names: Sequence[str]) -> list[CachedFile]:
        """From the index, with no await since they were chosen; `_unlink` must follow."""
        files = [self._entries.pop(name).file for name in names]
        self._used_bytes -= sum(file.bytes for file in files)
        self._leaving.update(names)
        return files

    async def _unlink(self, files: Sequence[CachedFile]) -> int:
        """From the disk; returns the bytes that this freed. Only inside `uninterrupted`."""
        if not files:
            return 0
        try:
            outcome = await self._pool.run(self._files.unlink_blocking, files)
        finally:
            self._leaving.difference_update(file.sha256 for file in files)
        for file in outcome.gone:
            self._account.discharge(file.sha256, device=file.device, inode=file.inode)
        self._evictions += len(outcome.gone)
        for file, error in outcome.failed:
            # It stays charged: it is still there, and the next start finds it again.
            self._events.error("hot_cache.not_removed", sha256=file.sha256, error=error)
        return outcome.freed_bytes
