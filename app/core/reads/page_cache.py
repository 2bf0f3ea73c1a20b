"""Whole pages in memory, by the blob that holds them: least recently used go first.

Invariants: I11: what is held, its book-keeping included, never passes the limit. I10: only pages
whose checksum was checked are put in. A key names content (the blob's SHA-256 and a page), so
nothing stale can be met, and forks share what they have in common.
Concurrency: every method belongs to the event loop. Cancellation: nothing here awaits.
Crash: nothing here outlives the process.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from app.core.base.errors import InvariantViolation

ENTRY_BYTES = 256
"""About what a page costs beside its content: key, entry, and two places in tables."""


class PageKey(NamedTuple):
    blob_sha256: bytes
    page_no: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchOptions:
    """How one read treats the cache."""

    populate: bool = True
    """Keep what had to be fetched."""
    pin: bool = False
    """Keep the page at least as long as the read's point is held; does nothing without
    `populate` for a page that is not there yet."""
    bypass: bool = False
    """Neither look into the cache nor change it: for scans that would only push others out."""

    def __post_init__(self) -> None:
        if self.pin and self.bypass:
            raise InvariantViolation("A read cannot pin in a cache that it bypasses.")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointScope:
    """Which chunks a checkpoint holds leases on."""

    db_id: int
    chunk_ids: tuple[int, ...]


class PageCacheObserver(Protocol):
    """Told at once, on the event loop; must not block, raise, or change the cache."""

    def on_checkpoint_start(self, scope: CheckpointScope) -> None: ...

    def on_checkpoint_end(self, scope: CheckpointScope, *, generation: int | None) -> None:
        """`generation` is what was published; None if nothing was."""
        ...

    def on_evict(self, key: PageKey, *, page_bytes: int) -> None:
        """The page went to make room. It can be fetched again."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCacheStats:
    limit_bytes: int
    used_bytes: int
    entries: int
    pinned: int
    hits: int
    misses: int
    evictions: int


class _Entry:
    __slots__ = ("data", "pins")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.pins = 0


class PageCache:
    def __init__(self, *, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._entries: OrderedDict[PageKey, _Entry] = OrderedDict()  # unpinned, oldest use first
        self._pinned: dict[PageKey, _Entry] = {}
        self._used_bytes = 0
        self._pinned_bytes = 0
        self._hits = self._misses = self._evictions = 0
        self._observers: list[PageCacheObserver] = []

    def __repr__(self) -> str:
        return f"<PageCache {self._used_bytes}/{self._limit_bytes} bytes, {len(self)} pages>"

    def __len__(self) -> int:
        return len(self._entries) + len(self._pinned)

    def __contains__(self, key: PageKey) -> bool:
        """Whether it is there now; neither a hit nor a miss, and not a use."""
        return key in self._entries or key in self._pinned

    def stats(self) -> PageCacheStats:
        return PageCacheStats(
            limit_bytes=self._limit_bytes,
            used_bytes=self._used_bytes,
            entries=len(self),
            pinned=len(self._pinned),
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
        )

    def set_limit(self, limit_bytes: int) -> None:
        """Evicts down to it as far as pins allow; nothing comes in until use has fallen."""
        self._limit_bytes = limit_bytes
        self._make_room(0)

    # --- pages

    def get(self, key: PageKey) -> bytes | None:
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        else:
            entry = self._pinned.get(key)
        if entry is None:
            self._misses += 1
            return None
        self._hits += 1
        return entry.data

    def put(self, key: PageKey, data: bytes) -> bool:
        """True: it is in the cache. False: there is no room beside what is pinned."""
        if key in self._entries:
            self._entries.move_to_end(key)
            return True
        if key in self._pinned:
            return True
        if not self._make_room(len(data) + ENTRY_BYTES):
            return False
        self._entries[key] = _Entry(data)
        self._used_bytes += len(data) + ENTRY_BYTES
        return True

    def pin(self, key: PageKey) -> bool:
        """Safe from eviction until as many `unpin`s. False: it is not in the cache."""
        entry = self._pinned.get(key)
        if entry is None:
            entry = self._entries.pop(key, None)
            if entry is None:
                return False
            self._pinned[key] = entry
            self._pinned_bytes += len(entry.data) + ENTRY_BYTES
        entry.pins += 1
        return True

    def unpin(self, key: PageKey) -> None:
        entry = self._pinned[key]
        entry.pins -= 1
        if entry.pins == 0:
            del self._pinned[key]
            self._pinned_bytes -= len(entry.data) + ENTRY_BYTES
            self._entries[key] = entry  # the newest: it was in use just now
            self._make_room(0)

    def _make_room(self, size_bytes: int) -> bool:
        """False, and nothing goes, if it could not be enough."""
        if size_bytes > 0 and self._pinned_bytes + size_bytes > self._limit_bytes:
            return False
        while self._used_bytes + size_bytes > self._limit_bytes and self._entries:
            key, entry = self._entries.popitem(last=False)
            page_bytes = len(entry.data)
            self._used_bytes -= page_bytes + ENTRY_BYTES
            self._evictions += 1
            for observer in self._observers:
                observer.on_evict(key, page_bytes=page_bytes)
        return True

    # --- observers

    def subscribe(self, observer: PageCacheObserver) -> None:
        self._observers.append(observer)

    def unsubscribe(self, observer: PageCacheObserver) -> None:
        self._observers.remove(observer)

    @property
    def observers(self) -> Sequence[PageCacheObserver]:
        return tuple(self._observers)

    def checkpoint_started(self, scope: CheckpointScope) -> None:
        """A checkpoint holds the leases of these chunks from now on."""
        for observer in self._observers:
            observer.on_checkpoint_start(scope)

    def checkpoint_ended(self, scope: CheckpointScope, *, generation: int | None) -> None:
        """Published (`generation`), or ended without."""
        for observer in self._observers:
            observer.on_checkpoint_end(scope, generation=generation)
